// types.h: what the CPU's kernels and launchers both see: which instruction set is in force, and how wide panels are.
#pragma once

#include "../types.h"

namespace rk {

enum class Isa : int { SCALAR = 0, AVX2 = 1, AVX512 = 2 };
Isa isa();            // the one in force: the best the CPU has, or what force_isa said
Isa best_isa();       // the best the CPU has
void force_isa(Isa);  // for tests; the caller has checked that the CPU has it

constexpr int PANEL = 32;  // outputs that are computed side by side; the same for every instruction set

}  // namespace rk
