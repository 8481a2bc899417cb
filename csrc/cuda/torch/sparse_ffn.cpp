// sparse_ffn.cpp: sparse_ffn on CUDA tensors, for few rows; many take the dense way
// (rerank_kernels/backend/native/sparse_ffn.py).

#include "launch.h"

namespace rk {

// portable/sparse_ffn.cu. `tensor`: the first pre-activations are mode tensor's; workspace in float32 elements
int64_t sparse_ffn_workspace(const SparseFfnArgs& args, bool tensor);
void sparse_ffn(const SparseFfnArgs& args, bool tensor, float* workspace, Stream stream);

static Tensor sparse_ffn_in(bool tensor, const Tensor& x, const Tensor& first, const std::optional<Tensor>& first_bias,
                            const std::optional<Tensor>& up, const std::optional<Tensor>& up_bias, const Tensor& down_rows,
                            const std::optional<Tensor>& down_bias) {
    const OpCall call(x);
    const int64_t M = x.size(0), K = x.size(1), F = down_rows.size(0), D = down_rows.size(1);
    RK_CHECK(K > 0 && F > 0 && D > 0, "sparse_ffn", "K, F and D must be > 0");
    RK_CHECK(first.is_contiguous() && first.size(0) == F && first.size(1) == K, "sparse_ffn",
             "the first weight must be [F, K] and contiguous");
    RK_CHECK(!up || (up->is_contiguous() && up->size(0) == F && up->size(1) == K), "sparse_ffn",
             "up_weight must be [F, K] and contiguous");
    RK_CHECK(down_rows.is_contiguous(), "sparse_ffn", "the rows of down must be contiguous");
    RK_CHECK(!tensor || (dtype_of(x, "sparse_ffn", "x") != Dtype::F32 && x.scalar_type() == first.scalar_type()), "sparse_ffn",
             "mode 'tensor' takes x and the first weight in half precision, both of one dtype");
    Tensor y = call.empty({M, D}, x.scalar_type());
    const SparseFfnArgs args{.x = ref(call, x, "sparse_ffn", "x"),
                             .first = ref(call, first, "sparse_ffn", "weight"),
                             .first_bias = ref(call, first_bias, "sparse_ffn", "bias"),
                             .up = ref(call, up, "sparse_ffn", "up_weight"),
                             .up_bias = ref(call, up_bias, "sparse_ffn", "up_bias"),
                             .down = ref(call, down_rows, "sparse_ffn", "down_weight"),
                             .down_bias = ref(call, down_bias, "sparse_ffn", "down_bias"),
                             .out = out(call, y, "sparse_ffn", "x"),
                             .M = M,
                             .K = K,
                             .F = F,
                             .D = D};
    Tensor memory = workspace(call, sparse_ffn_workspace(args, tensor));
    sparse_ffn(args, tensor, static_cast<float*>(call.write(memory)), call.stream());
    return y;
}

// The three after first_bias serve the CPU's screening (csrc/cpu/sparse_ffn.cpp) and are not looked at here.
static Tensor sparse_ffn_cuda(const Tensor& x, const Tensor& first, const std::optional<Tensor>& first_bias,
                              const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                              const std::optional<Tensor>& up, const std::optional<Tensor>& up_bias, const Tensor& down_rows,
                              const std::optional<Tensor>& down_bias) {
    return sparse_ffn_in(false, x, first, first_bias, up, up_bias, down_rows, down_bias);
}
static Tensor sparse_ffn_tensor_cuda(const Tensor& x, const Tensor& first, const std::optional<Tensor>& first_bias,
                                     const std::optional<Tensor>& up, const std::optional<Tensor>& up_bias,
                                     const Tensor& down_rows, const std::optional<Tensor>& down_bias) {
    return sparse_ffn_in(true, x, first, first_bias, up, up_bias, down_rows, down_bias);
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn_cuda));
    m.impl("sparse_ffn_tensor", TORCH_BOX(&sparse_ffn_tensor_cuda));
}

}  // namespace rk
