// call.h: csrc/cuda/torch/launch.h's OpCall, for CPU tensors whose kernels run in the simulator. It tells the stand-in for the
// CUDA runtime which memory the op may touch, and fills new tensors with NaN, so that a place nobody writes shows.
#pragma once

#include <cstring>

#include "cudart.h"

#define RK_KEY CPU

namespace rk {

class OpCall {
   public:
    explicit OpCall(const Tensor& like) : like_(like) { ptxsim_begin(); }
    ~OpCall() { ptxsim_end(); }
    OpCall(const OpCall&) = delete;
    Stream stream() const { return nullptr; }
    int device() const { return ptxsim_device; }
    Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType dtype) const {
        Tensor t = torch::stable::new_empty(like_, shape, dtype);
        if (t.numel() > 0) std::memset(t.mutable_data_ptr(), ptxsim_poison, size_t(t.numel()) * t.element_size());
        return t;
    }
    const void* read(const Tensor& t) const {
        int64_t last = t.numel() > 0 ? 1 : 0;  // one past the last element that the strides reach
        for (int64_t i = 0; i < t.dim() && last > 0; ++i) last += (t.size(i) - 1) * t.stride(i);
        ptxsim_note(t.const_data_ptr(), size_t(last) * t.element_size(), 0);
        return t.const_data_ptr();
    }
    void* write(const Tensor& t) const {
        ptxsim_note(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size(), 1);
        return t.mutable_data_ptr();
    }

   private:
    const Tensor& like_;
};

}  // namespace rk
