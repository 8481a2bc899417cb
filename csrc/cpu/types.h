// types.h: what kernels and launchers both see: storage dtypes, and which instruction set is in force.
#pragma once

#include <cstdint>

namespace rk {

enum class Dtype : int { F32 = 0, F16 = 1, BF16 = 2 };
constexpr int64_t bytes_of(Dtype t) { return t == Dtype::F32 ? 4 : 2; }

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

enum class Isa : int { SCALAR = 0, AVX2 = 1, AVX512 = 2 };
Isa isa();            // the one in force: the best the CPU has, or what force_isa said
Isa best_isa();       // the best the CPU has
void force_isa(Isa);  // for tests; the caller has checked that the CPU has it

constexpr int PANEL = 32;  // weights are packed in panels of 32 outputs: [N / 32][K][32]; the same for every instruction set

}  // namespace rk
