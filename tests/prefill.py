"""Attention step by step, as a decoder asks, against the whole sequence at once: for every backend and mode."""

from __future__ import annotations

from typing import Any

import torch

from cases import numbers, offsets
from invariants import same
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.sequences import Spans

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


def keys_in_a_cache(dtype: torch.dtype, d: int = 16, **more: Any) -> None:
    """In a padded cache, NaN around them; two sequences may share keys; one may have none."""
    q, _, _ = qkv(9, 4, 2, d, dtype)
    kept = [numbers(name, (3, 2, 80, d), dtype) for name in "kv"]  # [B, H_kv, S, D]
    begins, ends, of = (7, 0, 30, 7, 12), (77, 1, 30, 77, 33), (0, 1, 2, 0, 2)
    for t in kept:
        for b, (begin, end) in enumerate(((7, 77), (0, 1), (12, 33))):
            t[b, :, :begin], t[b, :, end:] = float("nan"), float("nan")
    k, v = (t.as_strided((2 * 2 * 80 + 80, 2, d), (d, 80 * d, 1)) for t in kept)
    spans = Spans(torch.tensor([[160 * b + x for b, x in zip(of, xs, strict=True)] for xs in (begins, ends)]).int(), 400)
    packed = [torch.cat([t[b, :, x:y].transpose(0, 1) for b, x, y in zip(of, begins, ends, strict=True)]) for t in kept]
    lengths = offsets(tuple(y - x for x, y in zip(begins, ends, strict=True)))
    for options in ({}, dict(causal=True), dict(causal=True, window=(5, 0), softcap=2.0)):
        want = attention(q, *packed, cu_seqlens=offsets((1, 2, 1, 3, 2)), cu_seqlens_k=lengths, **options, **more)
        got = attention(q, k, v, cu_seqlens=offsets((1, 2, 1, 3, 2)), cu_seqlens_k=spans, **options, **more)
        same(got, want, f"keys in a cache against packed ones, {options}")
        assert got.isfinite().all()


def decoding_by_another_order(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens: Any, cu_seqlens_k: Any, **options: Any
) -> torch.Tensor:
    """A mutant of attention: one query alone adds its keys from the last to the first."""
    if cu_seqlens_k is not None and q.shape[0] == 1:
        turned = torch.arange(len(k)).flip(0)
        return attention(q, k[turned], v[turned], cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, scale=options["scale"])
    return attention(q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **options)
