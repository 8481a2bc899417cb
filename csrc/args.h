// args.h: what a launcher hands to a kernel of any backend: raw pointers, dtypes and sizes. Plain data, no torch.
#pragma once

#include "types.h"

namespace rk {

// An array that a kernel reads. Whether the argument was given is a word of its own: the data of an empty tensor are null too.
// What is absent is not looked at.
struct Ref {
    const void* data = nullptr;
    Dtype dtype = Dtype::F32;
    bool given = false;
};
// One that it writes.
struct Out {
    void* data = nullptr;
    Dtype dtype = Dtype::F32;
};

struct NormArgs {
    Ref x;         // [R, D]
    Ref residual;  // [R, D] or absent
    Ref weight;    // [D]
    Ref bias;      // [D] or absent
    void* y;       // [R, D], as x
    int64_t D;
    float eps;
};

struct LinearArgs {
    Ref x;         // [M, K]
    Ref weight;    // [N, K], as nn.Linear holds it
    Ref bias;      // [N] or absent
    Ref residual;  // [M, N] or absent
    Out out;       // [M, N]
    int64_t M, N, K;
    int activation;  // numerics.h, enum Activation
};
constexpr int64_t ACTIVATIONS = 11;  // how many that enum has

struct RotaryArgs {
    Ref x;  // [tokens, H, D]; strides in elements, features side by side
    int64_t x_token, x_head;
    Ref cos, sin;      // [tokens, P]
    void* y;           // [tokens, H, D], as x, contiguous
    int64_t H, D, P;   // pairs: 2 P <= D
    bool interleaved;  // pair p is (2 p, 2 p + 1), else (p, p + P)
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
    float softcap;  // 0: none
};

struct RowsArgs {
    Ref x;       // [M, K]; the cpu's: one token
    Ref weight;  // [F, K], rows as in nn.Linear
    Ref bias;    // [F] or absent
    int64_t K;
};

struct AxpyArgs {
    Ref down;       // [F, D], the transpose of nn.Linear's weight
    Ref down_bias;  // [D] or absent
    Ref residual;   // [M, D] or absent
    Out out;        // [M, D]
    int64_t D;
};

// What makes a neuron of sparse_ffn active: x up to the threshold gives +0, else x, squared or not. A NaN stays one.
struct Firing {
    float threshold;  // >= 0
    bool squared;     // relu2
    bool up_relu;     // up passes relu too, before the product
    // Whether a neuron is looked at at all, [M, F]; nullptr: all are.
    const bool* candidates;
};

// sparse_ffn for few rows, on a GPU: first pre-activations of all neurons, then only what is active is read.
struct SparseFfnArgs {
    Ref x;           // [M, K]
    Ref first;       // [F, K]: gate if there is one, else up
    Ref first_bias;  // [F] or absent
    Ref up;          // [F, K], or absent: no gate
    Ref up_bias;     // [F] or absent
    Ref down;        // [F, D], the transpose of nn.Linear's weight
    Ref down_bias;   // [D] or absent
    Ref residual;    // [M, D] or absent
    Out out;         // [M, D]
    int64_t M, K, F, D;
    Firing firing;
};

}  // namespace rk
