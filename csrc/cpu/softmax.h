// softmax.h: the middle of softmax, shared by softmax.cpp and attention.cpp. Included once per instruction set, no guard.

namespace rk {
namespace RK_ISA {

// e[i] = exp(x[i] * scale - max) for i in [begin, end); their sum, by row_sum with lane i mod 32, is returned. x may be e.
// Where begin or end is inside a block of 32, x must be e: the rest of the block is overwritten, and becomes +0. NaN in, NaN
// out.
RK_INLINE float exp_and_sum(const float* x, float* e, int64_t begin, int64_t end, float scale) {
    const int64_t from = begin / LANES * LANES, to = (end + LANES - 1) / LANES * LANES;
    if (!(scale > 0.0f)) {  // the maximum below is taken before the scale, which such a one does not allow
        for (int64_t i = from; i < to; i += W) store(e + i, load(x + i) * all(scale));
        x = e;
        scale = 1.0f;
    }
    for (int64_t i = from; i < begin; ++i) e[i] = -__builtin_inff();
    for (int64_t i = end; i < to; ++i) e[i] = -__builtin_inff();
    Lanes top;
    for (int v = 0; v < LANES / W; ++v) top.v[v] = all(-__builtin_inff());
    for (int64_t i = from; i < to; i += LANES)
        for (int v = 0; v < LANES / W; ++v) top.v[v] = larger(load(x + i + v * W), top.v[v]);
    for (int v = 1; v < LANES / W; ++v) top.v[0] = larger(top.v[v], top.v[0]);
    const float max = largest(top.v[0]) * scale;  // rounding keeps the order, so this is the largest of the rounded products
    const auto lowered = [&](int64_t i) __attribute__((always_inline)) { return load(x + i) * all(scale) - all(max); };
    Lanes sum = zero_lanes();
    int64_t i = from;
    constexpr int AT_ONCE = SOME * W > LANES ? SOME * W : LANES;  // whole blocks of lanes
    for (; i + AT_ONCE <= to; i += AT_ONCE)
        for (int j = 0; j < AT_ONCE; j += SOME * W) {
            const Some y =
                exp_of_negative(each<Vec>([&](int k) __attribute__((always_inline)) { return lowered(i + j + k * W); }));
#pragma GCC unroll 4
            for (int k = 0; k < SOME; ++k) {
                store(e + i + j + k * W, y.v[k]);
                Vec& lanes = sum.v[(j / W + k) % (LANES / W)];
                lanes = lanes + y.v[k];
            }
        }
    for (; i < to; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec y = exp_of_negative(lowered(i + v * W));
            store(e + i + v * W, y);
            sum.v[v] = sum.v[v] + y;
        }
    return fold(sum);
}

}  // namespace RK_ISA
}  // namespace rk
