// tma.cuh: boxes of a tensor into shared memory, by TMA. What lies outside of the tensor arrives as zeros and is not read.
//
// Tensors of half precision, two to four dimensions, the first with neighbours side by side; a box has 64 of those, 128 bytes,
// and its rows lie in shared memory as wgmma.cuh's descriptors want them: 128 bytes each, in pieces of 16, of which row r's
// piece p stands at place p ^ r % 8. A box begins there at a multiple of 1,024 bytes.
#pragma once

#include <cuda.h>

#include "barrier.cuh"
#include "room.cuh"

namespace rk::sm90 {

constexpr int BOX = 64;         // halves of a row of a box
constexpr int BOX_BYTES = 128;  // of such a row
constexpr int ATOM = 1024;      // eight rows: what the order of the pieces repeats after

// ---- device: one thread starts a copy; its bytes are counted at the barrier as they arrive

__device__ __forceinline__ void load_box(unsigned to, const CUtensorMap* map, Barrier full, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(map), "r"(full.at), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void load_box(unsigned to, const CUtensorMap* map, Barrier full, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
            "r"(to),
        "l"(map), "r"(full.at), "r"(x), "r"(y), "r"(z)
        : "memory");
}
// Brings a map into the cache of maps before it is needed.
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// ---- host: a map describes the tensor and the box. A kernel takes it by value as a __grid_constant__, so a CUDA graph keeps
// it.

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, through the runtime: nothing is linked with libcuda. nullptr: this driver has none.
inline EncodeTiled find_encode_tiled() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t code =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
#else
    const cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &answer);
#endif
    if (code != cudaSuccess) cudaGetLastError();  // not left behind for the next who asks
    return code == cudaSuccess && answer == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found) : nullptr;
}
inline EncodeTiled encode_tiled() {
    static const EncodeTiled found = find_encode_tiled();
    return found;
}

// A tensor of halves: sizes[0] neighbours, sizes[i] of them strides[i - 1] elements apart. RANK: 2 to 4.
template <int RANK>
struct Boxes {
    const void* data;
    Dtype dtype;
    int64_t sizes[RANK], strides[RANK - 1];
    int box[RANK];  // its sizes; the first is BOX

    // Whether TMA can take it: addresses and strides in multiples of 16 bytes, sizes and strides below its limits.
    bool fit() const {
        bool fits = aligned(data, 16);
        for (int64_t size : sizes) fits = fits && 0 < size && size <= 0x7fff0000;  // a place past the end is an int, too
        for (int64_t stride : strides) fits = fits && 0 < stride && stride % 8 == 0 && stride < (int64_t(1) << 39);
        return fits;
    }

    // Whether the driver made the map; it may refuse what `fit` takes, since its own rules are not all written down. `fit` was
    // asked before, and encode_tiled.
    bool map(CUtensorMap& made) const {
        static_assert(RANK >= 2 && RANK <= 4);
        cuuint64_t extents[RANK], apart[RANK - 1];
        cuuint32_t rows[RANK], ones[RANK];
        for (int i = 0; i < RANK; ++i) extents[i] = cuuint64_t(sizes[i]), rows[i] = cuuint32_t(box[i]), ones[i] = 1;
        for (int i = 0; i + 1 < RANK; ++i) apart[i] = cuuint64_t(strides[i]) * 2;
        return encode_tiled()(&made, dtype == Dtype::F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                              RANK, const_cast<void*>(data), extents, apart, rows, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
    }
};

}  // namespace rk::sm90
