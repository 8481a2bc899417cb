// hopper.h: what mbarriers, bulk copies (TMA) and wgmma keep between their instructions.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "tensormap.h"

namespace ptxsim {

struct Inst;

// An mbarrier. A phase is over when all its arrivals are there and as many bytes have landed as were announced.
struct Mbar {
    uint32_t count;  // arrivals that a phase wants
    int64_t pending, bytes = 0;
    uint64_t phase = 0;
    uint32_t agent;                     // race detector: the bulk copies that report here
    uint32_t maker;                     // the thread that initialised it
    bool fenced = false;                // and has made that known to bulk copies
    std::vector<uint32_t> clock, done;  // race detector: what the arrivals know; what those of the phases that are over know
};

struct Bulk {  // a tensor copy on its way to shared memory
    uint32_t warp, lane, to, mbar, bytes;
    int32_t at[5];
    TensorMap map;
    const Inst* in;
};

struct Product {  // a wgmma, from its issue to the wait of its warp that covers it
    const Inst* in;
    uint64_t a, b, number;  // number: of the warp's wgmmas
    uint32_t group, time;
    bool add, done;              // done: by the wait of one of the four warps
    std::vector<uint8_t> bytes;  // the matrices in shared memory when it was issued; kept once for the four warps
    bool operator==(const Product& o) const { return in == o.in && a == o.a && b == o.b && add == o.add && group == o.group; }
};

// What a register that a wgmma uses is in the midst of.
enum Use : uint8_t { UNFENCED = 1, SUM_IN_FLIGHT = 2, OPERAND_IN_FLIGHT = 4 };

}  // namespace ptxsim
