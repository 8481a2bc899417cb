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
        // Wide shares of the columns: a neuron's weights are read as long runs of memory.
        const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(D / 256, 2 * torch::stable::get_num_threads()));
        const int64_t width = ceil_div(ceil_div(D, shares), 64) * 64;
        for_each_task(ceil_div(D, width), [&](int64_t task) {
            const int64_t begin = task * width, end = std::min(begin + width, D);
            RK_CALL(axpy_block, args, m, begin, end, active.data(), count, h, scratch(size_t(2 * (width + PANEL))));
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

// sum[d] = fma(h[i], down[i][d], sum[d]) for ROWS active neurons in turn; d over [0, columns).
template <int ROWS, class T>
RK_INLINE void axpy(const T* down, int64_t stride, const int32_t* active, const float* h, float* sum, int64_t columns) {
    const T* row[ROWS];
    float weight[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        row[r] = down + active[r] * stride;
        weight[r] = h[active[r]];
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
static void axpy_block_of(const SparseArgs& a, int64_t m, int64_t begin, int64_t end, const int32_t* active, int64_t count,
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
        for (; i + 4 <= last; i += 4) axpy<4>(down, a.D, active + i, h, sum, columns);
        for (; i < last; ++i) axpy<1>(down, a.D, active + i, h, sum, columns);
        for (int64_t d = 0; d < columns; d += W) store(total + d, load(total + d) + load(sum + d));
    }
    for (int64_t d = 0; d < columns; d += W) {
        const int some = int(columns - d < W ? columns - d : W);
        Vec y = load(total + d);
        if (a.down_bias) y = y + load_some_as(a.down_bias_dtype, a.down_bias, begin + d, some);
        store_some_as(a.out_dtype, a.out, m * a.D + begin + d, y, some);
    }
}

static void axpy_block(const SparseArgs& a, int64_t m, int64_t begin, int64_t end, const int32_t* active, int64_t count,
                       const float* h, float* memory) {
    if (a.down_dtype == Dtype::F32) return axpy_block_of<float>(a, m, begin, end, active, count, h, memory);
    if (a.down_dtype == Dtype::F16) return axpy_block_of<f16>(a, m, begin, end, active, count, h, memory);
    axpy_block_of<bf16>(a, m, begin, end, active, count, h, memory);
}

}  // namespace RK_ISA
}  // namespace rk

#endif
