// machine.h: what the simulator's parts share: a decoded instruction, a warp with its lanes, a block, a launch.
//
// A warp's registers are a structure of arrays: every 32-bit virtual register is 32 neighbouring u32, every 64-bit one 32
// neighbouring u64, a predicate one u32 with a bit a lane. Registers of 8 and 16 bits take 32-bit cells and are kept
// zero-extended. Constants and special registers are cells too, filled once, so that a handler only ever sees offsets.
#pragma once

#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "hopper.h"

namespace ptxsim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

constexpr u32 FULL = 0xffffffffu;

// Generic addresses of what is not plain memory: no pointer of this process looks like these.
constexpr u64 SHARED_WINDOW = 1ull << 60;
constexpr u64 LOCAL_WINDOW = 2ull << 60;
constexpr u64 PARAM_WINDOW = 4ull << 60;

struct Warp;
struct Block;
struct Launch;
struct Inst;
using Handler = void (*)(Warp&, const Inst&);

// What the interpreter's loop itself must do with an instruction; decode.py has the same numbers.
// WATCHED: plain, and touches a register that a wgmma uses.
enum Control : u8 { PLAIN, BRANCH, EXIT, COLLECTIVE, BARRIER, BRANCH_TABLE, TRAP, WATCHED, MBARRIER_WAIT, WGMMA_WAIT };

struct Inst {  // decode.py packs all of it but `run`
    u32 op;
    u8 control;
    u8 negate;    // run where the guard is false
    u16 mod;      // modifiers, as the handler reads them
    s32 x[6];     // byte offsets into the warp's registers; -1: not there
    s64 imm;      // address offset, or what the handler wants
    s32 guard;    // offset of the predicate, -1: always
    s32 target;   // of a branch; member mask of a collective whose x[5] is -1
    s32 more;     // first of further operands in the program's pool
    s32 line;     // of the PTX text
    Handler run;  // filled in here
};

// Modifier bits of floating-point instructions (Inst::mod).
enum Mod : u16 { FTZ = 1, SAT = 2, RZ = 4, RM = 8, RP = 12, ROUNDING = 12, RELU = 16, NAN_ = 32, ABS_ = 64, RNA = 128 };
constexpr u16 OWN_RULES = 0xffff;  // Inst::mod of wgmma, which looks at its registers itself
// Of loads and stores.
enum MemMod : u16 { SIGNED = 1, ADDRESS64 = 2, KEEP32 = 256 };  // KEEP32: a signed value fills a 32-bit register

// An error in the simulated program that ends the launch. "{line N}" in a text becomes the PTX line in program.py.
struct Fault {
    std::string text;
};

struct Program {
    std::vector<Inst> code;
    std::vector<s32> pool;
    u32 file_bytes = 0;
    u32 static_shared = 0, local_bytes = 0;
    u32 shared_granule = 1, global_granule = 1;  // the narrowest access, for the race detector
    struct Constant {
        u32 at, wide;
        u64 value;
    };
    struct Special {
        u32 at, kind;
    };
    std::vector<Constant> constants;
    std::vector<Special> specials;
    // Of a program with wgmma, for every instruction: where the pool says which of the registers that a wgmma uses it touches:
    // how many, then 2 * register + written. -1: none.
    std::vector<s32> touches;
    u32 watched = 0;    // how many such registers there are
    bool bulk = false;  // has wgmma or bulk copies: who wrote to shared memory by other means must be known
    bool mbarriers = false;
    std::vector<u64> executed, lanes;  // per instruction: times run by a warp, times run by a lane
};

struct Touched {  // of the race detector, for one granule: who touched it last; a time of 0: nobody
    u32 wtime, wline, rtime, rline, rwarps;
    u16 wthread, rthread;
    bool atomic;  // the last write was an atomic one
};
struct GlobalCell {
    u32 wblock, rblock;  // block number + 1, 0: none; readers of several blocks: SEVERAL
    u32 inner;           // the block that `in_block` is about
    u32 wline, rline;
    bool atomic;
    Touched in_block;
};

struct Region {
    u64 lo, hi;
    bool writable;
    std::string name;
    std::vector<GlobalCell> cells;
};

struct Options {
    s32 sched, race, lazy_async, mma;
    u64 seed, max_steps;
};

enum State : u8 { RUNNABLE, AT_BARRIER, AT_COLLECTIVE, AT_MBARRIER, AT_WGMMA };

struct Group {  // lanes of one warp that share a program counter
    u32 pc, mask;
    State state;
    bool counted;  // at a barrier: already among its arrivals
    u32 bar, expected, member;
};

struct Copy {  // a cp.async on its way
    u32 lane, to, size, valid, group;
    u64 from;
    s32 line;
};

struct Warp {
    u8* file;
    const Program* program;
    Block* block;
    Launch* launch;
    u8* local;
    u32 mask;  // lanes that run the present instruction
    u32 pc, active, limit;
    u32 id, born, live;
    u32 count, current;
    bool expired;  // its last turn ended by the clock, not by waiting
    Group groups[33];
    u32 committed[32];
    std::vector<Copy> copies;
    u64 polled;                     // steps since it last asked an mbarrier in vain
    u64 fenced[32];                 // when each lane last ran fence.proxy.async
    std::vector<u8> uses;           // of the registers that wgmmas use: Use
    std::vector<Product> products;  // issued and not waited for
    u64 product_count;
    u32 product_groups;  // committed
    u32 registers;       // as setmaxnreg set them; 0: it did not

    template <class T>
    T* at(s32 offset) {
        return reinterpret_cast<T*>(file + offset);
    }
    u32& pred(s32 offset) { return *reinterpret_cast<u32*>(file + offset); }
    void set_pred(s32 offset, u32 bits) { pred(offset) = (pred(offset) & ~mask) | (bits & mask); }
};

struct Bar {
    u32 lanes, threads, expected, ones, all, any;
    bool used;
    std::vector<u32> clock;  // race detector: what the arrivals know, together
};

struct Block {
    Launch* launch;
    u32 ctaid[3], number, live;
    u8* shared;
    u32 shared_bytes;
    std::vector<Warp> warps;
    Bar bars[16];
    std::map<u32, Mbar> mbars;  // by address
    std::vector<Bulk> copies;   // on their way
    std::vector<u64> generic;   // for every 16 bytes: when (<< 16) and by whom last written, but by a bulk copy
    u32 idle;                   // rounds in which no warp did more than ask an mbarrier in vain
    u64 proxy_time;             // counts these writes and their fences
    std::vector<std::vector<Product>> products;  // what the first warp of each warpgroup has issued
    // Race detector: warp w knows of all that warp v did before time seen[w][v]; low[w] and high[w] are the row's extremes.
    std::vector<std::vector<u32>> seen;
    std::vector<u32> low, high;
};

struct Launch {
    Program* program;
    Options options;
    u32 grid[3], block[3], threads;
    const u8* params;
    u32 param_bytes;
    std::vector<Region> regions;
    u32 last_region = 0;
    u64 random, steps = 0;
    u32 time = 1;  // of the race detector: counts barriers
    std::vector<Touched> cells;
    std::vector<u32> read_times;         // with mbarriers, for every cell: when each of 32 warps and agents last read it
    std::set<std::pair<s32, s32>> told;  // pairs of lines whose race has been reported
    std::vector<std::string> problems;
    u32 problem_count = 0;

    u64 draw() {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        return random * 0x2545f4914f6cdd1dull >> 16;
    }
    void problem(const std::string& text) {
        if (problem_count++ < 20) problems.push_back(text);
    }
};

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place(const Warp& w, u32 lane, s32 line);  // "PTX line 7, block (0,0,0), thread (3,0,0)"
[[noreturn]] void fault(const Warp& w, u32 lane, const Inst& in, const std::string& what);

// ---- memory.cpp
Region& region_of(Warp& w, u32 lane, const Inst& in, u64 address, u32 bytes, bool write);
u8* global_pointer(Warp& w, u32 lane, const Inst& in, u64 address, u32 bytes, bool write, bool atomic = false);
u8* shared_pointer(Warp& w, u32 lane, const Inst& in, u64 address, u32 bytes, bool write);
u8* any_pointer(Warp& w, u32 lane, const Inst& in, u64 address, u32 bytes, bool write, bool atomic = false);

// ---- async.cpp
void start_block_copies(Warp& w);

// ---- mbarrier.cpp
void complete_bytes(Block& b, u32 mbar, u32 bytes);
u32 mbarrier_over(Warp& w, const Inst& in, u32 mask, u32* at);  // the lanes that need not wait; at[lane]: the mbarrier
Mbar& mbar_at(Warp& w, u32 lane, const Inst& in, u64 address);
void mark_generic(Warp& w, u32 lane, const Inst& in, u32 offset, u32 bytes);  // a write to shared memory, but by a bulk copy
std::string waits_for(const Block& b, u32 mbar);
inline void wrote_shared(Warp& w, u32 lane, const Inst& in, u32 offset, u32 bytes) {
    if (__builtin_expect(!w.block->generic.empty(), 0)) mark_generic(w, lane, in, offset, bytes);
}

// ---- bulk.cpp
void start_block_bulk(Block& b);
void land_bulk(Block& b, size_t which);
void end_block_bulk(Block& b);

// ---- wgmma.cpp
void start_warp_wgmma(Warp& w);
void watch(Warp& w, const Inst& in, u32 pc);  // an instruction that touches a register of a wgmma
bool products_there(Warp& w, u32 groups);     // whether the warp's three companions have committed as many groups
void finish_products(Warp& w, u32 groups);    // those of the first so many groups
void end_warp_wgmma(Warp& w, const Inst& in);

// ---- race.cpp
void race_shared(Warp& w, u32 lane, s32 line, u32 offset, u32 bytes, bool write, const u8* value, bool atomic = false);
void race_global(Warp& w, u32 lane, s32 line, Region& region, u64 address, u32 bytes, bool write, const u8* value,
                 bool atomic = false);
void race_start_block(Block& b);
void race_copy_issued(Warp& w, u32 lane, s32 line, u32 offset, u32 bytes);
void race_copy_landed(Warp& w, u32 lane, s32 line, u32 offset, u32 bytes);
void race_warp_sync(Warp& w);
void race_bulk_issued(Block& b, const Bulk& c);
void race_bulk_landed(Block& b, const Bulk& c);
void race_mbarrier_arrive(Warp& w, Mbar& m);
void race_mbarrier_wait(Warp& w, const Mbar& m);
void race_wgmma_read(Warp& w, s32 line, u32 offset);    // 16 bytes
void race_wgmma_issued(Warp& w, s32 line, u32 offset);  // 16 bytes
u32 race_wgmma_over(Warp& w);                           // when its reads are known to have ended
void race_wgmma_known(Warp& w, u32 time);
void race_arrive(Warp& w, Bar& bar);                              // before the release of what it waits for
void race_wait_over(Bar& bar, const std::vector<Warp*>& waited);  // all that waited there go on

// ---- the table of handlers
struct Table {
    std::vector<std::string> names;
    std::vector<Handler> handlers;
    void add(const std::string& name, Handler run) {
        names.push_back(name);
        handlers.push_back(run);
    }
};
void add_integer(Table&);
void add_logic(Table&);
void add_float(Table&);
void add_double(Table&);
void add_half(Table&);
void add_convert(Table&);
void add_compare(Table&);
void add_move(Table&);
void add_memory(Table&);
void add_atomic(Table&);
void add_collective(Table&);
void add_async(Table&);
void add_matrix(Table&);
void add_mbarrier(Table&);
void add_bulk(Table&);
void add_wgmma(Table&);

}  // namespace ptxsim
