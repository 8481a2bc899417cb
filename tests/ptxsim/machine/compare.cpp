// compare.cpp: setp, set, selp, slct, testp.
#include "lanes.h"
#include "rounding.h"

namespace ptxsim {

struct Eq {
    template <class T>
    bool operator()(T a, T b) const {
        return a == b;
    }
};
struct Ne {
    template <class T>
    bool operator()(T a, T b) const {
        return (a < b) | (a > b);
    }
};
struct Lt {
    template <class T>
    bool operator()(T a, T b) const {
        return a < b;
    }
};
struct Le {
    template <class T>
    bool operator()(T a, T b) const {
        return a <= b;
    }
};
struct Gt {
    template <class T>
    bool operator()(T a, T b) const {
        return a > b;
    }
};
struct Ge {
    template <class T>
    bool operator()(T a, T b) const {
        return a >= b;
    }
};
// The unordered ones are true where an operand is NaN.
struct Equ {
    template <class T>
    bool operator()(T a, T b) const {
        return !((a < b) | (a > b));
    }
};
struct Neu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a == b);
    }
};
struct Ltu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a >= b);
    }
};
struct Leu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a > b);
    }
};
struct Gtu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a <= b);
    }
};
struct Geu {
    template <class T>
    bool operator()(T a, T b) const {
        return !(a < b);
    }
};
struct Num {
    template <class T>
    bool operator()(T a, T b) const {
        return (a == a) & (b == b);
    }
};
struct Nan {
    template <class T>
    bool operator()(T a, T b) const {
        return (a != a) | (b != b);
    }
};

enum Join : u16 { NONE, AND = 256, OR = 512, XOR = 768, JOIN = 768, NOT_C = 1024 };  // in mod, above Mod's bits

struct PlainRead {
    template <class T>
    static T read(T v) {
        return v;
    }
};
template <class H>
struct HalfRead {
    static float read(u16 v) { return H::widen(v); }
};

template <class T, class Read, class C>
static __attribute__((noinline)) u32 compare(Warp& w, const Inst& in) {
    const C c;
    if constexpr (std::is_same_v<T, float>) {
        if (in.mod & FTZ)
            return test_cells([=](float a, float b) { return c(flush(a), flush(b)); }, w.at<float>(in.x[2]),
                              w.at<float>(in.x[3]));
    }
    return test_cells([=](Cell<T> a, Cell<T> b) { return c(Read::read(get<T>(a)), Read::read(get<T>(b))); },
                      w.at<Cell<T>>(in.x[2]), w.at<Cell<T>>(in.x[3]));
}
static u32 joined(Warp& w, const Inst& in, u32 bits) {
    if (!(in.mod & JOIN)) return bits;
    const u32 c = in.mod & NOT_C ? ~w.pred(in.x[4]) : w.pred(in.x[4]);
    return (in.mod & JOIN) == AND ? bits & c : (in.mod & JOIN) == OR ? bits | c : bits ^ c;
}

// setp.CMP{.BOOL}.T p|q, a, b{, c}: x = p, q, a, b, c
template <class T, class Read, class C>
static void setp(Warp& w, const Inst& in) {
    const u32 bits = compare<T, Read, C>(w, in);
    const u32 p = joined(w, in, bits), q = joined(w, in, ~bits);
    if (in.x[0] >= 0) w.set_pred(in.x[0], p);
    if (in.x[1] >= 0) w.set_pred(in.x[1], q);
}
// set: imm is what a lane gets where it holds: ~0, or 1.0 in its type
template <class T, class Read, class C>
static void set(Warp& w, const Inst& in) {
    const u32 bits = joined(w, in, compare<T, Read, C>(w, in)), yes = u32(in.imm);
    u32* d = w.at<u32>(in.x[0]);
    each_lane(w.mask, [&](u32 i) { d[i] = bits >> i & 1 ? yes : 0; });
}

// setp.f16x2: p for the lower half, q for the upper
template <class H, class C>
static void setp_pair(Warp& w, const Inst& in) {
    const u32 *a = w.at<u32>(in.x[2]), *b = w.at<u32>(in.x[3]);
    const C c;
    u32 lo = 0, hi = 0;
    each_lane(w.mask, [&](u32 i) {
        lo |= u32(c(H::widen(a[i] & 0xffff), H::widen(b[i] & 0xffff))) << i;
        hi |= u32(c(H::widen(a[i] >> 16), H::widen(b[i] >> 16))) << i;
    });
    if (in.x[0] >= 0) w.set_pred(in.x[0], joined(w, in, lo));
    if (in.x[1] >= 0) w.set_pred(in.x[1], joined(w, in, hi));
}
// set.f16x2.f16x2: imm is 1.0 or ~0 of 16 bits
template <class H, class C>
static void set_pair(Warp& w, const Inst& in) {
    u32 *d = w.at<u32>(in.x[0]), *a = w.at<u32>(in.x[2]), *b = w.at<u32>(in.x[3]);
    const C c;
    const u32 yes = u32(in.imm);
    each_lane(w.mask, [&](u32 i) {
        const u32 lo = c(H::widen(a[i] & 0xffff), H::widen(b[i] & 0xffff)) ? yes : 0;
        d[i] = lo | (c(H::widen(a[i] >> 16), H::widen(b[i] >> 16)) ? yes : 0) << 16;
    });
}

template <class U>
static void selp(Warp& w, const Inst& in) {
    const u32 p = w.pred(in.x[3]);
    U *d = w.at<U>(in.x[0]), *a = w.at<U>(in.x[1]), *b = w.at<U>(in.x[2]);
    const u32 mask = w.mask;
    if (mask == FULL) {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) d[i] = p >> i & 1 ? a[i] : b[i];
    } else {
#pragma GCC ivdep
        for (int i = 0; i < 32; i++) {
            const U v = p >> i & 1 ? a[i] : b[i];
            d[i] = mask >> i & 1 ? v : d[i];
        }
    }
}
template <class U, class C>
static void slct(Warp& w, const Inst& in) {
    map_cells(
        w.mask, w.at<U>(in.x[0]), [](U a, U b, C c) { return c >= 0 ? a : b; }, w.at<U>(in.x[1]), w.at<U>(in.x[2]),
        w.at<C>(in.x[3]));
}
static void selp_pred(Warp& w, const Inst& in) {
    const u32 c = w.pred(in.x[3]);
    w.set_pred(in.x[0], (w.pred(in.x[1]) & c) | (w.pred(in.x[2]) & ~c));
}

// testp: which by imm, in the order of the names below
static const char* const TESTS[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
template <class T>
static bool is(int test, T v) {
    switch (test) {
        case 0: return std::isfinite(v);
        case 1: return std::isinf(v);
        case 2: return v == v;
        case 3: return v != v;
        case 4: return std::isnormal(v);
        default: return v != 0 && std::isfinite(v) && !std::isnormal(v);
    }
}
template <class T, int TEST>
static void testp(Warp& w, const Inst& in) {
    const T* a = w.at<T>(in.x[1]);
    u32 bits = 0;
    each_lane(w.mask, [&](u32 i) { bits |= u32(is(TEST, a[i])) << i; });
    w.set_pred(in.x[0], bits);
}

template <class T, class Read, class C>
static void add_one(Table& t, const std::string& cmp, const std::string& type) {
    t.add("setp." + cmp + "." + type, setp<T, Read, C>);
    t.add("set." + cmp + "." + type, set<T, Read, C>);
}
template <class T, class Read>
static void add_ordered(Table& t, const std::string& type) {
    add_one<T, Read, Eq>(t, "eq", type);
    add_one<T, Read, Ne>(t, "ne", type);
    add_one<T, Read, Lt>(t, "lt", type);
    add_one<T, Read, Le>(t, "le", type);
    add_one<T, Read, Gt>(t, "gt", type);
    add_one<T, Read, Ge>(t, "ge", type);
}
template <class T, class Read>
static void add_unordered(Table& t, const std::string& type) {
    add_ordered<T, Read>(t, type);
    add_one<T, Read, Equ>(t, "equ", type);
    add_one<T, Read, Neu>(t, "neu", type);
    add_one<T, Read, Ltu>(t, "ltu", type);
    add_one<T, Read, Leu>(t, "leu", type);
    add_one<T, Read, Gtu>(t, "gtu", type);
    add_one<T, Read, Geu>(t, "geu", type);
    add_one<T, Read, Num>(t, "num", type);
    add_one<T, Read, Nan>(t, "nan", type);
}
template <class H, class C>
static void add_pair(Table& t, const std::string& cmp, const std::string& type) {
    t.add("setp." + cmp + "." + type, setp_pair<H, C>);
    t.add("set." + cmp + "." + type, set_pair<H, C>);
}
template <class H>
static void add_pairs(Table& t, const std::string& type) {
    add_pair<H, Eq>(t, "eq", type);
    add_pair<H, Ne>(t, "ne", type);
    add_pair<H, Lt>(t, "lt", type);
    add_pair<H, Le>(t, "le", type);
    add_pair<H, Gt>(t, "gt", type);
    add_pair<H, Ge>(t, "ge", type);
    add_pair<H, Equ>(t, "equ", type);
    add_pair<H, Neu>(t, "neu", type);
    add_pair<H, Nan>(t, "nan", type);
    add_pair<H, Num>(t, "num", type);
}

void add_compare(Table& t) {
    add_ordered<u16, PlainRead>(t, "u16");
    add_ordered<s16, PlainRead>(t, "s16");
    add_ordered<u32, PlainRead>(t, "u32");
    add_ordered<s32, PlainRead>(t, "s32");
    add_ordered<u64, PlainRead>(t, "u64");
    add_ordered<s64, PlainRead>(t, "s64");
    add_unordered<float, PlainRead>(t, "f32");
    add_unordered<double, PlainRead>(t, "f64");
    add_unordered<u16, HalfRead<F16>>(t, "f16");
    add_unordered<u16, HalfRead<BF16>>(t, "bf16");
    add_pairs<F16>(t, "f16x2");
    add_pairs<BF16>(t, "bf16x2");
    t.add("selp.32", selp<u32>);
    t.add("selp.64", selp<u64>);
    t.add("selp.pred", selp_pred);
    t.add("slct.32.s32", slct<u32, s32>);
    t.add("slct.32.f32", slct<u32, float>);
    t.add("slct.64.s32", slct<u64, s32>);
    t.add("slct.64.f32", slct<u64, float>);
    t.add(std::string("testp.") + TESTS[0] + ".f32", testp<float, 0>);
    t.add(std::string("testp.") + TESTS[1] + ".f32", testp<float, 1>);
    t.add(std::string("testp.") + TESTS[2] + ".f32", testp<float, 2>);
    t.add(std::string("testp.") + TESTS[3] + ".f32", testp<float, 3>);
    t.add(std::string("testp.") + TESTS[4] + ".f32", testp<float, 4>);
    t.add(std::string("testp.") + TESTS[5] + ".f32", testp<float, 5>);
    t.add(std::string("testp.") + TESTS[0] + ".f64", testp<double, 0>);
    t.add(std::string("testp.") + TESTS[1] + ".f64", testp<double, 1>);
    t.add(std::string("testp.") + TESTS[2] + ".f64", testp<double, 2>);
    t.add(std::string("testp.") + TESTS[3] + ".f64", testp<double, 3>);
    t.add(std::string("testp.") + TESTS[4] + ".f64", testp<double, 4>);
    t.add(std::string("testp.") + TESTS[5] + ".f64", testp<double, 5>);
}

}  // namespace ptxsim
