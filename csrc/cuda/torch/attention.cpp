// attention.cpp: packed attention on CUDA tensors.

#include "launch.h"

namespace rk {

template <auto launcher>
static Tensor attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                             const std::optional<Tensor>& cu_seqlens_k, int64_t left, int64_t right, double scale) {
    const OpCall call(q);
    const int64_t total = q.size(0), H = q.size(1), D = q.size(2);
    RK_CHECK(v.size(0) == k.size(0) && (cu_seqlens_k || k.size(0) == total), "attention",
             "k and v must have as many tokens as each other, and without cu_seqlens_k as many as q");
    RK_CHECK(!cu_seqlens_k || cu_seqlens_k->size(0) == cu_seqlens.size(0), "attention",
             "cu_seqlens_k must have as many sequences as cu_seqlens");
    Tensor out = call.empty({total, H, D}, q.scalar_type());
    const int32_t* cu = offsets(call, cu_seqlens, "attention");
    const PackedArgs packed{.cu_seqlens = cu,
                            .cu_seqlens_k = cu_seqlens_k ? offsets(call, *cu_seqlens_k, "attention") : cu,
                            .B = cu_seqlens.size(0) - 1,
                            .total = total,
                            .total_k = k.size(0)};
    const AttentionArgs args{.q = call.read(q),
                             .k = call.read(k),
                             .v = call.read(v),
                             .q_token = q.stride(0),
                             .q_head = q.stride(1),
                             .k_token = k.stride(0),
                             .k_head = k.stride(1),
                             .v_token = v.stride(0),
                             .v_head = v.stride(1),
                             .dtype = dtype_of(q, "attention", "q"),
                             .out = call.write(out),
                             .H = H,
                             .H_kv = k.size(1),
                             .D = D,
                             .left = left,
                             .right = right,
                             .scale = float(scale)};
    launcher(args, packed, call.stream());
    return out;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("attention", TORCH_BOX(&attention_cuda<attention>));
    m.impl("attention_tensor", TORCH_BOX(&attention_cuda<attention_tensor>));
}

}  // namespace rk
