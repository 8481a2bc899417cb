"""pool, sigmoid and score_head: from hidden states to one vector per sequence, and from a vector to logit and score.

The head computes and returns float32 whatever the body's dtype. Two adjacent float16 logits already give the two scores
0.9990601 and 0.9990638 that users report for one pair. Rank by logit, never by score: near 1.0 scores tie, logits do not.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import registry
from rerank_kernels.ops.linear import ACTIVATIONS, bmm, linear_truth
from rerank_kernels.ops.opaque import opaque
from rerank_kernels.ops.sequences import Sequences, taken

# Everything that names a mode reads this: a kernel has the first two, and the others are made of them, of bmm and of a choice.
POOL_MODES = ("cls", "mean", "max", "lasttoken", "weightedmean")


class HeadOutput(NamedTuple):
    """float32 [B, L] each: logit, score = sigmoid(logit), complement = 1 - score = sigmoid(-logit), distinct near score 1."""

    logit: Tensor
    score: Tensor
    complement: Tensor


def _pool_result(
    x: Tensor,
    mode: str,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(sequences, x.shape[-1], dtype=out_dtype or x.dtype)


def _score_head_result(pooled: Tensor, out_weight: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    shape = pooled.shape[0], out_weight.shape[0]
    return tuple(pooled.new_empty(shape, dtype=torch.float32) for _ in range(3))


@opaque(_pool_result)
def pool(
    x: Tensor,
    mode: str,
    *,
    cu_seqlens: Tensor | Sequences | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One vector per sequence.

    x: [total, D] with cu_seqlens [B + 1] or Sequences, or [B, T, D] with an optional mask [B, T]. Returns [B, D] in out_dtype
    (x.dtype).
    mode: "cls", the first token; "lasttoken", the last one; "mean", one ascending chain per feature over valid tokens, divided
    by their number; "max", the largest of each feature; "weightedmean", where the first token has weight 1, the next one 2 and
    so on. A sequence of no tokens gives 0.
    """
    check.floating("pool", x=x)
    check.choice("pool", "mode", mode, POOL_MODES)
    out_dtype = out_dtype or x.dtype
    check.choice("pool", "out_dtype", out_dtype, check.FLOATS)
    if cu_seqlens is not None and mask is not None:
        raise ValueError("pool: cu_seqlens and mask exclude each other; cu_seqlens is for packed, mask for padded input")
    if cu_seqlens is not None:
        check.shape("pool", "x", x, "total", "D")
        rows, total, device = x, x.shape[0], x.device
        cu = taken("pool", "cu_seqlens", cu_seqlens, total, device)
        if isinstance(cu_seqlens, Sequences):
            sequences = cu_seqlens
        elif mode in _MADE:
            sequences = Sequences.from_cu_seqlens(cu, total, device, op="pool")
    else:
        check.shape("pool", "x", x, "B", "T", "D")
        b, t = x.shape[:2]
        if mask is None:
            sequences = Sequences.of_equal_length(b, t, x.device)
        else:
            check.on_device("pool", "mask", mask, "x", x.device)
            sequences = Sequences.from_mask(mask, (b, t), op="pool")
        rows, cu = sequences.pack(x), sequences.cu_seqlens
    if mode in _MADE:
        return _MADE[mode](rows, sequences.lengths).to(out_dtype)
    return registry.select("pool", x.device)(rows.contiguous(), cu, mode, out_dtype)


def _last(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    index = [end - 1 for end, n in zip(itertools.accumulate(lengths), lengths, strict=True) if n]
    return _one_each(rows.index_select(0, torch.tensor(index, dtype=torch.int64, device=rows.device)), lengths)


def _largest(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    if held := tuple(n for n in lengths if n):
        # which of two zeros is taken is PyTorch's to say: +0 here
        rows = _padded(rows, held, -float("inf")).amax(1).float() + 0.0
    return _one_each(rows, lengths)


def _one_each(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The kernel's "cls" of one row for each sequence that has tokens: that row, and 0 for the others."""
    cu = list(itertools.accumulate((int(n > 0) for n in lengths), initial=0))
    offsets = torch.tensor(cu, dtype=torch.int32, device=rows.device)
    return registry.select("pool", rows.device)(rows.contiguous(), offsets, "cls", torch.float32)


def _weighted_mean(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    longest = max(lengths, default=0)
    if not longest:
        return rows.new_zeros(len(lengths), rows.shape[1], dtype=torch.float32)
    weights = torch.arange(1.0, longest + 1.0, device=rows.device).expand(len(lengths), 1, longest)
    # padding is +0 behind the sequence, which changes no sum; portable also in a model of another mode, like every pooling
    summed = bmm(weights, _padded(rows, lengths, 0.0), out_dtype=torch.float32, mode="portable")[:, 0]
    return summed / torch.tensor([max(n * (n + 1) / 2, 1.0) for n in lengths], device=rows.device)[:, None]


def _padded(rows: Tensor, lengths: tuple[int, ...], fill: float) -> Tensor:
    """[total, D] -> [B, longest, D], `fill` behind each sequence."""
    longest = max(lengths)
    places = torch.arange(longest, device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    out = rows.new_full((len(lengths) * longest, rows.shape[1]), fill)
    return out.index_copy_(0, places.flatten().nonzero().squeeze(1), rows).view(len(lengths), longest, rows.shape[1])


_MADE = {"max": _largest, "lasttoken": _last, "weightedmean": _weighted_mean}


@opaque(lambda x: x.new_empty(x.shape, dtype=torch.float32))
def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in float32, returned in float32 whatever the dtype of x. sigmoid(-x) is 1 - sigmoid(x), unrounded."""
    check.floating("sigmoid", x=x)
    return registry.select("sigmoid", x.device)(x.contiguous())


@opaque(_score_head_result, result=HeadOutput)
def score_head(
    pooled: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    dense_weight: Tensor | None = None,
    dense_bias: Tensor | None = None,
    activation: str | None = "tanh",
) -> HeadOutput:
    """logit = out(act(dense(pooled))), score = sigmoid(logit), complement = sigmoid(-logit): one call, float32 throughout.

    pooled: [B, D]; dense_weight [P, D] and dense_bias [P], left out if the head has no dense layer (then activation is not
    used); out_weight: [L, P], out_bias: [L]. Weights of any float dtype are widened exactly. Returns three float32 [B, L].
    """
    check.floating(
        "score_head", pooled=pooled, out_weight=out_weight, out_bias=out_bias, dense_weight=dense_weight, dense_bias=dense_bias
    )
    check.shape("score_head", "pooled", pooled, "B", "D")
    for name, t in (("pooled", pooled[:1]), ("dense_weight", dense_weight), ("out_weight", out_weight)):
        if t is not None and 0 in t.shape[-1:] + t.shape[:1] * (name != "pooled"):
            check.fail("score_head", name, "of sizes > 0", check.shape_of(t))
    width = pooled.shape[1]
    check.choice("score_head", "activation", activation, (None, *ACTIVATIONS))
    if dense_weight is not None:
        check.shape("score_head", "dense_weight", dense_weight, "P", width)
        width = dense_weight.shape[0]
        if dense_bias is not None:
            check.shape("score_head", "dense_bias", dense_bias, width)
    elif dense_bias is not None:
        check.fail("score_head", "dense_bias", "left out without dense_weight", check.shape_of(dense_bias))
    check.shape("score_head", "out_weight", out_weight, "L", width)
    if out_bias is not None:
        check.shape("score_head", "out_bias", out_bias, out_weight.shape[0])
    serve = registry.select("score_head", pooled.device)
    return HeadOutput(*serve(pooled.contiguous(), dense_weight, dense_bias, activation, out_weight, out_bias))


def pool_truth(x: Tensor, mode: str, *, cu_seqlens: Tensor) -> Tensor:
    offsets = cu_seqlens.tolist()
    rows = [x[a:b].double() for a, b in itertools.pairwise(offsets)]
    zero = torch.zeros(x.shape[1], dtype=torch.float64)

    def of(r: Tensor) -> Tensor:
        if mode in ("cls", "lasttoken"):
            return r[0 if mode == "cls" else -1]
        if mode == "max":
            return r.amax(0)
        weights = torch.arange(1, len(r) + 1, dtype=torch.float64) if mode == "weightedmean" else torch.ones_like(r[:, 0])
        return weights @ r / weights.sum()

    return torch.stack([of(r) if len(r) else zero for r in rows])


def sigmoid_truth(x: Tensor) -> Tensor:
    return torch.sigmoid(x.double())


def score_head_truth(
    pooled: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    dense_weight: Tensor | None = None,
    dense_bias: Tensor | None = None,
    activation: str | None = "tanh",
) -> HeadOutput:
    if dense_weight is not None:
        pooled = linear_truth(pooled, dense_weight, dense_bias, activation=activation)
    logit = linear_truth(pooled, out_weight, out_bias)
    return HeadOutput(logit, torch.sigmoid(logit), torch.sigmoid(-logit))
