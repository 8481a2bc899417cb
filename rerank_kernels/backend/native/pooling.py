"""pool, sigmoid and score_head by the library."""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels.backend.native.linear import CODES
from rerank_kernels.backend.weights import contiguous


def pool(x: Tensor, cu_seqlens: Tensor, mode: str, out_dtype: torch.dtype) -> Tensor:
    return torch.ops.rerank_kernels.pool(x, cu_seqlens, mode == "mean", out_dtype)


def sigmoid(x: Tensor) -> Tensor:
    return torch.ops.rerank_kernels.activation(x, CODES["sigmoid"], None, torch.float32)


def score_head(
    pooled: Tensor,
    dense_weight: Tensor | None,
    dense_bias: Tensor | None,
    activation: str | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.rerank_kernels.score_head(
        pooled,
        None if dense_weight is None else contiguous(dense_weight),
        None if dense_bias is None else dense_bias.contiguous(),
        CODES[activation],
        contiguous(out_weight),
        None if out_bias is None else out_bias.contiguous(),
    )
