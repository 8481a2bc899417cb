"""pool, sigmoid and score_head: the end of a reranker, where half precision does the most harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import invariants
from cases import numbers, offsets
from invariants import same
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops import pooling as made
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.pooling import POOL_MODES, pool, score_head, sigmoid

CASES = cases.of("pooling")
NAN, INF = float("nan"), float("inf")


class TestPooling(invariants.Promises):
    pass


def test_mean_is_one_ascending_chain(backend: Backend, dtype: torch.dtype) -> None:
    """Only IEEE adds and one division: even the pure-PyTorch backend gives the contract's bits."""
    x = numbers("x", (70, 19), dtype)
    total = torch.zeros(19)
    for row in x:
        total = total + row.float()
    same(pool(x, "mean", cu_seqlens=offsets((70,)))[0], (total / 70).to(dtype), "mean against the chain")
    same(pool(x, "mean", cu_seqlens=offsets((70,)), out_dtype=torch.float32)[0], total / 70, "unrounded")


def test_cls_is_the_first_token(backend: Backend, dtype: torch.dtype) -> None:
    x = numbers("x", (9, 5), dtype)
    same(pool(x, "cls", cu_seqlens=offsets((4, 0, 5))), torch.stack([x[0], torch.zeros(5, dtype=dtype), x[4]]), "cls")


def test_last_and_largest(backend: Backend, dtype: torch.dtype) -> None:
    x = numbers("x", (9, 5), dtype)
    nothing = torch.zeros(5, dtype=dtype)
    same(pool(x, "lasttoken", cu_seqlens=offsets((4, 0, 5))), torch.stack([x[3], nothing, x[8]]), "lasttoken")
    largest = torch.stack([torch.stack([max(column) for column in rows.t()]) for rows in (x[:4], x[4:])])
    same(pool(x, "max", cu_seqlens=offsets((4, 0, 5)))[[0, 2]], largest, "max")
    same(pool(x, "max", cu_seqlens=offsets((4, 0, 5)))[1], nothing, "max of no token")


def test_largest_of_special_values(backend: Backend) -> None:
    zeros = torch.tensor([[0.0, -0.0, -0.0], [-0.0, 0.0, -0.0]])
    same(pool(zeros, "max", cu_seqlens=offsets((2,)))[0], torch.zeros(3), "+0 in any order")
    x = torch.tensor([[1.0, -INF, NAN, -INF], [NAN, 2.0, 3.0, -INF], [9.0, 9.0, 9.0, 9.0]])
    same(pool(x, "max", cu_seqlens=offsets((2, 1)))[0], torch.tensor([NAN, 2.0, NAN, -INF]), "a NaN passes")


def test_weighted_mean_is_the_stated_sum(backend: Backend, dtype: torch.dtype) -> None:
    """linear, which others hold to the contract, of the weights 1, 2, ... and one division."""
    x = numbers("x", (603, 7), dtype)
    weights = torch.arange(1.0, 601.0)
    dot = linear(weights[None], x[:600].t().contiguous(), out_dtype=torch.float32)[0]
    got = pool(x, "weightedmean", cu_seqlens=offsets((600, 3)), out_dtype=torch.float32)
    same(got[0], dot / torch.tensor(180300.0), "over more than one chunk")
    same(got[1:], pool(x[600:], "weightedmean", cu_seqlens=offsets((3,)), out_dtype=torch.float32), "beside a long one")


def padding_counts(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return made._padded(rows, lengths, 0.0).amax(1).float()


def last_row(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return made._padded(rows, lengths, 0.0)[:, -1].float()


def by_the_longest(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Weights that count from the end of the longest sequence."""
    weights = torch.arange(float(max(lengths)), 0.0, -1.0)[None, :, None]
    return (made._padded(rows, lengths, 0.0).float() * weights).sum(1) / weights.sum()


@pytest.mark.parametrize("mode, mutant", [("max", padding_counts), ("lasttoken", last_row), ("weightedmean", by_the_longest)])
@pytest.mark.parametrize("promise", [invariants.right, invariants.batch_invariant])
def test_a_wrong_pooling_is_caught(mode: str, mutant: Any, promise: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """These modes are made of ops, of which mutants.py has the mutants."""
    case = cases.get(f"pool-33-{mode}")
    promise(case, torch.float32)
    monkeypatch.setitem(made._MADE, mode, mutant)
    with pytest.raises(AssertionError, match=r"differ|beyond the bound"):
        promise(case, torch.float32)


@pytest.mark.parametrize("mode", POOL_MODES)
def test_nothing_to_pool(backend: Backend, mode: str) -> None:
    for lengths in ((), (0, 0)):
        same(pool(torch.zeros(0, 4), mode, cu_seqlens=offsets(lengths)), torch.zeros(len(lengths), 4), f"{mode} of {lengths}")
    padded, mask = numbers("x", (2, 4, 5), torch.float32), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    packed = torch.cat([padded[0, 1:3], padded[1, 3:]])
    same(pool(padded, mode, mask=mask), pool(packed, mode, cu_seqlens=offsets((2, 1))), "padded and packed")


def test_padded_first_token(backend: Backend) -> None:
    x = numbers("x", (2, 4, 5), torch.float32)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    same(pool(x, "cls", mask=mask), torch.stack([x[0, 2], torch.zeros(5)]), "first valid token, and 0 for no token")
    same(pool(x, "mean", mask=mask)[1], torch.zeros(5), "mean of no token")
    same(pool(x, "mean"), pool(x, "mean", mask=torch.ones(2, 4, dtype=torch.bool)), "no mask is all ones")


def test_sigmoid_is_float32(backend: Backend, dtype: torch.dtype) -> None:
    """Of these 2,001 logits fp16 arithmetic tells 6 scores apart, bf16 two."""
    x = torch.linspace(6.0, 14.0, 2001).to(dtype)
    y = sigmoid(x)
    assert y.dtype == torch.float32
    same(y, sigmoid(x.float()), "the dtype of the logit decides nothing")
    distinct, logits = sigmoid(-x).unique().numel(), x.unique().numel()
    assert distinct == logits, f"{distinct} complements of {logits} logits"


def test_sigmoid_keeps_its_order(backend: Backend) -> None:
    x = torch.linspace(-110.0, 20.0, 20001)
    y = sigmoid(x)
    assert bool((y[1:] >= y[:-1]).all()), "a larger logit never has a smaller score"
    assert float(sigmoid(torch.tensor([-100.0]))) > 0.0, "results below 2^-126 are not flushed"
    same(sigmoid(torch.tensor([0.0, INF, -INF, NAN])), torch.tensor([0.5, 1.0, 0.0, NAN]), "special values")


def test_complement_keeps_its_digits(backend: Backend) -> None:
    pooled = torch.linspace(8.0, 40.0, 33)[:, None]
    out = score_head(pooled, torch.ones(1, 1))
    same(out.logit, pooled, "identity head")
    truth = torch.sigmoid(-pooled.double())
    assert bool(((out.complement.double() - truth).abs() <= 8 * cases.U * truth).all())
    assert out.complement.unique().numel() == 33 and out.score[-1] == 1.0


@pytest.mark.parametrize("activation", ["tanh", "gelu", None])
def test_head_is_its_parts(backend: Backend, activation: str | None, dtype: torch.dtype) -> None:
    """One call and the chain of public functions are the same bits, in float32 all the way."""
    x, dw, db = numbers("x", (5, 40), dtype), numbers("dw", (30, 40), dtype, 0.125), numbers("db", (30,), dtype)
    ow, ob = numbers("ow", (2, 30), dtype), numbers("ob", (2,), dtype)
    out = score_head(x, ow, ob, dense_weight=dw, dense_bias=db, activation=activation)
    hidden = linear(x, dw, db, activation=activation, out_dtype=torch.float32)
    logit = linear(hidden, ow, ob, out_dtype=torch.float32)
    invariants.all_same(out, (logit, sigmoid(logit), sigmoid(-logit)), "head against its parts")
    assert {t.dtype for t in out} == {torch.float32}


def test_errors(backend: Backend) -> None:
    x = torch.zeros(6, 4)
    cu = offsets((6,))
    with pytest.raises(ValueError, match=r"pool: mode must be one of 'cls', 'mean', 'max', 'lasttoken', .*, got 'first'"):
        pool(x, "first", cu_seqlens=cu)
    with pytest.raises(ValueError, match="pool: cu_seqlens and mask exclude each other"):
        pool(x, "cls", cu_seqlens=cu, mask=torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"pool: x must be \[B, T, D\], got \[6, 4\]"):
        pool(x, "cls")
    with pytest.raises(ValueError, match=r"pool: x must be \[total, D\], got \[1, 6, 4\]"):
        pool(x[None], "cls", cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"pool: cu_seqlens must be ascending from 0 to 6"):
        pool(x, "mean", cu_seqlens=torch.tensor([0, 4, 3, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"pool: mask must be .* \[1, 6\]"):
        pool(x[None], "mean", mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"score_head: out_weight must be \[L, 4\], got \[1, 5\]"):
        score_head(x, torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"score_head: out_weight must be \[L, 3\], got \[1, 4\]"):
        score_head(x, torch.zeros(1, 4), dense_weight=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"score_head: dense_bias must be left out without dense_weight"):
        score_head(x, torch.zeros(1, 4), dense_bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"score_head: out_bias must be \[1\], got \[2\]"):
        score_head(x, torch.zeros(1, 4), torch.zeros(2))
    with pytest.raises(TypeError, match=r"sigmoid: x must be a torch.Tensor, got float; use torch.as_tensor"):
        sigmoid(0.5)  # type: ignore[arg-type]
