// softmax.cu: softmax and row sums over the last dimension of [R, D].
// softmax: exact maximum; e = exp(x - max); sum by row_sum; e / sum. Order as NUMERICS.md, "softmax" and "sum, mean".
//
// softmax: a warp or a block takes a row, which is read once and waits in shared memory, first as x, then as e. A row that does
// not fit (D above some 25,000) is read three times, its exponentials pass through shared memory on their way to the sum.
// row_sum: a warp takes a row, which may be as long as a whole tensor: it runs through a ring of copies ahead of the sum.

#include "room.cuh"
#include "rows.cuh"

namespace rk {

constexpr float MINUS_INFINITY = -__builtin_inff();

// ---- softmax, a row in shared memory ---------------------------------------------------------------------------------------

template <class T, int WARPS, int N>
__device__ __forceinline__ void softmax_row(const T* x, T* y, int D, float* row, float* slots) {
    const int first = rank_in_team<WARPS>(), groups = D / N;
    float max = MINUS_INFINITY;
#pragma unroll 4
    for (int g = first; g < groups; g += 32 * WARPS) {
        float v[N];
        load_group<N>(x + g * N, v);
        put_group<N>(row, g, v);
#pragma unroll
        for (int j = 0; j < N; ++j) max = max < v[j] ? v[j] : max;
    }
    max = team_max<WARPS>(max, slots);
    for (int g = first; g < groups; g += 32 * WARPS) {
        float v[N];
        get_group<N>(row, g, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = exp_of_negative(v[j] - max);
        put_group<N>(row, g, v);
    }
    team_barrier<WARPS>();
    const float sum = team_row_sum<WARPS>(D, slots + WARPS, [&](float s, int64_t i) { return s + row[i]; });
    for (int g = first; g < groups; g += 32 * WARPS) {
        float v[N];
        get_group<N>(row, g, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = v[j] / sum;
        store_group<N>(y + g * N, v);
    }
}

// `stride`: floats from one row to the next in shared memory. `vectors`: both addresses and D allow accesses of 16 bytes.
template <class T, int WARPS>
__global__ void __launch_bounds__(32 * TEAM_WARPS)
    softmax_kernel(const T* x, T* y, int64_t rows, int64_t D, int stride, bool vectors) {
    extern __shared__ float4 memory[];
    float* const shared = reinterpret_cast<float*>(memory);
    const int team = WARPS == 1 ? int(threadIdx.x / 32) : 0, teams = WARPS == 1 ? int(blockDim.x / 32) : 1;
    const int64_t r = int64_t(blockIdx.x) * teams + team;
    if (r >= rows) return;
    float *row = shared + team * stride, *slots = shared + stride;
    if (vectors) softmax_row<T, WARPS, VECTOR<T>>(x + r * D, y + r * D, int(D), row, slots);
    else softmax_row<T, WARPS, 1>(x + r * D, y + r * D, int(D), row, slots);
}

// ---- softmax, any D ------------------------------------------------------------------------------------------------------

constexpr int LONG_WARPS = 16;
constexpr int LONG_TILE = 8192;  // elements; a multiple of 32, so that a lane's chain goes on from tile to tile

// One block a row. While the first warp adds up one tile of exponentials, the others are at the next.
template <class T, int N>
__global__ void __launch_bounds__(32 * LONG_WARPS) softmax_long_kernel(const T* x, T* y, int64_t D) {
    extern __shared__ float4 memory[];
    float* const tiles = reinterpret_cast<float*>(memory);  // two tiles, then LONG_WARPS + 1 slots
    float* const slots = tiles + 2 * LONG_TILE;
    const int step = 32 * LONG_WARPS * N;
    x += int64_t(blockIdx.x) * D;
    y += int64_t(blockIdx.x) * D;
    float max = MINUS_INFINITY;
#pragma unroll 4
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += step) {
        float v[N];
        load_group<N>(x + i, v);
#pragma unroll
        for (int j = 0; j < N; ++j) max = max < v[j] ? v[j] : max;
    }
    max = team_max<LONG_WARPS>(max, slots);
    float sum = 0.0f;
    for (int64_t begin = 0; begin < D; begin += LONG_TILE) {
        float* tile = tiles + begin / LONG_TILE % 2 * LONG_TILE;
        const int n = int(D - begin < LONG_TILE ? D - begin : LONG_TILE);
#pragma unroll 2
        for (int g = threadIdx.x; g < n / N; g += 32 * LONG_WARPS) {
            float v[N];
            load_group<N>(x + begin + g * N, v);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = exp_of_negative(v[j] - max);
            put_group<N>(tile, g, v);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
#pragma unroll 8
            for (int i = threadIdx.x; i < n; i += LANES) sum = sum + tile[i];
        }
    }
    if (threadIdx.x < 32) {
        sum = fold_lanes(sum);
        if (threadIdx.x == 0) slots[LONG_WARPS] = sum;
    }
    __syncthreads();
    sum = slots[LONG_WARPS];
#pragma unroll 2
    for (int64_t i = int64_t(threadIdx.x) * N; i < D; i += step) {
        float v[N];
        load_group<N>(x + i, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = exp_of_negative(v[j] - max) / sum;
        store_group<N>(y + i, v);
    }
}

// ---- row_sum ---------------------------------------------------------------------------------------------------------------

constexpr int RING = 8;  // stages

// `stage`: bytes, a multiple of 512, so that every stage begins with lane 0's element. `vectors`: x and D allow copies of 16
// bytes; else each lane loads its elements itself.
template <class T>
__global__ void __launch_bounds__(128)
    row_sum_kernel(const T* x, T* y, int64_t rows, int64_t D, bool mean, int stage, bool vectors) {
    extern __shared__ float4 memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t r = int64_t(blockIdx.x) * (blockDim.x / 32) + warp;
    if (r >= rows) return;
    x += r * D;
    float sum = 0.0f;
    if (vectors) {
        char* const ring = reinterpret_cast<char*>(memory) + warp * RING * stage;
        const int64_t bytes = D * int64_t(sizeof(T));
        const int stages = int((bytes + stage - 1) / stage), per_stage = stage / int(sizeof(T));
        const auto start = [&](int s) {
            const int64_t begin = int64_t(s) * stage;
            const int n = int(bytes - begin < stage ? bytes - begin : stage);
            for (int at = lane * 16; at < n; at += 32 * 16)
                copy_16(ring + s % RING * stage + at, reinterpret_cast<const char*>(x) + begin + at);
        };
        for (int s = 0; s < RING - 1; ++s) {
            if (s < stages) start(s);
            commit_copies();
        }
        for (int s = 0; s < stages; ++s) {
            wait_for_copies<RING - 2>();
            __syncwarp();  // stage s is there for all lanes, and all have read the stage before it
            if (s + RING - 1 < stages) start(s + RING - 1);
            commit_copies();
            const T* from = reinterpret_cast<const T*>(ring + s % RING * stage);
            const int64_t left = D - int64_t(s) * per_stage;
            const int n = int(left < per_stage ? left : per_stage);
#pragma unroll 8
            for (int i = lane; i < n; i += LANES) sum = sum + widen(from[i]);
        }
    } else {
#pragma unroll 8
        for (int64_t i = lane; i < D; i += LANES) {
            float v[1];
            load_group<1>(x + i, v);
            sum = sum + v[0];
        }
    }
    sum = fold_lanes(sum);
    if (lane == 0) y[r] = narrow<T>(mean ? sum / float(D) : sum);
}

// ---- launchers -----------------------------------------------------------------------------------------------------------

static Choice softmax_choice("softmax", 2);
static Choice row_sum_choice("row_sum", 2);

template <class T>
static void softmax_of(const T* x, T* y, int64_t rows, int64_t D, Stream stream) {
    const bool vectors = D % VECTOR<T> == 0 && aligned(x, 16) && aligned(y, 16);
    if (!row_fits(D))
        return launch("softmax", vectors ? softmax_long_kernel<T, VECTOR<T>> : softmax_long_kernel<T, 1>,
                      checked_blocks("softmax", rows), 32 * LONG_WARPS, 4 * (2 * LONG_TILE + LONG_WARPS + 1), stream, x, y, D);
    const int way = softmax_choice.take(row_way(rows, D));
    const RowLaunch shape = row_launch(way, rows, D);
    launch("softmax", way == BLOCK_A_ROW ? softmax_kernel<T, TEAM_WARPS> : softmax_kernel<T, 1>,
           checked_blocks("softmax", shape.blocks), shape.threads, size_t(shape.shared), stream, x, y, rows, D,
           int(row_stride(D)), vectors);
}

void softmax(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, Stream stream) {
    if (dtype == Dtype::F32) return softmax_of(static_cast<const float*>(x), static_cast<float*>(y), rows, D, stream);
    if (dtype == Dtype::F16) return softmax_of(static_cast<const f16*>(x), static_cast<f16*>(y), rows, D, stream);
    softmax_of(static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, D, stream);
}

template <class T>
static void row_sum_of(const T* x, T* y, int64_t rows, int64_t D, bool mean, Stream stream) {
    // 0: four warps per block with 3.5 KB ahead of each; 1: a long row, one warp per block with 56 KB ahead of it
    const int way = row_sum_choice.take(D * int64_t(sizeof(T)) >= 64 * 1024), stage = way ? 8192 : 512, warps = way ? 1 : 4;
    const bool vectors = D % VECTOR<T> == 0 && aligned(x, 16);
    launch("row_sum", row_sum_kernel<T>, checked_blocks("row_sum", ceil_div(rows, warps)), 32 * warps,
           vectors ? size_t(warps * RING * stage) : 0, stream, x, y, rows, D, mean, stage, vectors);
}

void row_sum(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, bool mean, Stream stream) {
    if (dtype == Dtype::F32) return row_sum_of(static_cast<const float*>(x), static_cast<float*>(y), rows, D, mean, stream);
    if (dtype == Dtype::F16) return row_sum_of(static_cast<const f16*>(x), static_cast<f16*>(y), rows, D, mean, stream);
    row_sum_of(static_cast<const bf16*>(x), static_cast<bf16*>(y), rows, D, mean, stream);
}

}  // namespace rk
