// norm.cpp: layer_norm, rms_norm and normalize on CUDA tensors.

#include "launch.h"

namespace rk {

// portable/norm.cu; x, y [rows, D]
void layer_norm(const NormArgs& args, int64_t rows, Stream stream);
void rms_norm(const NormArgs& args, bool plus_one, bool rounded, int64_t rows, Stream stream);
void normalize(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, float eps, Stream stream);

static View rows_of(const CallArguments& in, const Tensor& x) {
    const View rows = in.floats("x", x, {{"R"}, {"D"}});
    RK_CHECK(rows.size[1] > 0, in.op(), "x must be [R, D] with D > 0");
    return rows;
}

static NormArgs norm_args(const CallArguments& in, const View& x, const Tensor& weight, double eps,
                          const std::optional<Tensor>& residual, const Tensor& y) {
    const int64_t R = x.size[0], D = x.size[1];
    return {.x = x.ref(),
            .residual = in.floats("residual", residual, {{"R", R}, {"D", D}}).ref(),
            .weight = in.floats("weight", weight, {{"D", D}}).ref(),
            .bias = {},
            .y = in.call().write(y),
            .D = D,
            .eps = float(eps)};
}

static Tensor layer_norm_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                              const std::optional<Tensor>& residual) {
    const OpCall call(x);
    const CallArguments in(call, "layer_norm", x);
    const View rows = rows_of(in, x);
    Tensor y = like(call, rows);
    NormArgs args = norm_args(in, rows, weight, eps, residual, y);
    args.bias = in.floats("bias", bias, {{"D", args.D}}).ref();
    layer_norm(args, rows.size[0], call.stream());
    return y;
}

static Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps, bool plus_one, bool rounded,
                            const std::optional<Tensor>& residual) {
    const OpCall call(x);
    const CallArguments in(call, "rms_norm", x);
    const View rows = rows_of(in, x);
    Tensor y = like(call, rows);
    rms_norm(norm_args(in, rows, weight, eps, residual, y), plus_one, rounded, rows.size[0], call.stream());
    return y;
}

static Tensor normalize_cuda(const Tensor& x, double eps) {
    const OpCall call(x);
    const View rows = rows_of({call, "normalize", x}, x);
    Tensor y = like(call, rows);
    normalize(rows.data, rows.dtype, call.write(y), rows.size[0], rows.size[1], float(eps), call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("layer_norm", TORCH_BOX(&layer_norm_cuda));
    m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
    m.impl("normalize", TORCH_BOX(&normalize_cuda));
}

}  // namespace rk
