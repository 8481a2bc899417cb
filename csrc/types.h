// types.h: the storage dtypes, as kernels and launchers of every backend see them.
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

}  // namespace rk
