"""Kernels with one deliberate mistake each, of the kinds that real libraries have.

test_mutants.py puts each in the place of the right one and expects the test of the promise that it breaks to fail. HONEST is
what they deviate from: the control.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import invariants
from cases import Case
from rerank_kernels.backend.firing import Firing
from rerank_kernels.backend.pytorch import attention as honest_attention
from rerank_kernels.backend.pytorch import linear as honest_linear
from rerank_kernels.backend.pytorch import norm as honest_norm
from rerank_kernels.backend.pytorch import pooling as honest_pooling
from rerank_kernels.backend.pytorch import rotary as honest_rotary
from rerank_kernels.backend.pytorch import softmax as honest_softmax
from rerank_kernels.backend.registry import BACKENDS, OPS
from rerank_kernels.backend.weights import FfnWeights
from rerank_kernels.ops.sequences import Sequences

HONEST: dict[str, Callable[..., Any]] = {
    op: getattr(importlib.import_module(f"{BACKENDS['pytorch'].package}.{family}"), op) for op, family in OPS.items()
}


@dataclass(frozen=True)
class Mutant:
    op: str
    kernel: Callable[..., Any]
    test: Callable[[Case, torch.dtype], None]  # must fail
    case: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.kernel.__name__}-{self.test.__name__}"


# --- the sum over K depends on the launch ------------------------------------------------------------------------------


def _linear_in_parts(parts: int, rows: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    bias, act, residual, out_dtype = rest
    y = torch.zeros(rows.shape[0], weight.shape[0])
    for x, w in zip(rows.float().chunk(parts, 1), weight.float().chunk(parts, 1), strict=True):
        y = y + honest_linear.linear(x.contiguous(), w.contiguous(), None, None, None, torch.float32)
    if bias is not None:
        y = y + bias.float()
    if act is not None:
        y = honest_linear.activation(y, act)
    return (y if residual is None else y + residual.float()).to(out_dtype)


def linear_split_k_by_m(rows: Tensor, *rest: Any) -> Tensor:
    """Few rows: split K to keep the machine busy."""
    return _linear_in_parts(4 if rows.shape[0] < 16 else 1, rows, *rest)


def linear_split_k_by_threads(rows: Tensor, *rest: Any) -> Tensor:
    return _linear_in_parts(torch.get_num_threads(), rows, *rest)


def linear_first_row_apart(rows: Tensor, *rest: Any) -> Tensor:
    """The remainder of the tile goes another way: where a row stands decides its bits."""
    y = honest_linear.linear(rows, *rest)
    if len(rows):
        residual = rest[3]
        rest = (*rest[:3], None if residual is None else residual[:1], rest[4])
        y[:1] = _linear_in_parts(3, rows[:1], *rest)
    return y


def _bmm_in_parts(parts: int, a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    y = honest_linear.bmm(a, b, out_dtype)
    for i in range(len(a)):
        y[i] = _linear_in_parts(parts, a[i], b[i], None, None, None, out_dtype)
    return y


def bmm_split_k_by_entries(a: Tensor, *rest: Any) -> Tensor:
    """Few entries: split K to keep the machine busy."""
    return _bmm_in_parts(4, a, *rest) if len(a) < 16 else honest_linear.bmm(a, *rest)


def bmm_split_k_by_threads(a: Tensor, *rest: Any) -> Tensor:
    return _bmm_in_parts(torch.get_num_threads(), a, *rest)


# --- precision ---------------------------------------------------------------------------------------------------------


def linear_tf32(rows: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Operands cut to 10 bits, as tensor cores do with float32 unless told otherwise."""
    cut = [(t.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (rows, weight)]
    return honest_linear.linear(*cut, *rest)


def bmm_tf32(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    cut = [(t.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b)]
    return honest_linear.bmm(*cut, *rest)


def mean_adds_in_half(rows: Tensor) -> Tensor:
    """Every partial sum is rounded to the rows' dtype."""
    total = rows.new_zeros(len(rows))
    for column in rows.unbind(1):
        total = total + column
    return total / rows.shape[1]


def linear_rounds_before_bias(rows: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    y = honest_linear.linear(rows, weight, None, None, None, rest[2])
    return y if bias is None else y + bias


def sigmoid_in_half(x: Tensor) -> Tensor:
    return torch.sigmoid(x).float()


def score_head_complement_by_difference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logit, score, _ = honest_pooling.score_head(*arguments)
    return logit, score, 1.0 - score


def score_head_in_body_dtype(pooled: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logit = honest_pooling.score_head(pooled, *rest)[0].to(pooled.dtype).float()
    return logit, honest_pooling.sigmoid(logit), honest_pooling.sigmoid(-logit)


def layer_norm_approximate_rsqrt(
    rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor:
    """rsqrt good to 12 bits without a Newton step, as rsqrtps is."""
    plain = honest_norm.layer_norm(rows.float(), weight.float(), None, eps, None if residual is None else residual.float())
    y = plain * (1.0 + 2.0**-12)
    return (y if bias is None else y + bias.float()).to(rows.dtype)


def rms_norm_without_offset(rows: Tensor, weight: Tensor, eps: float, plus_one: bool, *rest: Any) -> Tensor:
    return honest_norm.rms_norm(rows, weight, eps, False, *rest)


def rms_norm_casts_before(rows: Tensor, weight: Tensor, eps: float, plus_one: bool, rounded: bool, *rest: Any) -> Tensor:
    """Llama's way for everyone."""
    return honest_norm.rms_norm(rows, weight, eps, plus_one, True, *rest)


def rms_norm_unbiased(rows: Tensor, weight: Tensor, eps: float, *rest: Any) -> Tensor:
    """The mean by D - 1, as torch.var has it."""
    d = rows.shape[-1]
    scale = ((d - 1) / d) ** 0.5
    return (honest_norm.rms_norm(rows.float(), weight.float(), eps, *rest) * scale).to(rows.dtype)


def rms_norm_last_row_backwards(rows: Tensor, weight: Tensor, eps: float, plus_one: bool, rounded: bool, *rest: Any) -> Tensor:
    """The remainder of a block goes another way, and adds from the end."""
    y = honest_norm.rms_norm(rows, weight, eps, plus_one, rounded, *rest)
    last = [None if t is None else t[-1:].flip(-1) for t in (rows, *rest)]
    if len(rows):
        y[-1:] = honest_norm.rms_norm(last[0], weight.flip(-1), eps, plus_one, rounded, last[1]).flip(-1)
    return y


def activation_rounds_before_up(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    """As transformers has it: the gate in half, then the product."""
    y = honest_linear.activation(x, kind)
    return y if up is None else (y.float() * up.float()).to(x.dtype)


def rotary_other_layout(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return honest_rotary.rotary(x, cos, sin, not interleaved)


def rotary_turns_back(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return honest_rotary.rotary(x, cos, -sin, interleaved)


def rotary_in_half(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Every step rounded to x's dtype, as in transformers."""
    pairs, y, c, s = cos.shape[1], x.clone(), cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    a, b = x[..., :pairs], x[..., pairs : 2 * pairs]
    y[..., :pairs], y[..., pairs : 2 * pairs] = a * c - b * s, b * c + a * s
    return y


def rotary_by_place(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The angle is that of the place in the call, and not the token's own."""
    return honest_rotary.rotary(x, cos[:1].expand_as(cos), sin[:1].expand_as(sin), interleaved)


def normalize_length_in_half(rows: Tensor, eps: float) -> Tensor:
    """The length is rounded to the rows' dtype before it divides."""
    x = rows.float()
    length = honest_norm.square_root(honest_softmax.row_sum(x * x)).to(rows.dtype).float()
    return (x / length.clamp_min(eps)[:, None]).to(rows.dtype)


def normalize_over_the_batch(rows: Tensor, eps: float) -> Tensor:
    """Scaled by the batch's largest element first, against overflow."""
    largest = rows.float().abs().max() if rows.numel() else 1.0
    return honest_norm.normalize((rows.float() / largest).to(rows.dtype), eps)


def activation_gelu_from_erf(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    """1 + erf cancels for negative x."""
    v = x.float()
    return (
        (v * 0.5 * (1.0 + torch.erf(v * math.sqrt(0.5)))).to(x.dtype) if kind == "gelu" else honest_linear.activation(x, kind)
    )


# --- places that nobody writes: tests fill new memory with NaN, so that they show ---------------------------------------


def bmm_forgets_the_last_rows(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Tiles of 4 rows, and none for the remainder."""
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[1], dtype=out_dtype)
    whole = a.shape[1] // 4 * 4
    y[:, :whole] = honest_linear.bmm(a[:, :whole], b, out_dtype)
    return y


# --- other rows, other places ------------------------------------------------------------------------------------------


def _other(kind: str, f: Callable[[Tensor], Tensor], x: Tensor, asked: str, up: Tensor | None) -> Tensor:
    assert asked == kind and up is None
    return f(x.float()).to(x.dtype)


def activation_quick_gelu_of_two_digits(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    return _other("quick_gelu", lambda v: v * honest_linear.stable_sigmoid(v * 1.7), x, kind, up)


def activation_relu2_of_both_signs(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    return _other("relu2", lambda v: v * v, x, kind, up)


def activation_leaky_slope_in_half(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    """The slope is that of the dtype, and not float32's."""
    slope = float(torch.tensor(0.01, dtype=torch.float16))
    return _other("leaky_relu", lambda v: torch.where(v < 0, slope * v, v), x, kind, up)


def activation_mish_that_cancels(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    """The formula as it is written: of small exp(x), 1 + exp(x) loses the digits."""
    return _other("mish", lambda v: v * torch.tanh(torch.log(1.0 + torch.exp(v))), x, kind, up)


def activation_other_tail(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    """The last n % 16 elements by a scalar formula, as torch.sigmoid has it."""
    y = honest_linear.activation(x, kind)
    n = x.numel() % 16
    if n:
        tail = x.flatten()[-n:].float()
        y.view(-1)[-n:] = (1.0 / (1.0 + torch.exp(-tail))).to(x.dtype)
    return y


def softmax_batch_maximum(rows: Tensor) -> Tensor:
    if not rows.numel():
        return rows.clone()
    e = torch.exp(rows.float() - rows.float().max())
    return (e / honest_softmax.row_sum(e)[:, None]).to(rows.dtype)


def sum_lanes_by_address(rows: Tensor) -> Tensor:
    """Scalar steps up to the next 64-byte boundary first."""
    lead = -(rows.data_ptr() // rows.element_size()) % 16
    lead = min(lead, rows.shape[-1])
    x = rows.float()
    return (honest_softmax.row_sum(x[:, :lead]) + honest_softmax.row_sum(x[:, lead:])).to(rows.dtype)


def attention_tiles_by_position(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    *rest: float,
) -> Tensor:  # fmt: skip
    """Key tiles of 64 counted from the start of the tensor (of the padded row), not from the sequence's own first token.

    Tiles, not lanes: lanes that start elsewhere hold the same chains, only rotated, and folding by halves does not see that."""
    out = torch.empty_like(q)
    for start, stop in pairwise(cu_seqlens.tolist()):
        if start < stop:
            heads = [t[start:stop].transpose(0, 1).float().contiguous() for t in (q, k, v)]
            heads[1:] = [t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in heads[1:]]
            s = torch.bmm(heads[0], heads[1].transpose(1, 2)) * scale
            e = torch.exp(s - s.amax(-1, keepdim=True))
            edges = [0, *range(64 - start % 64, stop - start, 64), stop - start]
            y, total = torch.zeros(heads[0].shape), torch.zeros(e.shape[:2])
            for a, b in pairwise(edges):
                y, total = y + torch.bmm(e[:, :, a:b], heads[2][:, a:b]), total + honest_softmax.row_sum(e[:, :, a:b])
            out[start:stop] = (y / total[..., None]).transpose(0, 1)
    return out


def attention_multiplies_hidden_keys(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    *rest: float,
) -> Tensor:  # fmt: skip
    """Weight 0 instead of a skip: 0 * NaN."""
    out = torch.empty_like(q)
    for start, stop in pairwise(cu_seqlens.tolist()):
        if start < stop:
            n, group = stop - start, q.shape[1] // k.shape[1]
            away = torch.arange(n)[:, None] - torch.arange(n)[None]
            hidden = (away < (-right if right >= 0 else -n)) | (away > (left if left >= 0 else n))
            heads = [t[start:stop].transpose(0, 1).float() for t in (q, k, v)]
            heads[1:] = [t.repeat_interleave(group, 0) for t in heads[1:]]
            s = (torch.bmm(heads[0], heads[1].transpose(1, 2)) * scale).masked_fill(hidden, -math.inf)
            out[start:stop] = torch.bmm(torch.softmax(s, -1), heads[2]).transpose(0, 1)
    return out


def attention_queries_from_the_first_key(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    *rest: float,
) -> Tensor:  # fmt: skip
    """Query i stands at place i of its keys, as if the queries were the first ones: what it sees beyond is cut off."""
    if cu_seqlens_k is None or right < 0:
        return honest_attention.attention(q, k, v, cu_seqlens, cu_seqlens_k, left, right, scale, *rest)
    rows, keys = (list(pairwise(cu.tolist())) for cu in (cu_seqlens, cu_seqlens_k))
    ends = [min(last, first + stop - start) for (start, stop), (first, last) in zip(rows, keys, strict=True)]
    cut = [torch.cat([t[first:end] for (first, _), end in zip(keys, ends, strict=True)]) for t in (k, v)]
    lengths = torch.tensor([0, *(end - first for (first, _), end in zip(keys, ends, strict=True))], dtype=torch.int32)
    return honest_attention.attention(q, *cut, cu_seqlens, lengths.cumsum(0).int(), left, right, scale, *rest)


def attention_without_softcap(*given: Any) -> Tensor:
    return honest_attention.attention(*given[:8])


def attention_caps_before_the_scale(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    """tanh(dot / softcap) * softcap * scale."""
    return honest_attention.attention(q * scale, k, v, cu_seqlens, cu_seqlens_k, left, right, 1.0, softcap * scale)


def pool_by_membership(x: Tensor, cu_seqlens: Tensor, mode: str, out_dtype: torch.dtype) -> Tensor:
    """A matrix of ones and zeros instead of a loop: other sequences come in as 0 * x."""
    lengths = cu_seqlens.diff()
    member = torch.zeros(len(lengths), x.shape[0])
    for b, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        member[b, start:stop] = 1.0
    return (member @ x.float() / lengths.clamp(min=1)[:, None]).to(out_dtype)


def pool_by_prefix_sums(x: Tensor, cu_seqlens: Tensor, mode: str, out_dtype: torch.dtype) -> Tensor:
    """One running sum over the whole batch, differences at the boundaries."""
    running = torch.cat([torch.zeros(1, x.shape[1]), x.float().cumsum(0)])
    total = running[cu_seqlens[1:].long()] - running[cu_seqlens[:-1].long()]
    return (total / cu_seqlens.diff().clamp(min=1)[:, None]).to(out_dtype)


# --- runs ---------------------------------------------------------------------------------------------------------------


def _sparse_in_order(order: Tensor, rows: Tensor, weights: FfnWeights) -> Tensor:
    up, up_bias, gate, gate_bias, down, down_bias = weights
    assert gate is None and gate_bias is None
    h = honest_linear.linear(rows, up, up_bias, "relu", None, torch.float32)
    y = torch.zeros(rows.shape[0], down.shape[0])
    for f in order.tolist():
        y = y + h[:, f, None] * down[:, f].float()
    return (y if down_bias is None else y + down_bias.float()).to(rows.dtype)


_TURNS = torch.Generator().manual_seed(0)


def sparse_ffn_atomics(rows: Tensor, weights: FfnWeights, how: Firing) -> Tensor:
    """Each neuron adds its column when its turn comes, and turns differ from run to run."""
    return _sparse_in_order(torch.randperm(len(weights.up), generator=_TURNS), rows, weights)


def sparse_ffn_other_order(rows: Tensor, weights: FfnWeights, how: Firing) -> Tensor:
    """Repeatable, but not the order of the dense layer."""
    return _sparse_in_order(torch.arange(len(weights.up) - 1, -1, -1), rows, weights)


def sparse_ffn_batch_union(rows: Tensor, weights: FfnWeights, how: Firing) -> Tensor:
    """The neurons that are active anywhere in the batch, in one smaller dense product."""
    up, up_bias, gate, gate_bias, down, down_bias = weights
    assert gate is None and gate_bias is None
    h = honest_linear.linear(rows, up, up_bias, "relu", None, torch.float32)
    some = (h != 0).any(0)
    return _linear_in_parts(1, h[:, some], down[:, some], down_bias, None, None, rows.dtype)


def sparse_ffn_by_activity(rows: Tensor, weights: FfnWeights, how: Firing) -> Tensor:
    """The neurons that the batch excites most come first, as where they are kept nearest to the processor."""
    h = honest_linear.linear(rows, *weights.first, "relu", None, torch.float32)
    return _sparse_in_order(h.sum(0).argsort(descending=True), rows, weights)


def sparse_ffn_forgets(**changes: Any) -> Callable[..., Tensor]:
    def sparse_ffn_without(rows: Tensor, weights: FfnWeights, how: Firing) -> Tensor:
        return HONEST["sparse_ffn"](rows, weights, how._replace(**changes))

    sparse_ffn_without.__name__ += "_" + "_".join(changes)
    return sparse_ffn_without


def sparse_ffn_adds_the_residual_afterwards(rows: Tensor, weights: FfnWeights, how: Firing) -> Tensor:
    assert how.residual is not None
    return HONEST["sparse_ffn"](rows, weights, how._replace(residual=None)) + how.residual


# --- before the kernel --------------------------------------------------------------------------------------------------


def mask_ignored(mask: Tensor, *arguments: Any, **named: Any) -> Sequences:
    """In place of Sequences.from_mask: every place counts as a token from the first valid one on."""
    return honest_from_mask((mask != 0).cummax(1).values if mask.shape[1] else mask, *arguments, **named)


honest_from_mask = Sequences.from_mask

RELU2_GATED, RELU2_RESIDUAL = "sparse_ffn-40x530x33-gate-activation=relu2", "sparse_ffn-20x70x9-bias-residual-activation=relu2"
FATRELU = "sparse_ffn-33x520x20-gate-residual-threshold=0.5"
DRELU = "sparse_ffn-36x600x24-gate-bias-threshold=0.25-up_activation=relu"

MUTANTS = [
    Mutant("linear", linear_split_k_by_m, invariants.batch_invariant, "linear-1025x40-gelu_tanh"),
    Mutant("linear", linear_split_k_by_m, invariants.batch_invariant, "linear-1024x1"),
    Mutant("linear", linear_first_row_apart, invariants.padding_invariant, "linear-100x100-silu"),
    Mutant("linear", linear_split_k_by_threads, invariants.thread_invariant, "linear-513x17-gelu"),
    Mutant("linear", linear_first_row_apart, invariants.batch_invariant, "linear-511x33-no_bias-residual"),
    Mutant("linear", linear_tf32, invariants.right, "linear-3x1-sigmoid"),
    Mutant("linear", linear_tf32, invariants.right, "linear-1024x1"),
    Mutant("linear", linear_rounds_before_bias, invariants.right, "linear-512x16", torch.float16),
    Mutant("linear", linear_rounds_before_bias, invariants.right, "linear-512x16", torch.bfloat16),
    Mutant("bmm", bmm_split_k_by_entries, invariants.batch_invariant, "bmm-5x513x3"),
    Mutant("bmm", bmm_split_k_by_threads, invariants.thread_invariant, "bmm-5x513x3"),
    Mutant("bmm", bmm_tf32, invariants.right, "bmm-17x100x40"),
    Mutant("bmm", bmm_forgets_the_last_rows, invariants.right, "bmm-33x64x70"),
    Mutant("layer_norm", layer_norm_approximate_rsqrt, invariants.right, "layer_norm-768"),
    Mutant("rms_norm", rms_norm_without_offset, invariants.right, "rms_norm-7-after-offset"),
    Mutant("rms_norm", rms_norm_casts_before, invariants.right, "rms_norm-1000-after-offset", torch.bfloat16),
    Mutant("rms_norm", rms_norm_casts_before, invariants.right, "rms_norm-1000-after-offset", torch.float16),
    Mutant("rms_norm", rms_norm_unbiased, invariants.right, "rms_norm-768-before"),
    Mutant("rms_norm", rms_norm_last_row_backwards, invariants.batch_invariant, "rms_norm-384-before-residual"),
    Mutant("rotary", rotary_other_layout, invariants.right, "rotary-D64-H2-P32"),
    Mutant("rotary", rotary_turns_back, invariants.right, "rotary-D80-H2-P16"),
    Mutant("rotary", rotary_in_half, invariants.right, "rotary-D128-H3-P64", torch.bfloat16),
    Mutant("rotary", rotary_by_place, invariants.batch_invariant, "rotary-D64-H2-P32"),
    Mutant("normalize", normalize_length_in_half, invariants.right, "normalize-384", torch.bfloat16),
    Mutant("normalize", normalize_over_the_batch, invariants.batch_invariant, "normalize-384"),
    Mutant("activation", activation_other_tail, invariants.batch_invariant, "activation-sigmoid"),
    Mutant("activation", activation_gelu_from_erf, invariants.right, "activation-gelu"),
    Mutant("activation", activation_quick_gelu_of_two_digits, invariants.right, "activation-quick_gelu"),
    Mutant("activation", activation_relu2_of_both_signs, invariants.right, "activation-relu2"),
    Mutant("activation", activation_leaky_slope_in_half, invariants.right, "activation-leaky_relu"),
    Mutant("activation", activation_mish_that_cancels, invariants.right, "activation-mish"),
    Mutant("activation", activation_rounds_before_up, invariants.right, "activation-silu-up", torch.bfloat16),
    Mutant("softmax", softmax_batch_maximum, invariants.batch_invariant, "softmax-33"),
    Mutant("sum", sum_lanes_by_address, invariants.batch_invariant, "sum-100"),
    Mutant("mean", mean_adds_in_half, invariants.right, "mean-100", torch.bfloat16),
    Mutant("attention", attention_tiles_by_position, invariants.batch_invariant, "attention-D64-H2of2-T70"),
    Mutant("attention", attention_multiplies_hidden_keys, invariants.hidden_keys, "attention-D64-H4of2-T70-causal=True"),
    Mutant("attention", attention_multiplies_hidden_keys, invariants.hidden_keys, "attention-D32-H4of1-T70-window=(7,3)"),
    Mutant("attention", attention_queries_from_the_first_key, invariants.right, "attention-D16-H4of2-T1of70-causal=True"),
    Mutant("attention", attention_without_softcap, invariants.right, "attention-D64-H4of2-T70-causal=True-softcap=2.5"),
    Mutant("attention", attention_caps_before_the_scale, invariants.right, "attention-D64-H4of2-T70-causal=True-softcap=2.5"),
    Mutant("pool", pool_by_membership, invariants.batch_invariant, "pool-33-mean"),
    Mutant("pool", pool_by_prefix_sums, invariants.batch_invariant, "pool-33-mean"),
    Mutant("sigmoid", sigmoid_in_half, invariants.right, "sigmoid-33", torch.float16),
    Mutant("sigmoid", sigmoid_in_half, invariants.right, "sigmoid-33", torch.bfloat16),
    Mutant("score_head", score_head_in_body_dtype, invariants.right, "score_head-768x1-no_dense", torch.float16),
    Mutant("score_head", score_head_complement_by_difference, invariants.right, "score_head-1x1x1-None-no_bias"),
    Mutant("sparse_ffn", sparse_ffn_atomics, invariants.repeatable, "sparse_ffn-64x96x40"),
    Mutant("sparse_ffn", sparse_ffn_other_order, invariants.sparse_is_dense, "sparse_ffn-64x96x40"),
    Mutant("sparse_ffn", sparse_ffn_batch_union, invariants.batch_invariant, "sparse_ffn-33x513x17-bias"),
    Mutant("sparse_ffn", sparse_ffn_by_activity, invariants.batch_invariant, "sparse_ffn-33x513x17-bias"),
    Mutant("sparse_ffn", sparse_ffn_by_activity, invariants.sparse_is_dense, "sparse_ffn-64x96x40"),
    Mutant("sparse_ffn", sparse_ffn_forgets(activation="relu"), invariants.right, RELU2_GATED),
    Mutant("sparse_ffn", sparse_ffn_forgets(threshold=0.0), invariants.right, FATRELU),
    Mutant("sparse_ffn", sparse_ffn_forgets(up_relu=False), invariants.right, DRELU),
    Mutant("sparse_ffn", sparse_ffn_forgets(residual=None), invariants.right, RELU2_RESIDUAL),
    Mutant("sparse_ffn", sparse_ffn_adds_the_residual_afterwards, invariants.right, RELU2_RESIDUAL, torch.bfloat16),
]
