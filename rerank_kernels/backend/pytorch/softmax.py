"""softmax, sum, mean over the last dimension of [R, D], and the sum order they share with layer_norm and attention.

row_sum: 32 lanes from +0, lane l adds x[l], x[l + 32], ... in ascending order; then lanes fold by 16, 8, 4, 2, 1. Every step is
an element-wise IEEE add, so the order is what is written here, on every machine, and no other row is in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 32


def row_sum(x: Tensor) -> Tensor:
    """float32 [..., D] -> [...]."""
    d = x.shape[-1]
    lanes = x.new_zeros(*x.shape[:-1], LANES)
    for start in range(0, d, LANES):
        stop = min(start + LANES, d)
        lanes[..., : stop - start] += x[..., start:stop]
    for width in (16, 8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width:]
    return lanes[..., 0]


def softmax(rows: Tensor) -> Tensor:
    """e = exp(x - max), e / row_sum(e). The maximum is exact, so its order does not matter."""
    x = rows.float()
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return (e / row_sum(e)[..., None]).to(rows.dtype)


def sum(rows: Tensor) -> Tensor:  # noqa: A001  the op's name
    return row_sum(rows.float()).to(rows.dtype)


def mean(rows: Tensor) -> Tensor:
    return (row_sum(rows.float()) / rows.shape[-1]).to(rows.dtype)
