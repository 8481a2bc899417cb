"""sparse_ffn: down(relu(up(x))) or down(relu(gate(x)) * up(x)) for rows [M, K], hidden activations in float32.

Computed dense: a neuron whose relu is 0 adds 0 * w, which changes no bit of the sum for finite w. So this *is* the result that
a sparse kernel in the same order gives. The BLAS cannot skip neurons token by token without an order that depends on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels.backend.pytorch.linear import linear
from rerank_kernels.backend.weights import FfnWeights


def sparse_ffn(rows: Tensor, w: FfnWeights) -> Tensor:
    hidden = torch.relu(linear(rows, *w.first, None, None, torch.float32))
    if w.gate is not None:
        up = linear(rows, w.up, w.up_bias, None, None, torch.float32)
        # a neuron whose gate is shut is skipped even where up overflowed: 0 * inf would be NaN
        hidden = torch.where(hidden == 0, torch.zeros_like(hidden), hidden * up)
    return linear(hidden, w.down, w.down_bias, None, None, rows.dtype)
