"""rotary over [T, H, D]: float32 products and one sum, each an element-wise IEEE operation, so the bits are the contract's."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    pairs = cos.shape[1]
    c, s = cos.float()[:, None], sin.float()[:, None]
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    a, b = x[..., first].float(), x[..., second].float()
    y = x.clone(memory_format=torch.contiguous_format)
    y[..., first] = (a * c - b * s).to(x.dtype)
    y[..., second] = (b * c + a * s).to(x.dtype)
    return y
