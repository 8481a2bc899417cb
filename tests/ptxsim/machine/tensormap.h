// tensormap.h: what the simulator keeps in the 128 bytes of a CUtensorMap, a driver's secret on a GPU. ../tensormap.py and
// ../../simulated/cudart.cpp fill it in, bulk.cpp reads it.
#pragma once

#include <cstdint>

namespace ptxsim {

struct TensorMap {
    static constexpr uint32_t MAGIC = 0x70616d74;
    uint32_t magic;
    uint8_t element_bytes, rank, swizzle, reserved;  // swizzle: CUtensorMapSwizzle, 0 none, 1 32 bytes, 2 64, 3 128
    uint64_t address;
    uint64_t strides[4];  // bytes, of dimensions 1 and up
    uint32_t last[5];     // each dimension, minus one
    uint16_t box[5];
    uint8_t unused[50];
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace ptxsim
