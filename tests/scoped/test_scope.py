"""The scope itself: where it holds and where not, what it refuses and how, what it reports, what it leaves behind: nothing."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn, overrides
from torch.utils import _python_dispatch

import models
import rerank_kernels as rk
from rerank_kernels.scoped import scope
from scoped_cases import NEEDS

pytestmark = NEEDS
X = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
W = torch.randn(40, 300, generator=torch.Generator().manual_seed(2))


def routed() -> bool:
    """Whether calls are routed here and now."""
    with torch.no_grad():
        return torch.equal(F.linear(X, W), rk.linear(X, W))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    assert not routed(), "stock PyTorch has other bits here: else no test below could fail"
    yield
    assert not routed()
    assert overrides._get_current_function_mode_stack() == []
    assert _python_dispatch._get_current_dispatch_mode_stack() == []
    assert scope._open.get() is None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(300, 300), Spectrum()])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.inner:
            x = module(x)
        return x


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).real


def test_nesting_keeps_the_outer_scope() -> None:
    with rk.invariant() as outer, torch.no_grad():
        assert routed()
        with rk.invariant(strict=False) as inner, pytest.warns(rk.InvariantWarning):
            assert routed()
            torch.fft.rfft(X)
        assert routed()
        with pytest.raises(rk.InvariantError):
            torch.fft.rfft(X)
    assert outer.strict and not inner.strict and inner.let_through and not outer.let_through


def test_an_error_ends_the_scope() -> None:
    for nested in (False, True):
        with pytest.raises(KeyError), rk.invariant(), torch.no_grad():
            assert routed()
            if nested:
                with rk.invariant():
                    raise KeyError
            raise KeyError
        assert not routed()
    with rk.invariant(), torch.no_grad():
        with pytest.raises(KeyError), rk.invariant():
            raise KeyError
        assert routed()


def test_an_error_inside_an_op_changes_nothing() -> None:
    with rk.invariant(), torch.no_grad():
        for _ in range(3):
            with pytest.raises((ValueError, RuntimeError)):
                F.linear(X, W[:, :-1])
            with pytest.raises(rk.InvariantError):
                torch.fft.rfft(X)
        assert routed()


def test_another_thread_is_not_in_it() -> None:
    found: dict[str, bool] = {}
    inside, done = threading.Event(), threading.Event()

    def stranger() -> None:
        inside.wait(60)
        found["stranger"] = routed()
        done.set()

    def own() -> None:
        with rk.invariant():
            found["own"] = routed()

    threads = [threading.Thread(target=stranger), threading.Thread(target=own)]
    for thread in threads:
        thread.start()
    with rk.invariant():
        inside.set()
        done.wait(60)
        found["main"] = routed()
    for thread in threads:
        thread.join(60)
    assert found == {"stranger": False, "own": True, "main": True}


def test_tasks_of_one_thread_end_in_any_order() -> None:
    async def inside(begin: asyncio.Event, end: asyncio.Event, said: list[bool]) -> None:
        await begin.wait()
        with rk.invariant():
            said.append(routed())
            await end.wait()
            said.append(routed())
        said.append(routed())

    async def main() -> list[list[bool]]:
        begins, ends = ([asyncio.Event() for _ in range(2)] for _ in range(2))
        said: list[list[bool]] = [[], []]
        tasks = [asyncio.create_task(inside(*of)) for of in zip(begins, ends, said, strict=True)]
        for event in (*begins, *ends):  # the first to begin is the first to end
            event.set()
            for _ in range(3):
                await asyncio.sleep(0)
            outside.append(routed())
        await asyncio.gather(*tasks)
        return said

    outside: list[bool] = []
    assert asyncio.run(main()) == [[True, True, False]] * 2
    assert outside == [False] * 4, "a task beside them is not in it"


def test_gradients_are_refused_and_no_grad_is_the_cure() -> None:
    model = nn.Linear(300, 40)
    for forward in (
        lambda: model(X),
        lambda: F.linear(X.clone().requires_grad_(), W),
        lambda: torch.ops.aten.mm(X, model.weight.t()),
    ):
        with rk.invariant(), pytest.raises(rk.InvariantError, match=r"asks for gradients.*no_grad"):
            forward()
        with rk.invariant(), torch.no_grad():
            forward()
        with rk.invariant(), torch.inference_mode():
            forward()
    assert model(X).requires_grad, "training goes on behind it"


def test_the_error_names_op_module_and_reason_and_its_advice_works() -> None:
    model = Model().eval()
    said = r"^rk\.invariant: aten::_fft_r2c in inner\.1 \(Spectrum\): it has no route.*; rk\.invariant\(strict=False\) lets it"
    with torch.no_grad(), rk.invariant(), pytest.raises(rk.InvariantError, match=said):
        model(X)
    with torch.no_grad(), rk.invariant(strict=False) as report, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(X)
    assert [w.category for w in caught] == [rk.InvariantWarning] and "inner.1 (Spectrum)" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert list(report.let_through) == ["aten::_fft_r2c"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: F.dropout(X, 0.5, training=True), "random numbers"),
        (lambda: torch.zeros(4).scatter_add(0, torch.tensor([1, 1]), X[0, :2]), "indices repeat"),
        (lambda: torch.zeros(4).index_put((torch.tensor([1, 1]),), X[0, :2]), "stands twice"),
        (lambda: X.double() @ W.double().t(), r"float64.*\.float\(\)"),
        (lambda: torch.polar(X, X), "no route"),
        (lambda: torch.complex(X, X) * torch.complex(X, X), "complex"),
        (lambda: F.batch_norm(X, None, None, training=True), r"model\.eval\(\)"),
        (lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], dropout_p=0.1), r"model\.eval\(\)"),
    ],
)
def test_what_is_refused(call: object, reason: str) -> None:
    with torch.no_grad(), rk.invariant(), pytest.raises(rk.InvariantError, match=reason):
        call()  # type: ignore[operator]


def test_the_report_counts_what_was_routed_and_what_was_exact() -> None:
    with torch.no_grad(), rk.invariant() as report:
        for _ in range(3):
            F.linear(X, W).transpose(0, 1)
        X.long().sum()
    assert report.routed == {"aten::linear": 3, "aten::sum": 1} or report.exact["aten::sum"] == 1
    assert report.exact["aten::transpose"] == 3 and "aten::linear" in str(report)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_same_bits_however_gradients_are_off(guard: type) -> None:
    model = models.tiny("bert")
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    with guard(), rk.invariant():
        y = model(ids).logits
        alone = torch.cat([model(ids[i : i + 1]).logits for i in range(3)])
    assert torch.equal(y, alone)


def test_autocast_casts_and_the_scope_routes() -> None:
    with torch.no_grad(), rk.invariant() as report, torch.autocast("cpu", torch.bfloat16):
        y = F.linear(X, W)
    assert y.dtype == torch.bfloat16 and torch.equal(y, rk.linear(X.bfloat16(), W.bfloat16()))
    assert report.routed["aten::linear"] == 1


def test_a_compiled_model_runs_eager_inside() -> None:
    compiled = torch.compile(lambda x: F.linear(x, W), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), F.linear(X, W))
        with rk.invariant() as report:
            assert torch.equal(compiled(X), rk.linear(X, W))
        assert report.routed["aten::linear"] == 1
        assert torch.equal(compiled(X), F.linear(X, W))


def test_a_scripted_function_is_seen() -> None:
    scripted = torch.jit.script(_product)
    with torch.no_grad(), rk.invariant():
        assert torch.equal(scripted(X, W), rk.linear(X, W))


def _product(x: Tensor, w: Tensor) -> Tensor:
    return torch.mm(x, w.t())


def test_a_patched_model_keeps_its_bits() -> None:
    model = models.tiny("bert")
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    rk.patch(model)
    with torch.no_grad():
        y = model(ids).logits
        with rk.invariant():
            assert torch.equal(model(ids).logits, y)


def test_a_model_made_inside_has_no_trace_of_it() -> None:
    with torch.no_grad(), rk.invariant():
        torch.manual_seed(0)
        inside = transformers.AutoModel.from_config(models.config("bert"))
    torch.manual_seed(0)
    outside = transformers.AutoModel.from_config(models.config("bert"))
    for (name, a), b in zip(inside.named_parameters(), outside.parameters(), strict=True):
        assert torch.equal(a, b) and type(a) is type(b), name
    assert all(not m._forward_hooks and not m._forward_pre_hooks and "forward" not in vars(m) for m in inside.modules())


def test_shapes_alone_pass() -> None:
    with torch.no_grad(), rk.invariant():
        assert torch.fft.rfft(torch.empty(3, 8, device="meta")).shape == (3, 5)
