// sparse_ffn.cpp: sparse_ffn on CUDA tensors, for few rows; many take the dense way
// (rerank_kernels/backend/native/sparse_ffn.py).

#include "launch.h"

#include <tuple>

namespace rk {

// portable/sparse_ffn.cu. `tensor`: the first pre-activations are mode tensor's; workspace in float32 elements
int64_t sparse_ffn_workspace(const SparseFfnArgs& args, bool tensor);
void sparse_ffn(const SparseFfnArgs& args, bool tensor, float* workspace, Stream stream);

static Tensor sparse_ffn_in(bool tensor, const Tensor& x, const Tensor& first, const std::optional<Tensor>& first_bias,
                            const std::optional<Tensor>& up, const std::optional<Tensor>& up_bias, const Tensor& down_rows,
                            const std::optional<Tensor>& down_bias, const std::optional<Tensor>& residual,
                            const std::optional<Tensor>& candidates, double threshold, bool squared, bool up_relu) {
    const OpCall call(x);
    const CallArguments in(call, "sparse_ffn", x);
    const View tokens = in.floats("x", x, {{"M"}, {"K"}});
    const View down = in.floats("down_rows", down_rows, {{"F"}, {"D"}});
    const int64_t M = tokens.size[0], K = tokens.size[1], F = down.size[0], D = down.size[1];
    RK_CHECK(K > 0 && F > 0 && D > 0 && F <= INT32_MAX, "sparse_ffn", "K, F and D must be > 0, and F at most 2^31 - 1");
    const View first_rows = in.floats("first_weight", first, {{"F", F}, {"K", K}});
    RK_CHECK(!tensor || (tokens.dtype != Dtype::F32 && tokens.dtype == first_rows.dtype), "sparse_ffn",
             "mode 'tensor' takes x and the first weight in half precision, both of one dtype");
    RK_CHECK(up || !up_bias, "sparse_ffn", "up_bias must be left out without up_weight");
    RK_CHECK(threshold >= 0.0, "sparse_ffn", "threshold must be >= 0");
    RK_CHECK(up || !up_relu, "sparse_ffn", "up_relu wants up_weight");
    Tensor y = call.empty({M, D}, scalar_type(tokens.dtype));
    const SparseFfnArgs args{
        .x = tokens.ref(),
        .first = first_rows.ref(),
        .first_bias = in.floats("first_bias", first_bias, {{"F", F}}).ref(),
        .up = in.floats("up_weight", up, {{"F", F}, {"K", K}}).ref(),
        .up_bias = in.floats("up_bias", up_bias, {{"F", F}}).ref(),
        .down = down.ref(),
        .down_bias = in.floats("down_bias", down_bias, {{"D", D}}).ref(),
        .residual = in.floats("residual", residual, {{"M", M}, {"D", D}}).ref(),
        .out = out(call, y, "sparse_ffn"),
        .M = M,
        .K = K,
        .F = F,
        .D = D,
        .firing = {.threshold = float(threshold),
                   .squared = squared,
                   .up_relu = up_relu,
                   .candidates = candidates ? in.flags("candidates", *candidates, {{"M", M}, {"F", F}}) : nullptr}};
    Tensor memory = workspace(call, sparse_ffn_workspace(args, tensor));
    sparse_ffn(args, tensor, static_cast<float*>(call.write(memory)), call.stream());
    return y;
}

// The three after first_bias serve the CPU's screening (csrc/cpu/sparse_ffn.cpp) and are not looked at here. Nor are neurons
// counted: whoever reads a count waits for the device.
static std::tuple<Tensor, Tensor> sparse_ffn_cuda(const Tensor& x, const Tensor& first, const std::optional<Tensor>& first_bias,
                                                  const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                  const std::optional<Tensor>&, const std::optional<Tensor>& up,
                                                  const std::optional<Tensor>& up_bias, const Tensor& down_rows,
                                                  const std::optional<Tensor>& down_bias, const std::optional<Tensor>& residual,
                                                  const std::optional<Tensor>& candidates, double threshold, bool squared,
                                                  bool up_relu) {
    return {sparse_ffn_in(false, x, first, first_bias, up, up_bias, down_rows, down_bias, residual, candidates, threshold,
                          squared, up_relu),
            OpCall(x).empty({0}, ScalarType::Int)};
}
static Tensor sparse_ffn_tensor_cuda(const Tensor& x, const Tensor& first, const std::optional<Tensor>& first_bias,
                                     const std::optional<Tensor>& up, const std::optional<Tensor>& up_bias,
                                     const Tensor& down_rows, const std::optional<Tensor>& down_bias,
                                     const std::optional<Tensor>& residual, const std::optional<Tensor>& candidates,
                                     double threshold, bool squared, bool up_relu) {
    return sparse_ffn_in(true, x, first, first_bias, up, up_bias, down_rows, down_bias, residual, candidates, threshold,
                         squared, up_relu);
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("sparse_ffn", TORCH_BOX(&sparse_ffn_cuda));
    m.impl("sparse_ffn_tensor", TORCH_BOX(&sparse_ffn_tensor_cuda));
}

}  // namespace rk
