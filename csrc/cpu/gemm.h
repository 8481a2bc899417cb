// gemm.h: the `dot` primitive over tiles of outputs, for linear, score_head, sparse_ffn and attention. Included once per
// instruction set, after isa.h; no guard.
//
// Order: every output is its own chain: k ascending, one fma a step, from +0 inside a chunk (512; 64 over attention's keys);
// chunk sums are added in ascending order, from +0. Registers, tiles and threads only ever split outputs, so a tile's shape
// cannot reach the bits.

namespace rk {
namespace RK_ISA {

constexpr int STRIP = TILE_VECS * W;  // columns of a tile; PANEL is a multiple of it

// sums[r][c] = (first ? +0 : sums[r][c]) + the chunk sums over k in [k_begin, k_end) of a[r * lda + k] * b[k * PANEL + c],
// c in [0, STRIP). b is a packed panel; chunks of SPAN are counted from k = 0.
template <int ROWS, int SPAN, class T>
static __attribute__((noinline)) void dot_tile(const float* a, int64_t lda, const T* b, int64_t k_begin, int64_t k_end,
                                               float* sums, int64_t ld_sums, bool first) {
    for (int64_t k0 = k_begin; k0 < k_end;) {
        const int64_t chunk_end = (k0 / SPAN + 1) * SPAN;
        const int64_t k1 = chunk_end < k_end ? chunk_end : k_end;
        Vec acc[ROWS][TILE_VECS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < TILE_VECS; ++c) acc[r][c] = all(0.0f);
        const T* bk = b + k0 * PANEL;
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

template <int SPAN, class T, int ROWS = TILE_ROWS>
RK_INLINE void dot_tile_of(int rows, const float* a, int64_t lda, const T* b, int64_t k_begin, int64_t k_end, float* sums,
                           int64_t ld_sums, bool first) {
    if constexpr (ROWS == 1) {
        dot_tile<1, SPAN>(a, lda, b, k_begin, k_end, sums, ld_sums, first);
    } else {
        if (rows == ROWS) return dot_tile<ROWS, SPAN>(a, lda, b, k_begin, k_end, sums, ld_sums, first);
        dot_tile_of<SPAN, T, ROWS - 1>(rows, a, lda, b, k_begin, k_end, sums, ld_sums, first);
    }
}

// A [rows x columns] block of sums out of one packed panel, strip by strip (whole strips are written). Sums that begin with an
// empty range are +0.
template <int SPAN, class T>
RK_INLINE void dot_panel(int rows, const float* a, int64_t lda, const T* b, int64_t k_begin, int64_t k_end, float* sums,
                         int64_t ld_sums, int columns, bool first) {
    for (int c = 0; c < columns; c += STRIP) {
        if (k_begin >= k_end) {
            for (int r = 0; r < rows; ++r)
                for (int i = 0; i < STRIP; ++i) sums[r * ld_sums + c + i] = 0.0f;
        } else {
            dot_tile_of<SPAN, T>(rows, a, lda, b + c, k_begin, k_end, sums + c, ld_sums, first);
        }
    }
}

// Few rows: reading the weights is the work. Four panels at a time keep four streams of memory and 8 chains a row going, where
// one panel would wait for its own additions. sums[i][r][c] for panel i, as dot_tile would leave them.
constexpr int FEW_ROWS = W == 16 ? 3 : 1;
constexpr int STREAMS = 4;

template <int ROWS, int SPAN, class T>
static __attribute__((noinline)) void dot_streams(const float* a, int64_t lda, const T* b, int64_t panel_stride,
                                                  int64_t k_begin, int64_t k_end, float* sums, int64_t ld_panel, bool first) {
    for (int c0 = 0; c0 < PANEL; c0 += STRIP) {
        bool start = first;
        for (int64_t k0 = k_begin; k0 < k_end;) {
            const int64_t chunk_end = (k0 / SPAN + 1) * SPAN;
            const int64_t k1 = chunk_end < k_end ? chunk_end : k_end;
            Vec acc[ROWS][STREAMS][TILE_VECS];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < STREAMS; ++i)
#pragma GCC unroll 8
                    for (int c = 0; c < TILE_VECS; ++c) acc[r][i][c] = all(0.0f);
            const T* bk = b + k0 * PANEL + c0;
            for (int64_t k = k0; k < k1; ++k, bk += PANEL)
#pragma GCC unroll 4
                for (int i = 0; i < STREAMS; ++i) {
                    // past what the hardware prefetcher, which stops at each page, has fetched; a hint, it never faults
                    __builtin_prefetch(bk + i * panel_stride + 24 * PANEL);
                    if (TILE_VECS * W * sizeof(T) > 64) __builtin_prefetch(bk + i * panel_stride + 24 * PANEL + STRIP / 2);
#pragma GCC unroll 8
                    for (int c = 0; c < TILE_VECS; ++c) {
                        const Vec bv = load(bk + i * panel_stride + c * W);
#pragma GCC unroll 4
                        for (int r = 0; r < ROWS; ++r) acc[r][i][c] = fmadd(all(a[r * lda + k]), bv, acc[r][i][c]);
                    }
                }
#pragma GCC unroll 4
            for (int i = 0; i < STREAMS; ++i)
#pragma GCC unroll 4
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
                    for (int c = 0; c < TILE_VECS; ++c) {
                        float* s = sums + i * ld_panel + r * PANEL + c0 + c * W;
                        store(s, (start ? all(0.0f) : load(s)) + acc[r][i][c]);
                    }
            start = false;
            k0 = k1;
        }
    }
}

template <int SPAN, class T, int ROWS = FEW_ROWS>
RK_INLINE void dot_streams_of(int rows, const float* a, int64_t lda, const T* b, int64_t panel_stride, int64_t k_begin,
                              int64_t k_end, float* sums, int64_t ld_panel, bool first) {
    if constexpr (ROWS > 1)
        if (rows < ROWS)
            return dot_streams_of<SPAN, T, ROWS - 1>(rows, a, lda, b, panel_stride, k_begin, k_end, sums, ld_panel, first);
    dot_streams<ROWS, SPAN>(a, lda, b, panel_stride, k_begin, k_end, sums, ld_panel, first);
}

// out[m, n] = round(act(sum + bias) + residual) for a tile of finished sums.
template <Activation KIND>
static void finish_tile(const LinearArgs& g, const float* sums, int rows, int64_t m0, int64_t n0, int columns) {
    for (int c = 0; c < columns; c += W) {
        const int some = columns - c < W ? columns - c : W;
        const Vec bias = g.bias ? load_some_as(g.bias_dtype, g.bias, n0 + c, some) : all(0.0f);
        for (int r = 0; r < rows; ++r) {
            const int64_t at = (m0 + r) * g.N + n0 + c;
            Vec y = load(sums + r * PANEL + c);
            if (g.bias) y = y + bias;
            y = activate(KIND, y);
            if (g.residual) y = y + load_some_as(g.residual_dtype, g.residual, at, some);
            store_some_as(g.out_dtype, g.out, at, y, some);
        }
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
        default: return finish_tile<NONE>(g, sums, rows, m0, n0, columns);
    }
}

RK_INLINE int columns_of(const LinearArgs& g, int64_t panel) {
    return int(g.N - panel * PANEL < PANEL ? g.N - panel * PANEL : PANEL);
}

// K up to this keeps a block of rows whole in the second-level cache; beyond, the block goes chunk by chunk of 512 and the
// unfinished sums wait in memory. The same additions in the same order either way.
constexpr int64_t WHOLE_K = 1024;
// Rows lie this many floats further apart than they are long: rows 4096 bytes apart would all fall into the same few lines of
// the first-level cache, and real K are multiples of 1024.
constexpr int64_t ROW_GAP = 16;

template <class T>
static void linear_block_of(const LinearArgs& g, int64_t m_begin, int64_t m_end, int64_t p_begin, int64_t p_end,
                            float* scratch) {
    const int64_t height = m_end - m_begin, step = g.K <= WHOLE_K ? g.K : CHUNK, lda = step + ROW_GAP;
    float* const unfinished = scratch + height * lda;
    alignas(64) float tile[TILE_ROWS > STREAMS * FEW_ROWS ? TILE_ROWS * PANEL : STREAMS * FEW_ROWS * PANEL];
    for (int64_t k0 = 0; k0 < g.K; k0 += step) {
        const int64_t k1 = k0 + step < g.K ? k0 + step : g.K;
        for (int64_t m = 0; m < height; ++m) widen(g.x_dtype, g.x, (m_begin + m) * g.K + k0, k1 - k0, scratch + m * lda);
        const float* a = scratch - k0;
        int64_t p = p_begin;
        for (; height <= FEW_ROWS && p + STREAMS <= p_end; p += STREAMS) {
            const T* b = static_cast<const T*>(g.packed) + p * g.K * PANEL;
            float* sums = step == g.K ? tile : unfinished + (p - p_begin) * height * PANEL;
            dot_streams_of<CHUNK>(int(height), a, lda, b, g.K * PANEL, k0, k1, sums, height * PANEL, k0 == 0);
            for (int64_t i = p; k1 == g.K && i < p + STREAMS; ++i)
                finish(g, sums + (i - p) * height * PANEL, int(height), m_begin, i * PANEL, columns_of(g, i));
        }
        for (; p < p_end; ++p) {
            const T* b = static_cast<const T*>(g.packed) + p * g.K * PANEL;
            const int columns = columns_of(g, p);
            for (int64_t m = 0; m < height; m += TILE_ROWS) {
                const int rows = int(height - m < TILE_ROWS ? height - m : TILE_ROWS);
                float* sums = step == g.K ? tile : unfinished + ((p - p_begin) * height + m) * PANEL;
                dot_panel<CHUNK>(rows, a + m * lda, lda, b, k0, k1, sums, PANEL, columns, k0 == 0);
                if (k1 == g.K) finish(g, sums, rows, m_begin + m, p * PANEL, columns);
            }
        }
    }
}

// Floats of scratch for a block: its inputs in float32, and its unfinished sums if K is long.
[[maybe_unused]] static int64_t linear_scratch(const LinearArgs& g, int64_t rows, int64_t panels) {
    return rows * ((g.K <= WHOLE_K ? g.K : CHUNK) + ROW_GAP) + (g.K > WHOLE_K ? panels * rows * PANEL : 0) + PANEL;
}

// Rows [m_begin, m_end) of panels [p_begin, p_end).
[[maybe_unused]] static void linear_block(const LinearArgs& g, int64_t m_begin, int64_t m_end, int64_t p_begin, int64_t p_end,
                                          float* scratch) {
    if (g.packed_dtype == Dtype::F32) return linear_block_of<float>(g, m_begin, m_end, p_begin, p_end, scratch);
    if (g.packed_dtype == Dtype::F16) return linear_block_of<f16>(g, m_begin, m_end, p_begin, p_end, scratch);
    linear_block_of<bf16>(g, m_begin, m_end, p_begin, p_end, scratch);
}

[[maybe_unused]] static int tile_rows() { return TILE_ROWS; }

}  // namespace RK_ISA
}  // namespace rk
