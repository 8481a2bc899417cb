// attention.cuh: which rows of which sequence a block has, for the attention.cu of every room.
//
// A row here is a (token, query head) pair: the query heads of one key head lie side by side, token by token, so that they
// share the keys and values that a block reads, and a short sequence still fills its block.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "kernels.h"

namespace rk {

// What a block works on. In shared memory: threads have no registers left for it.
constexpr int WORK = 128;
template <class T>
struct Work {
    const T *k, *v;  // of the sequence's first key and the group's first head
    const T* q;      // where the query at that key's place would be
    T* out;
    int64_t q_token, q_head, k_token, v_token, out_token;
    int64_t left, right;
    unsigned group;  // query heads per key head
    int key;         // the sequence's first, among all
    int length;      // of the sequence's keys
    int token;       // of row 0: its place among the keys, below 0 if there are more queries than keys
    unsigned head;   // of row 0, within the group
    int rows;        // that exist; 0: nothing to do
    float scale, softcap;

    __device__ __forceinline__ int token_of(int r) const { return token + int((head + r) / group); }
    __device__ __forceinline__ unsigned head_of(int r) const { return (head + r) % group; }
    // the keys that token i sees; end is 0 where it sees none
    __device__ __forceinline__ int begin(int i) const { return left >= 0 && i > left ? i - int(left) : 0; }
    __device__ __forceinline__ int end(int i) const {
        return right >= 0 && right < length - 1 - i ? max(i + int(right) + 1, 0) : length;
    }
};

// One warp finds out which sequence, and which of its tiles of rows, this block has: 256 sequences per step, eight per lane,
// whose offsets are read at once. With thousands of sequences a block waits for B / 256 reads first. `rows` is a power of two,
// or ROWS, where the compiler has to know another number. Offsets are clamped: wrong ones lead to wrong rows, never outside the
// arrays.
constexpr int FOR_A_LANE = 8;
template <int ROWS = 0, class T>
__device__ __forceinline__ void find_work(const AttentionArgs& a, const PackedArgs& packed, int64_t kv_head, int rows,
                                          Work<T>& work) {
    const int lane = threadIdx.x, log_rows = 31 - __clz(rows);
    const auto tiles_of = [&](int64_t n) { return ROWS ? (n + ROWS - 1) / (ROWS ? ROWS : 1) : (n + rows - 1) >> log_rows; };
    const int64_t group = a.H / a.H_kv, B = packed.B, total = packed.total;
    int64_t wanted = blockIdx.x, begin = 0, length = 0, tile = 0, b = 0;
    bool mine = false;
    for (int64_t b0 = 0; b0 < B; b0 += LANES * FOR_A_LANE) {
        const int64_t first = b0 + lane * FOR_A_LANE;
        int64_t at[FOR_A_LANE + 1], tiles = 0;
#pragma unroll
        for (int i = 0; i <= FOR_A_LANE; ++i) at[i] = first + i <= B ? int64_t(packed.cu_seqlens[first + i]) : 0;
#pragma unroll
        for (int i = 0; i < FOR_A_LANE; ++i) {
            at[i] = min(max(at[i], int64_t(0)), total);
            tiles += tiles_of(max(min(at[i + 1], total) - at[i], int64_t(0)) * group);
        }
        int64_t up_to = tiles;
        for (int step = 1; step < LANES; step *= 2) {
            const int64_t other = __shfl_up_sync(WARP, up_to, step);
            if (lane >= step) up_to += other;
        }
        mine = up_to - tiles <= wanted && wanted < up_to;
        if (__any_sync(WARP, mine)) {
            tile = wanted - (up_to - tiles);
#pragma unroll
            for (int i = 0; i < FOR_A_LANE; ++i) {
                const int64_t n = max(min(at[i + 1], total) - at[i], int64_t(0));
                const int64_t its = tiles_of(n * group);
                if (tile >= 0 && tile < its) {
                    begin = at[i];
                    length = n;
                    b = first + i;
                    wanted = its - 1 - tile;  // the last tile first: under a causal mask it has the most to do
                }
                tile -= its;
            }
            break;
        }
        wanted -= __shfl_sync(WARP, up_to, LANES - 1);
    }
    if (lane == 0) work.rows = 0;
    __syncwarp();
    if (!mine) return;
    const auto clamped = [&](int64_t t) { return min(max(t, int64_t(0)), packed.total_k); };
    const int64_t k_begin = clamped(packed.keys_begin[b]), keys = max(clamped(packed.keys_end[b]) - k_begin, int64_t(0));
    // The queries are the last ones of their keys. Counted from the first key's place, here and in all pointers to queries and
    // outputs, they need no other count than keys.
    const int64_t row = wanted * rows, shift = keys - length;
    work.q = static_cast<const T*>(a.q) + (begin - shift) * a.q_token + kv_head * group * a.q_head;
    work.k = static_cast<const T*>(a.k) + k_begin * a.k_token + kv_head * a.k_head;
    work.v = static_cast<const T*>(a.v) + k_begin * a.v_token + kv_head * a.v_head;
    work.out = static_cast<T*>(a.out) + ((begin - shift) * a.H + kv_head * group) * a.D;
    work.q_token = a.q_token;
    work.q_head = a.q_head;
    work.k_token = a.k_token;
    work.v_token = a.v_token;
    work.out_token = a.H * a.D;
    work.left = a.left;
    work.right = a.right;
    work.group = unsigned(group);
    work.key = int(k_begin);
    work.length = int(keys);
    work.token = int(row / group + shift);
    work.head = unsigned(row % group);
    work.rows = int(min(int64_t(rows), length * group - row));
    work.scale = a.scale;
    work.softcap = a.softcap;
}

// A score with a softcap: each step is rounded once.
__device__ __forceinline__ float capped(float score, float softcap) { return tanh_of(score / softcap) * softcap; }

// This thread, read afresh: what is computed from it dies at once. Else the compiler computes it all beforehand and keeps it in
// registers, of which the inner loops leave none.
__device__ __forceinline__ int thread_now() {
    int t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

}  // namespace rk
