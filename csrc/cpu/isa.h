// isa.h: Vec, a register of W floats, for the instruction set that each_isa.h is at, and numerics.h in terms of it.
// Included once per instruction set, hence no guard. Loads widen fp16 and bf16 exactly; stores round once, to nearest even.

namespace rk {
namespace RK_ISA {

#undef RK_INLINE
#define RK_INLINE static inline __attribute__((always_inline))

#if defined(RK_ISA_SCALAR)

using Vec = float;
using Mask = bool;
constexpr int W = 1;
constexpr int TILE_ROWS = 4;  // rows of a dot tile
constexpr int TILE_VECS = 8;  // registers across a dot tile: TILE_VECS * W divides PANEL

RK_INLINE Vec load(const float* p) { return *p; }
RK_INLINE Vec load(const int8_t* p) { return float(*p); }
RK_INLINE Vec load(const bf16* p) {
    const uint32_t u = uint32_t(p->bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
RK_INLINE Vec load(const f16* p) {
    const uint32_t sign = uint32_t(p->bits & 0x8000) << 16, exponent = (p->bits >> 10) & 31, fraction = p->bits & 1023;
    float f;
    uint32_t u;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        f = float(fraction) * 0x1p-24f;
        std::memcpy(&u, &f, 4);
        u |= sign;
    } else {
        u = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | (fraction << 13);
        if (exponent == 31 && fraction) u |= 0x400000u;  // quiet, as the hardware does
    }
    std::memcpy(&f, &u, 4);
    return f;
}
RK_INLINE void store(float* p, Vec v) { *p = v; }
RK_INLINE void store(bf16* p, Vec v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    p->bits = v != v ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
RK_INLINE void store(f16* p, Vec v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7FFFFFFF;
    if (a > 0x7F800000) {
        p->bits = uint16_t(sign | 0x7E00 | ((a >> 13) & 0x3FF));
    } else if (a >= 0x477FF000) {  // rounds past 65504
        p->bits = uint16_t(sign | 0x7C00);
    } else if (a < 0x38800000) {  // below 2^-14: a multiple of 2^-24; the float unit rounds it to even for us
        float f;
        std::memcpy(&f, &a, 4);
        f += 0.5f;  // the unit in the last place of [0.5, 1) is 2^-24
        uint32_t r;
        std::memcpy(&r, &f, 4);
        p->bits = uint16_t(sign | (r - 0x3F000000u));
    } else {
        p->bits = uint16_t(sign | ((a + 0xFFF + ((a >> 13) & 1) - 0x38000000u) >> 13));
    }
}
template <class T>
RK_INLINE Vec load_some(const T* p, int n) {
    return n > 0 ? load(p) : 0.0f;
}
template <class T>
RK_INLINE void store_some(T* p, Vec v, int n) {
    if (n > 0) store(p, v);
}
RK_INLINE Vec all(float f) { return f; }
RK_INLINE Vec larger(Vec x, Vec top) { return top < x ? x : top; }  // top if x is NaN
RK_INLINE void transpose(Vec*) {}
// W pairs of bf16, and the value of each in its lower or upper half.
RK_INLINE Vec load_pairs(const bf16* p) {
    float f;
    std::memcpy(&f, p, 4);
    return f;
}
RK_INLINE Vec lower_half(Vec v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    u <<= 16;
    std::memcpy(&v, &u, 4);
    return v;
}
RK_INLINE Vec upper_half(Vec v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    u &= 0xFFFF0000u;
    std::memcpy(&v, &u, 4);
    return v;
}

#elif defined(RK_ISA_AVX2)

struct Vec {
    __m256 v;
    Vec() = default;
    __attribute__((always_inline)) Vec(__m256 x) : v(x) {}
    __attribute__((always_inline)) explicit Vec(float f) : v(_mm256_set1_ps(f)) {}
};
struct Mask {
    __m256 m;
};
constexpr int W = 8;
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECS = 2;

RK_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
RK_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
RK_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
RK_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
RK_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
RK_INLINE Vec sqrt_of(Vec a) { return _mm256_sqrt_ps(a.v); }
RK_INLINE Vec abs_of(Vec a) { return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF))); }
RK_INLINE Mask lt(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
RK_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
RK_INLINE Vec larger(Vec x, Vec top) { return _mm256_max_ps(x.v, top.v); }    // top if x is NaN
RK_INLINE Vec at_least(Vec low, Vec x) { return _mm256_max_ps(low.v, x.v); }  // x if x is NaN
template <int SHIFT>
RK_INLINE Vec scale_by_exp2(Vec p, Vec t) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t.v), 23);
    const __m256 s = _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32((SHIFT + 127) << 23)));
    return p * Vec(s) * Vec(SHIFT > 0 ? 0x1p-64f : 2.0f);
}
RK_INLINE Vec all(float f) { return _mm256_set1_ps(f); }
// v[i] lane j <-> v[j] lane i, for 8 registers.
RK_INLINE void transpose(Vec* v) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {  // pairs of rows
        a[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)  // b[i + j]: column j of rows i..i+3, and column j + 4
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xEE);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        v[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        v[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}

RK_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
RK_INLINE Vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
RK_INLINE Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
RK_INLINE Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
RK_INLINE Vec load_pairs(const bf16* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
RK_INLINE Vec lower_half(Vec v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v.v), 16)); }
RK_INLINE Vec upper_half(Vec v) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(v.v), _mm256_set1_epi32(int(0xFFFF0000u))));
}
RK_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }
RK_INLINE void store(f16* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RK_INLINE void store(bf16* p, Vec v) {
    const __m256i u = _mm256_castps_si256(v.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
    const __m256i r = _mm256_blendv_epi8(even, nan, is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
// The first n lanes from memory, +0 in the others; nothing past p + n is touched.
template <class T>
RK_INLINE Vec load_some(const T* p, int n) {
    if (n >= W) return load(p);
    T buffer[W] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
}
template <class T>
RK_INLINE void store_some(T* p, Vec v, int n) {
    if (n >= W) return store(p, v);
    T buffer[W];
    store(buffer, v);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

#elif defined(RK_ISA_AVX512)

struct Vec {
    __m512 v;
    Vec() = default;
    __attribute__((always_inline)) Vec(__m512 x) : v(x) {}
    __attribute__((always_inline)) explicit Vec(float f) : v(_mm512_set1_ps(f)) {}
};
struct Mask {
    __mmask16 m;
};
constexpr int W = 16;
constexpr int TILE_ROWS = 14;  // 14 x 2 sums + 2 weights leave two of 32 registers for the broadcast
constexpr int TILE_VECS = 2;

RK_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
RK_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
RK_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
RK_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
RK_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
RK_INLINE Vec sqrt_of(Vec a) { return _mm512_sqrt_ps(a.v); }
RK_INLINE Vec abs_of(Vec a) { return _mm512_abs_ps(a.v); }
RK_INLINE Mask lt(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
RK_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m.m, b.v, a.v); }
RK_INLINE Vec larger(Vec x, Vec top) { return _mm512_max_ps(x.v, top.v); }    // top if x is NaN
RK_INLINE Vec at_least(Vec low, Vec x) { return _mm512_max_ps(low.v, x.v); }  // x if x is NaN
// One instruction with the same single rounding: p * 2^n exactly, then rounded.
template <int>
RK_INLINE Vec scale_by_exp2(Vec p, Vec t) {
    return _mm512_scalef_ps(p.v, _mm512_sub_ps(t.v, _mm512_set1_ps(12582912.0f)));
}
RK_INLINE Vec all(float f) { return _mm512_set1_ps(f); }
// v[i] lane j <-> v[j] lane i, for 16 registers.
RK_INLINE void transpose(Vec* v) {
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {  // pairs of rows
        a[i] = _mm512_unpacklo_ps(v[i].v, v[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(v[i].v, v[i + 1].v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)  // b[i + j]: columns j, j + 4, j + 8, j + 12 of rows i..i+3, one in each 128 bits
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + 2 + j], 0xEE);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // and the 4 x 4 of those quarters
        const __m512 even01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88), odd01 = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xDD);
        const __m512 even23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
        const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xDD);
        v[j].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
        v[4 + j].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
        v[8 + j].v = _mm512_shuffle_f32x4(even01, even23, 0xDD);
        v[12 + j].v = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
    }
}

RK_INLINE __mmask16 first_lanes(int n) { return n >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n > 0 ? n : 0)) - 1u); }
RK_INLINE __m512 widen_bf16(__m256i u) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16)); }
RK_INLINE __m256i narrow_bf16(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd), 16);
    const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), even, nan));
}
RK_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
RK_INLINE Vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
RK_INLINE Vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
RK_INLINE Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
RK_INLINE Vec load_pairs(const bf16* p) { return _mm512_loadu_ps(p); }
RK_INLINE Vec lower_half(Vec v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v.v), 16)); }
RK_INLINE Vec upper_half(Vec v) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v.v), _mm512_set1_epi32(int(0xFFFF0000u))));
}
RK_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
RK_INLINE void store(f16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RK_INLINE void store(bf16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v.v)); }
// The first n lanes from memory, +0 in the others; nothing past p + n is touched.
RK_INLINE Vec load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
RK_INLINE Vec load_some(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
RK_INLINE Vec load_some(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
RK_INLINE void store_some(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v.v); }
RK_INLINE void store_some(f16* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
RK_INLINE void store_some(bf16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(v.v)); }

#endif

}  // namespace RK_ISA
}  // namespace rk

#include "../numerics.h"

namespace rk {
namespace RK_ISA {

// A few registers side by side, each for itself, for numerics.h's functions: their chains of operations are long, and the CPU's
// scheduler, which holds two or three of them written one after the other, would wait at every step.
constexpr int SOME = W == 16 ? 4 : W == 8 ? 2 : 1;
template <class T>
struct SomeOf {
    T v[SOME];
    SomeOf() = default;
    __attribute__((always_inline)) explicit SomeOf(float f) {
        for (int i = 0; i < SOME; ++i) v[i] = all(f);
    }
};
using Some = SomeOf<Vec>;
using SomeMask = SomeOf<Mask>;
template <class T, class F>
RK_INLINE SomeOf<T> each(const F& f) {
    SomeOf<T> y;
#pragma GCC unroll 4
    for (int i = 0; i < SOME; ++i) y.v[i] = f(i);
    return y;
}
#define RK_EACH(T, expression) return each<T>([&](int i) __attribute__((always_inline)) { return expression; })
RK_INLINE Some operator+(const Some& a, const Some& b) { RK_EACH(Vec, a.v[i] + b.v[i]); }
RK_INLINE Some operator-(const Some& a, const Some& b) { RK_EACH(Vec, a.v[i] - b.v[i]); }
RK_INLINE Some operator*(const Some& a, const Some& b) { RK_EACH(Vec, a.v[i] * b.v[i]); }
RK_INLINE Some operator/(const Some& a, const Some& b) { RK_EACH(Vec, a.v[i] / b.v[i]); }
RK_INLINE Some fmadd(const Some& a, const Some& b, const Some& c) { RK_EACH(Vec, fmadd(a.v[i], b.v[i], c.v[i])); }
RK_INLINE Some abs_of(const Some& a) { RK_EACH(Vec, abs_of(a.v[i])); }
RK_INLINE SomeMask lt(const Some& a, const Some& b) { RK_EACH(Mask, lt(a.v[i], b.v[i])); }
RK_INLINE Some select(const SomeMask& m, const Some& a, const Some& b) { RK_EACH(Vec, select(m.v[i], a.v[i], b.v[i])); }
RK_INLINE Some at_least(const Some& low, const Some& x) { RK_EACH(Vec, at_least(low.v[i], x.v[i])); }
template <int SHIFT>
RK_INLINE Some scale_by_exp2(const Some& p, const Some& t) {
    RK_EACH(Vec, scale_by_exp2<SHIFT>(p.v[i], t.v[i]));
}
#undef RK_EACH

// A register of a row's values as they are stored: W of them, or of bf16 W pairs, which are moved about like floats and widened
// last. unpacked: value `part` of each.
template <class T>
inline constexpr int VALUES_IN = 1;
template <>
inline constexpr int VALUES_IN<bf16> = 2;
template <class T>
RK_INLINE Vec load_packed(const T* p) {
    return load(p);
}
RK_INLINE Vec load_packed(const bf16* p) { return load_pairs(p); }
template <class T>
RK_INLINE Vec unpacked(Vec v, int part) {
    if constexpr (VALUES_IN<T> == 1) return v;
    else return part == 0 ? lower_half(v) : upper_half(v);
}

// Storage dtype decided at run time: for inputs and outputs, where one branch a register costs nothing against the arithmetic.
RK_INLINE Vec load_some_as(Dtype t, const void* p, int64_t i, int n) {
    if (t == Dtype::F32) return load_some(static_cast<const float*>(p) + i, n);
    if (t == Dtype::F16) return load_some(static_cast<const f16*>(p) + i, n);
    return load_some(static_cast<const bf16*>(p) + i, n);
}
RK_INLINE void store_some_as(Dtype t, void* p, int64_t i, Vec v, int n) {
    if (t == Dtype::F32) return store_some(static_cast<float*>(p) + i, v, n);
    if (t == Dtype::F16) return store_some(static_cast<f16*>(p) + i, v, n);
    return store_some(static_cast<bf16*>(p) + i, v, n);
}

// n values as float32: exact.
template <class T>
RK_INLINE void widen_of(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_some(to + i, load_some(from + i, int(n - i)), int(n - i));
}
RK_INLINE void widen(Dtype t, const void* from, int64_t start, int64_t n, float* to) {
    if (t == Dtype::F32) return widen_of(static_cast<const float*>(from) + start, n, to);
    if (t == Dtype::F16) return widen_of(static_cast<const f16*>(from) + start, n, to);
    widen_of(static_cast<const bf16*>(from) + start, n, to);
}
// n values rounded once to the storage dtype.
template <class T>
RK_INLINE void narrow_of(const float* from, int64_t n, T* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store_some(to + i, load_some(from + i, int(n - i)), int(n - i));
}
RK_INLINE void narrow(Dtype t, const float* from, int64_t n, void* to, int64_t start) {
    if (t == Dtype::F32) return narrow_of(from, n, static_cast<float*>(to) + start);
    if (t == Dtype::F16) return narrow_of(from, n, static_cast<f16*>(to) + start);
    narrow_of(from, n, static_cast<bf16*>(to) + start);
}

// The 32 lanes of row_sum, as registers.
struct Lanes {
    Vec v[LANES / W];
};
RK_INLINE Lanes zero_lanes() {
    Lanes s;
    for (int i = 0; i < LANES / W; ++i) s.v[i] = all(0.0f);
    return s;
}
// The last folds, inside a register: lane l takes lane l + half.
#if defined(RK_ISA_AVX512) || defined(RK_ISA_AVX2)
RK_INLINE float fold_register(Vec v) {
#ifdef RK_ISA_AVX512
    const __m256 by8 = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
#else
    const __m256 by8 = v.v;
#endif
    const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
    const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
    return _mm_cvtss_f32(_mm_add_ss(by2, _mm_shuffle_ps(by2, by2, 1)));
}
#else
RK_INLINE float fold_register(Vec v) { return v; }
#endif
// Lanes fold by 16, 8, 4, 2, 1: lane l takes lane l + half.
RK_INLINE float fold(Lanes s) {
    int have = LANES / W;
    for (int half = 16; half >= W; half /= 2, have /= 2)
        for (int i = 0; i < have / 2; ++i) s.v[i] = s.v[i] + s.v[i + have / 2];
    return fold_register(s.v[0]);
}
// The largest of W lanes, none of them NaN.
RK_INLINE float largest(Vec v) {
    float lane[W];
    store(lane, v);
    for (int half = W / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = lane[i] < lane[i + half] ? lane[i + half] : lane[i];
    return lane[0];
}

}  // namespace RK_ISA
}  // namespace rk
