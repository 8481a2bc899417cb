"""Mode tensor is what NUMERICS.md, section 4, says: attention and gelu against the words once more in NumPy (contract.py), bit
for bit, on both backends, with tensor cores that add as an H100's do; its errors; and scores of any size, sign and scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import conftest
import contract
import rerank_kernels as rk
import tensor
from cases import numbers, offsets
from conftest import ran
from invariants import all_same, same

_host = pytest.importorskip("rerank_kernels._host", reason="the C++ library was not built")
NAN, INF = float("nan"), float("inf")
F16, BF16 = tensor.HALVES


# Triton compiles for minutes: `make test` has a call of each kind, `make test-all` all of them
served = pytest.mark.parametrize(
    "by", [pytest.param(b, marks=[pytest.mark.exhaustive] * (b == "triton")) for b in tensor.BACKENDS]
)
SHORT = ("linear-768x96-gelu-residual", "attention-D32-H4of1-T70-window=(7,3)")


def head(n: int, d: int, dtype: torch.dtype, keys: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q = numbers(f"q {n} {d}", (n, d), dtype)
    k, v = (numbers(f"{name} {n} {d}", (keys or n, d), dtype) for name in "kv")
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    cu = offsets((len(q),)), offsets((len(k),))
    return rk.attention(q[:, None], k[:, None], v[:, None], cu_seqlens=cu[0], cu_seqlens_k=cu[1], mode="tensor", **options)[
        :, 0
    ]


def stated(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False, **options: Any) -> Tensor:
    scale = 1.0 / math.sqrt(q.shape[1]) if scale is None else scale
    left, right = options.pop("window", (-1, -1))
    return contract.attention_tensor(q, k, v, scale, _host.weighing(scale, 0.0), left, 0 if causal else right, **options)


def as_stated(by: str, n: int, d: int, dtype: torch.dtype, **options: Any) -> None:
    q, k, v = head(n, d, dtype)
    same(attention(q, k, v, **options), stated(q, k, v, **options), f"{by}, {n} tokens, {d} features, {options}")


# one part, two parts and two tiles of keys; every width; what is folded into c and what is not
EXPRESSIONS: list[tuple[int, int, torch.dtype, dict[str, Any]]] = [
    (150, 64, F16, {}),
    (150, 64, BF16, dict(causal=True)),
    (200, 64, F16, dict(window=(20, 9))),
    (300, 64, F16, dict(window=(130, 5))),
    (70, 64, F16, dict(scale=-0.5)),
    (70, 64, BF16, dict(scale=1e-30)),
    (140, 1, F16, {}),
    (140, 40, BF16, {}),
    (140, 96, F16, {}),
    (140, 128, BF16, {}),
    (140, 200, F16, {}),
    (140, 256, F16, dict(causal=True)),
]


@served
@pytest.mark.parametrize(("n", "d", "dtype", "options"), EXPRESSIONS, ids=lambda x: str(x).replace("torch.", ""))
def test_attention_is_the_stated_expression(by: str, n: int, d: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    ran(by)
    with tensor.simulated(by, tensor.H100):
        as_stated(by, n, d, dtype, **options)


@pytest.mark.parametrize(
    "tensor_case",
    [pytest.param(c, marks=[pytest.mark.exhaustive] * (str(c).removesuffix("-tensor") not in SHORT)) for c in tensor.CASES],
    ids=str,
)
def test_both_backends_give_the_same_bits(tensor_case: cases.Case) -> None:
    """On one arithmetic class."""
    for b in tensor.BACKENDS:
        ran(b)
    for dtype in tensor.HALVES if str(tensor_case).removesuffix("-tensor") not in SHORT else (F16,):
        out = []
        for b in tensor.BACKENDS:
            with tensor.simulated(b, tensor.H100):
                out.append(tensor_case.call(tensor_case.make_rows(dtype), tensor_case.make_shared(dtype)))
        all_same(out[1], out[0], f"{tensor_case}, {' against '.join(tensor.BACKENDS[::-1])}")


@pytest.mark.parametrize("by", tensor.BACKENDS)
def test_attention_of_several_tiles(by: str) -> None:
    """The form of the above that `make test` runs on both, with a maximum that grows from tile to tile: all is rescaled."""
    ran(by)
    q, k, v = head(150, 64, F16)
    k = k * torch.linspace(0.1, 1.0, 150).to(F16)[:, None]
    with tensor.simulated(by, tensor.H100):
        got = attention(q, k, v, causal=True)
    same(got, stated(q, k, v, causal=True), by)
    with pytest.raises(AssertionError, match="values differ"):  # the control: the tile is in the expression
        same(got, stated(q, k, v, causal=True, tile=64), "tiles of 64 keys")


@pytest.mark.parametrize("dtype", tensor.HALVES, ids=lambda d: str(d)[6:])
@served
def test_gelu_is_the_stated_expression(by: str, dtype: torch.dtype) -> None:
    ran(by)
    with tensor.simulated(by, tensor.H100):
        gelu_as_stated(by, dtype)


def gelu_as_stated(by: str, dtype: torch.dtype) -> None:
    """x itself is the sum: 1 times x and zeros. For a float32 result it is the long form."""
    x = torch.linspace(-14, 14, 4096).to(dtype)
    x[:7] = torch.tensor([NAN, INF, -INF, -0.0, 1e-7, 6e4, -6e4]).to(dtype)
    rows = torch.zeros(len(x), 16, dtype=dtype)
    rows[:, 3] = x
    weight = torch.zeros(1, 16, dtype=dtype)
    weight[0, 3] = 1.0
    half = rk.linear(rows, weight, activation="gelu", mode="tensor")[:, 0]
    long = rk.linear(rows, weight, activation="gelu", out_dtype=torch.float32, mode="tensor")[:, 0]
    total = x.float().numpy() + np.float32(0)
    same(half, torch.from_numpy(contract.gelu_short(total)).to(dtype), f"{by}, gelu in {dtype}")
    same(long, torch.from_numpy(_host.elementwise("gelu", total, "scalar")), f"{by}, gelu in float32")
    assert not torch.equal(half.nan_to_num(), long.to(dtype).nan_to_num()), "the forms agree in all: this shows nothing"


# ---- errors, in units of what the values weigh: |y - truth| / Σ w |v| -----------------------------------------------------

ERRORS = {F16: 2.0**-11, BF16: 2.0**-8}  # NUMERICS.md: two halves of an ulp, of a weight and of the sum of weights


def error(got: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> float:
    """Without the rounding of the result itself."""
    cu = dict(cu_seqlens=offsets((len(q),)), cu_seqlens_k=offsets((len(k),)))
    a, b, c = (t.double()[:, None] for t in (q, k, v))
    truth, size = (cases.TRUTHS["attention"](a, b, x, **cu, **options)[:, 0] for x in (c, c.abs()))
    off = (got.double() - truth).abs() - 2.0 ** -cases.SIGNIFICAND[got.dtype] * truth.abs() - torch.finfo(got.dtype).tiny
    return float((off / size.clamp(min=1e-30)).max())


@pytest.mark.parametrize("dtype", tensor.HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("n", "keys"), [(1, 1), (17, 17), (64, 64), (128, 128), (129, 129), (20, 700), (16, 2048)])
def test_errors(n: int, keys: int, dtype: torch.dtype) -> None:
    ran("cuda")
    q, k, v = head(n, 64, dtype, keys)
    for options in ({}, dict(causal=True), dict(softcap=2.0)):
        with tensor.simulated("cuda", tensor.H100):
            got = attention(q, k, v, **options)
        off = error(got, q, k, v, **options)
        assert off < ERRORS[dtype], f"{n} of {keys}, {options}: {off:.3g}, stated {ERRORS[dtype]:.3g}"


@pytest.mark.parametrize("size", [1e2, 1e6, 1e18])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_any_size(size: float, sign: float) -> None:
    """Up to where float32 ends: one key has all the weight, or several that are equal; nothing overflows on the way."""
    ran("cuda")
    q, k, v = head(40, 64, BF16)
    k[7], k[21] = k[3], k[3]
    q = (q.float() * size).to(BF16)
    with tensor.simulated("cuda", tensor.H100):
        got = attention(q, k, v, scale=sign)
    truth = cases.TRUTHS["attention"](*(t.double()[:, None] for t in (q, k, v)), cu_seqlens=offsets((40,)), scale=sign)[:, 0]
    # a score's own error is a relative error of its weight: rows whose two best keys are nearer than that are nobody's
    s = q.double() @ k.double().t() * sign
    best = s.topk(4, -1).values
    bound = cases.tensor_steps(64) * cases.U * (q.double().abs() @ k.double().abs().t()).amax(-1)
    sure = ((best[:, :1] == best[:, 1:]) | (best[:, 0, None] - best[:, 1:] > 20.0 + 2.0 * bound[:, None])).all(-1)
    assert size < 1e6 or sure.sum() > 20
    assert got.isfinite().all()
    assert float((got.double() - truth).abs()[sure].max()) <= 2.0**-7 * float(v.abs().max())


def test_scores_beyond_float32_are_nan() -> None:
    ran("cuda")
    q, k, v = (t.abs() for t in head(40, 64, BF16))
    big = [(t.float() * 1e30).to(BF16) for t in (q, k)]
    with tensor.simulated("cuda"):  # what a chip makes of sums that leave float32's range nobody has asked one
        assert attention(*big, v).isnan().all()
        assert attention(big[0], -big[1], v).isnan().all(), "every score is -inf"
    k[5] = -INF  # one score of -inf among finite ones is a weight of 0
    with tensor.simulated("cuda", tensor.H100):
        assert attention(q, k, v).isfinite().all()


@served
def test_a_window_without_an_end_and_rows_that_see_nothing(by: str) -> None:
    """More queries than keys: places below 0, from which as many keys as an int32 can say are looked back."""
    ran(by)
    q, k, v = head(40, 64, F16, 20)
    with tensor.simulated(by, tensor.H100):
        got = attention(q, k, v, window=(2**31 - 1, 3))
    same(got, stated(q, k, v, window=(-1, 3)), by)
    assert not got[:17].any() and got[17:].any(1).all()


def test_weights_add_to_one() -> None:
    """Of values that are all 1 the result is 1 exactly: numerator and denominator are one and the same chain."""
    ran("cuda")
    for dtype in tensor.HALVES:
        q, k, v = head(300, 64, dtype)
        with tensor.simulated("cuda", tensor.H100):
            y = attention(q, k, torch.ones_like(v))
        assert (y == 1.0).all()


# ---- what the host makes of scale and softcap ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.125, 1.0, 0.0884, 0.5, 3.7e4, 1e15, 1e-15, 2.0**-64, 1e-19, 1e30, 0.0, -1.0, 1e-45])
@pytest.mark.parametrize("softcap", [0.0, 50.0])
def test_weighing(scale: float, softcap: float) -> None:
    """The same in C++ and for Triton; the smallest float32 with least * c >= -127, whose weight is nothing."""
    c, least, scaled = _host.weighing(scale, softcap)
    if conftest.missing("triton") is None:
        from rerank_kernels.backend.triton.attention import weighing

        assert weighing(scale, softcap) == (c, least, scaled)
    assert c > 0 and scaled == (softcap != 0 or not 2.0**-64 <= np.float32(scale) * math.log2(math.e) <= 2.0**64)
    assert least * c >= -127 > float(np.nextafter(np.float32(least), np.float32(-INF))) * c
    got = _host.exp2_short(np.array([0.0, -0.0, least, -INF, NAN], np.float32), c, least)
    assert got[:2].tolist() == [1.0, 1.0] and (got[2:] >= 0).all() and (got[2:] < 2.0**-140).all()
    assert not torch.from_numpy(got[2:]).to(BF16).any()
