// pooling.cpp: pool and score_head on the CPU. sigmoid itself is linear.cpp's activation, asked for in float32.
// mean: one ascending chain per feature over the sequence's tokens, then IEEE division (NUMERICS.md, "pool").

#ifndef RK_ISA
#define RK_FILE "pooling.cpp"
#include "each_isa.h"
#include "linear.h"

#include <tuple>

namespace rk {

static Tensor pool(const Tensor& x, const Tensor& cu_seqlens, bool mean, ScalarType out_dtype) {
    const Arguments in("pool", x);
    const View from = in.floats("x", x, {{"total"}, {"D"}});
    const std::vector<int32_t> cu = checked_offsets(in, "cu_seqlens", cu_seqlens, from.size[0]);
    const int64_t B = int64_t(cu.size()) - 1, D = from.size[1];
    Tensor y = empty(x, {B, D}, out_dtype);
    const Out to = out(y, "pool");
    for_each_task(B, [&](int64_t b) {
        RK_CALL(pool_one, from.ref(), cu[b], mean ? cu[b + 1] : std::min(cu[b] + 1, cu[b + 1]), D, to, b * D);
    });
    return y;
}

static std::tuple<Tensor, Tensor, Tensor> score_head(const Tensor& pooled, const std::optional<Tensor>& dense_weight,
                                                     const std::optional<Tensor>& dense_bias, int64_t activation,
                                                     const Tensor& out_weight, const std::optional<Tensor>& out_bias) {
    const Arguments in("score_head", pooled);
    const View rows = in.floats("pooled", pooled, {{"B"}, {"D"}});
    RK_CHECK(dense_weight || !dense_bias, "score_head", "dense_bias must be left out without dense_weight");
    const int64_t B = rows.size[0];
    Tensor hidden = pooled;
    View between = rows;
    if (dense_weight) {
        const View dense = checked_weight(in, "dense_weight", *dense_weight, rows.size[1]);
        const int64_t P = dense.size[0];
        hidden = empty(pooled, {B, P}, ScalarType::Float);
        run_linear(linear_args(in, rows, dense, in.floats("dense_bias", dense_bias, {{"P", P}}), activation, hidden));
        between = in.floats("hidden", hidden, {{"B", B}, {"P", P}});
    }
    const View last = checked_weight(in, "out_weight", out_weight, between.size[1]);
    const int64_t L = last.size[0];
    Tensor logit = empty(pooled, {B, L}, ScalarType::Float);
    run_linear(linear_args(in, between, last, in.floats("out_bias", out_bias, {{"L", L}}), 0, logit));
    Tensor score = torch::stable::empty_like(logit), complement = torch::stable::empty_like(logit);
    const ContractFloats floats;
    RK_CALL(score_range, static_cast<const float*>(logit.const_data_ptr()), B * L,
            static_cast<float*>(score.mutable_data_ptr()), static_cast<float*>(complement.mutable_data_ptr()));
    return {logit, score, complement};
}

// clang-format off
RK_OPS(m) {
    m.op("pool(Tensor x, Tensor cu_seqlens, bool mean, ScalarType out_dtype) -> Tensor", TORCH_BOX(&pool));
    m.op("score_head(Tensor pooled, Tensor? dense_weight, Tensor? dense_bias, int activation, Tensor out_weight, Tensor? out_bias) -> (Tensor, Tensor, Tensor)", TORCH_BOX(&score_head));
}
// clang-format on

}  // namespace rk

#else

namespace rk {
namespace RK_ISA {

// The mean of tokens [begin, end); a single token is itself (x / 1), no token is 0.
static void pool_one(const Ref& x, int64_t begin, int64_t end, int64_t d, const Out& y, int64_t at) {
    for (int64_t i = 0; i < d; i += W) {
        const int some = int(d - i < W ? d - i : W);
        Vec sum = all(0.0f);
        for (int64_t t = begin; t < end; ++t) sum = sum + load_some_as(x.dtype, x.data, t * d + i, some);
        store_some_as(y.dtype, y.data, at + i, begin < end ? sum / all(float(end - begin)) : sum, some);
    }
}

static void score_range(const float* logit, int64_t n, float* score, float* complement) {
    for (int64_t i = 0; i < n; i += W) {
        const int some = int(n - i < W ? n - i : W);
        const Vec z = load_some(logit + i, some);
        store_some(score + i, sigmoid_of(z), some);
        store_some(complement + i, sigmoid_of(all(0.0f) - z), some);
    }
}

}  // namespace RK_ISA
}  // namespace rk

#endif
