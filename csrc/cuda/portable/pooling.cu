// pooling.cu: pool and the end of score_head. mean: one ascending chain per feature over the sequence's tokens, then IEEE
// division (NUMERICS.md, "pool"). cls is the mean of the first token alone; a sequence of no tokens gives +0.
//
// A block takes 128 bytes' worth of features of one sequence, so that even one sequence of 768 features keeps 24 blocks busy.
// All threads copy tokens ahead into a ring in shared memory; one thread a feature adds.

#include "../device.cuh"
#include "room.cuh"

namespace rk {

constexpr int SLICE = 128;       // bytes of a token that a block takes
constexpr int POOL_TOKENS = 64;  // of a stage of the ring
constexpr int POOL_STAGES = 3;
constexpr int POOL_THREADS = 128;

// `vectors`: x and D allow copies of 16 bytes; else the threads that add load for themselves.
template <class T>
__global__ void __launch_bounds__(POOL_THREADS)
    pool_kernel(const T* x, const int32_t* cu_seqlens, int64_t total, int64_t D, bool mean, void* y, Dtype to, bool vectors) {
    constexpr int FEATURES = SLICE / int(sizeof(T)), PARTS = SLICE / 16, PART = 16 / int(sizeof(T));
    __shared__ alignas(16) T ring[POOL_STAGES][POOL_TOKENS][FEATURES];
    const int64_t slices = (D + FEATURES - 1) / FEATURES, b = blockIdx.x / slices, first = blockIdx.x % slices * FEATURES;
    const auto clamped = [&](int64_t t) { return t < 0 ? 0 : t < total ? t : total; };
    const int64_t begin = clamped(cu_seqlens[b]), stop = clamped(cu_seqlens[b + 1]);
    const int64_t count = stop <= begin ? 0 : mean ? stop - begin : 1;
    const int64_t feature = first + threadIdx.x;
    const bool adds = threadIdx.x < FEATURES && feature < D;
    x += begin * D;
    float sum = 0.0f;
    if (vectors) {
        const int stages = int((count + POOL_TOKENS - 1) / POOL_TOKENS);
        const int part = threadIdx.x % PARTS;
        const bool copies = first + part * PART < D;
        const auto start = [&](int s) {
#pragma unroll
            for (int i = threadIdx.x / PARTS; i < POOL_TOKENS; i += POOL_THREADS / PARTS) {
                const int64_t t = int64_t(s) * POOL_TOKENS + i;
                if (copies && t < count) copy_16(&ring[s % POOL_STAGES][i][part * PART], x + t * D + first + part * PART);
            }
        };
        for (int s = 0; s < POOL_STAGES - 1; ++s) {
            if (s < stages) start(s);
            commit_copies();
        }
        for (int s = 0; s < stages; ++s) {
            wait_for_copies<POOL_STAGES - 2>();
            __syncthreads();  // stage s is there for all, and all have read the stage before it
            if (s + POOL_STAGES - 1 < stages) start(s + POOL_STAGES - 1);
            commit_copies();
            const int64_t left = count - int64_t(s) * POOL_TOKENS;
            const int n = int(left < POOL_TOKENS ? left : POOL_TOKENS);
            if (adds) {
#pragma unroll 8
                for (int i = 0; i < n; ++i) sum = sum + widen(ring[s % POOL_STAGES][i][threadIdx.x]);
            }
        }
    } else if (adds) {
#pragma unroll 8
        for (int64_t t = 0; t < count; ++t) sum = sum + widen(x[t * D + feature]);
    }
    if (adds) store_as(to, y, b * D + feature, count > 0 ? sum / float(count) : 0.0f);
}

__global__ void score_kernel(const float* logit, int64_t n, float* score, float* complement) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float z = logit[i];
    score[i] = sigmoid_of(z);
    complement[i] = sigmoid_of(0.0f - z);
}

// ---- launchers -----------------------------------------------------------------------------------------------------------

template <class T>
static void pool_of(const T* x, const int32_t* cu_seqlens, int64_t B, int64_t total, int64_t D, bool mean, void* y, Dtype to,
                    Stream stream) {
    const bool vectors = D * int64_t(sizeof(T)) % 16 == 0 && aligned(x, 16);
    launch("pool", pool_kernel<T>, checked_blocks("pool", B * ceil_div(D * int64_t(sizeof(T)), SLICE)), POOL_THREADS, 0, stream,
           x, cu_seqlens, total, D, mean, y, to, vectors);
}

void pool(const void* x, Dtype from, const int32_t* cu_seqlens, int64_t B, int64_t total, int64_t D, bool mean, void* y,
          Dtype to, Stream stream) {
    if (from == Dtype::F32) return pool_of(static_cast<const float*>(x), cu_seqlens, B, total, D, mean, y, to, stream);
    if (from == Dtype::F16) return pool_of(static_cast<const f16*>(x), cu_seqlens, B, total, D, mean, y, to, stream);
    pool_of(static_cast<const bf16*>(x), cu_seqlens, B, total, D, mean, y, to, stream);
}

void score(const float* logit, int64_t n, float* score, float* complement, Stream stream) {
    launch("score_head", score_kernel, checked_blocks("score_head", ceil_div(n, 128)), 128, 0, stream, logit, n, score,
           complement);
}

}  // namespace rk
