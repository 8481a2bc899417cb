// atomic.cpp: atom and red, lane after lane. Kernels of mode portable have none; what has some must still run to be found out.
#include "lanes.h"
#include "rounding.h"

namespace ptxsim {

enum Operation { ADD, MIN, MAX, AND, OR, XOR, EXCHANGE, SWAP_IF_EQUAL, INC, DEC };

template <class T, Operation OP>
static T combine(T old, T b, T c) {
    switch (OP) {
        case ADD:
            if constexpr (std::is_floating_point_v<T>) return old + b;
            else return T(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(b));
        case MIN: return b < old ? b : old;
        case MAX: return b > old ? b : old;
        case EXCHANGE: return b;
        case SWAP_IF_EQUAL: return old == b ? c : old;
        default: break;
    }
    if constexpr (std::is_integral_v<T>) {
        if (OP == AND) return old & b;
        if (OP == OR) return old | b;
        if (OP == XOR) return old ^ b;
        if (OP == INC) return old >= b ? T(0) : T(old + 1);
        if (OP == DEC) return old == 0 || old > b ? b : T(old - 1);
    }
    return old;
}

static u8* target(Warp& w, u32 i, const Inst& in, u64 a, u32 bytes) {
    const bool shared = in.mod & 8;
    u8* p = shared ? shared_pointer(w, i, in, a, bytes, true) : any_pointer(w, i, in, a, bytes, true, true);
    if (shared || a >> 60 == SHARED_WINDOW >> 60) wrote_shared(w, i, in, u32(a), bytes);
    if (w.launch->options.race) {
        if (shared || a >> 60 == SHARED_WINDOW >> 60) race_shared(w, i, in.line, u32(a), bytes, true, nullptr, true);
        else if (a >> 60 == 0) race_global(w, i, in.line, region_of(w, i, in, a, bytes, true), a, bytes, true, nullptr, true);
    }
    return p;
}
static u64 address(Warp& w, const Inst& in, u32 i) {
    if (in.x[4] < 0) return u64(in.imm);
    return in.mod & ADDRESS64 ? w.at<u64>(in.x[4])[i] + u64(in.imm) : u32(w.at<u32>(in.x[4])[i] + u32(in.imm));
}

// x = old value or -1, b, c or -1, -, address; mod: ADDRESS64, 8 shared
template <class T, Operation OP>
static void atom(Warp& w, const Inst& in) {
    using C = Cell<T>;
    each_lane(w.mask, [&](u32 i) {
        u8* p = target(w, i, in, address(w, in, i), sizeof(T));
        T old;
        memcpy(&old, p, sizeof old);
        const T now = combine<T, OP>(old, get<T>(w.at<C>(in.x[1])[i]), in.x[2] >= 0 ? get<T>(w.at<C>(in.x[2])[i]) : T());
        memcpy(p, &now, sizeof now);
        if (in.x[0] >= 0) w.at<C>(in.x[0])[i] = put<T>(old);
    });
}
template <class H, int N>
static void atom_half(Warp& w, const Inst& in) {  // add only
    each_lane(w.mask, [&](u32 i) {
        u8* p = target(w, i, in, address(w, in, i), 2 * N);
        u32 old = 0, now = 0;
        memcpy(&old, p, 2 * N);
        const u32 b = w.at<u32>(in.x[1])[i];
        for (int k = 0; k < N; k++)
            now |= H::round(float_odd(add_odd(H::widen(old >> 16 * k & 0xffff), H::widen(b >> 16 * k & 0xffff)))) << 16 * k;
        memcpy(p, &now, 2 * N);
        if (in.x[0] >= 0) w.at<u32>(in.x[0])[i] = old;
    });
}

template <class T>
static void add_arithmetic(Table& t, const std::string& type) {
    t.add("atom.add." + type, atom<T, ADD>);
    t.add("atom.min." + type, atom<T, MIN>);
    t.add("atom.max." + type, atom<T, MAX>);
    t.add("atom.exch." + type, atom<T, EXCHANGE>);
}
template <class T>
static void add_bits(Table& t, const std::string& type) {
    t.add("atom.and." + type, atom<T, AND>);
    t.add("atom.or." + type, atom<T, OR>);
    t.add("atom.xor." + type, atom<T, XOR>);
    t.add("atom.exch." + type, atom<T, EXCHANGE>);
    t.add("atom.cas." + type, atom<T, SWAP_IF_EQUAL>);
}

void add_atomic(Table& t) {
    add_arithmetic<u32>(t, "u32");
    add_arithmetic<s32>(t, "s32");
    add_arithmetic<u64>(t, "u64");
    add_arithmetic<s64>(t, "s64");
    add_arithmetic<float>(t, "f32");
    add_arithmetic<double>(t, "f64");
    add_bits<u16>(t, "b16");
    add_bits<u32>(t, "b32");
    add_bits<u64>(t, "b64");
    t.add("atom.inc.u32", atom<u32, INC>);
    t.add("atom.dec.u32", atom<u32, DEC>);
    t.add("atom.add.f16", atom_half<F16, 1>);
    t.add("atom.add.bf16", atom_half<BF16, 1>);
    t.add("atom.add.f16x2", atom_half<F16, 2>);
    t.add("atom.add.bf16x2", atom_half<BF16, 2>);
}

}  // namespace ptxsim
