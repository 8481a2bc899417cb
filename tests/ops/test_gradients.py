"""Derivatives: no op and no patched model has any, and none is silently zero or missing.

One rule, eagerly and under torch.compile. A Parameter is a number: the result has no grad_fn, and requires_grad is False.
Anything else that asks for a gradient, and any tangent of forward mode, is an error that names op and argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_compile import CASES, arguments, compiled, outputs
from torch import Tensor, nn
from torch.autograd import forward_ad

import cases
import rerank_kernels as rk
import systems
from cases import Case, numbers
from invariants import all_same, same
from models import padded, rows, tiny
from rerank_kernels.ops import opaque

HERE = [pytest.param(own, id=own.op) for own in CASES]
FUNCTIONS = {own.op: cases.FUNCTIONS[own.op] for own in CASES}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.enable_grad():
        yield


def floats(own: dict[str, Any]) -> list[str]:
    return [name for name, value in own.items() if isinstance(value, Tensor) and value.is_floating_point()]


def ways(own: Case) -> list[Callable[..., Any]]:
    """Eagerly, and compiled in two ways: aot_eager hides from a kernel what its inputs asked for."""

    def f(given: dict[str, Any]) -> Any:
        return FUNCTIONS[own.op](**given, **own.options)

    return [f, compiled(f, "eager"), compiled(f, "aot_eager")]


def plain(results: Any) -> None:
    for y in outputs(results):
        assert not y.requires_grad and y.grad_fn is None


@pytest.mark.parametrize("own", HERE)
def test_parameters_are_numbers(own: Case) -> None:
    given = arguments(own, torch.float32)
    want = FUNCTIONS[own.op](**given, **own.options)
    given |= {name: nn.Parameter(given[name]) for name in floats(given)}
    for f in ways(own):
        results = f(given)
        plain(results)
        all_same(outputs(results), outputs(want), own.op)
        with pytest.raises(RuntimeError, match="does not require grad"):
            outputs(results)[0].sum().backward()


@pytest.mark.parametrize("own", HERE)
def test_what_asks_for_gradients_is_refused(own: Case) -> None:
    """Every argument, a leaf or not; with no_grad() it is served, as the error says."""
    for name in floats(arguments(own, torch.float32)):
        given = arguments(own, torch.float32)
        leaf = given[name].clone().requires_grad_()
        for value in (leaf, leaf * 1):
            given[name] = value
            for f in ways(own):
                with pytest.raises(
                    RuntimeError, match=rf"{own.op}: {name} asks for gradients and rerank_kernels is forward only"
                ):
                    f(given)
                torch._dynamo.reset()
        with torch.no_grad():
            plain(ways(own)[0](given))


@pytest.mark.parametrize("own", HERE)
def test_forward_mode_is_refused(own: Case) -> None:
    for name in floats(arguments(own, torch.float32)):
        given = arguments(own, torch.float32)
        words = rf"{own.op}: {name} carries a tangent \(torch\.func\.jvp, jacfwd\) and rerank_kernels has no derivatives"

        def f(x: Tensor, name: str = name, given: dict[str, Any] = given) -> Any:
            return FUNCTIONS[own.op](**{**given, name: x}, **own.options)

        x = given[name]
        with pytest.raises(RuntimeError, match=words):
            torch.func.jvp(f, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match=words):
            f(forward_ad.make_dual(x, torch.ones_like(x)))
        with forward_ad.dual_level():
            all_same(outputs(f(x)), outputs(FUNCTIONS[own.op](**given, **own.options)), "a level alone changes nothing")


def test_the_other_transforms_of_torch_func() -> None:
    x, w = numbers("x", (3, 5), torch.float32), numbers("w", (4, 5), torch.float32)
    same(torch.func.functionalize(rk.softmax)(x), rk.softmax(x), "functionalize")
    for derive in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        for f in (rk.softmax, lambda x: rk.linear(x, w), lambda w: rk.linear(x, w)):
            with pytest.raises(RuntimeError, match=r"(softmax|linear): \w+ (asks for gradients|carries a tangent)"):
                derive(f)(x)
    with pytest.raises(RuntimeError, match="softmax: x asks for gradients"):
        torch.func.grad(lambda x: rk.softmax(x).sum())(x)
    with pytest.raises(Exception, match="softmax: x carries a tangent"):
        torch.compile(lambda x: torch.func.jvp(rk.softmax, (x,), (x,)), backend="eager")(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("own", HERE)
def test_vmap_is_right_or_an_error(own: Case) -> None:
    given = [arguments(own, torch.float32, total) for total in (29, 29, 29)]
    for i, one in enumerate(given):
        one |= {name: one[name] + i for name in floats(one)}
    names = floats(given[0])
    stacked = {name: torch.stack([one[name] for one in given]) for name in names}

    def f(tensors: dict[str, Tensor]) -> Any:
        return FUNCTIONS[own.op](**{**given[0], **tensors}, **own.options)

    try:
        got = outputs(torch.vmap(f)(stacked))
    except RuntimeError as error:
        assert own.op in ("sparse_ffn",), error  # it looks at its weights
        return
    for i, one in enumerate(given):
        all_same(tuple(y[i] for y in got), outputs(FUNCTIONS[own.op](**one, **own.options)), f"{own.op}, entry {i} of vmap")


# ---- patched models ---------------------------------------------------------------------------------------------------------


def test_a_patched_model_is_served_without_no_grad() -> None:
    for model in (tiny("bert"), tiny("bert", head=False)):
        rk.patch(model)
        assert any(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
        plain(tuple(model(**padded(rows((5, 3)), 0)).values()))
    leaf = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    rk.patch(leaf)
    plain(leaf(torch.ones(2, 4)))


def test_inputs_of_a_patched_model_that_ask_for_gradients() -> None:
    """Also inside the dict that sentence-transformers' modules take."""
    pooling, normalize = systems.Pooling(), systems.Normalize()
    for module in (pooling, normalize):
        rk.patch(module.eval())
    x = numbers("x", (2, 3, 8), torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match=r"^Pooling\.forward: an input asks for gradients"):
        pooling({"token_embeddings": x, "attention_mask": torch.ones(2, 3)})
    with pytest.raises(RuntimeError, match=r"^Normalize\.forward: an input asks for gradients"):
        normalize({"sentence_embedding": x[:, 0]})
    with torch.inference_mode():
        assert not pooling({"token_embeddings": x, "attention_mask": torch.ones(2, 3)})["sentence_embedding"].requires_grad


def test_forward_mode_through_a_patched_model() -> None:
    model, batch = tiny("bert"), padded(rows((5, 3)), 0)
    rk.patch(model)
    for name in ("classifier.weight", "bert.encoder.layer.0.output.LayerNorm.bias", "bert.embeddings.word_embeddings.weight"):
        weight = model.get_parameter(name).detach()

        def f(w: Tensor, name: str = name) -> Tensor:
            logits: Tensor = torch.func.functional_call(model, {name: w}, (), batch).logits
            return logits

        with pytest.raises(RuntimeError, match=r"carries a tangent"):
            torch.func.jvp(f, (weight,), (torch.ones_like(weight),))
        with pytest.raises(RuntimeError, match=r"asks for gradients|does not require grad|forward only"):
            f(weight.clone().requires_grad_()).sum().backward()


# ---- controls ---------------------------------------------------------------------------------------------------------------


def test_a_result_with_a_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before: PyTorch's fallback for an op without derivatives gives a grad_fn that trains nothing."""
    monkeypatch.setattr(opaque.torch, "no_grad", torch.enable_grad)
    with pytest.raises(AssertionError):
        plain(rk.softmax(nn.Parameter(torch.ones(2, 3))))


@pytest.mark.parametrize(
    ("lost", "check"),
    [
        ("refuse_tangents", test_the_other_transforms_of_torch_func),
        ("asking", test_the_other_transforms_of_torch_func),
    ],
)
def test_a_check_that_is_lost_is_seen(monkeypatch: pytest.MonkeyPatch, lost: str, check: Callable[[], None]) -> None:
    monkeypatch.setattr(opaque, lost, lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        check()
