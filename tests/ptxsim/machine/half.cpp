// half.cpp: f16, bf16 and their pairs, each operation rounded once: computed to odd in wider arithmetic, then rounded.
#include <algorithm>

#include "lanes.h"
#include "rounding.h"

namespace ptxsim {

template <class H>
struct Half {
    static u32 fit(double d, u16 mod) {
        float f = float_odd(d);
        if (mod & SAT) f = saturate(f);
        if (mod & RELU) f = f != f ? f : (f > 0 ? f : 0.0f);
        return H::round(f);
    }
    static u32 add(u32 a, u32 b, u32, u16 mod) { return fit(add_odd(H::widen(a), H::widen(b)), mod); }
    static u32 sub(u32 a, u32 b, u32, u16 mod) { return fit(add_odd(H::widen(a), -double(H::widen(b))), mod); }
    static u32 mul(u32 a, u32 b, u32, u16 mod) { return fit(double(H::widen(a)) * H::widen(b), mod); }
    static u32 fma(u32 a, u32 b, u32 c, u16 mod) { return fit(add_odd(double(H::widen(a)) * H::widen(b), H::widen(c)), mod); }
    static u32 neg(u32 a, u32, u32, u16) { return (a ^ 0x8000) & 0xffff; }
    static u32 abs(u32 a, u32, u32, u16) { return a & 0x7fff; }
    template <bool MAX>
    static u32 extreme(u32 a, u32 b, u32, u16 mod) {
        const float x = H::widen(a), y = H::widen(b);
        if (x != x || y != y) {
            if (mod & NAN_ || (x != x && y != y)) return 0x7fff;
            return x != x ? b : a;
        }
        if (x == y) return MAX ? a & b : a | b;  // only zeros of different sign differ
        return (x < y) != MAX ? a : b;
    }
    static u32 ex2(u32 a, u32, u32, u16) { return H::round(float(std::exp2(double(H::widen(a))))); }
    static u32 tanh(u32 a, u32, u32, u16) { return H::round(float(std::tanh(double(H::widen(a))))); }
};

using Scalar = u32 (*)(u32, u32, u32, u16);

template <Scalar F>
static void one(Warp& w, const Inst& in) {
    u32 *d = w.at<u32>(in.x[0]), *a = w.at<u32>(in.x[1]);
    u32 *b = in.x[2] >= 0 ? w.at<u32>(in.x[2]) : a, *c = in.x[3] >= 0 ? w.at<u32>(in.x[3]) : a;
    each_lane(w.mask, [&](u32 i) { d[i] = F(a[i] & 0xffff, b[i] & 0xffff, c[i] & 0xffff, in.mod); });
}
template <Scalar F>
static void two(Warp& w, const Inst& in) {
    u32 *d = w.at<u32>(in.x[0]), *a = w.at<u32>(in.x[1]);
    u32 *b = in.x[2] >= 0 ? w.at<u32>(in.x[2]) : a, *c = in.x[3] >= 0 ? w.at<u32>(in.x[3]) : a;
    each_lane(w.mask, [&](u32 i) {
        const u32 low = F(a[i] & 0xffff, b[i] & 0xffff, c[i] & 0xffff, in.mod);
        d[i] = low | F(a[i] >> 16, b[i] >> 16, c[i] >> 16, in.mod) << 16;
    });
}

template <class H>
static void add_kind(Table& t, const std::string& name) {
    const auto both = [&](const std::string& op, Handler scalar, Handler pair) {
        t.add(op + "." + name, scalar);
        t.add(op + "." + name + "x2", pair);
    };
    both("add", one<Half<H>::add>, two<Half<H>::add>);
    both("sub", one<Half<H>::sub>, two<Half<H>::sub>);
    both("mul", one<Half<H>::mul>, two<Half<H>::mul>);
    both("fma", one<Half<H>::fma>, two<Half<H>::fma>);
    both("neg", one<Half<H>::neg>, two<Half<H>::neg>);
    both("abs", one<Half<H>::abs>, two<Half<H>::abs>);
    both("min", one<Half<H>::template extreme<false>>, two<Half<H>::template extreme<false>>);
    both("max", one<Half<H>::template extreme<true>>, two<Half<H>::template extreme<true>>);
    both("ex2.approx", one<Half<H>::ex2>, two<Half<H>::ex2>);
    both("tanh.approx", one<Half<H>::tanh>, two<Half<H>::tanh>);
}

void add_half(Table& t) {
    add_kind<F16>(t, "f16");
    add_kind<BF16>(t, "bf16");
}

}  // namespace ptxsim
