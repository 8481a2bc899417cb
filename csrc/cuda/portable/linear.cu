// linear.cu: y[m, n] = act(dot(x[m], w[n]) + bias[n]) + residual[m, n], and activations alone. x [M, K] and w [N, K] as
// nn.Linear has it, any mix of dtypes, every shape; of bmm, several such products, whose tiles are blocks of one grid.
//
// Order: gemm.cuh's for dot, in gemm_large.cuh too, epilogue.cuh's for the rest.
//
// Ways: tiles from 128 x 128 outputs per block, for many rows, to 8 x 16, for a query's single row or a head's single column,
// where weights stream through and latency counts. Each whole, or split: a block per chunk of 512 along K, whose sums go to
// the workspace [chunks, batches M, N]; a second kernel adds them in the same ascending order. So no way can reach the bits,
// and the cheapest may be chosen by shape.

#include <algorithm>

#include "../epilogue.cuh"
#include "gemm.cuh"
#include "gemm_large.cuh"
#include "room.cuh"

namespace rk {

// What a kernel must know besides the arguments. Computed on the host.
struct LinearSetup {
    Rows x, w;
    int64_t row_tiles, column_tiles;
    bool four;    // outputs can be handled four at a time: N and every address in the epilogue allow it
    float* sums;  // split: [chunks, batches M, N]
    int64_t chunks, batches;
};

// The outputs of a block of T::BM x T::BN, and its part of K.
struct Part {
    int64_t m, n, chunk;  // first row of all outputs, first column
    int rows, columns;
    int64_t k_begin, k_end;
    const char *x, *w;

    // Where row r of an operand begins; past the end, the last row that exists.
    __device__ __forceinline__ const char* x_row(const LinearSetup& setup, int r) const {
        return x + (r < rows ? r : rows - 1) * setup.x.bytes;
    }
    __device__ __forceinline__ const char* w_row(const LinearSetup& setup, int r) const {
        return w + (r < columns ? r : columns - 1) * setup.w.bytes;
    }
};
template <class T>
__device__ __forceinline__ Part part_of(const LinearArgs& g, const LinearSetup& setup) {
    // Blocks that run together share rows and weights: bands of 8 row tiles, down each band column by column.
    const int64_t tiles = setup.row_tiles * setup.column_tiles, tile = blockIdx.x % tiles;
    const int64_t batch = blockIdx.x / tiles % setup.batches, chunk = blockIdx.x / tiles / setup.batches;
    const int64_t band = tile / (8 * setup.column_tiles) * 8;
    const int64_t height = setup.row_tiles - band < 8 ? setup.row_tiles - band : 8, inside = tile - band * setup.column_tiles;
    const int64_t m0 = (band + inside % height) * T::BM, n0 = inside / height * T::BN, k = chunk * CHUNK;
    Part part;
    part.m = batch * g.M + m0;
    part.n = n0;
    part.chunk = chunk;
    part.rows = g.M - m0 < T::BM ? int(g.M - m0) : T::BM;
    part.columns = g.N - n0 < T::BN ? int(g.N - n0) : T::BN;
    part.k_begin = k;
    part.k_end = setup.sums && g.K - k > CHUNK ? k + CHUNK : g.K;
    part.x = static_cast<const char*>(g.x.data) + part.m * setup.x.bytes;
    part.w = static_cast<const char*>(g.weight.data) + (batch * g.N + n0) * setup.w.bytes;
    return part;
}

// The end of four neighbours of row r from column c on: the epilogue, or of a split the workspace.
__device__ __forceinline__ void leave(const LinearArgs& g, const LinearSetup& setup, const Part& part, int r, int c,
                                      Four sums) {
    if (r >= part.rows || c >= part.columns) return;
    Four y[1] = {sums};
    if (!setup.sums) return finish(g, setup.four, part.m + r, part.n + c, y);
    float* to = setup.sums + (part.chunk * setup.batches * g.M + part.m + r) * g.N + part.n + c;
    if (setup.four) store_four(to, y[0]);
    else
        for (int e = 0; e < 4; ++e)
            if (c + e < part.columns) to[e] = y[0].v[e];
}

// The tile of sums waits in shared memory for the epilogue, so that neighbours in a row are stored by neighbouring threads and
// the element functions stand in the code once. 8 more floats a row: a warp's four rows of eight then fill all banks.
template <class T>
constexpr int sums_pitch = T::BN + 8;

template <class T, bool X_HALF, bool W_HALF>
constexpr int linear_shared = std::max(Dot<T, X_HALF, W_HALF>::BYTES, T::BM* sums_pitch<T> * 4);

template <class T, bool X_HALF, bool W_HALF>
__global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS) linear_tile(const LinearArgs g, const LinearSetup setup) {
    extern __shared__ __align__(16) char shared[];
    const Part part = part_of<T>(g, setup);
    const auto x_row = [&](int r) { return part.x_row(setup, r); };
    const auto w_row = [&](int r) { return part.w_row(setup, r); };
    using D = Dot<T, X_HALF, W_HALF>;
    float total[T::TM][T::TN];
    D::run(shared, setup.x, x_row, setup.w, w_row, part.rows, part.columns, part.k_begin, part.k_end, total);

    __syncthreads();
    constexpr int pitch = sums_pitch<T>;
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < T::TM; ++i)
#pragma unroll
        for (int j = 0; j < T::TN; ++j)
            sums[(D::first_row() + i * T::LM) * pitch + D::first_column() + j * T::LN] = total[i][j];
    __syncthreads();
#pragma unroll 1
    for (int i = int(threadIdx.x) * 4; i < T::BM * T::BN; i += T::THREADS * 4)
        leave(g, setup, part, i / T::BN, i % T::BN, load_four(sums + i / T::BN * pitch + i % T::BN));
}

template <class T, bool X_HALF, bool W_HALF>
__global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS) linear_large_tile(const LinearArgs g, const LinearSetup setup) {
    extern __shared__ __align__(16) char shared[];
    using D = LargeDot<T, X_HALF, W_HALF>;
    {
        const Part part = part_of<T>(g, setup);
        const auto x_row = [&](int r) { return part.x_row(setup, r); };
        const auto w_row = [&](int r) { return part.w_row(setup, r); };
        D::run(shared, setup.x, x_row, setup.w, w_row, part.k_begin, part.k_end);
    }
    const Part part = part_of<T>(g, setup);  // afresh: the loop leaves no registers to keep it in
#pragma unroll 1
    for (int i = 0; i < D::GROUPS; ++i)
        leave(g, setup, part, D::first_row() + D::row_of(i), D::first_column() + D::column_of(i),
              load_four(D::totals(shared, i)));
}

// The end of a split: the chunks' sums, added ascending from +0, four neighbours a thread.
__global__ void linear_add_chunks(const LinearArgs g, const LinearSetup setup) {
    const int64_t across = (g.N + 3) / 4, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, rows = setup.batches * g.M;
    if (i >= rows * across) return;
    const int64_t m = i / across, n = i % across * 4;
    Four total[1] = {};
    for (int64_t chunk = 0; chunk < setup.chunks; ++chunk) {
        const float* sums = setup.sums + (chunk * rows + m) * g.N + n;
        Four s = {};
        if (setup.four) s = load_four(sums);
        else
            for (int e = 0; e < 4; ++e)
                if (n + e < g.N) s.v[e] = sums[e];
        for (int e = 0; e < 4; ++e) total[0].v[e] = total[0].v[e] + s.v[e];
    }
    finish(g, setup.four, m, n, total);
}

// ---- launchers

using Tile128x128 = LargeTile<128, 128, 16, 2>;
using Tile128x64 = Tile<128, 64, 16, 8, 8, 4, 3, 2>;
using Tile64x64 = Tile<64, 64, 16, 4, 8, 8, 3, 3>;
using Tile32x32 = Tile<32, 32, 32, 4, 4, 4, 2, 8>;
using Tile8x16 = Tile<8, 16, 64, 1, 1, 2, 4, 7>;

// Of a tile: its size, how many blocks of it a multiprocessor holds, and nanoseconds per step along k of a block that is
// alone there and of as many as it holds. Measured on an H100 in float32 (half precision: up to a third more); the first tile's
// are an estimate from its machine code, never measured, on the scale of the others. Only for speed.
struct Cost {
    int64_t rows, columns, resident;
    double alone, full;
};
constexpr Cost COSTS[] = {
    {128, 128, 2, 98, 169}, {128, 64, 2, 69, 119}, {64, 64, 3, 40, 97}, {32, 32, 8, 25, 65}, {8, 16, 7, 8, 22}};
constexpr int TILES = 5;

static Choice linear_choice("linear", 2 * TILES);  // way = 2 * tile + split

// A pure function of the shape: the way with the least estimated time on an H100, whatever chip it is.
static int linear_way(const LinearArgs& g, int64_t batches) {
    constexpr int64_t processors = 132;
    constexpr double second_kernel = 3000, bytes_a_nanosecond = 2500;
    const int64_t chunks = ceil_div(g.K, CHUNK);
    int best = 0;
    double least = 0;
    for (int way = 0; way < 2 * TILES; ++way) {
        const bool split = way % 2;
        if (split && chunks == 1) continue;
        const Cost& c = COSTS[way / 2];
        const int64_t blocks = batches * ceil_div(g.M, c.rows) * ceil_div(g.N, c.columns) * (split ? chunks : 1);
        const int64_t each = ceil_div(blocks, processors), at_once = c.resident * processors;
        double step = c.alone;  // of all blocks
        if (each <= c.resident) {
            if (each > 1) step += (c.full - c.alone) * double(each - 1) / double(c.resident - 1);
        } else {  // waves; the later ones do not begin together, so that a last one that is nearly empty costs little
            const double waves = double(blocks) / double(at_once);
            step = std::min(c.full * waves + c.alone, c.full * double(ceil_div(blocks, at_once)));
        }
        double time = double(split ? CHUNK : g.K) * step;
        if (split) time += second_kernel + double(batches * g.M * g.N) * double(chunks) * 8 / bytes_a_nanosecond;
        if (way == 0 || time < least) least = time, best = way;
    }
    return best;
}

int64_t linear_workspace(const LinearArgs& g, int64_t batches) {
    const int64_t chunks = ceil_div(g.K, CHUNK);
    return linear_choice.take(linear_way(g, batches)) % 2 && chunks > 1 ? chunks * batches * g.M * g.N : 0;
}

template <class T>
static void start_tile(const char* op, const LinearArgs& g, LinearSetup setup, Stream stream) {
    setup.row_tiles = ceil_div(g.M, T::BM);
    setup.column_tiles = ceil_div(g.N, T::BN);
    const int64_t tiles = setup.batches * setup.row_tiles * setup.column_tiles;
    const dim3 grid(checked_blocks(op, tiles * (setup.sums ? setup.chunks : 1)));
    auto start = [&](auto x_half, auto w_half) {
        constexpr bool X_HALF = decltype(x_half)::value, W_HALF = decltype(w_half)::value;
        if constexpr (LARGE<T>)
            launch(op, linear_large_tile<T, X_HALF, W_HALF>, grid, T::THREADS, LargeDot<T, X_HALF, W_HALF>::BYTES, stream, g,
                   setup);
        else launch(op, linear_tile<T, X_HALF, W_HALF>, grid, T::THREADS, linear_shared<T, X_HALF, W_HALF>, stream, g, setup);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    const bool w_half = g.weight.dtype != Dtype::F32;
    if (g.x.dtype == Dtype::F32) w_half ? start(No(), Yes()) : start(No(), No());
    else w_half ? start(Yes(), Yes()) : start(Yes(), No());
}

void linear(const char* op, const LinearArgs& g, int64_t batches, float* workspace, Stream stream) {
    if (g.M == 0 || batches == 0) return;
    const int way = linear_choice.take(linear_way(g, batches));
    LinearSetup setup{};
    setup.batches = batches;
    setup.x = rows_of(g.x, g.K);
    setup.w = rows_of(g.weight, g.K);
    setup.chunks = ceil_div(g.K, CHUNK);
    setup.sums = way % 2 && setup.chunks > 1 ? workspace : nullptr;
    setup.four = in_groups_of(4, g) && aligned(workspace, 16);
    switch (way / 2) {
        case 0: start_tile<Tile128x128>(op, g, setup, stream); break;
        case 1: start_tile<Tile128x64>(op, g, setup, stream); break;
        case 2: start_tile<Tile64x64>(op, g, setup, stream); break;
        case 3: start_tile<Tile32x32>(op, g, setup, stream); break;
        default: start_tile<Tile8x16>(op, g, setup, stream);
    }
    if (!setup.sums) return;
    const dim3 grid(checked_blocks(op, ceil_div(batches * g.M * ceil_div(g.N, 4), 128)));
    launch(op, linear_add_chunks, grid, 128, 0, stream, g, setup);
}

// ---- activation, times `up` where it is there: 8 neighbours per thread, 16 bytes per access where the addresses allow it

__global__ void activate_all(int kind, const Ref x, const Ref up, const Out y, int64_t n, bool wide) {
    const int64_t step = int64_t(gridDim.x) * blockDim.x * 8;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < n; i += step) {
        const bool whole = wide && n - i >= 8;
        const auto load_eight = [&](const Ref& from, Four(&v)[2]) {
            if (whole) return load_group_as(from.dtype, from.data, i, v);
            for (int e = 0; e < 8; ++e)
                if (i + e < n) v[e / 4].v[e % 4] = load_as(from, i + e);
        };
        Four v[2] = {}, u[2] = {};
        load_eight(x, v);
        v[0] = activate_four(kind, v[0]);
        v[1] = activate_four(kind, v[1]);
        if (up.given) {
            load_eight(up, u);
            for (int e = 0; e < 8; ++e) v[e / 4].v[e % 4] = v[e / 4].v[e % 4] * u[e / 4].v[e % 4];
        }
        if (whole) store_group_as(y.dtype, y.data, i, v);
        else
            for (int e = 0; e < 8; ++e)
                if (i + e < n) store_as(y, i + e, v[e / 4].v[e % 4]);
    }
}

void activation(int kind, const Ref& x, const Ref& up, const Out& y, int64_t n, Stream stream) {
    const bool wide = aligned(x.data, 16) && aligned(up.data, 16) && aligned(y.data, 16);
    const int64_t blocks = std::min<int64_t>(ceil_div(n, 8 * 256), 1 << 16);
    launch("activation", activate_all, dim3(unsigned(blocks)), 256, 0, stream, kind, x, up, y, n, wide);
}

}  // namespace rk
