// linear.cpp: linear, bmm, activation and the packing of weights on the CPU. The arithmetic is gemm.h's; here are tasks and
// memory.

#ifndef RK_ISA
#define RK_FILE "linear.cpp"
#include "each_isa.h"
#include "linear.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rk {

// Large pages where the system gives them on request: a row's product streams through all of a weight.
static void ask_for_large_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t page = size_t(2) << 20;
    const size_t begin = (reinterpret_cast<size_t>(memory) + page - 1) / page * page;
    const size_t end = (reinterpret_cast<size_t>(memory) + bytes) / page * page;
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: refusal is fine
#else
    (void)memory, (void)bytes;
#endif
}

static Tensor pack_weight(const Tensor& weight) {
    const int64_t n = weight.size(0), k = weight.size(1), panels = ceil_div(n, PANEL);
    const int64_t bytes = bytes_of(dtype_of(weight, "pack_weight", "weight"));
    const int64_t row = weight.stride(0), column = weight.stride(1);
    Tensor packed = empty(weight, {panels, k, PANEL}, weight.scalar_type());
    const auto* from = static_cast<const char*>(weight.const_data_ptr());
    auto* to = static_cast<char*>(packed.mutable_data_ptr());
    ask_for_large_pages(to, size_t(panels * k * PANEL * bytes));
    for_each_task(panels, [&](int64_t p) {
        const int64_t columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        if (bytes == 4) pack_panel<uint32_t>(from, row, column, k, p, columns, to);
        else pack_panel<uint16_t>(from, row, column, k, p, columns, to);
    });
    return packed;
}

void run_linear(const LinearArgs& g) {
    if (g.M == 0) return;
    const int64_t panels = ceil_div(g.N, PANEL), threads = torch::stable::get_num_threads();
    // Rows of a block: a multiple of the tile, so many that their inputs stay in the second-level cache; fewer if threads
    // would idle. With few rows the threads share out the panels.
    const int64_t tile = RK_CALL(tile_rows);
    int64_t rows = tile * std::max<int64_t>(1, 98304 / (std::min<int64_t>(g.K, 1024) * tile));
    rows = std::min(rows, tile * std::max<int64_t>(1, ceil_div(ceil_div(g.M, tile), 2 * threads)));
    const int64_t row_blocks = ceil_div(g.M, rows);
    const int64_t wanted = std::max(ceil_div(16 * threads, row_blocks), ceil_div(panels, 24));
    // A share of few rows is at least the four panels that are read together.
    const int64_t shares = std::max<int64_t>(1, std::min(g.M <= 3 ? panels / 4 : panels, wanted));
    for_each_task(row_blocks * shares, [&](int64_t task) {
        const int64_t m = task / shares * rows, share = task % shares, m_end = std::min(m + rows, g.M);
        const int64_t p = panels * share / shares, p_end = panels * (share + 1) / shares;
        RK_CALL(linear_block, g, m, m_end, p, p_end, scratch(size_t(RK_CALL(linear_scratch, g, m_end - m, p_end - p))));
    });
}

static Tensor linear(const Tensor& x, const Tensor& packed, int64_t N, const std::optional<Tensor>& bias, int64_t activation,
                     const std::optional<Tensor>& residual, ScalarType out_dtype) {
    Tensor y = empty(x, {x.size(0), N}, out_dtype);
    LinearArgs g = linear_args("linear", x, packed, N, bias, activation, y);
    if (residual) {
        g.residual = residual->const_data_ptr();
        g.residual_dtype = dtype_of(*residual, "linear", "residual");
    }
    run_linear(g);
    return y;
}

// a [B, M, K], b [B, N, K] -> [B, M, N]: entry by entry what linear computes with b[i] as the weight. A task takes some panels
// of one entry and lays them out in its own scratch, so that each panel is packed once and memory does not grow with B.
static Tensor bmm(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
    const int64_t B = a.size(0), M = a.size(1), K = a.size(2), N = b.size(1);
    RK_CHECK(b.dim() == 3 && b.size(0) == B && b.size(2) == K && K > 0 && N > 0, "bmm", "b must be [B, N, K] with N, K > 0");
    RK_CHECK(a.is_contiguous() && b.is_contiguous(), "bmm", "a and b must be contiguous");
    Tensor y = empty(a, {B, M, N}, out_dtype);
    const Dtype from = dtype_of(a, "bmm", "a"), with = dtype_of(b, "bmm", "b"), to = dtype_of(out_dtype, "bmm", "out_dtype");
    const auto *left = static_cast<const char*>(a.const_data_ptr()), *right = static_cast<const char*>(b.const_data_ptr());
    auto* out = static_cast<char*>(y.mutable_data_ptr());
    if (M == 0) return y;
    const int64_t panels = ceil_div(N, PANEL), threads = torch::stable::get_num_threads(), tile = RK_CALL(tile_rows);
    const int64_t rows = std::min(M, tile * std::max<int64_t>(1, 98304 / (std::min<int64_t>(K, 1024) * tile)));  // as in linear
    const int64_t shares = std::min(panels, std::max(B > 0 ? ceil_div(4 * threads, B) : 1, ceil_div(panels, 24)));
    const int64_t panel = K * PANEL * bytes_of(with);
    for_each_task(B * shares, [&](int64_t task) {
        const int64_t entry = task / shares, share = task % shares;
        const int64_t p_begin = panels * share / shares, p_end = panels * (share + 1) / shares;
        const int64_t own = ceil_div((p_end - p_begin) * panel, int64_t(sizeof(float)));
        LinearArgs g{left + entry * M * K * bytes_of(from), from, nullptr, with, nullptr, Dtype::F32, nullptr, Dtype::F32,
                     out + entry * M * N * bytes_of(to),    to,   M,       N,    K,       0};
        float* memory = scratch(size_t(own + RK_CALL(linear_scratch, g, rows, p_end - p_begin)));
        char* packed = reinterpret_cast<char*>(memory) - p_begin * panel;  // panels count from the entry's first
        g.packed = packed;
        const char* weight = right + entry * N * K * bytes_of(with);
        for (int64_t p = p_begin; p < p_end; ++p) {
            const int64_t columns = std::min<int64_t>(PANEL, N - p * PANEL);
            if (with == Dtype::F32) pack_panel<uint32_t>(weight, K, 1, K, p, columns, packed);
            else pack_panel<uint16_t>(weight, K, 1, K, p, columns, packed);
        }
        for (int64_t m = 0; m < M; m += rows) RK_CALL(linear_block, g, m, std::min(m + rows, M), p_begin, p_end, memory + own);
    });
    return y;
}

static Tensor activation(const Tensor& x, int64_t kind, ScalarType out_dtype) {
    const int64_t n = x.numel();
    Tensor y = torch::stable::new_empty(x, x.sizes(), out_dtype);
    const Dtype from = dtype_of(x, "activation", "x"), to = dtype_of(out_dtype, "activation", "out_dtype");
    const void* in = x.const_data_ptr();
    void* out = y.mutable_data_ptr();
    constexpr int64_t block = 8192;
    for_each_task(ceil_div(n, block), [&](int64_t task) {
        RK_CALL(activate_range, int(kind), in, from, out, to, task * block, std::min((task + 1) * block, n));
    });
    return y;
}

STABLE_TORCH_LIBRARY_IMPL(rerank_kernels, CPU, m) {
    m.impl("pack_weight", TORCH_BOX(&pack_weight));
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("bmm", TORCH_BOX(&bmm));
    m.impl("activation", TORCH_BOX(&activation));
}

}  // namespace rk

#else

#include "gemm.h"

namespace rk {
namespace RK_ISA {

template <Activation KIND>
static void activate_all(const void* x, Dtype from, void* y, Dtype to, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
        const int some = int(end - i < W ? end - i : W);
        store_some_as(to, y, i, activate(KIND, load_some_as(from, x, i, some)), some);
    }
}

static void activate_range(int kind, const void* x, Dtype from, void* y, Dtype to, int64_t begin, int64_t end) {
    switch (kind) {
        case GELU: return activate_all<GELU>(x, from, y, to, begin, end);
        case GELU_TANH: return activate_all<GELU_TANH>(x, from, y, to, begin, end);
        case TANH: return activate_all<TANH>(x, from, y, to, begin, end);
        case RELU: return activate_all<RELU>(x, from, y, to, begin, end);
        case SILU: return activate_all<SILU>(x, from, y, to, begin, end);
        case SIGMOID: return activate_all<SIGMOID>(x, from, y, to, begin, end);
        default: return activate_all<NONE>(x, from, y, to, begin, end);
    }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
