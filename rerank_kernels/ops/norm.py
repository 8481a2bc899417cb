"""layer_norm: y = (s - mean) / sqrt(var + eps) * weight + bias with s = x + residual, over the last dimension.

x [..., D] -> y [..., D]. mean and var by `row_sum` (NUMERICS.md), in float32, s never rounded to half in between.
"""

from __future__ import annotations

from torch import Tensor

from rerank_kernels import backend
from rerank_kernels.ops import check
from rerank_kernels.ops.compiled import opaque


@opaque(
    "(Tensor x, Tensor weight, Tensor? bias=None, float eps=1e-05, *, Tensor? residual=None) -> Tensor",
    lambda x, *_, **__: x.new_empty(x.shape),
)
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor:
    """Layer normalisation over the last dimension (Ba, Kiros, Hinton, 2016), optionally of x + residual.

    x, residual: [..., D]; weight, bias: [D]; float32, float16 or bfloat16. Returns [..., D] in x.dtype.
    The variance is the mean of squared differences (two passes), so a large mean costs no digits.
    """
    check.floating("layer_norm", x=x, weight=weight, bias=bias, residual=residual)
    if x.dim() < 1 or x.shape[-1] == 0:
        check.fail("layer_norm", "x", "[..., D] with D > 0", check.shape_of(x))
    d = x.shape[-1]
    check.shape("layer_norm", "weight", weight, d)
    if bias is not None:
        check.shape("layer_norm", "bias", bias, d)
    if not eps >= 0.0:
        check.fail("layer_norm", "eps", "a number >= 0", eps)
    rows = x.contiguous() if x.dim() == 2 else x.reshape(-1, d).contiguous()
    if residual is not None:
        check.shape("layer_norm", "residual", residual, *x.shape)
        residual = residual.reshape(-1, d).contiguous()
    y = backend.select("layer_norm", x.device)(rows, weight.contiguous(), bias, float(eps), residual)
    return y if x.dim() == 2 else y.view(x.shape)


def layer_norm_truth(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor:
    s = x.double() if residual is None else x.double() + residual.double()
    c = s - s.mean(-1, keepdim=True)
    y = c / (c.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()
