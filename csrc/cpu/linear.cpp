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
    const Arguments in("linear", x);
    const View rows = in.floats("x", x, {{"M"}, {"K"}});
    const View w = checked_weight(in, "weight", weight, rows.size[1]);
    const int64_t M = rows.size[0], N = w.size[0];
    Tensor y = empty(x, {M, N}, out_dtype);
    LinearArgs g = linear_args(in, rows, w, in.floats("bias", bias, {{"N", N}}), activation, y);
    g.residual = in.floats("residual", residual, {{"M", M}, {"N", N}}).ref();
    run_linear(g);
    return y;
}

// a [B, M, K], b [B, N, K] -> [B, M, N]: entry by entry what linear computes with b[i] as the weight.
static Tensor bmm(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
    const Arguments in("bmm", a);
    const View left = in.floats("a", a, {{"B"}, {"M"}, {"K"}});
    const View right = in.floats("b", b, {{"B", left.size[0]}, {"N"}, {"K", left.size[2]}});
    const int64_t B = left.size[0], M = left.size[1], K = left.size[2], N = right.size[1];
    RK_CHECK(K > 0 && N > 0, "bmm", "N and K must be > 0");
    Tensor y = empty(a, {B, M, N}, out_dtype);
    const Out to = out(y, "bmm");
    if (B == 0 || M == 0) return y;
    const int64_t panels = ceil_div(N, PANEL), threads = rk::threads(), rows = block_rows(M);
    const int64_t shares = std::min(panels, std::max(ceil_div(4 * threads, B), ceil_div(panels, 24)));
    for_each_task(B * shares, [&](int64_t task) {
        const int64_t entry = task / shares, share = task % shares;
        const int64_t p = panels * share / shares, p_end = panels * (share + 1) / shares;
        const auto nth = [&](const View& of, int64_t rows) {
            return Ref{of.as<char>() + entry * rows * K * bytes_of(of.dtype), of.dtype, true};
        };
        const LinearArgs g{.x = nth(left, M),
                           .weight = nth(right, N),
                           .bias = {},
                           .residual = {},
                           .out = {static_cast<char*>(to.data) + entry * M * N * bytes_of(to.dtype), to.dtype},
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
    const Arguments in("activation", x);
    const View from = in.floats("x", x, {}), factor = in.floats("up", up, {});
    in.activation(kind);
    const int64_t n = from.numel;
    RK_CHECK(!factor.given || factor.numel == n, "activation", "up must have as many elements as x");
    Tensor y = torch::stable::new_empty(x, x.sizes(), out_dtype);
    RK_CHECK(y.numel() == n, "activation", "x must keep its shape while it is read");
    const Out to = out(y, "activation");
    constexpr int64_t block = 8192;
    for_each_task(ceil_div(n, block), [&](int64_t task) {
        RK_CALL(activate_range, int(kind), from.ref(), factor.ref(), to, task * block, std::min((task + 1) * block, n));
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
    const bool gated = up.given;
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

static_assert(MISH + 1 == ACTIVATIONS);

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
