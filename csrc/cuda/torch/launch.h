// launch.h: what every CUDA op needs from torch: the tensors' device made current, its stream, pointers, checks that can be
// made without asking the device. Not seen by kernels.
#pragma once

#include "../../tensors.h"
#include "../kernels.h"

#ifdef RK_SIMULATED_CALL  // tests/simulated: an OpCall and a dispatch key for CPU tensors
#include RK_SIMULATED_CALL
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define RK_KEY CUDA

namespace rk {

// One call of one op: while it lives, the device of `like` is current, and kernels go to that device's current stream.
class OpCall {
   public:
    explicit OpCall(const Tensor& like) : like_(like), device_(like.get_device_index()), guard_(device_) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
    }
    Stream stream() const { return stream_; }
    Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) const {
        return torch::stable::new_empty(like_, shape, dtype);
    }
    const void* read(const Tensor& t) const { return t.const_data_ptr(); }
    void* write(const Tensor& t) const { return t.mutable_data_ptr(); }

   private:
    const Tensor& like_;
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
    Stream stream_ = nullptr;
};

}  // namespace rk
#endif

namespace rk {

inline Ref ref(const OpCall& call, const Tensor& t, const char* op, const char* name) {
    return {call.read(t), dtype_of(t, op, name)};
}
inline Ref ref(const OpCall& call, const std::optional<Tensor>& t, const char* op, const char* name) {
    return t ? ref(call, *t, op, name) : Ref{};
}
inline Out out(const OpCall& call, const Tensor& t, const char* op, const char* name) {
    return {call.write(t), dtype_of(t, op, name)};
}

// Memory that lives as long as the op; empty if nothing is needed. It is reused in the order of the stream, so an op may give
// it back while its kernels are still under way.
inline Tensor workspace(const OpCall& call, int64_t floats) { return call.empty({floats}, ScalarType::Float); }

// Offsets whose values stay on the device: to look at them would wait for it. Kernels clamp what they read.
inline const int32_t* offsets(const OpCall& call, const Tensor& cu_seqlens, const char* op) {
    RK_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.is_contiguous() &&
                 cu_seqlens.size(0) > 0,
             op, "cu_seqlens must be a contiguous int32 tensor [B + 1]");
    return static_cast<const int32_t*>(call.read(cu_seqlens));
}

}  // namespace rk
