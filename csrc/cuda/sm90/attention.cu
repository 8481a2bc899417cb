// attention.cu: packed attention of mode "tensor" on sm_90a: float16 and bfloat16, heads of 64 and of 128, any length, window,
// grouping. The expression is sm80/attention.cu's, bit for bit (NUMERICS.md, "Mode tensor"): tiles of 128 keys from the
// sequence's own first key, and per tile
//   s = dot_tensor(q, k)            wgmma m64n128k16, 16 features per step, ascending
//   m, r, p                         in registers: a thread has 32 scores of each of two rows
//   acc = acc * r, then + p~ v      wgmma m64nWIDTHk16, p~ from registers, 16 keys per step, ascending
//   l = l * r, then + p~ 1          wgmma m64n8k16 with a matrix of ones
// A step that sm80 leaves out and this kernel does not has p~ = +0 only, so it changes nothing. Only a value that is not
// finite, inside the sequence, may reach a row that does not see it: here if one of 64 rows sees one of the tile's 128 keys.
//
// A block has GROUPS warpgroups of 64 rows each, from the sequence's first row on, and one warp that fetches (the producer).
// Tiles of keys and values take turns in stages of shared memory. A stage has two mbarriers: full (its bytes have landed) and
// empty (each warp of the consumers has read them). With GROUPS > 1 the next tile's scores and this tile's products are under
// way while a group weighs; with one group several blocks share a multiprocessor instead.
//
// TMA reads whole tiles: behind a sequence lies the next one. Its keys give scores that are hidden, each its own column. Its
// values would be multiplied by +0, and may be NaN: the producer sets them to zero before it calls the last tile full.
#include <cuda_runtime.h>

#include <algorithm>

#include "../attention.cuh"
#include "../kernels.h"
#include "../../weighing.h"
#include "room.cuh"
#include "tiles.h"
#include "tma.cuh"
#include "wgmma.cuh"

namespace rk {

namespace sm90 {

constexpr int TILE = KEYS, PANEL = BOX;  // features of a panel
constexpr float NONE_YET = -__builtin_huge_valf();

template <int WIDTH_, int GROUPS_>
struct Block {
    static constexpr HeadTile SHAPE{WIDTH_, GROUPS_};
    static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_, ROWS = GROUPS * GROUP_ROWS, PANELS = WIDTH / PANEL,
                         STAGES = SHAPE.stages();
    static constexpr int PANEL_BYTES = TILE * PANEL * 2, BYTES = PANELS * PANEL_BYTES;  // of a tile of keys or values
    static constexpr int Q_PANEL = ROWS * PANEL * 2;
    static constexpr bool OVERLAP = SHAPE.overlap(), TRADES = SHAPE.trades();
    static constexpr int FEWER = SHAPE.producer_registers(), MORE = SHAPE.consumer_registers();
};

struct AttentionSetup {
    Weighing weighing;
    bool k_heads_last, v_heads_last;  // of the dimensions of keys and values in TMA's maps; else tokens are
};

struct Seen {
    int from, to;  // the keys that a row sees; none: `to` is 0
};

template <class T>
__device__ __forceinline__ unsigned round_two(float a, float b);
template <>
__device__ __forceinline__ unsigned round_two<f16>(float a, float b) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}
template <>
__device__ __forceinline__ unsigned round_two<bf16>(float a, float b) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}

__device__ __forceinline__ float larger(float a, float b) {  // a NaN stays
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}

template <class T>
constexpr unsigned TWO_ONES = 0x3c003c00u;
template <>
constexpr unsigned TWO_ONES<bf16> = 0x3f803f80u;

template <class B, class T>
__global__ void __launch_bounds__(B::SHAPE.threads(), B::SHAPE.blocks())
    attention_wgmma_rows(const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values, AttentionArgs a,
                         PackedArgs packed, AttentionSetup setup) {
    constexpr int WIDTH = B::WIDTH;
    extern __shared__ __align__(1024) char raw[];
    const unsigned base = (shared_address(raw) + 1023) / 1024 * 1024;  // a swizzle's pattern begins at a multiple of 1024
    const unsigned q_at = base, k_at = q_at + B::PANELS * B::Q_PANEL, v_at = k_at + B::STAGES * B::BYTES;
    const unsigned ones = v_at + B::STAGES * B::BYTES, work_at = ones + ONES_BYTES;
    const Barrier k_full{work_at + WORK_BYTES}, k_empty = k_full[B::STAGES], v_full = k_empty[B::STAGES];
    const Barrier v_empty = v_full[B::STAGES];
    const Barrier landed = v_empty[B::STAGES];  // the values of a last tile, before what lies behind them is cleared
    Work<T>& work = *reinterpret_cast<Work<T>*>(raw + (work_at - shared_address(raw)));
    Seen* const rows = reinterpret_cast<Seen*>(raw + (landed.at + 8 - shared_address(raw)));
    static_assert(sizeof(Work<T>) <= WORK_BYTES);

    if (threadIdx.x < 32) find_work<B::ROWS>(a, packed, blockIdx.y, B::ROWS, work);
    if (threadIdx.x == 32) {
        for (int stage = 0; stage < B::STAGES; ++stage) {
            k_full[stage].init(1);
            v_full[stage].init(1);
            k_empty[stage].init(4 * B::GROUPS);
            v_empty[stage].init(4 * B::GROUPS);
        }
        landed.init(1);
        barriers_are_ready();
    }
    if (threadIdx.x >= 64 && threadIdx.x < 64 + ONES_BYTES / 16) {
        const unsigned two = TWO_ONES<T>;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(ones + (threadIdx.x - 64) * 16), "r"(two) : "memory");
        stores_before_async();
    }
    __syncthreads();
    if (work.rows == 0) return;

    const int begin = work.begin(work.token) / TILE, end = (work.end(work.token_of(work.rows - 1)) + TILE - 1) / TILE;
    const int warp = __shfl_sync(WARP, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    const auto stage_of = [&](int tile) { return (tile - begin) % B::STAGES; };
    const auto turn_of = [&](int tile) { return (tile - begin) / B::STAGES % 2; };

    if (warp >= 4 * B::GROUPS) {  // ---- the producer
        if constexpr (B::TRADES) fewer_registers<B::FEWER>();
        if (warp > 4 * B::GROUPS) return;
        const int live = work.length - (end - 1) * TILE;  // of the last tile
        const auto fetch = [&](unsigned to, const CUtensorMap& from, Barrier full, bool heads_last, int key) {
            full.expect(B::BYTES);
            const int head = blockIdx.y, second = heads_last ? key : head, third = heads_last ? head : key;
            for (int p = 0; p < B::PANELS; ++p) load_box(to + p * B::PANEL_BYTES, &from, full, p * PANEL, second, third);
        };
        if (lane == 0) {
#pragma unroll 1
            for (int tile = begin; tile < end; ++tile) {
                const int stage = stage_of(tile), turn = turn_of(tile), key = work.key + tile * TILE;
                k_empty[stage].wait(turn ^ 1);
                fetch(k_at + stage * B::BYTES, keys, k_full[stage], setup.k_heads_last, key);
                v_empty[stage].wait(turn ^ 1);
                const Barrier full = tile + 1 == end && live < TILE ? landed : v_full[stage];
                fetch(v_at + stage * B::BYTES, values, full, setup.v_heads_last, key);
            }
        }
        __syncwarp();
        if (begin < end && live < TILE) {
            const unsigned last = v_at + stage_of(end - 1) * B::BYTES;
            landed.wait(0);
            for (int p = 0; p < B::PANELS; ++p)
                for (int at = live * PANEL * 2 + lane * 16; at < B::PANEL_BYTES; at += 32 * 16)
                    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(last + p * B::PANEL_BYTES + at), "r"(0)
                                 : "memory");
            stores_before_async();
            __syncwarp();
            if (lane == 0) v_full[stage_of(end - 1)].arrive();
        }
        return;
    }

    // ---- a consumer
    if constexpr (B::TRADES) more_registers<B::MORE>();
    const int group = warp / 4, t = lane % 4, first = group * GROUP_ROWS, mine = first + warp % 4 * 16 + lane / 4;
    const bool live = first < work.rows;

    // Q to shared memory; rows that do not exist are zeros
    {
        constexpr int PIECES = WIDTH / 8, AT_ONCE = 128 / PIECES;
        const int piece = threadIdx.x % PIECES;
        for (int r = first + int(threadIdx.x) % 128 / PIECES; r < first + GROUP_ROWS; r += AT_ONCE) {
            const int there = min(r, work.rows - 1);
            const T* const from = work.q + work.token_of(there) * work.q_token + work.head_of(there) * work.q_head + piece * 8;
            copy_16(raw + (q_at - shared_address(raw)) + piece / 8 * B::Q_PANEL + r * 128 + ((piece % 8 ^ r % 8) * 16), from,
                    r < work.rows ? 16 : 0);
        }
        commit_copies();
        wait_for_copies<0>();
        stores_before_async();
        if (group == 0) named_barrier<1>(GROUP);
        else if (group == 1) named_barrier<2>(GROUP);
        else named_barrier<3>(GROUP);
    }

    // the keys that each row sees, and the tiles that the group's rows see
    if (t < 2) {
        const int token = work.token_of(min(mine + 8 * t, work.rows - 1));
        rows[mine + 8 * t] = {work.begin(token), work.end(token)};
    }
    __syncwarp();
    int group_from = begin, group_to = begin;
    if (live) {
        group_from = work.begin(work.token_of(first)) / TILE;
        group_to = (work.end(work.token_of(min(first + GROUP_ROWS, work.rows) - 1)) + TILE - 1) / TILE;
    }

    float s[TILE / 2], acc[WIDTH / 2], l[4], top[2] = {NONE_YET, NONE_YET}, faded[2];
    unsigned p[TILE / STEP][4];
#pragma unroll
    for (int j = 0; j < WIDTH / 2; ++j) acc[j] = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) l[j] = 0.0f;

    const auto arrive = [&](Barrier barrier) {
        if (lane == 0) barrier.arrive();
    };
    const auto scores = [&](int stage) {
#pragma unroll
        for (int j = 0; j < TILE / 2; ++j) s[j] = 0.0f;
        hold(s);
        begin_wgmma();
#pragma unroll
        for (int step = 0; step < WIDTH / STEP; ++step)
            Columns<TILE>::template multiply<T>(
                s, by_rows(q_at + step / 4 * B::Q_PANEL + first * 128) + step % 4 * STEP_ON,
                by_rows(k_at + stage * B::BYTES + step / 4 * B::PANEL_BYTES) + step % 4 * STEP_ON);
        commit_wgmma();
        hold(s);
    };
    const auto products = [&](int stage) {
        hold(acc);
        hold(l);
        begin_wgmma();
#pragma unroll
        for (int g = 0; g < TILE / STEP; ++g) {
            Columns<WIDTH>::template multiply<T, true>(
                acc, p[g], by_columns(v_at + stage * B::BYTES, B::PANEL_BYTES) + g * COLUMN_STEP_ON);
            Columns<8>::template multiply<T, false>(l, p[g], by_rows(ones));
        }
        commit_wgmma();
        hold(acc);
        hold(l);
    };
    // from scores to weights, in place; s[4 n + 2 i + e] is of row `mine` + 8 i and key 8 n + 2 t + e of the tile
    const auto weigh = [&](int tile) {
        if (setup.weighing.scaled) {
#pragma unroll
            for (int j = 0; j < TILE / 2; ++j) s[j] = s[j] * a.scale;
            if (a.softcap != 0.0f) {
#pragma unroll
                for (int j = 0; j < TILE / 2; ++j) s[j] = capped(s[j], a.softcap);
            }
        }
        const int key = tile * TILE;
        const Seen* const own = rows + mine;
        if (key < own[15 - lane / 4].from || key + TILE > own[-(lane / 4)].to) {  // not all rows of the warp see all of them
            const int at = key + 2 * t, after[2] = {at - own[0].from, at - own[8].from};
            const unsigned seen[2] = {unsigned(own[0].to - own[0].from), unsigned(own[8].to - own[8].from)};
#pragma unroll
            for (int j = 0; j < TILE / 2; ++j)
                if (!(unsigned(after[j / 2 % 2] + j / 4 * 8 + j % 2) < seen[j / 2 % 2])) s[j] = NONE_YET;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = top[i];
#pragma unroll
            for (int j = 2 * i; j < TILE / 2; j += 4) most = larger(most, larger(s[j], s[j + 1]));
#pragma unroll
            for (int step = 1; step < 4; step *= 2) most = larger(most, __shfl_xor_sync(WARP, most, step));
            const float below = most == NONE_YET ? 0.0f : most;
            faded[i] = exp2_short(top[i] - below, setup.weighing.c, setup.weighing.least);
            top[i] = most;
#pragma unroll
            for (int j = 2 * i; j < TILE / 2; j += 4)
#pragma unroll
                for (int e = 0; e < 2; ++e) s[j + e] = exp2_short(s[j + e] - below, setup.weighing.c, setup.weighing.least);
        }
    };
    // rounded: four registers are the 16 keys of a step, as fragment A has them
    const auto round = [&] {
#pragma unroll
        for (int j = 0; j < TILE / 4; ++j) p[j / 4][j % 4] = round_two<T>(s[2 * j], s[2 * j + 1]);
    };
    const auto fade = [&] {
#pragma unroll
        for (int j = 0; j < WIDTH / 2; ++j) acc[j] = acc[j] * faded[j / 2 % 2];
#pragma unroll
        for (int j = 0; j < 4; ++j) l[j] = l[j] * faded[j / 2];
    };
    // a tile that no row of the group sees; it has to be waited for, else an arrival might count for the turn before
    const auto pass = [&](int tile) {
        k_full[stage_of(tile)].wait(turn_of(tile));
        arrive(k_empty[stage_of(tile)]);
        v_full[stage_of(tile)].wait(turn_of(tile));
        arrive(v_empty[stage_of(tile)]);
    };

    for (int tile = begin; tile < group_from; ++tile) pass(tile);
    if constexpr (B::OVERLAP) {
        if (group_from < group_to) {
            k_full[stage_of(group_from)].wait(turn_of(group_from));
            scores(stage_of(group_from));
            wait_for_wgmma<0>();
            hold(s);
            arrive(k_empty[stage_of(group_from)]);
            weigh(group_from);
            round();
            v_full[stage_of(group_from)].wait(turn_of(group_from));
#pragma unroll 1
            for (int tile = group_from + 1; tile < group_to; ++tile) {
                const int stage = stage_of(tile), turn = turn_of(tile), before = stage_of(tile - 1);
                k_full[stage].wait(turn);
                scores(stage);
                products(before);
                wait_for_wgmma<1>();
                hold(s);
                arrive(k_empty[stage]);
                weigh(tile);
                hold(s);
                v_full[stage].wait(turn);
                wait_for_wgmma<0>();
                hold(acc);
                hold(l);
                arrive(v_empty[before]);
                fade();
                round();
            }
            const int last = stage_of(group_to - 1);
            products(last);
            wait_for_wgmma<0>();
            hold(acc);
            hold(l);
            arrive(v_empty[last]);
        }
    } else {
#pragma unroll 1
        for (int tile = group_from; tile < group_to; ++tile) {
            const int stage = stage_of(tile), turn = turn_of(tile);
            k_full[stage].wait(turn);
            scores(stage);
            wait_for_wgmma<0>();
            hold(s);
            arrive(k_empty[stage]);
            weigh(tile);
            fade();
            round();
            v_full[stage].wait(turn);
            products(stage);
            wait_for_wgmma<0>();
            hold(acc);
            hold(l);
            arrive(v_empty[stage]);
        }
    }
    for (int tile = max(group_from, group_to); tile < end; ++tile) pass(tile);

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = mine + 8 * i;
        if (r >= work.rows) continue;
        const bool blind = rows[r].to == 0, lost = !(fabsf(top[i]) < -NONE_YET);
        const float whole = lost ? __int_as_float(0x7fffffff) : l[2 * i];
        T* const to = work.out + work.token_of(r) * work.out_token + work.head_of(r) * int64_t(WIDTH) + 2 * t;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
            const float x = (acc[4 * n + 2 * i] + 0.0f) / whole, y = (acc[4 * n + 2 * i + 1] + 0.0f) / whole;
            *reinterpret_cast<unsigned*>(to + n * 8) = blind ? 0u : round_two<T>(x, y);
        }
    }
}

// ---- launcher

// Way 0: blocks of 192 rows, of 128 for heads of 128; way 1: blocks of 64.
static Choice attention_hopper_way("attention_hopper_tensor", HEAD_WAYS);

// Modelled, never measured. A large block reads keys and values least often and is always busy, but a sequence's last one has
// up to all but one of its rows to spare.
static int own_way(int64_t rows, int64_t mean, int64_t H_kv, int width, int processors) {
    const int large = head_tile(width, 0).rows();
    return mean < 2 * large || ceil_div(rows, large) * H_kv < processors ? 1 : 0;
}

// Keys or values as TMA sees them: the dimension with the shorter stride second.
static Boxes<3> boxes(const void* data, const AttentionArgs& a, int64_t tokens, int64_t token, int64_t head, bool heads_last) {
    if (heads_last) return {data, a.dtype, {a.D, tokens, a.H_kv}, {token, head}, {BOX, KEYS, 1}};
    return {data, a.dtype, {a.D, a.H_kv, tokens}, {head, token}, {BOX, 1, KEYS}};
}

template <int WIDTH, int WAY>
static void start(const AttentionArgs& args, const PackedArgs& packed, const CUtensorMap& keys, const CUtensorMap& values,
                  const AttentionSetup& setup, Stream stream) {
    using B = Block<WIDTH, head_tile(WIDTH, WAY).groups>;
    const int64_t rows = packed.total * (args.H / args.H_kv);
    const dim3 grid(checked_blocks("attention", ceil_div(rows, B::ROWS) + packed.B), unsigned(args.H_kv));
    const auto kernel = args.dtype == Dtype::F16 ? attention_wgmma_rows<B, f16> : attention_wgmma_rows<B, bf16>;
    launch("attention", kernel, grid, B::SHAPE.threads(), B::SHAPE.shared(), stream, keys, values, args, packed, setup);
}

// Whether the call was one for this room, and was started.
static bool attention_tensor(const AttentionArgs& args, const PackedArgs& packed, Stream stream) {
    if ((args.D != 64 && args.D != 128) || packed.total == 0 || args.H == 0 || args.H_kv > 65535) return false;
    const Device device = current_device("attention");
    if (!device.hopper || encode_tiled() == nullptr) return false;
    if (!aligned(args.q, 16) || args.q_token % 8 != 0 || args.q_head % 8 != 0) return false;
    // the stride of a dimension of one is of no account, and may be anything
    const auto map = [&](const void* data, int64_t token, int64_t head, bool& heads_last) {
        if (args.H_kv == 1) head = args.D;
        if (packed.total_k == 1) token = args.H_kv * head;
        heads_last = token < head;
        return boxes(data, args, packed.total_k, token, head, heads_last);
    };
    AttentionSetup setup{weighing(args.scale, args.softcap)};
    const Boxes<3> keys = map(args.k, args.k_token, args.k_head, setup.k_heads_last);
    const Boxes<3> values = map(args.v, args.v_token, args.v_head, setup.v_heads_last);
    // the driver may want each stride to be a multiple of the one before
    const auto fits = [](const Boxes<3>& all) { return all.fit() && all.strides[1] % all.strides[0] == 0; };
    if (!fits(keys) || !fits(values)) return false;
    const int64_t rows = packed.total * (args.H / args.H_kv);
    const int way =
        attention_hopper_way.take(own_way(rows, ceil_div(rows, packed.B), args.H_kv, int(args.D), device.multiprocessors));
    const auto go = args.D == 64 ? way == 0 ? start<64, 0> : start<64, 1> : way == 0 ? start<128, 0> : start<128, 1>;
    go(args, packed, keys.map("attention"), values.map("attention"), setup, stream);
    return true;
}

static const bool attention_there = (hopper.attention_tensor = attention_tensor, true);

}  // namespace sm90
}  // namespace rk
