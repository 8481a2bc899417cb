// softmax.h: the middle of softmax, shared by softmax.cpp and attention.cpp. Included once per instruction set, no guard.

namespace rk {
namespace RK_ISA {

// e[i] = exp(x[i] * scale - max) for i in [begin, end); their sum, by row_sum with lane i mod 32, is returned. x may be e.
// Where begin or end is inside a block of 32, x must be e: the rest of the block is overwritten, and becomes +0. NaN in, NaN
// out.
RK_INLINE float exp_and_sum(const float* x, float* e, int64_t begin, int64_t end, float scale) {
    const int64_t from = begin / LANES * LANES, to = (end + LANES - 1) / LANES * LANES;
    const float outside = scale < 0.0f ? __builtin_inff() : -__builtin_inff();  // times the scale: -inf
    for (int64_t i = from; i < begin; ++i) e[i] = outside;
    for (int64_t i = end; i < to; ++i) e[i] = outside;
    Lanes top;
    for (int v = 0; v < LANES / W; ++v) top.v[v] = all(-__builtin_inff());
    for (int64_t i = from; i < to; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec s = load(x + i + v * W) * all(scale);
            store(e + i + v * W, s);
            top.v[v] = select(lt(top.v[v], s), s, top.v[v]);
        }
    for (int v = 1; v < LANES / W; ++v) top.v[0] = select(lt(top.v[0], top.v[v]), top.v[v], top.v[0]);
    const float max = largest(top.v[0]);
    Lanes sum = zero_lanes();
    for (int64_t i = from; i < to; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec y = exp_of_negative(load(e + i + v * W) - all(max));
            store(e + i + v * W, y);
            sum.v[v] = sum.v[v] + y;
        }
    return fold(sum);
}

}  // namespace RK_ISA
}  // namespace rk
