// args.h: what a launcher hands to a kernel of any backend: raw pointers, dtypes and sizes. Plain data, no torch.
#pragma once

#include "types.h"

namespace rk {

struct NormArgs {
    const void* x;  // [R, D]
    Dtype x_dtype;
    const void* residual;  // [R, D] or null
    Dtype residual_dtype;
    const void* weight;  // [D]
    Dtype weight_dtype;
    const void* bias;  // [D] or null
    Dtype bias_dtype;
    void* y;  // [R, D], x_dtype
    int64_t D;
    float eps;
};

struct LinearArgs {
    const void* x;  // [M, K]
    Dtype x_dtype;
    const void* weight;  // [N, K], as nn.Linear holds it
    Dtype weight_dtype;
    const void* bias;  // [N] or null
    Dtype bias_dtype;
    const void* residual;  // [M, N] or null
    Dtype residual_dtype;
    void* out;  // [M, N]
    Dtype out_dtype;
    int64_t M, N, K;
    int activation;  // numerics.h, enum Activation
};

// The queries of a sequence are the last ones of its keys: query i of T_q stands at place T_k - T_q + i. left and right count
// from there.
struct AttentionArgs {
    const void *q, *k, *v;  // [total, H, D], [total_k, H_kv, D] twice; strides in elements, features side by side
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    Dtype dtype;
    void* out;  // [total, H, D], contiguous
    int64_t H, H_kv, D;
    int64_t left, right;  // -1: no limit
    float scale;
};

struct RowsArgs {
    const void* x;  // [M, K]; the cpu's: one token
    Dtype x_dtype;
    const void* weight;  // [F, K], rows as in nn.Linear
    Dtype weight_dtype;
    const void* bias;  // [F] or null
    Dtype bias_dtype;
    int64_t K;
};

struct AxpyArgs {
    const void* down;  // [F, D], the transpose of nn.Linear's weight
    Dtype down_dtype;
    const void* down_bias;  // [D] or null
    Dtype down_bias_dtype;
    void* out;  // [M, D]
    Dtype out_dtype;
    int64_t D;
};

}  // namespace rk
