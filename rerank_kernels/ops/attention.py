"""attention: softmax(q · kᵀ * scale) · v inside each sequence; bidirectional or causal, sliding window, grouped heads, softcap.

Packed: q [total, H, D], k and v [total, H_kv, D], cu_seqlens [B + 1] -> [total, H, D].
Padded: q [B, T, H, D], k and v [B, T, H_kv, D], mask [B, T] -> [B, T, H, D]. The tokens are packed first, so that side and
length of the padding, and whatever the padded places hold (NaN included), cannot reach a result.

Keys may have lengths of their own, T_k beside T_q queries, by cu_seqlens_k or by a k that is padded to its own length. Then the
queries are the last ones of their keys, as in FlashAttention: query i stands at place T_k - T_q + i.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import modes, registry
from rerank_kernels.ops.opaque import opaque
from rerank_kernels.ops.sequences import Sequences, Spans, taken

MOST_IN_A_HEAD = 256  # in mode tensor


@opaque(
    lambda q, *_, **__: q.new_empty(q.shape),
    schema="(Tensor q, Tensor k, Tensor v, *, Tensor? cu_seqlens=None, "
    "Tensor? cu_seqlens_k=None, Tensor? mask=None, Tensor? mask_k=None, bool causal=False, int[]? window=None, "
    "float? scale=None, float? softcap=None, str? mode=None) -> Tensor",
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | Sequences | None = None,
    cu_seqlens_k: Tensor | Sequences | Spans | None = None,
    mask: Tensor | None = None,
    mask_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    mode: str | None = None,
) -> Tensor:
    """Attention over packed or padded sequences, in q.dtype, float32 inside.

    cu_seqlens: int32 [B + 1] offsets of the packed sequences (FlashAttention's convention), or `Sequences`, which were checked
    when they were made. mask: bool or integer [B, T], nonzero where a token is; None means every place holds a token. Give one
    of the two at most. Without cu_seqlens_k and mask_k they say the same of q and of k and v: self-attention.

    cu_seqlens_k, mask_k: the same of k and v, if those have other lengths: k and v are [total_k, H_kv, D], or [B, T_k, H_kv, D]
    with mask_k [B, T_k]. The queries are the last ones of their keys: query i of T_q stands at place T_k - T_q + i.
    A query that sees no key gives 0, as in FlashAttention.

    causal: the query at place i sees keys j <= i. window (left, right): it sees i - left <= j <= i + right, -1 for no limit;
    places are counted over the sequence's own keys. H must be a multiple of H_kv; head h reads h // (H / H_kv).
    scale: factor on q · k, 1 / sqrt(D) if not given. softcap: scores s become tanh(s / softcap) * softcap, as in Gemma 2.
    Padded places of the result are 0.

    mode: "portable" (default) or, for float16 and bfloat16 on a GPU with D <= 256, "tensor": products on tensor cores.

    Order: exact maximum, then `dot` over keys in chunks of 64 from the sequence's own first key (NUMERICS.md, "attention"). So
    under a causal mask a query has the same bits alone, in a chunk and in the whole sequence. A key that is masked for a row is
    skipped, never multiplied.
    """
    check.floating("attention", q=q, k=k, v=v)
    packed = cu_seqlens is not None
    if (packed or cu_seqlens_k is not None) and (mask is not None or mask_k is not None):
        raise ValueError("attention: cu_seqlens and mask exclude each other; cu_seqlens is for packed, mask for padded input")
    if not packed and cu_seqlens_k is not None:
        raise ValueError("attention: cu_seqlens_k is for packed input, whose queries need cu_seqlens; give both")
    want = 3 if packed else 4
    if q.dim() != want:
        form = "[total, H, D] with cu_seqlens" if want == 3 else "[B, T, H, D] without cu_seqlens"
        check.fail("attention", "q", form, check.shape_of(q))
    tokens = (q.shape[0], "T_k") if not packed else (q.shape[0],) if cu_seqlens_k is None else ("total_k",)
    for name, t in (("k", k), ("v", v)):
        check.shape("attention", name, t, *tokens, "H_kv", q.shape[-1])
        if t.dtype != q.dtype:
            raise TypeError(f"attention: {name} must be {q.dtype} like q, got {t.dtype}")
    h, d = q.shape[-2:]
    if v.shape != k.shape:
        check.fail("attention", "v", f"{check.shape_of(k)} like k", check.shape_of(v))
    if d == 0 or h == 0 or k.shape[-2] == 0 or h % k.shape[-2]:
        check.fail("attention", "H", f"a multiple of H_kv = {k.shape[-2]}, and D > 0", f"H = {h}, D = {d}")
    left, right = window if window is not None else (-1, -1)
    if left < -1 or right < -1:
        check.fail("attention", "window", "(left, right) with -1 for no limit", window)
    if window is not None:  # sys.maxsize is a natural "no limit"
        farthest = max(q.shape[:-2].numel(), k.shape[:-2].numel())
        left, right = min(left, farthest), min(right, farthest)
    right = 0 if causal else right
    scale = _float32(1.0 / math.sqrt(d) if scale is None else float(scale))  # a tensor as a key would go stale when written to
    if not math.isfinite(scale) or scale == 0.0:
        check.fail("attention", "scale", "finite and not 0 as a float32", scale)
    cap = 0.0 if softcap is None else _float32(float(softcap))
    if softcap is not None and not (math.isfinite(cap) and cap > 0.0):
        check.fail("attention", "softcap", "finite and > 0 as a float32", softcap, "leave it out, or give None, for no cap")

    numeric = modes.resolve("attention", mode, q=q, k=k, v=v)
    if numeric == modes.TENSOR and d > MOST_IN_A_HEAD:
        raise ValueError(f"attention: D must be at most {MOST_IN_A_HEAD} in mode 'tensor', got {d}; take mode='portable'")
    serve = registry.select("attention", q.device, numeric)
    if cu_seqlens is not None:
        cu, cu_k = taken("attention", "cu_seqlens", cu_seqlens, q.shape[0], q.device), None
        if isinstance(cu_seqlens_k, Spans):
            cu_k = _bounds(cu_seqlens_k, cu.shape[0] - 1, k)
        elif cu_seqlens_k is not None:
            cu_k = taken("attention", "cu_seqlens_k", cu_seqlens_k, k.shape[0], q.device)
            if cu_k.shape != cu.shape:
                check.fail("attention", "cu_seqlens_k", f"{check.shape_of(cu)} like cu_seqlens", check.shape_of(cu_k))
        return serve(_rows(q), _rows(k), _rows(v), cu, cu_k, left, right, scale, cap)

    rows = _padded("mask", mask, q)
    if mask_k is None and k.shape[1] == q.shape[1]:
        keys = rows
    elif mask_k is None and mask is not None:
        check.fail("attention", "mask_k", f"[B, T_k] = [{k.shape[0]}, {k.shape[1]}] beside a mask of the queries", None)
    else:
        keys = _padded("mask_k", mask_k, k)
    packed_rows = (_rows(s.pack(t)) for s, t in ((rows, q), (keys, k), (keys, v)))
    cu_k = None if keys is rows else keys.cu_seqlens
    return rows.unpack(serve(*packed_rows, rows.cu_seqlens, cu_k, left, right, scale, cap))


def _bounds(keys: Spans, count: int, k: Tensor) -> Tensor:
    if keys.places != k.shape[0]:
        check.fail("attention", "cu_seqlens_k", f"of {k.shape[0]} places", f"Spans of {keys.places}")
    if keys.bounds.shape != (2, count):
        check.fail("attention", "cu_seqlens_k", f"[2, {count}]", check.shape_of(keys.bounds))
    check.on_device("attention", "cu_seqlens_k", keys.bounds, "the tokens", k.device)
    return keys.bounds


def _padded(name: str, mask: Tensor | None, like: Tensor) -> Sequences:
    b, t = like.shape[:2]
    if mask is None:
        return Sequences.of_equal_length(b, t, like.device)
    check.on_device("attention", name, mask, "q", like.device)
    return Sequences.from_mask(mask, (b, t), op="attention", name=name)


@functools.lru_cache(maxsize=256)
def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


def _rows(t: Tensor) -> Tensor:
    """Kernels take any stride between tokens and heads (slices of a fused QKV), but features side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def attention_truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """float64, packed, one sequence and one head at a time."""
    h, d = q.shape[-2:]
    group = h // k.shape[-2]
    left, right = window if window is not None else (-1, -1)
    out = torch.zeros(q.shape, dtype=torch.float64)
    rows = itertools.pairwise(cu_seqlens.tolist())
    keys = itertools.pairwise((cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist())
    for (a, b), (first, last) in zip(rows, keys, strict=True):
        j = torch.arange(last - first)[None, :]
        i = torch.arange(a - b, 0)[:, None] + (last - first)  # the last b - a places of the keys
        hidden = torch.zeros(b - a, last - first, dtype=torch.bool)
        if causal:
            hidden |= j > i
        if left >= 0:
            hidden |= j < i - left
        if right >= 0:
            hidden |= j > i + right
        sees = ~hidden.all(1)
        for head in range(h):
            own_k, own_v = (t[first:last, head // group].double() for t in (k, v))
            s = q[a:b, head].double() @ own_k.t() * (1.0 / math.sqrt(d) if scale is None else scale)
            s = s if softcap is None else torch.tanh(s / softcap) * softcap
            p = torch.softmax(s.masked_fill(hidden, -math.inf)[sees], -1)
            if own_v.isfinite().all():
                out[a:b, head][sees] = p @ own_v
            else:  # what a row does not see is skipped, not multiplied by 0
                out[a:b, head][sees] = (p[..., None] * own_v).masked_fill(hidden[sees][..., None], 0.0).sum(1)
    return out
