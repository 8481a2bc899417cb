"""softmax, sum and mean: reductions over dimensions of a tensor, each row in the 32-lane order `row_sum` (NUMERICS.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels import backend
from rerank_kernels.ops import check


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x - max) / sum(exp(x - max)) over `dim`; x of any shape, result of the same shape and dtype.

    A row that is all -inf or holds NaN gives NaN, as in torch.softmax.
    """
    check.floating("softmax", x=x)
    (dim,) = _dims("softmax", x, dim)
    last = x.movedim(dim, -1)
    rows = last.reshape(-1, last.shape[-1]).contiguous()
    y = backend.select("softmax", x.device)(rows)
    return y.view(last.shape).movedim(-1, dim)


def sum(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:  # noqa: A001  torch's name
    """Sum over one dimension or several (flattened in ascending order of dimension); float32 inside, x.dtype out."""
    return _reduce("sum", x, dim, keepdim)


def mean(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """`sum` divided by the count with IEEE division, rounded once to x.dtype."""
    return _reduce("mean", x, dim, keepdim)


def _dims(op: str, x: Tensor, dim: int | tuple[int, ...]) -> tuple[int, ...]:
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if x.dim() == 0 or not dims or any(not -x.dim() <= d < x.dim() for d in dims):
        check.fail(op, "dim", f"in [{-x.dim()}, {x.dim() - 1}] for x {check.shape_of(x)}", dim)
    dims = tuple(sorted(d % x.dim() for d in dims))
    if len(set(dims)) != len(dims):
        check.fail(op, "dim", "distinct dimensions", dim)
    for d in dims:
        if x.shape[d] == 0:
            check.fail(op, "x", f"non-empty along dim {d}", check.shape_of(x))
    return dims


def _reduce(op: str, x: Tensor, dim: int | tuple[int, ...], keepdim: bool) -> Tensor:
    check.floating(op, x=x)
    dims = _dims(op, x, dim)
    kept = [d for d in range(x.dim()) if d not in dims]
    count = 1
    for d in dims:
        count *= x.shape[d]
    rows = x.permute(*kept, *dims).reshape(-1, count).contiguous()
    y = backend.select(op, x.device)(rows)
    shape = [1 if d in dims else x.shape[d] for d in range(x.dim())] if keepdim else [x.shape[d] for d in kept]
    return y.view(shape)


def softmax_truth(x: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(x.double(), dim)


def sum_truth(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    return torch.sum(x.double(), dim, keepdim)


def mean_truth(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    return torch.mean(x.double(), dim, keepdim)
