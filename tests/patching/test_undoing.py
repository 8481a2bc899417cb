"""Between patch and unpatch other things happen to a model: wrappers, copies, a second system, many threads at once.

unpatch() gives stock bits whatever was put before ours. No call is served unpatched after patch() has returned, and none fails
that stock would serve.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import signal
import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from test_systems import DOCUMENTS, PAIRS, QUERY, RANKERS, TEXTS, bits, clean, reference, same
from torch import Tensor, nn

import rerank_kernels as rk
import systems
from models import CORPUS, padded, rows, tiny
from rerank_kernels.models import bound
from rerank_kernels.models.bound import Forward, Method, Methods, Refusal, forward_of
from rerank_kernels.patching import walk
from rerank_kernels.patching.systems import haystack

BATCH = padded(rows((9, 4, 30, 1, 17)), 0)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**BATCH).logits
    return found


def equal(a: Tensor, b: Tensor) -> bool:
    return bool(np.array_equal(bits(a), bits(b)))


# ---- what may stand before a forward ----------------------------------------------------------------------------------------


def by_lambda(model: Any) -> None:
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def by_wraps(model: Any) -> None:
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = forward


def by_partial(model: Any) -> None:
    """As accelerate's add_hook_to_module: the old one is kept, and called by name."""
    model._old_forward = model.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), model._old_forward)


class Converting:
    """As accelerate's ConvertOutputsToFp32."""

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        functools.update_wrapper(self, inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def by_unwrapping(model: Any) -> None:
    """As accelerate's unwrap_model, after prepare(), which gives back what it found as a method."""
    by_prepare(model)
    inner = vars(model).pop("_original_forward")
    model.forward = MethodType(getattr(inner, "__func__", inner), model)


def by_prepare(model: Any) -> None:
    """As accelerate's prepare_model under mixed precision."""
    model._original_forward = model.forward
    inner = model.forward.__func__ if hasattr(model.forward, "__func__") else model.forward
    model.forward = Converting(inner)


def by_method(model: Any) -> None:
    inner = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)


def by_compiling(model: Any) -> None:
    model.compile(backend="eager")


def in_two_layers(model: Any) -> None:
    by_wraps(model)
    by_prepare(model)


WRAPPERS = (by_lambda, by_wraps, by_partial, by_prepare, by_method, by_compiling, by_unwrapping, in_two_layers)


def stays_stock_after_unpatch(wrap: Callable[[Any], None]) -> None:
    model = tiny("bert")
    stock = logits(model)
    rk.patch(model)
    ours = logits(model)
    assert not equal(stock, ours)
    wrap(model)
    assert equal(logits(model), ours)
    rk.unpatch(model)
    assert equal(logits(model), stock), "our bits after unpatch"
    rk.unpatch(model)
    assert equal(logits(model), stock)
    assert not any(isinstance(value, Refusal) for m in model.modules() for value in vars(m).values())


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_unpatch_reaches_through_a_wrapper(wrap: Callable[[Any], None]) -> None:
    torch._dynamo.reset()
    stays_stock_after_unpatch(wrap)


def test_a_wrapper_that_is_taken_off_after_unpatch_leaves_stock() -> None:
    """accelerate puts back what it found, which is ours, undone. Then the model can be patched again."""
    for wrap, kept in ((by_partial, "_old_forward"), (by_prepare, "_original_forward")):
        model = tiny("bert")
        stock = logits(model)
        rk.patch(model)
        ours = logits(model)
        wrap(model)
        rk.unpatch(model)
        found = vars(model).pop(kept)
        model.forward = MethodType(found, model) if wrap is by_prepare else found
        assert equal(logits(model), stock) and forward_of(model) is None
        report = rk.patch(model)
        assert equal(logits(model), ours) and report.calls()[""] == 1
        rk.unpatch(model)
        assert equal(logits(model), stock) and "forward" not in vars(model)


def test_training_after_unpatch_through_a_wrapper() -> None:
    model = tiny("bert")
    rk.patch(model)
    by_wraps(model)
    rk.unpatch(model)
    model(**BATCH).logits.sum().backward()
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("wrap", [w for w in WRAPPERS if w not in (by_compiling, by_unwrapping)])
def test_patch_after_a_wrapper_is_refused(wrap: Callable[[Any], None]) -> None:
    model = tiny("bert")
    wrap(model)
    with pytest.raises(rk.PatchError, match="has a forward of its own"):
        rk.patch(model)
    del model.forward
    assert rk.patch(model).replaced


def test_patch_after_unwrapping() -> None:
    """What stands there is the class's own forward, as a method of the model."""
    model = tiny("bert")
    stock, ours = logits(model), tiny("bert")
    rk.patch(ours)
    by_unwrapping(model)
    rk.patch(model)
    assert equal(logits(model), logits(ours)) and not equal(stock, logits(ours))
    rk.unpatch(model)
    assert equal(logits(model), stock)


def test_patch_twice_unpatch_once() -> None:
    model = tiny("bert")
    stock = logits(model)
    first, again = rk.patch(model), rk.patch(model)
    assert first.forwards[""] is again.forwards[""]
    rk.unpatch(model)
    assert equal(logits(model), stock) and clean(model)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_undone_by_themselves(carry: Callable[[Any], Any]) -> None:
    model = tiny("bert")
    stock = logits(model)
    rk.patch(model)
    ours, twin = logits(model), carry(model)
    rk.unpatch(twin)
    assert equal(logits(twin), stock) and equal(logits(model), ours) and clean(twin) and not clean(model)
    undone = carry(twin)
    assert equal(logits(undone), stock)
    third = carry(model)
    by_partial(third)
    rk.unpatch(third)
    assert equal(logits(third), stock) and equal(logits(model), ours)


def test_a_shallow_copy_takes_nothing_from_the_model() -> None:
    model = nn.Linear(3, 2)
    rk.patch(model)
    held, twin = forward_of(model), copy.copy(model)
    rk.unpatch(twin)
    assert clean(twin) and forward_of(model) is held


# ---- methods of systems -----------------------------------------------------------------------------------------------------


def wrapped(holder: Any, name: str) -> None:
    inner = getattr(holder, name)
    setattr(holder, name, lambda *args, **kwargs: inner(*args, **kwargs))


@pytest.mark.parametrize("cls", [systems.CrossEncoder3, systems.CrossEncoder])
def test_a_method_that_was_wrapped_is_undone(cls: Any) -> None:
    encoder = cls(systems.model())
    stock, ranked = encoder.predict(PAIRS), encoder.rank(QUERY, TEXTS)
    rk.patch(encoder)
    for name in ("predict", "rank"):
        wrapped(encoder, name)
    assert not np.array_equal(bits(encoder.predict(PAIRS)), bits(stock))
    rk.unpatch(encoder)
    same(encoder.predict(PAIRS), stock)
    assert encoder.rank(QUERY, TEXTS) == ranked and Methods.KEY not in vars(encoder)
    with pytest.raises(rk.PatchError, match="CrossEncoder has a predict of its own"):
        rk.patch(encoder)


def test_a_wrapped_method_inside_a_system_is_undone() -> None:
    ranker = RANKERS["_cross_encoder"](systems.model)
    ranker.warm_up()
    stock = ranker.run(query=QUERY, documents=DOCUMENTS)
    rk.patch(ranker)
    for name in ("predict", "rank"):
        wrapped(ranker._cross_encoder, name)
    rk.unpatch(ranker)
    assert ranker.run(query=QUERY, documents=DOCUMENTS) == stock


def test_two_systems_that_share_a_model() -> None:
    """Each is whole while both are patched; once one is undone, the other says what stands in its way, and what to do works."""
    model = systems.model()
    one, other = systems.CrossEncoder3(model), systems.CrossEncoder(model)
    want, stock = reference(model).score(PAIRS).score, other.predict(PAIRS)
    for encoder in (one, other):
        rk.patch(encoder)
    same(one.predict(PAIRS), want)
    same(other.predict(PAIRS), want)
    rk.unpatch(one)
    with pytest.raises(rk.PatchError, match=r"was unpatched by itself; call rk\.unpatch\(\) and rk\.patch\(\) with the whole"):
        other.predict(PAIRS)
    rk.unpatch(other)
    same(other.predict(PAIRS), stock)
    rk.patch(other)
    same(other.predict(PAIRS), want)


# ---- many threads -----------------------------------------------------------------------------------------------------------


class Callers:
    """Threads that call at once, with what each got or raised."""

    def __init__(self, count: int, call: Callable[[], Any]) -> None:
        self.got: list[Any] = []
        self.failed: list[BaseException] = []
        gate = threading.Barrier(count)

        def run() -> None:
            gate.wait(20)
            try:
                self.got.append(call())
            except BaseException as error:
                self.failed.append(error)

        self.threads = [threading.Thread(target=run) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def done(self) -> list[Any]:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "threads wait for one another"
        assert not self.failed, self.failed[0]
        return self.got


class Slowly:
    """Loads a model, and holds every other thread inside the stock warm_up() until it has looked around."""

    def __init__(self, model: Any, hold: float = 0.05) -> None:
        self.model, self.hold, self.loads, self.during = model, hold, 0, threading.Event()
        self.go = threading.Event()

    def __call__(self) -> Any:
        self.loads += 1
        self.during.set()
        self.go.wait(self.hold)
        return copy.deepcopy(self.model)


def six_first_calls(held: str) -> None:
    model = systems.model()
    want = {d.content: d.score for d in ranked_by(held, model)}
    load = Slowly(model)
    ranker = RANKERS[held](load)
    report = rk.patch(ranker)
    for got in Callers(6, lambda: ranker.run(query=QUERY, documents=DOCUMENTS)).done():
        same([d.score for d in got["documents"]], [want[d.content] for d in got["documents"]], "served unpatched")
    assert load.loads == 1, "each loads for itself"
    assert "warm_up" not in vars(ranker) and report.replaced
    rk.unpatch(ranker)
    assert clean(ranker)


def ranked_by(held: str, model: Any) -> list[Any]:
    ranker = RANKERS[held](lambda: model)
    ranker.warm_up()
    rk.patch(ranker)
    found: list[Any] = ranker.run(query=QUERY, documents=DOCUMENTS)["documents"]
    rk.unpatch(ranker)
    return found


@pytest.mark.parametrize("held", RANKERS)
def test_six_threads_make_the_first_calls(held: str) -> None:
    six_first_calls(held)


@pytest.mark.parametrize("held", RANKERS)
def test_warm_up_by_name_in_many_threads(held: str) -> None:
    ranker = RANKERS[held](Slowly(systems.model()))
    rk.patch(ranker)
    Callers(6, lambda: ranker.warm_up()).done()
    model = getattr(ranker, held)
    assert forward_of(model if held == "model" else model.model) is not None


@pytest.mark.parametrize("held", RANKERS)
def test_a_load_that_fails_is_tried_again_by_the_next_thread(held: str) -> None:
    tries, model = [], systems.model()

    def load() -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("no such file")
        return model

    ranker = RANKERS[held](load)
    rk.patch(ranker)
    callers = Callers(4, lambda: ranker.run(query=QUERY, documents=DOCUMENTS))
    for thread in callers.threads:
        thread.join(60)
    assert [type(error) for error in callers.failed] == [OSError] and len(callers.got) == 3 and len(tries) == 2


@pytest.mark.parametrize("held", RANKERS)
def test_unpatch_while_another_thread_loads(held: str) -> None:
    """After unpatch() has returned nothing that is patched comes in, and the call that loads is served."""
    load = Slowly(systems.model(), hold=10)
    ranker = RANKERS[held](load)
    rk.patch(ranker)
    callers = Callers(2, lambda: ranker.run(query=QUERY, documents=DOCUMENTS))
    assert load.during.wait(20)
    rk.unpatch(ranker)
    load.go.set()
    assert len(callers.done()) == 2
    assert (
        clean(ranker) and (held != "model" or clean(ranker.model)) and (held == "model" or clean(ranker._cross_encoder.model))
    )


@pytest.mark.parametrize("held", RANKERS)
def test_patch_while_another_thread_loads(held: str) -> None:
    """Its warm_up() began as stock's; what it leaves behind is patched before the next call is served."""
    model = systems.model()
    want = {d.content: d.score for d in ranked_by(held, model)}
    load = Slowly(model, hold=10)
    ranker = RANKERS[held](load)
    callers = Callers(1, lambda: ranker.run(query=QUERY, documents=DOCUMENTS))
    assert load.during.wait(20)
    rk.patch(ranker)
    load.go.set()
    callers.done()
    got = ranker.run(query=QUERY, documents=DOCUMENTS)["documents"]
    same([d.score for d in got], [want[d.content] for d in got], "served unpatched")


@pytest.mark.parametrize("held", RANKERS)
def test_unpatch_and_patch_again_while_another_thread_loads(held: str) -> None:
    model = systems.model()
    want = {d.content: d.score for d in ranked_by(held, model)}
    load = Slowly(model, hold=10)
    ranker = RANKERS[held](load)
    rk.patch(ranker)
    callers = Callers(2, lambda: ranker.run(query=QUERY, documents=DOCUMENTS))
    assert load.during.wait(20)
    rk.unpatch(ranker)
    rk.patch(ranker)
    load.go.set()
    callers.done()
    got = ranker.run(query=QUERY, documents=DOCUMENTS)["documents"]
    same([d.score for d in got], [want[d.content] for d in got], "served unpatched")


def beside_running_calls(obj: Any, call: Callable[[], Any], turns: int = 12) -> None:
    """patch() and unpatch() again and again while others call: no call fails, and after patch() this thread gets our bits."""
    stock = call()
    rk.patch(obj)
    ours = call()
    rk.unpatch(obj)
    stop, failed = threading.Event(), []

    def run() -> None:
        while not stop.is_set():
            try:
                call()
            except BaseException as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(turns):
            rk.patch(obj)
            assert np.array_equal(bits(call()), bits(ours)), "served unpatched after patch()"
            rk.unpatch(obj)
            assert np.array_equal(bits(call()), bits(stock)), "served patched after unpatch()"
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failed, failed[0]


def test_patch_and_unpatch_beside_running_calls() -> None:
    model = tiny("bert")
    beside_running_calls(model, lambda: logits(model))


@pytest.mark.parametrize("cls", [systems.CrossEncoder3, systems.CrossEncoder])
def test_patch_and_unpatch_beside_running_calls_of_a_system(cls: Any) -> None:
    encoder = cls(systems.model())
    beside_running_calls(encoder, lambda: encoder.predict(PAIRS[:7]))


def test_patch_and_unpatch_beside_running_calls_of_an_embedder() -> None:
    encoder = systems.SentenceTransformer(
        systems.Transformer(tiny_encoder(), "token_embeddings"), systems.Pooling(), systems.Normalize()
    )
    beside_running_calls(encoder, lambda: encoder.encode(list(CORPUS[:5]), normalize_embeddings=True))


def tiny_encoder() -> Any:
    return systems.model().roberta


def test_a_forked_child_finds_no_lock_closed() -> None:
    a_forked_child_goes_on(30)


def a_forked_child_goes_on(seconds: int) -> None:
    """A server forks its workers while another thread of it patches, or loads."""
    ranker = RANKERS["model"](systems.model)
    rk.patch(ranker)
    method = vars(ranker)["warm_up"]
    closed, done = threading.Event(), threading.Event()

    def hold() -> None:
        with bound.CHANGING, method.lock:
            closed.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert closed.wait(20)
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)  # a closed lock would be waited for for ever
        with bound.CHANGING, method.lock:
            os._exit(0)
    try:
        assert os.waitpid(child, 0)[1] == 0, "it waits"
    finally:
        done.set()
        holder.join()
    with bound.CHANGING, copy.deepcopy(method).lock, method.lock:
        pass


# ---- controls ---------------------------------------------------------------------------------------------------------------


def test_an_unpatch_that_only_takes_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: what stands before ours keeps it alive."""

    def unpatch(model: Any) -> None:
        for module in model.modules():
            if isinstance(vars(module).get("forward"), Forward):
                del vars(module)["forward"]

    monkeypatch.setattr(walk, "unpatch", unpatch)
    with pytest.raises(AssertionError, match="our bits after unpatch"):
        stays_stock_after_unpatch(by_lambda)


def loads_in_place(method: Method) -> None:
    """warm_up() as it was: the model can be seen before it is patched, and two threads do it twice."""
    ranker = method.holder
    method.original()
    del vars(ranker)["warm_up"]
    Methods.of(ranker).pop("warm_up", None)
    method.patch(ranker)


def without_a_lock(method: Method) -> None:
    method.lock = Open()  # type: ignore[assignment]
    HONEST(method)


class Open:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


HONEST = haystack.warm_up


@pytest.mark.parametrize("mutant", [loads_in_place, without_a_lock])
@pytest.mark.parametrize("held", RANKERS)
def test_a_warm_up_that_is_not_whole_is_seen(monkeypatch: pytest.MonkeyPatch, held: str, mutant: Callable[..., None]) -> None:
    monkeypatch.setattr(haystack, "warm_up", mutant)
    with pytest.raises((AssertionError, KeyError, rk.PatchError)):
        six_first_calls(held)


def test_a_run_that_does_not_look_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystack, "run_cross_encoder", lambda method, *args, **kwargs: method.original(*args, **kwargs))
    with pytest.raises(AssertionError, match="served unpatched"):
        test_patch_while_another_thread_loads("_cross_encoder")


def test_a_method_that_does_not_know_that_it_is_undone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound.Method, "__call__", lambda self, *args, **kwargs: self.function(self, *args, **kwargs))
    with pytest.raises((AssertionError, rk.PatchError)):
        test_a_method_that_was_wrapped_is_undone(systems.CrossEncoder3)


def test_a_lock_that_a_fork_leaves_closed_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "CHANGING", threading.RLock())
    with pytest.raises(AssertionError, match="it waits"):
        a_forked_child_goes_on(1)
