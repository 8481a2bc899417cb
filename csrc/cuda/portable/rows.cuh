// rows.cuh: groups of neighbours that are loaded and stored as 16 bytes, and rows in shared memory that a team of warps works
// on; for norm.cu, softmax.cu and sparse_ffn.cu.
//
// A team is one warp or one block; one row of float32 lies in shared memory for it. Element-wise passes go by groups of N
// neighbours, always the same ones for a thread, so that only what reads other threads' elements needs a barrier. N is what 16
// bytes of the storage dtype hold, or 1 where an address or a length is not a multiple of that.
#pragma once

#include "../device.cuh"

namespace rk {

template <class T>
constexpr int VECTOR = 16 / int(sizeof(T));

// ---- N neighbours of an array that nothing writes meanwhile -------------------------------------------------------------

template <int N>
__device__ __forceinline__ void load_group(const float* p, float (&v)[N]) {
    if constexpr (N == 1) {
        v[0] = __ldg(p);
    } else {
#pragma unroll
        for (int j = 0; j < N; j += 4) {
            const float4 x = __ldg(reinterpret_cast<const float4*>(p + j));
            v[j] = x.x, v[j + 1] = x.y, v[j + 2] = x.z, v[j + 3] = x.w;
        }
    }
}

template <class Half>
__device__ __forceinline__ void widen_two(unsigned x, float* v) {
    v[0] = widen(Half{uint16_t(x)});
    v[1] = widen(Half{uint16_t(x >> 16)});
}

// 16 bytes of T.
template <class T>
__device__ __forceinline__ void widen_vector(uint4 x, float (&v)[VECTOR<T>]) {
    if constexpr (sizeof(T) == 4) {
        v[0] = __uint_as_float(x.x), v[1] = __uint_as_float(x.y), v[2] = __uint_as_float(x.z), v[3] = __uint_as_float(x.w);
    } else {
        widen_two<T>(x.x, v), widen_two<T>(x.y, v + 2), widen_two<T>(x.z, v + 4), widen_two<T>(x.w, v + 6);
    }
}

template <int N, class Half>
__device__ __forceinline__ void load_group(const Half* p, float (&v)[N]) {
    if constexpr (N == 1) {
        v[0] = widen(Half{__ldg(&p->bits)});
    } else if constexpr (N == 4) {
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(p));
        widen_two<Half>(x.x, v), widen_two<Half>(x.y, v + 2);
    } else {
        widen_vector<Half>(__ldg(reinterpret_cast<const uint4*>(p)), v);
    }
}

template <int N>
__device__ __forceinline__ void load_group_as(const Ref& from, int64_t i, float (&v)[N]) {
    if (from.dtype == Dtype::F32) load_group<N>(static_cast<const float*>(from.data) + i, v);
    else if (from.dtype == Dtype::F16) load_group<N>(static_cast<const f16*>(from.data) + i, v);
    else load_group<N>(static_cast<const bf16*>(from.data) + i, v);
}

template <int N>
__device__ __forceinline__ void store_group(float* p, const float (&v)[N]) {
    if constexpr (N == 1) {
        p[0] = v[0];
    } else {
#pragma unroll
        for (int j = 0; j < N; j += 4) *reinterpret_cast<float4*>(p + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
    }
}

template <class Half>
__device__ __forceinline__ unsigned narrow_two(const float* v) {
    return unsigned(narrow<Half>(v[0]).bits) | unsigned(narrow<Half>(v[1]).bits) << 16;
}

template <int N, class Half>
__device__ __forceinline__ void store_group(Half* p, const float (&v)[N]) {
    if constexpr (N == 1) p[0] = narrow<Half>(v[0]);
    else
        *reinterpret_cast<uint4*>(p) =
            make_uint4(narrow_two<Half>(v), narrow_two<Half>(v + 2), narrow_two<Half>(v + 4), narrow_two<Half>(v + 6));
}

// ---- group g of a row in shared memory; neighbours in a warp hold neighbouring groups -----------------------------------
//
// Eight floats are two accesses of 16 bytes. Lanes 4..7 of every eight go to their second half first: so each access of eight
// lanes touches every bank once, where all first halves would touch every other bank twice.

template <int N>
__device__ __forceinline__ void put_group(float* row, int g, const float (&v)[N]) {
    if constexpr (N == 8) {
        const float4 a = make_float4(v[0], v[1], v[2], v[3]), b = make_float4(v[4], v[5], v[6], v[7]);
        const bool swap = threadIdx.x & 4;
        float4* to = reinterpret_cast<float4*>(row) + 2 * g;
        to[swap] = swap ? b : a;
        to[!swap] = swap ? a : b;
    } else {
        store_group<N>(row + g * N, v);
    }
}

template <int N>
__device__ __forceinline__ void get_group(const float* row, int g, float (&v)[N]) {
    if constexpr (N == 8) {
        const bool swap = threadIdx.x & 4;
        const float4* from = reinterpret_cast<const float4*>(row) + 2 * g;
        const float4 x = from[swap], y = from[!swap];
        const float4 a = swap ? y : x, b = swap ? x : y;
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else if constexpr (N == 4) {
        const float4 x = reinterpret_cast<const float4*>(row)[g];
        v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
        v[0] = row[g];
    }
}

// ---- teams ---------------------------------------------------------------------------------------------------------------

constexpr int TEAM_WARPS = 8;   // of a block that shares a row
constexpr int TEAM_SLOTS = 16;  // floats of shared memory for what the warps of a team tell each other

// The rank in the team of a thread.
template <int WARPS>
__device__ __forceinline__ int rank_in_team() {
    return WARPS == 1 ? int(threadIdx.x % 32) : int(threadIdx.x);
}

template <int WARPS>
__device__ __forceinline__ void team_barrier() {
    if constexpr (WARPS == 1) __syncwarp();
    else __syncthreads();
}

// row_sum over i in [0, D), by the first warp: term(sum, i) is the chain's next step. A barrier must have made the elements
// visible. `slot` is not used for anything else.
template <int WARPS, class Term>
__device__ __forceinline__ float team_row_sum(int64_t D, float* slot, Term term) {
    float sum = 0.0f;
    if (WARPS == 1 || threadIdx.x < 32) {
#pragma unroll 8
        for (int64_t i = threadIdx.x % 32; i < D; i += LANES) sum = term(sum, i);
        sum = fold_lanes(sum);
    }
    if constexpr (WARPS > 1) {
        if (threadIdx.x == 0) *slot = sum;
        __syncthreads();
        sum = *slot;
    }
    return sum;
}

// The exact maximum of the team's values. `slots`: one float per warp.
template <int WARPS>
__device__ __forceinline__ float team_max(float x, float* slots) {
    x = max_of_lanes(x);
    if constexpr (WARPS > 1) {
        if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
        __syncthreads();
        for (int w = 0; w < WARPS; ++w) x = x < slots[w] ? slots[w] : x;
    }
    return x;
}

// ---- launch shapes for rows in shared memory ------------------------------------------------------------------------------

// Floats from one row to the next: 16-byte accesses stay aligned.
inline int64_t row_stride(int64_t D) { return (D + 3) / 4 * 4; }
inline bool row_fits(int64_t D) { return 4 * (row_stride(D) + TEAM_SLOTS) <= MAX_SHARED; }

enum RowWay : int { WARP_A_ROW = 0, BLOCK_A_ROW = 1 };
// A warp is enough for a row of ordinary length, if there are rows to go round.
inline int row_way(int64_t rows, int64_t D) { return D > 4096 || (D >= 1024 && rows < 512) ? BLOCK_A_ROW : WARP_A_ROW; }

struct RowLaunch {
    int64_t blocks;
    int threads;
    int64_t shared;
};
inline RowLaunch row_launch(int way, int64_t rows, int64_t D) {
    const int64_t bytes = 4 * row_stride(D);
    if (way == BLOCK_A_ROW) return {rows, 32 * TEAM_WARPS, bytes + 4 * TEAM_SLOTS};
    const int64_t room = bytes > 0 ? MAX_SHARED / bytes : 4, warps = room < 4 ? room : 4;
    return {(rows + warps - 1) / warps, int(32 * warps), warps * bytes};
}

}  // namespace rk
