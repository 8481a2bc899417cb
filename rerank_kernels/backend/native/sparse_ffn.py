"""sparse_ffn by the library: few rows skip what is inactive; many rows take the dense way, whose bits are the same.

Mode "tensor" is another product for what decides which neurons are active, whatever the way; all after it is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rerank_kernels.backend.firing import Firing, fired, gated, tell, tell_counts
from rerank_kernels.backend.native.linear import linear, linear_tensor
from rerank_kernels.backend.weights import FfnWeights, check_finite, contiguous, screen, transposed

# From here on a row's share of reading all weights costs less than its own pass over the active ones. Only time depends on it.
DENSE_ROWS = 8


def sparse_ffn(x: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    if x.shape[0] >= DENSE_ROWS:
        return _dense(linear, x, w, how)
    # the CPU first reads float32 weights in 8 bits each, which show most inactive neurons (csrc/cpu/sparse_ffn.cpp)
    copies = (None if how.candidates is not None else screen(w.first[0])) or (None, None, None)
    y, counts = torch.ops.rerank_kernels.sparse_ffn(x, *_first(w), *copies, *_up_and_down(w), *how.native)
    tell_counts(counts)
    return y


def sparse_ffn_tensor(x: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    if x.shape[0] >= DENSE_ROWS:
        return _dense(linear_tensor, x, w, how)
    return torch.ops.rerank_kernels.sparse_ffn_tensor(x, *_first(w), *_up_and_down(w), *how.native)


def _first(w: FfnWeights) -> tuple[Tensor, Tensor | None]:
    weight, bias = w.first
    return contiguous(weight), bias


def _up_and_down(w: FfnWeights) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    up = (None, None) if w.gate is None else (contiguous(w.up), w.up_bias)
    return *up, transposed(w.down), w.down_bias


def _dense(first: Callable[..., Tensor], x: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    """first: the mode's linear."""
    check_finite(w.down)
    f32 = torch.float32
    hidden = first(x, *w.first, how.activation if how.plain else None, None, f32)
    if not how.plain:
        hidden = fired(hidden, how)
    tell(hidden)
    if w.gate is not None:
        hidden = gated(hidden, linear(x, w.up, w.up_bias, None, None, f32), how)
    return linear(hidden, w.down, w.down_bias, None, how.residual, x.dtype)
