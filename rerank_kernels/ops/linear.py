"""linear: y = act(x · weightᵀ + bias) + residual; bmm: a product of each entry of a batch; and the activations alone.

x [..., K], weight [N, K], bias [N], residual [..., N] -> y [..., N]. Arithmetic in float32 as NUMERICS.md, "linear".
Each y[m, n] is one expression of row x[m] and row weight[n]: no other row, no M, no thread count is in it.
bmm: a [B, M, K], b [B, K, N] -> y [B, M, N]. y[i, m, n] is one expression of row a[i, m] and column b[i, :, n].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import modes, registry
from rerank_kernels.ops.opaque import opaque

ACTIVATIONS = ("gelu", "gelu_tanh", "tanh", "relu", "silu", "sigmoid", "quick_gelu", "relu2", "leaky_relu", "mish")
_NONE_OR = (None, *ACTIVATIONS)


def _linear_result(x: Tensor, weight: Tensor, *_: Any, out_dtype: torch.dtype | None = None, **__: Any) -> Tensor:
    check.shape("linear", "weight", weight, "N", "K")
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype or x.dtype)


@opaque(_linear_result)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    mode: str | None = None,
) -> Tensor:
    """y = act(x · weightᵀ + bias) + residual, rounded once.

    x: [..., K], weight: [N, K] as in nn.Linear, bias: [N], residual: [..., N]; float32, float16 or bfloat16 in any mix.
    activation: None, "gelu" (erf), "gelu_tanh", "tanh", "relu", "silu", "sigmoid", "quick_gelu", "relu2", "leaky_relu"
    (slope 0.01) or "mish".
    out_dtype: dtype of the result, x.dtype if not given. Returns [..., N].

    mode: "portable" (default): the sum over K is cut in chunks of 512, k ascending, one fma per step (NUMERICS.md, "dot");
    "tensor", for float16 or bfloat16 x and weight on a GPU: tensor cores, float32 accumulation, k ascending 16 at a time.

    M = 1 and N = 1 take the same expression as every other size. Raises ValueError for shapes, TypeError for dtypes,
    BackendError if no backend serves.
    """
    check.floating("linear", x=x, weight=weight, bias=bias, residual=residual)
    if x.dim() < 1:
        check.fail("linear", "x", "[..., K]", "a scalar")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:  # a look that costs little comes first
        check.shape("linear", "weight", weight, "N", x.shape[-1])
    n, k = weight.shape
    if k == 0 or n == 0:
        check.fail("linear", "weight", "[N, K] with N, K > 0", check.shape_of(weight))
    if bias is not None:
        check.shape("linear", "bias", bias, n)
    check.choice("linear", "activation", activation, _NONE_OR)
    out_dtype = out_dtype or x.dtype
    check.choice("linear", "out_dtype", out_dtype, check.FLOATS)
    rows = x.contiguous() if x.dim() == 2 else x.reshape(-1, k).contiguous()
    if residual is not None:
        if residual.shape != (*x.shape[:-1], n):
            check.shape("linear", "residual", residual, *x.shape[:-1], n)
        residual = residual.reshape(-1, n).contiguous()
    numeric = modes.resolve("linear", mode, x=x, weight=weight)
    y = registry.select("linear", x.device, numeric)(rows, weight, bias, activation, residual, out_dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _bmm_result(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, mode: str | None = None) -> Tensor:
    check.shape("bmm", "a", a, "B", "M", "K")
    check.shape("bmm", "b", b, "B", "K", "N")
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=out_dtype or a.dtype)


@opaque(_bmm_result)
def bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, mode: str | None = None) -> Tensor:
    """y[i] = a[i] · b[i] for every entry i of a batch, rounded once.

    a: [B, M, K], b: [B, K, N]; float32, float16 or bfloat16, in any mix. Returns [B, M, N] in out_dtype (a.dtype).
    mode: as in linear; "tensor" wants a and b in one half-precision dtype, on a GPU. Each sum over K is linear's, so
    bmm(a, b)[i] has the bits of linear(a[i], b[i].T). Kernels read b as [B, N, K]: a transposed view of that costs no copy.
    """
    check.floating("bmm", a=a, b=b)
    check.shape("bmm", "a", a, "B", "M", "K")
    check.shape("bmm", "b", b, a.shape[0], a.shape[2], "N")
    if a.shape[2] == 0 or b.shape[2] == 0:
        check.fail("bmm", "b", "[B, K, N] with K, N > 0", check.shape_of(b))
    out_dtype = out_dtype or a.dtype
    check.choice("bmm", "out_dtype", out_dtype, check.FLOATS)
    numeric = modes.resolve("bmm", mode, a=a, b=b)
    return registry.select("bmm", a.device, numeric)(a.contiguous(), b.transpose(1, 2).contiguous(), out_dtype)


@opaque(lambda x, *_, **__: x.new_empty(x.shape))
def activation(x: Tensor, kind: str, *, up: Tensor | None = None) -> Tensor:
    """act(x), or act(x) · up, element by element; x of any shape, result of the same shape and dtype.

    up: of x's shape, any of the three dtypes: the other factor of a gated feed-forward layer, whose gate x is (Shazeer, 2020).
    The product is float32, with one rounding at the store.

    gelu: x Φ(x) with Φ from erf; gelu_tanh: x (1 + tanh(√(2/π)(x + 0.044715 x³))) / 2 (Hendrycks and Gimpel, 2016);
    silu: x σ(x). Error bounds in ulp: NUMERICS.md, "elementwise".
    """
    check.floating("activation", x=x, up=up)
    check.choice("activation", "kind", kind, ACTIVATIONS)
    if up is not None:
        check.shape("activation", "up", up, *x.shape)
        up = up.contiguous()
    return registry.select("activation", x.device)(x.contiguous(), kind, up)


def activation_truth(x: Tensor, kind: str | None, *, up: Tensor | None = None) -> Tensor:
    """float64 in, float64 out."""
    if up is not None:
        return activation_truth(x, kind) * up
    if kind is None:
        return x
    if kind == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2.0))
    if kind == "gelu_tanh":
        # (1 + tanh u) / 2 = σ(2u), which keeps its digits where 1 + tanh u cancels
        return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
    if kind in ("silu", "quick_gelu"):
        return x * torch.sigmoid(x if kind == "silu" else 1.702 * x)
    if kind == "relu2":
        return torch.relu(x) ** 2
    if kind == "leaky_relu":
        return torch.where(x < 0, 0.01 * x, x)
    if kind == "mish":
        return x * torch.tanh(torch.log1p(torch.exp(x)))
    return {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}[kind](x)


def linear_truth(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """The same formula in float64 on the given (already rounded) inputs."""
    y = x.double() @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    y = activation_truth(y, activation)
    return y if residual is None else y + residual.double()


def bmm_truth(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.double(), b.double())
