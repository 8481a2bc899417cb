// sparse_ffn.cpp: a feed-forward layer with ReLU or one of its kin, gated or not, on the CPU that reads little more than what
// active neurons need.
//
// 1. Which neurons are active? Float32 weights are screened first, with two copies in 8 bits per weight: the first matrix
//    rounded to 127ths of each row's largest, and what that left out, rounded in its turn. From the first comes an approximate
//    activation and a bound on its error; where even the upper bound is negative, relu gives +0, and nothing more is read.
//    The others get the second's share, and a bound some hundred times as tight; what is left then gets its exact value: dot
//    products over the float32 rows. So a quarter of the memory is read and little more, and no bit is at stake: a looser bound
//    only costs time. Half-precision weights are read as they are.
//    Where the caller names candidates, only these get an exact value, and nothing is screened.
// 2. With a gate: the rows of up, for active neurons only.
// 3. down: an axpy over the active neurons, ascending, in the chunks of 512 neurons of `dot`. Leaving out a zero term leaves
//    every bit (NUMERICS.md, "sparse_ffn"), so many rows may take the dense way instead, with the same bits:
//    rerank_kernels/backend/native/sparse_ffn.py does.

#ifndef RK_ISA
#define RK_FILE "sparse_ffn.cpp"
#include "each_isa.h"
#include "linear.h"

#include <tuple>
#include <vector>

namespace rk {

// nn.Linear's [D, F] as [F, D]: the weights of one neuron side by side.
static Tensor transpose_weight(const Tensor& weight) {
    const View given = Arguments("transpose_weight", weight).floats("weight", weight, {{"D"}, {"F"}}, Lies::ANYHOW);
    const int64_t d = given.size[0], f = given.size[1], row = given.stride[0], column = given.stride[1];
    const bool wide = bytes_of(given.dtype) == 4;
    Tensor out = empty(weight, {f, d}, scalar_type(given.dtype));
    if (given.numel == 0) return out;
    const void* from = given.data;
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

static RowsArgs rows_args(const float* x, const View& weight, const View& bias) {
    return {.x = {x, Dtype::F32, true}, .weight = weight.ref(), .bias = bias.ref(), .K = weight.size[1]};
}

// values[i] = dot(x, weight[neurons[i]]) + bias: the exact pre-activations of some neurons.
static void some_rows(const RowsArgs& args, const int32_t* neurons, int64_t count, float* values) {
    for_each_task(ceil_div(count, PANEL), [&](int64_t task) {
        const int n = int(std::min<int64_t>(PANEL, count - task * PANEL));
        RK_CALL(rows_dot, args, neurons + task * PANEL, n, values + task * PANEL);
    });
}

// A first matrix in 8 bits per weight, twice, and what the copies leave out; see rerank_kernels/backend/weights.py, screen.
struct Screen {
    const int8_t *coarse, *rest;  // [F, K]
    const float* bounds;          // [F, 4]: scale of coarse, error bound of it alone; scale of rest, error bound of both

    // Whether neuron f's pre-activation, given about `value`, is below zero for certain. The bound holds while nothing over-
    // or underflows, its own factors included, hence the limits; a comparison with NaN is false, so what is not a number is
    // always looked at.
    bool off(int64_t f, int which, float value, float norm) const {
        const float slack = bounds[4 * f + which], s = norm * slack;
        const bool trusted = slack >= 0x1p-126f && norm > 1e-30f && norm < 1e30f && s > 1e-30f && s < 1e30f;
        return trusted && value + s < 0.0f;
    }
};

// Neurons of row m that may be active, ascending, into neurons; x [K], about [F] their coarse sums, bias [F] or absent,
// float32.
static int64_t may_be_active(const Screen& screen, const float* x, float norm, const float* about, const Ref& bias, int64_t F,
                             int64_t K, std::vector<int32_t>& neurons, std::vector<float>& values) {
    const float* const biases = static_cast<const float*>(bias.data);
    int64_t count = 0;
    for (int64_t f = 0; f < F; ++f) {
        const float value = screen.bounds[4 * f] * about[f], biased = bias.given ? value + biases[f] : value;
        neurons[count] = int32_t(f);
        values[count] = value;
        count += !screen.off(f, 1, biased, norm);
    }
    constexpr int64_t block = 64;
    const int32_t* const listed = neurons.data();
    thread_local std::vector<float> more;
    more.resize(count);
    float* const sums = more.data();  // of this thread, for all tasks
    for_each_task(ceil_div(count, block), [&](int64_t task) {
        const int64_t begin = task * block, end = std::min(begin + block, count);
        RK_CALL(about_listed, x, K, screen.rest, listed + begin, end - begin, sums + begin);
    });
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t f = neurons[i];
        const float value = values[i] + screen.bounds[4 * f + 2] * sums[i], biased = bias.given ? value + biases[f] : value;
        neurons[left] = int32_t(f);
        left += !screen.off(f, 3, biased, norm);
    }
    return left;
}

// x as float32: itself, or a copy that `kept` holds.
static Ref as_float(const View& x, const Tensor& like, std::optional<Tensor>& kept) {
    if (!x.given || x.dtype == Dtype::F32) return x.ref();
    kept = empty(like, {x.numel}, ScalarType::Float);
    auto* const wide = static_cast<float*>(kept->mutable_data_ptr());
    RK_CALL(widen_all, x.dtype, x.data, x.numel, wide);
    return {wide, Dtype::F32, true};
}

// The result, and for each row how many neurons were active.
static std::tuple<Tensor, Tensor> sparse_ffn(const Tensor& x, const Tensor& first_weight,
                                             const std::optional<Tensor>& first_bias, const std::optional<Tensor>& coarse,
                                             const std::optional<Tensor>& rest, const std::optional<Tensor>& bounds,
                                             const std::optional<Tensor>& up_weight, const std::optional<Tensor>& up_bias,
                                             const Tensor& down_rows, const std::optional<Tensor>& down_bias,
                                             const std::optional<Tensor>& residual, const std::optional<Tensor>& candidates,
                                             double threshold, bool squared, bool up_relu) {
    const Arguments in("sparse_ffn", x);
    const View tokens = in.floats("x", x, {{"M"}, {"K"}});
    const View down = in.floats("down_rows", down_rows, {{"F"}, {"D"}});
    const int64_t M = tokens.size[0], K = tokens.size[1], F = down.size[0], D = down.size[1];
    RK_CHECK(K > 0 && F > 0 && D > 0 && F <= INT32_MAX, "sparse_ffn", "K, F and D must be > 0, and F at most 2^31 - 1");
    const View first_rows = in.floats("first_weight", first_weight, {{"F", F}, {"K", K}});
    const View bias = in.floats("first_bias", first_bias, {{"F", F}});
    const View up_rows = up_weight ? in.floats("up_weight", *up_weight, {{"F", F}, {"K", K}}) : View{};
    const View up_biases = in.floats("up_bias", up_bias, {{"F", F}}),
               down_biases = in.floats("down_bias", down_bias, {{"D", D}});
    RK_CHECK(up_weight || !up_bias, "sparse_ffn", "up_bias must be left out without up_weight");
    RK_CHECK(threshold >= 0.0, "sparse_ffn", "threshold must be >= 0");
    RK_CHECK(up_weight || !up_relu, "sparse_ffn", "up_relu wants up_weight");
    const View residuals = in.floats("residual", residual, {{"M", M}, {"D", D}});
    const Firing firing{
        .threshold = float(threshold),
        .squared = squared,
        .up_relu = up_relu,
        .candidates =
            candidates ? in.typed("candidates", *candidates, ScalarType::Bool, 1, {{"M", M}, {"F", F}}).as<bool>() : nullptr};
    const bool screened = coarse && rest && bounds;
    RK_CHECK(screened || (!coarse && !rest && !bounds), "sparse_ffn", "coarse, rest and bounds go together");
    Screen screen{};
    if (screened)
        screen = {in.typed("coarse", *coarse, ScalarType::Char, 1, {{"F", F}, {"K", K}}).as<int8_t>(),
                  in.typed("rest", *rest, ScalarType::Char, 1, {{"F", F}, {"K", K}}).as<int8_t>(),
                  in.typed("bounds", *bounds, ScalarType::Float, 4, {{"F", F}, {"4", 4}}).as<float>()};
    const ContractFloats floats;
    std::optional<Tensor> wide, wide_bias;
    const auto* rows = static_cast<const float*>(as_float(tokens, x, wide).data);
    Tensor first = empty(x, {candidates ? 0 : M, F}, ScalarType::Float), y = empty(x, {M, D}, scalar_type(tokens.dtype));
    Tensor counts = empty(x, {M}, ScalarType::Int);
    auto* const counted = static_cast<int32_t*>(counts.mutable_data_ptr());
    auto* const sums = static_cast<float*>(first.mutable_data_ptr());
    Ref biases;  // in float32, for the screen
    if (candidates) {
    } else if (screened) {
        biases = as_float(bias, x, wide_bias);
        constexpr int64_t block = 32;
        for_each_task(ceil_div(F, block), [&](int64_t task) {
            RK_CALL(about_all, rows, M, K, screen.coarse, task * block, std::min((task + 1) * block, F), sums, F);
        });
    } else {
        run_linear(linear_args(in, tokens, first_rows, bias, 0, first));
    }
    const AxpyArgs args{
        .down = down.ref(), .down_bias = down_biases.ref(), .residual = residuals.ref(), .out = out(y, "sparse_ffn"), .D = D};
    // Kept from call to call: no allocation in the steady state. Tasks of other threads get pointers into them.
    thread_local std::vector<int32_t> neurons;
    thread_local std::vector<float> h, up;
    neurons.resize(F);
    h.resize(F);
    up.resize(up_weight ? F : 0);
    for (int64_t m = 0; m < M; ++m) {
        const float *row = sums + m * F, *token = rows + m * K;
        int64_t count = F;
        if (candidates) {
            count = 0;
            for (int64_t f = 0; f < F; ++f) {
                neurons[count] = int32_t(f);
                count += firing.candidates[m * F + f];
            }
            some_rows(rows_args(token, first_rows, bias), neurons.data(), count, h.data());
        } else if (screened) {
            const float norm = RK_CALL(norm_of, token, K);
            count = may_be_active(screen, token, norm, row, biases, F, K, neurons, h);
            some_rows(rows_args(token, first_rows, bias), neurons.data(), count, h.data());
        } else {
            for (int64_t f = 0; f < F; ++f) {
                neurons[f] = int32_t(f);
                h[f] = row[f];
            }
        }
        int64_t active = RK_CALL(fire, h.data(), neurons.data(), count, firing);
        counted[m] = int32_t(active);
        if (up_weight) {
            some_rows(rows_args(token, up_rows, up_biases), neurons.data(), active, up.data());
            int64_t left = 0;
            for (int64_t i = 0; i < active; ++i) {
                neurons[left] = neurons[i];
                h[left] = h[i] * up[i];
                left += !(up_relu && up[i] <= 0.0f);
            }
            active = left;
        }
        // Wide shares of the columns: a neuron's weights are read as long runs of memory.
        const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(D / 256, 2 * rk::threads()));
        const int64_t width = ceil_div(ceil_div(D, shares), 64) * 64;
        const int32_t* const listed = neurons.data();
        const float* const hidden = h.data();
        for_each_task(ceil_div(D, width), [&](int64_t task) {
            const int64_t begin = task * width, end = std::min(begin + width, D);
            RK_CALL(axpy_block, args, m, begin, end, listed, active, hidden, scratch(size_t(2 * (width + PANEL))));
        });
    }
    return {y, counts};
}

// clang-format off
RK_OPS(m) {
    m.op("transpose_weight(Tensor weight) -> Tensor", TORCH_BOX(&transpose_weight));
    m.op("sparse_ffn(Tensor x, Tensor first_weight, Tensor? first_bias, Tensor? coarse, Tensor? rest, Tensor? bounds, Tensor? up_weight, Tensor? up_bias, Tensor down_rows, Tensor? down_bias, Tensor? residual, Tensor? candidates, float threshold, bool squared, bool up_relu) -> (Tensor, Tensor)", TORCH_BOX(&sparse_ffn));
    m.op("sparse_ffn_tensor(Tensor x, Tensor first_weight, Tensor? first_bias, Tensor? up_weight, Tensor? up_bias, Tensor down_rows, Tensor? down_bias, Tensor? residual, Tensor? candidates, float threshold, bool squared, bool up_relu) -> Tensor");
}
// clang-format on

}  // namespace rk

#else

#include "gemm.h"

namespace rk {
namespace RK_ISA {

[[maybe_unused]] static void widen_all(Dtype dtype, const void* x, int64_t n, float* to) { widen(dtype, x, 0, n, to); }

// An upper bound of the Euclidean norm of x.
static float norm_of(const float* x, int64_t K) {
    double sum = 0.0;
    for (int64_t k = 0; k < K; ++k) sum += double(x[k]) * double(x[k]);
    return float(__builtin_sqrt(sum) * 1.0001);
}

// sums[i] = about dot(x, row[i]) for up to 4 rows of 8-bit weights: in the order that is fastest, for it decides no bit. What
// lies `ahead` of them is fetched: a row of 4096 weights is one page, where the hardware's prefetcher stops.
constexpr int ABOUT_ROWS = 4;
RK_INLINE void about(const float* x, int64_t K, const int8_t* const* row, float* sums, int64_t ahead) {
    Vec acc[ABOUT_ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < ABOUT_ROWS; ++i) acc[i][0] = acc[i][1] = all(0.0f);
    int64_t k = 0;
    for (; k + 2 * W <= K; k += 2 * W) {
#pragma GCC unroll 4
        for (int i = 0; i < ABOUT_ROWS; ++i)
            if (PREFETCH > 0) __builtin_prefetch(row[i] + ahead + k);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const Vec v = load(x + k + j * W);
#pragma GCC unroll 4
            for (int i = 0; i < ABOUT_ROWS; ++i) acc[i][j] = fmadd(load(row[i] + k + j * W), v, acc[i][j]);
        }
    }
    for (int i = 0; i < ABOUT_ROWS; ++i) {
        float tail = 0.0f;
        for (int64_t t = k; t < K; ++t) tail += float(row[i][t]) * x[t];
        sums[i] = fold_register(acc[i][0] + acc[i][1]) + tail;
    }
}

// sums[m * F + f] for all M tokens and neurons f in [begin, end).
static void about_all(const float* x, int64_t M, int64_t K, const int8_t* weights, int64_t begin, int64_t end, float* sums,
                      int64_t F) {
    for (int64_t f = begin; f < end; f += ABOUT_ROWS) {
        const int n = int(end - f < ABOUT_ROWS ? end - f : ABOUT_ROWS);
        const int8_t* row[ABOUT_ROWS];
        for (int i = 0; i < ABOUT_ROWS; ++i) row[i] = weights + (f + (i < n ? i : 0)) * K;
        for (int64_t m = 0; m < M; ++m) {
            float some[ABOUT_ROWS];
            about(x + m * K, K, row, some, ABOUT_ROWS * K);
            for (int i = 0; i < n; ++i) sums[m * F + f + i] = some[i];
        }
    }
}

// sums[i] for one token and the neurons of a list.
static void about_listed(const float* x, int64_t K, const int8_t* weights, const int32_t* neurons, int64_t count, float* sums) {
    for (int64_t j = 0; j < count; j += ABOUT_ROWS) {
        const int n = int(count - j < ABOUT_ROWS ? count - j : ABOUT_ROWS);
        const int8_t* row[ABOUT_ROWS];
        for (int i = 0; i < ABOUT_ROWS; ++i) row[i] = weights + int64_t(neurons[j + (i < n ? i : 0)]) * K;
        float some[ABOUT_ROWS];
        about(x, K, row, some, PREFETCH);
        for (int i = 0; i < n; ++i) sums[j + i] = some[i];
    }
}

template <class T>
RK_INLINE void rows_dot_of(const RowsArgs& a, const int32_t* neurons, int n, float* sums) {
    const T* row[PANEL];
    for (int c = 0; c < PANEL; ++c) row[c] = static_cast<const T*>(a.weight.data) + int64_t(neurons[c < n ? c : 0]) * a.K;
    dot_few<1, CHUNK>(static_cast<const float*>(a.x.data), a.K, row, row, a.K, sums);
}

// values[i] = dot(x, weight[neurons[i]]) + bias[neurons[i]] for up to PANEL neurons, each with its own chain.
static void rows_dot(const RowsArgs& a, const int32_t* neurons, int n, float* values) {
    alignas(64) float sums[PANEL];
    if (a.weight.dtype == Dtype::F32) rows_dot_of<float>(a, neurons, n, sums);
    else if (a.weight.dtype == Dtype::F16) rows_dot_of<f16>(a, neurons, n, sums);
    else rows_dot_of<bf16>(a, neurons, n, sums);
    for (int c = 0; c < n; ++c) {
        float bias = 0.0f;
        if (a.bias.given) widen(a.bias.dtype, a.bias.data, neurons[c], 1, &bias);
        values[c] = a.bias.given ? sums[c] + bias : sums[c];
    }
}

// Pre-activations and their neurons become those of active neurons, in place; returns how many. A NaN counts as active.
static int64_t fire(float* h, int32_t* neurons, int64_t count, const Firing& firing) {
    int64_t active = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float value = fired_of(h[i], firing.threshold, firing.squared);
        neurons[active] = neurons[i];
        h[active] = value;
        active += !(value <= 0.0f);
    }
    return active;
}

// sum[d] = fma(h[r], down[active[r]][d], sum[d]) for ROWS active neurons in turn; d over [0, columns).
// Meanwhile the rows of up to ROWS that come `next` are fetched: they lie wherever they lie.
template <int ROWS, class T>
RK_INLINE void axpy(const T* down, int64_t stride, const int32_t* active, const float* h, float* sum, int64_t columns,
                    int64_t next) {
    const T *row[ROWS], *then[ROWS];
    float weight[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        row[r] = down + active[r] * stride;
        then[r] = r < next ? down + active[ROWS + r] * stride : row[r];
        weight[r] = h[r];
    }
    int64_t d = 0;
    for (; d + W <= columns; d += W) {
        Vec s = load(sum + d);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(then[r] + d);
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
    const T* down = static_cast<const T*>(a.down.data) + begin;
    float *total = memory, *sum = memory + padded;
    for (int64_t d = 0; d < columns; d += W) store(total + d, all(0.0f));
    for (int64_t i = 0; i < count;) {
        const int64_t chunk_end = (active[i] / CHUNK + 1) * int64_t(CHUNK);
        int64_t last = i;
        while (last < count && active[last] < chunk_end) ++last;
        for (int64_t d = 0; d < columns; d += W) store(sum + d, all(0.0f));
        for (; i + 4 <= last; i += 4) axpy<4>(down, a.D, active + i, h + i, sum, columns, count - i - 4);
        for (; i < last; ++i) axpy<1>(down, a.D, active + i, h + i, sum, columns, count - i - 1);
        for (int64_t d = 0; d < columns; d += W) store(total + d, load(total + d) + load(sum + d));
    }
    for (int64_t d = 0; d < columns; d += W) {
        const int some = int(columns - d < W ? columns - d : W);
        Vec y = load(total + d);
        if (a.down_bias.given) y = y + load_some_as(a.down_bias.dtype, a.down_bias.data, begin + d, some);
        if (a.residual.given) y = y + load_some_as(a.residual.dtype, a.residual.data, m * a.D + begin + d, some);
        store_some_as(a.out.dtype, a.out.data, m * a.D + begin + d, y, some);
    }
}

static void axpy_block(const AxpyArgs& a, int64_t m, int64_t begin, int64_t end, const int32_t* active, int64_t count,
                       const float* h, float* memory) {
    if (a.down.dtype == Dtype::F32) return axpy_block_of<float>(a, m, begin, end, active, count, h, memory);
    if (a.down.dtype == Dtype::F16) return axpy_block_of<f16>(a, m, begin, end, active, count, h, memory);
    axpy_block_of<bf16>(a, m, begin, end, active, count, h, memory);
}

}  // namespace RK_ISA
}  // namespace rk

#endif
