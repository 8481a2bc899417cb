// float.cpp: f32 and f64 arithmetic. Every operation is rounded once, as PTX says; .approx ones are computed in double and
// rounded, which no GPU does: open_bits.py lists them.
#include <cfenv>

#include "lanes.h"
#include "rounding.h"

namespace ptxsim {

#define RUN(name, ...) \
    static void name(Warp& w, const Inst& in) { __VA_ARGS__; }

static float min_f(float a, float b) {  // a number wins over NaN, -0 is below +0
    const float m = a < b ? a : b < a ? b : as_float(bits_of(a) | bits_of(b));
    return a != a ? canonical(b) : b != b ? a : m;
}
static float max_f(float a, float b) {
    const float m = a > b ? a : b > a ? b : as_float(bits_of(a) & bits_of(b));
    return a != a ? canonical(b) : b != b ? a : m;
}

// ---- without modifiers: the loops that matter

RUN(add, map2<float, float, float>(w, in, [](float a, float b) { return canonical(a + b); }))
RUN(sub, map2<float, float, float>(w, in, [](float a, float b) { return canonical(a - b); }))
RUN(mul, map2<float, float, float>(w, in, [](float a, float b) { return canonical(a * b); }))
RUN(fma32,
    map3<float, float, float, float>(w, in, [](float a, float b, float c) { return canonical(__builtin_fmaf(a, b, c)); }))
RUN(div, map2<float, float, float>(w, in, [](float a, float b) { return canonical(a / b); }))
RUN(rcp, map1<float, float>(w, in, [](float a) { return canonical(1.0f / a); }))
RUN(sqrt32, map1<float, float>(w, in, [](float a) { return canonical(__builtin_sqrtf(a)); }))
RUN(min2, map2<float, float, float>(w, in, min_f))
RUN(max2, map2<float, float, float>(w, in, max_f))
RUN(neg, map1<u32, u32>(w, in, [](u32 a) { return a ^ 0x80000000u; }))
RUN(abs32, map1<u32, u32>(w, in, [](u32 a) { return a & 0x7fffffffu; }))

// ---- with modifiers: lane by lane

// Runs f with the host's rounding direction set; f must read through volatile so that nothing moves past the switch.
template <class F>
static auto directed(u32 mod, F f) {
    static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
    const u32 m = (mod & ROUNDING) >> 2;
    if (m == 0) return f();
    std::fesetround(modes[m]);
    volatile auto r = f();
    std::fesetround(FE_TONEAREST);
    return decltype(f())(r);
}

template <class T, int N, class F>
static void lanewise(Warp& w, const Inst& in, F f) {
    T* d = w.at<T>(in.x[0]);
    const T* s[3] = {};
    for (int k = 0; k < N; k++) s[k] = w.at<T>(in.x[1 + k]);
    each_lane(w.mask, [&](u32 i) {
        volatile T v[3] = {};
        for (int k = 0; k < N; k++) v[k] = s[k][i];
        if constexpr (sizeof(T) == 4) {
            if (in.mod & FTZ)
                for (int k = 0; k < N; k++) v[k] = flush(v[k]);
            float r = directed(in.mod, [&] { return T(f(v[0], v[1], v[2])); });
            r = canonical(r);
            if (in.mod & FTZ) r = flush(r);
            if (in.mod & SAT) r = saturate(r);
            d[i] = r;
        } else {
            d[i] = directed(in.mod, [&] { return T(f(v[0], v[1], v[2])); });
        }
    });
}
#define SLOW(name, T, N, expression)                     \
    RUN(name, lanewise<T, N>(w, in, [&](T a, T b, T c) { \
            (void)a, (void)b, (void)c;                   \
            return expression;                           \
        }))
SLOW(add_mod, float, 2, a + b)
SLOW(sub_mod, float, 2, a - b)
SLOW(mul_mod, float, 2, a* b)
SLOW(fma_mod, float, 3, __builtin_fmaf(a, b, c))
SLOW(div_mod, float, 2, a / b)
SLOW(rcp_mod, float, 1, 1.0f / a)
SLOW(sqrt_mod, float, 1, __builtin_sqrtf(a))
SLOW(neg_mod, float, 1, -a)
SLOW(abs_mod, float, 1, __builtin_fabsf(a))
SLOW(div_approx, float, 2, float(double(a) / double(b)))
SLOW(rsqrt_approx, float, 1, float(1.0 / __builtin_sqrt(double(a))))
SLOW(ex2_approx, float, 1, float(std::exp2(double(a))))
SLOW(lg2_approx, float, 1, float(std::log2(double(a))))
SLOW(sin_approx, float, 1, float(std::sin(double(a))))
SLOW(cos_approx, float, 1, float(std::cos(double(a))))
SLOW(tanh_approx, float, 1, float(std::tanh(double(a))))

template <bool MAX, int N>
static void extreme(Warp& w, const Inst& in) {  // .NaN: a NaN wins; .xorsign.abs is not there
    const bool nan_wins = in.mod & NAN_, abs = in.mod & ABS_;
    lanewise<float, N>(w, in, [&](float a, float b, float c) {
        const u32 sign = (bits_of(a) ^ bits_of(b)) & 0x80000000u;
        if (abs) a = std::fabs(a), b = std::fabs(b);
        if (nan_wins && (a != a || b != b || (N == 3 && c != c))) return as_float(0x7fffffff);
        float r = MAX ? max_f(a, b) : min_f(a, b);
        if (N == 3) r = MAX ? max_f(r, c) : min_f(r, c);
        return abs ? as_float(bits_of(r) | sign) : r;
    });
}
RUN(copysign, map2<u32, u32, u32>(w, in, [](u32 a, u32 b) { return (b & 0x7fffffffu) | (a & 0x80000000u); }))

// ---- f64

RUN(add64, map2<double, double, double>(w, in, [](double a, double b) { return a + b; }))
RUN(sub64, map2<double, double, double>(w, in, [](double a, double b) { return a - b; }))
RUN(mul64, map2<double, double, double>(w, in, [](double a, double b) { return a * b; }))
RUN(fma64, map3<double, double, double, double>(w, in, [](double a, double b, double c) { return __builtin_fma(a, b, c); }))
RUN(div64, map2<double, double, double>(w, in, [](double a, double b) { return a / b; }))
RUN(rcp64, map1<double, double>(w, in, [](double a) { return 1.0 / a; }))
RUN(sqrt64, map1<double, double>(w, in, [](double a) { return __builtin_sqrt(a); }))
RUN(neg64, map1<u64, u64>(w, in, [](u64 a) { return a ^ 1ull << 63; }))
RUN(abs64, map1<u64, u64>(w, in, [](u64 a) { return a & ~(1ull << 63); }))
RUN(copysign64, map2<u64, u64, u64>(w, in, [](u64 a, u64 b) { return (b & ~(1ull << 63)) | (a & 1ull << 63); }))
SLOW(min64, double, 2, a != a ? b : b != b ? a : a == b ? as_double(bits_of(a) | bits_of(b)) : a < b ? a : b)
SLOW(max64, double, 2, a != a ? b : b != b ? a : a == b ? as_double(bits_of(a) & bits_of(b)) : a > b ? a : b)
SLOW(add64_mod, double, 2, a + b)
SLOW(sub64_mod, double, 2, a - b)
SLOW(mul64_mod, double, 2, a* b)
SLOW(fma64_mod, double, 3, __builtin_fma(a, b, c))
SLOW(div64_mod, double, 2, a / b)
SLOW(rcp64_mod, double, 1, 1.0 / a)
SLOW(sqrt64_mod, double, 1, __builtin_sqrt(a))
SLOW(rsqrt64, double, 1, 1.0 / __builtin_sqrt(a))
// rcp.approx.ftz.f64 and rsqrt's: about 20 good bits, the low word zero
SLOW(rcp64_approx, double, 1, as_double(bits_of(1.0 / a) & ~0xffffffffull))
SLOW(rsqrt64_approx, double, 1, as_double(bits_of(1.0 / __builtin_sqrt(a)) & ~0xffffffffull))

// f32x2: two floats in a 64-bit register
template <class F>
static void pairs(Warp& w, const Inst& in, F f) {
    float *d = w.at<float>(in.x[0]), *a = w.at<float>(in.x[1]), *b = w.at<float>(in.x[2]);
    float* c = in.x[3] >= 0 ? w.at<float>(in.x[3]) : b;
    each_lane(w.mask, [&](u32 i) {
        for (u32 k = 2 * i; k < 2 * i + 2; k++) {
            float r = in.mod & FTZ ? flush(f(flush(a[k]), flush(b[k]), flush(c[k]))) : f(a[k], b[k], c[k]);
            d[k] = canonical(r);
        }
    });
}
RUN(add_x2, pairs(w, in, [](float a, float b, float) { return a + b; }))
RUN(sub_x2, pairs(w, in, [](float a, float b, float) { return a - b; }))
RUN(mul_x2, pairs(w, in, [](float a, float b, float) { return a * b; }))
RUN(fma_x2, pairs(w, in, [](float a, float b, float c) { return __builtin_fmaf(a, b, c); }))

void add_float(Table& t) {
    const std::pair<const char*, Handler> all[] = {
        {"add.f32", add},
        {"sub.f32", sub},
        {"mul.f32", mul},
        {"fma.f32", fma32},
        {"div.f32", div},
        {"rcp.f32", rcp},
        {"sqrt.f32", sqrt32},
        {"min.f32", min2},
        {"max.f32", max2},
        {"neg.f32", neg},
        {"abs.f32", abs32},
        {"add.f32.mod", add_mod},
        {"sub.f32.mod", sub_mod},
        {"mul.f32.mod", mul_mod},
        {"fma.f32.mod", fma_mod},
        {"div.f32.mod", div_mod},
        {"rcp.f32.mod", rcp_mod},
        {"sqrt.f32.mod", sqrt_mod},
        {"neg.f32.mod", neg_mod},
        {"abs.f32.mod", abs_mod},
        {"min.f32.mod", extreme<false, 2>},
        {"max.f32.mod", extreme<true, 2>},
        {"min3.f32", extreme<false, 3>},
        {"max3.f32", extreme<true, 3>},
        {"copysign.f32", copysign},
        {"div.approx.f32", div_approx},
        {"rcp.approx.f32", rcp_mod},
        {"sqrt.approx.f32", sqrt_mod},
        {"rsqrt.approx.f32", rsqrt_approx},
        {"ex2.approx.f32", ex2_approx},
        {"lg2.approx.f32", lg2_approx},
        {"sin.approx.f32", sin_approx},
        {"cos.approx.f32", cos_approx},
        {"tanh.approx.f32", tanh_approx},
        {"add.f32x2", add_x2},
        {"sub.f32x2", sub_x2},
        {"mul.f32x2", mul_x2},
        {"fma.f32x2", fma_x2},
    };
    for (const auto& [name, run] : all) t.add(name, run);
}

void add_double(Table& t) {
    const std::pair<const char*, Handler> all[] = {
        {"add.f64", add64},
        {"sub.f64", sub64},
        {"mul.f64", mul64},
        {"fma.f64", fma64},
        {"div.f64", div64},
        {"rcp.f64", rcp64},
        {"sqrt.f64", sqrt64},
        {"neg.f64", neg64},
        {"abs.f64", abs64},
        {"min.f64", min64},
        {"max.f64", max64},
        {"add.f64.mod", add64_mod},
        {"sub.f64.mod", sub64_mod},
        {"mul.f64.mod", mul64_mod},
        {"fma.f64.mod", fma64_mod},
        {"div.f64.mod", div64_mod},
        {"rcp.f64.mod", rcp64_mod},
        {"sqrt.f64.mod", sqrt64_mod},
        {"copysign.f64", copysign64},
        {"rsqrt.approx.f64", rsqrt64},
        {"rcp.approx.ftz.f64", rcp64_approx},
        {"rsqrt.approx.ftz.f64", rsqrt64_approx},
    };
    for (const auto& [name, run] : all) t.add(name, run);
}

}  // namespace ptxsim
