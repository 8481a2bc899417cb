// linear.cpp: linear, bmm and activation on CUDA tensors, in both modes.

#include "linear.h"

namespace rk {

void activation(int kind, const Ref& x, const Ref& up, const Out& y, int64_t n, Stream stream);  // portable/linear.cu

// x [.., M, K] and weight [.., N, K] as the kernels take them, with what the epilogue needs.
static LinearArgs args_of(const OpCall& call, const char* op, const Tensor& x, const Tensor& weight,
                          const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& residual,
                          const Tensor& y) {
    const int64_t last = x.dim() - 1, M = x.size(last - 1), K = x.size(last), N = y.size(last);
    RK_CHECK(N > 0 && K > 0, op, "N and K must be > 0");
    RK_CHECK(weight.dim() == x.dim() && weight.size(last - 1) == N && weight.size(last) == K && weight.is_contiguous(), op,
             "the weight must be [N, K] and contiguous on a GPU");
    return {.x = ref(call, x, op, "x"),
            .weight = ref(call, weight, op, "weight"),
            .bias = ref(call, bias, op, "bias"),
            .residual = ref(call, residual, op, "residual"),
            .out = out(call, y, op, "out_dtype"),
            .M = M,
            .N = N,
            .K = K,
            .activation = int(activation)};
}

static void run(const OpCall& call, const char* op, const LinearArgs& args, int64_t batches) {
    Tensor memory = workspace(call, linear_workspace(args, batches));
    linear(op, args, batches, static_cast<float*>(call.write(memory)), call.stream());
}

static void run_tensor(const OpCall& call, const char* op, const LinearArgs& args, int64_t batches) {
    RK_CHECK(args.x.dtype != Dtype::F32 && args.x.dtype == args.weight.dtype, op,
             "mode 'tensor' takes operands in half precision, both of one dtype");
    linear_tensor(op, args, batches, call.stream());
}

void run_linear(const OpCall& call, const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                int64_t activation, const std::optional<Tensor>& residual, const Tensor& y) {
    run(call, op, args_of(call, op, x, weight, bias, activation, residual, y), 1);
}

static Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
                          const std::optional<Tensor>& residual, ScalarType out_dtype) {
    const OpCall call(x);
    Tensor y = call.empty({x.size(0), weight.size(0)}, out_dtype);
    run_linear(call, "linear", x, weight, bias, activation, residual, y);
    return y;
}

static Tensor linear_tensor_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
                                 const std::optional<Tensor>& residual, ScalarType out_dtype) {
    const OpCall call(x);
    Tensor y = call.empty({x.size(0), weight.size(0)}, out_dtype);
    run_tensor(call, "linear", args_of(call, "linear", x, weight, bias, activation, residual, y), 1);
    return y;
}

// y[i] = a[i] b[i]^T; a [B, M, K], b [B, N, K]
static Tensor bmm_in(decltype(&run) mode, const Tensor& a, const Tensor& b, ScalarType out_dtype) {
    const OpCall call(a);
    RK_CHECK(a.dim() == 3 && a.is_contiguous() && b.dim() == 3 && b.size(0) == a.size(0), "bmm",
             "a must be [B, M, K] and contiguous, b [B, N, K]");
    Tensor y = call.empty({a.size(0), a.size(1), b.size(1)}, out_dtype);
    mode(call, "bmm", args_of(call, "bmm", a, b, std::nullopt, 0, std::nullopt, y), a.size(0));
    return y;
}
static Tensor bmm_cuda(const Tensor& a, const Tensor& b, ScalarType out_dtype) { return bmm_in(&run, a, b, out_dtype); }
static Tensor bmm_tensor_cuda(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
    return bmm_in(&run_tensor, a, b, out_dtype);
}

static Tensor activation_cuda(const Tensor& x, int64_t kind, const std::optional<Tensor>& up, ScalarType out_dtype) {
    const OpCall call(x);
    RK_CHECK(!up || up->numel() == x.numel(), "activation", "up must have as many elements as x");
    Tensor y = call.empty(x.sizes(), out_dtype);
    activation(int(kind), ref(call, x, "activation", "x"), ref(call, up, "activation", "up"),
               out(call, y, "activation", "out_dtype"), x.numel(), call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("linear", TORCH_BOX(&linear_cuda));
    m.impl("linear_tensor", TORCH_BOX(&linear_tensor_cuda));
    m.impl("bmm", TORCH_BOX(&bmm_cuda));
    m.impl("bmm_tensor", TORCH_BOX(&bmm_tensor_cuda));
    m.impl("activation", TORCH_BOX(&activation_cuda));
}

}  // namespace rk
