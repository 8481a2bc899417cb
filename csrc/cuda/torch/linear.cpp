// linear.cpp: linear, bmm and activation on CUDA tensors, in both modes.

#include "linear.h"

namespace rk {

void activation(int kind, const Ref& x, const Ref& up, const Out& y, int64_t n, Stream stream);  // portable/linear.cu

static void run(const CallArguments& in, const LinearArgs& args, int64_t batches) {
    const OpCall& call = in.call();
    Tensor memory = workspace(call, linear_workspace(args, batches));
    linear(in.op(), args, batches, static_cast<float*>(call.write(memory)), call.stream());
}

static void run_tensor(const CallArguments& in, const LinearArgs& args, int64_t batches) {
    RK_CHECK(args.x.dtype != Dtype::F32 && args.x.dtype == args.weight.dtype, in.op(),
             "mode 'tensor' takes operands in half precision, both of one dtype");
    const Stream stream = in.call().stream();
    const bool ask = hopper.linear_tensor && asked("linear_hopper_tensor", "linear_tensor", in.call().device());
    if (ask && hopper.linear_tensor(in.op(), args, batches, stream)) return;
    linear_tensor(in.op(), args, batches, stream);
}

using Mode = decltype(&run);

static Tensor linear_in(Mode mode, const CallArguments& in, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& residual,
                        ScalarType out_dtype) {
    const View rows = in.floats("x", x, {{"M"}, {"K"}});
    const View w = in.floats("weight", weight, {{"N"}, {"K", rows.size[1]}});
    const int64_t M = rows.size[0], N = w.size[0], K = w.size[1];
    RK_CHECK(N > 0 && K > 0, in.op(), "N and K must be > 0");
    in.activation(activation);
    Tensor y = in.call().empty({M, N}, out_dtype);
    const LinearArgs args{.x = rows.ref(),
                          .weight = w.ref(),
                          .bias = in.floats("bias", bias, {{"N", N}}).ref(),
                          .residual = in.floats("residual", residual, {{"M", M}, {"N", N}}).ref(),
                          .out = out(in.call(), y, in.op()),
                          .M = M,
                          .N = N,
                          .K = K,
                          .activation = int(activation)};
    mode(in, args, 1);
    return y;
}

Tensor run_linear(const CallArguments& in, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  int64_t activation, const std::optional<Tensor>& residual, ScalarType out_dtype) {
    return linear_in(&run, in, x, weight, bias, activation, residual, out_dtype);
}

template <auto mode>
static Tensor linear_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
                          const std::optional<Tensor>& residual, ScalarType out_dtype) {
    const OpCall call(x);
    return linear_in(mode, {call, "linear", x}, x, weight, bias, activation, residual, out_dtype);
}

// y[i] = a[i] b[i]^T; a [B, M, K], b [B, N, K]
template <auto mode>
static Tensor bmm_cuda(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
    const OpCall call(a);
    const CallArguments in(call, "bmm", a);
    const View left = in.floats("a", a, {{"B"}, {"M"}, {"K"}});
    const View right = in.floats("b", b, {{"B", left.size[0]}, {"N"}, {"K", left.size[2]}});
    const int64_t B = left.size[0], M = left.size[1], K = left.size[2], N = right.size[1];
    RK_CHECK(K > 0 && N > 0, "bmm", "N and K must be > 0");
    Tensor y = call.empty({B, M, N}, out_dtype);
    const LinearArgs args{.x = left.ref(),
                          .weight = right.ref(),
                          .bias = {},
                          .residual = {},
                          .out = out(call, y, "bmm"),
                          .M = M,
                          .N = N,
                          .K = K,
                          .activation = 0};
    mode(in, args, B);
    return y;
}

static Tensor activation_cuda(const Tensor& x, int64_t kind, const std::optional<Tensor>& up, ScalarType out_dtype) {
    const OpCall call(x);
    const CallArguments in(call, "activation", x);
    const View from = in.floats("x", x, {}), factor = in.floats("up", up, {});
    in.activation(kind);
    RK_CHECK(!factor.given || factor.numel == from.numel, "activation", "up must have as many elements as x");
    Tensor y = call.empty(x.sizes(), out_dtype);
    activation(int(kind), from.ref(), factor.ref(), out(call, y, "activation"), from.numel, call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("linear", TORCH_BOX(&linear_cuda<&run>));
    m.impl("linear_tensor", TORCH_BOX(&linear_cuda<&run_tensor>));
    m.impl("bmm", TORCH_BOX(&bmm_cuda<&run>));
    m.impl("bmm_tensor", TORCH_BOX(&bmm_cuda<&run_tensor>));
    m.impl("activation", TORCH_BOX(&activation_cuda));
}

}  // namespace rk
