// async.cpp: cp.async. Eager: a copy lands when it is issued. Lazy: at the last legal moment, the wait that names its group,
// so that a missing wait leaves what was there before (NaN at first).
#include <algorithm>

#include "lanes.h"

namespace ptxsim {

static void land(Warp& w, const Copy& c) {
    Inst in{};
    in.line = c.line;
    u8* to = shared_pointer(w, c.lane, in, c.to, c.size, true);
    wrote_shared(w, c.lane, in, c.to, c.size);
    if (c.valid) memcpy(to, reinterpret_cast<const u8*>(c.from), c.valid);
    memset(to + c.valid, 0, c.size - c.valid);
}

// x[0] shared address, x[1] global address, x[2] valid bytes or -1, x[3] predicate to ignore the source or -1;
// imm: size in the low byte, the shared offset above; target: the global offset
static void copy(Warp& w, const Inst& in) {
    const u32 size = u32(in.imm & 255);
    const s64 to_offset = in.imm >> 8;
    const bool race = w.launch->options.race, lazy = w.launch->options.lazy_async;
    each_lane(w.mask, [&](u32 i) {
        Copy c{i, 0, size, size, w.committed[i], 0, in.line};
        const u64 to = u64(in.x[0] < 0          ? 0
                           : in.mod & ADDRESS64 ? w.at<u64>(in.x[0])[i]
                                                : w.at<u32>(in.x[0])[i]) +
                       u64(to_offset);
        c.to = u32(to);
        c.from = (in.x[1] < 0 ? 0 : w.at<u64>(in.x[1])[i]) + u64(s64(in.target));
        if (in.x[2] >= 0) c.valid = std::min(size, w.at<u32>(in.x[2])[i]);
        if (in.x[3] >= 0 && w.pred(in.x[3]) >> i & 1) c.valid = 0;
        shared_pointer(w, i, in, to, size, true);
        if (c.from & (size - 1))
            fault(w, i, in,
                  text("misaligned cp.async of %u bytes from global address 0x%llx", size, (unsigned long long)c.from));
        if (c.valid) {  // what is not valid is not read and need not be there
            Region& source = region_of(w, i, in, c.from, c.valid, false);
            if (race) race_global(w, i, in.line, source, c.from, c.valid, false, nullptr);
        }
        if (race) {
            race_shared(w, i, in.line, c.to, size, true, nullptr);
            race_copy_issued(w, i, in.line, c.to, size);
        }
        if (!lazy) land(w, c);
        if (lazy || race) w.copies.push_back(c);
    });
}

static void settle(Warp& w, const Copy& c) {
    if (w.launch->options.race) race_copy_landed(w, c.lane, c.line, c.to, c.size);
    if (w.launch->options.lazy_async) land(w, c);
}

static void commit(Warp& w, const Inst&) {
    each_lane(w.mask, [&](u32 i) { w.committed[i]++; });
}
static void wait(Warp& w, u32 pending, bool all) {
    std::vector<Copy> later;
    for (const Copy& c : w.copies) {
        const bool mine = w.mask >> c.lane & 1;
        if (mine && (all || c.group + pending < w.committed[c.lane])) settle(w, c);
        else later.push_back(c);
    }
    w.copies.swap(later);
}
static void wait_group(Warp& w, const Inst& in) { wait(w, u32(in.imm), false); }
static void wait_all(Warp& w, const Inst&) { wait(w, 0, true); }

void start_block_copies(Warp& w) {
    w.copies.clear();
    std::fill(w.committed, w.committed + 32, 0u);
}

void add_async(Table& t) {
    t.add("cp.async", copy);
    t.add("cp.async.commit_group", commit);
    t.add("cp.async.wait_group", wait_group);
    t.add("cp.async.wait_all", wait_all);
}

}  // namespace ptxsim
