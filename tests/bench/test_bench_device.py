"""bench/'s cases for a GPU, at tiny sizes on the CPU: the gate, the cells, and what happens if a worker dies."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import cases
import rerank_kernels as rk
from bench import run
from bench.cases import contests, models, ops, shapes
from bench.harness import gpu, turns, worker
from bench.harness.worker import Worker
from bench.pages import results, tables

TINY = shapes.Shape("XLMRoberta", 2, 32, 64, 2, 3000, 514)
WAYS = (("cpu", "portable"), ("pytorch", "portable"))


def model(*lengths: int, dtype: str) -> ops.Build:
    return lambda place: models.Model(place, TINY, lengths, dtype).contest()


def given(build: ops.Build, *arguments: Any, **more: Any) -> ops.Build:
    return lambda place: build(place, *arguments, **more)


SMALL = {
    "linear": given(ops.linear, 40, 96, 48),
    "linear + gelu": given(ops.linear, 40, 96, 48, "fp16", gelu=True),
    "attention, equal": given(ops.attention, (30,) * 4, 2, 16, "bf16"),
    "attention, mixed": given(ops.attention, (30, 5, 70, 1), 2, 16),
    "layer_norm": given(ops.layer_norm, 40, 64, "bf16"),
    "softmax": given(ops.softmax, 40, 64),
    "gelu": given(ops.gelu, 40, 64),
    "bmm": given(ops.bmm, 6, 16, 24, 8, "fp16"),
    "sparse_ffn": given(ops.sparse_ffn, 16, 64, 200, "bf16", gate=True),
    "model, mixed": model(16, 40, 9, 30, 8, 7, 5, 6, 12, dtype="fp32"),
    "model, equal": model(16, 16, 16, dtype="bf16"),
}


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    contests.forget()
    yield
    contests.forget()


def played(monkeypatch: pytest.MonkeyPatch, table: Mapping[str, ops.Build], **gone: str) -> dict[str, Any]:
    """Name -> the record of the case, made in this process on the CPU."""
    monkeypatch.setattr(contests, "listed", lambda device, quick: table)
    monkeypatch.setattr(contests, "place", lambda device, _: ops.Place(torch.device(device), False, WAYS))
    with torch.no_grad():
        return {name: gpu.case(name, gone, "cpu", False, True) for name in table}


def test_every_kind_of_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = played(monkeypatch, SMALL)
    json.dumps(found)
    for name, r in found.items():
        c = r["contestants"]
        assert c["cpu portable"]["ms"] > 0 and c["pytorch portable"]["ms"] > 0 and r["flops"] > 0 and r["bytes"] > 0, c
        theirs = [n for n in c if not c[n]["ours"]]
        assert theirs and [line["against"] for line in results.lines(r, "portable") if line["ratio"]] == theirs, name
    assert found["attention, mixed"]["contestants"].keys() >= {"F.sdpa, padded", "F.sdpa, one by one"}
    assert found["model, mixed"]["contestants"].keys() >= {models.PADDED, models.SORTED, models.SINGLE}
    content = {"results": list(found.values()), "machine": {"torch": "2"}, "not_measured": ["late"], "device": "cuda"}
    tables.show(Console(width=150), content)
    printed = capsys.readouterr().out
    assert all(name in printed for name in SMALL) and "out of time: late" in printed


@pytest.mark.parametrize(
    ("name", "op", "says"),
    [("linear", "linear", "rows 0:1 alone"), ("attention, mixed", "attention", "sequence"), ("gelu", "activation", "beyond")],
)
def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch, name: str, op: str, says: str) -> None:
    right = cases.FUNCTIONS[op]

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs)
        return torch.nextafter(y, y + 1) if len(y) > 20 and op != "activation" else y * (1.001 if op == "activation" else 1)

    monkeypatch.setitem(cases.FUNCTIONS, op, wrong)
    (result,) = played(monkeypatch, {name: SMALL[name]}).values()
    for way in ("cpu portable", "pytorch portable"):
        assert says in result["contestants"][way]["wrong"] and "ms" not in result["contestants"][way]
    assert not any(line["ratio"] for line in results.lines(result)) and "WRONG" in results.line_of(result)
    assert all("ms" in c for c in result["contestants"].values() if not c["ours"])


def test_a_wrong_model_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rk, "patch", lambda model, mode: None)  # stock: its bits depend on the batch
    (result,) = played(monkeypatch, {"model, mixed": SMALL["model, mixed"]}).values()
    assert "against in the batch" in result["contestants"]["cpu portable"]["wrong"]


def test_the_gate_of_a_gpu_looks_at_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sequences = (ops.Op("softmax", "", {"x": (4,)}, options={"dim": -1}, count=n) for n in (40, 1))
    assert torch.equal(rows._some().held["rows"]["x"], rows.held["rows"]["x"][[0, 20, 39]]) and sequences._some().count == 1
    op = ops.Op("attention", "", dict.fromkeys("qkv", (2, 8)), lengths=(9, 2, 5))
    some = op._some()
    assert some.lengths == (5,) and torch.equal(some.held["rows"]["k"], op.held["rows"]["k"][11:])
    monkeypatch.setattr(ops.Place, "on_gpu", True)
    op.gate()
    rows.gate()


def test_what_fails_costs_its_own_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.WAYS", (("cpu", "portable"), ("triton", "portable"), ("nobody", "portable")))
    table = {"broken": given(ops.linear, 0, 0, 0), "linear": SMALL["linear"]}
    broken, good = played(monkeypatch, table).values()
    assert "error" in broken["contestants"]["building the case"]
    cells = {n: "ms" in c for n, c in good["contestants"].items()}
    assert cells == {"cpu portable": True, "triton portable": False, "nobody portable": False, "F.linear": True}
    (left,) = played(monkeypatch, {"linear": SMALL["linear"]}, **{"F.linear": "it died"}).values()
    assert (
        left["contestants"]["F.linear"] == {"ours": False, "error": "it died"} and "ms" in left["contestants"]["cpu portable"]
    )


def test_the_list() -> None:
    table, quick = (contests.listed("cuda", of_quick) for of_quick in (False, True))
    assert 15 <= len(quick) <= 30 and len(table) <= 150
    assert next(iter(table)).startswith("base") and list(table)[-1].endswith("max-autotune")
    for m in (1, 16, 128, 1024, 4096, 16384):
        assert f"linear {m}x768x3072 fp16" in table and f"linear {m}x1024x4096 fp16" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cuda", "--quick"]) == 2
    printed = capsys.readouterr().out
    assert "linear 1x768x3072 fp16: not measured" in printed and ("GPU" in printed or "CUDA" in printed)
    with pytest.raises(SystemExit) as stop:
        run.main(["--device", "cuda", "--only", "nothing of the kind"])
    assert stop.value.code == 2


def dies(name: str, gone: Mapping[str, str], how: str) -> dict[str, Any]:
    """In place of a case: "b" dies at its second contestant, as long as nobody says that it is gone."""
    for contestant in ("one", "two"):
        worker.step(contestant)
        if name == "b" and contestant == "two" and contestant not in gone:
            if how == "hang":
                time.sleep(60)
            os.kill(os.getpid(), 11)
    cells: dict[str, Any] = {c: {"ours": True, "error": why} for c, why in gone.items()}
    cells["one"] = {"ours": True, "ms": 1.0, "all_ms": [1.0]}
    return {"case": name, "flops": 1.0, "bytes": 1.0, "contestants": cells}


@pytest.mark.parametrize(("how", "says"), [("kill", "ended with -11"), ("hang", "no answer")])
def test_another_worker_goes_on_behind_what_killed_the_first(monkeypatch: pytest.MonkeyPatch, how: str, says: str) -> None:
    monkeypatch.setattr(gpu, "STEP", 4.0 if how == "hang" else 50.0)
    monkeypatch.setattr(gpu, "case", dies)
    path = os.pathsep.join(str(p) for p in reversed(Path(__file__).parents[:3]))
    started: list[worker.Worker] = []
    monkeypatch.setattr(worker, "Worker", lambda **how: started.append(Worker(**how)) or started[-1])
    records = gpu.run("abc", time.time() + 100, Console(), how, environment={"PYTHONPATH": path})
    worker.close()
    assert [r["case"] for r in records] == ["a", "b", "c"] and len(started) == 2
    assert [list(r["contestants"]) for r in records] == [["one"], ["two", "one"], ["one"]]
    assert says in records[1]["contestants"]["two"]["error"]


def test_a_worker_that_cannot_start_is_not_started_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(["a", "b"], time.time() + 100, Console(), program=["-c", "raise SystemExit(1)"]) == []
    assert capsys.readouterr().out.count("the worker does not start") == 1


# ---- fair rivals: who they are, who is missing, and which times are told; there is no GPU here, so one is pretended


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ops.Place:
    """A place that counts as a GPU's, whose tensors are on the CPU."""
    monkeypatch.setattr(ops.Place, "on_gpu", True)
    monkeypatch.setattr(ops.Place, "sets", lambda self, size: 1)
    return ops.Place(torch.device("cpu"), True, WAYS)


def rivals(work: turns.Work) -> dict[str, turns.Contestant]:
    return {c.name: c for c in work.contestants if not c.ours}


def why(c: turns.Contestant) -> str:
    assert c.away is not None, f"{c.name} is there"
    with pytest.raises(turns.Missing) as lost:
        c.away()
    return str(lost.value)


@torch.no_grad()
def test_attention_has_every_backend_of_sdpa_and_the_packed_kernels(on_gpu: ops.Place) -> None:
    found = rivals(ops.attention(on_gpu, (8, 8), 2, 16, "fp16"))
    kinds = {f"F.sdpa, {kind}" for kind in ("math", "flash", "efficient", "cudnn")}
    assert kinds | {"F.sdpa", "varlen", "FlashAttention 2", "FlashAttention 3"} == set(found)
    with found["F.sdpa, math"].around():
        assert not torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
        math = found["F.sdpa, math"].call(0)
    torch.testing.assert_close(math, found["F.sdpa"].call(0), atol=1e-3, rtol=0)
    assert why(found["FlashAttention 2"]) == "not installed: flash_attn"
    in_fp32 = rivals(ops.attention(on_gpu, (8, 5), 2, 16))
    assert why(in_fp32["varlen"]) == "takes half precision only" and "F.sdpa, padded, cudnn" in in_fp32


@torch.no_grad()
def test_a_backend_that_refuses_has_a_row_that_says_so(on_gpu: ops.Place) -> None:
    work = ops.attention(on_gpu, (8, 8), 2, 16)
    cells = turns.play(work, turns.Pace(0.0, 1, 1.0), gates=False)
    assert "ms" in cells["F.sdpa"] and "ms" in cells["F.sdpa, math"]
    assert "ms" not in cells["F.sdpa, cudnn"] and "RuntimeError" in cells["F.sdpa, cudnn"]["error"]
    result = {**work.record("attention", cells), "case": "attention 8x8 fp32"}
    row = {r[1]: r for r in tables.gpu({"results": [result]}).rows}
    assert row["FlashAttention 3"][2] == "not installed: flash_attn_interface" and "RuntimeError" in row["F.sdpa, cudnn"][2]


def test_products_and_element_wise_ops(on_gpu: ops.Place) -> None:
    found = rivals(ops.linear(on_gpu, 4, 32, 8, gelu=True))
    assert list(found) == ["F.gelu(F.linear)", "compile, default", "compile, max-autotune-no-cudagraphs", "b-inv"]
    assert why(found["b-inv"]) == "not installed: batch_invariant_ops"
    assert "compile, default" not in rivals(ops.linear(replace(on_gpu, compile=False), 4, 32, 8, gelu=True))


@torch.no_grad()
def test_models_have_stocks_ways_and_the_modes_of_torch_compile(on_gpu: ops.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic, mode: asked.append(mode) or model)
    model = models.Model(on_gpu, TINY, (9, 9, 9), "fp32")
    found = rivals(model.contest())
    names = ["stock, SDPA", "stock, no mask", "stock, eager attention", "stock, FlashAttention 2", "b-inv"]
    assert list(found) == names and why(found["stock, FlashAttention 2"]) == "not installed: flash_attn"
    fused, counts = F.scaled_dot_product_attention, [0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: counts.append(1) or fused(*a, **k))
    logits = []
    for name in names[:3]:
        logits.append(found[name].call(0)[0])  # type: ignore[index]
        assert torch.allclose(logits[-1], logits[0], atol=1e-5)
        counts[0], counts[1:] = sum(counts), []
        assert counts[0] == min(len(logits), 2) * TINY.layers, f"{name}: calls of SDPA by then"
    for mode in models.COMPILED:
        assert list(rivals(model.contest(compiled=mode))) == ["stock, SDPA", f"stock, compile, {mode}"]
    assert asked == ["default", "reduce-overhead", "max-autotune"]
    listed = [name for name in contests.listed("cuda", False) if name.endswith(models.COMPILED)]
    assert [n for n in listed if n.startswith("base 1x128")] == [f"base 1x128 fp16, {mode}" for mode in models.COMPILED]


class Stream:
    def __init__(self) -> None:
        self.wait_stream = self.synchronize = lambda *_: None


class Graph:
    """Captures calls, which then make no work for the clock, or refuses."""

    refuses = False

    def capture_begin(self) -> None:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def capture_end(self) -> None:
        pass

    def replay(self) -> None:
        pass


class Event:
    """The device is busy for 3 ms between two of them."""

    def __init__(self, enable_timing: bool) -> None:
        self.record = self.synchronize = lambda: None

    def elapsed_time(self, end: Event) -> float:
        return 3.0


@pytest.mark.parametrize("refuses", [False, True])
def test_kernels_and_calls_have_times_of_their_own(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    """An op's time is the graph's, and the call's stands beside it; a model's is the call's, and beside it its kernels'."""
    fakes: dict[str, Any] = {"Stream": Stream, "CUDAGraph": Graph, "Event": Event, "current_stream": Stream}
    fakes |= {"stream": lambda _: contextlib.nullcontext(), "is_initialized": lambda: True, "memory_reserved": lambda: 0}
    fakes |= {"synchronize": lambda: None, "empty_cache": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(turns, "still_there", lambda error: None)
    monkeypatch.setattr(Graph, "refuses", refuses)
    monkeypatch.setattr(turns, "kernels_ms", lambda call: 0.25)
    monkeypatch.setattr(turns, "seconds", lambda call, n, awake=0.0: 1.7e-3)  # two calls fill a turn of two milliseconds
    op, whole = (turns.Contestant(n, ours=True, graph=n == "op") for n in ("op", "model"))
    cells = turns.play(turns.Work([op, whole]), turns.Pace(0.0, 3, 10.0))
    assert cells["op"]["graph"] is not refuses and "kernels_ms" not in cells["op"]
    assert [results.said(c) for c in cells.values()] == ["1.50 ms (call 1.70)", "1.70 ms (kernels 0.250)"]


def test_the_sum_of_kernels_is_the_profilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(kind: Any, us: float) -> Any:
        return SimpleNamespace(device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda: us))

    kinds = torch.autograd.DeviceType
    seen = [event(kinds.CUDA, 250.0), event(kinds.CPU, 9000.0), event(kinds.CUDA, 750.0)]
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: contextlib.nullcontext(SimpleNamespace(events=lambda: seen)))
    assert turns.kernels_ms(lambda i: None) == 1.0
    seen.clear()
    assert turns.kernels_ms(lambda i: None) is None
    assert turns.kernels_ms(lambda i: 1 // 0) is None
