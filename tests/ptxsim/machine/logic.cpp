// logic.cpp: bits: and, or, shifts, fields, counts, lop3, prmt, predicates' logic, dot products of bytes.
#include "lanes.h"

namespace ptxsim {

template <class U>
static U shift_left(U a, u32 s) {
    return s >= sizeof(U) * 8 ? U(0) : U(a << (s & (sizeof(U) * 8 - 1)));
}
template <class T>
static T shift_right(T a, u32 s) {
    constexpr u32 W = sizeof(T) * 8;
    if constexpr (std::is_signed_v<T>) return T(a >> (s >= W ? W - 1 : s));
    else return s >= W ? T(0) : T(a >> (s & (W - 1)));
}
template <class U>
static U low_bits(u32 n) {
    return n >= sizeof(U) * 8 ? ~U(0) : U((U(1) << n) - 1);
}
template <class T>
static T field(T a, u32 pos, u32 len) {
    using U = std::make_unsigned_t<T>;
    constexpr u32 W = sizeof(T) * 8;
    pos &= 255, len &= 255;
    const U v = pos >= W ? U(0) : U(U(a) >> pos) & low_bits<U>(len);
    if (!std::is_signed_v<T> || len == 0) return T(v);
    const u32 sign_at = pos + len - 1 < W - 1 ? pos + len - 1 : W - 1;
    const bool negative = U(a) >> sign_at & 1;
    const u32 have = pos >= W ? 0 : (len < W - pos ? len : W - pos);
    return T(negative ? v | ~low_bits<U>(have) : v);
}
template <class U>
static U insert(U a, U b, u32 pos, u32 len) {
    pos &= 255, len &= 255;
    if (pos >= sizeof(U) * 8 || len == 0) return b;
    const U m = low_bits<U>(len) << pos;
    return (b & ~m) | ((a << pos) & m);
}
static u32 reverse_bits(u32 x) {
    x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
    x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
    x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(x);
}
static u32 permute(u32 a, u32 b, u32 sel) {
    const u64 v = u64(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; i++) {
        const u32 s = sel >> 4 * i & 15;
        u8 byte = u8(v >> 8 * (s & 7));
        if (s & 8) byte = byte & 128 ? 255 : 0;
        r |= u32(byte) << 8 * i;
    }
    return r;
}
static u32 permute_mode(u32 a, u32 b, u32 c, int mode) {  // prmt with a mode: c's two low bits choose a pattern
    static const u16 patterns[6][4] = {
        {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123}, {0x0000, 0x1111, 0x2222, 0x3333},
        {0x3210, 0x3211, 0x3222, 0x3333}, {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232},
    };
    return permute(a, b, patterns[mode][c & 3]);
}

#define RUN(name, ...) \
    static void name(Warp& w, const Inst& in) { __VA_ARGS__; }

RUN(and32, map2<u32, u32, u32>(w, in, [](u32 a, u32 b) { return a & b; }))
RUN(or32, map2<u32, u32, u32>(w, in, [](u32 a, u32 b) { return a | b; }))
RUN(xor32, map2<u32, u32, u32>(w, in, [](u32 a, u32 b) { return a ^ b; }))
RUN(and64, map2<u64, u64, u64>(w, in, [](u64 a, u64 b) { return a & b; }))
RUN(or64, map2<u64, u64, u64>(w, in, [](u64 a, u64 b) { return a | b; }))
RUN(xor64, map2<u64, u64, u64>(w, in, [](u64 a, u64 b) { return a ^ b; }))
RUN(not16, map1<u16, u16>(w, in, [](u16 a) { return u16(~a); }))
RUN(not32, map1<u32, u32>(w, in, [](u32 a) { return ~a; }))
RUN(not64, map1<u64, u64>(w, in, [](u64 a) { return ~a; }))
RUN(cnot16, map1<u16, u16>(w, in, [](u16 a) { return u16(a == 0); }))
RUN(cnot32, map1<u32, u32>(w, in, [](u32 a) { return u32(a == 0); }))
RUN(cnot64, map1<u64, u64>(w, in, [](u64 a) { return u64(a == 0); }))
RUN(shl16, map2<u16, u16, u32>(w, in, shift_left<u16>))
RUN(shl32, map2<u32, u32, u32>(w, in, shift_left<u32>))
RUN(shl64, map2<u64, u64, u32>(w, in, shift_left<u64>))
RUN(shr_u16, map2<u16, u16, u32>(w, in, shift_right<u16>))
RUN(shr_s16, map2<s16, s16, u32>(w, in, shift_right<s16>))
RUN(shr_u32, map2<u32, u32, u32>(w, in, shift_right<u32>))
RUN(shr_s32, map2<s32, s32, u32>(w, in, shift_right<s32>))
RUN(shr_u64, map2<u64, u64, u32>(w, in, shift_right<u64>))
RUN(shr_s64, map2<s64, s64, u32>(w, in, shift_right<s64>))
RUN(shf_l_wrap, map3<u32, u32, u32, u32>(w, in, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (32 - (c & 31))); }))
RUN(shf_r_wrap, map3<u32, u32, u32, u32>(w, in, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c & 31)); }))
RUN(shf_l_clamp,
    map3<u32, u32, u32, u32>(w, in, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (32 - (c > 32 ? 32 : c))); }))
RUN(shf_r_clamp,
    map3<u32, u32, u32, u32>(w, in, [](u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> (c > 32 ? 32 : c)); }))
RUN(bfe_u32, map3<u32, u32, u32, u32>(w, in, field<u32>))
RUN(bfe_s32, map3<s32, s32, u32, u32>(w, in, field<s32>))
RUN(bfe_u64, map3<u64, u64, u32, u32>(w, in, field<u64>))
RUN(bfe_s64, map3<s64, s64, u32, u32>(w, in, field<s64>))
RUN(popc32, map1<u32, u32>(w, in, [](u32 a) { return u32(__builtin_popcount(a)); }))
RUN(popc64, map1<u32, u64>(w, in, [](u64 a) { return u32(__builtin_popcountll(a)); }))
RUN(clz32, map1<u32, u32>(w, in, [](u32 a) { return a ? u32(__builtin_clz(a)) : 32; }))
RUN(clz64, map1<u32, u64>(w, in, [](u64 a) { return a ? u32(__builtin_clzll(a)) : 64; }))
RUN(brev32, map1<u32, u32>(w, in, reverse_bits))
RUN(brev64, map1<u64, u64>(w, in, [](u64 a) { return u64(reverse_bits(u32(a))) << 32 | reverse_bits(u32(a >> 32)); }))
RUN(prmt, map3<u32, u32, u32, u32>(w, in, permute))
RUN(prmt_mode, const int mode = int(in.imm);
    map3<u32, u32, u32, u32>(w, in, [mode](u32 a, u32 b, u32 c) { return permute_mode(a, b, c, mode); }))

// The most significant bit that differs from the sign; with .shiftamt the distance from the top.
template <class T>
static void find(Warp& w, const Inst& in) {
    using U = std::make_unsigned_t<T>;
    const bool amount = in.imm;
    map1<u32, T>(w, in, [amount](T a) {
        const U u = std::is_signed_v<T> && a < 0 ? U(~a) : U(a);
        if (!u) return FULL;
        const u32 top = 63 - u32(__builtin_clzll(u));
        return amount ? u32(sizeof(T) * 8 - 1 - top) : top;
    });
}

static void lop3(Warp& w, const Inst& in) {
    const u32 t = u32(in.imm);
    map3<u32, u32, u32, u32>(w, in, [t](u32 a, u32 b, u32 c) {
        u32 r = 0;
        r |= t & 1 ? ~a & ~b & ~c : 0, r |= t & 2 ? ~a & ~b & c : 0, r |= t & 4 ? ~a & b & ~c : 0, r |= t & 8 ? ~a & b & c : 0;
        r |= t & 16 ? a & ~b & ~c : 0, r |= t & 32 ? a & ~b & c : 0, r |= t & 64 ? a & b & ~c : 0, r |= t & 128 ? a & b & c : 0;
        return r;
    });
}

template <class U>
static void bfi(Warp& w, const Inst& in) {
    map_cells(w.mask, w.at<U>(in.x[0]), insert<U>, w.at<U>(in.x[1]), w.at<U>(in.x[2]), w.at<u32>(in.x[3]), w.at<u32>(in.x[4]));
}
RUN(bmsk_clamp, map2<u32, u32, u32>(w, in, [](u32 a, u32 b) { return a >= 32 ? 0 : low_bits<u32>(b) << a; }))
RUN(szext_clamp, const bool sign = in.imm; map2<u32, u32, u32>(w, in, [sign](u32 a, u32 n) {
        if (n == 0) return 0u;
        if (n >= 32) return a;
        return sign ? u32(s32(a << (32 - n)) >> (32 - n)) : a & low_bits<u32>(n);
    }))

// dp4a, dp2a: bytes of a and b (signed or not by bits 0 and 1 of mod), the sum added to c.
static s64 byte_at(u32 v, u32 i, bool sign) { return sign ? s64(s8(v >> 8 * i)) : s64(u8(v >> 8 * i)); }
static s64 half_at(u32 v, u32 i, bool sign) { return sign ? s64(s16(v >> 16 * i)) : s64(u16(v >> 16 * i)); }
RUN(dp4a, const bool sa = in.mod & 1; const bool sb = in.mod & 2; map3<u32, u32, u32, u32>(w, in, [=](u32 a, u32 b, u32 c) {
        s64 s = c;
        for (u32 i = 0; i < 4; i++) s += byte_at(a, i, sa) * byte_at(b, i, sb);
        return u32(s);
    }))
RUN(dp2a, const bool sa = in.mod & 1; const bool sb = in.mod & 2; const u32 hi = in.mod & 4 ? 2 : 0;
    map3<u32, u32, u32, u32>(w, in, [=](u32 a, u32 b, u32 c) {
        return u32(s64(c) + half_at(a, 0, sa) * byte_at(b, hi, sb) + half_at(a, 1, sa) * byte_at(b, hi + 1, sb));
    }))

RUN(and_pred, w.set_pred(in.x[0], w.pred(in.x[1]) & w.pred(in.x[2])))
RUN(or_pred, w.set_pred(in.x[0], w.pred(in.x[1]) | w.pred(in.x[2])))
RUN(xor_pred, w.set_pred(in.x[0], w.pred(in.x[1]) ^ w.pred(in.x[2])))
RUN(not_pred, w.set_pred(in.x[0], ~w.pred(in.x[1])))

void add_logic(Table& t) {
    const char* plain[] = {"16", "32"};
    for (const std::string n : plain) {
        t.add("and.b" + n, and32);
        t.add("or.b" + n, or32);
        t.add("xor.b" + n, xor32);
    }
    const std::pair<const char*, Handler> all[] = {
        {"and.b64", and64},
        {"or.b64", or64},
        {"xor.b64", xor64},
        {"not.b16", not16},
        {"not.b32", not32},
        {"not.b64", not64},
        {"cnot.b16", cnot16},
        {"cnot.b32", cnot32},
        {"cnot.b64", cnot64},
        {"shl.b16", shl16},
        {"shl.b32", shl32},
        {"shl.b64", shl64},
        {"shr.u16", shr_u16},
        {"shr.b16", shr_u16},
        {"shr.s16", shr_s16},
        {"shr.u32", shr_u32},
        {"shr.b32", shr_u32},
        {"shr.s32", shr_s32},
        {"shr.u64", shr_u64},
        {"shr.b64", shr_u64},
        {"shr.s64", shr_s64},
        {"shf.l.wrap.b32", shf_l_wrap},
        {"shf.r.wrap.b32", shf_r_wrap},
        {"shf.l.clamp.b32", shf_l_clamp},
        {"shf.r.clamp.b32", shf_r_clamp},
        {"bfe.u32", bfe_u32},
        {"bfe.s32", bfe_s32},
        {"bfe.u64", bfe_u64},
        {"bfe.s64", bfe_s64},
        {"bfi.b32", bfi<u32>},
        {"bfi.b64", bfi<u64>},
        {"popc.b32", popc32},
        {"popc.b64", popc64},
        {"clz.b32", clz32},
        {"clz.b64", clz64},
        {"brev.b32", brev32},
        {"brev.b64", brev64},
        {"bfind.u32", find<u32>},
        {"bfind.s32", find<s32>},
        {"bfind.u64", find<u64>},
        {"bfind.s64", find<s64>},
        {"prmt.b32", prmt},
        {"prmt.mode.b32", prmt_mode},
        {"lop3.b32", lop3},
        {"dp4a", dp4a},
        {"dp2a", dp2a},
        {"bmsk.clamp.b32", bmsk_clamp},
        {"szext.clamp", szext_clamp},
        {"and.pred", and_pred},
        {"or.pred", or_pred},
        {"xor.pred", xor_pred},
        {"not.pred", not_pred},
    };
    for (const auto& [name, run] : all) t.add(name, run);
}

}  // namespace ptxsim
