"""What is particular to the compiled backend: packed weights that must not go stale, and the process it finds itself in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rerank_kernels as rk
from cases import numbers, offsets
from conftest import require
from invariants import same

K, N = 40, 33


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require("cpu")


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(numbers("w", (N, K), torch.float32))


def fresh(x: Tensor, weight: Tensor) -> Tensor:
    """The product with a weight that no cache has seen."""
    return rk.linear(x, weight.detach().clone())


def through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(1.5)


def fused_optimiser(weight: nn.Parameter) -> None:
    """PyTorch's fused CPU optimisers do not count their writes."""
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()


def plain_optimiser(weight: nn.Parameter) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


def through_half_and_back(weight: nn.Parameter) -> None:
    """As module.half().float() does it: new memory each time, and the old address may come again."""
    weight.data = weight.data.half()
    weight.data = weight.data.float()


@pytest.mark.parametrize("write", [through_data, fused_optimiser, plain_optimiser, through_half_and_back])
def test_a_changed_weight_is_packed_again(write, weight: nn.Parameter) -> None:
    x = numbers("x", (5, K), torch.float32)
    with torch.no_grad():
        before = rk.linear(x, weight)
    write(weight)
    with torch.no_grad():
        after = rk.linear(x, weight)
        assert not torch.equal(before, after)
        same(after, fresh(x, weight), write.__name__)


def test_inference_tensors_are_never_kept() -> None:
    with torch.inference_mode():
        x, w = numbers("x", (5, K), torch.float32).clone(), numbers("w", (N, K), torch.float32).clone()
        assert w.is_inference()
        rk.linear(x, w)
        w[3, 5] += 1.0  # no counter sees this
        same(rk.linear(x, w), fresh(x, w), "a weight made and changed in inference mode")


def test_forget_is_for_what_nobody_can_see(weight: nn.Parameter) -> None:
    x = numbers("x", (5, K), torch.float32)
    layer = nn.Linear(K, N, bias=False)
    layer.weight = weight
    with torch.no_grad():
        rk.linear(x, weight)
        weight.data[1, 1] += 1.0  # one value, not in the sample
        rk.forget(layer)
        same(rk.linear(x, weight), fresh(x, weight), "after forget")


def test_flush_to_zero_cannot_reach_a_bit() -> None:
    """It is a setting of each thread: without the guard the result would depend on which thread took which tile."""
    x, w = torch.full((200, 512), 1e-30), torch.full((256, 512), 1e-10)
    logit = torch.tensor([[95.0]])
    threads = torch.get_num_threads()
    want = rk.linear(x, w), rk.softmax(x * 0 - torch.arange(512.0)), rk.score_head(logit, torch.ones(1, 1)).complement
    assert int((want[0] == 0).sum()) == 0
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            down = rk.softmax(torch.zeros(200, 512) - torch.arange(512.0))
            got = rk.linear(x, w), down, rk.score_head(logit, torch.ones(1, 1)).complement
            for g, t in zip(got, want, strict=True):
                assert torch.equal(g.view(torch.int32), t.view(torch.int32)), f"{n} threads"
        assert torch.tensor([1e-30]) * torch.tensor([1e-10]) == 0, "the process's own setting is left alone"
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_strided_offsets_are_read_as_they_are() -> None:
    q = numbers("q", (6, 2, 8), torch.float32)
    cu = torch.tensor([0, 4000, 2, 3, 6], dtype=torch.int32)[::2]
    assert cu.tolist() == [0, 2, 6]
    same(rk.attention(q, q, q, cu_seqlens=cu), rk.attention(q, q, q, cu_seqlens=offsets((2, 4))), "attention")
    same(rk.pool(q[:, 0], "mean", cu_seqlens=cu), rk.pool(q[:, 0], "mean", cu_seqlens=offsets((2, 4))), "pool")


def test_the_op_itself_checks_offsets() -> None:
    q = torch.zeros(6, 2, 8)
    for bad in (torch.tensor([0, 7, 6], dtype=torch.int32), torch.tensor([0, 6]), torch.tensor([1, 6], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="attention: cu_seqlens must"):
            torch.ops.rerank_kernels.attention(q, q, q, bad, -1, -1, 1.0)


def test_sizes_of_zero_are_errors() -> None:
    with pytest.raises(ValueError, match="score_head: pooled must be of sizes > 0"):
        rk.score_head(torch.zeros(2, 0), torch.zeros(1, 0))
    with pytest.raises(ValueError, match="score_head: dense_weight must be of sizes > 0"):
        rk.score_head(torch.zeros(2, 4), torch.zeros(1, 0), dense_weight=torch.zeros(0, 4))
    for m in (2, 8):
        with pytest.raises(ValueError, match="sparse_ffn: down_weight must be"):
            rk.sparse_ffn(torch.zeros(m, 4), torch.zeros(0, 4), torch.zeros(3, 0))
        with pytest.raises(ValueError, match="sparse_ffn: down_weight must be"):
            rk.sparse_ffn(torch.zeros(m, 4), torch.zeros(5, 4), torch.zeros(0, 5))
    with pytest.raises(RuntimeError, match="N and K must be > 0"):
        torch.ops.rerank_kernels.linear(torch.zeros(2, 0), torch.zeros(1, 0), None, 0, None, torch.float32)


def test_screening_does_not_trust_a_subnormal_bound() -> None:
    u, big = 2.0**-149, 1e20
    x, w = torch.full((1, 2), big), torch.full((1, 2), u)
    bias, down = torch.tensor([-1.7 * big * u]), torch.full((1, 1), 1e30)
    one, many = rk.sparse_ffn(x, w, down, up_bias=bias), rk.sparse_ffn(x.expand(8, 2), w, down, up_bias=bias)
    assert one.item() > 0
    same(one, many[:1], "one row against the dense way")


def test_any_default_dtype() -> None:
    x, up, down = (numbers(n, s, torch.float32) for n, s in (("x", (1, K)), ("up", (N, K)), ("down", (8, N))))
    want = rk.sparse_ffn(x, up.clone(), down)
    torch.set_default_dtype(torch.float64)
    try:
        same(rk.sparse_ffn(x, up.clone(), down), want, "with float64 as the default dtype")
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_window_as_wide_as_an_integer() -> None:
    q = numbers("q", (6, 2, 8), torch.float32)
    want = rk.attention(q, q, q, cu_seqlens=offsets((6,)))
    for window in ((0, 2**63 - 1), (2**63 - 1, 2**63 - 1), (2**63 - 1, 0)):
        got = rk.attention(q, q, q, cu_seqlens=offsets((6,)), window=window)
        assert bool(got.isfinite().all())
    same(rk.attention(q, q, q, cu_seqlens=offsets((6,)), window=(2**63 - 1, 2**63 - 1)), want, "no limit")
    with pytest.raises(ValueError, match=r"attention: scale must be finite and not 0 as a float32, got 0\.0"):
        rk.attention(q, q, q, cu_seqlens=offsets((6,)), scale=1e-50)


def test_leaf_inputs_that_ask_for_gradients() -> None:
    with pytest.raises(RuntimeError, match="linear: x asks for gradients and rerank_kernels is forward only"):
        rk.linear(torch.zeros(2, K, requires_grad=True), torch.zeros(N, K))
