// norm.cpp: layer_norm, rms_norm and normalize on CUDA tensors.

#include "launch.h"

namespace rk {

// portable/norm.cu; x, y [rows, D]
void layer_norm(const NormArgs& args, int64_t rows, Stream stream);
void rms_norm(const NormArgs& args, bool plus_one, bool rounded, int64_t rows, Stream stream);
void normalize(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, float eps, Stream stream);

static NormArgs norm_args(const OpCall& call, const char* op, const Tensor& x, const Tensor& weight, double eps,
                          const std::optional<Tensor>& residual, const Tensor& y) {
    return {.x = ref(call, x, op, "x"),
            .residual = ref(call, residual, op, "residual"),
            .weight = ref(call, weight, op, "weight"),
            .bias = {},
            .y = call.write(y),
            .D = x.size(1),
            .eps = float(eps)};
}

static Tensor layer_norm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                              const std::optional<Tensor>& residual) {
    const OpCall call(x);
    Tensor y = call.empty({x.size(0), x.size(1)}, x.scalar_type());
    NormArgs args = norm_args(call, "layer_norm", x, weight, eps, residual, y);
    args.bias = ref(call, bias, "layer_norm", "bias");
    layer_norm(args, x.size(0), call.stream());
    return y;
}

static Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, bool plus_one, bool rounded,
                            const std::optional<Tensor>& residual) {
    const OpCall call(x);
    Tensor y = call.empty({x.size(0), x.size(1)}, x.scalar_type());
    rms_norm(norm_args(call, "rms_norm", x, weight, eps, residual, y), plus_one, rounded, x.size(0), call.stream());
    return y;
}

static Tensor normalize_cuda(const Tensor& x, double eps) {
    const OpCall call(x);
    const int64_t rows = x.size(0), D = x.size(1);
    Tensor y = call.empty({rows, D}, x.scalar_type());
    normalize(call.read(x), dtype_of(x, "normalize", "x"), call.write(y), rows, D, float(eps), call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("layer_norm", TORCH_BOX(&layer_norm_cuda));
    m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
    m.impl("normalize", TORCH_BOX(&normalize_cuda));
}

}  // namespace rk
