"""Writes by index: exact where no place is written twice, refused where one is; index_add has an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.scoped.refusal import Refusal, floats, whole

_TWICE = "an index stands twice in it, and PyTorch fixes no order of the writes"


def index_put(self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    if accumulate and not whole(self.dtype):
        raise Refusal("accumulate=True adds where indices repeat, in an order of its own")
    numbers = [i for i in indices if i is not None and i.dtype not in (torch.bool, torch.uint8)]
    if numbers and not accumulate and values.numel() != 1:
        if len(numbers) != sum(i is not None for i in indices):
            raise Refusal("its indices are numbers and masks at once; give one kind")
        sizes = [n for n, i in zip(self.shape, indices, strict=False) if i is not None]
        _once(_place(list(torch.broadcast_tensors(*numbers)), sizes))
    return torch.index_put(self, tuple(indices), values, accumulate)


def index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if self.dim():
        _once(index % self.shape[dim])
    return torch.index_copy(self, dim, index, source)


def scatter(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if index.dim():
        places = torch.sort(index, dim).values
        if bool((places.diff(dim=dim) == 0).any()):
            raise Refusal(_TWICE)
    return torch.scatter(self, dim, index, src)


def scatter_value(self: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return torch.scatter(self, dim, index, value)


def _place(indices: list[Tensor], sizes: list[int]) -> Tensor:
    place = torch.zeros_like(indices[0], dtype=torch.int64)
    for index, size in zip(indices, sizes, strict=True):
        place = place * size + index % size
    return place


def _once(places: Tensor) -> None:
    if torch.unique(places).numel() != places.numel():
        raise Refusal(_TWICE)


def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
    """One chain per place: self, then what the index brings there, in its order; float32 inside."""
    floats(self=self, source=source)
    if alpha != 1 or not self.dim() or index.dim() != 1:
        raise Refusal("served is alpha=1 with an index [n]")
    y, terms = self.float().movedim(dim, 0).clone(), source.float().movedim(dim, 0)
    order = torch.sort(index, stable=True).indices
    places = index[order]
    begins = torch.cat([places.new_ones(1, dtype=torch.bool), places[1:] != places[:-1]])
    at = torch.arange(len(places), device=index.device)
    turn = at - torch.cummax(torch.where(begins, at, 0), 0).values  # how often the place stood in the index before
    for i in range(int(turn.max()) + 1):
        now = order[turn == i]
        y[index[now]] = y[index[now]] + terms[now]
    return y.movedim(0, dim).to(self.dtype)


ROUTES = {
    "index_put": index_put,
    "index_copy": index_copy,
    "index_add": index_add,
    "scatter.src": scatter,
    "scatter.value": scatter_value,
}
