// sparse_ffn.cpp: a ReLU or ReGLU feed-forward layer on the CPU that reads little more than what active neurons need.
//
// 1. Which neurons are active? For float32 weights a copy of the first matrix in bfloat16 gives an approximate activation and
//    a bound on its error. Where even the upper bound is negative, relu gives +0, and nothing more is read. The others get
//    their exact value: dot products over the float32 rows. So half the memory is read, and no bit is at stake: a looser bound
//    only costs time. Half-precision weights are read as they are.
// 2. ReGLU: the rows of up, for active neurons only.
// 3. down: an axpy over the active neurons, ascending, in the chunks of 512 neurons of `dot`. Leaving out a zero term leaves
//    every bit (NUMERICS.md, "sparse_ffn"), so many rows may take the dense way instead, with the same bits:
//    rerank_kernels/native/sparse_ffn.py does.

#ifndef RK_ISA
#define RK_FILE "sparse_ffn.cpp"
#include "each_isa.h"
#include "linear.h"

namespace rk {

// nn.Linear's [D, F] as [F, D]: the weights of one neuron side by side.
static Tensor transpose_weight(const Tensor& weight) {
    const int64_t d = weight.size(0), f = weight.size(1), row = weight.stride(0), column = weight.stride(1);
    const bool wide = bytes_of(dtype_of(weight, "sparse_ffn", "down_weight")) == 4;
    Tensor out = empty(weight, {f, d}, weight.scalar_type());
    const void* from = weight.const_data_ptr();
    void* to = out.mutable_data_ptr();
    constexpr int64_t block = 64;
    for_each_task(ceil_div(f, block), [&](int64_t task) {
        for (int64_t i0 = 0; i0 < d; i0 += block)
            for (int64_t j = task * block; j < std::min((task + 1) * block, f); ++j)
                for (int64_t i = i0; i < std::min(i0 + block, d); ++i) {
                    if (wide) static_cast<uint32_t*>(to)[j * d + i] = static_cast<const uint32_t*>(from)[i * row + j * column];
                    else static_cast<uint16_t*>(to)[j * d + i] = static_cast<const uint16_t*>(from)[i * row + j * column];
                }
    });
    return out;
}

static RowsArgs rows_args(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    return RowsArgs{x.const_data_ptr(),
                    dtype_of(x, "sparse_ffn", "x"),
                    weight.const_data_ptr(),
                    dtype_of(weight, "sparse_ffn", "weight"),
                    bias ? bias->const_data_ptr() : nullptr,
                    bias ? dtype_of(*bias, "sparse_ffn", "bias") : Dtype::F32,
                    x.size(1)};
}

// values[i] = dot(x[m], weight[neurons[i]]) + bias: the exact pre-activations of some neurons.
static void some_rows(const RowsArgs& args, int64_t m, const std::vector<int32_t>& neurons, int64_t count, float* values) {
    for_each_task(ceil_div(count, PANEL), [&](int64_t task) {
        const int n = int(std::min<int64_t>(PANEL, count - task * PANEL));
        RK_CALL(rows_dot, args, m, neurons.data() + task * PANEL, n, values + task * PANEL,
                scratch(size_t(512 * PANEL + args.K + 2 * PANEL)));
    });
}

// Neurons that may be active, ascending: all but those whose upper bound is negative. The bound holds while nothing over- or
// underflows, its own factors included, hence the limits on it; a comparison with NaN is false, so what is not a number is
// always looked at.
static int64_t may_be_active(const float* approximate, const float* slack, float norm, int64_t F, std::vector<int32_t>& out) {
    int64_t count = 0;
    for (int64_t f = 0; f < F; ++f) {
        const float s = norm * slack[f];
        const bool trusted = slack[f] >= 0x1p-126f && norm >= 0x1p-126f && s > 1e-30f && s < 1e30f;
        const bool off = trusted && approximate[f] + s < 0.0f;
        out[count] = int32_t(f);
        count += !off;
    }
    return count;
}

static Tensor sparse_ffn(const Tensor& x, const Tensor& first_weight, const std::optional<Tensor>& first_bias,
                         const std::optional<Tensor>& first_copy, const std::optional<Tensor>& slack, const std::optional<Tensor>& up_weight,
                         const std::optional<Tensor>& up_bias, const Tensor& down_rows,
                         const std::optional<Tensor>& down_bias) {
    const int64_t M = x.size(0), F = down_rows.size(0), D = down_rows.size(1);
    RK_CHECK(F > 0 && D > 0, "sparse_ffn", "F and D must be > 0");
    RK_CHECK(!slack || (slack->scalar_type() == ScalarType::Float && slack->numel() == F), "sparse_ffn",
             "slack must be float32 [F]");
    const ContractFloats floats;
    Tensor first = empty(x, {M, F}, ScalarType::Float), y = empty(x, {M, D}, x.scalar_type());
    run_linear(linear_args("sparse_ffn", x, first_copy ? *first_copy : first_weight, first_bias, 0, first));
    const AxpyArgs args{down_rows.const_data_ptr(),
                        dtype_of(down_rows, "sparse_ffn", "down_weight"),
                        down_bias ? down_bias->const_data_ptr() : nullptr,
                        down_bias ? dtype_of(*down_bias, "sparse_ffn", "down_bias") : Dtype::F32,
                        y.mutable_data_ptr(),
                        dtype_of(y, "sparse_ffn", "x"),
                        D};
    std::vector<int32_t> neurons(F);
    std::vector<float> h(F), up(up_weight ? F : 0);
    for (int64_t m = 0; m < M; ++m) {
        const float* row = static_cast<const float*>(first.const_data_ptr()) + m * F;
        int64_t count = F;
        if (slack) {
            const float norm = RK_CALL(norm_of, rows_args(x, first_weight, first_bias), m);
            count = may_be_active(row, static_cast<const float*>(slack->const_data_ptr()), norm, F, neurons);
            some_rows(rows_args(x, first_weight, first_bias), m, neurons, count, h.data());
        } else {
            for (int64_t f = 0; f < F; ++f) {
                neurons[f] = int32_t(f);
                h[f] = row[f];
            }
        }
        int64_t active = 0;  // h and neurons become the active ones, in place; a NaN counts as active
        for (int64_t i = 0; i < count; ++i) {
            const float value = h[i];
            neurons[active] = neurons[i];
            h[active] = value;
            active += !(value <= 0.0f);
        }
        if (up_weight) {
            some_rows(rows_args(x, *up_weight, up_bias), m, neurons, active, up.data());
            for (int64_t i = 0; i < active; ++i) h[i] = h[i] * up[i];
        }
        // Wide shares of the columns: a neuron's weights are read as long runs of memory.
        const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(D / 256, 2 * torch::stable::get_num_threads()));
        const int64_t width = ceil_div(ceil_div(D, shares), 64) * 64;
        for_each_task(ceil_div(D, width), [&](int64_t task) {
            const int64_t begin = task * width, end = std::min(begin + width, D);
            RK_CALL(axpy_block, args, m, begin, end, neurons.data(), active, h.data(), scratch(size_t(2 * (width + PANEL))));
        });
    }
    return y;
}

STABLE_TORCH_LIBRARY_IMPL(rerank_kernels, CPU, m) {
    m.impl("transpose_weight", TORCH_BOX(&transpose_weight));
    m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn));
}

}  // namespace rk

#else

#include "gemm.h"

namespace rk {
namespace RK_ISA {

// An upper bound of the Euclidean norm of x[m].
static float norm_of(const RowsArgs& a, int64_t m) {
    constexpr int BLOCK = 256;
    float block[BLOCK];
    double sum = 0.0;
    for (int64_t k = 0; k < a.K; k += BLOCK) {
        const int64_t n = a.K - k < BLOCK ? a.K - k : BLOCK;
        widen(a.x_dtype, a.x, m * a.K + k, n, block);
        for (int64_t i = 0; i < n; ++i) sum += double(block[i]) * double(block[i]);
    }
    return float(__builtin_sqrt(sum) * 1.0001);
}

// to[k * PANEL + c] = from[c][k] for 8 rows c and 8 k.
RK_INLINE void transpose_8x8(const float* const from[8], int64_t k, float* to) {
#ifdef RK_ISA_SCALAR
    for (int i = 0; i < 8; ++i)
        for (int c = 0; c < 8; ++c) to[i * PANEL + c] = from[c][k + i];
#else
    __m256 r[8], t[8];
    for (int c = 0; c < 8; ++c) r[c] = _mm256_loadu_ps(from[c] + k);
    for (int c = 0; c < 8; c += 2) {
        t[c] = _mm256_unpacklo_ps(r[c], r[c + 1]);
        t[c + 1] = _mm256_unpackhi_ps(r[c], r[c + 1]);
    }
    for (int c = 0; c < 8; c += 4)
        for (int j = 0; j < 2; ++j) {
            r[c + 2 * j] = _mm256_shuffle_ps(t[c + j], t[c + 2 + j], 0x44);
            r[c + 2 * j + 1] = _mm256_shuffle_ps(t[c + j], t[c + 2 + j], 0xEE);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * PANEL, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * PANEL, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
#endif
}

// values[i] = dot(x[m], weight[neurons[i]]) + bias[neurons[i]] for up to 32 neurons. Their rows become a packed panel, one
// chunk of K at a time, so that lanes are neurons and each keeps its own chain.
static void rows_dot(const RowsArgs& a, int64_t m, const int32_t* neurons, int n, float* values, float* memory) {
    float* panel = memory;             // [CHUNK][PANEL]
    float* x = panel + CHUNK * PANEL;  // [K]
    widen(a.x_dtype, a.x, m * a.K, a.K, x);
    float sums[PANEL];
    for (int64_t k0 = 0; k0 < a.K; k0 += CHUNK) {
        const int64_t k1 = k0 + CHUNK < a.K ? k0 + CHUNK : a.K;
        for (int c0 = 0; c0 < PANEL; c0 += 8) {
            float wide[8][64];
            const float* from[8];
            for (int64_t k = k0; k < k1; k += 64) {
                const int some = int(k1 - k < 64 ? k1 - k : 64);
                for (int c = 0; c < 8; ++c) {
                    const int64_t at = int64_t(neurons[c0 + c < n ? c0 + c : 0]) * a.K + k;
                    if (a.weight_dtype == Dtype::F32) {
                        from[c] = static_cast<const float*>(a.weight) + at;
                    } else {
                        widen(a.weight_dtype, a.weight, at, some, wide[c]);
                        from[c] = wide[c];
                    }
                }
                float* to = panel + (k - k0) * PANEL + c0;
                int i = 0;
                for (; i + 8 <= some; i += 8) transpose_8x8(from, i, to + i * PANEL);
                for (; i < some; ++i)
                    for (int c = 0; c < 8; ++c) to[i * PANEL + c] = from[c][i];
            }
        }
        dot_panel<CHUNK>(1, x, a.K, panel - k0 * PANEL, k0, k1, sums, PANEL, PANEL, k0 == 0);
    }
    for (int c = 0; c < n; ++c) {
        float bias = 0.0f;
        if (a.bias) widen(a.bias_dtype, a.bias, neurons[c], 1, &bias);
        values[c] = a.bias ? sums[c] + bias : sums[c];
    }
}

// sum[d] = fma(h[r], down[active[r]][d], sum[d]) for ROWS active neurons in turn; d over [0, columns).
template <int ROWS, class T>
RK_INLINE void axpy(const T* down, int64_t stride, const int32_t* active, const float* h, float* sum, int64_t columns) {
    const T* row[ROWS];
    float weight[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        row[r] = down + active[r] * stride;
        weight[r] = h[r];
    }
    int64_t d = 0;
    for (; d + W <= columns; d += W) {
        Vec s = load(sum + d);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) s = fmadd(all(weight[r]), load(row[r] + d), s);
        store(sum + d, s);
    }
    if (d < columns) {
        const int some = int(columns - d);
        Vec s = load(sum + d);
        for (int r = 0; r < ROWS; ++r) s = fmadd(all(weight[r]), load_some(row[r] + d, some), s);
        store(sum + d, s);
    }
}

// out[m, begin : end]: the active neurons, ascending, chunk by chunk of 512 neurons; four at a time share a pass over the sums.
template <class T>
static void axpy_block_of(const AxpyArgs& a, int64_t m, int64_t begin, int64_t end, const int32_t* active, int64_t count,
                          const float* h, float* memory) {
    const int64_t columns = end - begin, padded = columns + PANEL;
    const T* down = static_cast<const T*>(a.down) + begin;
    float *total = memory, *sum = memory + padded;
    for (int64_t d = 0; d < columns; d += W) store(total + d, all(0.0f));
    for (int64_t i = 0; i < count;) {
        const int64_t chunk_end = (active[i] / CHUNK + 1) * int64_t(CHUNK);
        int64_t last = i;
        while (last < count && active[last] < chunk_end) ++last;
        for (int64_t d = 0; d < columns; d += W) store(sum + d, all(0.0f));
        for (; i + 4 <= last; i += 4) axpy<4>(down, a.D, active + i, h + i, sum, columns);
        for (; i < last; ++i) axpy<1>(down, a.D, active + i, h + i, sum, columns);
        for (int64_t d = 0; d < columns; d += W) store(total + d, load(total + d) + load(sum + d));
    }
    for (int64_t d = 0; d < columns; d += W) {
        const int some = int(columns - d < W ? columns - d : W);
        Vec y = load(total + d);
        if (a.down_bias) y = y + load_some_as(a.down_bias_dtype, a.down_bias, begin + d, some);
        store_some_as(a.out_dtype, a.out, m * a.D + begin + d, y, some);
    }
}

static void axpy_block(const AxpyArgs& a, int64_t m, int64_t begin, int64_t end, const int32_t* active, int64_t count,
                       const float* h, float* memory) {
    if (a.down_dtype == Dtype::F32) return axpy_block_of<float>(a, m, begin, end, active, count, h, memory);
    if (a.down_dtype == Dtype::F16) return axpy_block_of<f16>(a, m, begin, end, active, count, h, memory);
    axpy_block_of<bf16>(a, m, begin, end, active, count, h, memory);
}

}  // namespace RK_ISA
}  // namespace rk

#endif
