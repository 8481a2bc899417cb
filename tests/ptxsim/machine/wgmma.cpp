// wgmma.cpp: the products of a warpgroup, four neighbouring warps with 16 of the 64 rows each.
//
// A product runs when the first of the four warps waits for its group, for all four of them; what it reads must be then what it
// was at the issue. So a stage that comes too late, or goes too early, is seen whatever the schedule. Matrices in shared memory
// lie as the PTX ISA's canonical layouts say.
#include <algorithm>

#include "lanes.h"
#include "matrix.h"
#include "rounding.h"

namespace ptxsim {

// imm: columns | what << 16
enum What : u32 { A_TRANSPOSED = 1, B_TRANSPOSED = 2, BF16_ = 4, A_NEGATED = 8, B_NEGATED = 16, A_IN_REGISTERS = 32, ADD = 64 };

static u32 columns(const Inst& in) { return u32(in.imm & 0xffff); }
static u32 what(const Inst& in) { return u32(in.imm >> 16); }

// ---- matrix descriptors

struct Matrix {
    u32 start, leading, stride, base, bits;  // bits: how many address bits the swizzle changes
    explicit Matrix(u64 d)
        : start(u32(d & 0x3fff) << 4),
          leading(u32(d >> 16 & 0x3fff) << 4),
          stride(u32(d >> 32 & 0x3fff) << 4),
          base(u32(d >> 49 & 7)),
          bits((4 - u32(d >> 62)) & 3) {}
    // Eight neighbours: with `transposed` rows (of a; columns of b) 8 i to 8 i + 7 of one k, else k = 8 i to 8 i + 7 of one
    // row.
    u32 eight(u32 i, u32 other, bool transposed) const {
        u32 at = start;
        if (!transposed) at += other % 8 * (16u << bits) + other / 8 * stride + i * (bits ? 16 : leading);
        else if (bits == 0) at += i * stride + other % 8 * 16 + other / 8 * leading;
        else at += i % (1u << bits) * 16 + (i >> bits) * leading + other % 8 * (16u << bits) + other / 8 * stride;
        at &= 0x3ffff;
        return at ^ (((at >> 7) - base) & ((1u << bits) - 1)) << 4;
    }
};
static const u64 UNUSED_BITS = 0x3ff1c000c000c000ull;

// Calls f(address, row or column, k, step of the row or column, step of k) for all pieces of eight of a matrix of k = 16.
template <class F>
static void pieces(const Matrix& m, u32 size, bool transposed, F f) {
    if (transposed)
        for (u32 k = 0; k < 16; k++)
            for (u32 i = 0; i < size / 8; i++) f(m.eight(i, k, true), 8 * i, k, 1u, 0u);
    else
        for (u32 row = 0; row < size; row++)
            for (u32 i = 0; i < 2; i++) f(m.eight(i, row, false), row, 8 * i, 0u, 1u);
}

// At the issue: the descriptor and the place are right, and what ld and st wrote there has been fenced. Keeps what it found.
static void look_at(Warp& w, const Inst& in, const char* name, u64 d, u32 size, bool transposed, std::vector<u8>& bytes) {
    Block& b = *w.block;
    const auto descriptor = [&] { return text("the descriptor 0x%llx of %s: ", (unsigned long long)d, name); };
    if (d & UNUSED_BITS) fault(w, 0, in, descriptor() + "a bit is set that means nothing");
    const Matrix m(d);
    if (m.bits == 0 && m.base) fault(w, 0, in, descriptor() + "a base offset without a swizzle");
    const u64 fenced_here = *std::min_element(w.fenced, w.fenced + 32);
    pieces(m, size, transposed, [&](u32 at, u32, u32, u32, u32) {
        if (at + 16 > b.shared_bytes)
            fault(w, 0, in,
                  text("out-of-bounds matrix %s: shared address %u of a block with %u bytes", name, at, b.shared_bytes));
        bytes.insert(bytes.end(), b.shared + at, b.shared + at + 16);
        const u64 tag = b.generic[at / 16], time = tag >> 16;
        if (tag && b.warps[(tag & 0xffff) / 32].fenced[tag & 31] <= time && fenced_here <= time)
            fault(w, 0, in,
                  text("wgmma reads shared+%u, which thread %u has written, with no fence.proxy.async between", at,
                       u32(tag & 0xffff)));
    });
}
// At the wait, to[row][16]; `bytes`: as they were at the issue, and must still be.
static void read_matrix(Warp& w, const Inst& in, u64 d, u32 size, bool transposed, bool negated, const u8*& bytes, float* to) {
    const bool bf16 = what(in) & BF16_;
    pieces(Matrix(d), size, transposed, [&](u32 at, u32 row, u32 k, u32 step_row, u32 step_k) {
        u16 v[8];
        memcpy(v, w.block->shared + at, 16);
        if (memcmp(v, bytes, 16) != 0)
            fault(
                w, 0, in,
                text(
                    "shared+%u has changed while a wgmma was to read it: written too early, before a wait for the wgmma, or too "
                    "late, and the wgmma did not wait for it",
                    at));
        bytes += 16;
        for (u32 e = 0; e < 8; e++) {
            const float x = bf16 ? from_bf16(v[e]) : from_half(v[e]);
            to[(row + e * step_row) * 16 + k + e * step_k] = negated ? -x : x;
        }
        if (w.launch->options.race) race_wgmma_read(w, in.line, at);
    });
}

// ---- the rules for registers

static const s32* touched(const Warp& w, u32 pc) { return &w.program->pool[size_t(w.program->touches[pc])]; }

void watch(Warp& w, const Inst& in, u32 pc) {
    const s32* t = touched(w, pc);
    for (s32 i = 1; i <= t[0]; i++) {
        u8& use = w.uses[size_t(t[i] >> 1)];
        const bool written = t[i] & 1;
        if (use & SUM_IN_FLIGHT || (written && use & OPERAND_IN_FLIGHT))
            fault(w, u32(__builtin_ctz(w.mask)), in,
                  text("%s of a register that a wgmma in flight %s: no wgmma.wait_group has covered it",
                       written ? "write" : "read", use & SUM_IN_FLIGHT ? "adds to" : "reads"));
        if (written) use |= UNFENCED;
    }
}
static void mark_in_flight(Warp& w) {
    for (u8& use : w.uses) use &= UNFENCED;
    for (const Product& p : w.products) {
        const s32* t = touched(w, u32(p.in - w.program->code.data()));
        for (s32 i = 1; i <= t[0]; i++)
            w.uses[size_t(t[i] >> 1)] |= u32(i) <= columns(*p.in) / 2 ? SUM_IN_FLIGHT : OPERAND_IN_FLIGHT;
    }
}

// ---- issue

static u64 uniform(Warp& w, const Inst& in, s32 x, const char* name) {
    const u64* v = w.at<u64>(x);
    for (u32 i = 1; i < 32; i++)
        if (v[i] != v[0]) fault(w, i, in, text("the descriptor of %s differs between the lanes of a warp", name));
    return v[0];
}

// x[0] descriptor of a or -1, x[1] of b, x[2] predicate: add to the sums (or ADD); the touches: sums, then a's registers
static void issue(Warp& w, const Inst& in) {
    Block& b = *w.block;
    const u32 group = w.id / 4;
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "wgmma without all 32 lanes of the warp");
    if (group >= b.products.size()) fault(w, 0, in, "wgmma in a warp whose warpgroup has not four warps");
    const bool in_registers = what(in) & A_IN_REGISTERS;
    Product p{&in,
              in_registers ? 0 : uniform(w, in, in.x[0], "a"),
              uniform(w, in, in.x[1], "b"),
              w.product_count++,
              w.product_groups,
              0,
              bool(what(in) & ADD),
              false,
              {}};
    if (in.x[2] >= 0) {
        const u32 add = w.pred(in.x[2]);
        if (add != 0 && add != FULL) fault(w, 0, in, "scale-d differs between the lanes of a warp");
        p.add = add != 0;
    }
    auto& issued = b.products[group];
    if (p.number == issued.size()) {
        issued.push_back(p);
        auto& bytes = issued.back().bytes;
        if (!in_registers) look_at(w, in, "a", p.a, 64, what(in) & A_TRANSPOSED, bytes);
        look_at(w, in, "b", p.b, columns(in), what(in) & B_TRANSPOSED, bytes);
    } else if (!(issued[p.number] == p)) {
        fault(w, 0, in,
              text("the warps of a warpgroup issue different wgmmas: another one's wgmma %llu is at {line %d}, or has other "
                   "descriptors, scale-d or groups",
                   (unsigned long long)p.number, issued[p.number].in->line));
    }
    if (w.launch->options.race) {
        const auto check = [&](u32 at, u32, u32, u32, u32) { race_wgmma_issued(w, in.line, at); };
        if (!in_registers) pieces(Matrix(p.a), 64, what(in) & A_TRANSPOSED, check);
        pieces(Matrix(p.b), columns(in), what(in) & B_TRANSPOSED, check);
    }
    const s32* t = touched(w, u32(&in - w.program->code.data()));
    for (s32 i = 1; i <= t[0]; i++) {
        const u8 use = w.uses[size_t(t[i] >> 1)];
        const bool sum = u32(i) <= columns(in) / 2;
        if (use & UNFENCED)
            fault(w, 0, in, "wgmma with a register that was written after the last wgmma.fence (or before the first)");
        if (sum ? use & OPERAND_IN_FLIGHT : use & SUM_IN_FLIGHT)
            fault(w, 0, in, "wgmma with a register that another wgmma in flight uses otherwise");
    }
    w.products.push_back(p);
    mark_in_flight(w);
}

static void fence(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "wgmma.fence without all 32 lanes of the warp");
    for (u8& use : w.uses) use &= u8(~UNFENCED);
}
static void gather(Warp&, const Inst&) {}  // the lanes of a warp before wait_group
static void commit(Warp& w, const Inst& in) {
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "wgmma.commit_group without all 32 lanes of the warp");
    w.product_groups++;
    for (u32 i = w.id / 4 * 4; i < std::min(u32(w.block->warps.size()), w.id / 4 * 4 + 4); i++) {
        Warp& other = w.block->warps[i];
        for (u32 k = 0; k < other.count; k++)
            if (other.groups[k].state == AT_WGMMA) other.groups[k].state = RUNNABLE;
    }
}

// ---- execution

static void multiply(Warp& w, const Inst& in, const Product& p, const float* shared_a, const float* b) {
    const s32* reg = &w.program->pool[size_t(in.more)];
    const u32 n = columns(in);
    float a[16 * 16];
    if (what(in) & A_IN_REGISTERS) {
        for (u32 r = 0; r < 4; r++) {
            const u32* v = w.at<u32>(reg[n / 2 + r]);
            for (u32 lane = 0; lane < 32; lane++)
                for (u32 e = 0; e < 2; e++) {
                    const u32 h = v[lane] >> 16 * e & 0xffff;
                    const float x = what(in) & BF16_ ? from_bf16(h) : from_half(h);
                    a[(lane / 4 + r % 2 * 8) * 16 + lane % 4 * 2 + r / 2 * 8 + e] = what(in) & A_NEGATED ? -x : x;
                }
        }
        shared_a = a;
    } else {
        shared_a += w.id % 4 * 16 * 16;
    }
    const int mode = w.launch->options.mma, least = what(in) & BF16_ ? -126 : -14;
    for (u32 i = 0; i < n / 2; i++) {
        float* d = w.at<float>(reg[i]);
        for (u32 lane = 0; lane < 32; lane++) {
            const u32 row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            // Without scale-d there is no sum before: the sign of a zero is then the products'. Some GPU may do either.
            d[lane] = accumulate(mode, p.add ? d[lane] : -0.0f, shared_a + row * 16, b + column * 16, 16, 16, least);
        }
    }
}

bool products_there(Warp& w, u32 groups) {
    for (u32 i = w.id / 4 * 4; i < w.id / 4 * 4 + 4; i++)
        if (w.block->warps[i].product_groups < groups) return false;
    return true;
}

void finish_products(Warp& w, u32 groups) {
    std::vector<float> a(64 * 16), b(256 * 16);
    bool read = false;
    for (size_t k = 0; k < w.products.size(); k++) {
        const Product p = w.products[k];
        if (p.group >= groups || p.done) continue;
        const Inst& in = *p.in;
        read = true;
        auto& bytes = w.block->products[w.id / 4][p.number].bytes;
        const u8* at = bytes.data();
        if (!(what(in) & A_IN_REGISTERS))
            read_matrix(w, in, p.a, 64, what(in) & A_TRANSPOSED, what(in) & A_NEGATED, at, a.data());
        read_matrix(w, in, p.b, columns(in), what(in) & B_TRANSPOSED, what(in) & B_NEGATED, at, b.data());
        std::vector<u8>().swap(bytes);
        for (u32 i = w.id / 4 * 4; i < w.id / 4 * 4 + 4; i++)
            for (Product& q : w.block->warps[i].products)
                if (q.number == p.number) multiply(w.block->warps[i], in, q, a.data(), b.data()), q.done = true;
    }
    if (read && w.launch->options.race) {
        const u32 time = race_wgmma_over(w);
        for (u32 i = w.id / 4 * 4; i < w.id / 4 * 4 + 4; i++)
            for (Product& q : w.block->warps[i].products)
                if (q.done && q.time == 0) q.time = time;
    }
    for (const Product& p : w.products)
        if (p.group < groups && w.launch->options.race) race_wgmma_known(w, p.time);
    w.products.erase(std::remove_if(w.products.begin(), w.products.end(), [&](const Product& p) { return p.group < groups; }),
                     w.products.end());
    mark_in_flight(w);
}

void start_warp_wgmma(Warp& w) {
    w.uses.assign(w.program->watched, UNFENCED);
    w.products.clear();
    w.product_count = w.product_groups = w.registers = 0;
    std::fill(w.fenced, w.fenced + 32, 0);
}
void end_warp_wgmma(Warp& w, const Inst& in) {
    if (!w.products.empty())
        fault(w, 0, in, text("the warp ends before it has waited for its wgmma at {line %d}", w.products[0].in->line));
}

// ---- setmaxnreg: imm the registers a thread; mod 1: inc

static void set_registers(Warp& w, const Inst& in) {
    const u32 n = u32(in.imm), threads = (w.launch->threads + 31) / 32 * 32;
    if (w.mask != FULL) fault(w, u32(__builtin_ctz(w.mask)), in, "setmaxnreg without all 32 lanes of the warp");
    const u32 most = std::min(65536 / threads, 255u) / 8 * 8;  // that a kernel of so many threads can start with
    if (!(in.mod & 1) && n > most)
        fault(w, 0, in, text("setmaxnreg.dec to %u registers: a block of %u threads starts with %u at most", n, threads, most));
    w.registers = n;
    u32 sum = 0;
    for (const Warp& other : w.block->warps) sum += 32 * (other.registers ? other.registers : 24);
    if (sum > 65536) fault(w, 0, in, text("setmaxnreg: the block's warps want %u registers, an SM has 65536", sum));
}

void add_wgmma(Table& t) {
    t.add("wgmma", issue);
    t.add("wgmma.fence", fence);
    t.add("wgmma.gather", gather);
    t.add("wgmma.commit_group", commit);
    t.add("setmaxnreg", set_registers);
}

}  // namespace ptxsim
