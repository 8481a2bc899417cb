// attention.cu: packed attention, bidirectional or windowed (causal is a window), grouped heads, any head size and length.
//
// For each query row: s_j = dot(q, k_j) * scale, or tanh(that / softcap) * softcap; max exact; e_j = exp(s_j - max); l =
// row_sum(e), lane j mod 32; out = sum(e_j v_j) / l, one chain per tile of 64 keys, tiles ascending. j counts from the
// sequence's own first key (NUMERICS.md, "attention"). Nothing here splits a chain: warps and threads split rows, keys' scores
// and output columns.
//
// A row here is a (token, query head) pair: the query heads of one key head lie side by side, token by token, so that they
// share the keys and values that a block reads, and a short sequence still fills its block. A warp owns 32 rows, a block 1, 2
// or 4 warps of one sequence and key head. Keys and values come through two stages of shared memory by cp.async: one stage is
// computed with while the other is filled. In a warp, thread (rg, kg) holds an 8 x 8 tile: rows rg + 4 i, keys kg + 8 j; later
// the same rows and output columns 4 kg + 0..3 and + 32.
//
// Round 0 finds the maxima. Round g + 1 makes the output columns [64 g, 64 g + 64): weights, their sum, weights times values.
// Scores are kept in shared memory from round 0 on if the block's keys fit; else every later round computes them again.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "../attention.cuh"
#include "../kernels.h"
#include "room.cuh"

namespace rk {

constexpr int WARP_ROWS = 32, THREAD_ROWS = 8, THREAD_KEYS = 8;
constexpr int MOST_WARPS = 4;
constexpr int LINE = 128;                             // bytes of a row of a slice of Q or K: 32 floats or 64 halves
constexpr int COLUMNS = 64;                           // output columns of a round
constexpr int STAGE = KEY_TILE * LINE;                // bytes of a slice of K; of 32 (float) or 64 (half) rows of V
constexpr int Q_SLICE = WARP_ROWS * LINE;             // bytes of a warp's slice of Q
constexpr int SCORE_TILE = WARP_ROWS * KEY_TILE * 4;  // bytes of a warp's scores for a tile of keys
constexpr float HIDDEN = -0.0f;  // the weight of a hidden key: adds nothing to any sum, and no exp is -0, so it marks the key

// What the launcher decides; nothing in it reaches a bit.
struct AttentionSetup {
    int slices;       // of LINE bytes in a head
    int score_tiles;  // per warp
    int most_kept;    // tiles of keys for which scores are kept; more: they are computed again
    bool resident;    // Q stays in shared memory; else its slices come along with K's
    bool wide;        // every row of q, k, v starts on 16 bytes
    bool wide_out;    // four outputs can be stored at once
};

struct Place {
    int warp, lane, rg, kg;
};
__device__ __forceinline__ Place place_now() {
    const int t = thread_now();
    return {t / 32, t % 32, t % 32 / 8, t % 8};
}

// Copies `rows` rows of CHUNKS * 16 bytes to `to`; row_at(r) is row r's first element. Rows from `live` on and elements from
// `elements` on become zeros, unread. Chunk c of row r goes to place c ^ (r & SWIZZLE): threads that read the same chunk of
// eight neighbouring rows then find them in different banks.
template <int CHUNKS, int SWIZZLE, class T, class RowAt>
__device__ __forceinline__ void stage_rows(char* to, int rows, int live, int elements, bool wide, RowAt row_at) {
    constexpr int PER = 16 / int(sizeof(T));
    const int thread = thread_now(), c = thread % CHUNKS, inside = min(max(elements - c * PER, 0), PER);
#pragma unroll 1
    for (int r = thread / CHUNKS; r < rows; r += blockDim.x / CHUNKS) {
        const int some = r < live ? inside : 0;
        const T* from = row_at(some > 0 ? r : 0) + (some > 0 ? c * PER : 0);
        char* at = to + (r * CHUNKS + (c ^ (r & SWIZZLE))) * 16;
        if (wide) {
            copy_16(at, from, some * int(sizeof(T)));
        } else {
#pragma unroll 1
            for (int e = 0; e < PER; ++e) reinterpret_cast<T*>(at)[e] = e < some ? from[e] : T{};
        }
    }
}

// s[i][j] += the next `width` terms of the chains of row rg + 4 i and key kg + 8 j. q, k: slices of LINE bytes a row.
template <class T>
__device__ __forceinline__ void add_scores(const char* q, const char* k, int width, bool second,
                                           float (&s)[THREAD_ROWS][THREAD_KEYS]) {
    constexpr int PER = 16 / int(sizeof(T));
    const auto [warp, lane, rg, kg] = place_now();
    const char* q_even = q + rg * LINE;
    const char* k_row = k + kg * LINE;
#pragma unroll 1
    for (int f = 0; f < width; f += 4) {
        const int chunk = f / PER, in_chunk = f % PER * int(sizeof(T));
        const int even = (chunk ^ rg) * 16 + in_chunk, odd = (chunk ^ (rg + 4)) * 16 + in_chunk;
        const int place = (chunk ^ kg) * 16 + in_chunk;
        Four x[THREAD_ROWS];
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i)
            x[i] = load_four(reinterpret_cast<const T*>(q_even + i * 4 * LINE + (i % 2 ? odd : even)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half && !second) break;
#pragma unroll
            for (int j = 4 * half; j < 4 * half + 4; ++j) {
                const Four y = load_four(reinterpret_cast<const T*>(k_row + j * 8 * LINE + place));
#pragma unroll
                for (int e = 0; e < 4; ++e)
#pragma unroll
                    for (int i = 0; i < THREAD_ROWS; ++i) s[i][j] = fmadd(x[i].v[e], y.v[e], s[i][j]);
            }
        }
    }
}

// Where a warp's score of row rg + 4 i (the caller adds 4 i rows) and key `key` lies in its tile. The swizzle keeps both the
// writes, eight keys of four rows, and the reads, four keys of four rows, free of bank conflicts.
__device__ __forceinline__ int score_at(int rg, int key) { return rg * KEY_TILE + ((key / 4) ^ (2 * rg)) * 4 + key % 4; }

// sum[i][c] += the terms of keys [key, key + count) of the tile, c < 4 HALVES. values: rows of COLUMNS, from that key on. With
// HIDES, keys that a row does not see are skipped; without, such keys lie behind the sequence's end, where weights and values
// are zeros. A weight is used for all columns before the next row's, and rows go there and back: what was just used is used
// again, which leaves the register banks to the rest.
template <bool HIDES, int HALVES, class T>
__device__ __forceinline__ void add_values(const float* weights, const T* values, int key, int count,
                                           float (&sum)[THREAD_ROWS][8]) {
    const auto [warp, lane, rg, kg] = place_now();
#pragma unroll 1
    for (int n = 0; n < count; n += 4) {
        Four e[THREAD_ROWS];
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) e[i] = load_four(weights + i * 4 * KEY_TILE + score_at(rg, key + n));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            Four v[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; ++half) v[half] = load_four(values + (n + m) * COLUMNS + half * 32 + kg * 4);
#pragma unroll
            for (int r = 0; r < THREAD_ROWS; ++r) {
                const int i = m % 2 ? THREAD_ROWS - 1 - r : r;
                if (HIDES && __float_as_uint(e[i].v[m]) == 0x80000000u) continue;
#pragma unroll
                for (int d = 0; d < 4 * HALVES; ++d) {
                    const int c = i % 2 ? 4 * HALVES - 1 - d : d;
                    sum[i][c] = fmadd(e[i].v[m], v[c / 4].v[c % 4], sum[i][c]);
                }
            }
        }
    }
}

template <class T>
__global__ void __launch_bounds__(MOST_WARPS * 32, 2) attention_rows(AttentionArgs a, AttentionSetup setup, PackedArgs packed) {
    extern __shared__ __align__(128) char shared[];
    static_assert(sizeof(Work<T>) <= WORK, "the bytes that Work has in shared memory");
    constexpr int SLICE = LINE / int(sizeof(T));                // features
    constexpr int V_ROWS = STAGE / (COLUMNS * int(sizeof(T)));  // keys of a stage of V
    constexpr int V_CHUNKS = COLUMNS * int(sizeof(T)) / 16;
    const int warps = blockDim.x / 32;
    const int D = int(a.D), slices = setup.slices, score_tiles = setup.score_tiles, rounds = 1 + (D + COLUMNS - 1) / COLUMNS;
    const bool resident = setup.resident;

    Work<T>& work = *reinterpret_cast<Work<T>*>(shared);
    if (threadIdx.x < 32) find_work(a, packed, blockIdx.y, warps * WARP_ROWS, work);
    __syncthreads();
    if (work.rows == 0) return;
    const int length = work.length;

    // shared memory after `work`: two stages (each with its slice of Q, unless Q is resident), Q, scores by warp, the rows'
    // tokens
    const int stage_bytes = STAGE + (resident ? 0 : warps * Q_SLICE);
    char* const stages = shared + WORK;
    char* const q_resident = stages + 2 * stage_bytes;  // [warp][slice]
    char* const scores = q_resident + (resident ? warps * slices * Q_SLICE : 0);
    int* const tokens = reinterpret_cast<int*>(scores + warps * score_tiles * SCORE_TILE);
    for (int r = threadIdx.x; r < warps * WARP_ROWS; r += blockDim.x) tokens[r] = work.token_of(min(r, work.rows - 1));

    // the tiles of keys that the block sees
    const int tile_begin = work.begin(work.token) / KEY_TILE;
    const int tile_end = (work.end(work.token_of(work.rows - 1)) + KEY_TILE - 1) / KEY_TILE;
    const bool kept = tile_end - tile_begin <= setup.most_kept;

    // ---- the stages: a step is a slice of K or some rows of V; `next` is the step that is fetched next
    struct {
        int round, tile, part;  // parts: slices of K, then rows of V
    } next = {0, tile_begin, 0};
    const auto value_parts = [&](int tile) { return min(KEY_TILE, length - tile * KEY_TILE) > V_ROWS ? 2 : 1; };
    const auto fetch_q = [&](char* to, int w, int slice) {  // of warp w's rows: all threads copy
        const T* q = work.q + slice * SLICE;
        stage_rows<8, 7, T>(to, WARP_ROWS, work.rows - w * WARP_ROWS, D - slice * SLICE, setup.wide, [&](int r) {
            const int row = w * WARP_ROWS + r;
            return q + work.token_of(row) * work.q_token + work.head_of(row) * work.q_head;
        });
    };
    const auto fetch = [&](char* to) {
        if (next.round < rounds) {
            const int64_t key = next.tile * KEY_TILE;
            if (next.part < slices) {
                const T* k = work.k + key * work.k_token + next.part * SLICE;
                stage_rows<8, 7, T>(to, KEY_TILE, length - int(key), D - next.part * SLICE, setup.wide,
                                    [&](int r) { return k + r * work.k_token; });
                if (!resident)
                    for (int w = 0; w < warps; ++w) fetch_q(to + STAGE + w * Q_SLICE, w, next.part);
            } else {
                const int64_t from = key + (next.part - slices) * V_ROWS;
                const int column = (next.round - 1) * COLUMNS;
                const T* v = work.v + from * work.v_token + column;
                stage_rows<V_CHUNKS, 0, T>(to, V_ROWS, length - int(from), D - column, setup.wide,
                                           [&](int r) { return v + r * work.v_token; });
            }
            if (++next.part == slices + (next.round ? value_parts(next.tile) : 0)) {
                if (++next.tile == tile_end) {
                    next.tile = tile_begin;
                    ++next.round;
                }
                next.part = kept && next.round ? slices : 0;
            }
        }
        commit_copies();
    };
    int stage = 1;
    // The stage of the step that begins now. Everybody is past the step before, so that its stage can be filled again.
    const auto advance = [&]() {
        wait_for_copies<0>();
        __syncthreads();
        stage ^= 1;
        fetch(stages + (stage ^ 1) * stage_bytes);
        return stages + stage * stage_bytes;
    };
    if (resident)
        for (int w = 0; w < warps; ++w)
            for (int c = 0; c < slices; ++c) fetch_q(q_resident + (w * slices + c) * Q_SLICE, w, c);
    fetch(stages);
    __syncthreads();  // tokens

    // ---- the rounds
    // All barriers stand where every thread of the block comes by: rounds, tiles and parts are the block's, not the warp's.
    float s[THREAD_ROWS][THREAD_KEYS];  // scores, then weights, then sums of a tile
    float lanes[THREAD_ROWS][4];        // row_sum's lanes kg, kg + 8, kg + 16, kg + 24; in round 0, [0] is the maximum so far
    float top = 0.0f;                   // the maximum of row rg + 4 kg: eight threads share out their eight rows

#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        float sum[THREAD_ROWS][8];
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) {
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[i][c] = 0.0f;
#pragma unroll
            for (int l = 0; l < 4; ++l)
                if (round <= 1 || !kept) lanes[i][l] = round == 0 ? -__int_as_float(0x7f800000) : 0.0f;
        }
        const int columns = D - (round - 1) * COLUMNS;
#pragma unroll 1
        for (int tile = tile_begin; tile < tile_end; ++tile) {
            const int key = tile * KEY_TILE;
            const auto [warp, lane, rg, kg] = place_now();
            // the warp's first row sees from the earliest key on, its last row up to the latest; garbage rows repeat the last
            const int i_first = tokens[warp * WARP_ROWS], i_last = tokens[warp * WARP_ROWS + WARP_ROWS - 1];
            const int last_end = work.end(i_last);
            const bool sees = warp * WARP_ROWS < work.rows && key < last_end && key + KEY_TILE > work.begin(i_first);
            const bool hides = work.begin(i_last) > key || work.end(i_first) < min(key + KEY_TILE, length);
            const bool partly = hides || key + KEY_TILE > length;
            const int seen = min(KEY_TILE, last_end - key);  // keys from here on are nobody's
            // the tile's scores, then its weights; the last tile that is kept may take the place of a Q that has been used
            char* const my_q = q_resident + warp * slices * Q_SLICE;
            const int kept_at = kept ? tile - tile_begin : 0;
            float* const mine =
                reinterpret_cast<float*>(kept_at < score_tiles ? scores + (warp * score_tiles + kept_at) * SCORE_TILE : my_q);

            if (round == 0 || !kept) {
#pragma unroll
                for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                    for (int j = 0; j < THREAD_KEYS; ++j) s[i][j] = 0.0f;
#pragma unroll 1
                for (int part = 0; part < slices; ++part) {
                    const char* k = advance();
                    if (!sees) continue;
                    const char* q = resident ? my_q + part * Q_SLICE : k + STAGE + warp * Q_SLICE;
                    add_scores<T>(q, k, min(SLICE, D - part * SLICE), seen > 32, s);
                    const int done = (part + 1) * SLICE;
                    if (D > CHUNK && (done % CHUNK == 0 || done >= D)) {  // long heads: the chunks' sums wait in shared memory
#pragma unroll
                        for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                            for (int j = 0; j < THREAD_KEYS; ++j) {
                                float* at = mine + i * 4 * KEY_TILE + score_at(rg, kg + 8 * j);
                                const float chunks = (done <= CHUNK ? 0.0f : *at) + s[i][j];
                                *at = chunks;
                                s[i][j] = done >= D ? chunks : 0.0f;
                            }
                    }
                }
                // A score: a term that depends on the places of query tokens[...rg + 4 i] and key `key + kg + 8 j` is added
                // here.
                if (sees)
#pragma unroll
                    for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                        for (int j = 0; j < THREAD_KEYS; ++j) s[i][j] = s[i][j] * work.scale;
                if (sees && work.softcap != 0.0f)
#pragma unroll
                    for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                        for (int j = 0; j < THREAD_KEYS; ++j) s[i][j] = capped(s[i][j], work.softcap);
            } else if (round == 1 && sees) {
#pragma unroll
                for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                    for (int j = 0; j < THREAD_KEYS; ++j) s[i][j] = mine[i * 4 * KEY_TILE + score_at(rg, kg + 8 * j)];
            }

            if (round == 0 && kept && kept_at >= score_tiles) __syncthreads();  // Q has been read by all
            if (sees && (round <= 1 || !kept)) {
                // hidden keys have no part in the maximum and get their mark afterwards
                if (round > 0)
#pragma unroll
                    for (int i = 0; i < THREAD_ROWS; ++i) {
                        const float max = __shfl_sync(WARP, top, rg * 8 + i);
#pragma unroll
                        for (int j = 0; j < THREAD_KEYS; ++j) s[i][j] = exp_of_negative(s[i][j] - max);
                    }
                if (partly) {
                    const float mark = round == 0 ? -__int_as_float(0x7f800000) : HIDDEN;
#pragma unroll
                    for (int i = 0; i < THREAD_ROWS; ++i) {
                        const int token = tokens[warp * WARP_ROWS + rg + 4 * i];
                        const int begin = work.begin(token), end = work.end(token);
#pragma unroll
                        for (int j = 0; j < THREAD_KEYS; ++j) {
                            const int at = key + kg + 8 * j;
                            s[i][j] = at < begin || at >= end ? mark : s[i][j];
                        }
                    }
                }
#pragma unroll
                for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                    for (int j = 0; j < THREAD_KEYS; ++j) {
                        if (round == 0) lanes[i][0] = lanes[i][0] < s[i][j] ? s[i][j] : lanes[i][0];
                        else lanes[i][j % 4] = lanes[i][j % 4] + s[i][j];
                    }
                if (round > 0 || kept) {
#pragma unroll
                    for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                        for (int j = 0; j < THREAD_KEYS; ++j) mine[i * 4 * KEY_TILE + score_at(rg, kg + 8 * j)] = s[i][j];
                }
            }
            if (round == 0) continue;

#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                for (int c = 0; c < 8; ++c) s[i][c] = 0.0f;
            const int parts = value_parts(tile);
#pragma unroll 1
            for (int part = 0; part < parts; ++part) {
                const T* v = reinterpret_cast<const T*>(advance());
                const int count = min(V_ROWS, seen - part * V_ROWS);
                if (!sees) continue;
                const auto add = [&](auto hiding, auto halves) {
                    add_values<hiding.value, halves.value, T>(mine, v, part * V_ROWS, count, s);
                };
                using One = std::integral_constant<int, 1>;
                using Two = std::integral_constant<int, 2>;
                if (columns > 32) hides ? add(std::true_type(), Two()) : add(std::false_type(), Two());
                else hides ? add(std::true_type(), One()) : add(std::false_type(), One());
            }
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i)
#pragma unroll
                for (int c = 0; c < 8; ++c) sum[i][c] = sum[i][c] + s[i][c];
        }

        const auto [warp, lane, rg, kg] = place_now();
        if (round == 0) {
#pragma unroll
            for (int i = 0; i < THREAD_ROWS; ++i) {
                float max = lanes[i][0];
#pragma unroll
                for (int step = 4; step > 0; step /= 2) {
                    const float other = __shfl_xor_sync(WARP, max, step);
                    max = max < other ? other : max;
                }
                if (kg == i) top = max;
            }
            continue;
        }
#pragma unroll
        for (int i = 0; i < THREAD_ROWS; ++i) {
            float l = (lanes[i][0] + lanes[i][2]) + (lanes[i][1] + lanes[i][3]);  // the folds by 16 and 8
#pragma unroll
            for (int step = 4; step > 0; step /= 2) l = l + __shfl_xor_sync(WARP, l, step);
            if (l == 0.0f) l = 1.0f;  // the row sees no key, and its sums are +0; else l is 1 or more, or a NaN
            const int r = warp * WARP_ROWS + rg + 4 * i;
            if (r >= work.rows) continue;
            T* const out = work.out + tokens[r] * work.out_token + int64_t(work.head_of(r)) * D + (round - 1) * COLUMNS;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int c0 = half * 32 + kg * 4;
                Four y;
#pragma unroll
                for (int c = 0; c < 4; ++c) y.v[c] = sum[i][4 * half + c] / l;
                if (setup.wide_out && c0 < columns) {
                    store_four(out + c0, y);
                } else {
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        if (c0 + c < columns) out[c0 + c] = narrow<T>(y.v[c]);
                }
            }
        }
    }
}

// Ways 0, 1, 2: blocks of 4, 2, 1 warps. + 3: no scores are kept beyond a tile, however few the keys.
static Choice attention_way("attention", 6);

void attention(const AttentionArgs& args, const PackedArgs& packed, Stream stream) {
    const int64_t B = packed.B, total = packed.total, total_k = packed.most_keys;
    if (B == 0 || total == 0 || args.H == 0 || args.D == 0) return;
    const int64_t size = bytes_of(args.dtype), group = args.H / args.H_kv, rows = total * group;
    // Only the mean length is known here. Large blocks share what they read; but not if their sequences leave warps idle, nor
    // if there are too few of them for a chip.
    constexpr int64_t ENOUGH = 256;
    const auto fits = [&](int warps) {
        return ceil_div(rows, B) > warps * WARP_ROWS / 2 && ceil_div(rows, warps * WARP_ROWS) * args.H_kv >= ENOUGH;
    };
    const int way = attention_way.take(fits(4) ? 0 : fits(2) ? 1 : 2);
    const int warps = MOST_WARPS >> way % 3;

    AttentionSetup setup;
    setup.slices = int(ceil_div(args.D * size, LINE));
    setup.resident = setup.slices <= 2;
    const auto starts = [&](const void* p, int64_t token, int64_t head) {
        return aligned(p, 16) && token * size % 16 == 0 && head * size % 16 == 0;
    };
    setup.wide = starts(args.q, args.q_token, args.q_head) && starts(args.k, args.k_token, args.k_head) &&
                 starts(args.v, args.v_token, args.v_head);
    setup.wide_out = aligned(args.out, unsigned(4 * size)) && args.D % 4 == 0;

    const int64_t q_bytes = warps * Q_SLICE * (setup.resident ? setup.slices : 2);
    const int64_t fixed = WORK + 2 * STAGE + q_bytes + warps * WARP_ROWS * int64_t(sizeof(int));
    // Tiles of scores: as many as a sequence of one and a half times the mean length needs; but if the mean itself is too long,
    // one, since then more blocks fit on a processor.
    const int64_t room = (MAX_SHARED - fixed) / (warps * SCORE_TILE), in_q = setup.slices == 2 && setup.resident ? 1 : 0;
    const int64_t mean = ceil_div(total_k, B), usual = ceil_div(mean, KEY_TILE);
    const int64_t wanted = ceil_div(std::min(total_k, mean + mean / 2), KEY_TILE) - in_q;
    setup.score_tiles = usual > room + in_q ? 1 : int(std::max(int64_t(1), std::min(room, wanted)));
    setup.most_kept = way < 3 ? int(setup.score_tiles + in_q) : 0;

    const dim3 grid(unsigned(ceil_div(rows, warps * WARP_ROWS) + B), unsigned(args.H_kv));
    const size_t shared = size_t(fixed + warps * setup.score_tiles * SCORE_TILE);
    const auto start = [&](auto kernel) { launch("attention", kernel, grid, warps * 32, shared, stream, args, setup, packed); };
    if (args.dtype == Dtype::F32) start(attention_rows<float>);
    else if (args.dtype == Dtype::F16) start(attention_rows<f16>);
    else start(attention_rows<bf16>);
}

}  // namespace rk
