// gemm_large.cuh: the `dot` primitive of gemm.cuh, with the same expressions, over large tiles of outputs, where the rate of
// fma is all that counts.
//
// Order: every output is its own chain in one thread: k ascending, one fma per step, from +0 inside a chunk of 512; chunk sums
// are added in ascending order, from +0.
//
// How: a thread computes 8 x 16 outputs. Of a stage of BK elements of k, shared memory holds for each k all rows of x side by
// side, then all rows of w: 16 bytes from there are one k of four rows. So the factors of an fma lie in registers of any
// parity; with four k of one row side by side, both would always stand in the same of the two register banks. The factors of
// the next k are read while the fma of this one run, and those of the next stage come from global memory into registers, where
// halves are widened, and then into the other of two stages.
//
// The totals wait in shared memory, each in a place of its own thread, and are touched once per chunk: they would fill half of
// the registers.
//
// Bank conflicts: a warp stores 16 rows of two k that are 4 apart at once, and PITCH is 4 more than a multiple of 32 floats.
//
// Tails: as in gemm.cuh. Rows past the end are copies of a row that exists; past the end of K both operands are +0.
#pragma once

#include "gemm.cuh"

namespace rk {

template <int BM_, int BN_, int BK_, int MIN_BLOCKS_>
struct LargeTile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, TM = 8, TN = 16, LM = 4, LN = 8;
    static constexpr int WM = LM * TM, WN = LN * TN;  // a warp's outputs: 32 x 128
    static constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN, THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int MIN_BLOCKS = MIN_BLOCKS_;
    static_assert(BM % WM == 0 && BN % WN == 0 && CHUNK % BK == 0 && BK % 8 == 0 && BM % (THREADS / 2) == 0);
};

template <class T>
constexpr bool LARGE = false;
template <int... N>
constexpr bool LARGE<LargeTile<N...>> = true;

// One operand of a block: COUNT rows on their way from global to shared memory. A piece is four neighbours along k. Two threads
// take 8 neighbours of a row, and all threads together those of THREADS / 2 rows.
template <class T, bool HALF, int COUNT>
struct LargeOperand {
    static constexpr int SIZE = HALF ? 2 : 4, DOWN = T::THREADS / 2, ROWS = COUNT / DOWN, ALONG = T::BK / 8;
    static constexpr int PITCH = COUNT + 4, STAGE = PITCH * T::BK;  // floats

    const char* from[ROWS];
    uint32_t raw[ROWS][ALONG][SIZE];  // four elements as they come
    Dtype dtype;
    bool wide;

    template <class Row>
    __device__ __forceinline__ LargeOperand(Rows rows, Row row, int64_t k_begin) : dtype(rows.dtype), wide(rows.wide) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) from[i] = static_cast<const char*>(row(row_of(i))) + (k_begin + place()) * SIZE;
    }

    static __device__ __forceinline__ int place() { return int(threadIdx.x) % 2 * 4; }
    static __device__ __forceinline__ int row_of(int i) { return int(threadIdx.x) / 2 + i * DOWN; }

    // The next stage, of which `count` elements of each row exist.
    __device__ __forceinline__ void fetch(int count) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
#pragma unroll
            for (int a = 0; a < ALONG; ++a) {
                const char* piece = from[i] + a * 8 * SIZE;
                if (wide && count == T::BK) {
                    if constexpr (HALF) {
                        const uint2 v = *reinterpret_cast<const uint2*>(piece);
                        raw[i][a][0] = v.x, raw[i][a][1] = v.y;
                    } else {
                        const uint4 v = *reinterpret_cast<const uint4*>(piece);
                        raw[i][a][0] = v.x, raw[i][a][1] = v.y, raw[i][a][2] = v.z, raw[i][a][3] = v.w;
                    }
                } else {
                    const int there = count - place() - a * 8;
#pragma unroll
                    for (int e = 0; e < SIZE; ++e) raw[i][a][e] = 0;
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        if (e >= there) continue;
                        if constexpr (HALF)
                            raw[i][a][e / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(piece)[e]) << (e % 2 * 16);
                        else raw[i][a][e] = reinterpret_cast<const uint32_t*>(piece)[e];
                    }
                }
            }
            from[i] += T::BK * SIZE;
        }
    }

    // What was fetched, as float32, row by row of k.
    __device__ __forceinline__ void put(float* stage) const {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int a = 0; a < ALONG; ++a)
#pragma unroll
                for (int e = 0; e < 4; ++e) stage[(place() + a * 8 + e) * PITCH + row_of(i)] = element(raw[i][a], e);
    }
    __device__ __forceinline__ float element(const uint32_t (&piece)[SIZE], int e) const {
        if constexpr (!HALF) return __uint_as_float(piece[e]);
        const uint16_t bits = uint16_t(piece[e / 2] >> (e % 2 * 16));
        return dtype == Dtype::F16 ? widen(f16{bits}) : widen(bf16{bits});
    }
};

template <class T, bool X_HALF, bool W_HALF>
struct LargeDot {
    using X = LargeOperand<T, X_HALF, T::BM>;
    using W = LargeOperand<T, W_HALF, T::BN>;
    static constexpr int STAGE = X::STAGE + W::STAGE;                               // floats
    static constexpr int BYTES = (2 * STAGE + T::BM * T::BN) * int(sizeof(float));  // of shared memory, at a multiple of 16
    static constexpr int GROUPS = T::TM * T::TN / 4;  // a thread's outputs, four neighbours of a row each

    // Where this thread's first output is in the block's tile: every 8 lanes make 2 rows of 4 columns. Four rows and four
    // columns lie side by side, the next four LM or LN times as far.
    static __device__ __forceinline__ int first_row() {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        return warp % T::WARPS_M * T::WM + (lane % 2 + lane / 16 * 2) * 4;
    }
    static __device__ __forceinline__ int first_column() {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        return warp / T::WARPS_M * T::WN + lane / 2 % T::LN * 4;
    }
    // Row and column of group `i` from there, and its totals.
    static __device__ __forceinline__ int row_of(int i) { return i / 4 / 4 * 4 * T::LM + i / 4 % 4; }
    static __device__ __forceinline__ int column_of(int i) { return i % 4 * 4 * T::LN; }
    static __device__ __forceinline__ float* totals(char* shared, int i) {
        return reinterpret_cast<float*>(shared) + 2 * STAGE + (i * T::THREADS + int(threadIdx.x)) * 4;
    }

    // totals(shared, i) = the chunk sums over k in [k_begin, k_end), added from +0, of this thread's group i. k_begin is a
    // multiple of 512. All threads of the block call it.
    template <class XRow, class WRow>
    static __device__ __forceinline__ void run(char* shared, Rows x_rows, XRow x_row, Rows w_rows, WRow w_row, int64_t k_begin,
                                               int64_t k_end) {
        X x(x_rows, x_row, k_begin);
        W w(w_rows, w_row, k_begin);
        float* const both = reinterpret_cast<float*>(shared);
        const int stages = int((k_end - k_begin + T::BK - 1) / T::BK);
        const int tail = int(k_end - k_begin - int64_t(stages - 1) * T::BK);
        const int row = first_row(), column = first_column();
        float a[2][T::TM], b[2][T::TN];
        const auto factors = [&](const float* stage, int k) {
#pragma unroll
            for (int i = 0; i < T::TM; i += 4) take(stage + k * X::PITCH + row + i * T::LM, a[k % 2] + i);
#pragma unroll
            for (int j = 0; j < T::TN; j += 4) take(stage + X::STAGE + k * W::PITCH + column + j * T::LN, b[k % 2] + j);
        };
        const auto fetch = [&](int stage) {
            const int count = stage + 1 < stages ? T::BK : tail;
            x.fetch(count);
            w.fetch(count);
        };
        const auto put = [&](float* stage) {
            x.put(stage);
            w.put(stage + X::STAGE);
        };
        fetch(0);
        put(both);
        __syncthreads();
        factors(both, 0);
        int slot = 0;
        for (int stage = 0; stage < stages;) {
            float sum[T::TM][T::TN];
#pragma unroll
            for (int i = 0; i < T::TM; ++i)
#pragma unroll
                for (int j = 0; j < T::TN; ++j) sum[i][j] = 0.0f;
            const bool first = stage == 0;
            const int chunk_end = stages - stage < CHUNK / T::BK ? stages : stage + CHUNK / T::BK;
#pragma unroll 1
            for (; stage < chunk_end; ++stage) {
                const float* const here = both + slot * STAGE;
                slot ^= 1;
                float* const next = both + slot * STAGE;
                const bool more = stage + 1 < stages;
                if (more) fetch(stage + 1);
#pragma unroll
                for (int k = 0; k < T::BK; ++k) {
                    if (k + 1 < T::BK) {
                        factors(here, k + 1);
                    } else if (more) {
                        put(next);
                        __syncthreads();  // the next stage is there for all, and all are through with this one
                        factors(next, 0);
                    }
                    // rows there and back: a factor that was just used is used again
#pragma unroll
                    for (int j = 0; j < T::TN; ++j)
#pragma unroll
                        for (int r = 0; r < T::TM; ++r) {
                            const int i = j % 2 ? T::TM - 1 - r : r;
                            sum[i][j] = fmadd(a[k % 2][i], b[k % 2][j], sum[i][j]);
                        }
                }
            }
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                float* const at = totals(shared, i);
                Four total = {};
                if (!first) total = load_four(at);
#pragma unroll
                for (int e = 0; e < 4; ++e) total.v[e] = total.v[e] + sum[i / 4][i % 4 * 4 + e];
                store_four(at, total);
            }
        }
    }

    static __device__ __forceinline__ void take(const float* from, float* to) {
        const Four x = load_four(from);
#pragma unroll
        for (int e = 0; e < 4; ++e) to[e] = x.v[e];
    }
};

}  // namespace rk
