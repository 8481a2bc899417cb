// kernels.h: the launchers of the CUDA backend, family by family: what csrc/cuda/<family>.cpp (torch) asks of
// csrc/cuda/<family>.cu (no torch). Pointers are device memory; nothing here waits for the device or allocates.
#pragma once

#include "../args.h"

namespace rk {

using Stream = void*;  // a cudaStream_t; the torch side needs no CUDA header for it

// Shared memory of one block: what every architecture from sm_80 to sm_120 grants.
constexpr int MAX_SHARED = 99 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A launcher that can serve a call in several ways (tile sizes, one or two kernels) has one of these. Every way serves every
// call with the same bits; `take` says which: its own choice by shape, or what a test forced (op force_launch).
class Choice {
   public:
    Choice(const char* kernel, int count) : kernel(kernel), count(count), next(first()) { first() = this; }
    int take(int own) const { return forced < 0 ? own : forced; }
    const char* const kernel;
    const int count;
    int forced = -1;
    Choice* const next;
    static Choice*& first();  // of the list of all; launch.cpp
};

// ---- norm
void layer_norm(const NormArgs& args, int64_t rows, Stream stream);
void normalize(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, float eps, Stream stream);  // x, y [rows, D]

// ---- softmax: x, y [rows, D] in `dtype`; row_sum: y [rows]
void softmax(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, Stream stream);
void row_sum(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, bool mean, Stream stream);

// ---- linear, and bmm: `batches` products side by side, x [batches, M, K], weight [batches, N, K], out [batches, M, N].
// `workspace` is float32 of linear_workspace(args, batches) elements, 0 if none is needed
int64_t linear_workspace(const LinearArgs& args, int64_t batches);
void linear(const char* op, const LinearArgs& args, int64_t batches, float* workspace, Stream stream);
// mode tensor: x and weight are half precision, both of one dtype
void linear_tensor(const char* op, const LinearArgs& args, int64_t batches, Stream stream);
void activation(int kind, const void* x, Dtype from, void* y, Dtype to, int64_t n, Stream stream);

// ---- attention
// The offsets of B sequences, int32 [B + 1] on the device; their values are not known here. In self-attention both are one.
struct PackedArgs {
    const int32_t* cu_seqlens;    // of the queries, total in all
    const int32_t* cu_seqlens_k;  // of the keys, total_k in all
    int64_t B, total, total_k;
};
void attention(const AttentionArgs& args, const PackedArgs& packed, Stream stream);
// mode "tensor": float16 or bfloat16, D <= 256
void attention_tensor(const AttentionArgs& args, const PackedArgs& packed, Stream stream);

// ---- pooling
void pool(const void* x, Dtype from, const int32_t* cu_seqlens, int64_t B, int64_t total, int64_t D, bool mean, void* y,
          Dtype to, Stream stream);
// score[i] = sigmoid(logit[i]), complement[i] = sigmoid(-logit[i])
void score(const float* logit, int64_t n, float* score, float* complement, Stream stream);

// ---- sparse_ffn: first pre-activations of all neurons, then only what is active is read
struct SparseFfnArgs {
    const void* x;  // [M, K]
    Dtype x_dtype;
    const void* first;  // [F, K]: gate if there is one, else up
    Dtype first_dtype;
    const void* first_bias;  // [F] or null
    Dtype first_bias_dtype;
    const void* up;  // [F, K], or null: no gate
    Dtype up_dtype;
    const void* up_bias;  // [F] or null
    Dtype up_bias_dtype;
    const void* down;  // [F, D], the transpose of nn.Linear's weight
    Dtype down_dtype;
    const void* down_bias;  // [D] or null
    Dtype down_bias_dtype;
    void* y;  // [M, D]
    Dtype y_dtype;
    int64_t M, K, F, D;
};
// `tensor`: the first pre-activations are mode tensor's; workspace in float32 elements
int64_t sparse_ffn_workspace(const SparseFfnArgs& args, bool tensor);
void sparse_ffn(const SparseFfnArgs& args, bool tensor, float* workspace, Stream stream);

}  // namespace rk
