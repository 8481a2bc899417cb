"""What sparse_ffn does between its products: which neurons are active, and with what values; and who is told how many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Firing(NamedTuple):
    """activation: "relu" or "relu2", of what is above threshold; up_relu: up passes relu too, before the product with the gate.

    candidates: bool [M, F], the neurons that are looked at, None for all. residual: [M, D], added before the one rounding.
    """

    activation: str
    threshold: float
    up_relu: bool
    candidates: Tensor | None
    residual: Tensor | None

    @property
    def plain(self) -> bool:
        """Whether `activation` of ops.linear alone says who is active."""
        return self.threshold == 0.0 and self.candidates is None

    @property
    def native(self) -> tuple[Tensor | None, Tensor | None, float, bool, bool]:
        """As the library's ops take them."""
        return self.residual, self.candidates, self.threshold, self.activation == "relu2", self.up_relu


def fired(first: Tensor, how: Firing) -> Tensor:
    """float32 pre-activations [M, F] to activations; a NaN stays one."""
    off = first <= how.threshold
    if how.candidates is not None:
        off = off | ~how.candidates
    return torch.where(off, torch.zeros_like(first), first * first if how.activation == "relu2" else first)


def gated(hidden: Tensor, up: Tensor, how: Firing) -> Tensor:
    """hidden * up, and +0 where a relu is 0, even where the other factor overflowed: 0 * inf would be NaN."""
    off = hidden == 0
    if how.up_relu:
        off = off | (up <= 0)
    return torch.where(off, torch.zeros_like(hidden), hidden * up)


Tally = Callable[[int, int], None]  # active neurons, rows
_tally: ContextVar[Tally | None] = ContextVar("rerank_kernels_tally", default=None)


@contextlib.contextmanager
def counting(tally: Tally) -> Iterator[None]:
    """sparse_ffn inside the block tells `tally` how many neurons of its rows were active. On a CPU alone: elsewhere the
    question would wait for the device."""
    token = _tally.set(tally)
    try:
        yield
    finally:
        _tally.reset(token)


def tell(hidden: Tensor) -> None:
    """Of activations [M, F] before a product with up."""
    if (tally := _tally.get()) is not None and hidden.device.type == "cpu":
        tally(int((hidden != 0).sum()), hidden.shape[0])


def tell_counts(counts: Tensor) -> None:
    """Of the active neurons of each row."""
    if (tally := _tally.get()) is not None and counts.device.type == "cpu":
        tally(sum(counts.tolist()), counts.shape[0])
