"""attention of mode tensor by the library; in mode portable nothing stands before the op."""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels.backend.native import hopper


def attention_tensor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
) -> Tensor:
    hopper.before_a_call(hopper.ATTENTION, q.device)
    return torch.ops.rerank_kernels.attention_tensor(q, k, v, cu_seqlens, cu_seqlens_k, left, right, scale, softcap)
