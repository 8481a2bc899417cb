// warp.cpp: fetch, divergence, collectives and barriers of one warp.
//
// Divergence: the group with the lowest program counter runs and joins others where it meets them (schedule 0), or the
// highest, or a random one. Where lanes must come together (.sync collectives, aligned barriers) a group waits for the rest.
#include "warp.h"

#include <algorithm>

#include "lanes.h"

namespace ptxsim {

static u32 guard_bits(Warp& w, const Inst& in) {
    if (in.guard < 0) return w.active;
    return w.active & (in.negate ? ~w.pred(in.guard) : w.pred(in.guard));
}

// ---- groups

void start_warp(Warp& w) {
    w.live = w.born;
    w.count = 1;
    w.current = 0;
    w.pc = 0;
    w.active = w.born;
    w.limit = ~0u;
    w.expired = false;
    w.groups[0] = Group{0, w.born, RUNNABLE, false, 0, 0, 0};
    start_block_copies(w);
    start_warp_wgmma(w);
    w.polled = NOT_POLLING;
}

bool runnable(const Warp& w) {
    for (u32 i = 0; i < w.count; i++)
        if (w.groups[i].state == RUNNABLE) return true;
    return false;
}

static void save(Warp& w) {
    if (w.current < w.count) w.groups[w.current].pc = w.pc, w.groups[w.current].mask = w.active;
}
static void drop(Warp& w, u32 i) {  // `current` must be set again after it
    w.groups[i] = w.groups[--w.count];
}

// Chooses the group that goes on; the present one has been saved. False: none can.
static bool choose(Warp& w, bool rotate = false) {
    for (u32 i = 0; i < w.count; i++)
        for (u32 j = i + 1; j < w.count;)
            if (w.groups[i].state == RUNNABLE && w.groups[j].state == RUNNABLE && w.groups[i].pc == w.groups[j].pc)
                w.groups[i].mask |= w.groups[j].mask, drop(w, j);
            else j++;
    const s32 sched = w.launch->options.sched;
    u32 best = ~0u, ready = 0;
    for (u32 i = 0; i < w.count; i++) {
        if (w.groups[i].state != RUNNABLE) continue;
        ready++;
        const bool better = best == ~0u || (sched == 2 || rotate ? w.launch->draw() % ready == 0
                                            : sched == 1         ? w.groups[i].pc > w.groups[best].pc
                                                                 : w.groups[i].pc < w.groups[best].pc);
        if (better) best = i;
    }
    w.current = best;
    if (best == ~0u) return false;
    w.pc = w.groups[best].pc;
    w.active = w.groups[best].mask;
    w.limit = ~0u;
    if (sched != 1)
        for (u32 i = 0; i < w.count; i++)
            if (i != best && w.groups[i].state == RUNNABLE && w.groups[i].pc > w.pc)
                w.limit = std::min(w.limit, w.groups[i].pc);
    return true;
}

// The current group has no lane left (or has become a waiting one).
static bool leave(Warp& w) {
    drop(w, w.current);
    w.current = ~0u;
    return choose(w);
}
static void add_group(Warp& w, const Group& g) { w.groups[w.count++] = g; }

// ---- barriers

static bool complete(const Block& b, const Bar& bar) {
    if (!bar.used) return false;
    return bar.expected == 0 ? bar.lanes >= b.live : bar.threads >= bar.expected;
}

static void release(Block& b, u32 id) {
    Bar& bar = b.bars[id];
    std::vector<Warp*> waited;
    for (Warp& w : b.warps) {
        bool here = false;
        for (u32 i = 0; i < w.count; i++) {
            Group& g = w.groups[i];
            if (g.state != AT_BARRIER || !g.counted || g.bar != id) continue;
            const Inst& in = w.program->code[g.pc];
            if (in.mod & 6) {  // bar.red: x[0] takes popc, and, or
                w.mask = g.mask;
                if (in.mod == 2) {
                    u32* d = w.at<u32>(in.x[0]);
                    each_lane(g.mask, [&](u32 l) { d[l] = bar.ones; });
                } else {
                    w.set_pred(in.x[0], (in.mod == 4 ? bar.all : bar.any) ? FULL : 0);
                }
            }
            g.state = RUNNABLE;
            g.pc++;
            here = true;
        }
        if (here) waited.push_back(&w);
    }
    if (b.launch->options.race) race_wait_over(bar, waited);
    bar.lanes = bar.threads = bar.expected = bar.ones = bar.any = 0;
    bar.all = 1;
    bar.used = false;
    bar.clock.clear();
}
static void check_barriers(Block& b) {
    for (u32 i = 0; i < 16; i++)
        if (complete(b, b.bars[i])) release(b, i);
}

// Counts what has fully arrived in this warp. An aligned barrier is there when all lanes that live are.
static void count_arrivals(Warp& w) {
    Block& b = *w.block;
    for (u32 i = 0; i < w.count; i++) {
        if (w.groups[i].state != AT_BARRIER || w.groups[i].counted) continue;
        for (u32 j = i + 1; j < w.count;)
            if (w.groups[j].state == AT_BARRIER && !w.groups[j].counted && w.groups[j].pc == w.groups[i].pc &&
                w.groups[j].bar == w.groups[i].bar)
                w.groups[i].mask |= w.groups[j].mask, drop(w, j);
            else j++;
        Group& g = w.groups[i];
        const Inst& in = w.program->code[g.pc];
        const bool aligned = in.imm & 1, arrive = in.mod & 1;
        if (aligned && g.mask != w.live) continue;
        Bar& bar = b.bars[g.bar];
        if (bar.used && bar.expected != g.expected)
            fault(
                w, u32(__builtin_ctz(g.mask)), in,
                text("barrier %u is used for %u threads here and for %u elsewhere (0: all)", g.bar, g.expected, bar.expected));
        bar.used = true;
        bar.expected = g.expected;
        bar.lanes += u32(__builtin_popcount(g.mask));
        bar.threads += aligned ? 32 : u32(__builtin_popcount(g.mask));
        if (in.mod & 6) {
            const u32 p = (in.mod & 8 ? ~w.pred(in.x[3]) : w.pred(in.x[3])) & g.mask;
            bar.ones += u32(__builtin_popcount(p));
            bar.all &= p == g.mask;
            bar.any |= p != 0;
        }
        if (b.launch->options.race) race_arrive(w, bar);
        if (arrive) g.state = RUNNABLE, g.pc++;
        else g.counted = true;
    }
}

// x[1] the barrier's number or -1 (then target), x[2] the count or -1 (then more; 0: all); imm bit 0: aligned; mod: 1 arrive,
// 2 red.popc, 4 red.and, 6 red.or, 8 its predicate negated
static bool barrier(Warp& w, const Inst& in, u32 mask) {
    if (mask) {
        const u32 lane = u32(__builtin_ctz(mask));
        const u32 id = in.x[1] >= 0 ? w.at<u32>(in.x[1])[lane] : u32(in.target);
        u32 expected = in.x[2] >= 0 ? w.at<u32>(in.x[2])[lane] : u32(in.more);
        if (id > 15) fault(w, lane, in, text("barrier number %u", id));
        if (expected % 32) fault(w, lane, in, text("a barrier for %u threads, not a multiple of 32", expected));
        const u32 everyone = (w.launch->threads + 31) / 32 * 32;
        if (expected >= everyone && !(in.mod & 1)) expected = expected > everyone ? expected : 0;
        if (expected > everyone)
            fault(w, lane, in, text("a barrier for %u threads in a block of %u", expected, w.launch->threads));
        if ((in.mod & 1) && expected == everyone) expected = 0;
        const u32 rest = w.active & ~mask;
        w.active = rest;
        const Group g{w.pc, mask, AT_BARRIER, false, id, expected, 0};
        if (rest) {
            w.pc++;
            save(w);
        } else {
            drop(w, w.current);
        }
        add_group(w, g);
        count_arrivals(w);
        check_barriers(*w.block);
        w.current = ~0u;
        return choose(w);
    }
    w.pc++;
    return true;
}

// ---- collectives: run when all lanes of the member mask that still live are there

static bool watched(const Warp& w, u32 pc) { return !w.program->touches.empty() && w.program->touches[pc] >= 0; }

static bool collective(Warp& w, const Inst& in, u32 mask) {
    if (!mask) {
        w.pc++;
        return true;
    }
    if (__builtin_expect(watched(w, w.pc), 0) && in.mod != OWN_RULES) w.mask = mask, watch(w, in, w.pc);
    const u32* members = in.x[5] >= 0 ? w.at<u32>(in.x[5]) : nullptr;
    if (mask == FULL && !members && u32(in.target) == FULL) {
        w.mask = mask;
        in.run(w, in);
        w.pc++;
        return true;
    }
    u32 done = w.active & ~mask;
    const u32 here = w.pc;
    for (u32 pending = mask; pending;) {
        const u32 v = members ? members[__builtin_ctz(pending)] : u32(in.target);
        u32 same = pending;
        if (members) each_lane(pending, [&](u32 i) { same = members[i] == v ? same : same & ~(1u << i); });
        if (same & ~v) fault(w, u32(__builtin_ctz(same & ~v)), in, text("a lane that is not in the member mask 0x%08x", v));
        u32 others = 0;
        for (u32 i = 0; i < w.count; i++) {
            const Group& g = w.groups[i];
            if (g.state == AT_COLLECTIVE && g.pc == here && g.member == v) others |= g.mask;
        }
        if (((same | others) & v & w.live) == (v & w.live)) {
            w.mask = same | others;
            in.run(w, in);
            done |= w.mask;
            if (others) {
                for (u32 i = 0; i < w.count;)
                    if (w.groups[i].state == AT_COLLECTIVE && w.groups[i].pc == here && w.groups[i].member == v) {
                        if (w.current == w.count - 1) w.current = i;
                        drop(w, i);
                    } else {
                        i++;
                    }
            }
        } else {
            add_group(w, Group{here, same, AT_COLLECTIVE, false, 0, 0, v});
        }
        pending &= ~same;
    }
    w.active = done;
    if (!done) return leave(w);
    w.pc++;
    return true;
}

// A lane has exited: what waited for it may go on.
static void recheck_collectives(Warp& w) {
    for (u32 i = 0; i < w.count; i++) {
        Group g = w.groups[i];
        if (g.state != AT_COLLECTIVE) continue;
        u32 all = 0;
        for (u32 j = 0; j < w.count; j++)
            if (w.groups[j].state == AT_COLLECTIVE && w.groups[j].pc == g.pc && w.groups[j].member == g.member)
                all |= w.groups[j].mask;
        if ((all & g.member & w.live) != (g.member & w.live)) continue;
        for (u32 j = i + 1; j < w.count;)
            if (w.groups[j].state == AT_COLLECTIVE && w.groups[j].pc == g.pc && w.groups[j].member == g.member) drop(w, j);
            else j++;
        const Inst& in = w.program->code[g.pc];
        w.mask = all;
        if (watched(w, g.pc) && in.mod != OWN_RULES) watch(w, in, g.pc);
        in.run(w, in);
        w.groups[i] = Group{g.pc + 1, all, RUNNABLE, false, 0, 0, 0};
    }
}

static bool leave_program(Warp& w, const Inst& in, u32 mask) {
    w.live &= ~mask;
    if (!w.live) end_warp_wgmma(w, in);
    w.block->live -= u32(__builtin_popcount(mask));
    w.active &= ~mask;
    w.pc++;
    if (w.active) save(w);
    else drop(w, w.current);
    w.current = ~0u;
    recheck_collectives(w);
    count_arrivals(w);
    check_barriers(*w.block);
    return choose(w);
}

// ---- branches

static bool branch(Warp& w, const Inst& in, u32 taken) {
    const u32 rest = w.active & ~taken;
    if (!rest) {
        w.pc = u32(in.target);
    } else if (taken) {
        w.pc++;
        w.active = rest;
        save(w);
        add_group(w, Group{u32(in.target), taken, RUNNABLE, false, 0, 0, 0});
        w.current = ~0u;
        return choose(w);
    } else {
        w.pc++;
        return true;
    }
    if (w.count > 1 && w.launch->options.sched != 1) {  // backwards or far forwards: others may be due now
        save(w);
        return choose(w);
    }
    return true;
}

static bool branch_table(Warp& w, const Inst& in, u32 mask) {  // x[1] the index, pool[more...] `imm` targets
    u32 rest = w.active & ~mask;
    const u32* index = w.at<u32>(in.x[1]);
    std::vector<Group> targets;
    each_lane(mask, [&](u32 i) {
        if (index[i] >= u64(in.imm)) fault(w, i, in, text("branch table of %lld with index %u", (long long)in.imm, index[i]));
        const u32 to = u32(w.program->pool[size_t(in.more) + index[i]]);
        for (Group& g : targets)
            if (g.pc == to) {
                g.mask |= 1u << i;
                return;
            }
        targets.push_back(Group{to, 1u << i, RUNNABLE, false, 0, 0, 0});
    });
    w.active = rest;
    if (rest) w.pc++, save(w);
    else drop(w, w.current);
    for (const Group& g : targets) add_group(w, g);
    w.current = ~0u;
    return choose(w);
}

// ---- waits for what is asynchronous

static bool mbarrier_wait(Warp& w, const Inst& in, u32 mask) {
    u32 at[32];
    const u32 over = mbarrier_over(w, in, mask, at);
    u32 late = mask & ~over;
    w.mask = mask;
    w.set_pred(in.x[0], over);
    const bool may_wait = in.mod & 8;
    if (late && (!may_wait || (w.launch->options.sched == 2 && w.launch->draw() % 4 == 0))) {  // not over yet
        w.pc++;
        save(w);
        w.expired = true;
        w.polled = 0;
        return false;
    }
    if (!late) {
        w.pc++;
        return true;
    }
    const u32 here = w.pc, rest = w.active & ~late;
    if (rest) {
        w.pc++;
        w.active = rest;
        save(w);
    } else {
        drop(w, w.current);
    }
    while (late) {  // they come back to this instruction when the phase is over
        const u32 mbar = at[__builtin_ctz(late)];
        u32 same = 0;
        each_lane(late, [&](u32 i) { same |= u32(at[i] == mbar) << i; });
        add_group(w, Group{here, same, AT_MBARRIER, false, mbar, 0, 0});
        late &= ~same;
    }
    w.current = ~0u;
    return choose(w);
}

static bool wgmma_wait(Warp& w, const Inst& in, u32 mask) {  // imm: how many groups may be left
    if (mask != FULL) fault(w, u32(__builtin_ctz(mask)), in, "wgmma.wait_group without all 32 lanes of the warp");
    const u32 groups = w.product_groups > u32(in.imm) ? w.product_groups - u32(in.imm) : 0;
    if (!w.products.empty() && !products_there(w, groups)) {
        drop(w, w.current);
        add_group(w, Group{w.pc, mask, AT_WGMMA, false, groups, 0, 0});
        w.current = ~0u;
        return choose(w);
    }
    finish_products(w, groups);
    w.pc++;
    return true;
}

static bool control(Warp& w, const Inst& in, u32 mask) {
    switch (in.control) {
        case WATCHED:
            if (mask) {
                w.mask = mask;
                watch(w, in, w.pc);
                in.run(w, in);
            }
            break;
        case MBARRIER_WAIT:
            if (mask) return mbarrier_wait(w, in, mask);
            break;
        case WGMMA_WAIT:
            if (mask) return wgmma_wait(w, in, mask);
            break;
        case BRANCH: return branch(w, in, mask);
        case COLLECTIVE: return collective(w, in, mask);
        case BARRIER: return barrier(w, in, mask);
        case BRANCH_TABLE: return branch_table(w, in, mask);
        case EXIT:
            if (mask) return leave_program(w, in, mask);
            break;
        case TRAP:
            if (mask) fault(w, u32(__builtin_ctz(mask)), in, "trap");
            break;
        default: break;
    }
    w.pc++;
    return true;
}

void run_warp(Warp& w, u64 steps) {
    w.current = ~0u;
    if (!choose(w, w.expired)) return;
    w.expired = false;
    const Inst* code = w.program->code.data();
    u64* executed = w.launch->program->executed.data();
    u64* lanes = w.launch->program->lanes.data();
    for (u64 left = steps; left; left--) {
        if (__builtin_expect(w.pc >= w.limit, 0)) {
            save(w);
            choose(w);
        }
        const u32 pc = w.pc;
        const Inst& in = code[pc];
        const u32 mask = guard_bits(w, in);
        executed[pc]++;
        lanes[pc] += u32(__builtin_popcount(mask));
        if (in.control == PLAIN) {
            if (mask) {
                w.mask = mask;
                in.run(w, in);
            }
            w.pc = pc + 1;
        } else if (!control(w, in, mask)) {
            w.launch->steps += steps - left + 1;
            w.polled += steps - left + 1;
            return;
        }
    }
    w.launch->steps += steps;
    w.polled += steps;
    save(w);
    w.expired = true;  // lanes that spin must not keep the others from their turn
}

std::string waiting(const Warp& w) {
    std::string s;
    for (u32 i = 0; i < w.count; i++) {
        const Group& g = w.groups[i];
        const char* why = g.state == AT_BARRIER
                              ? (g.counted ? "waits at barrier" : "waits at an aligned barrier for other lanes of its warp")
                          : g.state == AT_MBARRIER ? "waits for an mbarrier"
                          : g.state == AT_WGMMA    ? "waits for the other warps of its warpgroup to commit their wgmmas"
                          : g.state == RUNNABLE    ? "polls"
                                                   : "waits at a collective for lanes";
        s += text("\n  warp %u, lanes 0x%08x: ", w.id, g.mask) + why;
        if (g.state == AT_BARRIER) s += text(" %u", g.bar);
        else if (g.state == AT_MBARRIER) s += waits_for(*w.block, g.bar);
        else if (g.state == AT_WGMMA || g.state == RUNNABLE) s += "";
        else s += text(" 0x%08x", g.member & w.live & ~g.mask);
        s += text(", {line %d}", w.program->code[g.pc].line);
    }
    return s;
}

}  // namespace ptxsim
