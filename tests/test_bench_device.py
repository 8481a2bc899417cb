"""bench/'s cases for a GPU, at tiny sizes on the CPU: the gate, the cells, and what happens if a worker dies."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import cases
import rerank_kernels as rk

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import device
import relay
import results
import run
import shapes
import turns

TINY = shapes.Shape("xlm-roberta", 2, 32, 64, 2, 3000, 514)


def job(build: Callable[..., turns.Work], *arguments: Any) -> device.Job:
    return device.Job("group", True, functools.partial(build, *arguments))


SMALL = {
    "linear": job(device.linear, 40, 96, 48, "fp32", None),
    "linear + gelu": job(device.linear, 40, 96, 48, "fp16", "gelu"),
    "attention, equal": job(device.attention, (30,) * 4, 2, 16, "bf16"),
    "attention, mixed": job(device.attention, (30, 5, 70, 1), 2, 16, "fp32"),
    "layer_norm": job(device.layer_norm, 40, 64, "bf16"),
    "softmax": job(device.softmax, 40, 64, "fp32"),
    "gelu": job(device.gelu, 40, 64, "fp32"),
    "sparse_ffn": job(device.sparse_ffn, 16, 64, 200, 0.1, "fp32"),
    "model, mixed": job(device.model, device.BASE, (16, 40, 9, 30, 8), "fp32", False),
    "model, equal": job(device.model, device.BASE, (16,) * 3, "bf16", False),
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(shapes.RERANKERS, device.BASE, TINY)
    kept = (device.stock_model, device.patched_model, device.probe)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


def played(table: Mapping[str, device.Job], folder: Path) -> dict[str, Any]:
    args = argparse.Namespace(
        device="cpu", no_compile=True, share=None, worker=folder / "journal", quick=True, until=time.time() + 600, json=None
    )
    with torch.no_grad():
        assert relay.work(args, table) == 0
    return relay.collected(relay.Journal(args.worker), args, table, 1.0)


def test_every_kind_of_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = played(SMALL, tmp_path)
    json.dumps(content)
    assert content["not_measured"] == [] and content["machine"]["torch"] == torch.__version__
    assert [r["case"] for r in content["results"]] == list(SMALL)
    for r in content["results"]:
        c = r["contestants"]
        assert c["cpu portable"]["ms"] > 0 and c["pytorch portable"]["ms"] > 0, c
        theirs = [n for n in c if not c[n]["ours"]]
        assert theirs and set(r["ratios"]["cpu portable"]) == set(theirs)
        assert all("error" not in x for x in c.values())
    mixed = {r["case"]: r["contestants"].keys() for r in content["results"]}
    assert mixed["attention, mixed"] >= {"padded", "one by one"} and mixed["model, mixed"] >= {
        "padded",
        "sorted 8s",
        "one by one",
    }
    results.show(content)
    printed = capsys.readouterr().out
    assert all(name in printed for name in SMALL)


@pytest.mark.parametrize(
    ("name", "op", "says"),
    [("linear", "linear", "rows 0:1 alone"), ("attention, mixed", "attention", "sequence"), ("gelu", "activation", "beyond")],
)
def test_a_wrong_kernel_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, op: str, says: str) -> None:
    right = cases.FUNCTIONS[op]

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        y = right(*args, **kwargs)
        return torch.nextafter(y, y + 1) if len(y) > 20 and op != "activation" else y * (1.001 if op == "activation" else 1)

    monkeypatch.setitem(cases.FUNCTIONS, op, wrong)
    (result,) = played({name: SMALL[name]}, tmp_path)["results"]
    for way in ("cpu portable", "pytorch portable"):
        assert says in result["contestants"][way]["wrong"] and "ms" not in result["contestants"][way]
    assert result["ratios"] == {} and "WRONG" in results.line_of(name, result)
    assert all("ms" in c for c in result["contestants"].values() if not c["ours"])


def test_a_wrong_model_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rk, "patch", lambda model, mode: None)  # stock: its bits hang on the batch
    (result,) = played({"model, mixed": SMALL["model, mixed"]}, tmp_path)["results"]
    assert "against in the batch" in result["contestants"]["cpu portable"]["wrong"]


def test_what_fails_costs_its_own_cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(device.WAYS, "cpu", (("cpu", "portable"), ("triton", "portable"), ("nobody", "portable")))
    table = {"broken": job(device.linear, 0, 0, 0, "fp32", None), "linear": SMALL["linear"]}
    broken, good = played(table, tmp_path)["results"]
    assert "error" in broken["contestants"]["building the case"]
    cells = {n: "ms" in c for n, c in good["contestants"].items()}
    assert cells == {"cpu portable": True, "triton portable": False, "nobody portable": False, "eager": True}


def test_the_list() -> None:
    table = device.jobs()
    quick = [n for n, j in table.items() if j.quick]
    assert 15 <= len(quick) <= 30 and len(table) <= 150
    groups = [j.group for j in table.values()]
    assert {"model", "attention", "linear", "sparse_ffn", "rows"} == set(groups)
    assert max(map(len, table)) <= 36
    for m in (1, 16, 128, 1024, 4096, 16384):
        assert f"linear {m}x768x3072 fp16" in table and f"linear {m}x1024x4096 fp16" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cuda", "--quick"]) == 2
    printed = capsys.readouterr().out
    assert "linear 1x768x3072 fp16: not measured" in printed and ("GPU" in printed or "CUDA" in printed)
    assert run.main(["--device", "cuda", "--only", "nothing of the kind"]) == 2


WORKER = """
import json, os, sys, time
journal, dies, how = sys.argv[1:]
lines = [json.loads(l) for l in open(journal)] if os.path.exists(journal) else []
lost = {tuple(l["lost"][:2]) for l in lines if "lost" in l}
done = {l["done"] for l in lines if "done" in l}
def say(**line):
    with open(journal, "a") as file: file.write(json.dumps(line) + "\\n")
for case in "abc":
    if case in done: continue
    for contestant in ("one", "two"):
        if (case, contestant) in lost: continue
        say(begins=[case, contestant])
        if case + contestant == dies:
            if how == "kill": os.kill(os.getpid(), 11)
            time.sleep(60)
    say(done=case, contestants={})
"""


@pytest.mark.parametrize(("how", "says"), [("kill", "ended with -11"), ("hang", "no answer")])
def test_another_worker_goes_on_behind_what_killed_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str, says: str
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(relay, "RUN", script)
    journal = relay.Journal(tmp_path / "journal")
    relay.supervise(
        journal, [str(journal.path), "btwo", how], time.time() + 100, Console(), step=3.0 if how == "hang" else 50.0
    )
    assert list(journal.done()) == ["a", "b", "c"]
    assert says in journal.lost()["b"]["two"] and journal.unfinished() is None
    begun = [line["begins"] for line in journal.lines() if "begins" in line]
    assert begun == [["a", "one"], ["a", "two"], ["b", "one"], ["b", "two"], ["b", "one"], ["c", "one"], ["c", "two"]]


def test_a_worker_that_cannot_start_is_not_started_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(1)")
    monkeypatch.setattr(relay, "RUN", script)
    relay.supervise(relay.Journal(tmp_path / "journal"), [], time.time() + 100, Console())
