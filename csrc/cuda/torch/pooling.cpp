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
    const int64_t B = cu_seqlens.size(0) - 1, D = x.size(1);
    Tensor y = call.empty({B, D}, out_dtype);
    pool(call.read(x), dtype_of(x, "pool", "x"), offsets(call, cu_seqlens, "pool"), B, x.size(0), D, mean, call.write(y),
         dtype_of(out_dtype, "pool", "out_dtype"), call.stream());
    return y;
}

static std::tuple<Tensor, Tensor, Tensor> score_head_cuda(const Tensor& pooled, const std::optional<Tensor>& dense,
                                                          const std::optional<Tensor>& dense_bias, int64_t activation,
                                                          const Tensor& out, const std::optional<Tensor>& out_bias) {
    const OpCall call(pooled);
    const int64_t B = pooled.size(0), L = out.size(0);
    Tensor hidden = pooled;
    if (dense) {
        hidden = call.empty({B, dense->size(0)}, ScalarType::Float);
        run_linear(call, "score_head", pooled, *dense, dense_bias, activation, std::nullopt, hidden);
    }
    Tensor logit = call.empty({B, L}, ScalarType::Float);
    run_linear(call, "score_head", hidden, out, out_bias, 0, std::nullopt, logit);
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
