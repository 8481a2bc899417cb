// norm.cpp: layer_norm on the CPU. s = x + residual; mean and var by row_sum; y = fma((s - mean) * (1 / sqrt(var + eps)), w,
// b). Order as NUMERICS.md, "layer_norm". One row at a time: rows are for the threads, only features shape the work.

#ifndef RK_ISA
#define RK_FILE "norm.cpp"
#include "each_isa.h"
#include "launch.h"

namespace rk {

static Tensor layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                         const std::optional<Tensor>& residual) {
    const int64_t rows = x.size(0), d = x.size(1);
    Tensor y = empty(x, {rows, d}, x.scalar_type());
    const NormArgs args{x.const_data_ptr(),
                        dtype_of(x, "layer_norm", "x"),
                        residual ? residual->const_data_ptr() : nullptr,
                        residual ? dtype_of(*residual, "layer_norm", "residual") : Dtype::F32,
                        weight.const_data_ptr(),
                        dtype_of(weight, "layer_norm", "weight"),
                        bias ? bias->const_data_ptr() : nullptr,
                        bias ? dtype_of(*bias, "layer_norm", "bias") : Dtype::F32,
                        y.mutable_data_ptr(),
                        d,
                        float(eps)};
    const int64_t block = 1 + 16384 / (d + 1);
    for_each_task(ceil_div(rows, block), [&](int64_t task) {
        const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
        RK_CALL(layer_norm_rows, args, task * block, end, scratch(size_t(4 * (d + PANEL))));
    });
    return y;
}

STABLE_TORCH_LIBRARY_IMPL(rerank_kernels, CPU, m) { m.impl("layer_norm", TORCH_BOX(&layer_norm)); }

}  // namespace rk

#else

namespace rk {
namespace RK_ISA {

// sum over d of (s[d] - shift)^power for power 1 (shift 0) or 2, in the 32-lane order. Lanes past the end add nothing.
template <bool SQUARE>
RK_INLINE float lane_sum(const float* s, int64_t d, float shift) {
    Lanes sum = zero_lanes();
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec x = load(s + i + v * W);
            const Vec c = x - all(shift);
            sum.v[v] = SQUARE ? fmadd(c, c, sum.v[v]) : sum.v[v] + x;
        }
    if (i < d) {
        float tail[LANES] = {};
        for (int64_t j = i; j < d; ++j) tail[j - i] = SQUARE ? s[j] - shift : s[j];
        for (int v = 0; v < LANES / W; ++v) {
            const Vec c = load(tail + v * W);
            sum.v[v] = SQUARE ? fmadd(c, c, sum.v[v]) : sum.v[v] + c;
        }
    }
    return fold(sum);
}

// memory holds weight, bias, one row in and one row out: 4 (D + PANEL) floats. float32 rows are read and written in place.
static void layer_norm_rows(const NormArgs& a, int64_t begin, int64_t end, float* memory) {
    const int64_t gap = a.D + PANEL;
    float *weight = memory, *bias = memory + gap, *in = memory + 2 * gap, *out = memory + 3 * gap;
    widen(a.weight_dtype, a.weight, 0, a.D, weight);
    if (a.bias) widen(a.bias_dtype, a.bias, 0, a.D, bias);
    const bool plain = a.x_dtype == Dtype::F32, in_place = plain && !a.residual;
    const float count = float(a.D);
    for (int64_t row = begin; row < end; ++row) {
        if (!in_place) widen(a.x_dtype, a.x, row * a.D, a.D, in);
        if (a.residual) {
            const float* r = static_cast<const float*>(a.residual) + row * a.D;
            if (a.residual_dtype != Dtype::F32) {
                widen(a.residual_dtype, a.residual, row * a.D, a.D, out);
                r = out;
            }
            int64_t i = 0;
            for (; i + W <= a.D; i += W) store(in + i, load(in + i) + load(r + i));
            if (i < a.D) store(in + i, load(in + i) + load_some(r + i, int(a.D - i)));
        }
        const float* s = in_place ? static_cast<const float*>(a.x) + row * a.D : in;
        const float mean = lane_sum<false>(s, a.D, 0.0f) / count;
        const float var = lane_sum<true>(s, a.D, mean) / count;
        const float rstd = 1.0f / sqrt_of(var + a.eps);
        const auto y_of = [&](Vec x, int64_t i) __attribute__((always_inline)) {
            const Vec normed = (x - all(mean)) * all(rstd), w = load(weight + i);
            return a.bias ? fmadd(normed, w, load(bias + i)) : normed * w;
        };
        float* y = plain ? static_cast<float*>(a.y) + row * a.D : out;
        int64_t i = 0;
        for (; i + W <= a.D; i += W) store(y + i, y_of(load(s + i), i));
        if (i < a.D) store_some(y + i, y_of(load_some(s + i, int(a.D - i)), i), int(a.D - i));
        if (!plain) narrow(a.x_dtype, out, a.D, a.y, row * a.D);
    }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
