// attention.cu: packed attention of mode "tensor": float16 and bfloat16, heads of up to 256, any length, window, grouping.
//
// Per query row, over tiles of 128 keys (64 where a head is wider than 128), counted from the sequence's own first key,
// ascending (NUMERICS.md, "Mode tensor"):
//   s_j = dot_tensor(q, k_j)                         one mma for every 16 features; in some calls scaled, and capped
//   (weighing.h) m' = max(m, max_j s_j), a NaN stays;  r = exp2_short(m - m');  p_j = exp2_short(s_j - m') rounded to half, 0
//   for a hidden key o = o * r, then o += p_j v_j;  l = l * r, then l += p_j * 1      one mma for every 16 keys, ascending, in
//   both
// and out = o / l, +0 for a row that sees no key, NaN for one whose m is no finite number. Until a row has seen a score that is
// not -inf, 0 stands for m' beside the minus signs. A hidden key is a score of -inf: its weight is below 2^-140, which is +0.
//
// A warp has 16 rows of one sequence and key head, from the sequence's first row on, whatever the way. What it leaves out (the
// 16 keys that none of its rows sees, a tile of such) would have changed nothing: r is 1, every p is +0, and an mma of zeros
// keeps its sum, up to the sign of a zero, which one last + 0 takes away. So neither blocks nor tiles are in the expression.
// Only a value that is not finite may reach a row that does not see it, as 0 * inf: if one of the same 16 rows sees one of
// the same 16 keys, and that again depends on nothing but the sequence.
//
// A block has 2, 4 or 8 warps, and one key head after another, in which the same tokens are its rows. Parts of 64 keys and of
// 64 values pass through two or three stages of shared memory: of a tile all its keys, then all its values. cp.async fills
// them one or two steps ahead, across tiles and heads. Q stays in registers as fragments, or in shared memory where those are
// too few: each thread reads what it wrote.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../../weighing.h"
#include "../attention.cuh"
#include "../kernels.h"
#include "room.cuh"
#include "mma.cuh"

namespace rk {

using Keys = std::false_type;
using Values = std::true_type;
using sm80::WARP_ROWS, sm80::WARP_WAYS, sm80::PART;
static_assert(sm80::WORK_BYTES == WORK);
constexpr int GROUPS = PART / STEP;  // of 16 keys, in a part
constexpr float NONE_YET = -__builtin_huge_valf();

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int WARPS_OF_64 = 8;
#else
constexpr int WARPS_OF_64 = 12;
#endif

// What follows from the width that a head is filled up to.
template <int WIDTH>
struct Head {
    static constexpr int ROW = WIDTH * 2, PIECES = WIDTH / 8, STEPS = WIDTH / STEP;
    static constexpr int SURE_STEPS = WIDTH <= 32 ? 1 : WIDTH <= 128 ? STEPS - 1 : STEPS - 3;  // that even the narrowest has
    static constexpr int BYTES = PART * ROW;                                                   // of a part
    static constexpr sm80::HeadTile SHAPE{WIDTH};
    static constexpr int KEYS = SHAPE.keys(), PARTS = KEYS / PART;  // of a tile
    static constexpr bool Q_IN_REGISTERS = SHAPE.q_in_registers();
    static constexpr int STAGES = SHAPE.stages();
    // warps: three, two, one blocks of 4. Where ptxas wants more registers for heads of 64, on 10.0 and later, two.
    static constexpr int REGISTERS_FOR = WIDTH <= 32 ? 12 : WIDTH <= 64 ? WARPS_OF_64 : WIDTH <= 128 ? 8 : 4;
};

// Where piece `piece` of row `row` lies in a tile: no two of eight rows, as ldmatrix reads them, meet in a bank. The pieces of
// a group of 8 or, where a row is no multiple of 128 bytes, 4 change places; an even step goes by step_to.
template <int ROW>
__device__ __forceinline__ unsigned place(unsigned row, unsigned piece) {
    return row * ROW + ((piece ^ (ROW % 128 ? row / 2 % 4 : row % 8)) * 16);
}
template <int ROW>
__device__ __forceinline__ unsigned step_to(unsigned at, unsigned piece) {
    constexpr unsigned SWAPPED = ROW % 128 ? 3 : 7;
    return (at ^ ((piece & SWAPPED) * 16)) + (piece & ~SWAPPED) * 16;
}

// What the threads of a row need of it, found once; garbage rows repeat the last.
struct Row {
    int64_t q, out;  // elements from the first head's
    int begin, end;  // the keys it sees; none: end is 0
};
static_assert(sizeof(Row) == sm80::ROW_BYTES);

struct Tiles {
    int begin, end;  // of keys
};

// A part of keys or values: rows from `live` on and halves from D on become zeros, unread.
template <int WIDTH, class T>
__device__ __forceinline__ void fetch_part(unsigned to, const T* from, int64_t stride, int live, int D, bool wide) {
    constexpr int PIECES = Head<WIDTH>::PIECES;
    constexpr int ACROSS = PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32;
    const int thread = thread_now(), piece = thread % ACROSS, valid = min(max(D - piece * 8, 0), 8);
    const int rows = min(PART, (live + STEP - 1) / STEP * STEP);  // nobody reads further
    if (PIECES < ACROSS && piece >= PIECES) return;
    if (wide && D == WIDTH && live >= PART) {  // as nearly always: no piece of it is missing
        const T* row = from + thread / ACROSS * stride + piece * 8;
        const int64_t down = blockDim.x / ACROSS * stride;
#pragma unroll 1
        for (int r = thread / ACROSS; r < PART; r += blockDim.x / ACROSS, row += down)
            copy_piece(to + place<Head<WIDTH>::ROW>(r, piece), row);
        return;
    }
    const auto each_row = [&](auto copy) {
#pragma unroll 1
        for (int r = thread / ACROSS; r < rows; r += blockDim.x / ACROSS) {
            const int some = r < live ? valid : 0;
            copy(to + place<Head<WIDTH>::ROW>(r, piece), from + (some ? r * stride + piece * 8 : 0), some);
        }
    };
    if (wide) each_row([](unsigned at, const T* halves, int some) { copy_halves(at, halves, some); });
    else each_row([](unsigned at, const T* halves, int some) { copy_halves_one_by_one(at, halves, some); });
}

// 1 twice, in half precision.
template <class T>
constexpr unsigned ONES = sizeof(T) == 0;
template <>
constexpr unsigned ONES<f16> = 0x3C003C00u;
template <>
constexpr unsigned ONES<bf16> = 0x3F803F80u;

// The larger of two numbers; a NaN wins.
__device__ __forceinline__ float largest_of(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

template <int WIDTH, class T>
__global__ void __launch_bounds__(Head<WIDTH>::REGISTERS_FOR * 32)
    attention_tensor_rows(AttentionArgs a, Weighing weigh, bool wide, PackedArgs packed) {
    using H = Head<WIDTH>;
    extern __shared__ __align__(128) char shared[];
    static_assert(sizeof(Work<T>) + sizeof(Tiles) <= WORK, "the bytes that both have in shared memory");
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const int D = int(a.D);

    Work<T>& work = *reinterpret_cast<Work<T>*>(shared);
    if (threadIdx.x < 32) find_work(a, packed, blockIdx.y, warps * WARP_ROWS, work);
    __syncthreads();
    if (work.rows == 0) return;

    // shared memory after `work`: the stages, Q unless it is in registers, the rows
    const unsigned stages = shared_address(shared + WORK);
    uint4* const q_shared = reinterpret_cast<uint4*>(shared + WORK + H::STAGES * H::BYTES) + threadIdx.x;
    Row* const rows = reinterpret_cast<Row*>(shared + WORK + H::STAGES * H::BYTES +
                                             (H::Q_IN_REGISTERS ? 0 : warps * 32 * H::STEPS * int(sizeof(uint4))));

    // the tiles of keys that the block sees; a register each is too much
    const auto key_of = [](int tile) { return tile * H::KEYS; };
    const auto tile_of = [](int key) { return key / H::KEYS; };
    Tiles& tiles = *reinterpret_cast<Tiles*>(shared + sizeof(Work<T>));
    if (threadIdx.x == 0) tiles = {tile_of(work.begin(work.token)), tile_of(work.end(work.token_of(work.rows - 1)) - 1) + 1};
    __syncthreads();

    // ---- the stages. A step is a part of a tile's keys or of its values, of which nothing is copied where no row sees it
    unsigned stage = (H::STAGES - 1) * H::BYTES;
    const auto after = [](unsigned at) { return at == (H::STAGES - 1) * H::BYTES ? 0 : at + H::BYTES; };
    const auto fetch = [&](auto kind, int head, int tile, int part, unsigned to) {
        constexpr bool values = decltype(kind)::value;
        if (head < a.H_kv) {
            const int64_t key = key_of(tile) + part * PART, stride = values ? a.v_token : a.k_token;
            const T* const from =
                (values ? work.v : work.k) + key * stride + (head - int(blockIdx.y)) * (values ? a.v_head : a.k_head);
            fetch_part<WIDTH>(stages + to, from, stride, work.length - int(key), D, wide);
        }
        commit_copies();  // perhaps an empty group: the count of groups is the clock
    };
    // Begins a step: its stage, which has landed. Everybody is past the step before, so that its stage can be filled again: by
    // the same part of the other kind where a tile has two parts; else by the same of the next tile with three stages, and with
    // two by what comes next.
    const auto advance = [&](auto kind, int head, int tile, int part) {
        constexpr bool values = decltype(kind)::value;
        constexpr bool other = H::PARTS == 2 || H::STAGES == 2;
        static_assert(H::PARTS == 1 || (H::PARTS == 2 && H::STAGES == 3));
        wait_for_copies<H::STAGES - 2>();
        __syncthreads();
        const unsigned before = stage;
        stage = after(stage);
        if (other && !values) {
            fetch(Values(), head, tile, part, before);
        } else {
            const bool last = tile + 1 == tiles.end;
            fetch(std::bool_constant<values != other>(), last ? head + int(gridDim.y) : head, last ? tiles.begin : tile + 1,
                  part, before);
        }
        return stages + stage;
    };
    fetch(Keys(), blockIdx.y, tiles.begin, 0, 0);
    if constexpr (H::PARTS == 2) fetch(Keys(), blockIdx.y, tiles.begin, 1, H::BYTES);
    else if constexpr (H::STAGES == 3) fetch(Values(), blockIdx.y, tiles.begin, 0, H::BYTES);

    for (int r = threadIdx.x; r < warps * WARP_ROWS; r += blockDim.x) {
        const int there = min(r, work.rows - 1), token = work.token_of(there), head = work.head_of(there);
        rows[r] = {token * work.q_token + head * work.q_head, token * work.out_token + int64_t(head) * D, work.begin(token),
                   work.end(token)};
    }
    __syncthreads();
    const bool live = warp * WARP_ROWS < work.rows;
    const Row* const mine = rows + warp * WARP_ROWS + lane / 4;  // and 8 further down

    unsigned q[H::Q_IN_REGISTERS ? H::STEPS : 1][4];
    const auto load_q = [&](int head) {
        const T* const from = work.q + (head - int(blockIdx.y)) * (work.group * a.q_head) + 2 * t;
        const T* const row[2] = {from + mine[0].q, from + mine[8].q};
        const auto each = [&](auto load) {
#pragma unroll
            for (int step = 0; step < H::STEPS; ++step) {
                unsigned x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int feature = step * STEP + i / 2 * 8;
                    x[i] = load(row[i % 2] + feature, D - feature - 2 * t);
                }
                if constexpr (H::Q_IN_REGISTERS)
                    for (int i = 0; i < 4; ++i) q[step][i] = x[i];
                else q_shared[step * blockDim.x] = make_uint4(x[0], x[1], x[2], x[3]);
            }
        };
        const auto two = [](const T* p) { return *reinterpret_cast<const unsigned*>(p); };
        const auto one = [](const T* p) { return unsigned(p->bits); };
        if (wide && D % 2 == 0) each([&](const T* p, int left) { return left > 0 ? two(p) : 0u; });
        else each([&](const T* p, int left) { return (left > 0 ? one(p) : 0u) | (left > 1 ? one(p + 1) << 16 : 0u); });
    };
    // Q's fragment of features [16 step, 16 step + 16)
    const auto q_of = [&](int step, unsigned (&x)[4]) {
        if constexpr (H::Q_IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = q[step][i];
        } else {
            const uint4 all = q_shared[step * blockDim.x];
            x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
        }
    };
    // s[0], s[1] += the products of x with two times 8 keys
    const auto multiply = [&](float (*s)[4], const unsigned (&x)[4], unsigned keys) {
        unsigned k[4];
        load_matrices(k, keys);
        mma<T>(s[0], x, k[0], k[1]);
        mma<T>(s[1], x, k[2], k[3]);
    };

    const unsigned my_keys = place<H::ROW>(row_of_b(), piece_of_b()), my_values = place<H::ROW>(row_of_a(), piece_of_a());
#pragma unroll 1
    for (int head = blockIdx.y; head < a.H_kv; head += gridDim.y) {
        if (live) load_q(head);
        float top[2] = {NONE_YET, NONE_YET}, l[4] = {};  // l[2 i]: of row i of this thread
        float out[H::PIECES][4];
#pragma unroll
        for (int n = 0; n < H::PIECES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[n][e] = 0.0f;

#pragma unroll 1
        for (int tile = tiles.begin; tile < tiles.end; ++tile) {
            const int key = key_of(tile);
            // the warp's first row sees from the earliest key on, its last row up to the latest
            const Row &first = rows[warp * WARP_ROWS], &last = rows[warp * WARP_ROWS + WARP_ROWS - 1];
            // of the tile's groups of 16 keys: those that a row sees
            const int from = max(first.begin - key, 0) / STEP, to = live ? (last.end - key + STEP - 1) / STEP : 0;
            const auto left_out = [&](int g) { return g < from || g >= to; };
            const auto sees = [&](int p) { return from < (p + 1) * GROUPS && to > p * GROUPS && from < to; };

            float s[2 * GROUPS * H::PARTS][4];  // scores; s[2 g], s[2 g + 1]: of keys 16 g + 0..7 and + 8..15
            // s[n][e] is of row e / 2 of this thread, and of key `key + 8 n + 2 t + e % 2`: a term that depends on the two
            // places would be added where s is scaled.
#pragma unroll
            for (int p = 0; p < H::PARTS; ++p) {
                const unsigned keys = advance(Keys(), head, tile, p) + my_keys;
#pragma unroll
                for (int n = 2 * GROUPS * p; n < 2 * GROUPS * (p + 1); ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
                if (from <= p * GROUPS && to >= (p + 1) * GROUPS) {
#pragma unroll
                    for (int step = 0; step < H::STEPS; ++step) {
                        if (step >= H::SURE_STEPS && step * STEP >= D) break;
                        unsigned x[4];
                        q_of(step, x);
#pragma unroll
                        for (int g = 0; g < GROUPS; ++g)
                            multiply(&s[2 * (GROUPS * p + g)], x, step_to<H::ROW>(keys, 2 * step) + g * STEP * H::ROW);
                    }
                } else if (sees(p)) {
#pragma unroll
                    for (int g = 0; g < GROUPS; ++g) {
                        if (left_out(GROUPS * p + g)) continue;
#pragma unroll
                        for (int step = 0; step < H::STEPS; ++step) {
                            if (step >= H::SURE_STEPS && step * STEP >= D) break;
                            unsigned x[4];
                            q_of(step, x);
                            multiply(&s[2 * (GROUPS * p + g)], x, step_to<H::ROW>(keys, 2 * step) + g * STEP * H::ROW);
                        }
                    }
                }
            }
            if (weigh.scaled) {
#pragma unroll
                for (int n = 0; n < 2 * GROUPS * H::PARTS; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * a.scale;
                if (a.softcap != 0.0f) {
#pragma unroll
                    for (int n = 0; n < 2 * GROUPS * H::PARTS; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) s[n][e] = capped(s[n][e], a.softcap);
                }
            }
#pragma unroll
            for (int p = 0; p < H::PARTS; ++p) {
                const int at = key + p * PART;
                if (last.begin <= at && first.end >= at + PART) continue;  // every row sees all of it
                const int behind[2] = {at + 2 * t - mine[0].begin, at + 2 * t - mine[8].begin};
                const unsigned seen[2] = {unsigned(mine[0].end - mine[0].begin), unsigned(mine[8].end - mine[8].begin)};
#pragma unroll
                for (int n = 0; n < 2 * GROUPS; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& score = s[2 * GROUPS * p + n][e];
                        score = unsigned(behind[e / 2] + n * 8 + e % 2) < seen[e / 2] ? score : NONE_YET;
                    }
            }
            unsigned weights[GROUPS * H::PARTS]
                            [4];  // rounded; all are set, or ptxas keeps registers for them from tile to tile
#pragma unroll
            for (int g = 0; g < GROUPS * H::PARTS; ++g)
#pragma unroll
                for (int i = 0; i < 4; ++i) weights[g][i] = 0;
            if (from < to) {
                float base[2], faded[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float most = top[i];
#pragma unroll
                    for (int n = 0; n < 2 * GROUPS * H::PARTS; ++n)
                        most = largest_of(most, largest_of(s[n][2 * i], s[n][2 * i + 1]));
#pragma unroll
                    for (int step = 1; step < 4; step *= 2) most = largest_of(most, __shfl_xor_sync(WARP, most, step));
                    base[i] = most == NONE_YET ? 0.0f : most;
                    faded[i] = exp2_short(top[i] - base[i], weigh.c, weigh.least);
                    top[i] = most;
                }
#pragma unroll
                for (int g = 0; g < GROUPS * H::PARTS; ++g) {
                    if (left_out(g)) continue;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float* const pair = s[2 * g + i / 2] + i % 2 * 2;
                        const float a_half = exp2_short(pair[0] - base[i % 2], weigh.c, weigh.least);
                        const float b_half = exp2_short(pair[1] - base[i % 2], weigh.c, weigh.least);
                        weights[g][i] = round_two<T>(a_half, b_half);
                    }
                }
                if (__any_sync(WARP, faded[0] != 1.0f || faded[1] != 1.0f)) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) l[e] = l[e] * faded[e / 2];
#pragma unroll
                    for (int n = 0; n < H::PIECES; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) out[n][e] = out[n][e] * faded[e / 2];
                }
            }

#pragma unroll
            for (int p = 0; p < H::PARTS; ++p) {
                const unsigned values = advance(Values(), head, tile, p) + my_values;
                if (!sees(p)) continue;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    if (left_out(GROUPS * p + g)) continue;
                    const unsigned (&weight)[4] = weights[GROUPS * p + g];
#pragma unroll
                    for (int n = 0; n < H::STEPS; ++n) {
                        if (n >= H::SURE_STEPS && n * STEP >= D) break;
                        unsigned v[4];
                        load_transposed(v, step_to<H::ROW>(values, 2 * n) + g * STEP * H::ROW);
                        mma<T>(out[2 * n], weight, v[0], v[1]);
                        mma<T>(out[2 * n + 1], weight, v[2], v[3]);
                    }
                    mma<T>(l, weight, ONES<T>, ONES<T>);
                }
            }
        }

        if (!live) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (warp * WARP_ROWS + lane / 4 + 8 * i >= work.rows) continue;
            const bool blind = mine[8 * i].end == 0;  // whatever came in as 0 * inf
            // a NaN or an infinity of q and k: no weight is right
            const float below = fabsf(top[i]) < -NONE_YET ? l[2 * i] : __int_as_float(0x7fc00000);
            T* const to = work.out + (head - int(blockIdx.y)) * (int64_t(work.group) * D) + mine[8 * i].out + 2 * t;
#pragma unroll
            for (int n = 0; n < H::PIECES; ++n) {
                const int column = n * 8 + 2 * t;
                const unsigned y =
                    blind ? 0u : round_two<T>((out[n][2 * i] + 0.0f) / below, (out[n][2 * i + 1] + 0.0f) / below);
                if (D % 2 == 0) {
                    if (column < D) *reinterpret_cast<unsigned*>(to + n * 8) = y;
                } else {
                    if (column < D) to[n * 8].bits = uint16_t(y);
                    if (column + 1 < D) to[n * 8 + 1].bits = uint16_t(y >> 16);
                }
            }
        }
    }
}

// Ways 0, 1, 2: blocks of 8, 4, 2 warps (4, 4, 2 for heads wider than 128), one key head a block. + 3: up to HEADS_AT_ONCE.
static Choice attention_tensor_way("attention_tensor", 2 * WARP_WAYS);
constexpr int HEADS_AT_ONCE = 4;

// On an H100 four warps were the best or within an eighth of it, whatever the lengths, but for short sequences with wide heads
// and for calls that leave multiprocessors idle; several heads a block never paid by more than that. `mean`: rows of a
// sequence.
static int own_way(int64_t rows, int64_t mean, int64_t H_kv, int width) {
    constexpr int64_t processors = 132, wide = 64, shortest = 96;
    const int64_t blocks = ceil_div(rows, 4 * WARP_ROWS) * H_kv;
    return (width > wide && mean <= shortest) || blocks < processors ? 2 : 1;
}

template <int WIDTH>
static void start_attention(const AttentionArgs& args, const PackedArgs& packed, Stream stream) {
    using Shape = Head<WIDTH>;
    const int64_t rows = packed.total * (args.H / args.H_kv), B = packed.B;
    const int way = attention_tensor_way.take(own_way(rows, ceil_div(rows, B), args.H_kv, WIDTH));
    const int warps = Shape::SHAPE.warps(way % WARP_WAYS);
    const auto starts = [&](const void* p, int64_t token, int64_t head) {
        return aligned(p, 16) && token % 8 == 0 && head % 8 == 0;
    };
    const bool wide = starts(args.q, args.q_token, args.q_head) && starts(args.k, args.k_token, args.k_head) &&
                      starts(args.v, args.v_token, args.v_head);
    const dim3 grid(checked_blocks("attention", ceil_div(rows, warps * WARP_ROWS) + B),
                    unsigned(std::min<int64_t>(way < WARP_WAYS ? args.H_kv : ceil_div(args.H_kv, HEADS_AT_ONCE), 65535)));
    const size_t shared = Shape::SHAPE.shared(warps);
    const Weighing weigh = weighing(args.scale, args.softcap);
    const auto start = [&](auto kernel) {
        launch("attention", kernel, grid, warps * 32, shared, stream, args, weigh, wide, packed);
    };
    if (args.dtype == Dtype::F16) start(attention_tensor_rows<WIDTH, f16>);
    else start(attention_tensor_rows<WIDTH, bf16>);
}

void attention_tensor(const AttentionArgs& args, const PackedArgs& packed, Stream stream) {
    if (packed.B == 0 || packed.total == 0 || args.H == 0 || args.D == 0) return;
    const auto start = args.D <= 32    ? start_attention<32>
                       : args.D <= 64  ? start_attention<64>
                       : args.D <= 96  ? start_attention<96>
                       : args.D <= 128 ? start_attention<128>
                       : args.D <= 192 ? start_attention<192>
                                       : start_attention<256>;
    start(args, packed, stream);
}

}  // namespace rk
