// rotary.h: what rotary's launchers check of their tensors, whatever the backend.
#pragma once

#include "tensors.h"

namespace rk {

struct CheckedRotary {
    RotaryArgs args;  // without y
    int64_t tokens;
    ScalarType dtype;
    bool empty;  // no output
};

// x [tokens, H, D], cos and sin [tokens, P].
template <class In>
CheckedRotary checked_rotary(const In& in, const Tensor& x_given, const Tensor& cos_given, const Tensor& sin_given,
                             bool interleaved) {
    const View x = in.floats("x", x_given, {{"tokens"}, {"H"}, {"D"}}, Lies::FEATURES_TOGETHER);
    const View cos = in.floats("cos", cos_given, {{"tokens", x.size[0]}, {"P"}});
    const int64_t P = cos.size[1];
    const View sin = in.floats("sin", sin_given, {{"tokens", x.size[0]}, {"P", P}});
    RK_CHECK(P <= x.size[2] / 2, in.op(), "2 P must be at most D, got P = ", P, " and D = ", x.size[2]);
    return {.args = {.x = x.ref(),
                     .x_token = x.stride[0],
                     .x_head = x.stride[1],
                     .cos = cos.ref(),
                     .sin = sin.ref(),
                     .y = nullptr,
                     .H = x.size[1],
                     .D = x.size[2],
                     .P = P,
                     .interleaved = interleaved},
            .tokens = x.size[0],
            .dtype = scalar_type(x.dtype),
            .empty = x.numel == 0};
}

}  // namespace rk
