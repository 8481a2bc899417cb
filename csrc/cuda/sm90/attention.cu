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
// A block has one to three warpgroups of 64 rows each, from the sequence's first row on. Tiles of keys and values take turns in
// stages of shared memory. With several groups one warp more fetches (the producer), and a stage has two mbarriers: full (its
// bytes have landed) and empty (each warp of the consumers has read them); the next tile's scores and this tile's products are
// under way while a group weighs. A group that is alone in its block fetches for itself, several such blocks share a
// multiprocessor, and one works while another waits.
//
// TMA reads whole tiles: behind a sequence lies the next one. Its keys give scores that are hidden, each its own column. Its
// values would be multiplied by +0, and may be NaN: they are set to zero before the last tile's products.
//
// V lies in shared memory as wgmma reads b "by columns" (N-major, 128-byte swizzle). The PTX ISA's canonical layout of that, in
// pieces of 16 bytes, 8 features each: ((8, n), (8, k)) : ((1, LBO), (8, SBO)). The 8 pieces of 64 features lie side by side
// (1), 8 keys are 8 rows of 128 bytes (8 pieces), 8 more keys are SBO on, and 64 more features LBO. A panel of ours has rows of
// 128 bytes, one per key: so SBO is 1,024 bytes, LBO a whole panel of 128 keys, and 16 keys more are 2,048 bytes.
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

constexpr int TILE = KEYS, STEPS = TILE / STEP, PANEL = BOX;  // keys, their sixteens; features of a panel
constexpr float NONE_YET = -__builtin_huge_valf();

template <int WIDTH_, int GROUPS_>
struct Block {
    static constexpr HeadTile SHAPE{WIDTH_, GROUPS_};
    static constexpr int WIDTH = WIDTH_, GROUPS = GROUPS_, ROWS = GROUPS * GROUP_ROWS, PANELS = WIDTH / PANEL,
                         STAGES = SHAPE.stages();
    static constexpr int PANEL_BYTES = TILE * PANEL * 2, BYTES = PANELS * PANEL_BYTES;  // of a tile of keys or values
    static constexpr int Q_PANEL = ROWS * PANEL * 2;
    static constexpr bool SOLO = SHAPE.solo();
    static constexpr int FEWER = SHAPE.producer_registers(), MORE = SHAPE.consumer_registers();
};

struct AttentionSetup {
    Weighing weighing;
    bool k_heads_last, v_heads_last;  // of the dimensions of keys and values in TMA's maps; else tokens are
};

struct Seen {
    int from, to;  // the keys that a row sees; none: `to` is 0
};

__device__ __forceinline__ float larger(float a, float b) {  // a NaN stays
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}

template <class T>
constexpr unsigned TWO_ONES = 0x3c003c00u;
template <>
constexpr unsigned TWO_ONES<bf16> = 0x3f803f80u;

// 16 bytes, four times the same
__device__ __forceinline__ void store_sixteen(unsigned to, unsigned four) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(four) : "memory");
}

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
        prefetch_map(&keys);
        prefetch_map(&values);
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
        store_sixteen(ones + (threadIdx.x - 64) * 16, TWO_ONES<T>);
        stores_before_async();
    }
    __syncthreads();
    if (work.rows == 0) return;

    const int begin = work.begin(work.token) / TILE, end = (work.end(work.token_of(work.rows - 1)) + TILE - 1) / TILE;
    const int warp = __shfl_sync(WARP, int(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
    const auto stage_of = [&](int tile) { return (tile - begin) % B::STAGES; };
    const auto turn_of = [&](int tile) { return (tile - begin) / B::STAGES % 2; };

    const int in_last = work.length - (end - 1) * TILE;  // of the last tile's keys the sequence's
    const auto fetch = [&](unsigned to, const CUtensorMap& from, Barrier full, bool heads_last, int tile) {
        full.expect(B::BYTES);
        const int head = blockIdx.y, key = work.key + tile * TILE;
        for (int p = 0; p < B::PANELS; ++p)
            load_box(to + p * B::PANEL_BYTES, &from, full, p * PANEL, heads_last ? key : head, heads_last ? head : key);
    };
    const auto fetch_keys = [&](int tile) {
        fetch(k_at + stage_of(tile) * B::BYTES, keys, k_full[stage_of(tile)], setup.k_heads_last, tile);
    };
    const auto fetch_values = [&](int tile, Barrier full) {
        fetch(v_at + stage_of(tile) * B::BYTES, values, full, setup.v_heads_last, tile);
    };
    // The last tile's values behind the sequence become zeros, by `threads` threads; a barrier must follow.
    const auto clear_rest = [&](int thread, int threads) {
        const unsigned last = v_at + stage_of(end - 1) * B::BYTES;
        for (int p = 0; p < B::PANELS; ++p)
            for (int at = in_last * PANEL * 2 + thread * 16; at < B::PANEL_BYTES; at += threads * 16)
                store_sixteen(last + p * B::PANEL_BYTES + at, 0);
        stores_before_async();
    };

    if (!B::SOLO && warp >= 4 * B::GROUPS) {  // ---- the producer
        fewer_registers<B::FEWER>();
        if (warp > 4 * B::GROUPS) return;
        if (lane == 0) {
#pragma unroll 1
            for (int tile = begin; tile < end; ++tile) {
                const int stage = stage_of(tile), turn = turn_of(tile);
                k_empty[stage].wait(turn ^ 1);
                fetch_keys(tile);
                v_empty[stage].wait(turn ^ 1);
                fetch_values(tile, tile + 1 == end && in_last < TILE ? landed : v_full[stage]);
            }
        }
        __syncwarp();
        if (begin < end && in_last < TILE) {
            landed.wait(0);
            clear_rest(lane, 32);
            __syncwarp();
            if (lane == 0) v_full[stage_of(end - 1)].arrive();
        }
        return;
    }

    // ---- a consumer
    if constexpr (!B::SOLO) more_registers<B::MORE>();
    if (B::SOLO && threadIdx.x == 0)
        for (int tile = begin; tile < min(begin + B::STAGES, end); ++tile) {
            fetch_keys(tile);
            fetch_values(tile, v_full[stage_of(tile)]);
        }
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
    unsigned p[STEPS][4];
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
        for (int g = 0; g < STEPS; ++g) {
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
        const int now = thread_now(), place = now % 32 / 4, t = now % 4;
        const Seen* const own = rows + now / 32 * 16 + place;
        const Seen &warp_first = own[-place], &warp_last = own[15 - place];
        const bool whole = key >= warp_last.from && key + TILE <= warp_first.to;  // all rows of the warp see all of them
        if (!whole) {
            const int at = key + 2 * t, after[2] = {at - own[0].from, at - own[8].from};
            const unsigned seen[2] = {unsigned(own[0].to - own[0].from), unsigned(own[8].to - own[8].from)};
#pragma unroll
            for (int j = 0; j < TILE / 2; ++j)
                if (!(unsigned(after[j / 2 % 2] + j / 4 * 8 + j % 2) < seen[j / 2 % 2])) s[j] = NONE_YET;
        }
        float below[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float most = top[i];
#pragma unroll
            for (int j = 2 * i; j < TILE / 2; j += 4) most = larger(most, larger(s[j], s[j + 1]));
#pragma unroll
            for (int step = 1; step < 4; step *= 2) most = larger(most, __shfl_xor_sync(WARP, most, step));
            below[i] = most == NONE_YET ? 0.0f : most;
            faded[i] = exp2_short(top[i] - below[i], setup.weighing.c, setup.weighing.least);
            top[i] = most;
        }
        const auto weigh_step = [&](int g) {
#pragma unroll
            for (int j = 8 * g; j < 8 * g + 8; ++j)
                s[j] = exp2_short(s[j] - below[j / 2 % 2], setup.weighing.c, setup.weighing.least);
        };
        // Keys that no row of the warp sees have weights that round to +0: they need no exp. (The branches also keep ptxas from
        // mixing all steps, which took registers that are not there.)
        unsigned wanted = ~0u;
        if (!whole) {
            const auto up_to = [](int g) { return (1u << min(max(g, 0), STEPS)) - 1u; };
            wanted = up_to((warp_last.to - key + STEP - 1) / STEP) & ~up_to((warp_first.from - key) / STEP);
        }
#pragma unroll
        for (int g = 0; g < STEPS; ++g) {
            if (wanted >> g & 1) {
                weigh_step(g);
            } else {
#pragma unroll
                for (int j = 8 * g; j < 8 * g + 8; ++j) s[j] = 0.0f;
            }
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

    if constexpr (!B::SOLO) {
        for (int tile = begin; tile < group_from; ++tile) pass(tile);
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
        for (int tile = max(group_from, group_to); tile < end; ++tile) pass(tile);
    } else {
        // once all warps have read a stage, thread 0 has it filled again
        const auto refill = [&](int tile, auto fetch) {
            if (tile + B::STAGES >= end) return;
            named_barrier<1>(GROUP);
            if (threadIdx.x == 0) fetch(tile + B::STAGES);
            __syncwarp();
        };
#pragma unroll 1
        for (int tile = begin; tile < end; ++tile) {
            const int stage = stage_of(tile), turn = turn_of(tile);
            k_full[stage].wait(turn);
            scores(stage);
            wait_for_wgmma<0>();
            hold(s);
            refill(tile, fetch_keys);
            weigh(tile);
            fade();
            round();
            v_full[stage].wait(turn);
            if (tile + 1 == end && in_last < TILE) {
                clear_rest(threadIdx.x, GROUP);
                named_barrier<1>(GROUP);
            }
            products(stage);
            wait_for_wgmma<0>();
            hold(acc);
            hold(l);
            refill(tile, [&](int next) { fetch_values(next, v_full[stage_of(next)]); });
        }
    }

    // A quotient by a row's sum is a product with its reciprocal and two corrections, which lead to the quotient itself,
    // rounded once (Markstein), where nothing leaves the range of normal numbers; a division takes three times as long.
    constexpr float SMALLEST = 0x1p-60f, LARGEST = 0x1p60f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int r = mine + 8 * i;
        if (r >= work.rows) continue;
        const bool lost = !(fabsf(top[i]) < -NONE_YET);
        const float whole = lost ? __int_as_float(0x7fffffff) : l[2 * i], part = 1.0f / whole;
        T* const to = work.out + work.token_of(r) * work.out_token + work.head_of(r) * int64_t(WIDTH) + 2 * t;
        const auto store = [&](auto quotient) {
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n)
                *reinterpret_cast<unsigned*>(to + n * 8) =
                    round_two<T>(quotient(acc[4 * n + 2 * i]), quotient(acc[4 * n + 2 * i + 1]));
        };
        float least = LARGEST, most = 0.0f;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float size = fabsf(acc[4 * n + 2 * i + e]);
                least = fminf(least, size);
                most = fmaxf(most, size);
            }
        if (rows[r].to == 0) {
            store([](float) { return 0.0f; });
        } else if (least >= SMALLEST && most <= LARGEST) {
            store([&](float x) {
                float q = x * part;
                q = fmadd(fmadd(-whole, q, x), part, q);
                return fmadd(fmadd(-whole, q, x), part, q);
            });
        } else {
            store([&](float x) { return (x + 0.0f) / whole; });
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
    CUtensorMap key_map, value_map;
    if (!keys.map(key_map) || !values.map(value_map)) return false;
    const int64_t rows = packed.total * (args.H / args.H_kv);
    const int way =
        attention_hopper_way.take(own_way(rows, ceil_div(rows, packed.B), args.H_kv, int(args.D), device.multiprocessors));
    const auto go = args.D == 64 ? way == 0 ? start<64, 0> : start<64, 1> : way == 0 ? start<128, 0> : start<128, 1>;
    go(args, packed, key_map, value_map, setup, stream);
    return true;
}

static const bool attention_there = (hopper.attention_tensor = attention_tensor, true);

}  // namespace sm90
}  // namespace rk
