// softmax.cpp: softmax and row sums on the CPU, over the last dimension of [R, D].
// softmax: exact maximum; e = exp(x - max); sum by row_sum; e / sum. Order as NUMERICS.md, "softmax" and "sum, mean".

#ifndef RK_ISA
#define RK_FILE "softmax.cpp"
#include "each_isa.h"
#include "launch.h"

namespace rk {

static Tensor softmax(const Tensor& x) {
    const View from = Arguments("softmax", x).floats("x", x, {{"R"}, {"D"}});
    const int64_t rows = from.size[0], d = from.size[1];
    Tensor y = like(x, from);
    if (from.numel == 0) return y;
    void* to = y.mutable_data_ptr();
    const int64_t block = 1 + 8192 / (d + 1);
    for_each_task(ceil_div(rows, block), [&](int64_t task) {
        const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
        RK_CALL(softmax_rows, from.data, from.dtype, d, task * block, end, to, scratch(size_t(d) + 2 * PANEL));
    });
    return y;
}

static Tensor row_sum(const Tensor& x, bool mean) {
    const View from = Arguments(mean ? "mean" : "sum", x).floats("x", x, {{"R"}, {"D"}});
    const int64_t rows = from.size[0], d = from.size[1];
    Tensor y = empty(x, {rows}, scalar_type(from.dtype));
    void* to = y.mutable_data_ptr();
    const int64_t block = 1 + 16384 / (d + 1);
    for_each_task(ceil_div(rows, block), [&](int64_t task) {
        const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
        RK_CALL(sum_rows, from.data, from.dtype, d, task * block, end, mean, to);
    });
    return y;
}

static Tensor sum(const Tensor& x) { return row_sum(x, false); }
static Tensor mean(const Tensor& x) { return row_sum(x, true); }

// clang-format off
RK_OPS(m) {
    m.op("softmax(Tensor x) -> Tensor", TORCH_BOX(&softmax));
    m.op("sum(Tensor x) -> Tensor", TORCH_BOX(&sum));
    m.op("mean(Tensor x) -> Tensor", TORCH_BOX(&mean));
}
// clang-format on

}  // namespace rk

#else

#include "softmax.h"

namespace rk {
namespace RK_ISA {

// e holds D rounded up to 32. float32 rows that fill their last 32 lanes are made in place.
static void softmax_rows(const void* x, Dtype dtype, int64_t d, int64_t begin, int64_t end, void* y, float* memory) {
    const bool in_place = dtype == Dtype::F32 && d % LANES == 0;
    for (int64_t row = begin; row < end; ++row) {
        float* e = in_place ? static_cast<float*>(y) + row * d : memory;
        const float* from = static_cast<const float*>(x) + row * d;
        if (!in_place) {
            widen(dtype, x, row * d, d, e);
            from = e;
        }
        const float sum = exp_and_sum(from, e, 0, d, 1.0f);
        for (int64_t i = 0; i < d; i += W) store(e + i, load(e + i) / all(sum));
        if (!in_place) narrow(dtype, e, d, y, row * d);
    }
}

// Block by block of 32 through a buffer: rows may be as long as a whole tensor.
static void sum_rows(const void* x, Dtype dtype, int64_t d, int64_t begin, int64_t end, bool mean, void* y) {
    constexpr int BLOCK = 8 * LANES;
    for (int64_t row = begin; row < end; ++row) {
        Lanes sum = zero_lanes();
        for (int64_t i0 = 0; i0 < d; i0 += BLOCK) {
            float block[BLOCK];
            const int n = int(d - i0 < BLOCK ? d - i0 : BLOCK), full = (n + LANES - 1) / LANES * LANES;
            widen(dtype, x, row * d + i0, n, block);
            for (int i = n; i < full; ++i) block[i] = 0.0f;
            for (int i = 0; i < full; i += LANES)
                for (int v = 0; v < LANES / W; ++v) sum.v[v] = sum.v[v] + load(block + i + v * W);
        }
        const float total = fold(sum);
        store_some_as(dtype, y, row, all(mean ? total / float(d) : total), 1);
    }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
