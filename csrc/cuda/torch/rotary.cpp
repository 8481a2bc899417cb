// rotary.cpp: rotary position embedding of CUDA tensors.

#include "launch.h"

namespace rk {

void rotary(const RotaryArgs& args, int64_t tokens, Stream stream);  // portable/rotary.cu

static Tensor rotary_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
    const OpCall call(x);
    const int64_t tokens = x.size(0), H = x.size(1), D = x.size(2), P = cos.size(1);
    RK_CHECK(cos.size(0) == tokens && sin.size(0) == tokens && sin.size(1) == P && 2 * P <= D, "rotary",
             "cos and sin must have a row per token of x, and 2 P <= D");
    Tensor y = call.empty({tokens, H, D}, x.scalar_type());
    const RotaryArgs args{.x = ref(call, x, "rotary", "x"),
                          .x_token = x.stride(0),
                          .x_head = x.stride(1),
                          .cos = ref(call, cos, "rotary", "cos"),
                          .sin = ref(call, sin, "rotary", "sin"),
                          .y = call.write(y),
                          .H = H,
                          .D = D,
                          .P = P,
                          .interleaved = interleaved};
    rotary(args, tokens, call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) { m.impl("rotary", TORCH_BOX(&rotary_cuda)); }

}  // namespace rk
