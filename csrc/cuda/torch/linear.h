// linear.h: the torch side of linear, for the ops that are made of it (score_head).
#pragma once

#include "launch.h"

namespace rk {

// [M, N] = act(x [M, K] weight [N, K]^T + bias) + residual
Tensor run_linear(const CallArguments& in, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  int64_t activation, const std::optional<Tensor>& residual, ScalarType out_dtype);

}  // namespace rk
