// softmax.h: the middle of softmax, shared by softmax.cpp and attention.cpp. Included once per instruction set, no guard.

namespace rk {
namespace RK_ISA {

// x[i] for i in [begin, end) becomes exp(x[i] * scale - max) and the sum of these, by row_sum with lane i mod 32, is returned.
// The places of the blocks of 32 that hold begin and end, but lie outside, become +0 (they must be writable). NaN in, NaN out.
RK_INLINE float exp_and_sum(float* x, int64_t begin, int64_t end, float scale) {
    const int64_t from = begin / LANES * LANES, to = (end + LANES - 1) / LANES * LANES;
    const float outside = scale < 0.0f ? __builtin_inff() : -__builtin_inff();  // times the scale: -inf
    for (int64_t i = from; i < begin; ++i) x[i] = outside;
    for (int64_t i = end; i < to; ++i) x[i] = outside;
    Lanes top;
    for (int v = 0; v < LANES / W; ++v) top.v[v] = all(-__builtin_inff());
    for (int64_t i = from; i < to; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec s = load(x + i + v * W) * all(scale);
            store(x + i + v * W, s);
            top.v[v] = select(lt(top.v[v], s), s, top.v[v]);
        }
    for (int v = 1; v < LANES / W; ++v) top.v[0] = select(lt(top.v[0], top.v[v]), top.v[v], top.v[0]);
    const float max = largest(top.v[0]);
    Lanes sum = zero_lanes();
    for (int64_t i = from; i < to; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec e = exp_of_negative(load(x + i + v * W) - all(max));
            store(x + i + v * W, e);
            sum.v[v] = sum.v[v] + e;
        }
    return fold(sum);
}

}  // namespace RK_ISA
}  // namespace rk
