"""The user's side of mode "tensor": which models are taken, who serves them, and that no mode or backend leaks out of a model.

Without a GPU a backend of these tests' own stands in, whose tensor functions are seen in the bits; and the CUDA kernels in the
simulator serve a whole model.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rerank_kernels as rk
import tensor
from conftest import ran, require
from invariants import same
from models import padded, rows, tiny, tokenizer
from rerank_kernels.backend import modes, registry
from rerank_kernels.models.bound import Forward
from rerank_kernels.models.registry import packed_embeddings, packed_logits
from rerank_kernels.ops.linear import linear
from rerank_kernels.verify import verify

HALVES = pytest.mark.parametrize("half", tensor.HALVES, ids=str)
calls: list[str] = []


@pytest.fixture
def fake() -> Iterator[str]:
    """Backend "fake": the pytorch backend, and a mode tensor whose results are twice as large."""
    real, package = registry.BACKENDS["pytorch"], "fake_backend"
    for family in set(registry.OPS.values()):
        module = sys.modules[f"{package}.{family}"] = types.ModuleType(family)
        module.__dict__.update(vars(importlib.import_module(f"{real.package}.{family}")))
        for op in modes.TENSOR.ops:
            if registry.OPS[op] == family:
                setattr(module, f"{op}_tensor", _twice(op, getattr(module, op)))
    sys.modules[package] = types.ModuleType(package)
    registry.BACKENDS["fake"] = dataclasses.replace(
        real, name="fake", package=package, promises={"portable": modes.PROMISES, "tensor": modes.PROMISES[:3]}
    )
    calls.clear()
    yield "fake"
    del registry.BACKENDS["fake"]
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        del sys.modules[name]
    registry.missing.cache_clear()
    registry._load.cache_clear()


def _twice(op: str, function: Any) -> Any:
    def serve(*args: Any) -> Tensor:
        calls.append(op)
        return function(*args) * 2.0

    return serve


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, why in (("cuda", "no toolkit here"), ("triton", "no Triton here")):
        monkeypatch.setitem(registry.BACKENDS, name, dataclasses.replace(registry.BACKENDS[name], missing=lambda why=why: why))
    registry.missing.cache_clear()
    yield
    registry.missing.cache_clear()


def logits(model: Any) -> Tensor:
    return model(**padded(rows((7, 1, 30)), 0)).logits


@HALVES
def test_a_model_computes_in_its_mode_and_nothing_else_does(fake: str, half: torch.dtype) -> None:
    model, other = tiny("bert", half), tiny("bert", half)
    rk.patch(other, backend=fake)
    want = logits(other)
    assert calls == []
    report = rk.patch(model, mode="tensor", backend=fake)
    assert (report.mode, report.backend) == ("tensor", fake) and str(report).startswith("mode tensor, backend fake")
    got = logits(model)
    assert not torch.equal(got, want) and set(calls) == {"linear", "attention"} and got.dtype == torch.float32
    assert modes._of_the_model.get() == modes.PORTABLE, "the mode stayed behind"
    same(logits(other), want, "another model of the same process")
    with rk.use("cpu" if registry.missing("cpu") is None else "pytorch"), modes.of_the_model(modes.TENSOR):
        same(logits(other), want, "a portable model inside a tensor one's forward")
        same(logits(model), got, "whatever is around")
    rk.unpatch(model)
    rk.patch(model, backend=fake)
    same(logits(model), want, "unpatched and patched portable")


def test_the_head_stays_portable(fake: str) -> None:
    """score_head has no mode: dense and out of a classifier are float32 in both."""
    model = tiny("bert", torch.float16)
    rk.patch(model, mode="tensor", backend=fake)
    logits(model)
    assert calls.count("linear") == 2 * 6, "a layer's products, and nothing of the head"


def test_the_packed_entries_are_in_the_mode(fake: str) -> None:
    ids, cu = torch.cat(rows((7, 9))), torch.tensor([0, 7, 16], dtype=torch.int32)
    model, encoder = tiny("bert", torch.float16), tiny("bert", torch.float16, head=False)
    for m in (model, encoder):
        rk.patch(m, mode="tensor", backend=fake)
    want = model(**padded(rows((7, 9)), 0)).logits
    calls.clear()
    same(packed_logits(model, ids, cu).logit, want, "packed against padded")
    packed_embeddings(encoder, ids, cu)
    assert calls.count("attention") == 4


def test_copies_keep_mode_and_backend(fake: str) -> None:
    model = tiny("bert", torch.float16)
    rk.patch(model, mode="tensor", backend=fake)
    want = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (copied.forward.mode.name, copied.forward.backend) == ("tensor", fake)
        same(logits(copied), want, "a copy")


def test_mode_is_restored_after_an_error(fake: str) -> None:
    model = tiny("bert", torch.float16)
    rk.patch(model, mode="tensor", backend=fake)
    with pytest.raises(ValueError, match="input_ids"):
        model(input_ids=torch.full((1, 3), 10_000))
    assert modes._of_the_model.get() == modes.PORTABLE and registry._asked.get() is None


def test_mode_belongs_to_its_thread(fake: str) -> None:
    model, seen = nn.Sequential(nn.Linear(4, 4)).half(), []
    inner = model[0]
    rk.patch(model, mode="tensor", backend=fake)
    with inner.forward.serving():
        thread = threading.Thread(target=lambda: seen.append(modes._of_the_model.get()))
        thread.start()
        thread.join()
        assert modes._of_the_model.get() == modes.TENSOR
    assert seen == [modes.PORTABLE]


def test_patched_again(fake: str) -> None:
    model = tiny("bert", torch.float16)
    first = rk.patch(model, mode="tensor", backend=fake)
    again = rk.patch(model, mode="tensor", backend=fake)
    assert again.forwards[""] is first.forwards[""]
    said = r"the model \(BertFor\w+\) is patched already, in mode 'tensor', backend 'fake', and mode 'portable' was asked for"
    with pytest.raises(rk.PatchError, match=said):
        rk.patch(model)
    with pytest.raises(rk.PatchError, match=r"call rk\.unpatch\(model\) first"):
        rk.patch(nn.Sequential(model))
    assert model.forward is first.forwards[""]


def test_only_half_precision(fake: str) -> None:
    with pytest.raises(rk.PatchError, match=r"float16 or bfloat16, all in one of them, and \S+ is torch.float32; call"):
        rk.patch(tiny("bert"), mode="tensor")
    mixed = tiny("bert", torch.float16)
    mixed.bert.encoder.layer[1].output.dense.to(torch.bfloat16)
    with pytest.raises(rk.PatchError, match=r"layer\.1\.output\.dense\.weight is torch.bfloat16 and torch.float16 elsewhere"):
        rk.patch(mixed, mode="tensor")
    assert not any("forward" in m.__dict__ for m in mixed.modules())
    model = tiny("bert", torch.float16)
    for m in model.modules():  # a usual mix, and no product's operand
        if isinstance(m, nn.LayerNorm):
            m.float()
    rk.patch(model, mode="tensor", backend=fake)
    logits(model)
    model.float()
    with pytest.raises(TypeError, match=r"linear: x must be float16 or bfloat16 in mode 'tensor', got torch.float32; convert"):
        logits(model)


def test_without_a_gpu(no_gpu: None) -> None:
    said = "needs a GPU's tensor cores, and none can be used here; cuda: no toolkit here; triton: no Triton here; take mode="
    model = tiny("bert", torch.float16)
    with pytest.raises(rk.PatchError, match=said):
        rk.patch(model, mode="tensor")
    with pytest.raises(rk.PatchError, match="none can be used here; pytorch: has no mode tensor"):
        rk.patch(model, mode="tensor", backend="pytorch")
    with pytest.raises(rk.BackendError, match=r"\(asked for by patch\(model, backend='triton'\)\) is not available: no Triton"):
        rk.patch(model, backend="triton")
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_patched_here_moved_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU in the machine a model on the CPU is taken; only a call there says that it must move."""
    monkeypatch.setitem(registry.BACKENDS, "cuda", dataclasses.replace(registry.BACKENDS["cuda"], missing=lambda: None))
    registry.missing.cache_clear()
    model = tiny("bert", torch.float16)
    rk.patch(model, mode="tensor")
    with pytest.raises(rk.BackendError, match=r"linear: mode 'tensor' needs a GPU's tensor cores, .* move them to a GPU"):
        logits(model)
    registry.missing.cache_clear()


def test_backend_of_one_model() -> None:
    """patch(backend=...) is nearer than use() and the environment."""
    require("cpu")
    model = tiny("bert")
    with rk.use("pytorch"):
        rk.patch(model)
        want = logits(model)
    rk.unpatch(model)
    rk.patch(model, backend="pytorch")
    with rk.use("cpu"):
        same(logits(model), want, "inside use('cpu')")
        assert registry.active().name == "cpu"
    same(rk.Reranker(model, tokenizer("bert")).model(**padded(rows((7, 1, 30)), 0)).logits, want, "a Reranker of it")


def test_reranker(fake: str) -> None:
    own = tokenizer("bert")
    model = tiny("bert", torch.float16, vocab_size=len(own), pad_token_id=own.pad_token_id)
    pairs = [("what is bread", "flour and water"), ("capital", "Paris"), ("eggs", "boil six minutes or eight")]
    portable = rk.Reranker(copy.deepcopy(model), own, backend=fake).score(pairs)
    reranker = rk.Reranker(model, own, mode="tensor", backend=fake)
    assert reranker.report.mode == "tensor"
    scores = reranker.score(pairs)
    assert scores.logit.tolist() != portable.logit.tolist() and "attention" in calls
    assert reranker.score(pairs, batch_tokens=1).logit.tobytes() == scores.logit.tobytes()
    assert rk.Reranker(model, own).report.mode == "tensor", "a patched model keeps its mode"
    with pytest.raises(rk.PatchError, match="patched already, in mode 'tensor'"):
        rk.Reranker(model, own, mode="portable")


def test_verify_checks_the_modes_own_promises(fake: str) -> None:
    own = tokenizer("bert")
    model = tiny("bert", torch.float16, vocab_size=len(own), pad_token_id=own.pad_token_id)
    pairs = [("what is bread", f"flour and water, {i} times" + " again" * i) for i in range(8)]
    with rk.use(fake):
        report = verify(model, own, pairs, limit=8, mode="tensor")
        assert report.ok and "attention" in calls
        assert report.environment["mode"] == "tensor" and report.environment["promises"] == list(modes.PROMISES[:3])
        assert "forward" not in model.__dict__, "left as it was found"
        rk.patch(model, mode="tensor")
        forward = model.forward
        assert verify(model, own, pairs, limit=8).environment["mode"] == "tensor"
        assert model.forward is forward
        calls.clear()
        assert verify(model, own, pairs, limit=8, mode="portable").environment["mode"] == "portable" and not calls
        assert isinstance(model.forward, Forward) and model.forward.mode == modes.TENSOR


def test_table_of_backends(fake: str) -> None:
    table = rk.backends()
    assert table.modes["tensor"]["linear"]["fake"] == "yes" and table.modes["tensor"]["linear"]["pytorch"].startswith(
        "has no mode tensor"
    )
    text = str(table)
    assert "linear, mode tensor" in text and "layer_norm, mode" not in text
    line = next(line for line in text.splitlines() if line.startswith("fake:"))
    assert line.endswith("in mode tensor repeatable, batch-invariant, padding-invariant, on one GPU architecture")


@HALVES
def test_whole_model_on_the_simulated_gpu(half: torch.dtype) -> None:
    """nvcc's kernels, from the embedding to the logit: alone, batched, padded left; near the portable mode's."""
    ran("cuda")
    model, sequences = tiny("bert", half, num_hidden_layers=1), rows((7, 1, 70))
    rk.patch(model)
    near = logits(model)
    rk.unpatch(model)
    for adds in (0, 2):
        with tensor.simulated("cuda", adds):
            rk.patch(model, mode="tensor")
            alone = torch.cat([model(input_ids=s[None]).logits for s in sequences])
            same(model(**padded(sequences, 0, left=True)).logits, alone, "batched and padded left")
            got = logits(model)
        assert 0 < (got - near).abs().max() < (0.02 if half == torch.float16 else 0.1)
    same(linear(torch.ones(1, 1), torch.ones(1, 1)), torch.ones(1, 1), "outside")


def test_a_copy_of_a_mode_is_the_mode() -> None:
    for mode in modes.MODES.values():
        assert copy.deepcopy(mode) is mode and pickle.loads(pickle.dumps(mode)) is mode and str(mode) == mode.name
