"""pool, sigmoid and score_head: the end of a reranker, where half precision does the most harm."""

from __future__ import annotations

import pytest
import torch

import cases
import invariants
from cases import numbers, offsets
from invariants import same
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.pooling import pool, score_head, sigmoid

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
    with pytest.raises(ValueError, match=r"pool: mode must be one of 'cls', 'mean', got 'max'"):
        pool(x, "max", cu_seqlens=cu)
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
