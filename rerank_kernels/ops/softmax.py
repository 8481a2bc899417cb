"""softmax, sum and mean: reductions over dimensions of a tensor, each row in the 32-lane order `row_sum` (NUMERICS.md)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import registry
from rerank_kernels.ops.opaque import opaque


def _softmax_result(x: Tensor, dim: int = -1) -> Tensor:
    (dim,) = _dims("softmax", x, dim)
    return x.new_empty(x.movedim(dim, -1).shape).movedim(-1, dim)


def _reduced(op: str) -> Callable[..., Tensor]:
    def result(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
        return x.new_empty(_reduced_shape(x, _dims(op, x, dim), keepdim))

    return result


def _dims_as_list(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> tuple[Tensor, list[int], bool]:
    return x, list(check.integers("sum, mean", "dim", dim)), keepdim


@opaque(_softmax_result)
def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x - max) / sum(exp(x - max)) over `dim`; x of any shape, result of the same shape and dtype.

    A row that is all -inf or holds NaN gives NaN, as in torch.softmax.
    """
    check.floating("softmax", x=x)
    (dim,) = _dims("softmax", x, dim)
    last = x.movedim(dim, -1)
    rows = last.reshape(-1, last.shape[-1]).contiguous()
    y = registry.select("softmax", x.device)(rows)
    return y.view(last.shape).movedim(-1, dim)


@opaque(_reduced("sum"), schema="(Tensor x, int[] dim, bool keepdim=False) -> Tensor", arguments=_dims_as_list)
def sum(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:  # noqa: A001  torch's name
    """Sum over one dimension or several (flattened in ascending order of dimension); float32 inside, x.dtype out."""
    return _reduce("sum", x, dim, keepdim)


@opaque(_reduced("mean"), schema="(Tensor x, int[] dim, bool keepdim=False) -> Tensor", arguments=_dims_as_list)
def mean(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """`sum` divided by the count with IEEE division, rounded once to x.dtype."""
    return _reduce("mean", x, dim, keepdim)


def _dims(op: str, x: Tensor, dim: int | tuple[int, ...]) -> tuple[int, ...]:
    dims = check.integers(op, "dim", dim)
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
    y = registry.select(op, x.device)(rows)
    return y.view(_reduced_shape(x, dims, keepdim))


def _reduced_shape(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> list[int]:
    return [1 if d in dims else x.shape[d] for d in range(x.dim()) if keepdim or d not in dims]


def softmax_truth(x: Tensor, dim: int = -1) -> Tensor:
    return torch.softmax(x.double(), dim)


def sum_truth(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    return torch.sum(x.double(), dim, keepdim)


def mean_truth(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    return torch.mean(x.double(), dim, keepdim)
