// linear.cpp: linear, bmm and activation on the CPU. The arithmetic is gemm.h's; here are tasks and memory.

#ifndef RK_ISA
#define RK_FILE "linear.cpp"
#include "each_isa.h"
#include "linear.h"

namespace rk {

// Rows of a block, for M of them: so many that laying out the weight, once a block, is little beside the products. Blocks of
// about one height, so that the last is no tail.
static int64_t block_rows(int64_t M) {
    const int64_t tile = RK_CALL(tile_rows), most = tile * std::max<int64_t>(1, 512 / tile);
    return ceil_div(ceil_div(M, ceil_div(M, most)), tile) * tile;
}

void run_linear(const LinearArgs& g) {
    if (g.M == 0) return;
    const int64_t panels = ceil_div(g.N, PANEL), threads = rk::threads();
    const int64_t rows = block_rows(g.M), row_blocks = ceil_div(g.M, rows);
    // The panels of a row of blocks are shared out too: by eights, for the rows are read again with each share, by less where
    // threads would idle or wait for the last of them.
    const int64_t shares = std::min(panels, std::max(ceil_div(panels, 8), ceil_div(6 * threads, row_blocks)));
    for_each_task(row_blocks * shares, [&](int64_t task) {
        const int64_t m = task / shares * rows, share = task % shares, m_end = std::min(m + rows, g.M);
        const int64_t p = panels * share / shares, p_end = panels * (share + 1) / shares;
        RK_CALL(linear_block, g, m, m_end, p, p_end, panels * (share + threads) / shares,
                scratch(size_t(RK_CALL(linear_scratch, g, m_end - m, p_end - p))));
    });
}

static Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
                     const std::optional<Tensor>& residual, ScalarType out_dtype) {
    Tensor y = empty(x, {x.size(0), weight.size(0)}, out_dtype);
    LinearArgs g = linear_args("linear", x, weight, bias, activation, y);
    g.residual = ref(residual, "linear", "residual");
    run_linear(g);
    return y;
}

// a [B, M, K], b [B, N, K] -> [B, M, N]: entry by entry what linear computes with b[i] as the weight.
static Tensor bmm(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
    const int64_t B = a.size(0), M = a.size(1), K = a.size(2), N = b.size(1);
    RK_CHECK(b.dim() == 3 && b.size(0) == B && b.size(2) == K && K > 0 && N > 0, "bmm", "b must be [B, N, K] with N, K > 0");
    RK_CHECK(a.is_contiguous() && b.is_contiguous(), "bmm", "a and b must be contiguous");
    Tensor y = empty(a, {B, M, N}, out_dtype);
    const Dtype from = dtype_of(a, "bmm", "a"), with = dtype_of(b, "bmm", "b");
    const Dtype to_dtype = dtype_of(out_dtype, "bmm", "out_dtype");
    const auto *left = static_cast<const char*>(a.const_data_ptr()), *right = static_cast<const char*>(b.const_data_ptr());
    auto* to = static_cast<char*>(y.mutable_data_ptr());
    if (M == 0) return y;
    const int64_t panels = ceil_div(N, PANEL), threads = rk::threads(), rows = block_rows(M);
    const int64_t shares = std::min(panels, std::max(B > 0 ? ceil_div(4 * threads, B) : 1, ceil_div(panels, 24)));
    for_each_task(B * shares, [&](int64_t task) {
        const int64_t entry = task / shares, share = task % shares;
        const int64_t p = panels * share / shares, p_end = panels * (share + 1) / shares;
        const LinearArgs g{.x = {left + entry * M * K * bytes_of(from), from},
                           .weight = {right + entry * N * K * bytes_of(with), with},
                           .bias = {},
                           .residual = {},
                           .out = {to + entry * M * N * bytes_of(to_dtype), to_dtype},
                           .M = M,
                           .N = N,
                           .K = K,
                           .activation = 0};
        float* memory = scratch(size_t(RK_CALL(linear_scratch, g, std::min(M, rows), p_end - p)));
        for (int64_t m = 0; m < M; m += rows) RK_CALL(linear_block, g, m, std::min(m + rows, M), p, p_end, p, memory);
    });
    return y;
}

static Tensor activation(const Tensor& x, int64_t kind, const std::optional<Tensor>& up, ScalarType out_dtype) {
    const int64_t n = x.numel();
    RK_CHECK(!up || up->numel() == n, "activation", "up must have as many elements as x");
    Tensor y = torch::stable::new_empty(x, x.sizes(), out_dtype);
    const Ref from = ref(x, "activation", "x"), factor = ref(up, "activation", "up");
    const Out to = out(y, "activation", "out_dtype");
    constexpr int64_t block = 8192;
    for_each_task(ceil_div(n, block), [&](int64_t task) {
        RK_CALL(activate_range, int(kind), from, factor, to, task * block, std::min((task + 1) * block, n));
    });
    return y;
}

// clang-format off
RK_OPS(m) {
    m.op("linear(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? residual, ScalarType out_dtype) -> Tensor", TORCH_BOX(&linear));
    m.op("linear_tensor(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? residual, ScalarType out_dtype) -> Tensor");
    m.op("bmm(Tensor a, Tensor b, ScalarType out_dtype) -> Tensor", TORCH_BOX(&bmm));
    m.op("bmm_tensor(Tensor a, Tensor b, ScalarType out_dtype) -> Tensor");
    m.op("activation(Tensor x, int kind, Tensor? up, ScalarType out_dtype) -> Tensor", TORCH_BOX(&activation));
}
// clang-format on

}  // namespace rk

#else

#include "gemm.h"

namespace rk {
namespace RK_ISA {

template <Activation KIND>
static void activate_all(const Ref& x, const Ref& up, const Out& y, int64_t begin, int64_t end) {
    const bool gated = up.data != nullptr;
    int64_t i = begin;
    for (; i + SOME * W <= end; i += SOME * W) {
        Some v = activate(KIND, each<Vec>([&](int j) { return load_some_as(x.dtype, x.data, i + j * W, W); }));
        if (gated) v = v * each<Vec>([&](int j) { return load_some_as(up.dtype, up.data, i + j * W, W); });
#pragma GCC unroll 4
        for (int j = 0; j < SOME; ++j) store_some_as(y.dtype, y.data, i + j * W, v.v[j], W);
    }
    for (; i < end; i += W) {
        const int some = int(end - i < W ? end - i : W);
        Vec v = activate(KIND, load_some_as(x.dtype, x.data, i, some));
        if (gated) v = v * load_some_as(up.dtype, up.data, i, some);
        store_some_as(y.dtype, y.data, i, v, some);
    }
}

static void activate_range(int kind, const Ref& x, const Ref& up, const Out& y, int64_t begin, int64_t end) {
    switch (kind) {
        case GELU: return activate_all<GELU>(x, up, y, begin, end);
        case GELU_TANH: return activate_all<GELU_TANH>(x, up, y, begin, end);
        case TANH: return activate_all<TANH>(x, up, y, begin, end);
        case RELU: return activate_all<RELU>(x, up, y, begin, end);
        case SILU: return activate_all<SILU>(x, up, y, begin, end);
        case SIGMOID: return activate_all<SIGMOID>(x, up, y, begin, end);
        case QUICK_GELU: return activate_all<QUICK_GELU>(x, up, y, begin, end);
        case RELU2: return activate_all<RELU2>(x, up, y, begin, end);
        case LEAKY_RELU: return activate_all<LEAKY_RELU>(x, up, y, begin, end);
        case MISH: return activate_all<MISH>(x, up, y, begin, end);
        default: return activate_all<NONE>(x, up, y, begin, end);
    }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
