"""attention: softmax(q · kᵀ * scale) · v over the sequences of cu_seqlens, whose keys may have offsets of their own.
q [total, H, D], k and v [total_k, H_kv, D].

Each sequence is cut out, copied to fresh aligned memory and computed alone. Both matrix products have the shape of its own
length. So what stands beside it, and where, is in no expression. Exact maximum, exp, `row_sum` over its keys from its own first
key, division of the weighted values at the end.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from rerank_kernels.backend.pytorch.softmax import row_sum


# Autocast would turn the matrix products into half precision behind our back.
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    rows = list(pairwise(cu_seqlens.tolist()))
    keys = rows if cu_seqlens_k is None else _spans(cu_seqlens_k)
    for (start, stop), (first, last) in zip(rows, keys, strict=True):
        if start < stop and first < last:
            heads = (_heads(q, start, stop, 1), _heads(k, first, last, group), _heads(v, first, last, group))
            out[start:stop] = _one_sequence(*heads, left, right, scale, softcap).transpose(0, 1)
        else:
            out[start:stop] = 0.0
    return out


def _spans(keys: Tensor) -> list[tuple[int, int]]:
    """Where each sequence's keys begin and end: packed, or anywhere ([2, B])."""
    begins, ends = keys.tolist() if keys.dim() == 2 else (keys[:-1].tolist(), keys[1:].tolist())
    return list(zip(begins, ends, strict=True))


def _heads(t: Tensor, start: int, stop: int, group: int) -> Tensor:
    """[total, H_kv, D] -> the sequence's own float32 [H, T, D]; always a copy, for its alignment must not be the caller's."""
    own = t[start:stop].transpose(0, 1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return own.repeat_interleave(group, dim=0) if group > 1 else own


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, softcap: float) -> Tensor:
    length, before = k.shape[1], k.shape[1] - q.shape[1]
    i = torch.arange(before, length, device=q.device)[:, None]  # the queries are the last ones of the keys
    j = torch.arange(length, device=q.device)[None, :]
    hidden = torch.zeros(q.shape[1], length, dtype=torch.bool, device=q.device)
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    s = torch.bmm(q, k.transpose(1, 2)) * scale  # a score: a term of the places i and j would be added here
    if softcap != 0.0:
        s = torch.tanh(s / softcap) * softcap
    s = s.masked_fill(hidden, -math.inf)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    y = _weighted_values(e, v, hidden) / row_sum(e)[..., None]
    return y.masked_fill(hidden.all(1)[:, None], 0.0) if before < 0 else y  # the first queries may see no key


def _weighted_values(e: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """e · v where a hidden key is skipped: a hidden NaN or Inf must not come in as 0 * NaN."""
    finite = torch.isfinite(v)
    y = torch.bmm(e, torch.where(finite, v, torch.zeros_like(v)))
    for key in (~finite).any(-1).any(0).nonzero().flatten().tolist():
        lost = torch.where(finite[:, key], torch.zeros_like(v[:, key]), v[:, key])  # [H, D]
        term = e[:, :, key, None] * lost[:, None]
        # a finite feature of the key is in y already; only its NaN and Inf come back, and only for rows that see it
        y = torch.where(hidden[:, key, None] | finite[:, None, key], y, y + term)
    return y
