"""sparse_ffn: down(act(up(x))) or down(act(gate(x)) * up(x)) for rows [M, K], hidden activations in float32.

Computed dense: an inactive neuron adds 0 * w, which changes no bit of the sum for finite w. So this *is* the result that
a sparse kernel in the same order gives. The BLAS cannot skip neurons token by token without an order that depends on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels.backend.firing import Firing, fired, gated, tell
from rerank_kernels.backend.pytorch.linear import linear
from rerank_kernels.backend.weights import FfnWeights


def sparse_ffn(rows: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    hidden = fired(linear(rows, *w.first, None, None, torch.float32), how)
    tell(hidden)
    if w.gate is not None:
        hidden = gated(hidden, linear(rows, w.up, w.up_bias, None, None, torch.float32), how)
    return linear(hidden, w.down, w.down_bias, None, how.residual, rows.dtype)
