// attention.cpp: packed attention on CUDA tensors.

#include "../../attention.h"
#include "launch.h"

namespace rk {

static void run(const AttentionArgs& args, const PackedArgs& packed, const OpCall& call) {
    attention(args, packed, call.stream());
}

static void run_tensor(const AttentionArgs& args, const PackedArgs& packed, const OpCall& call) {
    const bool ask = hopper.attention_tensor && asked("attention_hopper_tensor", "attention_tensor", call.device());
    if (ask && hopper.attention_tensor(args, packed, call.stream())) return;
    attention_tensor(args, packed, call.stream());
}

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
    launcher(args, packed, call);
    return out;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) {
    m.impl("attention", TORCH_BOX(&attention_cuda<run>));
    m.impl("attention_tensor", TORCH_BOX(&attention_cuda<run_tensor>));
}

}  // namespace rk
