// rotary.cpp: rotary position embedding on the CPU: pairs of a head's features are turned by their token's angles.
// y_a = x_a * cos - x_b * sin; y_b = x_b * cos + x_a * sin: two rounded products and their sum (NUMERICS.md, "rotary").

#ifndef RK_ISA
#define RK_FILE "rotary.cpp"
#include "../rotary.h"
#include "each_isa.h"
#include "launch.h"

namespace rk {

static Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
    const CheckedRotary given = checked_rotary(Arguments("rotary", x), x, cos, sin, interleaved);
    RotaryArgs args = given.args;
    const int64_t tokens = given.tokens, H = args.H, D = args.D, P = args.P;
    Tensor y = empty(x, {tokens, H, D}, given.dtype);
    if (given.empty) return y;
    args.y = y.mutable_data_ptr();
    const int64_t block = 1 + 16384 / (H * D + 1);
    for_each_task(ceil_div(tokens, block), [&](int64_t task) {
        RK_CALL(turn_tokens, args, task * block, std::min((task + 1) * block, tokens), scratch(size_t(2 * P + 2 * D + 64)));
    });
    return y;
}

// clang-format off
RK_OPS(m) {
    m.op("rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor", TORCH_BOX(&rotary));
}
// clang-format on

}  // namespace rk

#else

namespace rk {
namespace RK_ISA {

// Plain loops: each output is the same three operations on its own numbers, however a compiler groups them.
static void turn(const float* x, const float* cos, const float* sin, int64_t pairs, bool interleaved, float* y) {
    if (!interleaved) {
        for (int64_t p = 0; p < pairs; ++p) {
            const float a = x[p], b = x[p + pairs];
            y[p] = a * cos[p] - b * sin[p];
            y[p + pairs] = b * cos[p] + a * sin[p];
        }
        return;
    }
    for (int64_t p = 0; p < pairs; ++p) {
        const float a = x[2 * p], b = x[2 * p + 1];
        y[2 * p] = a * cos[p] - b * sin[p];
        y[2 * p + 1] = b * cos[p] + a * sin[p];
    }
}

// memory holds cos, sin, and a head before and after: 2 P + 2 D floats.
static void turn_tokens(const RotaryArgs& a, int64_t begin, int64_t end, float* memory) {
    float *cos = memory, *sin = cos + a.P, *x = sin + a.P, *y = x + a.D;
    const int64_t size = bytes_of(a.x.dtype), turned = 2 * a.P;
    for (int64_t t = begin; t < end; ++t) {
        widen(a.cos.dtype, a.cos.data, t * a.P, a.P, cos);
        widen(a.sin.dtype, a.sin.data, t * a.P, a.P, sin);
        for (int64_t h = 0; h < a.H; ++h) {
            const int64_t from = t * a.x_token + h * a.x_head, to = (t * a.H + h) * a.D;
            widen(a.x.dtype, a.x.data, from, turned, x);
            turn(x, cos, sin, a.P, a.interleaved, y);
            narrow(a.x.dtype, y, turned, a.y, to);
            std::memcpy(static_cast<char*>(a.y) + (to + turned) * size,
                        static_cast<const char*>(a.x.data) + (from + turned) * size, size_t((a.D - turned) * size));
        }
    }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
