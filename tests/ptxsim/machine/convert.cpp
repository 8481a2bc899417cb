// convert.cpp: cvt of all kinds.
#include <limits>

#include "lanes.h"
#include "rounding.h"

namespace ptxsim {

#define RUN(name, ...) \
    static void name(Warp& w, const Inst& in) { __VA_ARGS__; }

// ---- integer to integer: the source is read as its type, then widened to the register or cut

template <class D, class S>
static void resize(Warp& w, const Inst& in) {
    map1<D, S>(w, in, [](S s) { return D(s); });
}
template <class D, class S>
static void clamp(Warp& w, const Inst& in) {  // .sat
    using L = std::numeric_limits<D>;
    auto* d = w.at<Cell<D>>(in.x[0]);
    const auto* s = w.at<Cell<S>>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {
        const __int128 v = get<S>(s[i]);
        d[i] = put<D>(v < L::min() ? L::min() : v > L::max() ? L::max() : D(v));
    });
}

// ---- floating point to integer: .rni .rzi .rmi .rpi, clamped; NaN gives 0, or the lowest 64-bit integer

static double integral(double v, u16 mod) {
    switch (mod & ROUNDING) {
        case 0: return std::nearbyint(v);
        case RZ: return std::trunc(v);
        case RM: return std::floor(v);
        default: return std::ceil(v);
    }
}
template <class I>
static I to_integer(double v, u16 mod) {
    using L = std::numeric_limits<I>;
    if (v != v) return sizeof(I) == 8 ? I(1ull << 63) : I(0);
    const double r = integral(v, mod);
    if (r <= double(L::min())) return L::min();
    if (r >= double(L::max())) return L::max();
    return I(r);
}
struct ReadF32 {
    using T = float;
    static double read(float f, u16 mod) { return mod & FTZ ? flush(f) : f; }
};
struct ReadF64 {
    using T = double;
    static double read(double f, u16) { return f; }
};
struct ReadF16 {
    using T = u16;
    static double read(u16 h, u16) { return from_half(h); }
};
struct ReadBF16 {
    using T = u16;
    static double read(u16 h, u16) { return from_bf16(h); }
};
template <class D, class S>
static void from_floating(Warp& w, const Inst& in) {
    auto* d = w.at<Cell<D>>(in.x[0]);
    const auto* s = w.at<Cell<typename S::T>>(in.x[1]);
    each_lane(w.mask, [&](u32 i) { d[i] = put<D>(to_integer<D>(S::read(get<typename S::T>(s[i]), in.mod), in.mod)); });
}

// ---- integer to floating point

template <class S>
static void to_f32(Warp& w, const Inst& in) {
    if ((in.mod & ROUNDING) == 0) {
        map1<float, S>(w, in, [](S s) { return float(s); });
        return;
    }
    float* d = w.at<float>(in.x[0]);
    const Cell<S>* s = w.at<Cell<S>>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {  // the nearest float, then a step where it went the wrong way
        const __int128 v = get<S>(s[i]);
        float f = float(get<S>(s[i]));
        const u16 r = in.mod & ROUNDING;
        const bool down = r == RM || (r == RZ && v > 0);
        if (down && __int128(f) > v) f = std::nextafterf(f, -INFINITY);
        if (!down && __int128(f) < v) f = std::nextafterf(f, INFINITY);
        d[i] = f;
    });
}
template <class S>
static void to_f64(Warp& w, const Inst& in) {
    map1<double, S>(w, in, [](S s) { return double(s); });
}
template <class H, class S>
static void to_16(Warp& w, const Inst& in) {  // 64-bit integers to odd first
    u32* d = w.at<u32>(in.x[0]);
    const Cell<S>* s = w.at<Cell<S>>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {
        const __int128 v = get<S>(s[i]);
        const bool wide = sizeof(S) == 8;
        const double high = double(s64(v >> 32)) * 0x1p32, low = double(u32(v));
        d[i] = H::round(float_odd(wide ? add_odd(high, low) : double(v)));
    });
}

// ---- between floating-point types

RUN(f32_f32, map1<u32, u32>(w, in, [](u32 a) { return a; }))
static void f32_f32_mod(Warp& w, const Inst& in) {  // imm: to an integral value
    float *d = w.at<float>(in.x[0]), *s = w.at<float>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {
        float v = in.mod & FTZ ? flush(s[i]) : s[i];
        if (in.imm) v = float(integral(v, in.mod));
        if (in.mod & SAT) v = saturate(v);
        d[i] = canonical(v);
    });
}
RUN(f64_f32, const bool ftz = in.mod & FTZ; map1<double, float>(w, in, [ftz](float a) { return double(ftz ? flush(a) : a); }))
static void f64_f64(Warp& w, const Inst& in) {
    double *d = w.at<double>(in.x[0]), *s = w.at<double>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {
        double v = in.imm ? integral(s[i], in.mod) : s[i];
        if (in.mod & SAT) v = v > 0 ? (v < 1 ? v : 1) : 0;
        d[i] = v;
    });
}
static void f32_f64(Warp& w, const Inst& in) {
    float* d = w.at<float>(in.x[0]);
    const double* s = w.at<double>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {
        float f = canonical(float_directed(s[i], in.mod & ROUNDING));
        if (in.mod & FTZ) f = flush(f);
        d[i] = in.mod & SAT ? saturate(f) : f;
    });
}
RUN(f32_f16, map_cells(w.mask, w.at<float>(in.x[0]), from_half, w.at<u32>(in.x[1])))
RUN(f32_bf16, map_cells(w.mask, w.at<float>(in.x[0]), from_bf16, w.at<u32>(in.x[1])))
RUN(f64_f16, map_cells(w.mask, w.at<double>(in.x[0]), [](u32 h) { return double(from_half(h)); }, w.at<u32>(in.x[1])))
RUN(f64_bf16, map_cells(w.mask, w.at<double>(in.x[0]), [](u32 h) { return double(from_bf16(h)); }, w.at<u32>(in.x[1])))
RUN(f16_f32, map_cells(w.mask, w.at<u32>(in.x[0]), to_half, w.at<float>(in.x[1])))
RUN(bf16_f32, map_cells(w.mask, w.at<u32>(in.x[0]), to_bf16, w.at<float>(in.x[1])))

template <class H>
static u32 to_16_mod(float f, u16 mod) {
    if (mod & FTZ) f = flush(f);
    if (mod & SAT) f = saturate(f);
    if (mod & RELU) f = f != f ? f : f > 0 ? f : 0.0f;
    if (mod & RZ) return std::is_same_v<H, F16> ? to_half_zero(f) : to_bf16_zero(f);
    return H::round(f);
}
template <class H>
static void from_f32_mod(Warp& w, const Inst& in) {
    u32* d = w.at<u32>(in.x[0]);
    const float* s = w.at<float>(in.x[1]);
    each_lane(w.mask, [&](u32 i) { d[i] = to_16_mod<H>(s[i], in.mod); });
}
template <class H>
static void from_f64(Warp& w, const Inst& in) {
    u32* d = w.at<u32>(in.x[0]);
    const double* s = w.at<double>(in.x[1]);
    each_lane(w.mask, [&](u32 i) { d[i] = H::round(float_odd(s[i])); });
}
template <class D, class S>
static void between_16(Warp& w, const Inst& in) {  // f16 <-> bf16, and .rni and the like within one
    u32 *d = w.at<u32>(in.x[0]), *s = w.at<u32>(in.x[1]);
    each_lane(w.mask, [&](u32 i) {
        float f = S::widen(s[i] & 0xffff);
        if (in.imm) f = float(integral(f, in.mod));
        d[i] = to_16_mod<D>(f, in.imm ? in.mod & ~ROUNDING : in.mod);
    });
}
template <class H>
static void pair(Warp& w, const Inst& in) {  // the first source is the upper half
    u32* d = w.at<u32>(in.x[0]);
    const float *hi = w.at<float>(in.x[1]), *lo = w.at<float>(in.x[2]);
    each_lane(w.mask, [&](u32 i) { d[i] = to_16_mod<H>(hi[i], in.mod) << 16 | to_16_mod<H>(lo[i], in.mod); });
}
RUN(tf32_f32, const bool away = in.mod & RNA; u32* d = w.at<u32>(in.x[0]); const float* s = w.at<float>(in.x[1]);
    each_lane(w.mask, [&](u32 i) { d[i] = to_tf32(s[i], away); }))

template <class D, class S>
static void add_pair(Table& t, const std::string& d, const std::string& s) {
    t.add("cvt." + d + "." + s, resize<D, S>);
    t.add("cvt.sat." + d + "." + s, clamp<D, S>);
}
template <class T>
static void add_integer_kind(Table& t, const std::string& n) {
    add_pair<T, u8>(t, n, "u8");
    add_pair<T, s8>(t, n, "s8");
    add_pair<T, u16>(t, n, "u16");
    add_pair<T, s16>(t, n, "s16");
    add_pair<T, u32>(t, n, "u32");
    add_pair<T, s32>(t, n, "s32");
    add_pair<T, u64>(t, n, "u64");
    add_pair<T, s64>(t, n, "s64");
    t.add("cvt." + n + ".f32", from_floating<T, ReadF32>);
    t.add("cvt." + n + ".f64", from_floating<T, ReadF64>);
    t.add("cvt." + n + ".f16", from_floating<T, ReadF16>);
    t.add("cvt." + n + ".bf16", from_floating<T, ReadBF16>);
    t.add("cvt.f32." + n, to_f32<T>);
    t.add("cvt.f64." + n, to_f64<T>);
    t.add("cvt.f16." + n, to_16<F16, T>);
    t.add("cvt.bf16." + n, to_16<BF16, T>);
}

void add_convert(Table& t) {
    add_integer_kind<u8>(t, "u8");
    add_integer_kind<s8>(t, "s8");
    add_integer_kind<u16>(t, "u16");
    add_integer_kind<s16>(t, "s16");
    add_integer_kind<u32>(t, "u32");
    add_integer_kind<s32>(t, "s32");
    add_integer_kind<u64>(t, "u64");
    add_integer_kind<s64>(t, "s64");
    const std::pair<const char*, Handler> all[] = {
        {"cvt.f32.f32", f32_f32},
        {"cvt.f32.f32.mod", f32_f32_mod},
        {"cvt.f64.f32", f64_f32},
        {"cvt.f64.f64", f64_f64},
        {"cvt.f32.f64", f32_f64},
        {"cvt.f32.f16", f32_f16},
        {"cvt.f32.bf16", f32_bf16},
        {"cvt.f64.f16", f64_f16},
        {"cvt.f64.bf16", f64_bf16},
        {"cvt.f16.f32", f16_f32},
        {"cvt.bf16.f32", bf16_f32},
        {"cvt.f16.f32.mod", from_f32_mod<F16>},
        {"cvt.bf16.f32.mod", from_f32_mod<BF16>},
        {"cvt.f16.f64", from_f64<F16>},
        {"cvt.bf16.f64", from_f64<BF16>},
        {"cvt.f16.f16", between_16<F16, F16>},
        {"cvt.bf16.bf16", between_16<BF16, BF16>},
        {"cvt.f16.bf16", between_16<F16, BF16>},
        {"cvt.bf16.f16", between_16<BF16, F16>},
        {"cvt.f16x2.f32", pair<F16>},
        {"cvt.bf16x2.f32", pair<BF16>},
        {"cvt.tf32.f32", tf32_f32},
    };
    for (const auto& [name, run] : all) t.add(name, run);
}

}  // namespace ptxsim
