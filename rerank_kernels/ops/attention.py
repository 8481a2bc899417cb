"""attention: softmax(q · kᵀ * scale) · v inside each sequence; bidirectional or causal, sliding window, grouped heads.

Packed: q [total, H, D], k and v [total, H_kv, D], cu_seqlens [B + 1] -> [total, H, D].
Padded: q [B, T, H, D], k and v [B, T, H_kv, D], mask [B, T] -> [B, T, H, D]; the tokens are packed first, so that side and
length of the padding, and whatever the padded places hold (NaN included), cannot reach a result.
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


@opaque(
    lambda q, *_, **__: q.new_empty(q.shape),
    schema="(Tensor q, Tensor k, Tensor v, *, Tensor? cu_seqlens=None, Tensor? mask=None, bool causal=False, "
    "int[]? window=None, float? scale=None, str? mode=None) -> Tensor",
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    mode: str | None = None,
) -> Tensor:
    """Self-attention over packed or padded sequences, in q.dtype, float32 inside.

    cu_seqlens: int32 [B + 1] offsets of the packed sequences (FlashAttention's convention). mask: bool or integer [B, T],
    nonzero where a token is; None means every place holds a token. Give one of the two at most.
    causal: token i sees tokens j <= i. window (left, right): token i sees i - left <= j <= i + right, -1 for no limit;
    places are counted over the sequence's own tokens. H must be a multiple of H_kv; head h reads h // (H / H_kv).
    scale: factor on q · k, 1 / sqrt(D) if not given. Padded places of the result are 0.

    mode: "portable" (default) or, for float16 and bfloat16 on a GPU with D <= 256, "tensor": products on tensor cores.

    Order: exact maximum, then `dot` over keys in chunks of 64 from the sequence's own first token (NUMERICS.md,
    "attention"). A key that is masked for a row is skipped, never multiplied.
    """
    check.floating("attention", q=q, k=k, v=v)
    if cu_seqlens is not None and mask is not None:
        raise ValueError("attention: cu_seqlens and mask exclude each other; cu_seqlens is for packed, mask for padded input")
    want = 3 if cu_seqlens is not None else 4
    if q.dim() != want:
        form = "[total, H, D] with cu_seqlens" if want == 3 else "[B, T, H, D] without cu_seqlens"
        check.fail("attention", "q", form, check.shape_of(q))
    for name, t in (("k", k), ("v", v)):
        check.shape("attention", name, t, *q.shape[:-2], "H_kv", q.shape[-1])
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
    total = q.shape[:-2].numel()
    left, right = min(left, total), 0 if causal else min(right, total)  # sys.maxsize is a natural "no limit"
    scale = _float32(1.0 / math.sqrt(d) if scale is None else float(scale))  # a tensor as a key would go stale when written to
    if not math.isfinite(scale) or scale == 0.0:
        check.fail("attention", "scale", "finite and not 0 as a float32", scale)

    numeric = modes.resolve("attention", mode, q=q, k=k, v=v)
    if numeric == modes.TENSOR and d > 256:
        raise ValueError(f"attention: D must be at most 256 in mode 'tensor', got {d}; take mode='portable'")
    serve = registry.select("attention", q.device, numeric)
    if cu_seqlens is not None:
        cu = check.cu_seqlens("attention", cu_seqlens, q.shape[0], q.device)
        return serve(_rows(q), _rows(k), _rows(v), cu, left, right, scale)

    batch, length = q.shape[:2]
    if mask is None:
        cu = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        return serve(_rows(q.flatten(0, 1)), _rows(k.flatten(0, 1)), _rows(v.flatten(0, 1)), cu, left, right, scale).view(
            q.shape
        )
    check.on_device("attention", "mask", mask, "q", q.device)
    index, cu = check.mask_to_cu_seqlens("attention", mask, batch, length)
    packed = serve(*(z.flatten(0, 1).index_select(0, index) for z in (q, k, v)), cu, left, right, scale)
    out = q.new_zeros(batch * length, h, d)
    return out.index_copy_(0, index, packed).view(q.shape)


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
    causal: bool = False,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """float64, packed, one sequence and one head at a time."""
    h, d = q.shape[-2:]
    group = h // k.shape[-2]
    left, right = window if window is not None else (-1, -1)
    out = torch.zeros(q.shape, dtype=torch.float64)
    offsets = cu_seqlens.tolist()
    for a, b in itertools.pairwise(offsets):
        i = torch.arange(b - a)[:, None]
        j = torch.arange(b - a)[None, :]
        hidden = torch.zeros(b - a, b - a, dtype=torch.bool)
        if causal:
            hidden |= j > i
        if left >= 0:
            hidden |= j < i - left
        if right >= 0:
            hidden |= j > i + right
        for head in range(h):
            s = q[a:b, head].double() @ k[a:b, head // group].double().t() * (1.0 / math.sqrt(d) if scale is None else scale)
            p = torch.softmax(s.masked_fill(hidden, -math.inf), -1)
            out[a:b, head] = p @ v[a:b, head // group].double()
    return out
