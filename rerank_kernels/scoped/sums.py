"""Reductions: `row_sum` over the named dimensions (NUMERICS.md), and what is made of it.

Integers and bool are summed by PyTorch: exact in any order. Half precision is float32 inside, with one rounding at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rerank_kernels.ops import softmax as own
from rerank_kernels.scoped.elementwise import exp, log, root
from rerank_kernels.scoped.refusal import Refusal, floats, whole

Dims = Sequence[int] | int | None


def sum_(self: Tensor, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    if dtype is not None and not whole(dtype):
        self = self.to(dtype)
    if whole(self.dtype):
        return torch.sum(self, _dims(self, dim), keepdim=keepdim, dtype=dtype)
    floats(self=self)
    return own.sum(self, _dims(self, dim), keepdim) if self.dim() else self.clone()


def mean(self: Tensor, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    self = self if dtype is None else self.to(dtype)
    floats(self=self)
    return own.mean(self, _dims(self, dim), keepdim) if self.dim() else self.clone()


def var(self: Tensor, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _moments(self, dim, correction, keepdim)[0].to(self.dtype)


def std(self: Tensor, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return root(_moments(self, dim, correction, keepdim)[0]).to(self.dtype)


def var_mean(self: Tensor, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    variance, average = _moments(self, dim, correction, keepdim)
    return variance.to(self.dtype), average.to(self.dtype)


def std_mean(self: Tensor, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    variance, average = _moments(self, dim, correction, keepdim)
    return root(variance).to(self.dtype), average.to(self.dtype)


def _moments(x: Tensor, dim: Dims, correction: float | None, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Two passes, in float32: row_sum((x - mean)²) / max(n - correction, 0), each square rounded; and the mean."""
    floats(self=x)
    dims = _dims(x, dim)
    wide = x.float()
    if not dims:
        raise Refusal("a variance of one number")
    average = own.mean(wide, dims, True)
    apart = wide - average
    count = math.prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    variance = own.sum(apart * apart, dims, keepdim) / max(count, 0)
    return variance, average if keepdim else average.reshape(variance.shape)


def vector_norm(
    self: Tensor,
    ord: float = 2,  # noqa: A002  PyTorch's name
    dim: Dims = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    self = self if dtype is None else self.to(dtype)
    floats(self=self)
    dims = _dims(self, dim)
    wide = self.float()
    if not dims:
        return self.abs()
    if ord == 2:
        return root(own.sum(wide * wide, dims, keepdim)).to(self.dtype)
    if ord == 1:
        return own.sum(wide.abs(), dims, keepdim).to(self.dtype)
    if ord in (math.inf, -math.inf):
        return self.abs().amax(dims, keepdim) if ord > 0 else self.abs().amin(dims, keepdim)
    raise Refusal(f"ord is {ord}, and 1, 2, inf and -inf are served")


def amax(self: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    """The maximum, with -0 made +0: which of two zeros is taken is PyTorch's to say."""
    y = self.amax(_dims(self, dim), keepdim)
    return y + 0.0 if y.is_floating_point() else y


def amin(self: Tensor, dim: Dims = None, keepdim: bool = False) -> Tensor:
    y = self.amin(_dims(self, dim), keepdim)
    return y + 0.0 if y.is_floating_point() else y


def norm(self: Tensor, p: float | None = None, dim: Dims = None, keepdim: bool = False) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


def softmax(self: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    floats(self=self)
    x = self.float() if half_to_float else self
    return own.softmax(x, dim) if x.dim() else torch.softmax(x, dim)


def safe_softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A row of -inf alone gives 0."""
    x = self if dtype is None else self.to(dtype)
    return softmax(x, dim).masked_fill((x == -math.inf).all(dim, keepdim=True), 0.0)


def log_softmax(self: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """(x - max) - log(row_sum(exp(x - max))), in float32."""
    floats(self=self)
    if not self.dim():
        return torch.log_softmax(self, dim)
    apart = self.float() - self.float().amax(dim, keepdim=True)
    y = apart - log(own.sum(exp(apart), dim, True))
    return y if half_to_float else y.to(self.dtype)


def logsumexp(self: Tensor, dim: Dims, keepdim: bool = False) -> Tensor:
    floats(self=self)
    dims = _dims(self, dim)
    if not dims:
        return self.clone()
    wide = self.float()
    most = wide.amax(dims, keepdim=True)
    shift = most.masked_fill(most.abs() == math.inf, 0.0)
    y = log(own.sum(exp(wide - shift), dims, True)) + shift
    return (y if keepdim else y.reshape(own.sum(wide, dims).shape)).to(self.dtype)


def cumsum(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """One chain along dim, ascending, in float32; each place is rounded when it is stored."""
    self = self if dtype is None else self.to(dtype)
    if whole(self.dtype):
        return torch.cumsum(self, dim)
    floats(self=self)
    if not self.dim():
        return self.clone()
    places = list(self.float().unbind(dim))
    for i in range(1, len(places)):
        places[i] = places[i - 1] + places[i]
    return torch.stack(places, dim).to(self.dtype)


def prod(self: Tensor, dim: int | None = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    if not whole(dtype or self.dtype):
        raise Refusal("a product of many floating-point numbers has no route yet")
    return torch.prod(self, dtype=dtype) if dim is None else torch.prod(self, dim, keepdim, dtype=dtype)


def _dims(x: Tensor, dim: Dims) -> tuple[int, ...]:
    if dim is None or (not isinstance(dim, int) and not len(dim)):
        return tuple(range(x.dim()))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return tuple(d % x.dim() for d in dims) if x.dim() else ()


ROUTES = {
    "sum": sum_,
    "sum.dim_IntList": sum_,
    "mean": mean,
    "mean.dim": mean,
    "var.correction": var,
    "std.correction": std,
    "var_mean.correction": var_mean,
    "std_mean.correction": std_mean,
    "linalg_vector_norm": vector_norm,
    "norm.Scalar": norm,
    "norm.ScalarOpt_dim": norm,
    "amax": amax,
    "amin": amin,
    "_softmax": softmax,
    "_safe_softmax": safe_softmax,
    "_log_softmax": log_softmax,
    "logsumexp": logsumexp,
    "cumsum": cumsum,
    "prod": prod,
    "prod.dim_int": prod,
}
