"""sparse_ffn by the library: few rows skip what is inactive; many rows take the dense way, whose bits are the same.

Mode "tensor" is another product for what decides which neurons are active, whatever the way; all after it is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rerank_kernels.backend.native.linear import linear, linear_tensor
from rerank_kernels.backend.weights import check_finite, contiguous, screen, transposed

# From here on a row's share of reading all weights costs less than its own pass over the active ones. Only time depends on it.
DENSE_ROWS = 8


def sparse_ffn(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    if x.shape[0] >= DENSE_ROWS:
        return _dense(linear, x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    first, first_bias = (up_weight, up_bias) if gate_weight is None else (gate_weight, gate_bias)
    # the CPU first reads float32 weights in 8 bits each, which show most inactive neurons (csrc/cpu/sparse_ffn.cpp)
    coarse, rest, bounds = screen(first) or (None, None, None)
    return torch.ops.rerank_kernels.sparse_ffn(
        x,
        contiguous(first),
        None if first_bias is None else first_bias.contiguous(),
        coarse,
        rest,
        bounds,
        None if gate_weight is None else contiguous(up_weight),
        None if gate_weight is None or up_bias is None else up_bias.contiguous(),
        transposed(down_weight),
        None if down_bias is None else down_bias.contiguous(),
    )


def sparse_ffn_tensor(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    if x.shape[0] >= DENSE_ROWS:
        return _dense(linear_tensor, x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias)
    first, first_bias = (up_weight, up_bias) if gate_weight is None else (gate_weight, gate_bias)
    return torch.ops.rerank_kernels.sparse_ffn_tensor(
        x,
        contiguous(first),
        None if first_bias is None else first_bias.contiguous(),
        None if gate_weight is None else contiguous(up_weight),
        None if gate_weight is None or up_bias is None else up_bias.contiguous(),
        transposed(down_weight),
        None if down_bias is None else down_bias.contiguous(),
    )


def _dense(
    first: Callable[..., Tensor],  # the mode's linear
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
) -> Tensor:
    check_finite(down_weight)
    f32 = torch.float32
    if gate_weight is None:
        hidden = first(x, up_weight, up_bias, "relu", None, f32)
    else:
        gate = first(x, gate_weight, gate_bias, "relu", None, f32)
        hidden = torch.where(gate == 0, gate, gate * linear(x, up_weight, up_bias, None, None, f32))
    return linear(hidden, down_weight, down_bias, None, None, x.dtype)
