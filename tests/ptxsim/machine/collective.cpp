// collective.cpp: shfl, vote, match, redux, elect. The interpreter gathers the lanes; w.mask are those that take part.
#include "lanes.h"

namespace ptxsim {

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// x = d, p, a, b, c (x[5] is the member mask)
template <Shuffle MODE>
static void shfl(Warp& w, const Inst& in) {
    const u32 *a = w.at<u32>(in.x[2]), *b = w.at<u32>(in.x[3]), *c = w.at<u32>(in.x[4]);
    u32 from[32], got[32], inside = 0;
    each_lane(w.mask, [&](u32 i) {
        const u32 segment = c[i] >> 8 & 31, clamp = c[i] & 31, delta = b[i] & 31;
        const int top = int((i & segment) | (clamp & ~segment)), bottom = int(i & segment);
        int j = 0;
        bool p = false;
        if (MODE == UP) j = int(i) - int(delta), p = j >= top;
        if (MODE == DOWN) j = int(i + delta), p = j <= top;
        if (MODE == BUTTERFLY) j = int(i ^ delta), p = j <= top;
        if (MODE == INDEX) j = int(u32(bottom) | (delta & ~segment)), p = j <= top;
        if (!p) j = int(i);
        inside |= u32(p) << i;
        if (!(w.mask >> j & 1)) fault(w, i, in, text("shuffle from lane %d, which does not take part", j));
        from[i] = u32(j);
    });
    each_lane(w.mask, [&](u32 i) { got[i] = a[from[i]]; });
    u32* d = w.at<u32>(in.x[0]);
    each_lane(w.mask, [&](u32 i) { d[i] = got[i]; });
    if (in.x[1] >= 0) w.set_pred(in.x[1], inside);
}

// x = d, p; mod 1: p negated
static u32 votes(Warp& w, const Inst& in) { return (in.mod & 1 ? ~w.pred(in.x[1]) : w.pred(in.x[1])) & w.mask; }
static void vote_all(Warp& w, const Inst& in) { w.set_pred(in.x[0], votes(w, in) == w.mask ? FULL : 0); }
static void vote_any(Warp& w, const Inst& in) { w.set_pred(in.x[0], votes(w, in) ? FULL : 0); }
static void vote_uni(Warp& w, const Inst& in) {
    const u32 v = votes(w, in);
    w.set_pred(in.x[0], v == 0 || v == w.mask ? FULL : 0);
}
static void same_for_all(Warp& w, s32 at, u32 v) {
    u32* d = w.at<u32>(at);
    each_lane(w.mask, [&](u32 i) { d[i] = v; });
}
static void ballot(Warp& w, const Inst& in) { same_for_all(w, in.x[0], votes(w, in)); }

// x = d, a; imm: which
enum Reduction { ADD, MIN, MAX, AND, OR, XOR };
template <class T, Reduction R>
static void redux(Warp& w, const Inst& in) {
    const T* a = w.at<T>(in.x[1]);
    T r = a[__builtin_ctz(w.mask)];
    each_lane(w.mask & (w.mask - 1), [&](u32 i) {
        const T v = a[i];
        r = R == ADD   ? T(u32(r) + u32(v))
            : R == MIN ? (v < r ? v : r)
            : R == MAX ? (v > r ? v : r)
            : R == AND ? r & v
            : R == OR  ? r | v
                       : r ^ v;
    });
    same_for_all(w, in.x[0], u32(r));
}

template <class T>
static void match_any(Warp& w, const Inst& in) {
    const T* a = w.at<T>(in.x[2]);
    u32 same[32] = {};
    each_lane(w.mask, [&](u32 i) { each_lane(w.mask, [&](u32 j) { same[i] |= u32(a[i] == a[j]) << j; }); });
    u32* d = w.at<u32>(in.x[0]);
    each_lane(w.mask, [&](u32 i) { d[i] = same[i]; });
}
template <class T>
static void match_all(Warp& w, const Inst& in) {
    const T* a = w.at<T>(in.x[2]);
    const T first = a[__builtin_ctz(w.mask)];
    bool all = true;
    each_lane(w.mask, [&](u32 i) { all &= a[i] == first; });
    same_for_all(w, in.x[0], all ? w.mask : 0);
    if (in.x[1] >= 0) w.set_pred(in.x[1], all ? FULL : 0);
}
static void elect(Warp& w, const Inst& in) {
    const u32 leader = u32(__builtin_ctz(w.mask));
    if (in.x[0] >= 0) same_for_all(w, in.x[0], leader);
    if (in.x[1] >= 0) w.set_pred(in.x[1], 1u << leader);
}
static void warp_sync(Warp& w, const Inst&) {
    if (w.launch->options.race) race_warp_sync(w);
}

void add_collective(Table& t) {
    const std::pair<const char*, Handler> all[] = {
        {"shfl.up", shfl<UP>},
        {"shfl.down", shfl<DOWN>},
        {"shfl.bfly", shfl<BUTTERFLY>},
        {"shfl.idx", shfl<INDEX>},
        {"vote.all", vote_all},
        {"vote.any", vote_any},
        {"vote.uni", vote_uni},
        {"vote.ballot", ballot},
        {"redux.add.s32", redux<s32, ADD>},
        {"redux.add.u32", redux<u32, ADD>},
        {"redux.min.s32", redux<s32, MIN>},
        {"redux.min.u32", redux<u32, MIN>},
        {"redux.max.s32", redux<s32, MAX>},
        {"redux.max.u32", redux<u32, MAX>},
        {"redux.and.b32", redux<u32, AND>},
        {"redux.or.b32", redux<u32, OR>},
        {"redux.xor.b32", redux<u32, XOR>},
        {"match.any.b32", match_any<u32>},
        {"match.any.b64", match_any<u64>},
        {"match.all.b32", match_all<u32>},
        {"match.all.b64", match_all<u64>},
        {"elect", elect},
        {"warp.sync", warp_sync},
    };
    for (const auto& [name, run] : all) t.add(name, run);
}

}  // namespace ptxsim
