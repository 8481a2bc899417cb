// types.h: what the CPU's kernels and launchers both see: which instruction set is in force, and how weights are packed.
#pragma once

#include "../types.h"

namespace rk {

enum class Isa : int { SCALAR = 0, AVX2 = 1, AVX512 = 2 };
Isa isa();            // the one in force: the best the CPU has, or what force_isa said
Isa best_isa();       // the best the CPU has
void force_isa(Isa);  // for tests; the caller has checked that the CPU has it

constexpr int PANEL = 32;  // weights are packed in panels of 32 outputs: [N / 32][K][32]; the same for every instruction set

}  // namespace rk
