// sm90/linear.cu: linear and bmm in mode "tensor" on Hopper: y[m, n] = act(dot_tensor(x[m], w[n]) + bias[n]) + residual[m, n],
// x [M, K] and w [N, K] half precision of one dtype; K a multiple of 8 and both at multiples of 16 bytes, as TMA wants them.
// What does not fit is sm80/linear.cu's, with the same bits.
//
// Order: one accumulator per output, from +0, one wgmma for every 16 k, ascending; what is missing in the last one is zeros on
// both sides, and none is issued beyond it. Then epilogue.cuh's, with gelu's short form for a half result. Blocks, warpgroups
// and lanes split outputs only, K never.
//
// How: as many blocks as multiprocessors, each with tile after tile in a fixed order. One thread, the producer, has TMA bring
// 64 k's of a tile's rows and columns, a stage, into a ring of them; it runs on into the next tile. Consumer warpgroups
// multiply a stage with four wgmma and give it back when those are through, one stage later. Two barriers per stage say "it is
// full" and "it is empty". The sums pass through a warp's own shared memory, so that neighbours in a row are stored by one
// thread.
//
// Together: the warpgroups share a tile, its rows split. In turns: each has every second tile, and its epilogue runs beside the
// other's products; a barrier per warpgroup says whose turn the ring is. It is also what keeps a wait for a full stage at most
// one phase behind (barrier.cuh): nobody waits for a stage before all stages of the tile before it were seen full.
//
// Ways: tiles from 128 x 256 outputs to 64 x 8, where the weights stream through. The tile is in no output's expression, so the
// cheapest may be chosen by shape.

#include <algorithm>
#include <utility>

#include "../epilogue.cuh"
#include "room.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "tiles.h"

namespace rk::sm90 {

template <int BM_, int BN_, int WAY>
struct HopperTile {
    static constexpr LinearTile T = LINEAR_TILES[WAY];
    static constexpr int BM = BM_, BN = BN_, GROUPS = T.groups, STAGES = T.stages, SLAB = T.slab;
    static constexpr bool TOGETHER = T.together;
    static constexpr int WM = T.group_rows(), TM = WM / ROWS;  // rows of a warpgroup, and its wgmma below each other
    static constexpr int X_BYTES = BM * BOX_BYTES, STAGE = T.stage(), SLABS = T.slabs(), SHARED = T.shared();
    static constexpr int THREADS = T.threads();
    static constexpr int READERS = (TOGETHER ? GROUPS : 1) * 4;  // warps that read a stage
    static constexpr int TURNS = TOGETHER ? 1 : GROUPS;          // tiles that a block has under way
    static_assert(BM == T.rows && BN == T.columns && WM % ROWS == 0 && BM <= 256 && BN <= 256 && BN % SLAB == 0 &&
                  SLAB % 8 == 0 && STAGE % ATOM == 0);
    static_assert((TOGETHER || GROUPS == 2) && DEPTH == BOX && SHARED <= MAX_SHARED);
};

// What a kernel must know besides the arguments. Computed on the host.
struct TileSetup {
    int row_tiles, column_tiles;  // of one of the products
    int tiles;                    // of all
    bool eight;                   // in_groups_of(8)
};

struct Place {
    int batch, m0, n0;
};
// Blocks that run together share rows and weights: bands of 8 row tiles, down each band column by column.
template <class T>
__device__ __forceinline__ Place place_of(const TileSetup& setup, int tile) {
    const int tiles = setup.row_tiles * setup.column_tiles, batch = tile / tiles, one = tile % tiles;
    const int band = one / (8 * setup.column_tiles) * 8, height = min(setup.row_tiles - band, 8);
    const int inside = one - band * setup.column_tiles;
    return {batch, (band + inside % height) * T::BM, inside / height * T::BN};
}

// A place in the ring, and the parity of the phase that ends when it is next full.
template <int STAGES>
struct Ring {
    int slot = 0, parity = 0;

    __device__ __forceinline__ void step() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void skip(int stages) {
        const int to = slot + stages;
        slot = to % STAGES;
        parity ^= to / STAGES & 1;
    }
};

// The producer's thread: stage after stage of all tiles of this block.
template <class T>
__device__ __forceinline__ void produce(const CUtensorMap* x_map, const CUtensorMap* w_map, const TileSetup& setup,
                                        int stages_of_k, unsigned stages, Barrier full, Barrier empty) {
    prefetch_map(x_map);
    prefetch_map(w_map);
    Ring<T::STAGES> ring;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < setup.tiles; tile += gridDim.x) {
        const Place at = place_of<T>(setup, tile);
#pragma unroll 1
        for (int k = 0; k < stages_of_k; ++k) {
            const unsigned to = stages + ring.slot * T::STAGE;
            empty[ring.slot].wait(ring.parity ^ 1);  // at first they are
            full[ring.slot].expect(T::STAGE);        // zeros from outside of the tensor count, too
            load_box(to, x_map, full[ring.slot], k * DEPTH, at.m0, at.batch);
            load_box(to + T::X_BYTES, w_map, full[ring.slot], k * DEPTH, at.n0, at.batch);
            ring.step();
        }
    }
}

// A warpgroup's products of one tile: `steps` of 16 k's from the ring. The last stage is given back, too.
template <class T, class Half, class Issued>
__device__ __forceinline__ void multiply_tile(float (&sum)[T::TM][T::BN / 2], Ring<T::STAGES>& ring, int steps, unsigned stages,
                                              unsigned rows_at, Barrier full, Barrier empty, Issued issued) {
    constexpr int STEPS = DEPTH / STEP;
    const bool speaks = threadIdx.x % 32 == 0;  // for its warp
#pragma unroll
    for (int i = 0; i < T::TM; ++i)
#pragma unroll
        for (int j = 0; j < T::BN / 2; ++j) sum[i][j] = 0.0f;
    const auto multiply = [&](uint64_t x, uint64_t w) {
#pragma unroll
        for (int i = 0; i < T::TM; ++i) Columns<T::BN>::template multiply<Half>(sum[i], x + i * ROWS_ON, w);
    };
    const auto hold_all = [&] {
#pragma unroll
        for (int i = 0; i < T::TM; ++i) hold(sum[i]);
    };
    int under_way = -1;  // the stage whose products may be
    const auto give_back = [&] {
        if (under_way >= 0 && speaks) empty[under_way].arrive();
    };
#pragma unroll 1
    for (int k = 0; k < steps / STEPS; ++k) {
        full[ring.slot].wait(ring.parity);
        const uint64_t x = by_rows(stages + ring.slot * T::STAGE + rows_at);
        const uint64_t w = by_rows(stages + ring.slot * T::STAGE + T::X_BYTES);
        hold_all();
        begin_wgmma();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) multiply(x + s * STEP_ON, w + s * STEP_ON);
        commit_wgmma();
        hold_all();
        wait_for_wgmma<1>();  // those of the stage before are through
        give_back();
        under_way = ring.slot;
        ring.step();
    }
    if (steps % STEPS > 0) {  // the last stage, if it is not a whole one
        full[ring.slot].wait(ring.parity);
        uint64_t x = by_rows(stages + ring.slot * T::STAGE + rows_at), w = by_rows(stages + ring.slot * T::STAGE + T::X_BYTES);
#pragma unroll 1
        for (int s = 0; s < steps % STEPS; ++s, x += STEP_ON, w += STEP_ON) {
            hold_all();
            begin_wgmma();
            multiply(x, w);
            commit_wgmma();
            hold_all();
            wait_for_wgmma<0>();
        }
        give_back();
        under_way = ring.slot;
        ring.step();
    }
    issued();
    wait_for_wgmma<0>();
    hold_all();
    give_back();
}

// A warpgroup's rows of one tile on their way out, a warp's 16 rows and SLAB columns at a time through its own memory. Groups
// of 8 neighbours change places by the row, so that four rows of eight meet all banks.
template <class T>
__device__ __forceinline__ void store_tile(const LinearArgs& g, const TileSetup& setup, float (&sum)[T::TM][T::BN / 2],
                                           const Place& at, int first_row, float* mine) {
    constexpr int EIGHTS = T::SLAB / 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int64_t before = int64_t(at.batch) * g.M;  // of the output's rows
    constexpr int ACROSS = T::BN / T::SLAB;
#pragma unroll 1
    for (int pass = 0; pass < T::TM * ACROSS; ++pass) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < T::TM * ACROSS; ++i) {
            if (i != pass) continue;
#pragma unroll
            for (int j = 0; j < EIGHTS; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int r = lane / 4 + 8 * h, from = (i % ACROSS * EIGHTS + j) * 4 + 2 * h;
                    float* to = mine + r * T::SLAB + (j ^ r % EIGHTS) * 8 + lane % 4 * 2;
                    *reinterpret_cast<float2*>(to) = make_float2(sum[i / ACROSS][from], sum[i / ACROSS][from + 1]);
                }
        }
        __syncwarp();
        const int row = first_row + pass / ACROSS * ROWS + warp * 16, column = at.n0 + pass % ACROSS * T::SLAB;
#pragma unroll 1
        for (int piece = lane; piece < 16 * EIGHTS; piece += 32) {
            const int r = piece / EIGHTS, j = piece % EIGHTS;
            if (row + r >= g.M || column + j * 8 >= g.N) continue;
            const float* from = mine + r * T::SLAB + (j ^ r % EIGHTS) * 8;
            Four y[2] = {load_four(from), load_four(from + 4)};
            finish<Digits::OF_RESULT>(g, setup.eight, before + row + r, column + j * 8, y);
        }
    }
}

template <class T, class Half>
__global__ void __launch_bounds__(T::THREADS, 1)
    linear_hopper(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                  const __grid_constant__ LinearArgs g, const __grid_constant__ TileSetup setup) {
    extern __shared__ __align__(1024) char shared[];
    const unsigned memory = shared_address(shared), stages = (memory + ATOM - 1) / ATOM * ATOM;
    const unsigned slabs = stages + T::STAGES * T::STAGE;
    const Barrier full{slabs + T::SLABS}, empty = full[T::STAGES], turn = empty[T::STAGES];
    const int group = warpgroup();
    if (threadIdx.x == 0) {
        for (int s = 0; s < T::STAGES; ++s) full[s].init(1), empty[s].init(T::READERS);
        for (int t = 0; t < T::TURNS; ++t) turn[t].init(4);
        barriers_are_ready();
    }
    __syncthreads();
    const int steps = int((g.K + STEP - 1) / STEP), stages_of_k = int((g.K + DEPTH - 1) / DEPTH);
    if (group == T::GROUPS) {
        if constexpr (T::GROUPS > 1) fewer_registers<40>();
        if (threadIdx.x == T::GROUPS * GROUP) produce<T>(&x_map, &w_map, setup, stages_of_k, stages, full, empty);
        return;
    }
    if constexpr (T::GROUPS > 1) more_registers<232>();
    float* const mine = reinterpret_cast<float*>(shared + (slabs - memory)) + threadIdx.x / 32 * (16 * T::SLAB);
    const int rows_at = T::TOGETHER ? group * T::WM : 0;
    Ring<T::STAGES> ring;
    int parity = T::TOGETHER || group > 0 ? 0 : 1;  // of this warpgroup's turn: the first has it at once
    int tile = blockIdx.x;
    if constexpr (!T::TOGETHER) tile += group * gridDim.x, ring.skip(group * stages_of_k);
#pragma unroll 1
    for (; tile < setup.tiles; tile += T::TURNS * gridDim.x) {
        const Place at = place_of<T>(setup, tile);
        float sum[T::TM][T::BN / 2];
        if constexpr (!T::TOGETHER) turn[group].wait(parity), parity ^= 1;
        multiply_tile<T, Half>(sum, ring, steps, stages, rows_at * BOX_BYTES, full, empty, [&] {
            if constexpr (!T::TOGETHER)
                if (threadIdx.x % 32 == 0) turn[1 - group].arrive();
        });
        if constexpr (!T::TOGETHER) ring.skip(stages_of_k);
        store_tile<T>(g, setup, sum, at, at.m0 + rows_at, mine);
    }
}

// ---- launcher

// x or the weight of all products, [batches, rows, K], in boxes of so many rows.
static Boxes<3> boxes(const Ref& from, const LinearArgs& g, int64_t batches, int64_t rows, int box) {
    return {from.data, from.dtype, {g.K, rows, batches}, {g.K, rows * g.K}, {BOX, box, 1}};
}

static Choice linear_hopper_choice("linear_hopper_tensor", LINEAR_WAYS);

// A pure function of the shape: the tile with the least time by a model of an H100, which was never held to one.
static int linear_hopper_way(const LinearArgs& g, int64_t batches) {
    constexpr int64_t processors = 132;
    const double stages = double(ceil_div(g.K, DEPTH));
    int best = 0;
    double least = 0;
    for (int way = 0; way < LINEAR_WAYS; ++way) {
        const LinearTile& t = LINEAR_TILES[way];
        const int64_t tiles = batches * ceil_div(g.M, t.rows) * ceil_div(g.N, t.columns);
        const double each = double(ceil_div(tiles, processors));
        const double products = stages * t.stage_clocks(int(std::min<int64_t>(g.M, t.rows))),
                     end = t.end_clocks(g.activation != 0);
        // in turns an epilogue is seen only where it is longer than the products beside it, and at the very end
        const double time = t.together ? each * (products + end) : each * std::max(products, (products + end) / 2) + end;
        if (way == 0 || time < least) least = time, best = way;
    }
    return best;
}

// False: the driver refused a map of the operands, and nothing was started.
template <int WAY>
static bool start(const char* op, const LinearArgs& g, int64_t batches, int multiprocessors, Stream stream) {
    using T = HopperTile<LINEAR_TILES[WAY].rows, LINEAR_TILES[WAY].columns, WAY>;
    const TileSetup setup{int(ceil_div(g.M, T::BM)), int(ceil_div(g.N, T::BN)),
                          int(batches * ceil_div(g.M, T::BM) * ceil_div(g.N, T::BN)), in_groups_of(8, g)};
    CUtensorMap x_map, w_map;
    const auto map = [&](CUtensorMap& made, const Ref& from, int64_t rows, int box) {
        return boxes(from, g, batches, rows, box).map(made);
    };
    if (!map(x_map, g.x, g.M, T::BM) || !map(w_map, g.weight, g.N, T::BN)) return false;
    const auto kernel = g.x.dtype == Dtype::F16 ? linear_hopper<T, f16> : linear_hopper<T, bf16>;
    launch(op, kernel, dim3(unsigned(std::min(setup.tiles, multiprocessors))), T::THREADS, T::SHARED, stream, x_map, w_map, g,
           setup);
    return true;
}

template <int... WAY>
static bool start_way(int way, std::integer_sequence<int, WAY...>, const char* op, const LinearArgs& g, int64_t batches,
                      int multiprocessors, Stream stream) {
    return ((way == WAY && start<WAY>(op, g, batches, multiprocessors, stream)) || ...);
}

// Whether the call was one for this room, and was started.
static bool linear_tensor(const char* op, const LinearArgs& g, int64_t batches, Stream stream) {
    const Device device = current_device(op);
    if (!device.hopper || encode_tiled() == nullptr) return false;
    if (!boxes(g.x, g, batches, g.M, ROWS).fit() || !boxes(g.weight, g, batches, g.N, ROWS).fit()) return false;
    // a warpgroup in turns waits while the other multiplies all of K: the bound of a wait is far beyond this (barrier.cuh)
    if (batches * ceil_div(g.M, 64) * ceil_div(g.N, 8) > 0x3fffffff || g.K > 1 << 24) return false;
    return start_way(linear_hopper_choice.take(linear_hopper_way(g, batches)), std::make_integer_sequence<int, LINEAR_WAYS>(),
                     op, g, batches, device.multiprocessors, stream);
}

static const bool there = (hopper.linear_tensor = linear_tensor, true);

}  // namespace rk::sm90
