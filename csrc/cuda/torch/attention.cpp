// attention.cpp: packed attention on CUDA tensors.

#include "launch.h"

namespace rk {

template <auto launcher>
static Tensor attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t left,
                             int64_t right, double scale) {
    const Call call(q);
    const int64_t total = q.size(0), H = q.size(1), D = q.size(2), B = cu_seqlens.size(0) - 1;
    Tensor out = call.empty({total, H, D}, q.scalar_type());
    const AttentionArgs args{call.read(q),
                             call.read(k),
                             call.read(v),
                             q.stride(0),
                             q.stride(1),
                             k.stride(0),
                             k.stride(1),
                             v.stride(0),
                             v.stride(1),
                             dtype_of(q, "attention", "q"),
                             call.write(out),
                             H,
                             k.size(1),
                             D,
                             left,
                             right,
                             float(scale)};
    launcher(args, offsets(call, cu_seqlens, "attention"), B, total, call.stream());
    return out;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("attention", TORCH_BOX(&attention_cuda<attention>));
    m.impl("attention_tensor", TORCH_BOX(&attention_cuda<attention_tensor>));
}

}  // namespace rk
