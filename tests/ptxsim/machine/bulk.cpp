// bulk.cpp: cp.async.bulk.tensor from global to shared memory: boxes of a tensor, zeros where it ends, swizzled, and reported
// to an mbarrier. Eager: a copy lands when it is issued. Lazy: when no warp can go on without it.
#include <algorithm>

#include "lanes.h"

namespace ptxsim {

static const char* const SWIZZLES[] = {"no swizzle", "a swizzle of 32 bytes", "a swizzle of 64 bytes",
                                       "a swizzle of 128 bytes"};

static TensorMap map_at(Warp& w, u32 lane, const Inst& in, u64 a) {
    TensorMap m;
    for (u32 half = 0; half < 2; half++)
        memcpy(reinterpret_cast<u8*>(&m) + 64 * half, any_pointer(w, lane, in, a + 64 * half, 64, false), 64);
    if (m.magic != TensorMap::MAGIC) fault(w, lane, in, "no tensor map: nobody has encoded one there");
    return m;
}

// Calls f(row of the box, address of its first element in the tensor, first and last + 1 of its elements that are in it) for
// every row of the box.
template <class F>
static void rows_of(const Bulk& c, F f) {
    const TensorMap& m = c.map;
    u32 rows = 1, at[5] = {};
    for (u32 d = 1; d < m.rank; d++) rows *= m.box[d];
    const s64 first = c.at[0], wide = s64(m.last[0]) + 1;
    const s64 lo = std::clamp<s64>(-first, 0, m.box[0]), hi = std::clamp<s64>(wide - first, lo, m.box[0]);
    for (u32 row = 0; row < rows; row++) {
        u64 address = m.address + u64(first * m.element_bytes);
        bool inside = true;
        for (u32 d = 1; d < m.rank; d++) {
            const s64 x = s64(c.at[d]) + at[d];
            inside &= x >= 0 && x <= s64(m.last[d]);
            address += u64(x) * m.strides[d - 1];
        }
        f(row, address, u32(lo), u32(inside ? hi : lo));
        for (u32 d = 1; d < m.rank && ++at[d] == m.box[d]; d++) at[d] = 0;
    }
}

static void land(Block& b, const Bulk& c) {
    const u32 pitch = u32(c.map.box[0]) * c.map.element_bytes, bits = c.map.swizzle;
    std::vector<u8> line(pitch);
    rows_of(c, [&](u32 row, u64 address, u32 lo, u32 hi) {
        std::fill(line.begin(), line.end(), u8(0));
        const u32 e = c.map.element_bytes;
        if (hi > lo) memcpy(line.data() + lo * e, reinterpret_cast<const u8*>(address + lo * e), (hi - lo) * e);
        for (u32 i = 0; i < pitch; i += 16) {
            u32 to = c.to + row * pitch + i;
            to ^= (to >> 7 & ((1u << bits) - 1)) << 4;  // pieces of 16 bytes change places, by the address alone
            memcpy(b.shared + to, line.data() + i, 16);
        }
    });
    if (b.launch->options.race) race_bulk_landed(b, c);
    complete_bytes(b, c.mbar, c.bytes);
}

void land_bulk(Block& b, size_t which) {
    const Bulk c = b.copies[which];
    b.copies.erase(b.copies.begin() + long(which));
    land(b, c);
}

// x[0] shared address, x[1] the map's, x[2] the mbarrier's, x[3..5] and the pool: coordinates; imm, target: offsets of the
// shared address and the mbarrier's; mod: ADDRESS64 of the first, 4 of the third, 16.. the rank
static void copy(Warp& w, const Inst& in) {
    Block& b = *w.block;
    each_lane(w.mask, [&](u32 i) {
        const auto shared = [&](s32 x, s64 offset, bool wide) {
            const u64 a = u64(offset) + (x < 0 ? 0 : wide ? w.at<u64>(x)[i] : w.at<u32>(x)[i]);
            return a >> 60 == SHARED_WINDOW >> 60 ? a - SHARED_WINDOW : a;
        };
        Bulk c{w.id, i, 0, 0, 0, {}, map_at(w, i, in, w.at<u64>(in.x[1])[i]), &in};
        const TensorMap& m = c.map;
        const u32 rank = in.mod >> 4;
        if (rank != m.rank) fault(w, i, in, text("a copy of %u dimensions with a tensor map of %u", rank, m.rank));
        const s32* more = rank > 3 ? &w.program->pool[size_t(in.more)] : nullptr;
        for (u32 d = 0; d < rank; d++) c.at[d] = w.at<s32>(d < 3 ? in.x[3 + d] : more[d - 3])[i];
        const u32 pitch = u32(m.box[0]) * m.element_bytes;
        c.bytes = pitch;
        for (u32 d = 1; d < rank; d++) c.bytes *= m.box[d];
        const u64 to = shared(in.x[0], in.imm, in.mod & ADDRESS64), mbar = shared(in.x[2], in.target, in.mod & 4);
        if (to % 128) fault(w, i, in, text("a bulk copy to shared+%llu, not a multiple of 128", (unsigned long long)to));
        if (to + c.bytes > b.shared_bytes)
            fault(w, i, in,
                  text("out-of-bounds bulk copy of %u bytes to shared+%llu of a block with %u bytes", c.bytes,
                       (unsigned long long)to, b.shared_bytes));
        if (m.swizzle && pitch != 16u << m.swizzle)
            fault(w, i, in, text("rows of %u bytes with %s: what lies between them is not known", pitch, SWIZZLES[m.swizzle]));
        c.to = u32(to), c.mbar = u32(mbar);
        Mbar& bar = mbar_at(w, i, in, mbar);
        if (!bar.fenced)
            fault(w, i, in,
                  text("a bulk copy reports to the mbarrier at shared+%u, which was initialised without a fence: "
                       "fence.mbarrier_init or fence.proxy.async, by the thread that did it",
                       c.mbar));
        for (u32 at = c.to / 16; at < (c.to + c.bytes) / 16; at++) {
            const u64 tag = b.generic[at];
            const Warp& writer = b.warps[(tag & 0xffff) / 32];
            if (tag && writer.fenced[tag & 31] <= tag >> 16 && w.fenced[i] <= tag >> 16)
                fault(w, i, in,
                      text("a bulk copy over shared+%u, which thread %u has written, with no fence.proxy.async between",
                           at * 16, u32(tag & 0xffff)));
            b.generic[at] = 0;
        }
        rows_of(c, [&](u32, u64 address, u32 lo, u32 hi) {
            if (hi == lo) return;
            const u32 e = m.element_bytes, bytes = (hi - lo) * e;
            Region& source = region_of(w, i, in, address + lo * e, bytes, false);
            if (w.launch->options.race) race_global(w, i, in.line, source, address + lo * e, bytes, false, nullptr);
        });
        if (w.launch->options.race) {
            race_shared(w, i, in.line, c.mbar, 8, true, nullptr, true);
            race_shared(w, i, in.line, c.to, c.bytes, true, nullptr);
            race_bulk_issued(b, c);
        }
        if (w.launch->options.lazy_async) b.copies.push_back(c);
        else land(b, c);
    });
}

void start_block_bulk(Block& b) {
    const Program& p = *b.launch->program;
    b.mbars.clear();
    b.copies.clear();
    b.proxy_time = 1;
    b.generic.assign(p.bulk ? b.shared_bytes / 16 + 1 : 0, 0);
    b.products.assign(p.watched ? b.warps.size() / 4 : 0, {});
}
void end_block_bulk(Block& b) {
    if (!b.copies.empty())
        throw Fault{text("the block has ended before a bulk copy to shared+%u has landed, {line %d}", b.copies[0].to,
                         b.copies[0].in->line)};
}

void add_bulk(Table& t) { t.add("bulk.tensor", copy); }

}  // namespace ptxsim
