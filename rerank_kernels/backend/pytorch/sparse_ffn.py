"""sparse_ffn: down(relu(up(x))) or down(relu(gate(x)) * up(x)) for rows [M, K], hidden activations in float32.

Computed dense: a neuron whose relu is 0 adds 0 * w, which changes no bit of the sum for finite w. So this *is* the result that
a sparse kernel in the same order gives. The BLAS cannot skip neurons token by token without an order that depends on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels.backend.pytorch.linear import linear


def sparse_ffn(
    rows: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    up = linear(rows, up_weight, up_bias, None, None, torch.float32)
    if gate_weight is None:
        hidden = torch.relu(up)
    else:
        gate = torch.relu(linear(rows, gate_weight, gate_bias, None, None, torch.float32))
        # a neuron whose gate is shut is skipped even where up overflowed: 0 * inf would be NaN
        hidden = torch.where(gate == 0, torch.zeros_like(gate), gate * up)
    return linear(hidden, down_weight, down_bias, None, None, rows.dtype)
