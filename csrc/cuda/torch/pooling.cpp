// pooling.cpp: pool and score_head on CUDA tensors. sigmoid itself is linear.cpp's activation, asked for in float32.

#include <tuple>

#include "linear.h"

namespace rk {

// portable/pooling.cu; score[i] = sigmoid(logit[i]), complement[i] = sigmoid(-logit[i])
void pool(const void* x, Dtype from, const int32_t* cu_seqlens, int64_t B, int64_t total, int64_t D, bool mean, void* y,
          Dtype to, Stream stream);
void score(const float* logit, int64_t n, float* score, float* complement, Stream stream);

static Tensor pool_cuda(const Tensor& x, const Tensor& cu_seqlens, bool mean, ScalarType out_dtype) {
    const OpCall call(x);
    const CallArguments in(call, "pool", x);
    const View rows = in.floats("x", x, {{"total"}, {"D"}}), cu = in.offsets("cu_seqlens", cu_seqlens);
    const int64_t B = cu.numel - 1, total = rows.size[0], D = rows.size[1];
    Tensor y = call.empty({B, D}, out_dtype);
    const Out to = out(call, y, "pool");
    pool(rows.data, rows.dtype, cu.as<int32_t>(), B, total, D, mean, to.data, to.dtype, call.stream());
    return y;
}

static std::tuple<Tensor, Tensor, Tensor> score_head_cuda(const Tensor& pooled, const std::optional<Tensor>& dense,
                                                          const std::optional<Tensor>& dense_bias, int64_t activation,
                                                          const Tensor& last, const std::optional<Tensor>& last_bias) {
    const OpCall call(pooled);
    const CallArguments in(call, "score_head", pooled);
    RK_CHECK(dense || !dense_bias, "score_head", "dense_bias must be left out without dense_weight");
    Tensor hidden = pooled;
    if (dense) hidden = run_linear(in, pooled, *dense, dense_bias, activation, std::nullopt, ScalarType::Float);
    Tensor logit = run_linear(in, hidden, last, last_bias, 0, std::nullopt, ScalarType::Float);
    const int64_t B = logit.size(0), L = logit.size(1);
    Tensor probability = call.empty({B, L}, ScalarType::Float), complement = call.empty({B, L}, ScalarType::Float);
    score(static_cast<const float*>(call.read(logit)), B * L, static_cast<float*>(call.write(probability)),
          static_cast<float*>(call.write(complement)), call.stream());
    return {logit, probability, complement};
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("pool", TORCH_BOX(&pool_cuda));
    m.impl("score_head", TORCH_BOX(&score_head_cuda));
}

}  // namespace rk
