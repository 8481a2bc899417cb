// rotary.cpp: rotary position embedding of CUDA tensors.

#include "../../rotary.h"
#include "launch.h"

namespace rk {

void rotary(const RotaryArgs& args, int64_t tokens, Stream stream);  // portable/rotary.cu

static Tensor rotary_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved) {
    const OpCall call(x);
    const CheckedRotary given = checked_rotary(CallArguments(call, "rotary", x), x, cos, sin, interleaved);
    RotaryArgs args = given.args;
    Tensor y = call.empty({given.tokens, args.H, args.D}, given.dtype);
    args.y = call.write(y);
    if (!given.empty) rotary(args, given.tokens, call.stream());
    return y;
}

RK_TORCH_LIBRARY_IMPL(RK_KEY, m) { m.impl("rotary", TORCH_BOX(&rotary_cuda)); }

}  // namespace rk
