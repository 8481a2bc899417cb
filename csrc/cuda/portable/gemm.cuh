// gemm.cuh: the `dot` primitive over tiles of outputs, for linear and sparse_ffn: sums[m, n] = dot(x[m], w[n]), rows of K
// side by side in both, float32 or half in either.
//
// Order: every output is its own chain in one thread: k ascending, one fma per step, from +0 inside a chunk of 512; chunk sums
// are added in ascending order, from +0. Tiles, warps and lanes only split outputs; blocks may also split whole chunks.
//
// How: a block computes BM x BN outputs, a thread TM x TN of them. BK elements of each of the BM + BN rows are a stage;
// several stages are on their way into shared memory (cp.async) while one is computed. There rows are float32, k side by side,
// PITCH = BK + 4 floats apart: an odd number of 16-byte units, so that 8 lanes that read 16 bytes of 8 neighbouring rows meet
// 8 different groups of banks. A half operand lands as it is in slots of its own thread, which widens it into one of two
// float tiles while the other is computed: the inner loop is the same for every dtype, and a widening serves all the threads
// that read the element.
//
// Tails: rows past the end are copies of a row that exists, and their sums are thrown away. Past the end of K both operands
// are +0: fma(+0, +0, s) can only make +0 of a sum of -0, which adding it to a total that began at +0 would do as well.
#pragma once

#include "../device.cuh"

namespace rk {

// The shape of a block's work. LM: lanes of a warp along m, of 32; STAGES: stages in shared memory, 2 or more.
template <int BM_, int BN_, int BK_, int TM_, int TN_, int LM_, int STAGES_, int MIN_BLOCKS_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, TM = TM_, TN = TN_, LM = LM_, LN = 32 / LM_, STAGES = STAGES_;
    static constexpr int WM = LM * TM, WN = LN * TN;  // a warp's outputs; a thread's rows are LM apart, its columns LN
    static constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN, THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int MIN_BLOCKS = MIN_BLOCKS_;  // of a multiprocessor: bounds the registers
    static constexpr int PITCH = BK + 4;
    static_assert(BM % WM == 0 && BN % WN == 0 && CHUNK % BK == 0 && STAGES >= 2);
};

// What the copies of one operand need to know.
struct Rows {
    int64_t bytes;  // from one row to the next
    Dtype dtype;
    bool wide;  // rows begin at multiples of 16 bytes: cp.async in its widest form
};

inline Rows rows_of(const Ref& from, int64_t K) {
    const int64_t bytes = K * bytes_of(from.dtype);
    return {bytes, from.dtype, aligned(from.data, 16) && bytes % 16 == 0};
}

// One operand of a block: COUNT rows on their way from global memory to float tiles [COUNT][PITCH] in shared memory.
// A piece is 16 bytes of a row; a thread's pieces all stand at the same place in their rows.
template <class T, bool HALF, int COUNT>
struct Operand {
    static constexpr int SIZE = HALF ? 2 : 4, PIECE = 16 / SIZE, ROW_PIECES = T::BK / PIECE;
    static constexpr int PIECES = (COUNT * ROW_PIECES + T::THREADS - 1) / T::THREADS;
    static constexpr bool EVEN = COUNT * ROW_PIECES % T::THREADS == 0;
    static constexpr int TILES = HALF ? 2 : T::STAGES, TILE = COUNT * T::PITCH;
    static constexpr int RAW = HALF ? T::STAGES * PIECES * T::THREADS * 16 : 0;  // bytes
    static constexpr int BYTES = TILES * TILE * 4 + RAW;
    static_assert(T::THREADS % ROW_PIECES == 0 && TILE % 4 == 0);

    const char* from[PIECES];
    float* tiles;
    Dtype dtype;
    bool wide;

    // row(r): where row r of the block begins. It is asked for every r < COUNT and must give a row that exists.
    template <class Row>
    __device__ __forceinline__ Operand(char* shared, Rows rows, Row row, int64_t k_begin)
        : tiles(reinterpret_cast<float*>(shared)), dtype(rows.dtype), wide(rows.wide) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int r = row_of(i) < COUNT ? row_of(i) : COUNT - 1;
            from[i] = static_cast<const char*>(row(r)) + (k_begin + place() * PIECE) * SIZE;
        }
    }

    static __device__ __forceinline__ int place() { return int(threadIdx.x) % ROW_PIECES; }
    static __device__ __forceinline__ int row_of(int i) {
        return int(threadIdx.x) / ROW_PIECES + i * (T::THREADS / ROW_PIECES);
    }
    __device__ __forceinline__ char* raw(int slot, int i) const {
        return reinterpret_cast<char*>(tiles + TILES * TILE) + ((slot * PIECES + i) * T::THREADS + int(threadIdx.x)) * 16;
    }

    __device__ __forceinline__ char* target(int slot, int i) const {
        if (HALF) return raw(slot, i);
        return reinterpret_cast<char*>(tiles + slot * TILE + row_of(i) * T::PITCH + place() * PIECE);
    }

    // Starts the copies of the next stage, of which `count` elements of each row exist, and steps on.
    __device__ __forceinline__ void copy(int slot, int count) {
        if (wide && count == T::BK) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
                if (EVEN || row_of(i) < COUNT) copy_16(target(slot, i), from[i]);
        } else {
            const int some = count - place() * PIECE;
            const int valid = some < 0 ? 0 : some < PIECE ? some : PIECE;  // elements
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
                if (EVEN || row_of(i) < COUNT) copy_some(target(slot, i), from[i], valid);
        }
#pragma unroll
        for (int i = 0; i < PIECES; ++i) from[i] += T::BK * SIZE;
    }
    __device__ __forceinline__ void copy_some(char* to, const char* some, int valid) const {
        if (wide) return copy_16(to, some, valid * SIZE);
#pragma unroll 1
        for (int e = 0; e < PIECE; ++e) {
            if (!HALF) copy_4(to + e * 4, some + e * 4, e < valid ? 4 : 0);
            else  // cp.async has no 2 bytes
                reinterpret_cast<uint16_t*>(to)[e] = e < valid ? reinterpret_cast<const uint16_t*>(some)[e] : 0;
        }
    }

    // A half operand's stage, which this thread copied and waited for, into float tile `t`.
    __device__ __forceinline__ void widen_stage(int slot, int t) const {
        if constexpr (HALF) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i) {
                if (!EVEN && row_of(i) >= COUNT) break;
                float* to = tiles + t * TILE + row_of(i) * T::PITCH + place() * PIECE;
#pragma unroll
                for (int e = 0; e < PIECE; e += 4) store_four(to + e, load_four_as(dtype, raw(slot, i), e));
            }
        }
    }

    __device__ __forceinline__ const float* tile(int slot, int stage) const { return tiles + (HALF ? stage & 1 : slot) * TILE; }
};

template <class T, bool X_HALF, bool W_HALF>
struct Dot {
    using X = Operand<T, X_HALF, T::BM>;
    using W = Operand<T, W_HALF, T::BN>;
    static constexpr int BYTES = X::BYTES + W::BYTES;  // of shared memory, at a multiple of 16

    // Where this thread's first output is in the block's tile. Every 8 lanes make 2 rows of 4 columns, so that the addresses
    // of a warp's read repeat among neighbours for both operands.
    static __device__ __forceinline__ int first_row() {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        return warp % T::WARPS_M * T::WM + (T::LM == 1 ? 0 : lane % 2 + lane / (2 * T::LN) * 2);
    }
    static __device__ __forceinline__ int first_column() {
        const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
        return warp / T::WARPS_M * T::WN + (T::LM == 1 ? lane : lane / 2 % T::LN);
    }

    // total[i][j] = the chunk sums over k in [k_begin, k_end), added from +0, of row first_row() + i LM and column
    // first_column() + j LN. k_begin is a multiple of 512. Rows and columns from `rows` and `columns` on are not wanted.
    // All threads of the block call it; shared memory may be used again after a barrier.
    template <class XRow, class WRow>
    static __device__ __forceinline__ void run(char* shared, Rows x_rows, XRow x_row, Rows w_rows, WRow w_row, int rows,
                                               int columns, int64_t k_begin, int64_t k_end, float (&total)[T::TM][T::TN]) {
        X x(shared, x_rows, x_row, k_begin);
        W w(shared + X::BYTES, w_rows, w_row, k_begin);
        const int stages = int((k_end - k_begin + T::BK - 1) / T::BK);
        const int tail = int(k_end - k_begin - int64_t(stages - 1) * T::BK);
        const int row = first_row(), column = first_column();
        // A warp without an output that is wanted only helps to copy.
        const bool idle = row / T::WM * T::WM >= rows || column / T::WN * T::WN >= columns;

        auto copy = [&](int stage, int slot) {
            if (stage < stages) {
                const int count = stage + 1 < stages ? T::BK : tail;
                x.copy(slot, count);
                w.copy(slot, count);
            }
            commit_copies();  // perhaps an empty group: the count of groups is the clock
        };
#pragma unroll 1
        for (int s = 0; s < T::STAGES - 1; ++s) copy(s, s);
        wait_for_copies<T::STAGES - 2>();
        x.widen_stage(0, 0);
        w.widen_stage(0, 0);

#pragma unroll
        for (int i = 0; i < T::TM; ++i)
#pragma unroll
            for (int j = 0; j < T::TN; ++j) total[i][j] = 0.0f;
        int slot = 0;
        for (int stage = 0; stage < stages;) {
            float sum[T::TM][T::TN];
#pragma unroll
            for (int i = 0; i < T::TM; ++i)
#pragma unroll
                for (int j = 0; j < T::TN; ++j) sum[i][j] = 0.0f;
            const int chunk_end = stages - stage < CHUNK / T::BK ? stages : stage + CHUNK / T::BK;
#pragma unroll 1
            for (; stage < chunk_end; ++stage) {
                __syncthreads();  // this stage is there for all, and all are through with the last one
                copy(stage + T::STAGES - 1, slot > 0 ? slot - 1 : T::STAGES - 1);
                if (!idle) multiply(x.tile(slot, stage) + row * T::PITCH, w.tile(slot, stage) + column * T::PITCH, sum);
                const int next = slot + 1 < T::STAGES ? slot + 1 : 0;
                wait_for_copies<T::STAGES - 2>();  // this thread's part of the next stage has landed
                if (stage + 1 < stages) {
                    x.widen_stage(next, (stage + 1) & 1);
                    w.widen_stage(next, (stage + 1) & 1);
                }
                slot = next;
            }
#pragma unroll
            for (int i = 0; i < T::TM; ++i)
#pragma unroll
                for (int j = 0; j < T::TN; ++j) total[i][j] = total[i][j] + sum[i][j];
        }
    }

    static __device__ __forceinline__ void multiply(const float* x, const float* w, float (&sum)[T::TM][T::TN]) {
#pragma unroll
        for (int k = 0; k < T::BK; k += 4) {
            Four a[T::TM];
#pragma unroll
            for (int i = 0; i < T::TM; ++i) a[i] = load_four(x + i * T::LM * T::PITCH + k);
#pragma unroll
            for (int j = 0; j < T::TN; ++j) {
                const Four b = load_four(w + j * T::LN * T::PITCH + k);
#pragma unroll
                for (int e = 0; e < 4; ++e)
#pragma unroll
                    for (int i = 0; i < T::TM; ++i) sum[i][j] = fmadd(a[i].v[e], b.v[e], sum[i][j]);
            }
        }
    }
};

}  // namespace rk
