// wgmma.cuh: Hopper's matrix instruction, which a warpgroup issues together and which runs beside it, its operands' places in
// shared memory, and the waits.
//
// Order: dot_tensor (NUMERICS.md, "Mode tensor"): sum += a b^T over 16 k, and the sum is that of mma.sync bit for bit: 16
// products and the sum so far are aligned, cut off and added as one fixed-point sum, which has no order and no sides. A chain
// starts from registers that hold +0: the instruction's own way to start (scale-d = 0) may give a zero another sign.
//
// Sums: of 64 rows warp w of the group has rows 16 w to 16 w + 15. With g = lane / 4 and t = lane % 4, sum[4 j], sum[4 j + 1]
// stand at row g, columns 8 j + 2 t and 8 j + 2 t + 1, sum[4 j + 2], sum[4 j + 3] at row g + 8: as mma.sync has them. An a in
// registers lies as mma.sync's fragment a of the warp's 16 rows.
#pragma once

#include "../device.cuh"

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#ifdef __CUDA_ARCH__
#error "this room is compiled for compute_90a alone (tools/toolkit.py, ROOMS)"
#endif
#endif

namespace rk::sm90 {

constexpr int STEP = 16;  // k's of one wgmma
constexpr int ROWS = 64;  // of one wgmma: four warps' 16

// ---- descriptors: where an operand begins in shared memory. Both kinds lie as tma.cuh's boxes: rows of 128 bytes, swizzled,
// from a multiple of 1,024 bytes.

// Rows with k's side by side, as a and b usually lie: 64 k's of every row. 16 k's further is + STEP_ON, 64 rows is + ROWS_ON.
__device__ __forceinline__ uint64_t by_rows(unsigned at) {
    return uint64_t((at & 0x3ffff) >> 4) | 1ull << 16 | uint64_t(1024 / 16) << 32 | 1ull << 62;
}
constexpr int STEP_ON = STEP * 2 / 16, ROWS_ON = ROWS * 128 / 16;

// Rows that are k's, with columns of the sums side by side, as attention's values lie: 64 columns, and those after them
// `columns_apart` bytes on. 16 k's further is + 16 * 128 / 16.
__device__ __forceinline__ uint64_t by_columns(unsigned at, unsigned columns_apart) {
    return uint64_t((at & 0x3ffff) >> 4) | uint64_t(columns_apart / 16) << 16 | uint64_t(1024 / 16) << 32 | 1ull << 62;
}
constexpr int COLUMN_STEP_ON = STEP * 128 / 16;

// ---- the order of things

// Before a group of wgmma whose registers were written, or read as sums, by other instructions.
__device__ __forceinline__ void begin_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// What was issued since the last one is a group.
__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of this warp's groups are under way.
template <int N>
__device__ __forceinline__ void wait_for_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler does not see that a wgmma still writes its sums after the instruction: nothing that reads or writes them crosses
// this line.
template <int N>
__device__ __forceinline__ void hold(float (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

// ---- the instruction: sum[64 rows][N columns] += a b^T, for the values of N that a kernel here asks for

template <int N>
struct Columns;

template <class Half>
constexpr bool is_f16 = false;
template <>
constexpr bool is_f16<f16> = true;

// The names of the sums in an instruction, and the registers behind them.
#define RK_NAMES_4 "%0, %1, %2, %3"
#define RK_NAMES_8 RK_NAMES_4 ", %4, %5, %6, %7"
#define RK_NAMES_16 RK_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RK_NAMES_32 RK_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define RK_NAMES_48 RK_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define RK_NAMES_64 RK_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RK_NAMES_96                                                                    \
    RK_NAMES_64                                                                        \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define RK_NAMES_128                                                                               \
    RK_NAMES_96                                                                                    \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RK_SUM_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RK_SUM_8(i) RK_SUM_4(i), RK_SUM_4(i + 4)
#define RK_SUM_16(i) RK_SUM_8(i), RK_SUM_8(i + 8)
#define RK_SUM_32(i) RK_SUM_16(i), RK_SUM_16(i + 16)
#define RK_SUM_48(i) RK_SUM_32(i), RK_SUM_16(i + 32)
#define RK_SUM_64(i) RK_SUM_32(i), RK_SUM_32(i + 32)
#define RK_SUM_96(i) RK_SUM_64(i), RK_SUM_32(i + 64)
#define RK_SUM_128(i) RK_SUM_64(i), RK_SUM_64(i + 64)

#define RK_WGMMA_OF(N, SUMS, HALF, REST, ...)                                                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." HALF "." HALF " {" RK_NAMES_##SUMS "}, " REST ";" \
                 : RK_SUM_##SUMS(0)                                                                                  \
                 : __VA_ARGS__)
// A to F: the names of what follows the sums. Both operands by rows in shared memory; or a in registers, b by rows or columns.
#define RK_WGMMA(N, SUMS, A, B, C, D, E, F)                                                                            \
    template <>                                                                                                        \
    struct Columns<N> {                                                                                                \
        template <class Half>                                                                                          \
        static __device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b) {                   \
            if constexpr (is_f16<Half>) RK_WGMMA_OF(N, SUMS, "f16", A ", " B ", 1, 1, 1, 0, 0", "l"(a), "l"(b));       \
            else RK_WGMMA_OF(N, SUMS, "bf16", A ", " B ", 1, 1, 1, 0, 0", "l"(a), "l"(b));                             \
        }                                                                                                              \
        template <class Half, bool BY_COLUMNS>                                                                         \
        static __device__ __forceinline__ void multiply(float (&d)[N / 2], const unsigned (&a)[4], uint64_t b) {       \
            if constexpr (is_f16<Half>)                                                                                \
                RK_WGMMA_OF(N, SUMS, "f16", "{" A ", " B ", " C ", " D "}, " E ", 1, 1, 1, " F, "r"(a[0]), "r"(a[1]),  \
                            "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(BY_COLUMNS)));                                       \
            else                                                                                                       \
                RK_WGMMA_OF(N, SUMS, "bf16", "{" A ", " B ", " C ", " D "}, " E ", 1, 1, 1, " F, "r"(a[0]), "r"(a[1]), \
                            "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(BY_COLUMNS)));                                       \
        }                                                                                                              \
    };
RK_WGMMA(8, 4, "%4", "%5", "%6", "%7", "%8", "%9")
RK_WGMMA(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")
RK_WGMMA(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")
RK_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
RK_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")
RK_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
RK_WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")
RK_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
#undef RK_WGMMA
#undef RK_WGMMA_OF

}  // namespace rk::sm90
