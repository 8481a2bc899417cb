// attention.cpp: packed attention on the CPU, bidirectional or windowed (causal is a window), grouped heads.
//
// For each query row: s_j = dot(q, k_j) * scale, or tanh(that / softcap) * softcap; max exact; e_j = exp(s_j - max); l =
// row_sum(e), lane j mod 32; out = dot(e, v) / l over keys, in chunks of 64. j counts from the sequence's own first key
// (NUMERICS.md, "attention"). Rows go in tiles of TILE_ROWS through the same dot tiles as linear; the scores of a tile stay in
// the caches. A sequence of one query, as in decoding, has a way of its own, which reads each key and value once and lays out
// no more than a chunk of them.

#ifndef RK_ISA
#define RK_FILE "attention.cpp"
#include "../attention.h"
#include "each_isa.h"
#include "launch.h"

namespace rk {

static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                        const std::optional<Tensor>& cu_seqlens_k, int64_t left, int64_t right, double scale, double softcap) {
    const Arguments in("attention", q);
    const CheckedAttention given = checked_attention(in, q, k, v, left, right, scale, softcap);
    const int64_t total = given.total, total_k = given.total_k;
    AttentionArgs args = given.args;
    const std::vector<int32_t> cu = checked_offsets(in, "cu_seqlens", cu_seqlens, total);
    const int64_t B = int64_t(cu.size()) - 1, H_kv = args.H_kv, D = args.D;
    const bool anywhere = cu_seqlens_k && cu_seqlens_k->dim() == 2;
    std::vector<int32_t> own;
    if (anywhere) own = checked_spans(in, "cu_seqlens_k", *cu_seqlens_k, B, total_k);
    else if (cu_seqlens_k) own = checked_offsets(in, "cu_seqlens_k", *cu_seqlens_k, total_k);
    RK_CHECK(!cu_seqlens_k || anywhere || own.size() == cu.size(), "attention",
             "cu_seqlens_k must have as many sequences as cu_seqlens");
    RK_CHECK(cu_seqlens_k || total_k == total, "attention", "k and v must have as many tokens as q, or offsets of their own");
    const int32_t* const begins = cu_seqlens_k ? own.data() : cu.data();
    const int32_t* const ends = begins + (anywhere ? B : 1);
    Tensor out = empty(q, {total, args.H, D}, given.dtype);
    if (total == 0) return out;
    args.out = out.mutable_data_ptr();
    for_each_task(B * H_kv, [&](int64_t task) {
        const int64_t b = task / H_kv, T_q = cu[b + 1] - cu[b], T_k = ends[b] - begins[b];
        if (T_q == 0) return;
        const int64_t keys = ceil_div(T_k, PANEL) * PANEL, width = ceil_div(D, PANEL) * PANEL, group = args.H / H_kv;
        if (T_q == 1 && T_k > 0) {
            float* memory = scratch(size_t(64 * width + group * (keys + 16 + 2 * width + 1)));
            RK_CALL(attend_one, args, cu[b], begins[b], T_k, task % H_kv, memory);
        } else {
            float* memory = scratch(size_t(2 * keys * width + 16 * (keys + 2 * width + PANEL)));
            RK_CALL(attend, args, cu[b], T_q, begins[b], T_k, task % H_kv, memory);
        }
    });
    return out;
}

// clang-format off
RK_OPS(m) {
    m.op("attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, int left, int right, float scale, float softcap=0.0) -> Tensor", TORCH_BOX(&attention));
    m.op("attention_tensor(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, int left, int right, float scale, float softcap=0.0) -> Tensor");
}
// clang-format on

}  // namespace rk

#else

#include "gemm.h"
#include "softmax.h"

namespace rk {
namespace RK_ISA {

// Tokens [j, j + count) of q, k or v, of one head, into the caches: a head's features lie far from the next token's, and no
// hardware prefetcher sees where they go on.
RK_INLINE void prefetch_tokens(const AttentionArgs& a, const void* x, int64_t token, int64_t at, int64_t j, int64_t count,
                               int64_t length) {
    const int64_t size = bytes_of(a.dtype);
    for (int64_t i = j; i < j + count && i < length; ++i)
        for (int64_t byte = 0; byte < a.D * size; byte += 64)
            __builtin_prefetch(static_cast<const char*>(x) + (at + i * token) * size + byte);
}

// keys [T, D] -> [T / 32][D][32]: a panel of 32 keys, as if k were the weight of a linear layer.
template <class T>
RK_INLINE void lay_keys(const AttentionArgs& a, int64_t first, int64_t length, int64_t head, float* panels) {
    const T* from = static_cast<const T*>(a.k) + first * a.k_token + head * a.k_head;
    prefetch_tokens(a, a.k, a.k_token, first * a.k_token + head * a.k_head, 0, PANEL, length);
    for (int64_t j = 0; j < length; j += PANEL) {
        prefetch_tokens(a, a.k, a.k_token, first * a.k_token + head * a.k_head, j + PANEL, PANEL, length);
        lay_panel(from + j * a.k_token, a.k_token, int(length - j < PANEL ? length - j : PANEL), a.D, panels + j * a.D);
    }
}

// values [T, D] -> [D / 32][T][32]. Returns whether all are finite: x * 0 is NaN otherwise.
RK_INLINE bool lay_values(const AttentionArgs& a, int64_t first, int64_t length, int64_t head, float* panels) {
    Vec zeros = all(0.0f);
    const int64_t from = first * a.v_token + head * a.v_head;
    for (int64_t j = 0; j < length; ++j) {
        prefetch_tokens(a, a.v, a.v_token, from, j + 16, 1, length);
        for (int64_t d0 = 0; d0 < a.D; d0 += PANEL)
            for (int64_t c = 0; c < PANEL; c += W) {
                const int some = int(a.D - d0 - c < W ? a.D - d0 - c : W);
                const Vec v = load_some_as(a.dtype, a.v, from + j * a.v_token + d0 + c, some);
                store(panels + d0 * length + j * PANEL + c, v);
                zeros = fmadd(v, all(0.0f), zeros);
            }
    }
    float lane[W];
    store(lane, zeros);
    bool finite = true;
    for (int i = 0; i < W; ++i) finite = finite && lane[i] == lane[i];
    return finite;
}

// Scores [begin, end) of a row, by whole blocks of LANES: x = tanh(x * scale / softcap) * softcap.
RK_INLINE void cap_scores(float* x, int64_t begin, int64_t end, float scale, float softcap) {
    const auto capped = [&](auto s) __attribute__((always_inline)) {
        using F = decltype(s);
        return tanh_of(s * F(scale) / F(softcap)) * F(softcap);
    };
    int64_t i = begin / LANES * LANES;
    const int64_t to = (end + LANES - 1) / LANES * LANES;
    for (; i + SOME * W <= to; i += SOME * W) {
        const Some y = capped(each<Vec>([&](int k) __attribute__((always_inline)) { return load(x + i + k * W); }));
#pragma GCC unroll 4
        for (int k = 0; k < SOME; ++k) store(x + i + k * W, y.v[k]);
    }
    for (; i < to; i += W) store(x + i, capped(load(x + i)));
}

// Dots of a row to their exponentials, over the keys [begin, end) that it sees; what exp_and_sum says of x and e.
RK_INLINE float weights_and_sum(const AttentionArgs& a, float* s, int64_t begin, int64_t end) {
    if (a.softcap == 0.0f) return exp_and_sum(s, s, begin, end, a.scale);
    cap_scores(s, begin, end, a.scale, a.softcap);
    return exp_and_sum(s, s, begin, end, 1.0f);
}

// sums[r][c] = (first ? +0 : sums[r][c]) + the chain over j in [0, count) of e[r * lde + j] * v[j * token + c], c in [0,
// STRIP). The keys are one chunk's.
template <int ROWS, class T>
static __attribute__((noinline)) void add_values(const float* e, int64_t lde, const T* v, int64_t token, int64_t count,
                                                 float* sums, int64_t ld_sums, bool first) {
    Vec acc[ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < TILE_VECS; ++c) acc[r][c] = all(0.0f);
    for (int64_t j = 0; j < count; ++j, v += token) {
        Vec x[TILE_VECS];
#pragma GCC unroll 8
        for (int c = 0; c < TILE_VECS; ++c) x[c] = load(v + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec weight = all(e[r * lde + j]);
#pragma GCC unroll 8
            for (int c = 0; c < TILE_VECS; ++c) acc[r][c] = fmadd(weight, x[c], acc[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < TILE_VECS; ++c) {
            float* s = sums + r * ld_sums + c * W;
            store(s, (first ? all(0.0f) : load(s)) + acc[r][c]);
        }
}

constexpr int VALUE_ROWS = W == 16 ? 8 : 4;  // whose sums registers hold, beside the values

template <class T, int ROWS = VALUE_ROWS>
RK_INLINE void add_values_of(int rows, const float* e, int64_t lde, const T* v, int64_t token, int64_t count, float* sums,
                             int64_t ld_sums, bool first) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return add_values_of<T, ROWS - 1>(rows, e, lde, v, token, count, sums, ld_sums, first);
    add_values<ROWS>(e, lde, v, token, count, sums, ld_sums, first);
}

// The one query of a sequence and one key head, with every query head of its group: it is the last of T_k > 0 keys. Each key
// and value is read once; keys are turned by 32, values lie as they have to. Only keys that the query sees are multiplied by
// their weights: heads see the same.
template <class T>
static void attend_one_of(const AttentionArgs& a, int64_t q_row, int64_t k_first, int64_t T_k, int64_t kv_head, float* memory) {
    const int64_t group = a.H / a.H_kv, head = kv_head * group, width = (a.D + PANEL - 1) / PANEL * PANEL;
    const int64_t begin = a.left >= 0 && T_k - 1 > a.left ? T_k - 1 - a.left : 0;
    const int64_t lds = (T_k + PANEL - 1) / PANEL * PANEL + ROW_GAP;
    float* laid = memory;                     // [D][PANEL] of keys, [64][STRIP] of values
    float* scores = laid + KEY_TILE * width;  // [group][lds]
    float* rows = scores + group * lds;       // [group][D]
    float* sums = rows + group * width;       // [group][width]
    float* totals = sums + group * width;     // [group]
    for (int64_t r = 0; r < group; ++r) widen(a.dtype, a.q, q_row * a.q_token + (head + r) * a.q_head, a.D, rows + r * a.D);

    const int64_t k_at = k_first * a.k_token + kv_head * a.k_head, v_at = k_first * a.v_token + kv_head * a.v_head;
    const T *const keys = static_cast<const T*>(a.k) + k_at, *const values = static_cast<const T*>(a.v) + v_at;
    for (int64_t j = begin / PANEL * PANEL; j < T_k; j += PANEL) {
        const int some = int(T_k - j < PANEL ? T_k - j : PANEL);
        prefetch_tokens(a, a.k, a.k_token, k_at, j + PANEL, PANEL, T_k);
        if (group <= FEW_ROWS) {
            const T* row[2 * PANEL];  // these keys and the next ones; past the last, the first again: nobody reads their scores
            for (int c = 0; c < 2 * PANEL; ++c) row[c] = keys + (j + c < T_k ? j + c : j) * a.k_token;
            dot_few_of<CHUNK>(int(group), rows, a.D, row, row + PANEL, a.D, laid);
            for (int64_t r = 0; r < group; ++r)
                for (int c = 0; c < PANEL; c += W) store(scores + r * lds + j + c, load(laid + r * PANEL + c));
        } else {
            lay_panel(keys + j * a.k_token, a.k_token, some, a.D, laid);
            for (int64_t r = 0; r < group; r += TILE_ROWS)
                dot_panel<CHUNK>(int(group - r < TILE_ROWS ? group - r : TILE_ROWS), rows + r * a.D, a.D, laid, 0, a.D,
                                 scores + r * lds + j, lds, PANEL, true);
        }
    }
    for (int64_t r = 0; r < group; ++r) totals[r] = weights_and_sum(a, scores + r * lds, begin, T_k);
    for (int64_t j = begin, next = 0; j < T_k; j = next) {
        next = (j / KEY_TILE + 1) * KEY_TILE;
        const int64_t count = next < T_k ? next - j : T_k - j;
        prefetch_tokens(a, a.v, a.v_token, v_at, next, KEY_TILE, T_k);
        for (int64_t d = 0; d < a.D; d += STRIP) {
            const bool whole = d + STRIP <= a.D;
            if (!whole)
                for (int64_t i = 0; i < count; ++i)
                    for (int c = 0; c < STRIP; ++c) {
                        laid[i * STRIP + c] = 0.0f;
                        if (d + c < a.D) widen_of(values + (j + i) * a.v_token + d + c, 1, laid + i * STRIP + c);
                    }
            for (int64_t r = 0; r < group; r += VALUE_ROWS) {
                const int some = int(group - r < VALUE_ROWS ? group - r : VALUE_ROWS);
                float* const to = sums + r * width + d;
                const float* const e = scores + r * lds + j;
                if (whole) add_values_of(some, e, lds, values + j * a.v_token + d, a.v_token, count, to, width, j == begin);
                else add_values_of<float>(some, e, lds, laid, STRIP, count, to, width, j == begin);
            }
        }
    }
    for (int64_t r = 0; r < group; ++r)
        for (int64_t d = 0; d < a.D; d += W)
            store_some_as(a.dtype, a.out, (q_row * a.H + head + r) * a.D + d, load(sums + r * width + d) / all(totals[r]),
                          int(a.D - d < W ? a.D - d : W));
}
static void attend_one(const AttentionArgs& a, int64_t q_row, int64_t k_first, int64_t T_k, int64_t kv_head, float* memory) {
    if (a.dtype == Dtype::F32) return attend_one_of<float>(a, q_row, k_first, T_k, kv_head, memory);
    if (a.dtype == Dtype::F16) return attend_one_of<f16>(a, q_row, k_first, T_k, kv_head, memory);
    attend_one_of<bf16>(a, q_row, k_first, T_k, kv_head, memory);
}

// One sequence and one key head, with every query head of its group. The sequence's queries are rows [q_first, q_first + T_q),
// its keys and values rows [k_first, k_first + T_k).
static void attend(const AttentionArgs& a, int64_t q_first, int64_t T_q, int64_t k_first, int64_t T_k, int64_t kv_head,
                   float* memory) {
    const int64_t group = a.H / a.H_kv;
    // Query i stands at place i + shift among the keys. The first `blind` queries stand before every key that they may see.
    const int64_t shift = T_k - T_q, before = a.right < 0 ? 0 : -shift - a.right;
    const int64_t blind = T_k == 0 ? T_q : before < 0 ? 0 : before < T_q ? before : T_q;
    for (int64_t i = 0; i < blind; ++i) {
        const int64_t at = (q_first + i) * a.H + kv_head * group, size = a.D * bytes_of(a.dtype);
        __builtin_memset(static_cast<char*>(a.out) + at * size, 0, size_t(group * size));
    }
    if (blind == T_q) return;

    const int64_t keys = (T_k + PANEL - 1) / PANEL * PANEL, width = (a.D + PANEL - 1) / PANEL * PANEL;
    float* keys_laid = memory;
    float* values_laid = keys_laid + keys * a.D;
    const int64_t lds = keys + ROW_GAP;          // as in gemm.h: not a multiple of 4096 bytes
    float* scores = values_laid + keys * width;  // [TILE_ROWS][lds]
    float* q_rows = scores + TILE_ROWS * lds;    // [TILE_ROWS][D]
    float* sums = q_rows + TILE_ROWS * width;    // [TILE_ROWS][PANEL]
    if (a.dtype == Dtype::F32) lay_keys<float>(a, k_first, T_k, kv_head, keys_laid);
    else if (a.dtype == Dtype::F16) lay_keys<f16>(a, k_first, T_k, kv_head, keys_laid);
    else lay_keys<bf16>(a, k_first, T_k, kv_head, keys_laid);
    const bool finite = lay_values(a, k_first, T_k, kv_head, values_laid);
    const bool windowed = a.left >= 0 || a.right >= 0;
    // A masked key has e = +0 and fma(+0, v, s) = s for finite v. If some v is not finite, rows go one by one over exactly
    // the keys that they see, so that nothing masked is ever multiplied.
    const int64_t step = windowed && !finite ? 1 : TILE_ROWS;

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (int64_t i0 = blind; i0 < T_q; i0 += step) {
            const int rows = int(T_q - i0 < step ? T_q - i0 : step);
            prefetch_tokens(a, a.q, a.q_token, q_first * a.q_token + head * a.q_head, i0 + rows, step, T_q);
            for (int r = 0; r < rows; ++r)
                widen(a.dtype, a.q, (q_first + i0 + r) * a.q_token + head * a.q_head, a.D, q_rows + r * a.D);
            // the keys that the query at a place sees
            const auto begin = [&](int64_t at) { return a.left >= 0 && at > a.left ? at - a.left : 0; };
            const auto end = [&](int64_t at) { return a.right >= 0 && a.right < T_k - 1 - at ? at + a.right + 1 : T_k; };
            const int64_t place = i0 + shift, key_begin = begin(place), key_end = end(place + rows - 1);

            for (int64_t p = key_begin / PANEL; p * PANEL < key_end; ++p)
                dot_panel<CHUNK>(rows, q_rows, a.D, keys_laid + p * a.D * PANEL, 0, a.D, scores + p * PANEL, lds, PANEL, true);
            // Here a score is its dot alone: a term that depends on the places of query and key would be added here, to
            // score * scale, and the scale below be 1, as with a softcap.
            float total[TILE_ROWS];
            for (int r = 0; r < rows; ++r) {
                float* s = scores + r * lds;
                const int64_t b = begin(place + r), e = end(place + r);
                total[r] = weights_and_sum(a, s, b, e);
                for (int64_t j = key_begin; j < b / PANEL * PANEL; ++j) s[j] = 0.0f;
                for (int64_t j = (e + PANEL - 1) / PANEL * PANEL; j < key_end; ++j) s[j] = 0.0f;
            }
            for (int64_t d0 = 0; d0 < a.D; d0 += PANEL) {
                const int columns = int(a.D - d0 < PANEL ? a.D - d0 : PANEL);
                dot_panel<KEY_TILE>(rows, scores, lds, values_laid + d0 * T_k, key_begin, key_end, sums, PANEL, columns, true);
                for (int r = 0; r < rows; ++r)
                    for (int c = 0; c < columns; c += W) {
                        const int64_t at = ((q_first + i0 + r) * a.H + head) * a.D + d0 + c;
                        store_some_as(a.dtype, a.out, at, load(sums + r * PANEL + c) / all(total[r]), columns - c);
                    }
            }
        }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
