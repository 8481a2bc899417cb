// linear.h: the launcher's side of linear, for the ops that are made of it (score_head, sparse_ffn).
#pragma once

#include <algorithm>

#include "../args.h"
#include "launch.h"

namespace rk {

// A weight as nn.Linear holds it, for rows of K.
inline View checked_weight(const Arguments& in, const char* name, const Tensor& weight, int64_t K) {
    const View w = in.floats(name, weight, {{"N"}, {"K", K}});
    RK_CHECK(w.size[0] > 0 && w.size[1] > 0, in.op(), "N and K must be > 0");
    return w;
}

// Arguments without a residual; x [M, K], weight [N, K], bias [N] or absent, y [M, N], the result.
inline LinearArgs linear_args(const Arguments& in, const View& x, const View& weight, const View& bias, int64_t activation,
                              const Tensor& y) {
    in.activation(activation);
    return {.x = x.ref(),
            .weight = weight.ref(),
            .bias = bias.ref(),
            .residual = {},
            .out = out(y, in.op()),
            .M = x.size[0],
            .N = weight.size[0],
            .K = weight.size[1],
            .activation = int(activation)};
}

void run_linear(const LinearArgs&);

}  // namespace rk
