"""layer_norm: y = (s - mean) / sqrt(var + eps) * weight + bias with s = x + residual, over the last dimension.
rms_norm: y = s / sqrt(mean(s²) + eps) * weight. normalize: y = x / max(|x|, eps), likewise.

x [..., D] -> y [..., D]. Means and sums of squares by `row_sum` (NUMERICS.md), in float32; s is never rounded to
half in between.
"""

from __future__ import annotations

from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import registry
from rerank_kernels.ops.opaque import opaque


@opaque(lambda x, *_, **__: x.new_empty(x.shape))
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor:
    """Layer normalisation over the last dimension (Ba, Kiros, Hinton, 2016), optionally of x + residual.

    x, residual: [..., D]; weight, bias: [D]; float32, float16 or bfloat16. Returns [..., D] in x.dtype.
    The variance is the mean of squared differences (two passes), so a large mean costs no digits.
    """
    rows, residual = _rows("layer_norm", x, weight, eps, residual, bias=bias)
    bias = None if bias is None else bias.contiguous()
    y = registry.select("layer_norm", x.device)(rows, weight.contiguous(), bias, float(eps), residual)
    return y if x.dim() == 2 else y.view(x.shape)


def _rows(
    op: str, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, **weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x and residual as [R, D], when all is as it must be; weights: others than `weight`, of its shape."""
    check.floating(op, x=x, weight=weight, **weights, residual=residual)
    if x.dim() < 1 or x.shape[-1] == 0:
        check.fail(op, "x", "[..., D] with D > 0", check.shape_of(x))
    d = x.shape[-1]
    for name, t in (("weight", weight), *weights.items()):
        if t is not None:
            check.shape(op, name, t, d)
    if not eps >= 0.0:
        check.fail(op, "eps", "a number >= 0", eps)
    if residual is not None:
        check.shape(op, "residual", residual, *x.shape)
        residual = residual.reshape(-1, d).contiguous()
    return x.contiguous() if x.dim() == 2 else x.reshape(-1, d).contiguous(), residual


def layer_norm_truth(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor:
    s = x.double() if residual is None else x.double() + residual.double()
    c = s - s.mean(-1, keepdim=True)
    y = c / (c.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


@opaque(lambda x, *_, **__: x.new_empty(x.shape))
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: int = 0,
    cast: str = "before",
    residual: Tensor | None = None,
) -> Tensor:
    """Root mean square normalisation over the last dimension (Zhang and Sennrich, 2019), optionally of s = x + residual.

    x, residual: [..., D]; weight: [D]; float32, float16 or bfloat16. Returns [..., D] in x.dtype.
    y = s / sqrt(mean(s²) + eps) · (weight + offset). offset: 0, or 1 where the weights are stored as what they differ from 1.
    cast: "before": s / sqrt(...) is rounded to x.dtype before the product with the weight; "after": only the product is. The
    two are one in float32. As in transformers LlamaRMSNorm is offset=0, cast="before", and GemmaRMSNorm offset=1, cast="after".
    """
    rows, residual = _rows("rms_norm", x, weight, eps, residual)
    check.choice("rms_norm", "offset", offset, (0, 1))
    check.choice("rms_norm", "cast", cast, ("before", "after"))
    serve = registry.select("rms_norm", x.device)
    y = serve(rows, weight.contiguous(), float(eps), offset == 1, cast == "before", residual)
    return y if x.dim() == 2 else y.view(x.shape)


def rms_norm_truth(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    offset: int = 0,
    cast: str = "before",
    residual: Tensor | None = None,
) -> Tensor:
    """Unrounded, whatever `cast` says."""
    s = x.double() if residual is None else x.double() + residual.double()
    return s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@opaque(lambda x, *_, **__: x.new_empty(x.shape))
def normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Vectors of length 1: x divided by its Euclidean length over the last dimension, or by eps where that is larger.

    x: [..., D]; float32, float16 or bfloat16. Returns [..., D] in x.dtype. Where squares leave float32's range (elements above
    1.8e19 or all below 1e-23) the length is inf or 0, as in torch.nn.functional.normalize.
    """
    check.floating("normalize", x=x)
    if x.dim() < 1 or x.shape[-1] == 0:
        check.fail("normalize", "x", "[..., D] with D > 0", check.shape_of(x))
    if not eps >= 0.0:
        check.fail("normalize", "eps", "a number >= 0", eps)
    rows = x.contiguous() if x.dim() == 2 else x.reshape(-1, x.shape[-1]).contiguous()
    y = registry.select("normalize", x.device)(rows, float(eps))
    return y if x.dim() == 2 else y.view(x.shape)


def normalize_truth(x: Tensor, eps: float = 1e-12) -> Tensor:
    wide = x.double()
    return wide / wide.square().sum(-1, keepdim=True).sqrt().clamp_min(eps)
