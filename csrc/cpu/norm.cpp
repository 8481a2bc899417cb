// norm.cpp: layer_norm, rms_norm and normalize on the CPU. One row at a time: rows are for the threads, only features shape the
// work.
// layer_norm: s = x + residual; mean and var by row_sum; y = fma((s - mean) * (1 / sqrt(var + eps)), w, b).
// rms_norm: the same with a mean of 0, and y = (s * (1 / sqrt(var + eps))) * w.
// normalize: y = x / max(sqrt(row_sum(x * x)), eps), each square rounded. Orders as NUMERICS.md has them.

#ifndef RK_ISA
#define RK_FILE "norm.cpp"
#include "each_isa.h"
#include "launch.h"

namespace rk {

static NormArgs norm_args(const Arguments& in, const View& x, const Tensor& weight, double eps,
                          const std::optional<Tensor>& residual, const Tensor& y) {
    const int64_t R = x.size[0], D = x.size[1];
    return {.x = x.ref(),
            .residual = in.floats("residual", residual, {{"R", R}, {"D", D}}).ref(),
            .weight = in.floats("weight", weight, {{"D", D}}).ref(),
            .bias = {},
            .y = y.mutable_data_ptr(),
            .D = D,
            .eps = float(eps)};
}

static View rows_of(const Arguments& in, const Tensor& x) {
    const View rows = in.floats("x", x, {{"R"}, {"D"}});
    RK_CHECK(rows.size[1] > 0, in.op(), "x must be [R, D] with D > 0");
    return rows;
}

// f(begin, end) for all rows, in blocks.
template <class F>
static void for_rows(int64_t rows, int64_t d, const F& f) {
    const int64_t block = 1 + 16384 / (d + 1);
    for_each_task(ceil_div(rows, block), [&](int64_t task) { f(task * block, std::min((task + 1) * block, rows)); });
}

static Tensor layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                         const std::optional<Tensor>& residual) {
    const Arguments in("layer_norm", x);
    const View rows = rows_of(in, x);
    Tensor y = like(x, rows);
    NormArgs args = norm_args(in, rows, weight, eps, residual, y);
    args.bias = in.floats("bias", bias, {{"D", args.D}}).ref();
    for_rows(rows.size[0], args.D, [&](int64_t begin, int64_t end) {
        RK_CALL(layer_norm_rows, args, begin, end, scratch(size_t(3 * (args.D + PANEL))));
    });
    return y;
}

static Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool plus_one, bool rounded,
                       const std::optional<Tensor>& residual) {
    const Arguments in("rms_norm", x);
    const View rows = rows_of(in, x);
    Tensor y = like(x, rows);
    const NormArgs args = norm_args(in, rows, weight, eps, residual, y);
    for_rows(rows.size[0], args.D, [&](int64_t begin, int64_t end) {
        RK_CALL(rms_norm_rows, args, plus_one, rounded, begin, end, scratch(size_t(3 * (args.D + PANEL))));
    });
    return y;
}

static Tensor normalize(const Tensor& x, double eps) {
    const View rows = rows_of({"normalize", x}, x);
    const int64_t d = rows.size[1];
    Tensor y = like(x, rows);
    void* to = y.mutable_data_ptr();
    for_rows(rows.size[0], d, [&](int64_t begin, int64_t end) {
        RK_CALL(normalize_rows, rows.data, rows.dtype, d, float(eps), begin, end, to, scratch(size_t(d + PANEL)));
    });
    return y;
}

// clang-format off
RK_OPS(m) {
    m.op("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual) -> Tensor", TORCH_BOX(&layer_norm));
    m.op("rms_norm(Tensor x, Tensor weight, float eps, bool plus_one, bool rounded, Tensor? residual) -> Tensor", TORCH_BOX(&rms_norm));
    m.op("normalize(Tensor x, float eps) -> Tensor", TORCH_BOX(&normalize));
}
// clang-format on

}  // namespace rk

#else

namespace rk {
namespace RK_ISA {

// The variance's sum, of (s[i] - mean)^2 in the 32-lane order. Lanes past the end add nothing.
RK_INLINE float squares(const float* s, int64_t d, float mean) {
    Lanes sum = zero_lanes();
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES)
        for (int v = 0; v < LANES / W; ++v) {
            const Vec c = load(s + i + v * W) - all(mean);
            sum.v[v] = fmadd(c, c, sum.v[v]);
        }
    if (i < d) {
        float tail[LANES] = {};
        for (int64_t j = i; j < d; ++j) tail[j - i] = s[j] - mean;
        for (int v = 0; v < LANES / W; ++v) {
            const Vec c = load(tail + v * W);
            sum.v[v] = fmadd(c, c, sum.v[v]);
        }
    }
    return fold(sum);
}

// in[i] = x[i] + residual[i], and their sum in the 32-lane order. The next row is fetched meanwhile: rows are short, and the
// hardware's prefetcher begins anew with each.
template <class T>
RK_INLINE float sum_of_row(const NormArgs& a, int64_t row, float* in) {
    const int64_t D = a.D, size = bytes_of(a.residual.dtype);
    const T* x = static_cast<const T*>(a.x.data) + row * D;
    const bool added = a.residual.given;
    const char* residual = added ? static_cast<const char*>(a.residual.data) + row * D * size : nullptr;
    const Dtype dtype = a.residual.dtype;
    Lanes sum = zero_lanes();
    for (int64_t i = 0; i < D; i += LANES)
#pragma GCC unroll 4
        for (int v = 0; v < LANES / W; ++v) {
            const int64_t at = i + v * W;
            const int some = D - at >= W ? W : D - at > 0 ? int(D - at) : 0;
            Vec s = all(0.0f);
            if (some == W) {
                __builtin_prefetch(x + at + D);
                s = load(x + at);
                if (added) {
                    __builtin_prefetch(residual + (at + D) * size);
                    s = s + load_some_as(dtype, residual, at, W);
                }
            } else if (some > 0) {
                s = load_some(x + at, some);
                if (added) s = s + load_some_as(dtype, residual, at, some);
            }
            store(in + at, s);
            sum.v[v] = sum.v[v] + s;
        }
    return fold(sum);
}

template <class T>
RK_INLINE Vec rounded(Vec v) {
    T kept[W];
    store(kept, v);
    return load(kept);
}

// memory holds weight, bias and one row: 3 (D + PANEL) floats. RMS: no mean is taken off. plus_one: added to the weight;
// round_first: to x's dtype before the product with the weight.
template <class T, bool RMS>
static void norm_rows_of(const NormArgs& a, bool plus_one, bool round_first, int64_t begin, int64_t end, float* memory) {
    const int64_t D = a.D, gap = D + PANEL;
    float *weight = memory, *bias = memory + gap, *in = memory + 2 * gap;
    widen(a.weight.dtype, a.weight.data, 0, D, weight);
    if (plus_one)
        for (int64_t i = 0; i < D; ++i) weight[i] = weight[i] + 1.0f;
    if (a.bias.given) widen(a.bias.dtype, a.bias.data, 0, D, bias);
    const float count = float(D);
    const bool biased = a.bias.given;
    for (int64_t row = begin; row < end; ++row) {
        const float sum = sum_of_row<T>(a, row, in), mean = RMS ? 0.0f : sum / count;
        const float var = squares(in, D, mean) / count;
        const float rstd = 1.0f / sqrt_of(var + a.eps);
        const auto y_of = [&](int64_t i) __attribute__((always_inline)) {
            Vec normed = (load(in + i) - all(mean)) * all(rstd);
            const Vec w = load(weight + i);
            if (RMS && round_first) normed = rounded<T>(normed);
            return biased ? fmadd(normed, w, load(bias + i)) : normed * w;
        };
        T* y = static_cast<T*>(a.y) + row * D;
        int64_t i = 0;
        for (; i + W <= D; i += W) {
            __builtin_prefetch(y + i + D, 1);
            store(y + i, y_of(i));
        }
        if (i < D) store_some(y + i, y_of(i), int(D - i));
    }
}

static void layer_norm_rows(const NormArgs& a, int64_t begin, int64_t end, float* memory) {
    if (a.x.dtype == Dtype::F32) return norm_rows_of<float, false>(a, false, false, begin, end, memory);
    if (a.x.dtype == Dtype::F16) return norm_rows_of<f16, false>(a, false, false, begin, end, memory);
    norm_rows_of<bf16, false>(a, false, false, begin, end, memory);
}

static void rms_norm_rows(const NormArgs& a, bool plus_one, bool round_first, int64_t begin, int64_t end, float* memory) {
    if (a.x.dtype == Dtype::F32) return norm_rows_of<float, true>(a, plus_one, round_first, begin, end, memory);
    if (a.x.dtype == Dtype::F16) return norm_rows_of<f16, true>(a, plus_one, round_first, begin, end, memory);
    norm_rows_of<bf16, true>(a, plus_one, round_first, begin, end, memory);
}

// in[i] = x[i], and the sum of x[i] * x[i], a product that is rounded by itself, in the 32-lane order.
template <class T>
RK_INLINE float rounded_squares(const T* x, int64_t d, float* in) {
    Lanes sum = zero_lanes();
    for (int64_t i = 0; i < d; i += LANES)
#pragma GCC unroll 4
        for (int v = 0; v < LANES / W; ++v) {
            const int64_t at = i + v * W;
            const int some = d - at >= W ? W : d - at > 0 ? int(d - at) : 0;
            const Vec s = some > 0 ? load_some(x + at, some) : all(0.0f);
            store(in + at, s);
            sum.v[v] = sum.v[v] + s * s;
        }
    return fold(sum);
}

// memory holds one row: D + PANEL floats.
template <class T>
static void normalize_rows_of(const T* x, int64_t d, float eps, int64_t begin, int64_t end, T* y, float* memory) {
    for (int64_t row = begin; row < end; ++row) {
        const float length = at_least(eps, sqrt_of(rounded_squares(x + row * d, d, memory)));
        T* to = y + row * d;
        int64_t i = 0;
        for (; i + W <= d; i += W) store(to + i, load(memory + i) / all(length));
        if (i < d) store_some(to + i, load(memory + i) / all(length), int(d - i));
    }
}

static void normalize_rows(const void* x, Dtype dtype, int64_t d, float eps, int64_t begin, int64_t end, void* y,
                           float* memory) {
    if (dtype == Dtype::F32)
        return normalize_rows_of(static_cast<const float*>(x), d, eps, begin, end, static_cast<float*>(y), memory);
    if (dtype == Dtype::F16)
        return normalize_rows_of(static_cast<const f16*>(x), d, eps, begin, end, static_cast<f16*>(y), memory);
    normalize_rows_of(static_cast<const bf16*>(x), d, eps, begin, end, static_cast<bf16*>(y), memory);
}

}  // namespace RK_ISA
}  // namespace rk

#endif
