// numerics.h: the numeric contract as code, numerics version 1 (NUMERICS.md says the same in words).
//
// Templates over F, a float or a register of floats, so that one source gives the bits of every backend: csrc/cpu/each_isa.h
// includes this once per instruction set (everything lands in rk::avx512, rk::avx2, rk::scalar), a CUDA file once (rk).
// There is no include guard for that reason, and no torch header, so that `nvcc -ptx` or `g++` alone compiles it.
//
// F provides: + - * /, fmadd(a, b, c) = a * b + c rounded once, sqrt_of(a), lt(a, b) -> mask, select(mask, a, b), abs_of(a),
// scale_by_exp2<SHIFT>(p, t) (below). Compile with -ffp-contract=off (g++), --fmad=false (nvcc), never with fast-math.

#ifdef __CUDACC__
#define RK_FN __host__ __device__ __forceinline__
#else
#define RK_FN static inline __attribute__((always_inline))
#endif

#ifdef RK_ISA
namespace rk {
namespace RK_ISA {
#else
namespace rk {
#endif

constexpr int NUMERICS_VERSION = 1;
constexpr int LANES = 32;     // row_sum: lane l adds x[l], x[l + 32], ...; a warp, two AVX-512 or four AVX2 registers
constexpr int CHUNK = 512;    // dot: one fma chain inside a chunk of K, the chunks' sums added in ascending order
constexpr int KEY_TILE = 64;  // attention's sum over keys: the same, in chunks of 64 keys

// F = float: the CUDA kernels, the scalar CPU path, and the pybind11 module.
RK_FN float fmadd(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}
RK_FN float sqrt_of(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
}
RK_FN bool lt(float a, float b) { return a < b; }
RK_FN float select(bool m, float a, float b) { return m ? a : b; }
RK_FN float abs_of(float a) { return __builtin_fabsf(a); }
RK_FN float float_of_bits(int i) {
    float f;
    __builtin_memcpy(&f, &i, 4);
    return f;
}
RK_FN int bits_of_float(float f) {
    int i;
    __builtin_memcpy(&i, &f, 4);
    return i;
}

// 1.5 * 2^23: adding it leaves round-to-nearest-even(x) in the low bits of the sum, on every machine, with no conversion.
constexpr float ROUND_MAGIC = 12582912.0f;

// p * 2^n, p near 1, with n held in the low bits of t = n + ROUND_MAGIC, -126 <= n + SHIFT <= 127. 2^(n + SHIFT) is a normal
// number, so the product with it is exact, and the one with 2^-SHIFT rounds once, results below 2^-126 included. The shift by
// 23 leaves nothing of ROUND_MAGIC. Both are products, not sums of exponents: a NaN in p stays one.
template <int SHIFT>
RK_FN float scale_by_exp2(float p, float t) {
    constexpr float BACK = SHIFT > 0 ? 0x1p-64f : 2.0f;
    static_assert(SHIFT == 64 || SHIFT == -1, "BACK is 2^-SHIFT");
    return p * float_of_bits(int((unsigned(bits_of_float(t)) << 23) + (unsigned(SHIFT + 127) << 23))) * BACK;
}

// exp(x), error below 1 ulp, results below 2^-126 included. exp(0) = 1; 0 below -104; inf above 88.72284; NaN stays NaN.
// x = n log 2 + r, |r| <= log(2) / 2; exp(r) = 1 + r + r^2 q(r). Coefficients from tools/fit.py.
//
// exp_fraction: exp(x) / 2^n, near 1; t = n + ROUND_MAGIC.
template <class F>
RK_FN F exp_fraction(F x, F& t) {
    t = fmadd(x, F(0x1.715476p+0f), F(ROUND_MAGIC));
    const F n = t - F(ROUND_MAGIC);
    F r = fmadd(n, F(-0x1.62e400p-1f), x);  // log 2 in two parts; n times the first is exact
    r = fmadd(n, F(-0x1.7f7d1cp-20f), r);
    F q = fmadd(F(0x1.6d7a58p-10f), r, F(0x1.123996p-7f));
    q = fmadd(q, r, F(0x1.5554c0p-5f));
    q = fmadd(q, r, F(0x1.555492p-3f));
    q = fmadd(q, r, F(0.5f));
    const F p = fmadd(q, r, F(1.0f));
    return fmadd(p, r, F(1.0f));
}

// exp_within: for -128 <= x <= 0, where nothing needs clamping.
template <class F>
RK_FN F exp_within(F x) {
    F t;
    const F p = exp_fraction(x, t);
    return scale_by_exp2<64>(p, t);
}

// x, but not below low; a NaN passes.
template <class F>
RK_FN F at_least(F low, F x) {
    return select(lt(x, low), low, x);
}

// For x <= 0: exp(-104) is 0 already.
template <class F>
RK_FN F exp_of_negative(F x) {
    return exp_within(at_least(F(-104.0f), x));
}

// For x >= 0: exp(89) is inf already.
template <class F>
RK_FN F exp_of_positive(F x) {
    F t;
    const F p = exp_fraction(select(lt(F(89.0f), x), F(89.0f), x), t);
    return scale_by_exp2<-1>(p, t);
}

template <class F>
RK_FN F exp_of(F x) {
    return select(lt(x, F(0.0f)), exp_of_negative(x), exp_of_positive(x));
}

// 1 / (1 + exp(-x)). exp is only taken of -|x|: for x < 0 the result is e / (1 + e), which keeps its digits down to 2^-149,
// so that sigmoid(-x) is the complement 1 - sigmoid(x) where the difference itself would be 0.
template <class F>
RK_FN F sigmoid_of(F x) {
    const F e = exp_of_negative(F(0.0f) - abs_of(x));
    return select(lt(x, F(0.0f)), e, F(1.0f)) / (F(1.0f) + e);
}

// tanh(x) = x + x^3 q(x^2) for |x| < 0.625, else sign(x) (1 - 2 / (exp(2 |x|) + 1)).
template <class F>
RK_FN F tanh_of(F x) {
    const F z = x * x;
    F q = fmadd(F(-0x1.76922ap-8f), z, F(0x1.52509ep-6f));
    q = fmadd(q, z, F(-0x1.b84344p-5f));
    q = fmadd(q, z, F(0x1.110760p-3f));
    q = fmadd(q, z, F(-0x1.555534p-2f));
    const F small = fmadd(q * z, x, x);
    const F a = abs_of(x);
    const F big = F(1.0f) - F(2.0f) / (exp_of_positive(a + a) + F(1.0f));
    return select(lt(a, F(0.625f)), small, select(lt(x, F(0.0f)), F(0.0f) - big, big));
}

// Phi(x) = (1 + erf(x / sqrt 2)) / 2, the normal distribution. erf enters the library only through Phi, and 1 + erf(x) would
// cancel for x < 0, so Phi is computed itself: Phi(-y) = exp(-y^2 / 2) u Q(1 - u), u = 1 / (1 + y / 2), Q a polynomial from
// tools/fit.py, with the rounding error of y^2 put back, so that the far tail keeps its digits.
template <class F>
RK_FN F normcdf_of(F x) {
    F y = abs_of(x);
    y = select(lt(F(16.0f), y), F(16.0f), y);  // Phi(-16) is below 2^-149
    const F s = y * y;
    const F lost = fmadd(y, y, F(0.0f) - s);
    const F u = F(1.0f) / fmadd(F(0.5f), y, F(1.0f)), v = F(1.0f) - u;
    F g = fmadd(F(-0x1.54bb04p-5f), v, F(0x1.b4dc28p-3f));
    g = fmadd(g, v, F(-0x1.9891f2p-2f));
    g = fmadd(g, v, F(0x1.6e0a1ep-2f));
    g = fmadd(g, v, F(-0x1.b31ae6p-3f));
    g = fmadd(g, v, F(0x1.7e0782p-4f));
    g = fmadd(g, v, F(0x1.36bfeep-5f));
    g = fmadd(g, v, F(0x1.6aef72p-5f));
    g = fmadd(g, v, F(-0x1.88b432p-4f));
    g = fmadd(g, v, F(-0x1.310816p-2f));
    g = fmadd(g, v, F(0x1.000000p-1f));
    g = g * u;
    g = fmadd(g * F(-0.5f), lost, g);  // exp(-lost / 2) = 1 - lost / 2
    const F tail = exp_within(s * F(-0.5f)) * g;
    return select(lt(x, F(0.0f)), tail, F(1.0f) - tail);
}

template <class F>
RK_FN F gelu_of(F x) {
    return x * normcdf_of(x);
}

// x (1 + tanh v) / 2 = x sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3); the sigmoid form does not cancel for x < 0.
template <class F>
RK_FN F gelu_tanh_of(F x) {
    return x * sigmoid_of(x * fmadd(x * x, F(0x1.2444f2p-4f), F(0x1.988454p+0f)));
}

template <class F>
RK_FN F silu_of(F x) {
    return x * sigmoid_of(x);
}

// x < 0 -> +0, else x: a NaN stays NaN.
template <class F>
RK_FN F relu_of(F x) {
    return select(lt(x, F(0.0f)), F(0.0f), x);
}

// sparse_ffn's activation: x <= threshold -> +0, else x, squared or not; a NaN stays NaN.
RK_FN float fired_of(float x, float threshold, bool squared) {
    const float r = x <= threshold ? 0.0f : x;
    return squared ? r * r : r;
}

// x sigmoid(1.702 x).
template <class F>
RK_FN F quick_gelu_of(F x) {
    return x * sigmoid_of(x * F(0x1.b3b646p+0f));
}

template <class F>
RK_FN F relu2_of(F x) {
    const F r = relu_of(x);
    return r * r;
}

// x < 0 -> 0.01 x, else x.
template <class F>
RK_FN F leaky_relu_of(F x) {
    return select(lt(x, F(0.0f)), x * F(0x1.47ae14p-7f), x);
}

// x tanh(log(1 + exp x)), where tanh is (a^2 - 1) / (a^2 + 1) of a = 1 + exp x, with e = exp(-|x|): for x < 0 it is
// n / (n + 2), n = e (e + 2), else n / (n + 2 e^2), n = 1 + 2 e. All terms are positive: nothing cancels.
template <class F>
RK_FN F mish_of(F x) {
    const F e = exp_of_negative(F(0.0f) - abs_of(x));
    const F below = e * (e + F(2.0f)), above = F(1.0f) + (e + e), n = select(lt(x, F(0.0f)), below, above);
    return x * (n / (n + select(lt(x, F(0.0f)), F(2.0f), (e + e) * e)));
}

// ---- mode tensor, version 2: what becomes half precision needs fewer digits -------------------------------------------------

// The larger and the smaller of two numbers; a NaN loses, and the second is never one.
RK_FN float larger_of(float a, float b) {
#ifdef __CUDA_ARCH__
    return fmaxf(a, b);
#else
    return a > b ? a : b;
#endif
}
RK_FN float smaller_of(float a, float b) {
#ifdef __CUDA_ARCH__
    return fminf(a, b);
#else
    return a < b ? a : b;
#endif
}

// 2^(n + f) for z = n + ROUND_MAGIC, -127 <= n <= 0, |f| <= 1/2, and f >= 0 where n is -127. 2^0 is 1 exactly. n goes to the
// exponent as an integer. So results from 2^-126 on have a relative error below 2.9e-6; smaller ones come out too small, but
// never negative, and +0 for n = -127, f = 0.
RK_FN float exp2_of_parts(float z, float f) {
    float p = fmadd(0x1.3a052cp-7f, f, 0x1.c9fc6ap-5f);
    p = fmadd(p, f, 0x1.ec036ep-3f);
    p = fmadd(p, f, 0x1.62e12cp-1f);
    p = fmadd(p, f, 1.0f);
    return float_of_bits(int(unsigned(bits_of_float(p)) + (unsigned(bits_of_float(z)) << 23)));
}

// 2^(d c), the weight of a score that is d above the largest: d <= 0, c > 0. `least` is the smallest float32 with
// least * c >= -127 exactly (csrc/weighing.h); from there on the result is below 2^-140, which is +0 in half precision. A NaN
// counts as least.
RK_FN float exp2_short(float d, float c, float least) {
    d = larger_of(d, least);
    const float z = fmadd(d, c, ROUND_MAGIC), n = z - ROUND_MAGIC;
    return exp2_of_parts(z, fmadd(d, c, -n));
}

// gelu for a result in half precision: Phi(-y) = exp2(-y^2 log2(e) / 2) u Q(u), u = 1 / (1 + y / 2) from a seed and three steps
// of Newton's. Relative error below 4e-5 where Phi(x) is 2^-126 or more, which is for x > -12.94. From y = 0x1.a8998p+3 on t is
// -127 exactly, so the tail is 0.
RK_FN float gelu_short(float x) {
    const float y = smaller_of(abs_of(x), 0x1.a89980p+3f);
    const float t = y * (y * -0x1.715474p-1f);
    const float z = t + ROUND_MAGIC, n = z - ROUND_MAGIC;
    const float e = exp2_of_parts(z, t - n);
    const float w = fmadd(0.5f, y, 1.0f);
    float u = float_of_bits(0x7EF311C7 - bits_of_float(w));
    u = fmadd(u, fmadd(-w, u, 1.0f), u);
    u = fmadd(u, fmadd(-w, u, 1.0f), u);
    u = fmadd(u, fmadd(-w, u, 1.0f), u);
    float q = fmadd(0x1.3cb030p-4f, u, -0x1.aa4dc6p-3f);
    q = fmadd(q, u, 0x1.477250p-4f);
    q = fmadd(q, u, 0x1.3b4342p-3f);
    q = fmadd(q, u, 0x1.941d4ap-3f);
    q = fmadd(q, u, 0x1.98e390p-3f);
    const float tail = e * (q * u);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

enum Activation : int {
    NONE = 0,
    GELU = 1,
    GELU_TANH = 2,
    TANH = 3,
    RELU = 4,
    SILU = 5,
    SIGMOID = 6,
    QUICK_GELU = 7,
    RELU2 = 8,
    LEAKY_RELU = 9,
    MISH = 10
};

template <class F>
RK_FN F activate(Activation kind, F x) {
    switch (kind) {
        case GELU: return gelu_of(x);
        case GELU_TANH: return gelu_tanh_of(x);
        case TANH: return tanh_of(x);
        case RELU: return relu_of(x);
        case SILU: return silu_of(x);
        case SIGMOID: return sigmoid_of(x);
        case QUICK_GELU: return quick_gelu_of(x);
        case RELU2: return relu2_of(x);
        case LEAKY_RELU: return leaky_relu_of(x);
        case MISH: return mish_of(x);
        default: return x;
    }
}

#ifdef RK_ISA
}  // namespace RK_ISA
}  // namespace rk
#else
}  // namespace rk
#endif
