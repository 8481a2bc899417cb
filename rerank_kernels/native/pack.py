"""Weights laid out for the kernels, made once per weight and kept as long as the weight lives.

A weight is recognised by its identity, memory and version: an optimiser step, load_state_dict, .half() or .to() lead to a new
layout at the next call. A write through `weight.data` is invisible to PyTorch's version counter; call `forget(weight)` then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Kept:
    # Holding the memory that was packed keeps its address from being given to another tensor, so equal addresses mean
    # equal memory.
    source: Tensor
    version: int
    packed: Tensor


_kept: dict[str, WeakTensorKeyDictionary] = {}


def packed(weight: Tensor) -> Tensor:
    """[N, K] -> [ceil(N / 32), K, 32], in the weight's own dtype."""
    return _cached("packed", weight, lambda w: torch.ops.rerank_kernels.pack_weight(w))


def transposed(weight: Tensor) -> Tensor:
    """nn.Linear's [D, F] -> [F, D] contiguous; refuses weights that are not finite, since sparse_ffn skips terms."""
    return _cached("transposed", weight, lambda w: torch.ops.rerank_kernels.transpose_weight(finite(w)))


def packed_finite(weight: Tensor) -> Tensor:
    """`packed`, refusing weights that are not finite."""
    return _cached("packed_finite", weight, lambda w: torch.ops.rerank_kernels.pack_weight(finite(w)))


def contiguous(weight: Tensor) -> Tensor:
    return weight if weight.is_contiguous() else _cached("contiguous", weight, lambda w: w.contiguous())


def finite(weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "sparse_ffn: weights must be finite: terms with a zero activation are skipped, and 0 * inf would be NaN"
        )
    return weight


def forget(weight: Tensor) -> None:
    """Drop what is kept of a weight (after a write that PyTorch's version counter does not see)."""
    for table in _kept.values():
        table.pop(weight, None)


def _cached(kind: str, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    table = _kept.setdefault(kind, WeakTensorKeyDictionary())
    # An inference tensor has no version; it cannot be changed in place outside inference mode either.
    version = -1 if weight.is_inference() else weight._version
    kept = table.get(weight)
    if kept is not None and kept.version == version and _same_memory(kept.source, weight):
        return kept.packed
    source = weight.detach()
    kept = _Kept(source, version, make(source))
    table[weight] = kept
    return kept.packed


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
