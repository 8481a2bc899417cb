// attention.cpp: packed attention on CUDA tensors.

#include "../../attention.h"
#include "launch.h"

namespace rk {

template <auto launcher>
static Tensor attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                             const std::optional<Tensor>& cu_seqlens_k, int64_t left, int64_t right, double scale,
                             double softcap) {
    const OpCall call(q);
    const CallArguments in(call, "attention", q);
    const CheckedAttention given = checked_attention(in, q, k, v, left, right, scale, softcap);
    const View offsets = in.offsets("cu_seqlens", cu_seqlens);
    const CheckedKeys keys = checked_keys(in, cu_seqlens_k, offsets);
    RK_CHECK(cu_seqlens_k || given.total_k == given.total, "attention",
             "k and v must have as many tokens as q, or offsets of their own");
    AttentionArgs args = given.args;
    Tensor out = call.empty({given.total, args.H, args.D}, given.dtype);
    args.out = call.write(out);
    const PackedArgs packed{.cu_seqlens = offsets.as<int32_t>(),
                            .keys_begin = keys.begins,
                            .keys_end = keys.ends,
                            .B = keys.B,
                            .total = given.total,
                            .total_k = given.total_k,
                            .most_keys = keys.anywhere ? ceil_div(given.total_k, args.H_kv) : given.total_k};
    launcher(args, packed, call.stream());
    return out;
}

static void run_tensor(const AttentionArgs& args, const PackedArgs& packed, Stream stream) {
    const bool ask = hopper.attention_tensor && !Choice::is_forced("attention_tensor");
    if (ask && hopper.attention_tensor(args, packed, stream)) return;
    attention_tensor(args, packed, stream);
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("attention", TORCH_BOX(&attention_cuda<attention>));
    m.impl("attention_tensor", TORCH_BOX(&attention_cuda<run_tensor>));
}

}  // namespace rk
