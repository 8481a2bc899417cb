"""attention by the library."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float
) -> Tensor:
    return torch.ops.rerank_kernels.attention(q, k, v, cu_seqlens, cu_seqlens_k, left, right, scale)


def attention_tensor(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float
) -> Tensor:
    return torch.ops.rerank_kernels.attention_tensor(q, k, v, cu_seqlens, cu_seqlens_k, left, right, scale)
