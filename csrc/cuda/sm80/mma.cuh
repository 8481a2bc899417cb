// mma.cuh: what the kernels of mode "tensor" share: the one matrix instruction, its operands' way out of shared memory, and
// rows that lie there so that no bank is met twice.
//
// Order: dot_tensor (NUMERICS.md, "Mode tensor"): one accumulator per output, one mma for every 16 k, ascending. Every kernel
// of this room takes mma.sync.m16n8k16 with float32 sums. Another instruction may serve where a chip adds its terms alike, as
// wgmma does on a Hopper (csrc/cuda/sm90).
//
// Fragments, with g = lane / 4, t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), halves in pairs of neighbours in
// k. a [16 m][16 k]: a[0] at m = g, k = 2t; a[1] at g + 8, 2t; a[2] at g, 2t + 8; a[3] at g + 8, 2t + 8. b [8 n][16 k]: b[0] at
// n = g, k = 2t; b[1] at g, 2t + 8. sum [16 m][8 n]: sum[0], sum[1] at m = g, n = 2t, 2t + 1; sum[2], sum[3] at m = g + 8.
#pragma once

#include "../device.cuh"
#include "tiles.h"

namespace rk {

using sm80::STEP;

// sum += a b^T
template <class Half>
__device__ __forceinline__ void mma(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma<f16>(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<bf16>(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- shared memory: rows of ROW bytes in pieces of 16 ---------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// Where piece `piece` of row `row` lies. Eight rows at one piece, which is what ldmatrix reads at once, meet all banks: pieces
// change places by the row (by every second row where two rows fill the banks). The tile begins at a multiple of 128 bytes (of
// ROW, if that is more), so a step along k is an xor of the address: at(row, piece ^ p) = at(row, piece) ^ (p * 16), and 8 rows
// further down is + 8 * ROW.
template <int ROW>
__device__ __forceinline__ unsigned swizzled(unsigned row, unsigned piece) {
    static_assert(ROW >= 64 && (ROW & (ROW - 1)) == 0);
    return row * ROW + ((piece ^ (ROW == 64 ? row / 2 % 4 : row % 8)) * 16);
}

// ---- ldmatrix: 8 x 8 halves a matrix; lane 8 i + r gives the address of row r of matrix i ----

__device__ __forceinline__ void load_matrices(unsigned (&m)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}
__device__ __forceinline__ void load_matrices(unsigned (&m)[2], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(m[0]), "=r"(m[1]) : "r"(from) : "memory");
}
// Each matrix transposed: for an operand whose rows are k, as the values of attention are.
__device__ __forceinline__ void load_transposed(unsigned (&m)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(from)
                 : "memory");
}

// Which row, and which of the two pieces of a step, this lane gives for load_matrices: for 16 rows as fragment a; for 16 rows
// as two fragments b, {m[0], m[1]} of the first 8 rows and {m[2], m[3]} of the others; with two matrices, for 8 rows as one b.
__device__ __forceinline__ int row_of_a() { return int(threadIdx.x) % 16; }
__device__ __forceinline__ int piece_of_a() { return int(threadIdx.x) / 16 % 2; }
__device__ __forceinline__ int row_of_b() { return int(threadIdx.x) % 8 + int(threadIdx.x) / 16 % 2 * 8; }
__device__ __forceinline__ int piece_of_b() { return int(threadIdx.x) / 8 % 2; }

// ---- into shared memory -----------------------------------------------------------------------------------------------------

// A piece that exists, by cp.async; `from` is a multiple of 16 bytes.
__device__ __forceinline__ void copy_piece(unsigned to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// A piece, of which `valid` halves (0 to 8) exist; the rest is zero. By cp.async, where `from` is a multiple of 16 bytes; what
// does not exist is not read.
__device__ __forceinline__ void copy_halves(unsigned to, const void* from, int valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid * 2) : "memory");
}
// The same from anywhere, half by half through registers: it is there after the next barrier, too.
__device__ __forceinline__ void copy_halves_one_by_one(unsigned to, const void* from, int valid) {
    unsigned pairs[4] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e)
        if (e < valid) pairs[e / 2] |= unsigned(static_cast<const uint16_t*>(from)[e]) << (e % 2 * 16);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]),
                 "r"(pairs[3])
                 : "memory");
}

}  // namespace rk
