// linear.cpp: linear and activation on CUDA tensors.

#include "linear.h"

namespace rk {

void run_linear(const Call& call, const char* op, const Tensor& x, const Tensor& weight, int64_t N,
                const std::optional<Tensor>& bias, int64_t activation, const std::optional<Tensor>& residual, const Tensor& y) {
    RK_CHECK(N > 0 && x.size(1) > 0, op, "N and K must be > 0");
    RK_CHECK(weight.dim() == 2 && weight.size(0) == N && weight.size(1) == x.size(1) && weight.is_contiguous(), op,
             "the weight must be [N, K] and contiguous on a GPU");
    const LinearArgs args{call.read(x),
                          dtype_of(x, op, "x"),
                          call.read(weight),
                          dtype_of(weight, op, "weight"),
                          read(call, bias),
                          dtype_of(bias, op, "bias"),
                          read(call, residual),
                          dtype_of(residual, op, "residual"),
                          call.write(y),
                          dtype_of(y, op, "out_dtype"),
                          x.size(0),
                          N,
                          x.size(1),
                          int(activation)};
    Tensor memory = workspace(call, linear_workspace(args));
    linear(op, args, static_cast<float*>(call.write(memory)), call.stream());
}

static Tensor linear_cuda(const Tensor& x, const Tensor& weight, int64_t N, const std::optional<Tensor>& bias,
                          int64_t activation, const std::optional<Tensor>& residual, ScalarType out_dtype) {
    const Call call(x);
    Tensor y = call.empty({x.size(0), N}, out_dtype);
    run_linear(call, "linear", x, weight, N, bias, activation, residual, y);
    return y;
}

static Tensor activation_cuda(const Tensor& x, int64_t kind, ScalarType out_dtype) {
    const Call call(x);
    Tensor y = call.empty(x.sizes(), out_dtype);
    activation(int(kind), call.read(x), dtype_of(x, "activation", "x"), call.write(y),
               dtype_of(out_dtype, "activation", "out_dtype"), x.numel(), call.stream());
    return y;
}

STABLE_TORCH_LIBRARY_IMPL(RK_LIBRARY, RK_KEY, m) {
    m.impl("linear", TORCH_BOX(&linear_cuda));
    m.impl("activation", TORCH_BOX(&activation_cuda));
}

}  // namespace rk
