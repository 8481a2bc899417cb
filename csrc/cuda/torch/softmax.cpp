// softmax.cpp: softmax and row sums on CUDA tensors [R, D].

#include "launch.h"

namespace rk {

// portable/softmax.cu; x, y [rows, D] in `dtype`; row_sum: y [rows]
void softmax(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, Stream stream);
void row_sum(const void* x, Dtype dtype, void* y, int64_t rows, int64_t D, bool mean, Stream stream);

static Tensor softmax_cuda(const Tensor& x) {
    const OpCall call(x);
    const View rows = CallArguments(call, "softmax", x).floats("x", x, {{"R"}, {"D"}});
    Tensor y = like(call, rows);
    if (rows.numel > 0) softmax(rows.data, rows.dtype, call.write(y), rows.size[0], rows.size[1], call.stream());
    return y;
}

static Tensor row_sum_cuda(const Tensor& x, bool mean) {
    const OpCall call(x);
    const View rows = CallArguments(call, mean ? "mean" : "sum", x).floats("x", x, {{"R"}, {"D"}});
    Tensor y = call.empty({rows.size[0]}, scalar_type(rows.dtype));
    row_sum(rows.data, rows.dtype, call.write(y), rows.size[0], rows.size[1], mean, call.stream());
    return y;
}

static Tensor sum_cuda(const Tensor& x) { return row_sum_cuda(x, false); }
static Tensor mean_cuda(const Tensor& x) { return row_sum_cuda(x, true); }

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("softmax", TORCH_BOX(&softmax_cuda));
    m.impl("sum", TORCH_BOX(&sum_cuda));
    m.impl("mean", TORCH_BOX(&mean_cuda));
}

}  // namespace rk
