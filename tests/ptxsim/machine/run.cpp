// run.cpp: a launch: blocks one after another, a block's warps in turns, and the C interface that program.py calls.
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <chrono>

#include "lanes.h"
#include "warp.h"

namespace ptxsim {

static const Table& table() {
    static const Table t = [] {
        Table t;
        add_integer(t), add_logic(t), add_float(t), add_double(t), add_half(t), add_convert(t), add_compare(t), add_move(t);
        add_memory(t), add_atomic(t), add_collective(t), add_async(t), add_matrix(t);
        add_mbarrier(t), add_bulk(t), add_wgmma(t);
        t.add("control", nullptr);
        return t;
    }();
    return t;
}

// ---- special registers: what a cell of them holds

static const char* const SPECIALS[] = {
    "%tid.x",   "%tid.y",       "%tid.z",       "%ntid.x",      "%ntid.y",      "%ntid.z",      "%ctaid.x",
    "%ctaid.y", "%ctaid.z",     "%nctaid.x",    "%nctaid.y",    "%nctaid.z",    "%laneid",      "%warpid",
    "%nwarpid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge", "%dynamic_smem_size",
};

static u32 special(const Launch& l, const Block& b, const Warp& w, u32 lane, u32 kind, u32 dynamic) {
    const u32 t = w.id * 32 + lane;
    switch (kind) {
        case 0: return t % l.block[0];
        case 1: return t / l.block[0] % l.block[1];
        case 2: return t / l.block[0] / l.block[1];
        case 3:
        case 4:
        case 5: return l.block[kind - 3];
        case 6:
        case 7:
        case 8: return b.ctaid[kind - 6];
        case 9:
        case 10:
        case 11: return l.grid[kind - 9];
        case 12: return lane;
        case 13: return w.id;
        case 14: return (l.threads + 31) / 32;
        case 15: return 1u << lane;
        case 16: return (1u << lane) - 1;
        case 17: return u32((2ull << lane) - 1);
        case 18: return ~u32((2ull << lane) - 1);
        case 19: return ~((1u << lane) - 1);
        default: return dynamic;
    }
}

// To nearest, subnormals kept, no traps, whatever the process has set (torch.set_flush_denormal does).
struct PlainArithmetic {
#ifdef __SSE__
    const u32 before = _mm_getcsr();
    PlainArithmetic() { _mm_setcsr(0x1f80); }
    ~PlainArithmetic() { _mm_setcsr(before); }
#endif
};

// ---- a block

static void poison(u8* p, size_t bytes, u32 value) {
    for (size_t i = 0; i + 4 <= bytes; i += 4) memcpy(p + i, &value, 4);
}

static void start_block(Block& b, u32 number, u32 dynamic) {
    Launch& l = *b.launch;
    b.number = number;
    b.ctaid[0] = number % l.grid[0];
    b.ctaid[1] = number / l.grid[0] % l.grid[1];
    b.ctaid[2] = number / l.grid[0] / l.grid[1];
    b.live = l.threads;
    poison(b.shared, b.shared_bytes, 0x7fc0dead);  // what nobody has written reads as NaN
    poison(b.warps[0].local, size_t(l.program->local_bytes) * 32 * b.warps.size(), 0x7fc0d0d0);
    for (Bar& bar : b.bars) bar = Bar{0, 0, 0, 0, 1, 0, false, {}};
    start_block_bulk(b);
    for (Warp& w : b.warps) {
        start_warp(w);
        for (const Program::Special& s : l.program->specials)
            for (u32 i = 0; i < 32; i++) w.at<u32>(s32(s.at))[i] = special(l, b, w, i, s.kind, dynamic);
    }
    if (l.options.race) race_start_block(b);
}

constexpr u32 IDLE_ROUNDS = 1000;  // after which nobody will do more than ask mbarriers in vain

static void run_block(Block& b) {
    Launch& l = *b.launch;
    const u32 n = u32(b.warps.size());
    std::vector<u32> order(n);
    for (u32 i = 0; i < n; i++) order[i] = l.options.sched == 1 ? n - 1 - i : i;
    b.idle = 0;
    while (b.live) {
        bool any = false;
        if (l.options.sched == 2)
            for (u32 i = n - 1; i > 0; i--) std::swap(order[i], order[l.draw() % (i + 1)]);
        for (u32 i : order) {
            if (!runnable(b.warps[i])) continue;
            run_warp(b.warps[i], l.options.sched == 2 ? 1 + l.draw() % 64 : 100000);
            any |= b.warps[i].polled >= NOT_POLLING;
        }
        b.idle = any ? 0 : b.idle + 1;
        if (!any && !b.copies.empty()) {  // the last legal moment
            const u64 n = b.copies.size();
            land_bulk(b, l.options.sched == 0 ? 0 : l.options.sched == 1 ? n - 1 : l.draw() % n);
            continue;
        }
        if (l.steps > l.options.max_steps)
            throw Fault{text("more than %llu warp instructions: an endless loop?", (unsigned long long)l.options.max_steps)};
        if (b.idle > IDLE_ROUNDS || (!any && b.live && std::none_of(b.warps.begin(), b.warps.end(), runnable))) {
            std::string who;
            u32 shown = 0;
            for (const Warp& w : b.warps)
                if (w.live && shown++ < 8) who += waiting(w);
            throw Fault{text("deadlock in block (%u,%u,%u):", b.ctaid[0], b.ctaid[1], b.ctaid[2]) + who};
        }
    }
    end_block_bulk(b);
}

static void run_launch(Launch& l, u32 dynamic) {
    const Program& p = *l.program;
    const u32 warps = (l.threads + 31) / 32;
    const size_t file = (size_t(p.file_bytes) + 63) / 64 * 64;
    const u32 shared_bytes = p.static_shared + dynamic;
    std::vector<u8> memory(file * warps + 64), shared((shared_bytes + 3) / 4 * 4 + 64),
        local(size_t(p.local_bytes) * warps * 32 + 64);
    const auto align = [](u8* x) { return x + (64 - reinterpret_cast<u64>(x) % 64) % 64; };
    u8* base = align(memory.data());
    poison(base, file * warps, 0x7fc0beef);
    Block b{};
    b.launch = &l;
    b.shared = align(shared.data());
    b.shared_bytes = (shared_bytes + 3) / 4 * 4;
    b.warps.resize(warps);
    for (u32 i = 0; i < warps; i++) {
        Warp& w = b.warps[i];
        w.file = base + file * i;
        w.program = l.program;
        w.block = &b;
        w.launch = &l;
        w.local = local.data() + size_t(p.local_bytes) * 32 * i;
        w.id = i;
        const u32 lanes = std::min(32u, l.threads - 32 * i);
        w.born = lanes == 32 ? FULL : (1u << lanes) - 1;
        for (const Program::Constant& c : p.constants)
            for (u32 k = 0; k < 32; k++) {
                if (c.wide) w.at<u64>(s32(c.at))[k] = c.value;
                else w.at<u32>(s32(c.at))[k] = u32(c.value);
            }
    }
    const u32 blocks = l.grid[0] * l.grid[1] * l.grid[2];
    std::vector<u32> order(blocks);
    for (u32 i = 0; i < blocks; i++) order[i] = l.options.sched == 1 ? blocks - 1 - i : i;
    if (l.options.sched == 2 && blocks)
        for (u32 i = blocks - 1; i > 0; i--) std::swap(order[i], order[l.draw() % (i + 1)]);
    for (u32 number : order) {
        start_block(b, number, dynamic);
        run_block(b);
    }
}

}  // namespace ptxsim

// ---- the C interface

using namespace ptxsim;

extern "C" {

const char* ptxsim_names() {  // handlers, one a line, a blank line, special registers
    static const std::string all = [] {
        std::string s;
        for (const std::string& n : table().names) s += n + "\n";
        s += "\n";
        for (const char* n : SPECIALS) s += std::string(n) + "\n";
        return s;
    }();
    return all.c_str();
}

struct Packed {  // an instruction as decode.py packs it
    u32 op;
    u8 control, negate;
    u16 mod;
    s32 x[6];
    s64 imm;
    s32 guard, target, more, line;
};

// sizes: instructions, pool, constants, specials, file bytes, static shared, local bytes, shared granule, global granule,
// registers that wgmmas use; touches: Program::touches
void* ptxsim_program(const void* code, const s32* pool, const u64* constants, const u32* specials, const u32* sizes,
                     const s32* touches) {
    Program* p = new Program;
    const Packed* in = static_cast<const Packed*>(code);
    for (u32 i = 0; i < sizes[0]; i++) {
        Inst inst{in[i].op,
                  in[i].control,
                  in[i].negate,
                  in[i].mod,
                  {},
                  in[i].imm,
                  in[i].guard,
                  in[i].target,
                  in[i].more,
                  in[i].line,
                  table().handlers[in[i].op]};
        std::copy(in[i].x, in[i].x + 6, inst.x);
        p->code.push_back(inst);
    }
    p->pool.assign(pool, pool + sizes[1]);
    for (u32 i = 0; i < sizes[2]; i++)
        p->constants.push_back({u32(constants[3 * i]), u32(constants[3 * i + 1]), constants[3 * i + 2]});
    for (u32 i = 0; i < sizes[3]; i++) p->specials.push_back({specials[2 * i], specials[2 * i + 1]});
    p->file_bytes = sizes[4], p->static_shared = sizes[5], p->local_bytes = sizes[6];
    p->shared_granule = sizes[7], p->global_granule = sizes[8];
    p->watched = sizes[9];
    if (p->watched) p->touches.assign(touches, touches + sizes[0]);
    for (const Inst& i : p->code) {
        const std::string& name = table().names[i.op];
        p->bulk |= name == "wgmma" || name == "bulk.tensor";
        p->mbarriers |= name == "mbarrier.init";
    }
    p->executed.assign(sizes[0], 0);
    p->lanes.assign(sizes[0], 0);
    return p;
}
void ptxsim_free(void* program) { delete static_cast<Program*>(program); }

// shape: grid, block, dynamic shared bytes, param bytes. regions: lo, hi, writable for each; names: one a line.
// Returns the number of problems; their texts go to `message`. counts: executed, then lanes, for every instruction.
u32 ptxsim_launch(void* program, const u32* shape, const u8* params, const u64* regions, u32 region_count, const char* names,
                  const s64* options, char* message, u32 message_bytes, u64* counts, double* seconds) {
    Launch l{};
    l.program = static_cast<Program*>(program);
    std::copy(shape, shape + 3, l.grid);
    std::copy(shape + 3, shape + 6, l.block);
    l.threads = l.block[0] * l.block[1] * l.block[2];
    l.params = params;
    l.param_bytes = shape[7];
    l.options = Options{s32(options[0]), s32(options[1]), s32(options[2]), s32(options[3]), u64(options[4]), u64(options[5])};
    l.random = (l.options.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
    const char* at = names;
    for (u32 i = 0; i < region_count; i++) {
        const char* end = strchr(at, '\n');
        l.regions.push_back({regions[3 * i], regions[3 * i + 1], regions[3 * i + 2] != 0, std::string(at, end), {}});
        at = end + 1;
    }
    std::fill(l.program->executed.begin(), l.program->executed.end(), 0);
    std::fill(l.program->lanes.begin(), l.program->lanes.end(), 0);
    const PlainArithmetic plain;
    const auto began = std::chrono::steady_clock::now();
    try {
        run_launch(l, shape[6]);
    } catch (const Fault& f) { l.problem(f.text); } catch (const std::bad_alloc&) {
        l.problem("out of memory for the launch");
    }
    *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    std::string all;
    for (const std::string& s : l.problems) all += s + "\n";
    snprintf(message, message_bytes, "%s", all.c_str());
    std::copy(l.program->executed.begin(), l.program->executed.end(), counts);
    std::copy(l.program->lanes.begin(), l.program->lanes.end(), counts + l.program->lanes.size());
    return l.problem_count;
}
}
