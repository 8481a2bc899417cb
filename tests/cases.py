"""The one table of cases: for every op its shapes, its inputs, its float64 truth and the error that is allowed.

Tests, golden hashes and bench/ read the same table. Numbers come from a counter-based generator written out below
(SplitMix64), so that they do not depend on any library's random number generator, and they use exactly the significand bits of
the dtype. Their exponents span eight octaves: with small integers every float32 sum would be exact, and no wrong order would
ever show.
"""

from __future__ import annotations

import importlib
import itertools
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rerank_kernels.backend.registry import OPS
from rerank_kernels.ops.linear import ACTIVATIONS
from rerank_kernels.ops.pooling import POOL_MODES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIGNIFICAND = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_FAMILY = {op: importlib.import_module(f"rerank_kernels.ops.{family}") for op, family in OPS.items()}
FUNCTIONS: dict[str, Callable[..., Any]] = {op: getattr(module, op) for op, module in _FAMILY.items()}
TRUTHS: dict[str, Callable[..., Any]] = {op: getattr(module, f"{op}_truth") for op, module in _FAMILY.items()}

Tensors = dict[str, Tensor]


def every_exponent(dtype: torch.dtype) -> Tensor:
    """Subnormals, infinities and NaN included: every 65,521st float32, or every half."""
    if dtype == torch.float32:
        return torch.arange(-(2**31), 2**31, 65521).to(torch.int32).view(torch.float32)
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def numbers(seed: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Signed numbers of magnitude 2^-6 to 4 times `scale` (a power of two), root mean square near 1.25 * scale."""
    bits = SIGNIFICAND[dtype] - 1
    counter = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    z = counter * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(seed.encode()))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    fraction = (z & np.uint64((1 << bits) - 1)).astype(np.float64) / (1 << bits)
    exponent = ((z >> np.uint64(40)) & np.uint64(7)).astype(np.float64) - 6.0
    sign = 1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)
    exact = torch.from_numpy((sign * (1.0 + fraction) * np.exp2(exponent) * scale).reshape(shape))
    out = exact.to(dtype)
    assert torch.equal(out.double(), exact), f"{seed}: not exact in {dtype}"
    return out


@dataclass(frozen=True)
class Case:
    """One call of one op. `rows`: the arguments with one entry per row (a token, a pair); `shared`: the others."""

    op: str
    label: str
    rows: Mapping[str, tuple[int, ...]]
    shared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()  # of the sequences, for ops over sequences
    keys: tuple[int, ...] = ()  # of the sequences' keys, if those have lengths of their own
    count: int = 37  # rows, for the others: not a multiple of any tile

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def total(self) -> int:
        return sum(self.lengths) if self.lengths else self.count

    def lengths_of(self, name: str) -> tuple[int, ...]:
        """Of the sequences of argument `name`."""
        return self.keys if self.keys and name in ("k", "v") else self.lengths

    def make_rows(self, dtype: torch.dtype, total: int | None = None, salt: str = "") -> Tensors:
        def count(name: str) -> int:
            return total if total is not None else sum(self.lengths_of(name)) if self.lengths else self.count

        return {n: numbers(f"{self} {n} {salt}", (count(n), *s), dtype) for n, s in self.rows.items()}

    def make_shared(self, dtype: torch.dtype) -> Tensors:
        """Weights [N, K] are scaled by about 1 / sqrt(K), so that chains of layers stay in float16's range."""
        scales = {n: 2.0 ** -round(math.log2(math.sqrt(s[1]))) if len(s) == 2 else 1.0 for n, s in self.shared.items()}
        return {n: numbers(f"{self} {n}", s, dtype, scales[n]) for n, s in self.shared.items()}

    def sequences(self, lengths: tuple[int, ...] | None = None, keys: tuple[int, ...] | None = None) -> Tensors:
        """The arguments that say which rows are whose, for ops over sequences: these lengths, or the case's own."""
        given = {"cu_seqlens": self.lengths if lengths is None else lengths} if self.lengths else {}
        if self.keys:
            given["cu_seqlens_k"] = self.keys if keys is None else keys
        return {name: offsets(own) for name, own in given.items()}

    def call(
        self,
        rows: Tensors,
        shared: Tensors,
        lengths: tuple[int, ...] | None = None,
        keys: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, ...]:
        """The public function on these rows; always a tuple, whose tensors have one entry per row or sequence."""
        out = FUNCTIONS[self.op](**rows, **shared, **self.options, **self.sequences(lengths, keys))
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def call_padded(self, rows: Tensors, shared: Tensors, masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The same on padded [B, T, ...] rows, for ops over sequences. masks: "mask" and, for keys, "mask_k", or none."""
        out = FUNCTIONS[self.op](**rows, **shared, **self.options, **masks)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def near(self, rows: Tensors, shared: Tensors, out: tuple[Tensor, ...]) -> tuple[Near, ...]:
        """Truth and allowed error, the rounding to the dtype of `out` included."""
        truths = _NEAR[self.op](self, {n: t.double() for n, t in {**rows, **shared}.items()})
        return tuple(_rounded(t, o.dtype) for t, o in zip(truths, out, strict=True))


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)


def of(family: str) -> list[Case]:
    """Every case of every op that the registry puts into a family: a new op needs no line in its test file."""
    return [case for case in CASES if OPS[case.op] == family]


def get(name: str) -> Case:
    return {str(case): case for case in CASES}[name]


# --- truth and allowed error -------------------------------------------------------------------------------------------

U = 2.0**-24  # half an ulp of 1 in float32
TINY = 2.0**-149  # the smallest step of float32, for what underflows
# Errors of act(v) in units of U * |act(v)|, without what v itself brings in. gelu_tanh adds the rounding of exp's argument.
ACTIVATION_UNITS = {"relu": 0.0, "tanh": 8.0, "sigmoid": 8.0, "silu": 8.0, "gelu": 16.0, "gelu_tanh": 8.0}
ACTIVATION_UNITS |= {"quick_gelu": 8.0, "relu2": 2.0, "leaky_relu": 4.0, "mish": 16.0}
SHORT_GELU = 4.5e-5 / U  # of mode tensor, for a result in half precision
STEEPEST = 1.13  # largest derivative of any activation (gelu) but relu2


class Near(NamedTuple):
    value: Tensor  # float64
    slack: Tensor  # float64, the largest allowed |result - value|
    roundings: int = 1  # to the dtype of the result


def steps(n: int) -> float:
    """Rounding errors of an n-term float32 sum in any order, in units of U * sum|terms|: they add up like a random walk
    (Higham and Mary, 2019), so twice sqrt(n) and a few more; the worst case n * U would let TF32 pass."""
    return 4.0 + 2.0 * math.sqrt(n)


def tensor_steps(k: int) -> float:
    """The same for mode "tensor": an mma adds 16 products and the sum so far; a chip may cut what it aligns instead of rounding
    it, which errs to one side, so errors add up with the number of mmas and not with its root (NUMERICS.md, "Mode tensor")."""
    return 2.0 * (4.0 + 2.0 * math.ceil(k / 16))


def in_tensor_mode(case: Case) -> Case:
    return replace(case, label=f"{case.label}-tensor", options={**case.options, "mode": "tensor"})


def exact(x: Tensor) -> Near:
    return Near(x, torch.zeros_like(x))


def near_linear(x: Near, weight: Tensor, bias: Tensor | None, count: Callable[[int], float] = steps) -> Near:
    magnitude = x.value.abs() @ weight.abs().t()
    if bias is not None:
        magnitude = magnitude + bias.abs()
    slack = x.slack @ weight.abs().t() + count(weight.shape[1]) * U * magnitude
    return Near(TRUTHS["linear"](x.value, weight, bias), slack)


def near_activation(v: Near, kind: str | None, short: bool = False) -> Near:
    """`short`: the form that gelu has in mode tensor."""
    if kind is None:
        return v
    y = TRUTHS["activation"](v.value, kind)
    short = short and kind == "gelu"
    units = torch.full_like(y, SHORT_GELU if short else ACTIVATION_UNITS[kind])
    if kind == "gelu_tanh":
        units = units + 8.0 * (v.value + 0.044715 * v.value**3).abs()
    if kind == "quick_gelu":
        units = units + 8.0 * v.value.abs()
    steepest = 2.0 * v.value.abs() + v.slack if kind == "relu2" else STEEPEST
    # below 2^-126 the factor beside v (Φ, σ) has no more than the smallest steps of float32, and v multiplies their error
    least = 2.0**-126 if short else TINY * (1.0 + v.value.abs())
    return Near(y, steepest * v.slack + units * U * y.abs() + least)


def near_add(a: Near, b: Tensor) -> Near:
    y = a.value + b
    return Near(y, a.slack + U * y.abs())


def _rounded(n: Near, dtype: torch.dtype) -> Near:
    half_ulp = 2.0 ** -SIGNIFICAND[dtype] * n.value.abs() + torch.finfo(dtype).smallest_normal * 2.0 ** -SIGNIFICAND[dtype]
    return Near(n.value, n.slack * 1.01 + n.roundings * half_ulp)


def _near_layer_norm(case: Case, a: Tensors) -> tuple[Near, ...]:
    value = TRUTHS["layer_norm"](**a, **case.options)
    s = a["x"] + a.get("residual", torch.zeros(()))
    d = s.shape[-1]
    sd = (s.var(-1, unbiased=False, keepdim=True) + case.options.get("eps", 1e-5)).sqrt()
    bias = a.get("bias", torch.zeros(()))
    lost_in_mean = steps(d // 32 + 5) * U * s.abs().mean(-1, keepdim=True) + 2 * U * s.abs()
    slack = a["weight"].abs() * lost_in_mean / sd + steps(d // 32 + 8) * U * ((value - bias).abs() + value.abs())
    return (Near(value, slack),)


def _near_rms_norm(case: Case, a: Tensors) -> tuple[Near, ...]:
    """As normalize, and two roundings more: of the sum with a residual, and of the weight with its offset."""
    value = TRUTHS["rms_norm"](**a, **case.options)
    slack = (steps(a["x"].shape[-1] // 32 + 8) + 2.0) * U * value.abs()
    return (Near(value, slack, roundings=2 if case.options["cast"] == "before" else 1),)


def _near_normalize(case: Case, a: Tensors) -> tuple[Near, ...]:
    """Squares are positive, so nothing cancels; the root halves the sum's error."""
    value = TRUTHS["normalize"](a["x"], **case.options)
    return (Near(value, steps(a["x"].shape[-1] // 32 + 8) * U * value.abs()),)


def _near_softmax(case: Case, a: Tensors) -> tuple[Near, ...]:
    x, dim = a["x"], case.options["dim"]
    value = TRUTHS["softmax"](x, dim)
    fall = (x - x.amax(dim, keepdim=True)).abs()
    return (Near(value, (steps(x.shape[dim] // 32 + 5) + 8.0 + fall + fall.amax(dim, keepdim=True)) * U * value + TINY),)


def _near_sum(case: Case, a: Tensors) -> tuple[Near, ...]:
    truth = TRUTHS["sum"] if case.op == "sum" else TRUTHS["mean"]
    return (Near(truth(a["x"], -1), steps(case.rows["x"][0] // 32 + 5) * U * truth(a["x"].abs(), -1)),)


def _counted(case: Case) -> Callable[[int], float]:
    return tensor_steps if case.options.get("mode") == "tensor" else steps


def _near_linear(case: Case, a: Tensors) -> tuple[Near, ...]:
    product = near_linear(exact(a["x"]), a["weight"], a.get("bias"), _counted(case))
    short = case.options.get("mode") == "tensor" and case.options.get("out_dtype") != torch.float32
    y = near_activation(product, case.options.get("activation"), short)
    return (near_add(y, a["residual"]) if "residual" in a else y,)


def _near_activation(case: Case, a: Tensors) -> tuple[Near, ...]:
    y = near_activation(exact(a["x"]), case.options["kind"])
    if "up" in a:
        value = y.value * a["up"]
        y = Near(value, y.slack * a["up"].abs() + U * value.abs())
    return (y,)


def _near_bmm(case: Case, a: Tensors) -> tuple[Near, ...]:
    k = case.rows["a"][1]
    return (Near(TRUTHS["bmm"](a["a"], a["b"]), _counted(case)(k) * U * TRUTHS["bmm"](a["a"].abs(), a["b"].abs())),)


def _near_rotary(case: Case, a: Tensors) -> tuple[Near, ...]:
    """Two products and their sum: what turns with absolute values bounds all three."""
    absolute = {n: t.abs() for n, t in a.items()}
    pairs, halves = a["cos"].shape[-1], absolute["x"].clone()
    first, second = slice(pairs), slice(pairs, 2 * pairs)
    if case.options.get("interleaved"):
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    c, s, u, v = absolute["cos"][:, None], absolute["sin"][:, None], absolute["x"][..., first], absolute["x"][..., second]
    halves[..., first], halves[..., second] = u * c + v * s, v * c + u * s
    halves[..., 2 * pairs :] = 0.0
    return (Near(TRUTHS["rotary"](**a, **case.options), 2.0 * U * halves),)


def _near_attention(case: Case, a: Tensors) -> tuple[Near, ...]:
    options = {k: v for k, v in case.options.items() if k in ("causal", "window", "scale", "softcap")}
    q, k, v = a["q"], a["k"], a["v"]
    spans = [offsets(case.lengths_of(name)).tolist() for name in ("q", "k")]
    value = TRUTHS["attention"](q, k, v, **case.sequences(), **options)
    weighted = TRUTHS["attention"](q, k, v.abs(), **case.sequences(), **options)
    group = q.shape[1] // k.shape[1]
    scale = case.options.get("scale", 1.0 / math.sqrt(q.shape[2]))
    count, slack = _counted(case), torch.zeros_like(value)
    # mode tensor rounds the weights to half precision, above and below the fraction bar; bfloat16's is the coarser one
    rounded = 1.01 * 2.0**-8 if case.options.get("mode") == "tensor" else 0.0
    for (lo, hi), (first, last) in zip(*map(itertools.pairwise, spans), strict=True):
        if lo < hi and first < last:
            keys = k[first:last].repeat_interleave(group, 1).abs()
            largest = torch.einsum("ihd,jhd->ihj", q[lo:hi].abs(), keys).amax(-1, keepdim=True) * abs(scale)
            # tanh is flatter than its argument, and adds its own error, a division's and a product's
            cap = 8.0 * largest.clamp(max=case.options["softcap"]) if "softcap" in case.options else 0.0
            # a score's error is a relative error of its weight, once above and once below the fraction bar
            slack[lo:hi] = 2.0 * ((count(q.shape[2]) + 2.0) * largest + cap) * U * weighted[lo:hi]
            slack[lo:hi] += (2.0 * (count(last - first) + 4.0) * U + rounded) * weighted[lo:hi]
    return (Near(value, slack + 2.0 * TINY),)


def _near_pool(case: Case, a: Tensors) -> tuple[Near, ...]:
    cu, mode = offsets(case.lengths), case.options["mode"]
    value = TRUTHS["pool"](a["x"], mode, cu_seqlens=cu)
    if mode not in ("mean", "weightedmean"):
        return (exact(value),)
    units = torch.tensor([steps(n) for n in case.lengths], dtype=torch.float64)[:, None]
    return (Near(value, units * U * TRUTHS["pool"](a["x"].abs(), mode, cu_seqlens=cu)),)


def _near_score_head(case: Case, a: Tensors) -> tuple[Near, ...]:
    x = exact(a["pooled"])
    if "dense_weight" in a:
        x = near_activation(near_linear(x, a["dense_weight"], a.get("dense_bias")), case.options.get("activation", "tanh"))
    logit = near_linear(x, a["out_weight"], a.get("out_bias"))
    out = [logit]
    for value in (logit.value, -logit.value):
        y = torch.sigmoid(value)
        out.append(Near(y, y * (1.0 - y) * logit.slack * 1.01 + 8.0 * U * y))
    return tuple(out)


def _near_sparse_ffn(case: Case, a: Tensors) -> tuple[Near, ...]:
    gated, count = "gate_weight" in a, _counted(case)  # mode tensor: only what decides which neurons are active
    act, threshold = case.options.get("activation", "relu"), case.options.get("threshold", 0.0)

    def fired(v: Near) -> Near:
        """At the threshold the value jumps by it."""
        y = near_activation(Near(torch.where(v.value <= threshold, torch.zeros_like(v.value), v.value), v.slack), act)
        jump = TRUTHS["activation"](torch.tensor(threshold, dtype=torch.float64), act)
        return Near(y.value, y.slack + jump * ((v.value - threshold).abs() <= v.slack + U * threshold))

    up = near_linear(exact(a["x"]), a["up_weight"], a.get("up_bias"), steps if gated else count)
    if gated:
        gate = fired(near_linear(exact(a["x"]), a["gate_weight"], a.get("gate_bias"), count))
        up = near_activation(up, case.options.get("up_activation"))
        slack = gate.slack * (up.value.abs() + up.slack) + gate.value * up.slack + U * (gate.value * up.value).abs()
        hidden = Near(torch.where(gate.value == 0, gate.value, gate.value * up.value), slack)
    else:
        hidden = fired(up)
    y = near_linear(hidden, a["down_weight"], a.get("down_bias"))
    return (near_add(y, a["residual"]) if "residual" in a else y,)


_NEAR: dict[str, Callable[[Case, Tensors], tuple[Near, ...]]] = {
    "layer_norm": _near_layer_norm,
    "rms_norm": _near_rms_norm,
    "normalize": _near_normalize,
    "softmax": _near_softmax,
    "sum": _near_sum,
    "mean": _near_sum,
    "linear": _near_linear,
    "bmm": _near_bmm,
    "activation": _near_activation,
    "rotary": _near_rotary,
    "attention": _near_attention,
    "pool": _near_pool,
    "sigmoid": lambda case, a: (near_activation(exact(a["x"]), "sigmoid"),),
    "score_head": _near_score_head,
    "sparse_ffn": _near_sparse_ffn,
}


# --- the table ---------------------------------------------------------------------------------------------------------


def _layer_norm(d: int, *, bias: bool = True, residual: bool = False, eps: float = 1e-5) -> Case:
    rows = {"x": (d,), "residual": (d,)} if residual else {"x": (d,)}
    shared = {"weight": (d,), "bias": (d,)} if bias else {"weight": (d,)}
    label = f"{d}{'' if bias else '-no_bias'}{'-residual' if residual else ''}{'' if eps == 1e-5 else f'-eps={eps}'}"
    return Case("layer_norm", label, rows, shared, {"eps": eps})


def _rms_norm(d: int, offset: int = 0, cast: str = "before", *, residual: bool = False, eps: float = 1e-6) -> Case:
    rows = {"x": (d,), "residual": (d,)} if residual else {"x": (d,)}
    label = f"{d}-{cast}{'-offset' if offset else ''}{'-residual' if residual else ''}{'' if eps == 1e-6 else f'-eps={eps}'}"
    return Case("rms_norm", label, rows, {"weight": (d,)}, {"eps": eps, "offset": offset, "cast": cast})


def _reduce(op: str, d: int) -> Case:
    return Case(op, f"{d}", {"x": (d,)}, options={"dim": -1})


def _linear(
    k: int,
    n: int,
    activation: str | None = None,
    *,
    bias: bool = True,
    residual: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Case:
    rows = {"x": (k,), "residual": (n,)} if residual else {"x": (k,)}
    shared = {"weight": (n, k), "bias": (n,)} if bias else {"weight": (n, k)}
    options: dict[str, Any] = {"activation": activation} if activation else {}
    if out_dtype:
        options["out_dtype"] = out_dtype
    words = [f"{k}x{n}", activation, "" if bias else "no_bias", "residual" if residual else "", str(out_dtype or "")[6:]]
    return Case("linear", "-".join(w for w in words if w), rows, shared, options)


def _bmm(m: int, k: int, n: int, out_dtype: torch.dtype | None = None) -> Case:
    options = {"out_dtype": out_dtype} if out_dtype else {}
    label = f"{m}x{k}x{n}{'-' + str(out_dtype)[6:] if out_dtype else ''}"
    return Case("bmm", label, {"a": (m, k), "b": (k, n)}, options=options)


def _attention(
    d: int,
    heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, ...] = (5, 1, 33, 0, 70, 64),
    keys: tuple[int, ...] = (),
    **options: Any,
) -> Case:
    words = [f"{k}={v}".replace(" ", "") for k, v in options.items()]
    places = f"T{max(lengths)}" + (f"of{max(keys)}" if keys else "")
    label = "-".join([f"D{d}", f"H{heads[0]}of{heads[1]}", places, *words])
    rows = {"q": (heads[0], d), "k": (heads[1], d), "v": (heads[1], d)}
    return Case("attention", label, rows, options=options, lengths=lengths, keys=keys)


def _rotary(d: int, pairs: int, heads: int = 2, *, interleaved: bool = False) -> Case:
    rows = {"x": (heads, d), "cos": (pairs,), "sin": (pairs,)}
    label = f"D{d}-H{heads}-P{pairs}{'-interleaved' if interleaved else ''}"
    return Case("rotary", label, rows, options={"interleaved": True} if interleaved else {})


def _pool(d: int, mode: str, lengths: tuple[int, ...] = (5, 1, 33, 0, 130), out_dtype: torch.dtype | None = None) -> Case:
    options: dict[str, Any] = {"mode": mode}
    if out_dtype:
        options["out_dtype"] = out_dtype
    return Case(
        "pool", f"{d}-{mode}{'-' + str(out_dtype)[6:] if out_dtype else ''}", {"x": (d,)}, options=options, lengths=lengths
    )


def _score_head(d: int, p: int, labels: int, activation: str | None = "tanh", bias: bool = True) -> Case:
    shared: dict[str, tuple[int, ...]] = {"out_weight": (labels, p or d)}
    options: dict[str, Any] = {}
    if p:
        shared["dense_weight"] = (p, d)
        options["activation"] = activation
    if bias:
        shared["out_bias"] = (labels,)
        if p:
            shared["dense_bias"] = (p,)
    label = f"{d}x{p}x{labels}-{activation}" if p else f"{d}x{labels}-no_dense"
    return Case("score_head", label + ("" if bias else "-no_bias"), {"pooled": (d,)}, shared, options)


def _sparse_ffn(
    k: int, f: int, d: int, *, gate: bool = False, bias: bool = False, residual: bool = False, **options: Any
) -> Case:
    shared: dict[str, tuple[int, ...]] = {"up_weight": (f, k), "down_weight": (d, f)}
    if gate:
        shared["gate_weight"] = (f, k)
    if bias:
        shared |= {"up_bias": (f,), "down_bias": (d,)} | ({"gate_bias": (f,)} if gate else {})
    words = [word for word, there in (("gate", gate), ("bias", bias), ("residual", residual)) if there]
    label = "-".join([f"{k}x{f}x{d}", *words, *(f"{name}={value}" for name, value in options.items())])
    return Case("sparse_ffn", label, {"x": (k,), **({"residual": (d,)} if residual else {})}, shared, options)


CASES: list[Case] = [
    *(_layer_norm(d) for d in (1, 7, 31, 32, 33, 768)),
    _layer_norm(384, residual=True),
    _layer_norm(1000, bias=False),
    _layer_norm(1024, residual=True, eps=1e-12),
    *(_rms_norm(d) for d in (1, 33, 768)),
    *(_rms_norm(d, 1, "after") for d in (7, 1000)),
    _rms_norm(384, residual=True),
    _rms_norm(100, 1, residual=True, eps=1e-5),
    _rms_norm(1024, 0, "after", residual=True),
    *(Case("normalize", f"{d}", {"x": (d,)}) for d in (1, 7, 32, 33, 384, 1000)),
    Case("normalize", "100-eps=12.5", {"x": (100,)}, options={"eps": 12.5}),  # the length of some rows, not of others
    *(_reduce(op, d) for op in ("softmax", "sum", "mean") for d in (1, 5, 32, 33, 100, 1000)),
    _linear(1, 1),
    _linear(1, 5, bias=False),
    _linear(3, 1, "sigmoid"),
    _linear(33, 2, "relu"),
    _linear(64, 7, residual=True),
    _linear(100, 100, "silu"),
    _linear(384, 48, "tanh"),
    _linear(511, 33, bias=False, residual=True),
    _linear(512, 16),
    _linear(513, 17, "gelu"),
    _linear(768, 96, "gelu", residual=True),
    _linear(1024, 1),
    _linear(1025, 40, "gelu_tanh"),
    _linear(1536, 24, out_dtype=torch.float32),
    *(_linear(40, 24, kind) for kind in ("quick_gelu", "relu2", "leaky_relu", "mish")),
    _bmm(1, 1, 1),
    _bmm(5, 513, 3),
    _bmm(17, 100, 40),
    _bmm(33, 64, 70),
    _bmm(2, 1025, 9, torch.float32),
    *(Case("activation", kind, {"x": (37,)}, options={"kind": kind}) for kind in ACTIVATIONS),
    *(Case("activation", f"{k}-up", {"x": (41,), "up": (41,)}, options={"kind": k}) for k in ("silu", "gelu_tanh", "relu")),
    *(_rotary(*size) for size in ((64, 32), (128, 64, 3), (2, 1, 1), (80, 16), (34, 17, 5), (7, 2, 1))),
    *(_rotary(*size, interleaved=True) for size in ((64, 32), (128, 32, 3), (34, 17), (2, 1, 1), (9, 3, 5))),
    *(_attention(d) for d in (1, 8, 32, 40, 64, 80, 96, 128, 256)),
    _attention(64, (4, 2), causal=True),
    _attention(32, (4, 1), window=(7, 3)),
    _attention(32, (3, 3), window=(-1, 0), scale=0.5),
    _attention(40, (4, 2), causal=True, window=(16, -1)),
    _attention(32, window=(30, -1)),  # for the last of 32 rows a tile of 64 keys hides its first key and no other
    _attention(32, window=(-1, 30)),  # likewise the last key, for the first row
    _attention(64, lengths=(100,)),  # two tiles of scores are kept, the second where Q was: in float32 with these 64 features,
    _attention(128, lengths=(100,)),  # in half precision with 128
    _attention(16, (1, 1), lengths=(520, 3, 1030)),
    _attention(16, (2, 1), lengths=(40, 600), causal=True),
    _attention(16, (4, 2), (1, 1, 1), (70, 1, 33), causal=True),  # decode: the newest query over all keys so far
    # a chunk; more queries than keys, so that some see none; no queries; no keys; as many of both
    _attention(32, (2, 1), (3, 9, 0, 4, 2), (70, 5, 6, 0, 2), window=(40, 3)),
    _attention(8, (2, 2), (5, 9, 2), (65, 4, 0)),  # cross-attention
    _attention(64, (4, 2), causal=True, softcap=2.5),  # scores beside it, far below it and far above
    _attention(40, window=(33, 3), scale=0.5, softcap=50.0),
    _attention(16, (4, 2), (1, 1, 1), (70, 1, 33), causal=True, softcap=1.5),
    *(_pool(d, mode) for d in (1, 33, 384) for mode in ("cls", "mean")),
    _pool(48, "mean", out_dtype=torch.float32),
    *(_pool(33, mode) for mode in POOL_MODES[2:]),
    _pool(7, "weightedmean", (600, 3, 0, 513), torch.float32),  # more than a chunk of 512 tokens
    Case("sigmoid", "33", {"x": (33,)}),
    _score_head(384, 384, 1),
    _score_head(100, 33, 3, "gelu"),
    _score_head(768, 0, 1),
    _score_head(1, 1, 1, None, bias=False),
    _sparse_ffn(64, 96, 40),
    _sparse_ffn(33, 513, 17, bias=True),
    _sparse_ffn(100, 1030, 64, gate=True),
    _sparse_ffn(48, 600, 1, gate=True, bias=True),
    _sparse_ffn(40, 530, 33, gate=True, activation="relu2"),
    _sparse_ffn(20, 70, 9, bias=True, residual=True, activation="relu2"),
    _sparse_ffn(33, 520, 20, gate=True, residual=True, threshold=0.5),
    _sparse_ffn(36, 600, 24, gate=True, bias=True, threshold=0.25, up_activation="relu"),
]
