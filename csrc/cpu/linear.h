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
    return {.x = ref(x, op, "x"),
            .weight = ref(weight, op, "weight"),
            .bias = ref(bias, op, "bias"),
            .residual = {},
            .out = out(y, op, "out_dtype"),
            .M = x.size(0),
            .N = weight.size(0),
            .K = x.size(1),
            .activation = int(activation)};
}

void run_linear(const LinearArgs&);

}  // namespace rk
