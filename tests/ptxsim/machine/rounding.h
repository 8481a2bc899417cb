// rounding.h: 16-bit floats as integers, and roundings that the host has no instruction for. Everything branch-free where the
// compiler is to vectorise it.
#pragma once

#include <cmath>

#include "machine.h"

namespace ptxsim {

inline float as_float(u32 b) { return __builtin_bit_cast(float, b); }
inline u32 bits_of(float f) { return __builtin_bit_cast(u32, f); }
inline double as_double(u64 b) { return __builtin_bit_cast(double, b); }
inline u64 bits_of(double f) { return __builtin_bit_cast(u64, f); }

// PTX's own NaN, which every arithmetic instruction of f32 gives.
inline float canonical(float x) { return x == x ? x : as_float(0x7fffffff); }
inline float flush(float x) {
    const u32 b = bits_of(x);
    return as_float(b & 0x7f800000 ? b : b & 0x80000000);
}
inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }  // NaN gives +0

inline float from_half(u32 h) {
    const u32 m = h & 0x7fff, sign = (h & 0x8000) << 16;
    const u32 normal = (m << 13) + 0x38000000u;
    const u32 special = m > 0x7c00 ? 0x7fffffffu : 0x7f800000u;
    const u32 tiny = bits_of(float(s32(m)) * 0x1p-24f);
    const u32 r = m < 0x400 ? tiny : m >= 0x7c00 ? special : normal;
    return as_float(m > 0x7c00 ? r : r | sign);
}
inline float from_bf16(u32 h) { return as_float((h & 0xffff) << 16); }

inline u32 to_half(float f) {  // to nearest even
    const u32 b = bits_of(f), sign = b >> 16 & 0x8000, m = b & 0x7fffffff;
    const u32 normal = (m - 0x38000000u + 0xfff + (m >> 13 & 1)) >> 13;
    const u32 tiny = bits_of(as_float(m) + 0.5f) - 0x3f000000u;  // adding 1/2 rounds to a multiple of 2^-24
    const u32 r = m >= 0x47800000u ? 0x7c00 : m < 0x38800000u ? tiny : normal;
    return m > 0x7f800000u ? 0x7fff : sign | r;
}
inline u32 to_half_zero(float f) {  // towards zero
    const u32 b = bits_of(f), sign = b >> 16 & 0x8000, m = b & 0x7fffffff;
    if (m > 0x7f800000u) return 0x7fff;
    if (m == 0x7f800000u) return sign | 0x7c00;
    if (m >= 0x47800000u) return sign | 0x7bff;
    if (m >= 0x38800000u) return sign | (m - 0x38000000u) >> 13;
    return sign | u32(as_float(m) * 0x1p24f);
}
inline u32 to_bf16(float f) {
    const u32 b = bits_of(f);
    return (b & 0x7fffffff) > 0x7f800000u ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
inline u32 to_bf16_zero(float f) {
    const u32 b = bits_of(f);
    return (b & 0x7fffffff) > 0x7f800000u ? 0x7fff : b >> 16;
}
inline u32 to_tf32(float f, bool ties_away) {
    const u32 b = bits_of(f);
    if ((b & 0x7f800000) == 0x7f800000) return b & 0x7fffff ? 0x7fffffff : b;
    return (b + (ties_away ? 0x1000u : 0xfffu + (b >> 13 & 1))) & 0xffffe000u;
}

// a + b and double -> float rounded to odd: what is then rounded to 16 bits has been rounded once.
inline double add_odd(double a, double b) {
    const double s = a + b;
    if (!std::isfinite(s)) return s;
    const double bb = s - a, e = (a - (s - bb)) + (b - bb);
    u64 u = bits_of(s);
    if (e != 0 && !(u & 1)) u = (e > 0) == (s > 0) ? u | 1 : u - 1;
    return as_double(u);
}
inline float float_odd(double d) {
    const float f = float(d);
    if (!(std::fabs(d) <= 0x1.fffffep127) || double(f) == d) return f;
    const u32 b = bits_of(f);
    return as_float((std::fabs(double(f)) > std::fabs(d) ? b - 1 : b) | 1);
}
// A double to a float with a direction: Mod's bits (0 nearest, RZ, RM, RP).
inline float float_directed(double d, u32 direction) {
    float f = float(d);
    if (direction == 0 || d != d || double(f) == d) return f;
    const bool down = direction == RM || (direction == RZ && d > 0);
    if (down && double(f) > d) f = std::nextafterf(f, -INFINITY);
    if (!down && double(f) < d) f = std::nextafterf(f, INFINITY);
    return f;
}

struct F16 {
    static float widen(u32 h) { return from_half(h); }
    static u32 round(float f) { return to_half(f); }
};
struct BF16 {
    static float widen(u32 h) { return from_bf16(h); }
    static u32 round(float f) { return to_bf16(f); }
};

}  // namespace ptxsim
