"""Attention step by step, as a decoder asks, against the whole sequence at once: for every backend and mode."""

from __future__ import annotations

from typing import Any

import torch

from cases import numbers, offsets
from invariants import same
from rerank_kernels.ops.attention import attention

PREFILL = 130
# queries [start, stop) of a sequence over its keys up to stop: decode at and beside the chunks' bounds, and chunks of a prefill
STEPS = ((0, 130), (0, 1), (5, 6), (62, 63), (63, 64), (64, 65), (129, 130), (3, 6), (60, 70), (64, 128))


def qkv(total: int, heads: int = 2, kv_heads: int = 2, d: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [numbers(n, (total, h, d), dtype) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))]


def steps_against_prefill(d: int = 16, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """A query has the same bits whether it comes alone, in a chunk or with the whole sequence. The steps are the sequences of
    one call; the whole comes first, so that no other begins where the tensor does."""
    q, k, v = qkv(PREFILL, 4, 2, d, dtype)
    cu, cu_k = offsets(tuple(b - a for a, b in STEPS)), offsets(tuple(b for _, b in STEPS))
    its_q = torch.cat([q[a:b] for a, b in STEPS])
    its_k, its_v = (torch.cat([t[:b] for _, b in STEPS]) for t in (k, v))
    for window in ((-1, 0), (40, 0)):
        want = attention(q, k, v, cu_seqlens=offsets((PREFILL,)), window=window, **options)
        got = attention(its_q, its_k, its_v, cu_seqlens=cu, cu_seqlens_k=cu_k, window=window, **options)
        for (a, b), at in zip(STEPS, cu.tolist(), strict=False):
            same(got[at : at + b - a], want[a:b], f"queries {a}:{b} over keys 0:{b}, window {window}, against the whole")
