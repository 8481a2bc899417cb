"""bench/: contestants in processes of their own compute what they should, or say why they do not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import run
from bench.cases import contests, memory, models, ops, shapes
from bench.harness import turns, worker
from bench.rivals import engines, mkl

TINY = shapes.Shape("XLMRoberta", 1, 32, 64, 2, 3000, 514)
LENGTHS = (9, 30, 12, 5)


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    """No process outlives these tests."""
    yield
    engines.close()
    worker.close()
    assert not engines._exported and not worker._resident


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
        turn = engines.ready(engine, engines.Question(TINY, LENGTHS, of, (0, 1, 3)), right)
        assert 0.0 < turn(2) < 10.0
        assert sorted(seen) == [0, 1, 3]
        torch.testing.assert_close(torch.stack([seen[i] for i in (0, 1, 3)]), want[[0, 1, 3]], atol=1e-5, rtol=0)
        seen.clear()


def test_a_wrong_engine_gets_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float64 check, of a worker that is a hundredth off."""

    class Off:
        def ask(self, *question: object) -> dict[int, list[float]]:
            return {0: [float(truth) + 0.01]}

    monkeypatch.setattr(engines, "missing", lambda _: None)
    monkeypatch.setattr(engines, "_export", lambda *_: Path("x"))
    monkeypatch.setattr(worker, "rival", lambda name: Off())
    contests.forget()
    with torch.no_grad():
        model = models.Model(ops.Place(), TINY, (9,), "fp32")
        truth = models.truth(*model.key, tuple(model.rows[0].tolist()))
        (engine,) = (c for c in model.contest(with_engines=True).contestants if c.name == "OpenVINO")
        with pytest.raises(AssertionError, match=r"OpenVINO, pair 0: logit 0.01 from float64's"):
            engine.away()
    contests.forget()


def test_an_engine_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(turns.Missing, match=r"not installed: openvino, onnx, onnxscript \(pip install -e '.\[engines\]'\)"):
        engines.ready("OpenVINO", engines.Question(TINY, (9,), 1, (0,)), lambda _: None)


def test_mkl_takes_strict_mode() -> None:
    if not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch has no MKL")
    assert (mkl.says() or "").endswith(",STRICT")


def test_the_first_rival_in_strict_mode_is_one_more() -> None:
    table = run.contested(True)
    assert {n for n, b in table.items() if getattr(b, "func", None) is mkl.away} == {n for n in table if mkl.chosen(n)}
    assert set(mkl.CASES) <= set(table) and sum(mkl.chosen(n) for n in table) == len(mkl.CASES) + len(mkl.MODELS)
    _, plain, strict = table["linear 1x768x768"]().contestants
    assert [plain.name, strict.name] == ["F.linear", "F.linear, MKL strict"]
    try:
        turn = strict.away()
    except turns.Missing as why:
        pytest.skip(str(why))
    assert 0.0 < turn(3) < 1.0
    with pytest.raises(turns.Missing, match="failed: KeyError"):
        mkl.ready("no such case", "F.linear", True)


def test_bits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(TINY, hidden=96, ffn=384)
    monkeypatch.setattr(mkl, "WAYS", ("stock",))
    monkeypatch.setattr(mkl, "OF_BITS", ("fp32",))
    (stock,) = mkl.bits(shape, pairs=8)
    assert (stock["way"], stock["pairs"]) == ("stock", 8)
    assert sum(stock["differ"].values()) > 0 and stock["furthest"] > 0
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            ours = mkl.count(shape, "fp32", True, 8)
    finally:
        torch.set_num_threads(threads)
    assert list(ours["differ"]) == ["batches of 2", "batches of 7", "batches of 32", "padding", "2 threads"]
    assert set(ours["differ"].values()) == {0} and ours["furthest"] == 0


@pytest.mark.skipif(not memory.STATUS.exists(), reason="no /proc")
def test_peak_memory_sees_what_a_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LENGTHS", {"8x128": (12,) * 8})
    shapes.reranker(TINY).save_pretrained(tmp_path)
    for who in ("stock", "ours"):
        found = memory.one(who, str(tmp_path), TINY)
        assert set(found) == {"loaded", "8x128"} and min(found.values()) > 50
    hold = torch.ones(1024, 2**18)  # 1 GiB
    assert memory.peak() - found["8x128"] > 700
    del hold


@pytest.mark.exhaustive
def test_memory_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    records = memory.measure("tiny", TINY)
    assert [r["step"] for r in records] == ["loaded", *memory.LENGTHS] and [r["bar"] for r in records] == [None, 1.15, None]
    for r in records:
        assert r["ratio"] == r["ours_mib"] / r["stock_mib"] and r["ours_mib"] > 50
    assert records[1]["verdict"] == ("ok" if records[1]["ratio"] <= 1.15 else "FALLS SHORT")


DIES = "import sys; from multiprocessing.connection import Connection; Connection(int(sys.argv[1])).recv(); raise SystemExit(7)"


@pytest.fixture
def dead() -> Iterator[worker.Worker]:
    with worker.Worker(program=["-c", DIES]) as one:
        yield one


def test_a_contestant_that_dies_says_so(dead: worker.Worker) -> None:
    with pytest.raises(turns.Missing, match="ended with 7"):
        dead.ask(dict)
    with pytest.raises(turns.Missing, match="ended with 7"):
        dead.turn(1)


def test_a_contestant_that_says_nothing_is_ended() -> None:
    silent = worker.Worker(program=["-c", "import time; time.sleep(60)"], patience=0.2)
    with pytest.raises(turns.Missing, match="no answer for 0 s"):
        silent.ask(dict)
    assert silent.process.poll() is not None


def told(word: str) -> dict[str, object]:
    return {"said": word, "MKL_CBWR": os.getenv("MKL_CBWR"), "threads": torch.get_num_threads()}


def test_a_worker_answers_and_has_an_environment_of_its_own() -> None:
    path = os.pathsep.join(str(p) for p in reversed(Path(__file__).parents[:3]))
    with worker.Worker(environment={"MKL_CBWR": "AVX2", "PYTHONPATH": path}, threads=1) as one:
        assert one.ask(told, "a") == {"said": "a", "MKL_CBWR": "AVX2", "threads": 1}
        with pytest.raises(turns.Missing, match="failed: TypeError"):
            one.ask(told)
        assert one.turn(3) >= 0.0


def test_an_engine_that_dies_loses_its_own_rows_only(dead: worker.Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "missing", lambda _: None)
    monkeypatch.setattr(engines, "_export", lambda *_: Path("x"))
    monkeypatch.setattr(worker, "_resident", {"OpenVINO": dead})
    with pytest.raises(turns.Missing, match="its process ended with 7"):
        engines.ready("OpenVINO", engines.Question(TINY, (9,), 1, (0,)), lambda _: None)
    assert worker.resident("OpenVINO").process.pid != dead.process.pid, "a dead process is asked again"
    worker.close()

    left = [3]

    def turn(n: int) -> float:
        left[0] -= 1
        return 2.0 if left[0] else dead.turn(n)

    contestants = [turns.Contestant("ours", ours=True), turns.Contestant("stock"), turns.Contestant("dies", away=lambda: turn)]
    cells = turns.play(turns.Work(contestants), turns.Pace(0.0, 3, 99.0))
    assert "ms" in cells["stock"] and cells["dies"]["why"] == "its process ended with 7; its message is above"
