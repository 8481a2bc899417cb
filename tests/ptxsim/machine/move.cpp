// move.cpp: mov, packing and unpacking, cvta, isspacep, and instructions that only hint.
#include "lanes.h"

namespace ptxsim {

#define RUN(name, ...) \
    static void name(Warp& w, const Inst& in) { __VA_ARGS__; }

RUN(mov16, map1<u16, u16>(w, in, [](u16 a) { return a; }))
RUN(mov32, map1<u32, u32>(w, in, [](u32 a) { return a; }))
RUN(mov64, map1<u64, u64>(w, in, [](u64 a) { return a; }))
RUN(mov_pred, w.set_pred(in.x[0], w.pred(in.x[1])))
// a predicate from an immediate
RUN(mov_pred_imm, w.set_pred(in.x[0], in.imm ? FULL : 0))

// {a, b} -> d, lowest first
RUN(pack_2x16, map2<u32, u32, u32>(w, in, [](u32 a, u32 b) { return (a & 0xffff) | b << 16; }))
RUN(pack_2x32, map2<u64, u32, u32>(w, in, [](u32 a, u32 b) { return a | u64(b) << 32; }))
static void pack_4x16(Warp& w, const Inst& in) {
    map_cells(
        w.mask, w.at<u64>(in.x[0]),
        [](u32 a, u32 b, u32 c, u32 d) {
            return u64(a & 0xffff) | u64(b & 0xffff) << 16 | u64(c & 0xffff) << 32 | u64(d & 0xffff) << 48;
        },
        w.at<u32>(in.x[1]), w.at<u32>(in.x[2]), w.at<u32>(in.x[3]), w.at<u32>(in.x[4]));
}
static void pack_4x8(Warp& w, const Inst& in) {
    map_cells(
        w.mask, w.at<u32>(in.x[0]),
        [](u32 a, u32 b, u32 c, u32 d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }, w.at<u32>(in.x[1]),
        w.at<u32>(in.x[2]), w.at<u32>(in.x[3]), w.at<u32>(in.x[4]));
}
RUN(pack_2x8, map2<u16, u32, u32>(w, in, [](u32 a, u32 b) { return u16((a & 255) | b << 8); }))

// d -> {a, b}: sources are read before any destination is written
template <class S, class D, int N>
static void unpack(Warp& w, const Inst& in) {
    constexpr int W = sizeof(S) * 8 / N;
    const Cell<S>* s = w.at<Cell<S>>(in.x[4]);
    each_lane(w.mask, [&](u32 i) {
        const u64 v = get<S>(s[i]);
        for (int k = 0; k < N; k++)
            if (in.x[k] >= 0) w.at<D>(in.x[k])[i] = D(W == 64 ? v : v >> (W * k) & ((1ull << (W & 63)) - 1));
    });
}

// imm: the window's base, added, or taken off (to)
RUN(to_generic, const u64 base = u64(in.imm); map1<u64, u64>(w, in, [base](u64 a) { return a + base; }))
RUN(from_generic, const u64 base = u64(in.imm); map1<u64, u64>(w, in, [base](u64 a) { return a - base; }))
static void is_space(Warp& w, const Inst& in) {  // imm: the window, 0 for global
    const u64 window = u64(in.imm);
    w.set_pred(in.x[0], test_cells([=](u64 a) { return (a >> 60 << 60) == window; }, w.at<u64>(in.x[1])));
}
RUN(nothing, (void)w; (void)in)
RUN(active_mask, const u32 m = w.mask; u32* d = w.at<u32>(in.x[0]); each_lane(m, [&](u32 i) { d[i] = m; }))

void add_move(Table& t) {
    const std::pair<const char*, Handler> all[] = {
        {"mov.16", mov16},
        {"mov.32", mov32},
        {"mov.64", mov64},
        {"mov.pred", mov_pred},
        {"mov.pred.imm", mov_pred_imm},
        {"pack.2x16", pack_2x16},
        {"pack.2x32", pack_2x32},
        {"pack.4x16", pack_4x16},
        {"pack.4x8", pack_4x8},
        {"pack.2x8", pack_2x8},
        {"unpack.2x16", unpack<u32, u32, 2>},
        {"unpack.2x32", unpack<u64, u32, 2>},
        {"unpack.4x16", unpack<u64, u32, 4>},
        {"unpack.4x8", unpack<u32, u32, 4>},
        {"unpack.2x8", unpack<u16, u32, 2>},
        {"to_generic", to_generic},
        {"from_generic", from_generic},
        {"isspacep", is_space},
        {"nothing", nothing},
        {"activemask", active_mask},
    };
    for (const auto& [name, run] : all) t.add(name, run);
}

}  // namespace ptxsim
