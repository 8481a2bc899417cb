"""The primitives of csrc/numerics.h: right to a bound in ulp over every exponent, and the same on every instruction set."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

import contract
import rerank_kernels as rk
from tools import fit

_host = pytest.importorskip("rerank_kernels._host", reason="the C++ library was not built")
ISAS = [name for name, there in _host.cpu_features().items() if there]
ROOT = Path(__file__).parents[2]


def sweep(step: int = 4099) -> np.ndarray:
    """float32 values over all signs and exponents: every `step`-th bit pattern (a prime, so that fractions vary), and edges."""
    bits = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32)
    edges = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        math.inf,
        -math.inf,
        88.72283,
        88.722839,
        88.72284,
        -87.33655,
        -103.97208,
        -103.97209,
        -104.0,
    ]
    edges += [0.625, -0.625, 0.62499994, 16.0, -16.0, -14.2, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38]
    x = np.concatenate([bits.view(np.float32), np.array(edges, dtype=np.float32)])
    # and a dense stretch where the functions do their work
    return np.concatenate([x, np.linspace(-20, 20, 400_001, dtype=np.float32)])


def truth(name: str, x: np.ndarray) -> np.ndarray:
    t = torch.from_numpy(x).double()
    out = {
        "exp": lambda: torch.exp(t),
        "sigmoid": lambda: torch.where(t < 0, torch.exp(t) / (1 + torch.exp(t)), 1 / (1 + torch.exp(-t))),
        "tanh": lambda: torch.tanh(t),
        "normcdf": lambda: 0.5 * torch.special.erfc(-t / math.sqrt(2.0)),
        "gelu": lambda: t * 0.5 * torch.special.erfc(-t / math.sqrt(2.0)),
        "gelu_tanh": lambda: t * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (t + 0.044715 * t**3)),
        "silu": lambda: t * torch.sigmoid(t),
        "relu": lambda: torch.relu(t),
        "quick_gelu": lambda: t * torch.sigmoid(float(np.float32(1.702)) * t),
        "relu2": lambda: torch.relu(t) ** 2,
        "leaky_relu": lambda: torch.where(t < 0, float(np.float32(0.01)) * t, t),
        "mish": lambda: t * torch.tanh(torch.log1p(torch.exp(t))),
    }[name]()
    return out.numpy()


def ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """|got - want| in units of the last place of float32 at `want`; 2^-149 for results below the normal range."""
    with np.errstate(over="ignore", invalid="ignore"):
        exponent = np.floor(np.log2(np.maximum(np.abs(want), 2.0**-126)))
        return np.abs(got.astype(np.float64) - want) / np.exp2(np.minimum(exponent, 127) - 23)


# name -> largest error in ulp that NUMERICS.md states, for every finite x
BOUNDS = {
    "exp": 1.0,
    "sigmoid": 2.5,
    "tanh": 2.0,
    "normcdf": 6.0,
    "gelu": 7.0,
    "gelu_tanh": 8.0,
    "silu": 3.5,
    "relu": 0.0,
    "relu2": 0.5,
    "leaky_relu": 0.5,
    "quick_gelu": 4.0,
    "mish": 6.0,
}
# what a rounding of the sigmoid's argument z adds for each unit of |z|
MAGNIFIED = {
    "gelu_tanh": (2.5, lambda x: 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    "quick_gelu": (1.0, lambda x: 1.702 * x),
}
# x times a factor that below this x is a multiple of 2^-149: its error there is |x| 2^-149 more
FACTOR_SUBNORMAL = {"gelu": -12.9, "gelu_tanh": -9.9, "silu": -87.3, "quick_gelu": -51.3, "mish": -87.3}


def excess(name: str, got: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The error in units of what NUMERICS.md allows at each x."""
    want = truth(name, x)
    allowed = np.full(len(x), BOUNDS[name])
    if name in MAGNIFIED:
        share, z = MAGNIFIED[name]
        allowed += share * np.minimum(np.abs(z(x.astype(np.float64))), 104.0)
    if name in FACTOR_SUBNORMAL:
        exponent = np.floor(np.log2(np.maximum(np.abs(want), 2.0**-126)))
        allowed += np.where(x < FACTOR_SUBNORMAL[name], np.abs(x) * 2.0**-149 / np.exp2(exponent - 23), 0.0)
    with np.errstate(invalid="ignore"):
        error = ulps(got, want)
    overflows = np.abs(want) >= 2.0**128 * (1 - 2.0**-25)  # what rounds to infinity in float32
    error[overflows] = np.where(np.isinf(got[overflows]), 0.0, np.inf)
    return np.where(error == 0.0, 0.0, error / np.maximum(allowed, 1e-9))


@pytest.mark.parametrize("name", BOUNDS)
def test_error_bound_in_ulp(name: str) -> None:
    x = np.concatenate([sweep(), np.linspace(-110, -5, 200_001, dtype=np.float32)])
    x = x[np.isfinite(x)]
    over = excess(name, _host.elementwise(name, x, ISAS[0]), x)
    worst = int(over.argmax())
    assert over[worst] <= 1.0, f"{name}({x[worst]!r}) is off by {over[worst]:.3f} times what NUMERICS.md allows"
    assert f"{BOUNDS[name]:g}" in (ROOT / "NUMERICS.md").read_text()


@pytest.mark.parametrize("name", FACTOR_SUBNORMAL)
def test_the_bound_of_a_product_needs_its_second_term(name: str) -> None:
    """The control: without |x| 2^-149 the bound does not hold, and with it an error of twice that is found."""
    x = np.linspace(-110, FACTOR_SUBNORMAL[name], 200_001, dtype=np.float32)
    got = _host.elementwise(name, x, ISAS[0])
    off = got + (2 * np.abs(x) + 400).round().astype(np.float32) * np.float32(2.0**-149)
    assert excess(name, off, x).max() > 1.0
    if name not in MAGNIFIED:  # their other term is as large
        assert ulps(got, truth(name, x)).max() > BOUNDS[name]


def test_truth_agrees_with_mpmath() -> None:
    """The float64 truths are themselves checked, at 40 digits."""
    mpmath.mp.dps = 40
    x = np.array([-13.7, -6.5, -1.25, -1e-3, 0.3, 0.624, 0.626, 2.5, 9.0], dtype=np.float32)
    exact = {
        "exp": mpmath.exp,
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "tanh": mpmath.tanh,
        "normcdf": lambda v: mpmath.erfc(-v / mpmath.sqrt(2)) / 2,
        "gelu": lambda v: v * mpmath.erfc(-v / mpmath.sqrt(2)) / 2,
        "silu": lambda v: v / (1 + mpmath.exp(-v)),
        "mish": lambda v: v * mpmath.tanh(mpmath.log(1 + mpmath.exp(v))),
    }
    for name, f in exact.items():
        want = np.array([float(f(mpmath.mpf(float(v)))) for v in x])
        np.testing.assert_allclose(truth(name, x), want, rtol=1e-13)


@pytest.mark.parametrize("name", BOUNDS)
def test_portable_elementwise_bits(name: str) -> None:
    """avx512 = avx2 = scalar, bit for bit, NaN in NaN out, at every position in a register."""
    x = np.concatenate([sweep(65_537), np.array([np.nan, 3.0, np.nan], dtype=np.float32)])
    want = _host.elementwise(name, x, "scalar")
    for isa in ISAS:
        got = _host.elementwise(name, x, isa)
        assert np.array_equal(np.isnan(got), np.isnan(want))
        same = (got.view(np.uint32) == want.view(np.uint32)) | np.isnan(got)
        assert same.all(), f"{isa}: {name}({x[~same][0]!r}) = {got[~same][0]!r}, scalar {want[~same][0]!r}"
        shifted = _host.elementwise(name, x[5:].copy(), isa)
        assert np.array_equal(shifted.view(np.uint32), got[5:].view(np.uint32)), "a value's bits depend on its place"


def exp_of_all(exp: Callable[[np.ndarray], np.ndarray]) -> None:
    """An exp against the four steps of NUMERICS.md: every 9,973rd float of [-128, -0] and of [0, 89], and a NaN."""
    for first, last in ((0x80000000, 0xC3000000), (0, 0x42B20000)):
        x = np.append(np.arange(first, last, 9973, dtype=np.uint64).astype(np.uint32).view(np.float32), np.float32(np.nan))
        got, want = exp(x), contract.exp(x)
        same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), f"exp({x[~same][0]!r}) = {got[~same][0]!r}, want {want[~same][0]!r}"


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_the_four_steps(isa: str) -> None:
    exp_of_all(lambda x: _host.elementwise("exp", x, isa))


def test_exp_of_the_contract_is_held_to_account() -> None:
    """Other ways to multiply by 2^n, which are as short and not the same."""

    def with_the_last_step(scaled: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        def exp(x: np.ndarray) -> np.ndarray:
            n = np.round(np.clip(x, -128, 89).astype(np.float64) / math.log(2))  # of NaN: NaN
            power = np.nan_to_num(n).astype(np.int32)
            with np.errstate(all="ignore"):
                return scaled((contract.exp(x - np.float32(0)).astype(np.float64) / np.exp2(n)).astype(np.float32), power)

        return exp

    def sum_of_exponents(p: np.ndarray, n: np.ndarray) -> np.ndarray:  # wraps below 2^-126, and makes a number of a NaN
        return (p.view(np.int32) + (n << 23)).view(np.float32)

    def flushed(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        y = np.ldexp(p, n)
        return np.where(np.abs(y) < 2.0**-126, np.float32(0), y)

    for mutant in (sum_of_exponents, flushed):
        with pytest.raises(AssertionError, match=r"exp\(.* want"):
            exp_of_all(with_the_last_step(mutant))


def test_exact_points() -> None:
    def f(name: str, *values: float) -> list[float]:
        return _host.elementwise(name, np.array(values, dtype=np.float32), ISAS[0]).tolist()

    assert f("exp", 0.0, -0.0, -math.inf, -104.0, math.inf, 89.0) == [1.0, 1.0, 0.0, 0.0, math.inf, math.inf]
    assert f("exp", -103.9) == [2.0**-149], "results below 2^-126 are rounded, not flushed"
    assert f("sigmoid", 0.0, math.inf, -math.inf) == [0.5, 1.0, 0.0]
    assert f("tanh", math.inf, -math.inf, 0.0) == [1.0, -1.0, 0.0]
    assert f("normcdf", 0.0, math.inf, -math.inf) == [0.5, 1.0, 0.0]
    assert all(math.isnan(v) for name in BOUNDS for v in f(name, math.nan))


def test_exp2_short() -> None:
    """The bound of NUMERICS.md, and the contract's bits."""
    d = np.concatenate([np.linspace(-800, 0, 400_001, dtype=np.float32), -np.logspace(-30, 3, 40_001, dtype=np.float32)])
    for scale in (0.125, 1.0, 0.08838834764831845, 1e-9, 1e9):
        c, least, scaled = _host.weighing(scale, 0.0)
        assert not scaled
        x = (d * (0.18 / c)).astype(np.float32)
        got, want = _host.exp2_short(x, c, least), np.exp2(x.astype(np.float64) * c)
        normal = want >= 2.0**-126
        assert float((np.abs(got - want)[normal] / want[normal]).max()) < 2.9e-6
        assert float(np.abs(got - want).max()) < 2.9e-6 and (got >= 0).all() and (got[~normal] < 2.0**-125.9).all()
        stated = contract.exp2_short(x, np.float32(c), np.float32(least))
        assert np.array_equal(got.view(np.uint32), stated.view(np.uint32))
    assert "below 2.9e-6" in (ROOT / "NUMERICS.md").read_text()


def test_gelu_short() -> None:
    """The bound of NUMERICS.md in units of float16 and bfloat16, the contract's bits, and what is no number."""
    dense = np.linspace(-13.5, 13.5, 400_001, dtype=np.float32), np.linspace(-13.2, -12.9, 100_001, dtype=np.float32)
    x = np.concatenate([sweep(), *dense])
    got, want = _host.gelu_short(x), truth("gelu", x)
    finite, tiny = np.isfinite(x), truth("normcdf", x) < 2.0**-126
    assert not (tiny & (x > -12.94)).any()
    error = np.abs(got.astype(np.float64) - want)
    assert float(error[finite & tiny].max()) < 2.0**-126
    for bits, least, stated in ((11, -24, 0.07), (8, -133, 0.01)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ulp = np.exp2(np.maximum(np.floor(np.log2(np.abs(want))) - (bits - 1), least))
        assert float((error / ulp)[finite & ~tiny].max()) < stated
        assert (
            f"below {stated:g} ulp of float16" in (text := (ROOT / "NUMERICS.md").read_text())
            or f"{stated:g} ulp of bf" in text
        )
    normal = finite & ~tiny & (np.abs(want) >= 2.0**-126)
    assert float((error[normal] / np.abs(want[normal])).max()) < 4e-5, "what numerics.h says"
    stated_bits = contract.gelu_short(x)
    assert ((got.view(np.uint32) == stated_bits.view(np.uint32)) | (np.isnan(got) & np.isnan(stated_bits))).all()
    ends = _host.gelu_short(np.array([math.inf, -math.inf, math.nan, -0.0, 1e30, -1e30], np.float32))
    assert ends[0] == math.inf and np.isnan(ends[1:3]).all() and ends[4] == np.float32(1e30)
    assert ends[[3, 5]].tolist() == [0.0, 0.0] and np.signbit(ends[[3, 5]]).all()


def test_the_short_forms_are_what_fit_gives(capsys: pytest.CaptureFixture[str]) -> None:
    """Every coefficient that tools/fit.py finds stands in numerics.h and in its Triton twin."""
    fit.main()
    said = capsys.readouterr().out
    found = re.findall(r"x\^\d: (-?0x\S+)f", said[said.index("exp2_short") :])
    assert len(found) == 10
    for path in ("csrc/numerics.h", "rerank_kernels/backend/triton/numerics.py"):
        held = {float.fromhex(h) for h in re.findall(r"-?0x1\.[0-9a-f]*p[+-]?\d+", (ROOT / path).read_text())}
        assert {float.fromhex(h) for h in found} <= held, path


def test_sigmoid_complement_stays_distinct() -> None:
    """Where fp32 scores have reached 1.0, complements still order the documents."""
    logits = np.arange(17.0, 80.0, 0.01, dtype=np.float32)
    score = _host.elementwise("sigmoid", logits, ISAS[0])
    complement = _host.elementwise("sigmoid", -logits, ISAS[0])
    assert (score == 1.0).mean() > 0.99
    assert (np.diff(complement) < 0).all()


def test_the_scores_of_the_tei_report() -> None:
    """Two adjacent fp16 logits give the two scores that users saw for one pair; in fp32 the head keeps the logit."""
    score = rk.sigmoid(torch.tensor([6.96875, 6.97265625], dtype=torch.float16))
    assert score.dtype == torch.float32
    assert [f"{v:.7f}" for v in score.tolist()] == ["0.9990601", "0.9990638"]


def test_the_collapse_that_the_readme_quotes() -> None:
    """What a half-precision head does to 8,001 logits from 6 to 14, and what this one does."""
    logits = torch.arange(6000, 14001).float() / 1000
    half = torch.sigmoid(logits.half())
    assert half.unique().numel() == 6
    assert round(float((half == 1.0).float().mean()), 2) == 0.71
    assert "6 values are distinct and 71 % are exactly 1.0" in (ROOT / "docs" / "USE.md").read_text()
    assert rk.sigmoid(-logits).unique().numel() == 8001, "every complement is distinct"


@pytest.mark.parametrize("isa", ISAS)
def test_half_conversions_are_ieee(isa: str) -> None:
    """All 65,536 patterns widen exactly; stores round to nearest even, ties, overflow and subnormals included."""
    patterns = np.arange(65_536, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        want16 = patterns.view(np.float16).astype(np.float32)
    want_brain = (patterns.astype(np.uint32) << 16).view(np.float32)
    for brain, want in ((False, want16), (True, want_brain)):
        got = _host.widen(patterns, brain, isa)
        same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), f"{isa} brain={brain}: pattern {patterns[~same][0]:#06x}"
    # every boundary between neighbours: the midpoint, and a float32 step to either side
    x = []
    for values in (want16[np.isfinite(want16)], want_brain[np.isfinite(want_brain)]):
        v = np.unique(values).astype(np.float64)
        middle = ((v[1:] + v[:-1]) / 2).astype(np.float32)
        x += [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    x.append(
        np.array([65519.996, 65520.0, 1e6, -1e6, 3.4e38, np.inf, -np.inf, np.nan, 2.98e-8, 2.9802322e-8], dtype=np.float32)
    )
    x32 = np.concatenate(x)
    for brain, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        got = torch.from_numpy(_host.narrow(x32, brain, isa).astype(np.int16)).view(dtype)
        want = torch.from_numpy(x32).to(dtype)
        same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
        assert bool(same.all()), f"{isa} {dtype}: {x32[~same.numpy()][0]!r}"


def test_versions_agree() -> None:
    """numerics.h, the Python constant and NUMERICS.md carry the same numerics version."""
    assert rk.backends()["linear"]["cpu"] == "yes"  # loads the library
    assert torch.ops.rerank_kernels.numerics_version() == rk.NUMERICS_VERSION
    assert f"numerics version {rk.NUMERICS_VERSION}" in (ROOT / "NUMERICS.md").read_text().lower()


def test_contract_flags_are_in_force() -> None:
    """A contracted a * b + c would round once: the probe's product rounds, so the flags' effect is visible in bits."""
    setup = (ROOT / "setup.py").read_text()
    assert "-ffp-contract=off" in setup and not re.search(r"(?<!no-)fast-math|-Ofast|-march=native", setup)
    # silu at x: x * sigmoid(x), two roundings by the contract on every instruction set
    x = np.array([1.1, 2.3, -0.7], dtype=np.float32)
    s = _host.elementwise("sigmoid", x, "scalar")
    for isa in ISAS:
        assert np.array_equal(_host.elementwise("silu", x, isa), x * s)


def fma32(a: float, b: float, c: float) -> float:
    """fma in float32: exact rational arithmetic, rounded once."""
    exact = mpmath.mpf(a) * mpmath.mpf(b) + mpmath.mpf(c)
    with mpmath.workprec(24):
        rounded = +exact
    return float(rounded)


def test_dot_is_the_stated_chain() -> None:
    """linear against the chain of NUMERICS.md, in exact arithmetic: chunks of 512, ascending, one rounding per step."""
    mpmath.mp.prec = 200
    rng = np.random.default_rng(7)
    for k in (1, 511, 512, 513, 1300):
        x = rng.standard_normal(k).astype(np.float32)
        w = rng.standard_normal(k).astype(np.float32)
        total = 0.0
        for k0 in range(0, k, 512):
            chunk = 0.0
            for i in range(k0, min(k0 + 512, k)):
                chunk = fma32(float(x[i]), float(w[i]), chunk)
            total = float(np.float32(total) + np.float32(chunk))
        got = rk.linear(torch.from_numpy(x)[None], torch.from_numpy(w)[None]).item()
        assert struct.pack("f", got) == struct.pack("f", total), (k, got, total)


def test_row_sum_is_the_stated_order() -> None:
    """sum against the 32 lanes of NUMERICS.md, written out."""
    rng = np.random.default_rng(8)
    for n in (1, 31, 32, 33, 100, 777):
        x = rng.standard_normal(n).astype(np.float32)
        lanes = [np.float32(0.0)] * 32
        for i, v in enumerate(x):
            lanes[i % 32] = lanes[i % 32] + v
        for half in (16, 8, 4, 2, 1):
            for i in range(half):
                lanes[i] = lanes[i] + lanes[i + half]
        got = rk.sum(torch.from_numpy(x), 0).numpy()
        assert got.view(np.uint32) == np.float32(lanes[0]).view(np.uint32), n
