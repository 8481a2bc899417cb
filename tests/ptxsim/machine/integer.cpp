// integer.cpp: integer arithmetic of 16, 32 and 64 bits.
#include "lanes.h"

namespace ptxsim {

template <class T>
using Unsigned = std::conditional_t<sizeof(T) == 2, u16, std::conditional_t<sizeof(T) == 4, u32, u64>>;
template <class T>
using Wide = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, s32, u32>,
                                std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, s64, u64>,
                                                   std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

// Wrapping arithmetic goes through unsigned types; u16 would be promoted to int, hence u32 for it.
template <class T>
using Wrap = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
struct Int {
    static T add(T a, T b) { return T(Wrap<T>(a) + Wrap<T>(b)); }
    static T sub(T a, T b) { return T(Wrap<T>(a) - Wrap<T>(b)); }
    static T mul(T a, T b) { return T(Wrap<T>(a) * Wrap<T>(b)); }
    static T mul_hi(T a, T b) { return T(Wide<T>(a) * Wide<T>(b) >> sizeof(T) * 8); }
    static T div(T a, T b) {  // by zero: PTX leaves it open; all ones is what the hardware's sequence gives
        if (b == 0) return T(~T(0));
        if (std::is_signed_v<T> && b == T(-1)) return sub(0, a);
        return a / b;
    }
    static T rem(T a, T b) {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == T(-1)) return 0;
        return a % b;
    }
    static T sat_add(T a, T b) {
        const s64 s = s64(a) + s64(b);
        return s > INT32_MAX ? T(INT32_MAX) : s < INT32_MIN ? T(INT32_MIN) : T(s);
    }
    static T sat_sub(T a, T b) {
        const s64 s = s64(a) - s64(b);
        return s > INT32_MAX ? T(INT32_MAX) : s < INT32_MIN ? T(INT32_MIN) : T(s);
    }

    static void run_add(Warp& w, const Inst& in) { map2<T, T, T>(w, in, add); }
    static void run_sub(Warp& w, const Inst& in) { map2<T, T, T>(w, in, sub); }
    static void run_mul(Warp& w, const Inst& in) { map2<T, T, T>(w, in, mul); }
    static void run_mul_hi(Warp& w, const Inst& in) { map2<T, T, T>(w, in, mul_hi); }
    static void run_mad(Warp& w, const Inst& in) {
        map3<T, T, T, T>(w, in, [](T a, T b, T c) { return add(mul(a, b), c); });
    }
    static void run_mad_hi(Warp& w, const Inst& in) {
        map3<T, T, T, T>(w, in, [](T a, T b, T c) { return add(mul_hi(a, b), c); });
    }
    static void run_div(Warp& w, const Inst& in) { map2<T, T, T>(w, in, div); }
    static void run_rem(Warp& w, const Inst& in) { map2<T, T, T>(w, in, rem); }
    static void run_min(Warp& w, const Inst& in) {
        map2<T, T, T>(w, in, [](T a, T b) { return a < b ? a : b; });
    }
    static void run_max(Warp& w, const Inst& in) {
        map2<T, T, T>(w, in, [](T a, T b) { return a > b ? a : b; });
    }
    static void run_abs(Warp& w, const Inst& in) {
        map1<T, T>(w, in, [](T a) { return a < 0 ? sub(0, a) : a; });
    }
    static void run_neg(Warp& w, const Inst& in) {
        map1<T, T>(w, in, [](T a) { return sub(0, a); });
    }
    static void run_sad(Warp& w, const Inst& in) {
        map3<T, T, T, T>(w, in, [](T a, T b, T c) { return add(c, a < b ? sub(b, a) : sub(a, b)); });
    }
    static void run_wide(Warp& w, const Inst& in) {
        map2<Wide<T>, T, T>(w, in, [](T a, T b) { return Wide<T>(a) * Wide<T>(b); });
    }
    static void run_mad_wide(Warp& w, const Inst& in) {
        map3<Wide<T>, T, T, Wide<T>>(
            w, in, [](T a, T b, Wide<T> c) { return Wide<T>(Wrap<Wide<T>>(Wide<T>(a) * Wide<T>(b)) + Wrap<Wide<T>>(c)); });
    }
    static void run_sat_add(Warp& w, const Inst& in) { map2<T, T, T>(w, in, sat_add); }
    static void run_sat_sub(Warp& w, const Inst& in) { map2<T, T, T>(w, in, sat_sub); }
    static T low24(T a) { return std::is_signed_v<T> ? T(s32(u32(a) << 8) >> 8) : T(a & 0xffffff); }
    static void run_mul24(Warp& w, const Inst& in) {
        map2<T, T, T>(w, in, [](T a, T b) { return T(u64(s64(low24(a)) * s64(low24(b)))); });
    }
    static void run_mul24_hi(Warp& w, const Inst& in) {
        map2<T, T, T>(w, in, [](T a, T b) { return T(s64(low24(a)) * s64(low24(b)) >> 16); });
    }
    static void run_mad24(Warp& w, const Inst& in) {
        map3<T, T, T, T>(w, in, [](T a, T b, T c) { return add(T(u64(s64(low24(a)) * s64(low24(b)))), c); });
    }

    // With the carry flag, a hidden predicate x[4] (out) and x[5] (in): d = a + b + carry, or a - b - borrow.
    static void run_carry(Warp& w, const Inst& in) {
        using U = Unsigned<T>;
        using V = unsigned __int128;
        U *d = w.at<U>(in.x[0]), *a = w.at<U>(in.x[1]), *b = w.at<U>(in.x[2]), *c = in.x[3] >= 0 ? w.at<U>(in.x[3]) : nullptr;
        const u32 carry = in.x[5] >= 0 ? w.pred(in.x[5]) : 0;
        u32 out = 0;
        each_lane(w.mask, [&](u32 i) {
            V x = a[i], y = b[i];
            if (c) x = in.mod & 2 ? V(a[i]) * b[i] >> sizeof(U) * 8 : U(V(a[i]) * b[i]), y = c[i];
            if (c && in.mod & 4) x = std::is_signed_v<T> ? V(U(__int128(T(a[i])) * T(b[i]) >> sizeof(U) * 8)) : x;
            const V r = in.mod & 1 ? x - y - (carry >> i & 1) : x + y + (carry >> i & 1);
            d[i] = U(r);
            out |= u32(r >> sizeof(U) * 8 & 1) << i;
        });
        if (in.x[4] >= 0) w.set_pred(in.x[4], out);
    }
};

template <class T>
void add_type(Table& t, const std::string& name) {
    t.add("add." + name, Int<T>::run_add);
    t.add("sub." + name, Int<T>::run_sub);
    t.add("mul.lo." + name, Int<T>::run_mul);
    t.add("mul.hi." + name, Int<T>::run_mul_hi);
    t.add("mad.lo." + name, Int<T>::run_mad);
    t.add("mad.hi." + name, Int<T>::run_mad_hi);
    t.add("div." + name, Int<T>::run_div);
    t.add("rem." + name, Int<T>::run_rem);
    t.add("min." + name, Int<T>::run_min);
    t.add("max." + name, Int<T>::run_max);
    t.add("abs." + name, Int<T>::run_abs);
    t.add("neg." + name, Int<T>::run_neg);
    t.add("sad." + name, Int<T>::run_sad);
    if constexpr (sizeof(T) < 8) {
        t.add("mul.wide." + name, Int<T>::run_wide);
        t.add("mad.wide." + name, Int<T>::run_mad_wide);
    }
    if constexpr (sizeof(T) == 4) {
        t.add("add.sat." + name, Int<T>::run_sat_add);
        t.add("sub.sat." + name, Int<T>::run_sat_sub);
        t.add("mul24.lo." + name, Int<T>::run_mul24);
        t.add("mul24.hi." + name, Int<T>::run_mul24_hi);
        t.add("mad24.lo." + name, Int<T>::run_mad24);
    }
    if constexpr (sizeof(T) >= 4) t.add("carry." + name, Int<T>::run_carry);
}

void add_integer(Table& t) {
    add_type<u16>(t, "u16");
    add_type<s16>(t, "s16");
    add_type<u32>(t, "u32");
    add_type<s32>(t, "s32");
    add_type<u64>(t, "u64");
    add_type<s64>(t, "s64");
}

}  // namespace ptxsim
