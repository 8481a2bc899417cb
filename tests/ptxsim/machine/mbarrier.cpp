// mbarrier.cpp: mbarrier.* and the fences of the asynchronous proxy.
//
// An mbarrier's state is kept beside shared memory, under its address: nobody may look into its eight bytes. x[0] the result or
// -1, x[1] the address register or -1, imm the offset, x[2] and x[3] counts; mod: ADDRESS64, 4 parity, 8 try, 16 announces
// bytes, 32 no arrival.
#include "lanes.h"

namespace ptxsim {

constexpr s64 MOST_BYTES = (1 << 20) - 1;  // of an mbarrier's count of bytes, and of its count of arrivals

static u32 address(Warp& w, u32 lane, const Inst& in) {
    u64 a = u64(in.imm) + (in.x[1] < 0 ? 0 : in.mod & ADDRESS64 ? w.at<u64>(in.x[1])[lane] : w.at<u32>(in.x[1])[lane]);
    if (a >> 60 == SHARED_WINDOW >> 60) a -= SHARED_WINDOW;
    shared_pointer(w, lane, in, a, 8, true);
    return u32(a);
}
Mbar& mbar_at(Warp& w, u32 lane, const Inst& in, u64 a) {
    const auto found = w.block->mbars.find(u32(a));
    if (found == w.block->mbars.end())
        fault(w, lane, in, text("shared+%llu is no mbarrier: nobody has initialised it", (unsigned long long)a));
    return found->second;
}

std::string waits_for(const Block& b, u32 at) {
    const auto found = b.mbars.find(at);
    if (found == b.mbars.end()) return text(" at shared+%u, which is gone", at);
    const Mbar& m = found->second;
    return text(" at shared+%u, phase %llu: %lld of %u arrivals and %lld bytes are missing", at, (unsigned long long)m.phase,
                (long long)m.pending, m.count, (long long)m.bytes);
}

// The phase is over if nothing is missing: who waits may go on.
static void settle(Block& b, u32 at, Mbar& m) {
    if (m.pending != 0 || m.bytes != 0) return;
    b.idle = 0;
    m.phase++;
    m.pending = m.count;
    m.done = m.clock;
    for (Warp& w : b.warps)
        for (u32 i = 0; i < w.count; i++)
            if (w.groups[i].state == AT_MBARRIER && w.groups[i].bar == at) w.groups[i].state = RUNNABLE;
}
static void announce(Warp& w, u32 lane, const Inst& in, Mbar& m, s64 bytes) {
    m.bytes += bytes;
    if (m.bytes > MOST_BYTES || m.bytes < -MOST_BYTES)
        fault(w, lane, in, text("an mbarrier that waits for %lld bytes, beyond what it can count", (long long)m.bytes));
}
void complete_bytes(Block& b, u32 at, u32 bytes) {
    const auto found = b.mbars.find(at);
    if (found == b.mbars.end()) throw Fault{text("a bulk copy reports to shared+%u, which is no mbarrier any more", at)};
    found->second.bytes -= bytes;
    settle(b, at, found->second);
}

static void init(Warp& w, const Inst& in) {
    Block& b = *w.block;
    each_lane(w.mask, [&](u32 i) {
        const u32 at = address(w, i, in), count = w.at<u32>(in.x[2])[i];
        if (count < 1 || count > MOST_BYTES) fault(w, i, in, text("an mbarrier for %u arrivals", count));
        if (b.mbars.count(at)) fault(w, i, in, text("shared+%u is an mbarrier already: mbarrier.inval comes first", at));
        if (w.launch->options.race) race_shared(w, i, in.line, at, 8, true, nullptr);
        Mbar m;
        m.count = count, m.pending = count;
        m.agent = u32(b.mbars.size()) % 64;
        m.maker = w.id * 32 + i;
        b.mbars[at] = m;
    });
}
static void inval(Warp& w, const Inst& in) {
    each_lane(w.mask, [&](u32 i) {
        const u32 at = address(w, i, in);
        mbar_at(w, i, in, at);
        if (w.launch->options.race) race_shared(w, i, in.line, at, 8, true, nullptr);
        w.block->mbars.erase(at);
    });
}
static void arrive(Warp& w, const Inst& in) {
    each_lane(w.mask, [&](u32 i) {
        const u32 at = address(w, i, in);
        Mbar& m = mbar_at(w, i, in, at);
        if (w.launch->options.race) {
            race_shared(w, i, in.line, at, 8, true, nullptr, true);
            race_mbarrier_arrive(w, m);
        }
        const u64 phase = m.phase;
        if (in.mod & 16) announce(w, i, in, m, s64(w.at<u32>(in.x[3])[i]));
        if (!(in.mod & 32)) {
            const u32 count = in.x[2] < 0 ? 1 : w.at<u32>(in.x[2])[i];
            m.pending -= count;
            if (m.pending < 0)
                fault(w, i, in, text("more arrivals at the mbarrier at shared+%u than the %u of its phase", at, m.count));
            settle(*w.block, at, m);
        }
        if (in.x[0] >= 0) w.at<u64>(in.x[0])[i] = phase;
    });
}
static void complete(Warp& w, const Inst& in) {
    each_lane(w.mask, [&](u32 i) {
        const u32 at = address(w, i, in);
        Mbar& m = mbar_at(w, i, in, at);
        announce(w, i, in, m, -s64(w.at<u32>(in.x[3])[i]));
        settle(*w.block, at, m);
    });
}

// Which lanes of the mask need not wait; the others' mbarriers go to `late`.
u32 mbarrier_over(Warp& w, const Inst& in, u32 mask, u32* late) {
    u32 over = 0;
    each_lane(mask, [&](u32 i) {
        const u32 at = late[i] = address(w, i, in);
        Mbar& m = mbar_at(w, i, in, at);
        if (w.launch->options.race) race_shared(w, i, in.line, at, 8, true, nullptr, true);
        bool is;
        if (in.mod & 4) {
            const u32 parity = w.at<u32>(in.x[2])[i];
            if (parity > 1) fault(w, i, in, text("an mbarrier's parity is 0 or 1, not %u", parity));
            is = (m.phase & 1) != parity;
        } else {
            is = m.phase != w.at<u64>(in.x[2])[i];
        }
        if (!is) return;
        over |= 1u << i;
        if (w.launch->options.race) race_mbarrier_wait(w, m);
    });
    return over;
}

// ---- the generic and the asynchronous proxy: what ld and st write, wgmma and bulk copies see after fence.proxy.async only

void mark_generic(Warp& w, u32 lane, const Inst& in, u32 offset, u32 bytes) {
    Block& b = *w.block;
    const auto next = b.mbars.lower_bound(offset < 8 ? 0 : offset - 7);
    if (next != b.mbars.end() && next->first < offset + bytes)
        fault(w, lane, in, text("a write to shared+%u, which is part of an mbarrier", offset));
    for (u32 i = offset / 16; i <= (offset + bytes - 1) / 16; i++) b.generic[i] = b.proxy_time << 16 | (w.id * 32 + lane);
}
static void fence_async(Warp& w, const Inst& in) {  // imm 1: mbarrier_init only
    Block& b = *w.block;
    if (!in.imm) {
        b.proxy_time++;
        each_lane(w.mask, [&](u32 i) { w.fenced[i] = b.proxy_time; });
    }
    for (auto& [at, m] : b.mbars)
        if (m.maker / 32 == w.id && w.mask >> m.maker % 32 & 1) m.fenced = true;
}

void add_mbarrier(Table& t) {
    t.add("mbarrier.init", init);
    t.add("mbarrier.inval", inval);
    t.add("mbarrier.arrive", arrive);
    t.add("mbarrier.complete_tx", complete);
    t.add("fence.async", fence_async);
}

}  // namespace ptxsim
