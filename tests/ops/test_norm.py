"""layer_norm: y = (s - mean) / sqrt(var + eps) * weight + bias with s = x + residual; rms_norm: y = s / sqrt(mean(s²) + eps) *
weight; normalize: y = x / max(|x|, eps)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import cases
import contract
import invariants
from cases import numbers
from invariants import same
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops.norm import layer_norm, layer_norm_truth, normalize, normalize_truth, rms_norm

CASES = cases.of("norm")


class TestNorm(invariants.Promises):
    pass


@pytest.mark.promise("machine-invariant")
@pytest.mark.parametrize("d", [1, 5, 32, 33, 384, 1000])
def test_order_of_the_sums(backend: Backend, d: int) -> None:
    x, w, b = numbers("x", (6, d), torch.float32), numbers("w", (d,), torch.float32), numbers("b", (d,), torch.float32)
    same(layer_norm(x, w, b, 1e-5), contract.layer_norm(x, w, b, 1e-5), f"D = {d}, kernel against the contract in NumPy")


@pytest.mark.parametrize("offset", [100.0, 1000.0])
def test_large_mean_costs_no_digits(backend: Backend, offset: float) -> None:
    """var as mean of squares minus square of the mean would have lost 7 to 13 of float32's 24 bits here."""
    x = numbers("x", (4, 96), torch.float32) + offset
    error = (layer_norm(x, torch.ones(96)).double() - layer_norm_truth(x, torch.ones(96).double())).abs().max()
    assert float(error) < offset * 2.0**-20


def test_residual_is_not_rounded(backend: Backend, dtype: torch.dtype) -> None:
    x, r = numbers("x", (4, 50), dtype), numbers("r", (4, 50), dtype, 2.0**-6)
    w, b = numbers("w", (50,), dtype), numbers("b", (50,), dtype)
    wide = layer_norm(x.float() + r.float(), w.float(), b.float())
    same(layer_norm(x, w, b, residual=r), wide.to(dtype), "x + residual stays float32")


def test_constant_row(backend: Backend, dtype: torch.dtype) -> None:
    x, b = torch.full((2, 40), 3.0, dtype=dtype), numbers("b", (40,), dtype)
    same(layer_norm(x, torch.ones(40, dtype=dtype), b), b.expand(2, 40), "no variance leaves the bias")
    assert layer_norm(x, torch.ones(40, dtype=dtype), eps=0.0).isnan().all(), "0 / 0"


def test_mixed_dtypes(backend: Backend) -> None:
    x, w = numbers("x", (3, 20), torch.bfloat16), numbers("w", (20,), torch.float32)
    same(layer_norm(x, w), layer_norm(x.float(), w).bfloat16(), "float32 weight on bfloat16 rows")


def test_errors(backend: Backend) -> None:
    x, w = torch.zeros(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"layer_norm: weight must be \[3\], got \[4\]"):
        layer_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \[3\], got \[1, 3\]"):
        layer_norm(x, w, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"layer_norm: x must be \[\.\.\., D\] with D > 0, got \[2, 0\]"):
        layer_norm(torch.zeros(2, 0), torch.ones(0))
    with pytest.raises(ValueError, match=r"layer_norm: eps must be a number >= 0, got -1"):
        layer_norm(x, w, eps=-1.0)
    with pytest.raises(ValueError, match=r"layer_norm: residual must be \[2, 3\], got \[3\]"):
        layer_norm(x, w, residual=torch.zeros(3))
    with pytest.raises(TypeError, match=r"layer_norm: x must be float32, float16 or bfloat16, got torch.float64"):
        layer_norm(x.double(), w)


@pytest.mark.promise("machine-invariant")
@pytest.mark.parametrize("d", [1, 5, 32, 33, 384, 1000])
@pytest.mark.parametrize(("offset", "cast"), [*itertools.product((0, 1), ("before", "after"))])
def test_rms_norm_is_the_stated_order(backend: Backend, dtype: torch.dtype, d: int, offset: int, cast: str) -> None:
    x, w = numbers("x", (6, d), dtype), numbers("w", (d,), dtype)
    r = numbers("r", (6, d), dtype, 2.0**-6)
    for residual, s in ((None, x.float()), (r, x.float() + r.float())):
        got = rms_norm(x, w, 1e-6, offset=offset, cast=cast, residual=residual)
        same(got, contract.rms_norm(s, w, 1e-6, dtype, offset, cast), f"D = {d}, kernel against the contract in NumPy")


def stock(kind: str, x: Tensor, w: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Ours, and what transformers' module gives."""
    if kind == "llama":
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Module

        options = {"offset": 0, "cast": "before"}
    else:
        from transformers.models.gemma.modeling_gemma import GemmaRMSNorm as Module

        options = {"offset": 1, "cast": "after"}
    module = Module(len(w), eps)
    with torch.no_grad():
        module.weight = torch.nn.Parameter(w)
        return rms_norm(x, w, eps, **options), module(x)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_rms_norm_rounds_as_the_stock_module(backend: Backend, dtype: torch.dtype, kind: str) -> None:
    """Where the mean of the squares is exact in any order, here 25, nothing is left but the roundings: equal bits."""
    x = numbers("x", (64, 384), torch.float32).sign() * torch.tensor([7.0, 1.0] * 192)
    ours, theirs = stock(kind, x.to(dtype), numbers("w", (384,), dtype), 0.0)
    same(ours, theirs, f"{kind} in {dtype}")


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_rms_norm_is_near_the_stock_module(backend: Backend, dtype: torch.dtype, kind: str) -> None:
    """Elsewhere PyTorch's sum has another order: a step of the dtype, or the few of the sum in float32."""
    ours, theirs = stock(kind, numbers("x", (50, 1000), dtype), numbers("w", (1000,), dtype))
    step = 8 * 2.0**-24 if dtype == torch.float32 else 2.02 * 2.0 ** -cases.SIGNIFICAND[dtype]
    steps = 2 if kind == "llama" and dtype != torch.float32 else 1
    assert ((ours.double() - theirs.double()).abs() <= steps * step * theirs.double().abs() + 2.0**-24).all()


def test_rms_norm_errors(backend: Backend) -> None:
    x, w = torch.zeros(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \[3\], got \[4\]"):
        rms_norm(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"rms_norm: offset must be one of 0, 1, got 0.5"):
        rms_norm(x, w, offset=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rms_norm: cast must be one of 'before', 'after', got 'never'"):
        rms_norm(x, w, cast="never")
    with pytest.raises(ValueError, match=r"rms_norm: residual must be \[2, 3\], got \[3\]"):
        rms_norm(x, w, residual=torch.zeros(3))
    with pytest.raises(ValueError, match=r"rms_norm: eps must be a number >= 0, got -1"):
        rms_norm(x, w, -1.0)


@pytest.mark.parametrize("d", [1, 5, 32, 33, 384, 1000])
def test_normalize_is_the_stated_order(backend: Backend, d: int) -> None:
    """On the pytorch backend too, whose steps are the same: its square root is rounded like the others'."""
    x = numbers("x", (500, d), torch.float32)
    same(normalize(x), contract.normalize(x, 1e-12), f"D = {d}, kernel against the contract in NumPy")


def test_normalize_at_the_edges(backend: Backend) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -0.0], [3e-13, -4e-13], [nan, 1.0], [inf, 1.0], [3e19, 4e19], [3e-23, 4e-23], [2.0**-149, 0.0]])
    want = [[0.0, -0.0], [0.3, -0.4], [nan, nan], [nan, 0.0], [0.0, 0.0]]
    got = normalize(x)
    torch.testing.assert_close(got[:5], torch.tensor(want), rtol=1e-6, atol=0.0, equal_nan=True)
    assert got[0].signbit().tolist() == [False, True], "the sign of a zero"
    same(normalize(x[5:], eps=0.0), contract.normalize(x[5:], 0.0), "a sum of squares below 2^-126, and of 0")
    same(got[5:], contract.normalize(x[5:], 1e-12), "eps where the squares vanish")


def test_normalize_over_dtypes_and_dimensions(backend: Backend, dtype: torch.dtype) -> None:
    x = numbers("x", (2, 3, 40), dtype)
    same(normalize(x), normalize(x.float()).to(dtype), "one rounding, at the store")
    same(normalize(x[1, 2]), normalize(x)[1, 2], "a single vector")
    assert float((normalize(x).double() - normalize_truth(x)).abs().max()) < 2.0**-8


def test_normalize_errors(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"normalize: x must be \[\.\.\., D\] with D > 0, got \[2, 0\]"):
        normalize(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"normalize: eps must be a number >= 0, got -1"):
        normalize(torch.zeros(2, 3), eps=-1.0)
    with pytest.raises(TypeError, match=r"normalize: x must be float32, float16 or bfloat16, got torch.float64"):
        normalize(torch.zeros(2, 3).double())
