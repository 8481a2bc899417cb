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
    explicit OpCall(const Tensor& like) : like_(like), device_(gpu_of(like)), guard_(device_) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream_));
    }
    Stream stream() const { return stream_; }
    int device() const { return device_; }
    Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) const {
        return torch::stable::new_empty(like_, shape, dtype);
    }
    const void* read(const Tensor& t) const { return t.const_data_ptr(); }
    void* write(const Tensor& t) const { return t.mutable_data_ptr(); }

   private:
    static int32_t gpu_of(const Tensor& t) {
        RK_CHECK(t.is_cuda(), "rerank_kernels",
                 "the first argument must be on the GPU like the others; move it with .to(device)");
        return t.get_device_index();
    }

    const Tensor& like_;
    int32_t device_;
    torch::stable::accelerator::DeviceGuard guard_;
    Stream stream_ = nullptr;
};

}  // namespace rk
#endif

namespace rk {

// checks.h's checks, and the call learns which memory its kernels will read.
class CallArguments {
   public:
    CallArguments(const OpCall& call, const char* op, const Tensor& like) : call_(call), checks_(op, like) {}
    View floats(const char* name, const Tensor& t, Shape shape, Lies lies = Lies::CONTIGUOUS) const {
        return read(checks_.floats(name, t, shape, lies), t);
    }
    View floats(const char* name, const std::optional<Tensor>& t, Shape shape) const {
        return t ? floats(name, *t, shape) : View{};
    }
    const bool* flags(const char* name, const Tensor& t, Shape shape) const {
        return read(checks_.typed(name, t, ScalarType::Bool, 1, shape), t).as<bool>();
    }
    // Offsets whose values stay on the device: to look at them would wait for it. Kernels read each once and clamp it.
    View offsets(const char* name, const Tensor& t) const { return read(checks_.offsets(name, t), t); }
    View spans(const char* name, const Tensor& t, int64_t B) const { return read(checks_.spans(name, t, B), t); }
    void activation(int64_t kind) const { checks_.activation(kind); }
    const char* op() const { return checks_.op(); }
    const OpCall& call() const { return call_; }

   private:
    View read(View v, const Tensor& t) const {
        v.data = call_.read(t);
        return v;
    }

    const OpCall& call_;
    Arguments checks_;
};

inline Tensor like(const OpCall& call, const View& rows) {
    return call.empty({rows.size[0], rows.size[1]}, scalar_type(rows.dtype));
}
inline Out out(const OpCall& call, const Tensor& t, const char* op) {
    return {call.write(t), dtype_of(t.scalar_type(), op, "out_dtype")};
}

// Memory that lives as long as the op; empty if nothing is needed. It is reused in the order of the stream, so an op may give
// it back while its kernels are still under way.
inline Tensor workspace(const OpCall& call, int64_t floats) { return call.empty({floats}, ScalarType::Float); }

}  // namespace rk
