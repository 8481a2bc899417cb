// linear.h: the launcher's side of linear, for the ops that are made of it (score_head, sparse_ffn).
#pragma once

#include <algorithm>

#include "../args.h"
#include "launch.h"

namespace rk {

// Arguments without a residual; x [M, K], weight [N, K], y [M, N].
inline LinearArgs linear_args(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              int64_t activation, const Tensor& y) {
    RK_CHECK(weight.dim() == 2 && weight.size(0) == y.size(1) && weight.size(1) == x.size(1) && weight.is_contiguous(), op,
             "the weight must be [N, K] and contiguous");
    RK_CHECK(weight.size(0) > 0 && weight.size(1) > 0, op, "N and K must be > 0");
    return LinearArgs{x.const_data_ptr(),
                      dtype_of(x, op, "x"),
                      weight.const_data_ptr(),
                      dtype_of(weight, op, "weight"),
                      bias ? bias->const_data_ptr() : nullptr,
                      bias ? dtype_of(*bias, op, "bias") : Dtype::F32,
                      nullptr,
                      Dtype::F32,
                      y.mutable_data_ptr(),
                      dtype_of(y, op, "out_dtype"),
                      x.size(0),
                      weight.size(0),
                      x.size(1),
                      int(activation)};
}

void run_linear(const LinearArgs&);

}  // namespace rk
