// gemm.h: the `dot` primitive over tiles of outputs, for linear, score_head, sparse_ffn and attention. Included once per
// instruction set, after isa.h; no guard.
//
// Order: every output is its own chain: k ascending, one fma per step, from +0 inside a chunk (512; 64 over attention's keys);
// chunk sums are added in ascending order, from +0. Registers, tiles and threads only ever split outputs, so a tile's shape
// cannot reach the bits.

namespace rk {
namespace RK_ISA {

constexpr int STRIP = TILE_VECS * W;  // columns of a tile; PANEL is a multiple of it

// sums[r][c] = (first ? +0 : sums[r][c]) + the chunk sums over k in [k_begin, k_end) of a[r * lda + k] * b[k * PANEL + c],
// c in [0, STRIP). b is a panel as lay_panel makes it; chunks of SPAN are counted from k = 0.
template <int ROWS, int SPAN>
static __attribute__((noinline)) void dot_tile(const float* a, int64_t lda, const float* b, int64_t k_begin, int64_t k_end,
                                               float* sums, int64_t ld_sums, bool first) {
    for (int64_t k0 = k_begin; k0 < k_end;) {
        const int64_t chunk_end = (k0 / SPAN + 1) * SPAN;
        const int64_t k1 = chunk_end < k_end ? chunk_end : k_end;
        Vec acc[ROWS][TILE_VECS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < TILE_VECS; ++c) acc[r][c] = all(0.0f);
        const float* bk = b + k0 * PANEL;
        for (int64_t k = k0; k < k1; ++k, bk += PANEL) {
            Vec bv[TILE_VECS];
#pragma GCC unroll 8
            for (int c = 0; c < TILE_VECS; ++c) bv[c] = load(bk + c * W);
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const Vec av = all(a[r * lda + k]);
#pragma GCC unroll 8
                for (int c = 0; c < TILE_VECS; ++c) acc[r][c] = fmadd(av, bv[c], acc[r][c]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < TILE_VECS; ++c) {
                float* s = sums + r * ld_sums + c * W;
                store(s, (first ? all(0.0f) : load(s)) + acc[r][c]);
            }
        first = false;
        k0 = k1;
    }
}

template <int SPAN, int ROWS = TILE_ROWS>
RK_INLINE void dot_tile_of(int rows, const float* a, int64_t lda, const float* b, int64_t k_begin, int64_t k_end, float* sums,
                           int64_t ld_sums, bool first) {
    if constexpr (ROWS == 1) {
        dot_tile<1, SPAN>(a, lda, b, k_begin, k_end, sums, ld_sums, first);
    } else {
        if (rows == ROWS) return dot_tile<ROWS, SPAN>(a, lda, b, k_begin, k_end, sums, ld_sums, first);
        dot_tile_of<SPAN, ROWS - 1>(rows, a, lda, b, k_begin, k_end, sums, ld_sums, first);
    }
}

// A [rows x columns] block of sums out of one panel, strip by strip (whole strips are written). Sums that begin with an empty
// range are +0.
template <int SPAN>
RK_INLINE void dot_panel(int rows, const float* a, int64_t lda, const float* b, int64_t k_begin, int64_t k_end, float* sums,
                         int64_t ld_sums, int columns, bool first) {
    for (int c = 0; c < columns; c += STRIP) {
        if (k_begin >= k_end) {
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < STRIP; ++i) sums[r * ld_sums + c + i] = 0.0f;
        } else {
            dot_tile_of<SPAN>(rows, a, lda, b + c, k_begin, k_end, sums + c, ld_sums, first);
        }
    }
}

// Bytes that a weight's rows are fetched ahead: the hardware's prefetcher stops at each page. A hint, it never faults.
constexpr int64_t PREFETCH = W == 1 ? 0 : 512;

// W values of each of W rows, ld apart, turned: v[i] holds value i of every row.
template <class T>
RK_INLINE void load_turned(const T* from, int64_t ld, Vec* v) {
#pragma GCC unroll 4
    for (int c = 0; c < W; c += 4) {
        const T* row = from + c * ld;
        // One pointer for four rows: left alone, gcc keeps one for each, in memory.
        asm("" : "+r"(row));
#pragma GCC unroll 4
        for (int i = 0; i < 4 && i < W; ++i) {
            if (PREFETCH > 0) __builtin_prefetch(row + i * ld + PREFETCH / int64_t(sizeof(T)));
            v[c + i] = load(row + i * ld);
        }
    }
    transpose(v);
}
// The same at an edge: `rows` of them, `deep` values each, +0 for the others.
template <class T>
RK_INLINE void load_turned_some(const T* from, int64_t ld, int rows, int deep, Vec* v) {
    for (int c = 0; c < W; ++c) v[c] = c < rows ? load_some(from + c * ld, deep) : all(0.0f);
    transpose(v);
}

// Lays `columns` rows of a weight side by side: to[k * PANEL + c] = from[c * ld + k] for k in [0, depth); +0 past `columns`.
template <class T>
static __attribute__((noinline)) void lay_panel(const T* from, int64_t ld, int columns, int64_t depth, float* to) {
    for (int c = 0; c < PANEL; c += W, from += W * ld, to += W) {
        const int64_t whole = columns - c < W ? 0 : depth / W * W;
        Vec v[W];
        for (int64_t k = 0; k < whole; k += W) {
            load_turned(from + k, ld, v);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) store(to + (k + i) * PANEL, v[i]);
        }
        for (int64_t k = whole; k < depth; k += W) {
            const int deep = int(depth - k < W ? depth - k : W);
            load_turned_some(from + k, ld, columns - c, deep, v);
            for (int i = 0; i < deep; ++i) store(to + (k + i) * PANEL, v[i]);
        }
    }
}

// Few rows: reading the weight is the work. Its rows, PANEL of them wherever they lie, are turned in registers and never
// stored. sums[r * PANEL + c] as dot_tile would leave them.
constexpr int FEW_ROWS = W == 16 ? 8 : 1;
// Registers of the weight's rows that are side by side. One chain of sums at a time waits for itself, and still keeps up with
// memory where a register is wide; fewer rows are then read at once, which the caches like better.
constexpr int SIDE = W == 16 ? 1 : PANEL / W;

// weights: SIDE * W rows; then: as many that are likely to be next, fetched meanwhile.
template <int ROWS, int SPAN, class T>
static __attribute__((noinline)) void dot_few_columns(const float* a, int64_t lda, const T* const* weights,
                                                      const T* const* then, int64_t K, float* sums) {
    constexpr int DEEP = W * VALUES_IN<T>;  // k that a register of a row's values holds
    // While a chunk is in the products, the next one is fetched, a row's lines one after the other: memory gives rows faster
    // than lines from many rows in turn. So many lines a step, so many of them from one row. Rows shorter than a chunk, such
    // as keys, are not worth it.
    constexpr int LINE = 64 / int(sizeof(T)), LINES = SPAN / LINE, STEP = W == 1 ? 0 : SIDE * W * DEEP / LINE;
    constexpr int BURST = STEP < LINES ? STEP : LINES;
    const bool long_rows = K >= SPAN;
    for (int64_t k0 = 0; k0 < K; k0 += SPAN) {
        const int64_t k1 = k0 + SPAN < K ? k0 + SPAN : K, whole = k0 + (k1 - k0) / DEEP * DEEP;
        const T* const* const ahead = k1 < K ? weights : then;
        const int64_t ahead_k = k1 < K ? k1 : 0;
        Vec acc[ROWS][SIDE];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 32
            for (int g = 0; g < SIDE; ++g) acc[r][g] = all(0.0f);
        for (int64_t k = k0; k < whole; k += DEEP) {
#pragma GCC unroll 4
            for (int i = 0; i < STEP && long_rows; i += BURST) {
                const int64_t line = (k - k0) / DEEP * STEP + i;
                const T* from = ahead[line / LINES] + ahead_k + line % LINES * LINE;
#pragma GCC unroll 32
                for (int j = 0; j < BURST; ++j) __builtin_prefetch(from + j * LINE);
            }
#pragma GCC unroll 32
            for (int g = 0; g < SIDE; ++g) {
                Vec v[W];
#pragma GCC unroll 16
                for (int c = 0; c < W; ++c) v[c] = load_packed(weights[g * W + c] + k);
                transpose(v);
#pragma GCC unroll 16
                for (int i = 0; i < W; ++i)
#pragma GCC unroll 2
                    for (int part = 0; part < VALUES_IN<T>; ++part) {
                        const Vec value = unpacked<T>(v[i], part);
                        const float* at = a + k + i * VALUES_IN<T> + part;
#pragma GCC unroll 8
                        for (int r = 0; r < ROWS; ++r) acc[r][g] = fmadd(all(at[r * lda]), value, acc[r][g]);
                    }
            }
        }
        for (int64_t k = whole; k < k1; k += W) {
            const int deep = int(k1 - k < W ? k1 - k : W);
#pragma GCC unroll 32
            for (int g = 0; g < SIDE; ++g) {
                Vec v[W];  // its index is known at run time only, which would keep the loop's above out of registers
                for (int c = 0; c < W; ++c) v[c] = load_some(weights[g * W + c] + k, deep);
                transpose(v);
                for (int i = 0; i < deep; ++i)
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; ++r) acc[r][g] = fmadd(all(a[r * lda + k + i]), v[i], acc[r][g]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 32
            for (int g = 0; g < SIDE; ++g) {
                float* s = sums + r * PANEL + g * W;
                store(s, (k0 == 0 ? all(0.0f) : load(s)) + acc[r][g]);
            }
    }
}

// weights: PANEL rows; then: PANEL rows that are likely to be next.
template <int ROWS, int SPAN, class T>
RK_INLINE void dot_few(const float* a, int64_t lda, const T* const* weights, const T* const* then, int64_t K, float* sums) {
    for (int c = 0; c < PANEL; c += SIDE * W) {
        const T* const* const next = c + SIDE * W < PANEL ? weights + c + SIDE * W : then;
        dot_few_columns<ROWS, SPAN>(a, lda, weights + c, next, K, sums + c);
    }
}

template <int SPAN, class T, int ROWS = FEW_ROWS>
RK_INLINE void dot_few_of(int rows, const float* a, int64_t lda, const T* const* weights, const T* const* then, int64_t K,
                          float* sums) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return dot_few_of<SPAN, T, ROWS - 1>(rows, a, lda, weights, then, K, sums);
    dot_few<ROWS, SPAN>(a, lda, weights, then, K, sums);
}

// out[m, n] = round(act(sum + bias) + residual) for a tile of finished sums.
template <Activation KIND>
static void finish_tile(const LinearArgs& g, const float* sums, int rows, int64_t m0, int64_t n0, int columns) {
    const auto end = [&](Vec y, int64_t at, int some) __attribute__((always_inline)) {
        if (g.residual.given) y = y + load_some_as(g.residual.dtype, g.residual.data, at, some);
        store_some_as(g.out.dtype, g.out.data, at, y, some);
    };
    for (int c = 0; c < columns; c += W) {
        const int some = columns - c < W ? columns - c : W;
        const Vec bias = g.bias.given ? load_some_as(g.bias.dtype, g.bias.data, n0 + c, some) : all(0.0f);
        const auto sum_of = [&](int r) __attribute__((always_inline)) {
            const Vec y = load(sums + r * PANEL + c);
            return g.bias.given ? y + bias : y;
        };
        int r = 0;
        for (; r + SOME <= rows; r += SOME) {
            const Some y = activate(KIND, each<Vec>([&](int i) __attribute__((always_inline)) { return sum_of(r + i); }));
#pragma GCC unroll 4
            for (int i = 0; i < SOME; ++i) end(y.v[i], (m0 + r + i) * g.N + n0 + c, some);
        }
        for (; r < rows; ++r) end(activate(KIND, sum_of(r)), (m0 + r) * g.N + n0 + c, some);
    }
}

RK_INLINE void finish(const LinearArgs& g, const float* sums, int rows, int64_t m0, int64_t n0, int columns) {
    switch (g.activation) {
        case GELU: return finish_tile<GELU>(g, sums, rows, m0, n0, columns);
        case GELU_TANH: return finish_tile<GELU_TANH>(g, sums, rows, m0, n0, columns);
        case TANH: return finish_tile<TANH>(g, sums, rows, m0, n0, columns);
        case RELU: return finish_tile<RELU>(g, sums, rows, m0, n0, columns);
        case SILU: return finish_tile<SILU>(g, sums, rows, m0, n0, columns);
        case SIGMOID: return finish_tile<SIGMOID>(g, sums, rows, m0, n0, columns);
        case QUICK_GELU: return finish_tile<QUICK_GELU>(g, sums, rows, m0, n0, columns);
        case RELU2: return finish_tile<RELU2>(g, sums, rows, m0, n0, columns);
        case LEAKY_RELU: return finish_tile<LEAKY_RELU>(g, sums, rows, m0, n0, columns);
        case MISH: return finish_tile<MISH>(g, sums, rows, m0, n0, columns);
        default: return finish_tile<NONE>(g, sums, rows, m0, n0, columns);
    }
}

RK_INLINE int columns_of(const LinearArgs& g, int64_t panel) {
    return int(g.N - panel * PANEL < PANEL ? g.N - panel * PANEL : PANEL);
}

// A block of outputs takes K in steps of a chunk: the weight's panels for one step, GROUP of them, are laid into a quarter of
// the second-level cache, then the rows pass over them tile by tile, and what comes next is fetched from memory meanwhile. Sums
// wait in scratch between the steps.
constexpr int64_t GROUP = 4;
// Rows lie this many floats further apart than they are long: rows 4096 bytes apart would all fall into the same few lines of
// the first-level cache, and real K are multiples of 1024. Rows that lie well are read where they are.
constexpr int64_t ROW_GAP = 16;
RK_INLINE bool in_place(const LinearArgs& g) { return g.x.dtype == Dtype::F32 && g.K % 512 != 0; }

// `bytes` from each of `rows` rows, `stride` bytes apart, into the second-level cache, to be read or written: part `part` of
// `parts` of the rows, so that it takes no more at a time than the products beside it hide.
template <int WRITE = 0>
RK_INLINE void prefetch_part(const void* first, int64_t stride, int64_t rows, int64_t bytes, int64_t part = 0,
                             int64_t parts = 1) {
    const char* row = static_cast<const char*>(first) + rows * part / parts * stride;
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i, row += stride)
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, WRITE, 2);
}

template <class T>
static void linear_block_of(const LinearArgs& g, int64_t m_begin, int64_t m_end, int64_t p_begin, int64_t p_end, int64_t p_then,
                            float* scratch) {
    const int64_t height = m_end - m_begin, step = g.K < CHUNK ? g.K : CHUNK, lda = in_place(g) ? g.K : step + ROW_GAP;
    const T* const weight = static_cast<const T*>(g.weight.data);
    if (height <= FEW_ROWS) {
        alignas(64) float sums[FEW_ROWS * PANEL];
        const float* a = static_cast<const float*>(g.x.data) + m_begin * g.K;
        if (g.x.dtype != Dtype::F32) {
            widen(g.x.dtype, g.x.data, m_begin * g.K, height * g.K, scratch);
            a = scratch;
        }
        const int64_t p_last = (g.N + PANEL - 1) / PANEL;
        for (int64_t p = p_begin; p < p_end; ++p) {
            const int columns = columns_of(g, p);
            // This panel's and, to be fetched, the next one's; past the last, the first again: sums that nobody stores.
            const T *rows[PANEL], *then[PANEL];
            const int64_t next = p + 1 < p_end ? p + 1 : p_then < p_last ? p_then : p;
            for (int c = 0; c < PANEL; ++c) {
                rows[c] = weight + (p * PANEL + (c < columns ? c : 0)) * g.K;
                then[c] = weight + (next * PANEL + (c < columns_of(g, next) ? c : 0)) * g.K;
            }
            dot_few_of<CHUNK>(int(height), a, g.K, rows, then, g.K, sums);
            finish(g, sums, int(height), m_begin, p * PANEL, columns);
        }
        return;
    }
    const char *const x = static_cast<const char*>(g.x.data), *const out = static_cast<const char*>(g.out.data);
    const int64_t x_bytes = bytes_of(g.x.dtype), out_bytes = bytes_of(g.out.dtype);
    float* const panels = scratch;
    float* const rows = panels + (p_end - p_begin < GROUP ? p_end - p_begin : GROUP) * step * PANEL;
    float* const sums = in_place(g) ? rows : rows + TILE_ROWS * lda;
    for (int64_t p0 = p_begin; p0 < p_end; p0 += GROUP) {
        const int64_t group = p_end - p0 < GROUP ? p_end - p0 : GROUP;
        for (int64_t k0 = 0; k0 < g.K; k0 += step) {
            const int64_t deep = g.K - k0 < step ? g.K - k0 : step;
            for (int64_t p = p0; p < p0 + group; ++p)
                lay_panel(weight + p * PANEL * g.K + k0, g.K, columns_of(g, p), deep, panels + (p - p0) * step * PANEL);
            // What is laid out next: further on in K, or other panels, in the end those of the next task.
            const bool deeper = k0 + deep < g.K;
            const int64_t then = deeper ? p0 : p0 + group < p_end ? p0 + group : p_then, then_k = deeper ? k0 + deep : 0;
            const int64_t then_end = (then + group) * PANEL, then_rows = (then_end < g.N ? then_end : g.N) - then * PANEL;
            for (int64_t m = 0; m < height; m += TILE_ROWS) {
                const int some = int(height - m < TILE_ROWS ? height - m : TILE_ROWS);
                const float* a = static_cast<const float*>(g.x.data) + (m_begin + m) * g.K + k0;
                if (!in_place(g)) {
                    for (int r = 0; r < some; ++r)
                        widen(g.x.dtype, g.x.data, (m_begin + m + r) * g.K + k0, deep, rows + r * lda);
                    a = rows;
                }
                for (int64_t p = p0; p < p0 + group; ++p) {
                    const bool last = k0 + deep == g.K;
                    const int64_t left = height - m - TILE_ROWS, part = p - p0;
                    if (left > 0)
                        prefetch_part(x + ((m_begin + m + TILE_ROWS) * g.K + k0) * x_bytes, g.K * x_bytes,
                                      left < TILE_ROWS ? left : TILE_ROWS, deep * x_bytes, part, group);
                    if (then_rows > 0)
                        prefetch_part(weight + then * PANEL * g.K + then_k, g.K * int64_t(sizeof(T)), then_rows,
                                      (g.K - then_k < step ? g.K - then_k : step) * int64_t(sizeof(T)),
                                      m / TILE_ROWS * group + part, (height + TILE_ROWS - 1) / TILE_ROWS * group);
                    if (last)
                        prefetch_part<1>(out + ((m_begin + m) * g.N + p * PANEL) * out_bytes, g.N * out_bytes, some,
                                         columns_of(g, p) * out_bytes);
                    float* const tile = sums + (m * group + (p - p0) * TILE_ROWS) * PANEL;
                    const int columns = columns_of(g, p);
                    dot_panel<CHUNK>(some, a, lda, panels + (p - p0) * step * PANEL, 0, deep, tile, PANEL, columns, k0 == 0);
                    if (last) finish(g, tile, some, m_begin + m, p * PANEL, columns);
                }
            }
        }
    }
}

// Floats of scratch for a block of up to so many rows.
[[maybe_unused]] static int64_t linear_scratch(const LinearArgs& g, int64_t rows, int64_t panels) {
    // a block that is lower than the others, as the last may be, takes the way of few rows
    const int64_t few = g.x.dtype == Dtype::F32 ? 0 : (rows < FEW_ROWS ? rows : FEW_ROWS) * g.K;
    if (rows <= FEW_ROWS) return few;
    const int64_t step = g.K < CHUNK ? g.K : CHUNK, group = panels < GROUP ? panels : GROUP;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t tall = group * step * PANEL + TILE_ROWS * (step + ROW_GAP) + tiles * TILE_ROWS * group * PANEL;
    return tall > few ? tall : few;
}

// Rows [m_begin, m_end) of panels [p_begin, p_end). p_then: the panel at which this thread is likely to go on.
[[maybe_unused]] static void linear_block(const LinearArgs& g, int64_t m_begin, int64_t m_end, int64_t p_begin, int64_t p_end,
                                          int64_t p_then, float* scratch) {
    if (g.weight.dtype == Dtype::F32) return linear_block_of<float>(g, m_begin, m_end, p_begin, p_end, p_then, scratch);
    if (g.weight.dtype == Dtype::F16) return linear_block_of<f16>(g, m_begin, m_end, p_begin, p_end, p_then, scratch);
    linear_block_of<bf16>(g, m_begin, m_end, p_begin, p_end, p_then, scratch);
}

[[maybe_unused]] static int tile_rows() { return TILE_ROWS; }

}  // namespace RK_ISA
}  // namespace rk
