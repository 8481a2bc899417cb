"""bench/: contestants in processes of their own compute what they should, or say why they do not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import clock
import engines
import memory
import rerankers
import run
import shapes
import strict
import workers

TINY = shapes.Shape("xlm-roberta", 1, 32, 64, 2, 3000, 514)
LENGTHS = (9, 30, 12, 5)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    """No process outlives these tests."""
    yield
    engines.close()
    strict.close()
    assert not engines._workers and not engines._folders and not strict._workers


@pytest.mark.parametrize("engine", engines.ENGINES)
@torch.no_grad()
def test_engine_computes_the_models_logits(engine: str) -> None:
    if why := engines.missing(engine):
        pytest.skip(f"{engine}: {why}")
    model = shapes.reranker(TINY)
    want = torch.cat([model(**shapes.padded(TINY, [row])).logits for row in shapes.tokens(TINY, LENGTHS)])
    seen: dict[int, Tensor] = {}

    def right(logits: Mapping[int, Tensor]) -> None:
        seen.update(logits)

    for of in (4, 1):
        turn = engines.ready(engine, engines.Question(TINY, 1, LENGTHS, of, (0, 1, 3)), right)
        assert 0.0 < turn(2) < 10.0
        assert sorted(seen) == [0, 1, 3]
        torch.testing.assert_close(torch.stack([seen[i] for i in (0, 1, 3)]), want[[0, 1, 3]], atol=1e-5, rtol=0)
        seen.clear()


def test_a_wrong_engine_gets_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 check, of a worker that is a hundredth off."""

    class Off:
        def prepare(self, what: object) -> dict[str, dict[str, list[float]]]:
            return {"logits": {"0": [float(truth) + 0.01]}}

    rows = shapes.tokens(TINY, (9,))
    monkeypatch.setitem(shapes.RERANKERS, rerankers.BASE, TINY)
    monkeypatch.setattr(engines, "missing", lambda _: None)
    monkeypatch.setattr(engines, "_export", lambda *_: Path("x"))
    monkeypatch.setitem(engines._workers, "OpenVINO", Off())  # type: ignore[misc]
    rerankers.forget()
    with torch.no_grad():
        truth = rerankers.model_truth(rerankers.BASE, 1, rows[0])
        (away,) = (r for r in rerankers.model(rerankers.BASE, (9,), 1).rivals if r.name == "OpenVINO")
        with pytest.raises(AssertionError, match=r"OpenVINO, pair 0: logit 0.01 from float64's"):
            away.ready()
    rerankers.forget()


def test_an_engine_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(clock.Missing, match=r"not installed: openvino, onnx, onnxscript \(pip install -e '.\[engines\]'\)"):
        engines.ready("OpenVINO", engines.Question(TINY, 1, (9,), 1, (0,)), lambda _: None)


def test_mkl_takes_strict_mode() -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    assert (strict.says() or "").endswith(",STRICT")


def test_the_first_rival_in_strict_mode_is_one_more() -> None:
    table = run.contests(True)
    assert {n for n, b in table.items() if b.func is strict.away} == {n for n in table if strict.chosen(n)}
    assert set(strict.CASES) <= set(table) and sum(strict.chosen(n) for n in table) == len(strict.CASES) + len(strict.MODELS)
    contest = table["linear 1x768x768"]()
    assert [r.name for r in contest.rivals] == ["F.linear", "F.linear, MKL strict"]
    try:
        turn = contest.rivals[1].ready()
    except clock.Missing as why:
        pytest.skip(str(why))
    assert 0.0 < turn(3) < 1.0
    with pytest.raises(clock.Missing, match="failed: KeyError"):
        strict.ready({"case": "no such case", "quick": True, "rival": "F.linear"})


def test_bits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(TINY, hidden=96, ffn=384)
    monkeypatch.setitem(shapes.RERANKERS, "tiny", shape)
    monkeypatch.setattr(strict, "WAYS", ("stock",))
    monkeypatch.setattr(strict, "DTYPES", {"fp32": torch.float32})
    (stock,) = strict.bits("tiny", pairs=8)
    assert (stock["way"], stock["pairs"]) == ("stock", 8)
    assert sum(stock["differ"].values()) > 0 and stock["furthest"] > 0
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            ours = strict._count(shape, "fp32", True, 8)
    finally:
        torch.set_num_threads(threads)
    assert list(ours["differ"]) == ["batches of 2", "batches of 7", "batches of 32", "padding", "2 threads"]
    assert set(ours["differ"].values()) == {0} and ours["furthest"] == 0


@pytest.mark.skipif(not memory.STATUS.exists(), reason="no /proc")
def test_peak_memory_sees_what_a_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LENGTHS", {"8x128": (12,) * 8})
    shapes.reranker(TINY).save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    for who in ("stock", "ours"):
        found = memory.one(who, str(tmp_path), threads, TINY)
        assert set(found) == {"loaded", "8x128"} and min(found.values()) > 50
    hold = torch.ones(1024, 2**18)  # 1 GiB
    assert memory.peak() - found["8x128"] > 700
    del hold


@pytest.mark.exhaustive
def test_memory_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.RERANKERS, "tiny", TINY)
    records = memory.measure("tiny")
    assert [r["step"] for r in records] == list(memory.STEPS) and [r["bar"] for r in records] == [None, 1.15, None]
    for r in records:
        assert r["ratio"] == r["ours_mib"] / r["stock_mib"] and r["ours_mib"] > 50
    assert records[1]["verdict"] == ("ok" if records[1]["ratio"] <= 1.15 else "FALLS SHORT")


@pytest.fixture
def dead() -> Iterator[workers.Worker]:
    worker = workers.Worker(["-c", "print('{}', flush=True); input(); raise SystemExit(7)"])
    yield worker
    worker.close()


def test_a_contestant_that_dies_says_so(dead: workers.Worker) -> None:
    with pytest.raises(SystemExit, match="ended with 7"):
        dead.prepare({})


def test_an_engine_that_dies_loses_its_own_rows_only(
    dead: workers.Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "missing", lambda _: None)
    monkeypatch.setattr(engines, "_export", lambda *_: Path("x"))
    monkeypatch.setattr(engines, "_workers", {"OpenVINO": dead})
    asked = engines.Question(TINY, 1, (9,), 1, (0,))
    with pytest.raises(clock.Missing, match="failed: a contestant's process ended with 7"):
        engines.ready("OpenVINO", asked, lambda _: None)
    assert not engines._workers

    def dies() -> clock.Contest:
        return clock.Contest(lambda: None, [clock.Away("dead", lambda: dead.turn)], lambda: None)

    table = {"a": dies, "b": lambda: clock.Contest(lambda: None, [clock.Rival("r", lambda: None)], lambda: None)}
    results = run.run(table, budget=0.0, at_least=1, console=run.console())
    assert [r["case"] for r in results or ()] == ["b"]
    assert "a: not measured: a contestant's process ended with 7" in capsys.readouterr().out
