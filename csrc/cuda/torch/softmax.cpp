// softmax.cpp: softmax and row sums on CUDA tensors [R, D].

#include "launch.h"

namespace rk {

static Tensor softmax_cuda(const Tensor& x) {
    const Call call(x);
    Tensor y = call.empty({x.size(0), x.size(1)}, x.scalar_type());
    softmax(call.read(x), dtype_of(x, "softmax", "x"), call.write(y), x.size(0), x.size(1), call.stream());
    return y;
}

static Tensor row_sum_cuda(const Tensor& x, bool mean) {
    const Call call(x);
    Tensor y = call.empty({x.size(0)}, x.scalar_type());
    row_sum(call.read(x), dtype_of(x, "sum", "x"), call.write(y), x.size(0), x.size(1), mean, call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("softmax", TORCH_BOX(&softmax_cuda));
    m.impl("row_sum", TORCH_BOX(&row_sum_cuda));
}

}  // namespace rk
