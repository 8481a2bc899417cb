"""rotary, and the table of cos and sin that belongs to its contract."""

from __future__ import annotations

import hashlib
import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import contract
import invariants
from cases import numbers
from invariants import same, with_threads
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops import rotary as module
from rerank_kernels.ops.rotary import rotary, rotary_table

CASES = cases.of("rotary")


class TestRotary(invariants.Promises):
    pass


def test_the_contracts_bits(backend: Backend, case: cases.Case, dtype: torch.dtype) -> None:
    """No sum but of two: even the pure-PyTorch backend gives them."""
    rows = case.make_rows(dtype)
    want = contract.rotary(**rows, interleaved=case.options.get("interleaved", False))
    same(rotary(**rows, **case.options), want, f"{case} against the contract in NumPy")


def test_bits_of_transformers_in_float32(backend: Backend) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (numbers(n, (3, 11, heads, 64), torch.float32) for n, heads in (("q", 4), ("k", 2)))
    cos, sin = rotary_table(frequencies(32), torch.arange(11).expand(3, 11) + torch.tensor([[0], [5], [70]]))
    twice = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    want = apply_rotary_pos_emb(q, k, *twice, unsqueeze_dim=2)
    for got, stock in zip((rotary(q, cos, sin), rotary(k, cos, sin)), want, strict=True):
        same(got, stock, "Llama's, with the same table")


def test_slices_of_a_fused_product(backend: Backend, dtype: torch.dtype) -> None:
    fused = numbers("qkv", (9, 3, 4, 32), dtype)
    cos, sin = numbers("cos", (9, 16), torch.float32), numbers("sin", (9, 16), torch.float32)
    for i in range(3):
        same(rotary(fused[:, i], cos, sin), rotary(fused[:, i].contiguous(), cos, sin), f"slice {i}")
    gaps, few = fused[:, 0, :, ::2], (cos[:, :8], sin[:, :8])
    same(rotary(gaps, *few), rotary(gaps.contiguous(), *few), "every second feature")


def test_features_behind_the_pairs_are_copied(backend: Backend) -> None:
    x = torch.full((2, 3, 10), float("nan"))
    x[..., :4], x[..., 7] = 1.0, float("-inf")
    y = rotary(x, torch.ones(2, 2), torch.zeros(2, 2))
    same(y, x, "an angle of 0, and what lies behind")


def test_errors(backend: Backend) -> None:
    x, c = torch.zeros(5, 2, 8), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"rotary: x must be \[\.\.\., H, D\] with D > 0, got \[5\]"):
        rotary(x[:, 0, 0], c, c)
    with pytest.raises(ValueError, match=r"rotary: cos must be \[5, P\]: a row per token of x \[5, 2, 8\], .* got \[4, 4\]"):
        rotary(x, c[:4], c[:4])
    with pytest.raises(ValueError, match=r"rotary: cos must be \[5, P\].* 2 P <= D, got \[5, 5\]"):
        rotary(x, torch.zeros(5, 5), torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"rotary: sin must be \[5, 4\], got \[5, 3\]"):
        rotary(x, c, c[:, :3])
    with pytest.raises(TypeError, match=r"rotary: x must be float32, float16 or bfloat16, got torch.int64"):
        rotary(x.long(), c, c)


# ---- the table -------------------------------------------------------------------------------------------------------------


def frequencies(pairs: int, theta: float = 10000.0) -> Tensor:
    return torch.tensor([theta ** (-p / pairs) for p in range(pairs)], dtype=torch.float32)


def angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    return positions[:, None].float() * inv_freq


def test_table_is_the_float32_next_to_the_truth() -> None:
    """mpmath's: over the whole range, beside multiples of pi / 2, at zero and subnormals. NumPy's float64 at more places."""
    near = torch.tensor([k * math.pi / 2 for k in (*range(1, 40), 101, 5001, 77777, 600001)], dtype=torch.float32)
    spread = torch.tensor([2.0**e * 1.37 for e in range(-149, 20)], dtype=torch.float32)
    wide = numbers("a", (500,), torch.float32) * 2.0**17
    x = torch.cat([torch.zeros(1), near, torch.nextafter(near, torch.tensor(0.0)), spread, wide])
    cos, sin = rotary_table(x, torch.ones(1, dtype=torch.int64))
    with mpmath.workprec(200):
        for got, truth in ((cos[0], mpmath.cos), (sin[0], mpmath.sin)):
            for at, value in zip(x.tolist(), got.tolist(), strict=True):
                exact = truth(mpmath.mpf(at))
                ulp = max(2.0 ** (math.floor(math.log2(abs(value))) - 23), 2.0**-149) if value else 2.0**-149
                assert abs(mpmath.mpf(value) - exact) <= 0.5001 * ulp, f"{truth.__name__}({at}) = {value}"
    many = angles(torch.arange(0, 131072, 37), frequencies(64))
    got = rotary_table(frequencies(64), torch.arange(0, 131072, 37))
    for table, function in zip(got, (np.cos, np.sin), strict=True):
        worst = np.abs(table.numpy() - function(many.double().numpy())) / np.spacing(np.abs(table.numpy()))
        assert worst.max() <= 0.5001


# (pairs, theta, scaling, step) -> SHA-256, cut to 128 bits, of cos, then sin, of the positions 0, step, ... below 131,072
HASHES = {
    (32, 10000.0, 1.0, 1): "56c12f6779c026ff4dac6db5d7c012d3",
    (64, 500000.0, 1.0, 16): "50bd357ac3cbcb435774d27a383f60e4",
    (64, 1000000.0, 1.1386, 16): "c96dec510bab2f4dd748059619799853",
}


@pytest.mark.parametrize("served", HASHES, ids=str)
def test_hashes_of_tables(served: tuple[int, float, float, int]) -> None:
    pairs, theta, scaling, step = served
    parts = [rotary_table(frequencies(pairs, theta), p, scaling) for p in torch.arange(0, 131072, step).split(16384)]
    bits = b"".join(part[which].numpy().astype("<f4").tobytes() for which in (0, 1) for part in parts)
    assert hashlib.sha256(bits).hexdigest()[:32] == HASHES[served]


def test_table_does_not_depend_on_what_else_is_asked() -> None:
    """PyTorch's own cos differs between a vector's body and its tail, and between thread counts where they move the tail."""
    f, all_at_once = frequencies(33), torch.arange(5000)
    whole = rotary_table(f, all_at_once)
    for positions in (all_at_once[4999:], all_at_once[17:18], all_at_once.view(50, 100), all_at_once.flip(0)):
        for got, want in zip(rotary_table(f, positions), whole, strict=True):
            same(got, want[positions], f"positions {tuple(positions.shape)}")
    for p in (0, 7, 32):
        for got, want in zip(rotary_table(f[p : p + 1], all_at_once), whole, strict=True):
            same(got[:, 0], want[:, p], f"pair {p} alone")
    for threads in (1, 2, 3):
        for got, want in zip(with_threads(threads, lambda: rotary_table(f, all_at_once)), whole, strict=True):
            same(got, want, f"{threads} threads")


def test_compiled_table_is_the_table() -> None:
    """A compiler would make fma of the steps: the table is opaque to it."""
    f, positions = frequencies(32), torch.arange(100)
    compiled = torch.compile(lambda f, p: rotary_table(f, p, 1.25), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(f, positions), rotary_table(f, positions, 1.25), strict=True):
        same(got, want, "compiled")


@pytest.mark.parametrize(
    ("name", "value"),
    [("HALF_PI", (math.pi / 2, 0.0, 0.0)), ("SIN", module.SIN[4:]), ("COS", module.COS[4:]), ("TWO_OVER_PI", 0.63)],
)
def test_a_cheaper_table_is_found(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setattr(module, name, value)
    with pytest.raises(AssertionError):
        test_table_is_the_float32_next_to_the_truth()


def test_table_errors() -> None:
    f = frequencies(4)
    with pytest.raises(ValueError, match=r"rotary_table: inv_freq must be float32 \[P\], got torch.float16 \[4\]"):
        rotary_table(f.half(), torch.arange(3))
    with pytest.raises(ValueError, match=r"rotary_table: positions must be a tensor of integers, got torch.float32"):
        rotary_table(f, torch.arange(3.0))
    with pytest.raises(ValueError, match=r"positions must be such that position · inv_freq < 1048576, got 1048576.0"):
        rotary_table(f, torch.tensor([2**20]))
    with pytest.raises(ValueError, match=r"rotary_table: scaling must be finite, got nan"):
        rotary_table(f, torch.arange(3), math.nan)
