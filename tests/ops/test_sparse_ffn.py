"""sparse_ffn: skipping zero activations changes no bit."""

from __future__ import annotations

import math

import pytest
import torch

import cases
import invariants
from cases import Case, numbers
from conftest import require
from invariants import same
from rerank_kernels.backend import registry
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.sparse_ffn import sparse_ffn

CASES = cases.of("sparse_ffn")
NAN, INF = float("nan"), float("inf")


class TestSparseFfn(invariants.Promises):
    def test_sparse_is_dense(self, backend: Backend, case: Case, dtype: torch.dtype) -> None:
        invariants.sparse_is_dense(case, dtype)


def sparse_inputs(dtype: torch.dtype, active: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, up, up_bias, down with exactly `active` of 700 neurons on for every token."""
    x, up, down = numbers("x", (6, 20), dtype), numbers("up", (700, 20), dtype, 2.0**-6), numbers("down", (33, 700), dtype)
    bias = torch.full((700,), -100.0, dtype=dtype)
    bias[torch.arange(active) * 37 % 700] = 100.0
    return x, up, bias, down


@pytest.mark.parametrize("active", [0, 1, 2, 16, 70, 699, 700])
def test_any_sparsity(backend: Backend, active: int, dtype: torch.dtype) -> None:
    x, up, bias, down = sparse_inputs(dtype, active)
    y = sparse_ffn(x, up, down, up_bias=bias)
    # the neurons that are off, taken out of the weights: where bits are machine-invariant they are no-ops in their chunk of 512
    on = bias > 0
    dense = torch.relu(x.double() @ up.double().t() + bias.double())
    assert bool(((dense != 0) == on).all())
    want = dense @ down.double().t()
    tolerance = 2.0 ** -cases.SIGNIFICAND[dtype] * want.abs() + 64 * cases.U * (dense @ down.double().abs().t())
    assert bool(((y.double() - want).abs() <= tolerance).all())
    if not active:
        same(y, torch.zeros_like(y), "nobody active")


def test_inactive_weights_are_not_read_into_the_sum(backend: Backend) -> None:
    """Large finite weights of silent neurons leave no trace."""
    x, up, bias, down = sparse_inputs(torch.float32, 50)
    want = sparse_ffn(x, up, down, up_bias=bias)
    changed = torch.where(bias[None] > 0, down, torch.full_like(down, 3.0e38))
    same(sparse_ffn(x, up, changed, up_bias=bias), want, "other weights for inactive neurons")


def test_special_activations(backend: Backend) -> None:
    x, up, bias, down = sparse_inputs(torch.float32, 50)
    want = sparse_ffn(x, up, down, up_bias=bias)
    poisoned = x.clone()
    poisoned[2, 5] = NAN
    y = sparse_ffn(poisoned, up, down, up_bias=bias)
    assert bool(y[2].isnan().all()), "NaN counts as active"
    keep = torch.arange(6) != 2
    same(y[keep], want[keep], "the other tokens")


def test_shut_gate_skips_an_overflow(backend: Backend) -> None:
    x = torch.full((1, 4), 2.0)
    up, gate, down = torch.full((3, 4), 1e38), torch.tensor([[-1.0] * 4, [1.0] * 4, [0.0] * 4]), torch.ones(2, 3)
    up[1] = 0.25
    same(sparse_ffn(x, up, down, gate_weight=gate), torch.full((1, 2), 16.0), "up = inf behind a shut gate")


def test_output_dtype(backend: Backend, dtype: torch.dtype) -> None:
    x, up, bias, down = sparse_inputs(dtype, 90)
    wide = sparse_ffn(x.float(), up.float(), down.float(), up_bias=bias.float())
    same(sparse_ffn(x, up, down, up_bias=bias), wide.to(dtype), "float32 inside, rounded once")


def on_the_edge() -> tuple[torch.Tensor, ...]:
    """x, up, bias, down whose pre-activations are a few float32 steps to either side of 0, for one token."""
    x, up, down = (numbers(n, s, torch.float32) for n, s in (("x", (1, 600)), ("up", (300, 600)), ("down", (40, 300))))
    steps = torch.arange(-150, 150).float()
    bias = -linear(x, up)[0]
    bias = bias + steps * torch.finfo(torch.float32).eps * bias.abs()
    return x, up, bias, down


@pytest.mark.promise("machine-invariant")
def test_screening_costs_no_bit(backend: Backend) -> None:
    """One row is screened with copies in 8 bits per weight, which take most of these neurons for the wrong side of 0."""
    screening_costs_no_bit()


def test_screening_on_every_instruction_set(isa: str) -> None:
    for name in ("scalar", isa):
        invariants.force_isa(name)
        screening_costs_no_bit()
        screening_of_huge_inputs_and_infinite_weights()


def screening_costs_no_bit() -> None:
    x, up, bias, down = on_the_edge()
    exact = linear(x, up, bias)
    rough = linear(x, up.bfloat16(), bias)  # closer than the copies are
    assert int(((exact > 0) != (rough > 0)).sum()) > 50, "the case has no power: the copy errs nowhere"
    for scale in (1.0, 1e-3, 1e3, 1e-25, 1e18):  # out to where the bound must not be trusted
        h = linear(x * scale, up, bias * scale, activation="relu")
        same(sparse_ffn(x * scale, up, down, up_bias=bias * scale), linear(h, down), f"sparse against dense, scale {scale:g}")


@pytest.mark.parametrize("column", [1, 3], ids=["of the coarse copy", "of both copies"])
def test_screening_without_its_bound_is_caught(column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu's kernels are the only ones that screen."""
    require("cpu")
    from rerank_kernels.backend.native import sparse_ffn as native

    honest = native.screen

    def without(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        coarse, rest, bounds = honest(weight)
        bounds = bounds.clone()
        bounds[:, column] = 1e-29
        return coarse, rest, bounds

    monkeypatch.setattr(native, "screen", without)
    with registry.use("cpu"), pytest.raises(AssertionError, match="sparse against dense"):
        screening_costs_no_bit()


def test_screening_bounds_hold() -> None:
    """bound * |x| is above the error of the copies, in float64, for random and for adversarial rows; and it is not idle."""
    weights = pytest.importorskip("rerank_kernels.backend.weights")
    require("cpu")
    w = numbers("w", (200, 1100), torch.float32)
    w[3] = 0.0
    w[4] *= 1e-42  # subnormal: its scale is 0, and all of it is left out
    w[5, 7] = 1e4
    coarse, rest, bounds = weights.screen(w)
    assert int(coarse[0].abs().max()) == 127, "the scale is the row's own"
    scales = bounds.double()
    about = scales[:, 0:1] * coarse.double()
    closer = about + scales[:, 2:3] * rest.double()
    for copy, bound, idle in ((about, scales[:, 1], 0.05), (closer, scales[:, 3], 5e-4)):
        for x in (numbers("x", (1, 1100), torch.float32)[0], (w - copy.float())[7], torch.ones(1100)):
            norm = x.double().norm()
            assert bool((((w.double() - copy) @ x.double()).abs() <= bound * norm).all())
        weights = w.double().norm(dim=1)
        tight = (bound <= idle * weights) | (weights < 1e-30)
        assert bool(tight.all()), "a bound this loose screens nothing"


def test_screening_of_huge_inputs_and_infinite_weights() -> None:
    require("cpu")
    with registry.use("cpu"):
        screening_of_huge_inputs_and_infinite_weights()


def screening_of_huge_inputs_and_infinite_weights() -> None:
    """What would overflow in the copies' sums is looked at exactly."""
    x, up, down = torch.full((1, 64), 1e37), torch.full((3, 64), -1e-36), torch.ones(2, 3)
    up[1] = 1e-36
    same(sparse_ffn(x, up, down), linear(linear(x, up, activation="relu"), down), "huge inputs, tiny weights")
    up[2, 5] = -math.inf
    same(sparse_ffn(torch.ones(1, 64), up, down), linear(linear(torch.ones(1, 64), up, activation="relu"), down), "-inf")


def test_errors(backend: Backend) -> None:
    x, up, down = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"sparse_ffn: up_weight must be \[F, 3\], got \[5, 4\]"):
        sparse_ffn(x, torch.zeros(5, 4), down)
    with pytest.raises(ValueError, match=r"sparse_ffn: down_weight must be \[D, 5\], got \[5, 4\]"):
        sparse_ffn(x, up, torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"sparse_ffn: gate_weight must be \[5, 3\], got \[4, 3\]"):
        sparse_ffn(x, up, down, gate_weight=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"sparse_ffn: gate_bias must be left out without gate_weight"):
        sparse_ffn(x, up, down, gate_bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"sparse_ffn: down_bias must be \[4\], got \[5\]"):
        sparse_ffn(x, up, down, down_bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"sparse_ffn: x must be \[\.\.\., K\] with K > 0"):
        sparse_ffn(torch.zeros(2, 0), torch.zeros(5, 0), down)


# ---- candidates --------------------------------------------------------------------------------------------------------------


def proposed(m: int = 37, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The arguments of a gated layer, and about a third of its neurons for each row."""
    shapes = {"x": (m, 33), "up_weight": (600, 33), "gate_weight": (600, 33), "down_weight": (20, 600)}
    arguments = {name: numbers(name, s, dtype, 2.0**-3 if name != "x" else 1.0) for name, s in shapes.items()}
    return arguments, numbers("candidates", (m, 600), torch.float32) > 0.4


def few_and_many(arguments: dict[str, torch.Tensor], candidates: torch.Tensor, **options: object) -> None:
    """Row by row, in threes, and all at once, against the dense layer with zeros where a neuron was omitted."""
    x = arguments["x"]
    gate, up = (linear(x, arguments[name], out_dtype=torch.float32) for name in ("gate_weight", "up_weight"))
    off = (gate <= options.get("threshold", 0.0)) | ~candidates
    hidden = torch.where(off, torch.zeros_like(gate), gate * up)
    want = linear(hidden, arguments["down_weight"], out_dtype=x.dtype)
    for step in (1, 3, 37):
        parts = [
            sparse_ffn(**{**arguments, "x": rows}, candidates=some, **options)  # type: ignore[arg-type]
            for rows, some in zip(x.split(step), candidates.split(step), strict=True)
        ]
        same(torch.cat(parts), want, f"candidates, {step} rows at a time")


def test_candidates(backend: Backend, dtype: torch.dtype) -> None:
    arguments, candidates = proposed(dtype=dtype)
    few_and_many(arguments, candidates)
    few_and_many(arguments, candidates, threshold=0.25)
    everyone = torch.ones_like(candidates)
    same(sparse_ffn(**arguments, candidates=everyone), sparse_ffn(**arguments), "all are candidates")
    nobody = sparse_ffn(**arguments, candidates=~everyone)
    same(nobody, torch.zeros_like(nobody), "nobody is")


def test_candidates_that_are_forgotten_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from rerank_kernels.backend import firing

    monkeypatch.setattr(firing.Firing, "plain", True)
    with registry.use("pytorch"):
        few_and_many(*proposed())  # it does not ask
    require("cpu")
    with registry.use("cpu"), pytest.raises(AssertionError, match="37 rows at a time"):
        few_and_many(*proposed())


def test_what_is_omitted_is_not_looked_at(backend: Backend) -> None:
    """Weights of neurons that no row proposes may be NaN, but for down's, which are finite everywhere."""
    arguments, candidates = proposed(3)
    candidates[:, 100:200] = False
    want = sparse_ffn(**arguments, candidates=candidates)
    for name in ("gate_weight", "up_weight"):
        arguments[name] = arguments[name].clone()
        arguments[name][100:200] = NAN
    same(sparse_ffn(**arguments, candidates=candidates), want, "NaN in weights of omitted neurons")


def test_a_nan_passes_a_threshold(backend: Backend) -> None:
    arguments, _ = proposed(9)
    want = sparse_ffn(**arguments, threshold=0.5)
    arguments["x"][4, 2] = NAN
    for rows in (slice(0, 9), slice(3, 6)):
        y = sparse_ffn(**{**arguments, "x": arguments["x"][rows]}, threshold=0.5)
        assert bool(y[4 - rows.start].isnan().all())
        same(y[: 4 - rows.start], want[rows.start : 4], "rows before it")


@pytest.mark.promise("machine-invariant")
def test_screening_with_a_threshold_costs_no_bit(backend: Backend) -> None:
    x, up, bias, down = on_the_edge()
    for options in ({"threshold": float(bias.abs().mean()) * 1e-6}, {"activation": "relu2"}):
        first = linear(x, up, bias)
        hidden = torch.where(first > options.get("threshold", 0.0), first, torch.zeros_like(first))
        hidden = hidden * hidden if "activation" in options else hidden
        assert 0.2 < float((hidden > 0).double().mean()) < 0.8
        same(sparse_ffn(x, up, down, up_bias=bias, **options), linear(hidden, down), f"sparse against dense, {options}")


def test_errors_of_what_makes_a_neuron_active(backend: Backend) -> None:
    arguments, candidates = proposed(3)
    with pytest.raises(ValueError, match=r"sparse_ffn: activation must be one of 'relu', 'relu2', got 'silu'"):
        sparse_ffn(**arguments, activation="silu")
    with pytest.raises(ValueError, match=r"sparse_ffn: up_activation must be one of None, 'relu', got 'relu2'"):
        sparse_ffn(**arguments, up_activation="relu2")
    for wrong in (-0.5, NAN, INF, True, "0"):
        with pytest.raises(ValueError, match=r"sparse_ffn: threshold must be a finite number >= 0, got "):
            sparse_ffn(**arguments, threshold=wrong)
    with pytest.raises(ValueError, match=r"sparse_ffn: candidates must be \[3, 600\], got \[3, 599\]"):
        sparse_ffn(**arguments, candidates=candidates[:, 1:])
    with pytest.raises(ValueError, match=r"sparse_ffn: candidates must be \[3, 600\], got \[600\]"):
        sparse_ffn(**arguments, candidates=candidates[0])
    with pytest.raises(TypeError, match=r"candidates must be a dense tensor of torch.bool, got torch.float32; pass torch.as_"):
        sparse_ffn(**arguments, candidates=candidates.float())
    same(
        sparse_ffn(**arguments, candidates=torch.as_tensor(candidates.float()) != 0),
        sparse_ffn(**arguments, candidates=candidates),
        "as the message says",
    )
    with pytest.raises(ValueError, match=r"sparse_ffn: residual must be \[3, 20\], got \[3, 33\]"):
        sparse_ffn(**arguments, residual=arguments["x"])
    del arguments["gate_weight"]
    with pytest.raises(ValueError, match=r"sparse_ffn: up_activation must be left out without gate_weight, got relu"):
        sparse_ffn(**arguments, up_activation="relu")
