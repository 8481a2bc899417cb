// sparse_ffn.cu: a feed-forward layer with ReLU or one of its kin, gated or not, for few rows that reads little more than what
// active neurons need.
//
// 1. The pre-activations of `first`, for all neurons: linear.cu, or in mode tensor sm80/linear.cu. All else is one in both.
// 2. Which neurons are active? Their numbers and values side by side, ascending, for each row and each chunk of 512 neurons.
// 3. With a gate: dot products over the rows of up, for active neurons only; the chunks of 512 of K go to different blocks.
// 4. down: per row and chunk of 512 neurons one fma chain per column over the active neurons, ascending.
// 5. The chunks' sums, added in ascending order from +0; the bias; the residual; one rounding.
//
// Leaving out a zero term leaves every bit (NUMERICS.md, "sparse_ffn"). Nothing waits for the device: every launch has the
// grid of a row with all neurons active, and blocks that find no neuron to work on end at once.

#include "gemm.cuh"
#include "room.cuh"
#include "rows.cuh"

namespace rk {

// ---- 2. which neurons are active -----------------------------------------------------------------------------------------

// Chunk c of row m, at (m * chunks + c): how many of its neurons are active, and which, with which values.
struct Active {
    int* count;
    int* neuron;   // CHUNK of each chunk, of which `count` are meant
    float* value;  // likewise: act(up), or act(gate) before the product with up
};

// One block per chunk, one thread per neuron. What is not a number counts as active, as relu keeps it.
__global__ void __launch_bounds__(CHUNK)
    active_kernel(const float* first, const Firing firing, int64_t F, int64_t chunks, Active active) {
    __shared__ int counts[CHUNK / 32];
    const int64_t at = blockIdx.x, m = at / chunks, f = at % chunks * CHUNK + threadIdx.x;
    const bool asked = f < F && (!firing.candidates || firing.candidates[m * F + f]);
    const float value = asked ? fired_of(first[m * F + f], firing.threshold, firing.squared) : 0.0f;
    const bool is_active = !(value <= 0.0f);
    const unsigned votes = __ballot_sync(WARP, is_active);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int place = __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < warp; ++w) place += counts[w];
    if (is_active) {
        active.neuron[at * CHUNK + place] = int(f);
        active.value[at * CHUNK + place] = value;
    }
    if (threadIdx.x == CHUNK - 1) active.count[at] = place + is_active;
}

// ---- 3. up, for active neurons -------------------------------------------------------------------------------------------

// One row of x against 32 rows of up, a lane each.
using UpTile = Tile<1, 32, 32, 1, 1, 1, 4, 1>;

// sums[m][k chunk][c * CHUNK + i] = the sum over that chunk of K for the i-th active neuron of chunk c.
template <bool X_HALF, bool W_HALF>
__global__ void __launch_bounds__(UpTile::THREADS)
    up_kernel(const RowsArgs a, Rows x_rows, Rows up_rows, int64_t chunks, Active active, float* sums) {
    extern __shared__ float4 memory[];
    constexpr int BLOCKS = CHUNK / UpTile::BN;  // of a chunk with all neurons active
    const int64_t at = blockIdx.x / BLOCKS, m = at / chunks;
    const int begin = int(blockIdx.x % BLOCKS) * UpTile::BN, n = active.count[at] - begin;
    if (n <= 0) return;
    const int* neuron = active.neuron + at * CHUNK + begin;
    const auto x_row = [&](int) { return static_cast<const char*>(a.x.data) + m * x_rows.bytes; };
    const auto up_row = [&](int i) {
        return static_cast<const char*>(a.weight.data) + int64_t(neuron[i < n ? i : n - 1]) * up_rows.bytes;
    };
    const int64_t k_begin = int64_t(blockIdx.y) * CHUNK, k_end = k_begin + CHUNK < a.K ? k_begin + CHUNK : a.K;
    using UpDot = Dot<UpTile, X_HALF, W_HALF>;
    float total[1][1];
    UpDot::run(reinterpret_cast<char*>(memory), x_rows, x_row, up_rows, up_row, 1, n, k_begin, k_end, total);
    const int i = UpDot::first_column();
    if (i < n) sums[((m * gridDim.y + blockIdx.y) * chunks + at % chunks) * CHUNK + begin + i] = total[0][0];
}

// ---- 4. down, over active neurons ----------------------------------------------------------------------------------------

constexpr int AXPY_THREADS = 64;
constexpr int AXPY_ROWS = 4;  // rows of down in a stage of the ring
constexpr int AXPY_RING = 4;  // stages

// sums[m][c][column] over the active neurons of chunk c; a thread takes N columns. With a gate, up_sums are up_kernel's.
template <class T, int N>
__global__ void __launch_bounds__(AXPY_THREADS)
    axpy_kernel(const T* down, int64_t D, int64_t chunks, Active active, const float* up_sums, int64_t k_chunks,
                const Ref up_bias, bool up_relu, float* sums) {
    __shared__ float h[CHUNK];
    __shared__ int neuron[CHUNK];
    const int64_t at = blockIdx.x, m = at / chunks, c = at % chunks;
    const int n = active.count[at];
    for (int i = threadIdx.x; i < n; i += AXPY_THREADS) {
        float value = active.value[at * CHUNK + i];
        neuron[i] = active.neuron[at * CHUNK + i];
        if (up_sums) {
            float up = 0.0f;
            for (int64_t k = 0; k < k_chunks; ++k) up = up + up_sums[((m * k_chunks + k) * chunks + c) * CHUNK + i];
            if (up_bias.given) up = up + load_as(up_bias, neuron[i]);
            value = up_relu && up <= 0.0f ? 0.0f : value * up;
        }
        h[i] = value;
    }
    __syncthreads();
    const int64_t group = int64_t(blockIdx.y) * AXPY_THREADS + threadIdx.x, groups = D / N;
    if (group >= groups) return;
    down += group * N;
    float sum[N] = {};
    const auto add = [&](int i, const float (&w)[N]) {
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = fmadd(h[i], w[j], sum[j]);
    };
    if constexpr (N == 1) {
#pragma unroll 8
        for (int i = 0; i < n; ++i) {
            float w[1];
            load_group<1>(down + neuron[i] * D, w);
            add(i, w);
        }
    } else {
        __shared__ uint4 ring[AXPY_RING][AXPY_ROWS][AXPY_THREADS];  // a thread's own column of it: no barriers
        const auto start = [&](int stage) {
#pragma unroll
            for (int r = 0; r < AXPY_ROWS; ++r) {
                const int i = stage * AXPY_ROWS + r;
                if (i < n) copy_16(&ring[stage % AXPY_RING][r][threadIdx.x], down + neuron[i] * D);
            }
            commit_copies();
        };
        for (int stage = 0; stage < AXPY_RING - 1; ++stage) start(stage);
        for (int stage = 0; stage * AXPY_ROWS < n; ++stage) {
            wait_for_copies<AXPY_RING - 2>();
            start(stage + AXPY_RING - 1);
#pragma unroll
            for (int r = 0; r < AXPY_ROWS; ++r) {
                const int i = stage * AXPY_ROWS + r;
                if (i >= n) break;
                float w[N];
                widen_vector<T>(ring[stage % AXPY_RING][r][threadIdx.x], w);
                add(i, w);
            }
        }
    }
    store_group<N>(sums + (at * groups + group) * N, sum);
}

// ---- 5. the chunks' sums ---------------------------------------------------------------------------------------------------

constexpr int FINISH_THREADS = 128;

__global__ void __launch_bounds__(FINISH_THREADS)
    finish_kernel(const AxpyArgs a, int64_t M, int64_t chunks, const float* sums) {
    const int64_t i = int64_t(blockIdx.x) * FINISH_THREADS + threadIdx.x, m = i / a.D, d = i % a.D;
    if (m >= M) return;
    float y = 0.0f;
#pragma unroll 8
    for (int64_t c = 0; c < chunks; ++c) y = y + sums[(m * chunks + c) * a.D + d];
    if (a.down_bias.given) y = y + load_as(a.down_bias, d);
    if (a.residual.given) y = y + load_as(a.residual, i);
    store_as(a.out, i, y);
}

// ---- launcher ------------------------------------------------------------------------------------------------------------

static LinearArgs first_args(const SparseFfnArgs& a, float* out) {
    return {.x = a.x,
            .weight = a.first,
            .bias = a.first_bias,
            .residual = {},
            .out = {out, Dtype::F32},
            .M = a.M,
            .N = a.F,
            .K = a.K,
            .activation = NONE};
}

// The workspace, in float32 elements, every part at a multiple of 16 bytes. What linear needs is done with before the parts
// after `first` are written, and lies in the same place.
struct Workspace {
    int64_t chunks, k_chunks;
    int64_t count, neuron, value, up, sums, linear, size;
    Workspace(const SparseFfnArgs& a, bool tensor) : chunks(ceil_div(a.F, CHUNK)), k_chunks(ceil_div(a.K, CHUNK)) {
        const auto after = [](int64_t begin, int64_t n) { return begin + (n + 3) / 4 * 4; };
        const int64_t neurons = a.M * chunks * CHUNK;
        linear = count = after(0, a.M * a.F);  // `first` itself begins at 0
        neuron = after(count, a.M * chunks);
        value = after(neuron, neurons);
        up = after(value, neurons);
        sums = after(up, a.up.given ? k_chunks * neurons : 0);
        const int64_t end = after(sums, a.M * chunks * a.D);
        const int64_t linear_end = linear + (tensor ? 0 : linear_workspace(first_args(a, nullptr), 1));
        size = end > linear_end ? end : linear_end;
    }
};

int64_t sparse_ffn_workspace(const SparseFfnArgs& a, bool tensor) { return Workspace(a, tensor).size; }

template <bool X_HALF, bool W_HALF>
static void launch_up(const SparseFfnArgs& a, const Workspace& w, const Active& active, float* sums, Stream stream) {
    const RowsArgs up{.x = a.x, .weight = a.up, .bias = a.up_bias, .K = a.K};
    const dim3 grid(checked_blocks("sparse_ffn", a.M * w.chunks * (CHUNK / UpTile::BN)), unsigned(w.k_chunks));
    launch("sparse_ffn", up_kernel<X_HALF, W_HALF>, grid, UpTile::THREADS, Dot<UpTile, X_HALF, W_HALF>::BYTES, stream, up,
           rows_of(a.x, a.K), rows_of(a.up, a.K), w.chunks, active, sums);
}

template <class T>
static void launch_axpy(const SparseFfnArgs& a, const Workspace& w, const Active& active, const float* up, float* sums,
                        Stream stream) {
    const bool vectors = a.D % VECTOR<T> == 0 && aligned(a.down.data, 16);
    const int64_t columns = AXPY_THREADS * (vectors ? VECTOR<T> : 1);
    launch("sparse_ffn", vectors ? axpy_kernel<T, VECTOR<T>> : axpy_kernel<T, 1>,
           dim3(checked_blocks("sparse_ffn", a.M * w.chunks), unsigned(ceil_div(a.D, columns))), AXPY_THREADS, 0, stream,
           static_cast<const T*>(a.down.data), a.D, w.chunks, active, up, w.k_chunks, a.up_bias, a.firing.up_relu, sums);
}

void sparse_ffn(const SparseFfnArgs& a, bool tensor, float* workspace, Stream stream) {
    const Workspace w(a, tensor);
    float *const first = workspace, *const sums = workspace + w.sums, *const up = a.up.given ? workspace + w.up : nullptr;
    if (tensor) linear_tensor("sparse_ffn", first_args(a, first), 1, stream);
    else linear("sparse_ffn", first_args(a, first), 1, workspace + w.linear, stream);
    const Active active{reinterpret_cast<int*>(workspace + w.count), reinterpret_cast<int*>(workspace + w.neuron),
                        workspace + w.value};
    launch("sparse_ffn", active_kernel, checked_blocks("sparse_ffn", a.M * w.chunks), CHUNK, 0, stream, first, a.firing, a.F,
           w.chunks, active);
    if (a.up.given) {
        const bool x_half = a.x.dtype != Dtype::F32, up_half = a.up.dtype != Dtype::F32;
        const auto up_launcher = x_half    ? up_half ? launch_up<true, true> : launch_up<true, false>
                                 : up_half ? launch_up<false, true>
                                           : launch_up<false, false>;
        up_launcher(a, w, active, up, stream);
    }
    if (a.down.dtype == Dtype::F32) launch_axpy<float>(a, w, active, up, sums, stream);
    else if (a.down.dtype == Dtype::F16) launch_axpy<f16>(a, w, active, up, sums, stream);
    else launch_axpy<bf16>(a, w, active, up, sums, stream);
    const AxpyArgs down{.down = a.down, .down_bias = a.down_bias, .residual = a.residual, .out = a.out, .D = a.D};
    launch("sparse_ffn", finish_kernel, checked_blocks("sparse_ffn", ceil_div(a.M * a.D, FINISH_THREADS)), FINISH_THREADS, 0,
           stream, down, a.M, w.chunks, sums);
}

}  // namespace rk
