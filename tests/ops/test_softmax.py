"""softmax, sum and mean over dimensions."""

from __future__ import annotations

import pytest
import torch

import cases
import contract
import invariants
from cases import numbers
from invariants import same
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops.softmax import mean, softmax, sum  # noqa: A004  torch's names

CASES = cases.of("softmax")
NAN, INF = float("nan"), float("inf")


class TestSoftmax(invariants.Promises):
    pass


@pytest.mark.parametrize("d", [1, 31, 32, 33, 64, 65, 513])
def test_order_of_the_sum(backend: Backend, d: int, dtype: torch.dtype) -> None:
    """Only IEEE adds and one division: even the pure-PyTorch backend gives the contract's bits."""
    x = numbers("x", (7, d), dtype)
    same(sum(x, -1), contract.row_sum(x).to(dtype), f"sum of {d} against the contract in NumPy")
    same(mean(x, -1), (contract.row_sum(x) / d).to(dtype), f"mean of {d} against the contract in NumPy")


def test_any_dimension(backend: Backend, dtype: torch.dtype) -> None:
    x = numbers("x", (3, 4, 5), dtype)
    for dim in range(-3, 3):
        moved = x.movedim(dim, -1).contiguous()
        same(softmax(x, dim), softmax(moved).movedim(-1, dim), f"softmax over {dim}")
        same(sum(x, dim), sum(moved, -1), f"sum over {dim}")
        same(mean(x, dim, keepdim=True), mean(moved, -1).unsqueeze(dim), f"mean over {dim}, kept")
    same(sum(x, (0, 2)), sum(x.transpose(0, 1).reshape(4, 15), 1), "sum over two dimensions")
    same(sum(x, (2, 0)), sum(x, (0, 2)), "named in another order")
    same(mean(x, (0, 1, 2)), mean(x.flatten(), 0), "mean over all")
    assert sum(x, (0, 2), keepdim=True).shape == (1, 4, 1)


def test_softmax_special_values(backend: Backend, dtype: torch.dtype) -> None:
    rows = [[0.0, -INF, 0.0], [-INF, -INF, -INF], [0.0, NAN, 1.0], [INF, 0.0, 0.0], [-3e4, -3e4, 3e4]]
    y = softmax(torch.tensor(rows, dtype=dtype))
    same(y[0], torch.tensor([0.5, 0.0, 0.5], dtype=dtype), "a masked place gets exactly 0")
    assert y[1].isnan().all() and y[2].isnan().all() and y[3].isnan().any()
    same(y[4], torch.tensor([0.0, 0.0, 1.0], dtype=dtype), "far apart")


def test_shift_changes_nothing(backend: Backend) -> None:
    """The maximum is subtracted exactly; only differences enter (integers here, so that the shift itself is exact)."""
    x = numbers("x", (5, 40), torch.float32).mul(8).round()
    same(softmax(x + 1024.0), softmax(x), "x + 1024")


def test_errors(backend: Backend) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"softmax: dim must be in \[-2, 1\] for x \[2, 3\], got 2"):
        softmax(x, 2)
    with pytest.raises(ValueError, match=r"sum: dim must be distinct dimensions, got \(1, -1\)"):
        sum(x, (1, -1))
    with pytest.raises(ValueError, match=r"mean: dim must be in .* got \(\)"):
        mean(x, ())
    with pytest.raises(ValueError, match=r"softmax: x must be non-empty along dim 1, got \[2, 0\]"):
        softmax(torch.zeros(2, 0))
    with pytest.raises(TypeError, match=r"sum: x must be float32, float16 or bfloat16, got torch.bool"):
        sum(x.bool(), 0)
