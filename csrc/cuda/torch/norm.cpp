// norm.cpp: layer_norm and normalize on CUDA tensors.

#include "launch.h"

namespace rk {

// portable/norm.cu; x, y [rows, D]
void layer_norm(const NormArgs& args, int64_t rows, Stream stream);
void normalize(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, float eps, Stream stream);

static Tensor layer_norm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                              const std::optional<Tensor>& residual) {
    const Call call(x);
    const int64_t rows = x.size(0), D = x.size(1);
    Tensor y = call.empty({rows, D}, x.scalar_type());
    const NormArgs args{.x = ref(call, x, "layer_norm", "x"),
                        .residual = ref(call, residual, "layer_norm", "residual"),
                        .weight = ref(call, weight, "layer_norm", "weight"),
                        .bias = ref(call, bias, "layer_norm", "bias"),
                        .y = call.write(y),
                        .D = D,
                        .eps = float(eps)};
    layer_norm(args, rows, call.stream());
    return y;
}

static Tensor normalize_cuda(const Tensor& x, double eps) {
    const Call call(x);
    const int64_t rows = x.size(0), D = x.size(1);
    Tensor y = call.empty({rows, D}, x.scalar_type());
    normalize(call.read(x), dtype_of(x, "normalize", "x"), call.write(y), rows, D, float(eps), call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("layer_norm", TORCH_BOX(&layer_norm_cuda));
    m.impl("normalize", TORCH_BOX(&normalize_cuda));
}

}  // namespace rk
