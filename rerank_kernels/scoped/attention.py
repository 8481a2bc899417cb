"""scaled_dot_product_attention with any mask. What a query gets is one expression of itself and the keys that it sees.

The keys of a query are those that no False, no -inf and not the least finite number of the mask's dtype hides. Where they
stand side by side and the mask adds nothing else to them, the expression is rk.attention's (NUMERICS.md): chunks and lanes
begin at the first of them, so padding on either side is in no sum. Any other query has rk.softmax of fl(fl(dot · scale) +
mask), then `dot` with the values; its keys are counted from the first that any query of its entry sees, around the end. Which
of the two a query takes depends on its own row of the mask alone.

A hidden key is skipped: whatever it holds reaches nothing. A query that sees no key gives 0. A query whose keys are all at
the least finite number sees all of them, as in PyTorch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rerank_kernels.ops import softmax
from rerank_kernels.ops.attention import attention as own_attention
from rerank_kernels.ops.linear import bmm
from rerank_kernels.ops.sequences import Sequences, Spans
from rerank_kernels.scoped.refusal import Refusal, floats


class Seen(NamedTuple):
    """Which keys the queries of n entries see: first and end [n, Tq] of them, and what is not so simple [n, Tq]."""

    first: Tensor
    end: Tensor
    other: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    floats(query=query, key=key, value=value)
    if dropout_p != 0.0:
        raise Refusal(f"dropout_p is {dropout_p}; call model.eval()")
    if query.dim() < 2 or key.dtype != query.dtype or value.dtype != query.dtype:
        raise Refusal("query, key and value must be [..., T, D] and have one dtype")
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = _entries(query, key, value, enable_gqa)
    mask = attn_mask
    if is_causal and mask is None and q.shape[2] != k.shape[2]:  # PyTorch aligns the first query with the first key
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    features = v.shape[-1]
    if features != q.shape[-1]:  # zeros behind the features add nothing to a dot
        wide = max(features, q.shape[-1])
        q, k, v = (torch.constant_pad_nd(t, [0, wide - t.shape[-1]]) for t in (q, k, v))
    if mask is None:
        rows = Sequences.of_equal_length(q.shape[0], q.shape[2], q.device)
        keys = None if k.shape[2] == q.shape[2] else Sequences.of_equal_length(k.shape[0], k.shape[2], k.device)
        y = own_attention(_rows(q), _rows(k), _rows(v), cu_seqlens=rows, cu_seqlens_k=keys, causal=is_causal, scale=scale)
        y = y.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    else:
        y = _masked(q, k, v, mask, scale, query.dim() - 2)
    return y[..., :features].reshape(
        *torch.broadcast_shapes(query.shape[:-2], _free(key, enable_gqa)), query.shape[-2], features
    )


def _free(key: Tensor, enable_gqa: bool) -> torch.Size:
    return key.shape[:-3] if enable_gqa else key.shape[:-2]


def _entries(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> list[Tensor]:
    """[B, H, T, D] each; H of keys and values may divide H of the queries."""
    if enable_gqa and query.dim() >= 3 and query.shape[-3] % key.shape[-3] == 0 and key.shape[-3] == value.shape[-3]:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        made = [t.expand(*batch, *t.shape[-3:]) for t in (query, key, value)]
    else:
        batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        made = [t.expand(*batch, *t.shape[-2:]) for t in (query, key, value)]
    made = [t if t.dim() > 2 else t[None] for t in made]
    return [t[None] if t.dim() == 3 else t.flatten(0, -4) for t in made]


def _rows(t: Tensor) -> Tensor:
    """[B, H, T, D] -> [B * T, H, D]: no copy, where a projection's features were the heads."""
    return t.transpose(1, 2).flatten(0, 1)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, leading: int) -> Tensor:
    b, h, t, d = q.shape
    if mask.dtype != torch.bool:
        floats(attn_mask=mask)
    if mask.dim() > 2 and leading > 2:  # more than one dimension of entries: they are one here
        raise Refusal(f"a mask of {mask.dim()} dimensions for queries of {leading + 2}; flatten all but heads, T and D")
    mask = mask.expand(*[1] * (4 - mask.dim()), *mask.shape) if mask.dim() < 4 else mask
    if mask.shape[1] > 1 and mask.stride(1) == 0:
        mask = mask[:, :1]
    if mask.shape[1] > 1:  # heads see other keys: each head is an entry then
        k, v = (x.repeat_interleave(h // x.shape[1], 1) for x in (k, v))
        mask = mask.expand(b, h, *mask.shape[2:]).flatten(0, 1)[:, None]
        q, k, v = (x.flatten(0, 1)[:, None] for x in (q, k, v))
        y = _masked(q, k, v, mask, scale, 2)
        return y.view(b, h, t, d)
    mask = mask[:, 0].expand(b, -1, k.shape[2])
    if mask.shape[1] > 1 and mask.stride(1) == 0:
        mask = mask[:, :1]
    visible = seen_by(mask)
    seen = _look(mask, visible)
    y = _in_spans(q, k, v, seen, scale)
    entries = seen.other.any(1).nonzero()[:, 0]
    if entries.numel():
        some = _Entries(*(x.index_select(0, entries) for x in (q, k, v, mask, visible)))
        rest = _written_out(some, scale)
        others = seen.other.index_select(0, entries)[:, None, :, None]
        y = y.index_copy(0, entries, torch.where(others, rest, y.index_select(0, entries)))
    return y


def seen_by(mask: Tensor) -> Tensor:
    """[n, Tq, Tk], bool: the mask's least finite number hides, unless it is all that a query has."""
    if mask.dtype == torch.bool:
        return mask
    above = mask > torch.finfo(mask.dtype).min
    return torch.where(above.any(-1, keepdim=True), above, mask != -math.inf)


def _look(mask: Tensor, visible: Tensor) -> Seen:
    length = mask.shape[-1]
    places = torch.arange(length, dtype=torch.int32, device=mask.device)
    count = visible.sum(-1, dtype=torch.int32)
    first = torch.where(visible, places, length).amin(-1)
    end = torch.where(visible, places, -1).amax(-1) + 1
    other = (end - first != count) & (count > 0)
    if mask.dtype != torch.bool:
        other |= (visible & (mask != 0)).any(-1)
    nothing = (count == 0) | other  # rk.attention is asked for none of their keys
    return Seen(first.masked_fill(nothing, 0), end.masked_fill(nothing, 0), other)


def _in_spans(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> Tensor:
    """rk.attention with the span of keys of each query; the fewest sequences that say the same serve."""
    b, h, t, d = q.shape
    length = k.shape[2]
    starts = torch.arange(b, dtype=torch.int32, device=q.device)[:, None] * length
    first, end, causal = seen.first, seen.end, False
    if bool((first == first[:, :1]).all() & (end == end[:, :1]).all()):  # the queries of an entry see the same
        rows = Sequences.of_equal_length(b, t, q.device)
        first, end = first[:, :1], end[:, :1]
    elif (begin := _causal(first, end, length)) is not None:
        rows, causal = Sequences.of_equal_length(b, t, q.device), True
        first, end = begin, torch.full_like(begin, length)
    else:
        rows = Sequences.of_equal_length(b * t, 1, q.device)
    bounds = torch.stack([(first + starts).flatten(), (end + starts).flatten()]).to(torch.int32).contiguous()
    spans = Spans(bounds, b * length)
    y = own_attention(_rows(q), _rows(k), _rows(v), cu_seqlens=rows, cu_seqlens_k=spans, causal=causal, scale=scale)
    return y.view(b, t, h, d).transpose(1, 2)


def _causal(first: Tensor, end: Tensor, length: int) -> Tensor | None:
    """[b, 1], where the keys of each entry begin, if the last query sees up to the last key and each other one key less."""
    t = first.shape[1]
    begin = first[:, -1:]
    places = torch.arange(length - t + 1, length + 1, dtype=end.dtype, device=end.device)
    empty = places <= begin
    same = (empty & (end == first)) | (~empty & (first == begin) & (end == places))
    return begin if bool(same.all()) else None


class _Entries(NamedTuple):
    """[n, H, T, D], and for keys H_kv; the mask and what it leaves [n, Tq or 1, Tk]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    visible: Tensor


def _written_out(some: _Entries, scale: float) -> Tensor:
    """Scores, rk.softmax and the weighted values, for queries whose keys are no span or have numbers added."""
    q, k, v, mask, visible = some
    n, h, t, d = q.shape
    length = k.shape[2]
    first = _first_seen(mask, visible)
    around = (torch.arange(length, device=q.device) + first[:, None]) % length  # [n, Tk], from the first that is seen
    k, v = (x.repeat_interleave(h // x.shape[1], 1).gather(2, around[:, None, :, None].expand(n, h, length, d)) for x in (k, v))
    by_row = around[:, None].expand(n, visible.shape[1], length)
    visible = visible.gather(2, by_row)[:, None]
    s = bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32).view(n, h, t, length)
    s = s * torch.tensor(scale, dtype=torch.float32, device=q.device)
    if mask.dtype != torch.bool:
        s = s + mask.gather(2, by_row)[:, None].float()
    s = s.masked_fill(~visible, -math.inf)
    p = softmax.softmax(s, -1).masked_fill(~visible, 0.0)
    finite = torch.isfinite(v)
    y = bmm(p.flatten(0, 1), v.masked_fill(~finite, 0.0).flatten(0, 1), out_dtype=torch.float32).view(n, h, t, d)
    if not bool(finite.all()):
        y = _with_what_is_not_finite(y, v, visible.expand(n, h, t, length))
    return y.to(q.dtype)


def _first_seen(mask: Tensor, visible: Tensor) -> Tensor:
    """[n], the first key that any query of an entry sees; a query whose keys are all at the least number is nobody's."""
    mine = visible if mask.dtype == torch.bool else visible & (mask > torch.finfo(mask.dtype).min)
    return torch.where(mine.any(1), torch.arange(mine.shape[-1], device=mask.device), mine.shape[-1]).amin(-1)


def _with_what_is_not_finite(y: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Inf and NaN of values reach the queries that see them, and no other: counts of them, which are exact in any order."""
    sees = visible.flatten(0, 1).float()
    up, down, lost = (
        bmm(sees, where.flatten(0, 1).float()).view(y.shape) > 0 for where in (v == math.inf, v == -math.inf, v.isnan())
    )
    y = torch.where(up, math.inf, torch.where(down, -math.inf, y))
    return torch.where(lost | (up & down), math.nan, y)


ROUTES = {"scaled_dot_product_attention": attention}
