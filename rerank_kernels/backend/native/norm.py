"""layer_norm and normalize by the library."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return torch.ops.rerank_kernels.layer_norm(x, weight, bias, eps, residual)


def normalize(x: Tensor, eps: float) -> Tensor:
    return torch.ops.rerank_kernels.normalize(x, eps)
