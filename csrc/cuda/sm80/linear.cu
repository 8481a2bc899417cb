// sm80/linear.cu: linear and bmm in mode "tensor": y[m, n] = act(dot_tensor(x[m], w[n]) + bias[n]) + residual[m, n], x [M, K]
// and w [N, K] half precision of one dtype, every shape, M = 1 and odd addresses included.
//
// Order: one accumulator per output, one mma for every 16 k, ascending, from +0; what is missing in the last one is zeros on
// both sides, and none is issued beyond it. Then epilogue.cuh's, with gelu's short form for a half result. Blocks, warps and
// lanes split outputs only, K never.
//
// How: a block computes BM x BN outputs, a warp WM x WN of them. BK values of k of each of the BM + BN rows are a stage;
// several stages are on their way into shared memory (cp.async) while one is computed, and a warp's fragments for the next 16 k
// are loaded while those before are multiplied. The tile of sums then passes through the same memory, some rows at a time, so
// that neighbours in a row are stored by one thread.
//
// Ways: tiles from 128 x 256 outputs, for many rows, to 16 x 32, where the weights stream through. The tile is in no output's
// expression, so the cheapest may be chosen by shape.

#include <algorithm>
#include <utility>

#include "../epilogue.cuh"
#include "room.cuh"
#include "mma.cuh"

namespace rk {

template <int BM_, int BN_, int BK_, int WM_, int WN_, int STAGES_, int MIN_BLOCKS_>
struct TensorTile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, WM = WM_, WN = WN_, STAGES = STAGES_;
    static constexpr int WARPS_M = BM / WM, WARPS_N = BN / WN, THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int MIN_BLOCKS = MIN_BLOCKS_;
    static constexpr int TM = WM / 16, TN = WN / 8;        // a warp's mma, side by side
    static constexpr int STEPS = BK / STEP, ROW = BK * 2;  // of a stage; bytes of a row in it
    static constexpr int STAGE = (BM + BN) * ROW, SHARED = STAGES * STAGE;
    // the epilogue: sums PITCH floats a row, so that a warp's four rows of eight fill all banks; PASS of a warp's TM at a time
    static constexpr int PITCH = BN + 8;
    static constexpr int pass() {
        int n = TM;
        while (n * 16 * WARPS_M * PITCH * 4 > SHARED) n /= 2;
        return n;
    }
    static constexpr int PASS = pass();
    static_assert(BM % WM == 0 && BN % WN == 0 && STEPS % 2 == 0 && STAGES >= 3 && (TN == 1 || TN % 2 == 0) && PASS > 0);
    static_assert(SHARED <= MAX_SHARED);
};

// What a kernel must know besides the arguments. Computed on the host.
struct TensorSetup {
    int64_t row_tiles, column_tiles;  // of one of the products
    bool x_wide, w_wide;              // rows begin at multiples of 16 bytes
    bool eight;                       // in_groups_of(8)
};

// One operand of a block: COUNT rows on their way into shared memory. A thread's pieces stand below each other.
template <class T, int COUNT>
struct Operand {
    static constexpr int ROW_PIECES = T::BK / 8, DOWN = T::THREADS / ROW_PIECES, PIECES = COUNT / DOWN;
    static_assert(T::THREADS % ROW_PIECES == 0 && COUNT % DOWN == 0 && DOWN % 8 == 0);

    const char* from;
    int64_t down;  // bytes from one piece to the next
    unsigned to;
    int there;  // how many pieces are in rows that exist
    bool wide;

    static __device__ __forceinline__ int place() { return int(threadIdx.x) % ROW_PIECES; }

    __device__ __forceinline__ Operand(unsigned shared, const void* first, int64_t K, int rows, bool wide) : wide(wide) {
        const int r = int(threadIdx.x) / ROW_PIECES;
        from = static_cast<const char*>(first) + r * K * 2 + place() * 16;
        down = DOWN * K * 2;
        to = shared + swizzled<T::ROW>(r, place());
        there = rows > r ? (rows - r + DOWN - 1) / DOWN : 0;
    }

    // Starts the copies of the next stage and steps on; `left`: how many of its k's exist, from this thread's place on;
    // `whole`: for every thread all of them. Rows that do not exist stay what they were: no sum that is wanted sees them.
    __device__ __forceinline__ void copy(unsigned slot, int left, bool whole) {
        if (wide && whole) {
#pragma unroll
            for (int i = 0; i < PIECES; ++i)
                if (i < there) copy_piece(to + slot + i * DOWN * T::ROW, from + i * down);
        } else {
            const int valid = left < 0 ? 0 : left < 8 ? left : 8;
#pragma unroll 1
            for (int i = 0; i < there; ++i) copy_halves_one_by_one(to + slot + i * DOWN * T::ROW, from + i * down, valid);
        }
        from += T::ROW;
    }
};

// A warp's fragments for one step.
template <class T>
struct Fragments {
    unsigned a[T::TM][4], b[T::TN][2];

    // a_from, b_from: this lane's addresses for the first step of the stage.
    __device__ __forceinline__ void load(unsigned a_from, unsigned b_from, int step) {
#pragma unroll
        for (int i = 0; i < T::TM; ++i) load_matrices(a[i], (a_from ^ (step * 32)) + i * 16 * T::ROW);
        if constexpr (T::TN == 1) {
            load_matrices(b[0], b_from ^ (step * 32));
        } else {
#pragma unroll
            for (int j = 0; j < T::TN; j += 2) {
                unsigned two[4];
                load_matrices(two, (b_from ^ (step * 32)) + j * 8 * T::ROW);
                b[j][0] = two[0], b[j][1] = two[1], b[j + 1][0] = two[2], b[j + 1][1] = two[3];
            }
        }
    }
    template <class Half>
    __device__ __forceinline__ void multiply(float (&sum)[T::TM][T::TN][4]) const {
#pragma unroll
        for (int i = 0; i < T::TM; ++i)
#pragma unroll
            for (int at = 0; at < T::TN; ++at) {
                const int j = i % 2 ? T::TN - 1 - at : at;  // there and back: one operand stays where it is
                mma<Half>(sum[i][j], a[i], b[j][0], b[j][1]);
            }
    }
};

template <class T, class Half>
__global__ void __launch_bounds__(T::THREADS, T::MIN_BLOCKS) linear_tensor_tile(const LinearArgs g, const TensorSetup setup) {
    extern __shared__ __align__(128) char shared[];
    // Blocks that run together share rows and weights: bands of 8 row tiles, down each band column by column.
    const int64_t tiles = setup.row_tiles * setup.column_tiles, batch = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const int64_t band = tile / (8 * setup.column_tiles) * 8;
    const int64_t height = setup.row_tiles - band < 8 ? setup.row_tiles - band : 8, inside = tile - band * setup.column_tiles;
    const int64_t m0 = (band + inside % height) * T::BM, n0 = inside / height * T::BN;
    const int rows = g.M - m0 < T::BM ? int(g.M - m0) : T::BM, columns = g.N - n0 < T::BN ? int(g.N - n0) : T::BN;
    const int64_t first = batch * g.M + m0;  // of the output's rows

    using X = Operand<T, T::BM>;
    using W = Operand<T, T::BN>;
    const unsigned memory = shared_address(shared);
    X x(memory, static_cast<const char*>(g.x.data) + first * g.K * 2, g.K, rows, setup.x_wide);
    W w(memory + T::BM * T::ROW, static_cast<const char*>(g.weight.data) + (batch * g.N + n0) * g.K * 2, g.K, columns,
        setup.w_wide);
    const int K = int(g.K), stages = (K + T::BK - 1) / T::BK, steps = (K + STEP - 1) / STEP;
    const auto copy = [&](int stage, unsigned slot) {
        if (stage < stages) {
            const int left = K - stage * T::BK;
            x.copy(slot, left - X::place() * 8, left >= T::BK);
            w.copy(slot, left - W::place() * 8, left >= T::BK);
        }
        commit_copies();  // perhaps an empty group: the count of groups is the clock
    };
#pragma unroll 1
    for (int s = 0; s < T::STAGES - 1; ++s) copy(s, s * T::STAGE);

    const int warp = int(threadIdx.x) / 32, warp_m = warp % T::WARPS_M, warp_n = warp / T::WARPS_M;
    const int b_row = T::TN == 1 ? int(threadIdx.x) % 8 : row_of_b();
    const unsigned a_at = memory + swizzled<T::ROW>(warp_m * T::WM + row_of_a(), piece_of_a());
    const unsigned b_at = memory + T::BM * T::ROW + swizzled<T::ROW>(warp_n * T::WN + b_row, piece_of_b());
    float sum[T::TM][T::TN][4];
#pragma unroll
    for (int i = 0; i < T::TM; ++i)
#pragma unroll
        for (int j = 0; j < T::TN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;

    wait_for_copies<T::STAGES - 2>();
    __syncthreads();
    Fragments<T> step[2];
    step[0].load(a_at, b_at, 0);
    const int full = steps / T::STEPS;  // stages with all of their steps
    unsigned slot = 0;                  // where this stage begins
#pragma unroll 1
    for (int stage = 0; stage < full; ++stage) {
        const unsigned next = slot + T::STAGE < T::SHARED ? slot + T::STAGE : 0;
#pragma unroll
        for (int s = 0; s < T::STEPS; ++s) {
            if (s + 1 < T::STEPS) {
                step[(s + 1) % 2].load(a_at + slot, b_at + slot, s + 1);
            } else {
                wait_for_copies<T::STAGES - 2>();  // this thread's part of the next stage has landed
                __syncthreads();                   // it is there for all, and all have read the last of this one
                step[0].load(a_at + next, b_at + next, 0);
            }
            // into the memory of the stage before, which all were through with at the last barrier
            if (s == 0) copy(stage + T::STAGES - 1, slot > 0 ? slot - T::STAGE : T::SHARED - T::STAGE);
            step[s % 2].template multiply<Half>(sum);
        }
        slot = next;
    }
#pragma unroll 1
    for (int s = 0; s < steps - full * T::STEPS; ++s) {
        step[0].load(a_at + slot, b_at + slot, s);
        step[0].template multiply<Half>(sum);
    }

    // The warps' sums, 16 PASS rows of each at a time.
    constexpr int STRIP = T::PASS * 16;
    float* sums = reinterpret_cast<float*>(shared);
    const int lane = int(threadIdx.x) % 32;
    float* mine = sums + (warp_m * STRIP + lane / 4) * T::PITCH + warp_n * T::WN + lane % 4 * 2;
#pragma unroll 1
    for (int pass = 0; pass < T::TM / T::PASS; ++pass) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < T::TM; ++i) {
            if (i / T::PASS != pass) continue;
#pragma unroll
            for (int j = 0; j < T::TN; ++j) {
                float* to = mine + i % T::PASS * 16 * T::PITCH + j * 8;
                *reinterpret_cast<float2*>(to) = make_float2(sum[i][j][0], sum[i][j][1]);
                *reinterpret_cast<float2*>(to + 8 * T::PITCH) = make_float2(sum[i][j][2], sum[i][j][3]);
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int at = int(threadIdx.x) * 8; at < T::WARPS_M * STRIP * T::BN; at += T::THREADS * 8) {
            const int strip_row = at / T::BN, c = at % T::BN;
            const int r = strip_row / STRIP * T::WM + pass * STRIP + strip_row % STRIP;
            if (r >= rows || c >= columns) continue;
            const float* from = sums + strip_row * T::PITCH + c;
            Four y[2] = {load_four(from), load_four(from + 4)};
            finish<Digits::OF_RESULT>(g, setup.eight, first + r, n0 + c, y);
        }
    }
}

// ---- launcher

using sm80::LINEAR_TILES, sm80::LINEAR_WAYS;

template <int WAY>
struct TileOf {
    static constexpr sm80::LinearTile T = LINEAR_TILES[WAY];
    using Tile = TensorTile<T.rows, T.columns, T.depth, T.warp_rows, T.warp_columns, T.stages, T.least_blocks>;
    static_assert(Tile::THREADS == T.threads() && Tile::SHARED == T.shared());
};

static Choice linear_tensor_choice("linear_tensor", LINEAR_WAYS);

// A pure function of the shape: the tile with the least estimated time on an H100, whatever chip it is.
static int linear_tensor_way(const LinearArgs& g, int64_t batches) {
    constexpr int64_t processors = 132;
    const double steps = double(ceil_div(g.K, STEP));
    int best = 0;
    double least = 0;
    for (int way = 0; way < LINEAR_WAYS; ++way) {
        const sm80::LinearTile& c = LINEAR_TILES[way];
        const int64_t blocks = batches * ceil_div(g.M, c.rows) * ceil_div(g.N, c.columns);
        const int64_t each = ceil_div(blocks, processors), at_once = c.resident * processors;
        double time;
        if (each <= c.resident) {
            const double more = each > 1 ? (c.full - c.alone) * double(each - 1) / double(c.resident - 1) : 0;
            time = steps * (c.alone + more) + c.ends;
        } else {  // waves; the later ones do not begin together, so that a last one that is nearly empty costs half
            const double waves = std::min(double(blocks) / double(at_once) + 0.5, double(ceil_div(blocks, at_once)));
            time = (steps * c.full + c.ends) * waves;
        }
        if (way == 0 || time < least) least = time, best = way;
    }
    return best;
}

template <class T>
static void start_tensor(const char* op, const LinearArgs& g, int64_t batches, TensorSetup setup, Stream stream) {
    setup.row_tiles = ceil_div(g.M, T::BM);
    setup.column_tiles = ceil_div(g.N, T::BN);
    const dim3 grid(checked_blocks(op, batches * setup.row_tiles * setup.column_tiles));
    const auto kernel = g.x.dtype == Dtype::F16 ? linear_tensor_tile<T, f16> : linear_tensor_tile<T, bf16>;
    launch(op, kernel, grid, T::THREADS, T::SHARED, stream, g, setup);
}

template <int... WAY>
static void start_way(int way, std::integer_sequence<int, WAY...>, const char* op, const LinearArgs& g, int64_t batches,
                      const TensorSetup& setup, Stream stream) {
    ((way == WAY ? start_tensor<typename TileOf<WAY>::Tile>(op, g, batches, setup, stream) : void()), ...);
}

void linear_tensor(const char* op, const LinearArgs& g, int64_t batches, Stream stream) {
    if (g.M == 0 || batches == 0) return;
    if (g.K > 0x7fff0000) throw std::runtime_error(std::string(op) + ": K is too large for mode 'tensor'");
    TensorSetup setup{};
    setup.x_wide = g.K % 8 == 0 && aligned(g.x.data, 16);
    setup.w_wide = g.K % 8 == 0 && aligned(g.weight.data, 16);
    setup.eight = in_groups_of(8, g);
    const int way = linear_tensor_choice.take(linear_tensor_way(g, batches));
    start_way(way, std::make_integer_sequence<int, LINEAR_WAYS>(), op, g, batches, setup, stream);
}

}  // namespace rk
