// race.cpp: two threads touch the same bytes, one of them writes, and nothing orders the two.
//
// Order comes from barriers and, within a warp, from bar.warp.sync. Time counts these: an access is stamped with the present
// time, and warp w knows of all that warp v did before seen[w][v]. A barrier hands on what its arrivals know, so barriers of
// part of a block are understood too. Nothing orders blocks: between blocks only two atomics may meet.
//
// Granules are as wide as the kernel's narrowest access. Two threads that write the same value are let pass within a block.
#include <algorithm>

#include "lanes.h"

namespace ptxsim {

constexpr u16 SEVERAL_THREADS = 0xffff;
constexpr u32 SEVERAL = 0xffffffff, IN_FLIGHT = 0xffffffff;

// Who is no warp but touches memory as if it were one: the wgmmas of each warpgroup, which read, and the bulk copies of each
// mbarrier, which write.
constexpr u32 WGMMA_AGENT = 24, BULK_AGENT = 32, AGENTS = 96;

static void knows(Block& b, u32 warp) {
    const auto& row = b.seen[warp];
    u32 low = row[0], high = row[0];
    const auto take = [&](u32 begin, size_t end) {
        for (u32 v = begin; v < end; v++) low = std::min(low, row[v]), high = std::max(high, row[v]);
    };
    take(1, b.warps.size());
    if (row.size() == AGENTS) take(WGMMA_AGENT, WGMMA_AGENT + b.warps.size() / 4);
    b.low[warp] = low, b.high[warp] = high;
}

void race_start_block(Block& b) {
    Launch& l = *b.launch;
    const u32 now = ++l.time, n = u32(b.warps.size());
    const bool agents = l.program->bulk || l.program->mbarriers;
    if (agents && n > WGMMA_AGENT) throw Fault{"race, of a kernel with mbarriers, looks at 24 warps at most"};
    b.seen.assign(n, std::vector<u32>(agents ? AGENTS : n, now));
    b.low.assign(n, now);
    b.high.assign(n, now);
    l.cells.assign(b.shared_bytes / l.program->shared_granule + 1, Touched{});
    l.read_times.assign(agents ? l.cells.size() * 32 : 0, 0);
}
void race_warp_sync(Warp& w) {
    Block& b = *w.block;
    b.seen[w.id][w.id] = ++w.launch->time;
    knows(b, w.id);
}
void race_arrive(Warp& w, Bar& bar) {
    Block& b = *w.block;
    b.seen[w.id][w.id] = ++w.launch->time;
    knows(b, w.id);
    bar.clock.resize(b.seen[w.id].size());
    for (size_t v = 0; v < bar.clock.size(); v++) bar.clock[v] = std::max(bar.clock[v], b.seen[w.id][v]);
}
void race_wait_over(Bar& bar, const std::vector<Warp*>& waited) {
    if (waited.empty()) return;
    const u32 now = ++waited[0]->launch->time;
    for (const Warp* w : waited) bar.clock[w->id] = now;  // they have done nothing since they arrived
    for (Warp* w : waited) {
        auto& row = w->block->seen[w->id];
        for (size_t v = 0; v < row.size(); v++) row[v] = std::max(row[v], bar.clock[v]);
        knows(*w->block, w->id);
    }
}

// What a granule's new access collides with.
struct Clash {
    enum Kind { NONE, WRITE, READ, COPY } kind;
    u32 thread, line;
};

// `times`: when each of the readers read. Without it all have the time of the last one, which is enough where block barriers
// alone order: these let all readers go on together.
static Clash touch(Warp& w, u32 me, s32 line, Touched& c, bool write, bool atomic, u32* times = nullptr) {
    const u32 as = me / 32;
    const Block& b = *w.block;
    const auto& seen = b.seen[w.id];
    Clash clash{Clash::NONE, 0, 0};
    if (c.wtime == IN_FLIGHT) {
        clash = {Clash::COPY, c.wthread, c.wline};
    } else if (c.wtime && c.wthread != me && c.wtime >= seen[c.wthread / 32] && !(atomic && c.atomic)) {
        clash = {Clash::WRITE, c.wthread, c.wline};
    }
    if (write) {
        if (c.rtime >= b.low[w.id] && c.rwarps && c.rthread != me) {
            for (u32 m = c.rwarps; m; m &= m - 1) {
                const u32 v = u32(__builtin_ctz(m));
                if ((times ? times[v] : c.rtime) >= seen[v]) clash = {Clash::READ, c.rthread, c.rline};
            }
        }
        c.rwarps = 0;
        c.rtime = 0;
        if (c.wtime != IN_FLIGHT) c.wtime = w.launch->time, c.wthread = u16(me), c.wline = u32(line), c.atomic = atomic;
        return clash;
    }
    u32 others = 0;
    if (c.rwarps && c.rtime >= b.low[w.id]) {
        others = c.rwarps;
        if (times || c.rtime < b.high[w.id])  // who is known to be done need not be remembered: who knows of me knows of them
            for (u32 m = c.rwarps; m; m &= m - 1) {
                const u32 v = u32(__builtin_ctz(m));
                if ((times ? times[v] : c.rtime) < seen[v]) others &= ~(1u << v);
            }
    }
    c.rthread = others == 0 || c.rthread == me ? u16(me) : SEVERAL_THREADS;
    c.rwarps = others | 1u << as;
    c.rtime = w.launch->time;
    if (times) times[as] = c.rtime;
    c.rline = u32(line);
    return clash;
}

static u32* read_times(Launch& l, u32 cell) { return l.read_times.empty() ? nullptr : &l.read_times[size_t(cell) * 32]; }

static std::string thread_name(const Launch& l, u32 t) {
    if (t == SEVERAL_THREADS) return "several threads";
    if (t >= BULK_AGENT * 32) return "a bulk copy";
    if (t >= l.threads && t >= WGMMA_AGENT * 32) return text("a wgmma of warpgroup %u", t / 32 - WGMMA_AGENT);
    return text("thread (%u,%u,%u)", t % l.block[0], t / l.block[0] % l.block[1], t / l.block[0] / l.block[1]);
}
static bool is_bulk(const Clash& clash) { return clash.thread != SEVERAL_THREADS && clash.thread >= BULK_AGENT * 32; }
static bool first_time(Launch& l, s32 line, u32 other) { return l.told.insert({line, s32(other)}).second; }

static void report(Warp& w, u32 lane, s32 line, const Clash& clash, bool write, const std::string& where) {
    Launch& l = *w.launch;
    if (!first_time(l, line, clash.line)) return;
    const std::string what = std::string(write ? "write" : "read");
    if (clash.kind == Clash::COPY)
        l.problem(text("%s of %s while a %s to it is under way: ", what.c_str(), where.c_str(),
                       is_bulk(clash) ? "bulk copy" : "cp.async") +
                  place(w, lane, line) + text("; copied by {line %u} and not waited for", clash.line));
    else
        l.problem(text("race: %s of %s, ", what.c_str(), where.c_str()) + place(w, lane, line) + ", after its " +
                  (clash.kind == Clash::READ ? "read" : "write") + " by " + thread_name(l, clash.thread) +
                  text(" at {line %u}, with no barrier between", clash.line));
}

void race_shared(Warp& w, u32 lane, s32 line, u32 offset, u32 bytes, bool write, const u8* value, bool atomic) {
    Launch& l = *w.launch;
    const u32 g = l.program->shared_granule, me = w.id * 32 + lane;
    for (u32 i = offset / g; i <= (offset + bytes - 1) / g; i++) {
        const Clash clash = touch(w, me, line, l.cells[i], write, atomic, read_times(l, i));
        if (clash.kind == Clash::NONE) continue;
        if (clash.kind == Clash::WRITE && write && value && bytes >= g &&
            memcmp(w.block->shared + i * g, value + (i * g - offset), g) == 0)
            continue;
        report(w, lane, line, clash, write, text("shared+%u", i * g));
    }
}

void race_copy_issued(Warp& w, u32 lane, s32 line, u32 offset, u32 bytes) {
    Launch& l = *w.launch;
    const u32 g = l.program->shared_granule;
    for (u32 i = offset / g; i <= (offset + bytes - 1) / g; i++) {
        Touched& c = l.cells[i];
        c.wtime = IN_FLIGHT, c.wthread = u16(w.id * 32 + lane), c.wline = u32(line), c.atomic = false;
    }
}
void race_copy_landed(Warp& w, u32 lane, s32 line, u32 offset, u32 bytes) {
    Launch& l = *w.launch;
    const u32 g = l.program->shared_granule, me = w.id * 32 + lane;
    for (u32 i = offset / g; i <= (offset + bytes - 1) / g; i++) {
        Touched& c = l.cells[i];
        if (c.wthread == me && c.wtime == IN_FLIGHT) c.wtime = 0;
        const Clash clash = touch(w, me, line, c, true, false, read_times(l, i));
        if (clash.kind != Clash::NONE) report(w, lane, line, clash, true, text("shared+%u", i * g));
    }
}

// ---- mbarriers, bulk copies, wgmma

void race_mbarrier_arrive(Warp& w, Mbar& m) {
    race_warp_sync(w);
    const auto& row = w.block->seen[w.id];
    m.clock.resize(row.size());
    for (size_t v = 0; v < row.size(); v++) m.clock[v] = std::max(m.clock[v], row[v]);
}
void race_mbarrier_wait(Warp& w, const Mbar& m) {
    auto& row = w.block->seen[w.id];
    for (size_t v = 0; v < m.done.size(); v++)
        if (v != w.id) row[v] = std::max(row[v], m.done[v]);
    knows(*w.block, w.id);
}

void race_bulk_issued(Block& b, const Bulk& c) {
    const u32 g = b.launch->program->shared_granule, agent = BULK_AGENT + b.mbars[c.mbar].agent;
    for (u32 i = c.to / g; i <= (c.to + c.bytes - 1) / g; i++) {
        Touched& t = b.launch->cells[i];
        t.wtime = IN_FLIGHT, t.wthread = u16(agent * 32), t.wline = u32(c.in->line), t.atomic = false;
    }
}
void race_bulk_landed(Block& b, const Bulk& c) {
    Launch& l = *b.launch;
    const auto found = b.mbars.find(c.mbar);
    if (found == b.mbars.end()) return;  // complete_bytes says so
    const u32 g = l.program->shared_granule, agent = BULK_AGENT + found->second.agent;
    for (u32 i = c.to / g; i <= (c.to + c.bytes - 1) / g; i++)
        if (l.cells[i].wtime == IN_FLIGHT && l.cells[i].wthread == agent * 32) l.cells[i].wtime = l.time;
    auto& clock = found->second.clock;
    clock.resize(AGENTS);
    clock[agent] = ++l.time;
}

void race_wgmma_read(Warp& w, s32 line, u32 offset) {
    Launch& l = *w.launch;
    const u32 g = l.program->shared_granule, agent = WGMMA_AGENT + w.id / 4;
    for (u32 i = offset / g; i <= (offset + 15) / g; i++) {
        const Clash clash = touch(w, agent * 32, line, l.cells[i], false, false, read_times(l, i));
        if (clash.kind != Clash::NONE) report(w, 0, line, clash, false, text("shared+%u", i * g));
    }
}
// Every one of the four warps must know of what its wgmma reads: nothing says that they begin together.
void race_wgmma_issued(Warp& w, s32 line, u32 offset) {
    Launch& l = *w.launch;
    const u32 g = l.program->shared_granule;
    for (u32 i = offset / g; i <= (offset + 15) / g; i++) {
        const Touched& c = l.cells[i];
        const bool coming = c.wtime == IN_FLIGHT;
        if (coming || (c.wtime && c.wthread != w.id * 32 && c.wtime >= w.block->seen[w.id][c.wthread / 32]))
            report(w, 0, line, {coming ? Clash::COPY : Clash::WRITE, c.wthread, c.wline}, false, text("shared+%u", i * g));
    }
}
u32 race_wgmma_over(Warp& w) { return ++w.launch->time; }
void race_wgmma_known(Warp& w, u32 time) {
    race_warp_sync(w);
    u32& known = w.block->seen[w.id][WGMMA_AGENT + w.id / 4];
    known = std::max(known, time);
    knows(*w.block, w.id);
}

void race_global(Warp& w, u32 lane, s32 line, Region& r, u64 address, u32 bytes, bool write, const u8* value, bool atomic) {
    if (!r.writable) return;
    Launch& l = *w.launch;
    const u64 g = l.program->global_granule, first = r.lo / g;
    if (r.cells.empty()) r.cells.resize((r.hi - 1) / g - first + 1);
    const u32 here = w.block->number + 1;
    for (u64 i = address / g; i <= (address + bytes - 1) / g; i++) {
        GlobalCell& c = r.cells[i - first];
        const bool after_write = c.wblock && c.wblock != here && !(atomic && c.atomic);
        const bool after_read = write && c.rblock && c.rblock != here;
        if ((after_write || after_read) && first_time(l, -line, after_write ? c.wline : c.rline)) {
            const u32 other = after_write ? c.wblock : c.rblock;
            std::string whose = "several blocks";
            if (other != SEVERAL) {
                const u32 n = other - 1;
                whose = text("block (%u,%u,%u)", n % l.grid[0], n / l.grid[0] % l.grid[1], n / l.grid[0] / l.grid[1]);
            }
            l.problem(text("race between blocks: %s of %s+%llu, ", write ? "write" : "read", r.name.c_str(),
                           (unsigned long long)(i * g - r.lo)) +
                      place(w, lane, line) + ", and its " + (after_write ? "write" : "read") + " by " + whose +
                      text(" at {line %u}", after_write ? c.wline : c.rline));
        }
        if (write) c.wblock = here, c.wline = u32(line), c.atomic = atomic;
        else c.rblock = c.rblock == 0 || c.rblock == here ? here : SEVERAL, c.rline = u32(line);
        if (c.inner != here) c.inner = here, c.in_block = Touched{};
        const Clash clash = touch(w, w.id * 32 + lane, line, c.in_block, write, atomic);
        if (clash.kind == Clash::NONE) continue;
        if (clash.kind == Clash::WRITE && write && value && bytes >= g &&
            memcmp(reinterpret_cast<const u8*>(i * g), value + (i * g - address), g) == 0)
            continue;
        report(w, lane, line, clash, write, text("%s+%llu", r.name.c_str(), (unsigned long long)(i * g - r.lo)));
    }
}

}  // namespace ptxsim
