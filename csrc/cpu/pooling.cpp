// pooling.cpp: pool and score_head on the CPU. sigmoid itself is linear.cpp's activation, asked for in float32.
// mean: one ascending chain per feature over the sequence's tokens, then IEEE division (NUMERICS.md, "pool").

#ifndef RK_ISA
#define RK_FILE "pooling.cpp"
#include "each_isa.h"
#include "linear.h"

#include <tuple>

namespace rk {

static Tensor pool(const Tensor& x, const Tensor& cu_seqlens, bool mean, ScalarType out_dtype) {
    const int64_t B = cu_seqlens.size(0) - 1, D = x.size(1);
    const int32_t* cu = checked_offsets(cu_seqlens, x.size(0), "pool");
    Tensor y = empty(x, {B, D}, out_dtype);
    const Dtype from = dtype_of(x, "pool", "x"), to = dtype_of(out_dtype, "pool", "out_dtype");
    const void* in = x.const_data_ptr();
    void* out = y.mutable_data_ptr();
    for_each_task(B, [&](int64_t b) {
        RK_CALL(pool_one, in, from, cu[b], mean ? cu[b + 1] : std::min(cu[b] + 1, cu[b + 1]), D, out, to, b * D);
    });
    return y;
}

static std::tuple<Tensor, Tensor, Tensor> score_head(const Tensor& pooled, const std::optional<Tensor>& dense_weight,
                                                     const std::optional<Tensor>& dense_bias, int64_t activation,
                                                     const Tensor& out_weight, const std::optional<Tensor>& out_bias) {
    const int64_t B = pooled.size(0), L = out_weight.size(0);
    Tensor hidden = pooled;
    if (dense_weight) {
        hidden = empty(pooled, {B, dense_weight->size(0)}, ScalarType::Float);
        run_linear(linear_args("score_head", pooled, *dense_weight, dense_bias, activation, hidden));
    }
    Tensor logit = empty(pooled, {B, L}, ScalarType::Float);
    run_linear(linear_args("score_head", hidden, out_weight, out_bias, 0, logit));
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
static void pool_one(const void* x, Dtype from, int64_t begin, int64_t end, int64_t d, void* y, Dtype to, int64_t at) {
    for (int64_t i = 0; i < d; i += W) {
        const int some = int(d - i < W ? d - i : W);
        Vec sum = all(0.0f);
        for (int64_t t = begin; t < end; ++t) sum = sum + load_some_as(from, x, t * d + i, some);
        store_some_as(to, y, at + i, begin < end ? sum / all(float(end - begin)) : sum, some);
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
