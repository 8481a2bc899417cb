// sparse_ffn.cpp: the sparse half of a ReLU or ReGLU feed-forward layer on the CPU.
//
// The gate (or up, for ReLU) is dense; of up only the rows of active neurons are read, and down is an axpy over the active
// neurons, ascending, in the chunks of 512 neurons of `dot`. Leaving out a zero term leaves every bit (NUMERICS.md,
// "sparse_ffn"), so many rows may take the dense way instead: rerank_kernels/native/sparse_ffn.py does, with the same bits.

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

static Tensor sparse_ffn(const Tensor& x, const Tensor& first_packed, const std::optional<Tensor>& first_bias,
                         const std::optional<Tensor>& up_weight, const std::optional<Tensor>& up_bias, const Tensor& down_rows,
                         const std::optional<Tensor>& down_bias) {
    const int64_t M = x.size(0), K = x.size(1), F = down_rows.size(0), D = down_rows.size(1);
    Tensor hidden = empty(x, {M, F}, ScalarType::Float), y = empty(x, {M, D}, x.scalar_type());
    constexpr int relu = 4;  // numerics.h, enum Activation
    run_linear(linear_args("sparse_ffn", x, first_packed, F, first_bias, relu, hidden));
    const Dtype f32 = Dtype::F32;
    const SparseArgs args{x.const_data_ptr(),
                          dtype_of(x, "sparse_ffn", "x"),
                          up_weight ? up_weight->const_data_ptr() : nullptr,
                          up_weight ? dtype_of(*up_weight, "sparse_ffn", "up_weight") : f32,
                          up_bias ? up_bias->const_data_ptr() : nullptr,
                          up_bias ? dtype_of(*up_bias, "sparse_ffn", "up_bias") : f32,
                          down_rows.const_data_ptr(),
                          dtype_of(down_rows, "sparse_ffn", "down_weight"),
                          down_bias ? down_bias->const_data_ptr() : nullptr,
                          down_bias ? dtype_of(*down_bias, "sparse_ffn", "down_bias") : f32,
                          y.mutable_data_ptr(),
                          dtype_of(y, "sparse_ffn", "x"),
                          K,
                          D};
    float* const h_all = static_cast<float*>(hidden.mutable_data_ptr());
    std::vector<int32_t> active(F);
    for (int64_t m = 0; m < M; ++m) {
        float* const h = h_all + m * F;
        int64_t count = 0;
        for (int64_t f = 0; f < F; ++f) {  // ascending, without a branch; a NaN is not 0 and counts as active
            active[count] = int32_t(f);
            count += h[f] != 0.0f;
        }
        if (up_weight)
            for_each_task(ceil_div(count, PANEL), [&](int64_t task) {
                const int64_t n = std::min<int64_t>(PANEL, count - task * PANEL);
                RK_CALL(gate_active, args, m, active.data() + task * PANEL, int(n), h,
                        scratch(size_t((PANEL + 1) * K + 2 * PANEL)));
            });
        const int64_t width = RK_CALL(axpy_columns);
        for_each_task(ceil_div(D, width),
                      [&](int64_t task) { RK_CALL(axpy_block, args, m, task * width, active.data(), count, h); });
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

#ifdef RK_ISA_AVX512
constexpr int AXPY_VECS = 16;
#else
constexpr int AXPY_VECS = 8;
#endif
static int64_t axpy_columns() { return AXPY_VECS * W; }

// h[f] *= dot(x, up[f]) + up_bias[f] for up to 32 active neurons: their rows become one packed panel.
static void gate_active(const SparseArgs& a, int64_t m, const int32_t* active, int n, float* h, float* memory) {
    float* panel = memory;
    float* x = panel + PANEL * a.K;
    widen(a.x_dtype, a.x, m * a.K, a.K, x);
    constexpr int BLOCK = 64;
    float row[BLOCK];
    for (int64_t k0 = 0; k0 < a.K; k0 += BLOCK) {
        const int some = int(a.K - k0 < BLOCK ? a.K - k0 : BLOCK);
        for (int c = 0; c < PANEL; ++c) {
            widen(a.up_dtype, a.up, active[c < n ? c : 0] * a.K + k0, some, row);
            for (int k = 0; k < some; ++k) panel[(k0 + k) * PANEL + c] = row[k];
        }
    }
    float sums[PANEL], bias = 0.0f;
    dot_panel<CHUNK>(1, x, a.K, panel, 0, a.K, sums, PANEL, PANEL, true);
    for (int c = 0; c < n; ++c) {
        if (a.up_bias) widen(a.up_bias_dtype, a.up_bias, active[c], 1, &bias);
        h[active[c]] = h[active[c]] * (a.up_bias ? sums[c] + bias : sums[c]);
    }
}

// out[m, d0 : d0 + AXPY_VECS * W]: for each active neuron, ascending, sum += h * down[neuron].
template <class T>
static void axpy_block_of(const SparseArgs& a, int64_t m, int64_t d0, const int32_t* active, int64_t count, const float* h) {
    const int64_t columns = a.D - d0;
    const T* down = static_cast<const T*>(a.down) + d0;
    float total[AXPY_VECS * W] = {};
    for (int64_t i = 0; i < count;) {
        const int64_t chunk_end = (active[i] / CHUNK + 1) * int64_t(CHUNK);
        Vec acc[AXPY_VECS];
#pragma GCC unroll 16
        for (int v = 0; v < AXPY_VECS; ++v) acc[v] = all(0.0f);
        if (columns >= AXPY_VECS * W) {
            for (; i < count && active[i] < chunk_end; ++i) {
                const T* row = down + active[i] * a.D;
                const Vec hv = all(h[active[i]]);
                if (i + 6 < count)  // the next rows are strangers to the hardware prefetcher
#pragma GCC unroll 16
                    for (int v = 0; v < AXPY_VECS; ++v) __builtin_prefetch(down + active[i + 6] * a.D + v * W);
#pragma GCC unroll 16
                for (int v = 0; v < AXPY_VECS; ++v) acc[v] = fmadd(hv, load(row + v * W), acc[v]);
            }
        } else {
            for (; i < count && active[i] < chunk_end; ++i) {
                const T* row = down + active[i] * a.D;
                const Vec hv = all(h[active[i]]);
                for (int v = 0; v < AXPY_VECS; ++v)
                    if (v * W < columns)
                        acc[v] = fmadd(hv, load_some(row + v * W, int(columns - v * W < W ? columns - v * W : W)), acc[v]);
            }
        }
#pragma GCC unroll 16
        for (int v = 0; v < AXPY_VECS; ++v) store(total + v * W, load(total + v * W) + acc[v]);
    }
    for (int v = 0; v < AXPY_VECS && v * W < columns; ++v) {
        const int some = int(columns - v * W < W ? columns - v * W : W);
        Vec y = load(total + v * W);
        if (a.down_bias) y = y + load_some_as(a.down_bias_dtype, a.down_bias, d0 + v * W, some);
        store_some_as(a.out_dtype, a.out, m * a.D + d0 + v * W, y, some);
    }
}

static void axpy_block(const SparseArgs& a, int64_t m, int64_t d0, const int32_t* active, int64_t count, const float* h) {
    if (a.down_dtype == Dtype::F32) return axpy_block_of<float>(a, m, d0, active, count, h);
    if (a.down_dtype == Dtype::F16) return axpy_block_of<f16>(a, m, d0, active, count, h);
    axpy_block_of<bf16>(a, m, d0, active, count, h);
}

}  // namespace RK_ISA
}  // namespace rk

#endif
