"""What is particular to the C++ library: what it keeps of a weight, and the process that it finds itself in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rerank_kernels as rk
from cases import numbers, offsets
from conftest import require
from invariants import same

K, N = 40, 33
F, D = 70, 8


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require("cpu")


# ---- what is kept of a weight must not go stale ---------------------------------------------------------------------------


class Layer(nn.Module):
    """One row through what keeps something of a weight: sparse_ffn of its first matrix (up, or gate) and of its last (down),
    linear of a weight that is not contiguous (strided)."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        shapes = {"strided": {"strided": (K, D)}, "gate": {"gate": (F, K), "up": (F, K), "down": (D, F)}}
        for name, shape in shapes.get(kept, {"up": (F, K), "down": (D, F)}).items():
            w = numbers(name, shape, torch.float32)
            self.register_parameter(name, nn.Parameter(w.t() if name == "strided" else w))
        self.kept = kept

    def changed(self) -> nn.Parameter:
        return self.get_parameter(self.kept)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        w = dict(self.named_parameters())
        if self.kept == "strided":
            return rk.linear(x, w["strided"])
        return rk.sparse_ffn(x, w["up"], w["down"], gate_weight=w.get("gate"))

    @torch.no_grad()
    def dense(self, x: Tensor) -> Tensor:
        """The same by contiguous products, which keep nothing."""
        w = {name: p.contiguous() for name, p in self.named_parameters()}
        if self.kept == "strided":
            return rk.linear(x, w["strided"])
        hidden = rk.linear(x, w.get("gate", w["up"]), activation="relu")
        return rk.linear(hidden * rk.linear(x, w["up"]) if "gate" in w else hidden, w["down"])

    def write_outside_the_sample(self, x: Tensor, weight: Tensor) -> None:
        """`weight`: `changed` or its .data. Between the rows or columns looked at; of sparse_ffn neurons that count."""
        rows, columns = sampled(weight)
        if self.kept == "strided":
            weight[:, torch.arange(K) % columns != 0] *= -1.0
            return
        active = rk.linear(x, self.get_parameter("gate" if self.kept == "gate" else "up").detach())[0] > 0
        if self.kept == "down":
            weight[:, active & (torch.arange(F) % columns != 0)] *= -1.0
        else:  # those that are off come on
            weight[~active & (torch.arange(F) % rows != 0)] *= -1.0


def sampled(weight: Tensor) -> tuple[int, int]:
    """Every how many rows and columns weights.py looks at a value."""
    return -(-weight.shape[0] // 32), -(-weight.shape[1] // 32)


KEPT = ["up", "gate", "down", "strided"]


def in_place(layer: Layer) -> None:
    with torch.no_grad():
        layer.changed().neg_()


def through_data(layer: Layer) -> None:
    """No counter sees this; the sample does."""
    layer.changed().data.neg_()


def optimiser(layer: Layer, fused: bool = False) -> None:
    weight = layer.changed()
    weight.grad = weight.detach().clone()
    torch.optim.SGD([weight], lr=2.0, fused=fused).step()  # w - 2 w


def fused_optimiser(layer: Layer) -> None:
    """PyTorch's fused CPU optimisers do not count their writes."""
    optimiser(layer, fused=True)


def load_state_dict(layer: Layer) -> None:
    layer.load_state_dict({name: -t if name == layer.kept else t for name, t in layer.state_dict().items()})


def to_half(layer: Layer) -> None:
    layer.half()


def through_half_and_back(layer: Layer) -> None:
    """New memory each time, and the old address may come again."""
    layer.half()
    layer.float()
    through_data(layer)


@pytest.mark.parametrize(
    "write", [in_place, through_data, optimiser, fused_optimiser, load_state_dict, to_half, through_half_and_back]
)
@pytest.mark.parametrize("kept", KEPT)
def test_a_changed_weight_is_laid_out_again(kept: str, write) -> None:
    x, layer = numbers("x", (1, K), torch.float32), Layer(kept)
    before = layer(x)
    same(before, layer.dense(x), "before the write")
    write(layer)
    assert not torch.equal(before, layer.dense(x)), "the write changes nothing: the case has no power"
    same(layer(x), layer.dense(x), f"{write.__name__} to {kept}")


@torch.no_grad()
@pytest.mark.parametrize("kept", KEPT)
def test_a_counted_write_needs_no_sample(kept: str) -> None:
    x, layer = numbers("x", (1, K), torch.float32), Layer(kept)
    before = layer(x)
    layer.write_outside_the_sample(x, layer.changed())
    assert not torch.equal(before, layer.dense(x)), "the write changes nothing: the case has no power"
    same(layer(x), layer.dense(x), "a counted write outside the sample")


@pytest.mark.parametrize("whole", [True, False], ids=["model", "weight"])
@pytest.mark.parametrize("kept", KEPT)
def test_forget_is_for_what_nobody_can_see(kept: str, whole: bool) -> None:
    x, layer = numbers("x", (1, K), torch.float32), Layer(kept)
    before = layer(x)
    layer.write_outside_the_sample(x, layer.changed().data)
    assert not torch.equal(before, layer.dense(x)), "the write changes nothing: the case has no power"
    same(layer(x), before, "a write that nobody sees: stale, as rk.forget's words say")
    rk.forget(layer if whole else layer.changed())
    same(layer(x), layer.dense(x), "after forget")


def test_forget_looks_for_infinities_again() -> None:
    """Many rows keep no layout of down_weight, only that it is finite."""
    x, layer = numbers("x", (8, K), torch.float32), Layer("down")
    same(layer(x), layer.dense(x), "eight rows")
    layer.down.data[0, 1] = float("inf")
    layer(x)
    rk.forget(layer)
    with pytest.raises(ValueError, match="sparse_ffn: weights must be finite"):
        layer(x)


@pytest.mark.parametrize("kept", KEPT)
def test_inference_tensors_are_never_kept(kept: str) -> None:
    with torch.inference_mode():
        x, layer = numbers("x", (1, K), torch.float32), Layer(kept)
        layer._parameters[kept] = nn.Parameter(layer.changed().clone(), requires_grad=False)
        assert layer.changed().is_inference()
        before = layer(x)
        layer.write_outside_the_sample(x, layer.changed())
        assert not torch.equal(before, layer.dense(x)), "the write changes nothing: the case has no power"
        same(layer(x), layer.dense(x), "a weight made and changed in inference mode")


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_linear_keeps_nothing(rows: int) -> None:
    """Of a contiguous weight: one value that no counter and no sample sees is there at the next call."""
    x, w = numbers("x", (rows, K), torch.float32), nn.Parameter(numbers("w", (N, K), torch.float32))
    with torch.no_grad():
        want = rk.linear(x, w)
        w.data[1, 1] += 1.0
        got = rk.linear(x, w)
        same(got, rk.linear(x, w.detach().clone()), "after a write through .data")
        assert bool((got[:, 1] != want[:, 1]).all())


# ---- the process that it finds itself in ----------------------------------------------------------------------------------


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
            torch.ops.rerank_kernels.attention(q, q, q, bad, None, -1, -1, 1.0)
        with pytest.raises(RuntimeError, match=r"attention: cu_seqlens(_k)? must"):
            torch.ops.rerank_kernels.attention(q, q, q, offsets((4, 2))[: len(bad)], bad, -1, -1, 1.0)
    for k, cu_k in ((q[:5], None), (q, offsets((6,)))):
        with pytest.raises(RuntimeError, match=r"attention: (k and v|cu_seqlens_k) must have as many"):
            torch.ops.rerank_kernels.attention(q, k, k, offsets((4, 2)), cu_k, -1, -1, 1.0)


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
