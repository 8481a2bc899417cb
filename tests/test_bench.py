"""bench/: its gate catches a wrong and a batch-dependent kernel, its file is whole or absent, its inputs are as stated."""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import cases
import rerank_kernels as rk
from rerank_kernels.backend import registry

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import clock
import memory
import ops
import rerankers
import run
import shapes
import strict

SMALL = {
    "linear small": lambda: ops.linear(40, 96, 48),
    "layer_norm small": lambda: ops.layer_norm(40, 64),
    "softmax small": lambda: ops.softmax(40, 50),
    "gelu small": lambda: ops.gelu(40, 33, torch.bfloat16),
    "attention small": lambda: ops.attention(2, 70, 2, 16),
    "sparse_ffn small": lambda: ops.sparse_ffn(64, 200, gate=True),
}
TINY = shapes.Shape("xlm-roberta", 2, 32, 64, 2, 3000, 514)


def bench(monkeypatch: pytest.MonkeyPatch, table: dict[str, Callable[[], clock.Contest]], *argv: str) -> int:
    monkeypatch.setattr(run, "contests", lambda quick: table)
    monkeypatch.setattr(run, "studies", lambda quick: {})
    threads = torch.get_num_threads()
    try:
        return run.main(["--quick", *argv])
    finally:
        torch.set_num_threads(threads)


def test_lengths_are_as_the_issue_has_them() -> None:
    lengths = shapes.MIXED_LENGTHS
    assert (len(lengths), min(lengths), max(lengths), sum(lengths)) == (32, 16, 512, 4689)
    assert statistics.median(lengths) == 107
    assert len(lengths) * max(lengths) == 16384
    assert list(lengths) != sorted(lengths) and list(lengths) != sorted(lengths, reverse=True)
    rows = shapes.tokens(TINY, lengths)
    batch = shapes.padded(TINY, rows)
    assert batch["input_ids"].shape == (32, 512) and int(batch["attention_mask"].sum()) == 4689


@pytest.mark.parametrize("left", [False, True])
def test_padded_batches_hold_the_rows(left: bool) -> None:
    rows = shapes.tokens(TINY, (5, 9, 2))
    batch = shapes.padded(TINY, rows, left=left)
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert torch.equal(ids[mask.bool()], row)
        assert bool((ids[~mask.bool()] == 1).all())
        assert int(mask[-1 if left else 0]) == 1
    assert all(torch.equal(a, b) for a, b in zip(rows, shapes.tokens(TINY, (5, 9, 2)), strict=True)), "not repeatable"


def test_every_shape_is_a_model_that_can_be() -> None:
    for name, shape in shapes.RERANKERS.items():
        assert shape.hidden == shape.heads * shape.head_dim, name
        assert shape.ffn == 4 * shape.hidden, name


def test_small_cases_run_to_a_whole_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "times.json"
    assert bench(monkeypatch, SMALL, "--json", str(out)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["times.json"]
    held = json.loads(out.read_text())
    assert {r["case"] for r in held["results"]} == set(SMALL)
    for r in held["results"]:
        assert r["ours_ms"] > 0 and r["theirs_ms"] > 0 and math.isfinite(r["ratio"])
        assert len(r["ours_all_ms"]) == len(r["theirs_all_ms"]) == r["rounds"] >= 3
        assert r["gpu"] == "not measured"
    facts = held["machine"]
    assert facts["numerics version"] == rk.NUMERICS_VERSION
    assert facts["backend"] == registry.active("cpu").name
    assert facts["torch"] == torch.__version__ and facts["threads"] >= 1 and facts["cores"] >= 1 and facts["cpu"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in SMALL)


def caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> str:
    """What the bench says of the kernel that is in place now: it must fail, time nothing and write nothing."""
    monkeypatch.setattr(clock, "interleave", lambda *_: pytest.fail("timed in spite of the gate"))
    assert bench(monkeypatch, {name: SMALL[name]}, "--json", str(tmp_path / "times.json")) == 1
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert "nothing was timed" in printed and " ms" not in printed
    return printed


def test_gate_catches_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tf32(x: Tensor, weight: Tensor) -> Tensor:  # as a GPU does by default: ten bits of each factor
        keep = lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32)  # noqa: E731
        return rk.linear(keep(x), keep(weight))

    monkeypatch.setitem(cases.FUNCTIONS, "linear", tf32)
    assert "beyond the bound" in caught(monkeypatch, tmp_path, capsys, "linear small")


def test_gate_catches_a_kernel_that_looks_at_the_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def split(x: Tensor, weight: Tensor) -> Tensor:  # splits K where rows are few, as BLAS libraries do
        if len(x) > 16:
            return rk.linear(x, weight)
        return rk.linear(x[:, :32], weight[:, :32]) + rk.linear(x[:, 32:], weight[:, 32:])

    monkeypatch.setitem(cases.FUNCTIONS, "linear", split)
    assert "alone" in caught(monkeypatch, tmp_path, capsys, "linear small")


def test_gate_catches_another_number_of_active_neurons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build() -> clock.Contest:
        contest = ops.sparse_ffn(64, 200, gate=False)
        contest.rivals[0].call.keywords["up_bias"].add_(1.0)
        return contest

    monkeypatch.setitem(SMALL, "sparse_ffn other", build)
    assert "neurons are active, want 20" in caught(monkeypatch, tmp_path, capsys, "sparse_ffn other")


@pytest.mark.parametrize("gate", [False, True])
def test_sparse_and_dense_compute_the_same(gate: bool) -> None:
    contest = ops.sparse_ffn(64, 200, gate=gate)
    torch.testing.assert_close(contest.ours()[0], contest.rivals[0].call())


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(shapes.RERANKERS, rerankers.BASE, TINY)
    rerankers.models.cache_clear()
    yield
    rerankers.models.cache_clear()


@pytest.mark.usefixtures("tiny_model")
@torch.no_grad()
def test_whole_model_and_its_three_rivals() -> None:
    lengths = (16, 40, 9, 30, 30, 8, 21, 12, 33)
    contest = rerankers.model(rerankers.BASE, lengths, 2, with_engines=False)
    contest.gate()
    padded, eights, single = (r.call() for r in contest.rivals)
    order = sorted(range(9), key=lambda i: lengths[i], reverse=True)
    for ways in (eights, single):
        torch.testing.assert_close(torch.cat(ways), padded[0][order], atol=1e-4, rtol=0)
    torch.testing.assert_close(contest.ours(), padded[0], atol=1e-4, rtol=0)
    stock, ours = rerankers.models(rerankers.BASE, 2)
    assert all(a is b for a, b in zip(stock.parameters(), ours.parameters(), strict=True)), "the weights are not shared"
    rows = shapes.tokens(TINY, lengths)
    with pytest.raises(AssertionError, match="alone against in the batch"):
        rerankers.model_gate(rerankers.BASE, 2, stock, rows)
    right = {i: contest.ours()[i] for i in rerankers.telling(rows)}
    rerankers.near_truth(rerankers.BASE, 2, rows, right, "an engine")
    with pytest.raises(AssertionError, match=r"an engine, pair \d: logit 0.001 from float64"):
        rerankers.near_truth(rerankers.BASE, 2, rows, {i: logit + 1e-3 for i, logit in right.items()}, "an engine")


def records(
    monkeypatch: pytest.MonkeyPatch, ours: list[float], *theirs: list[float], bar: float | None = None
) -> list[dict[str, Any]]:
    monkeypatch.setattr(clock, "interleave", lambda *_: [ours, *theirs])
    rivals = [clock.Rival(f"rival {i}", lambda: None, bar) for i in range(len(theirs))]
    return clock.measure("case", clock.Contest(lambda: None, rivals, lambda: None, {"group": "g"}), 1.0, 1)


def test_ratio_and_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = records(monkeypatch, [1.0, 2.0, 1.0], [3.0, 6.0, 2.0], bar=3.0)
    assert (line["ratio"], line["ours_ms"], line["theirs_ms"], line["verdict"]) == (3.0, 1000.0, 3000.0, "ok")
    assert line["group"] == "g"
    (line,) = records(monkeypatch, [1.0], [2.9], bar=3.0)
    assert line["verdict"] == "FALLS SHORT"
    (line,) = records(monkeypatch, [1.0], [0.5])
    assert line["verdict"] is None


def test_who_is_missing_or_wrong_has_a_row_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> clock.Turn:
        raise AssertionError("logit 1 from float64's")

    def missing() -> clock.Turn:
        raise clock.Missing("not installed: engine")

    rivals = [clock.Away("a", wrong, 1.0), clock.Rival("b", lambda: None, 0.0), clock.Away("c", missing, 1.0)]
    a, b, c = clock.measure("case", clock.Contest(lambda: None, rivals, lambda: None), 0.0, 1)
    assert a["theirs_ms"] is None and a["ratio"] is None and a["verdict"] is None and a["why"].startswith("WRONG: logit 1")
    assert c["why"] == "not installed: engine" and c["theirs_all_ms"] == [] and c["ours_ms"] is None
    assert b["verdict"] == "ok"
    run.show(Console(width=150), {}, [a, b, c])
    printed = capsys.readouterr().out
    assert "a: WRONG: logit 1 from float64's" in printed and "c: not installed: engine" in printed


def test_who_is_away_has_turns_of_its_own_with_ours() -> None:
    """Ours beside a sleeper is timed apart from ours beside a rival in this process, and once it is awake again."""
    log: list[tuple[str, float]] = []

    def called(name: str) -> None:
        log.append((name, time.perf_counter()))

    away = clock.Away("away", lambda: lambda n: called(f"away {n}") or 1.0)
    here = clock.Rival("here", lambda: called("here") or _wait())
    ours = lambda: called("ours") or _wait()  # noqa: E731
    records = clock.measure("case", clock.Contest(ours, [here, away], lambda: None), 0.0, 3)
    assert [r["against"] for r in records] == ["here", "away"] and [r["rounds"] for r in records] == [3, 3]
    names, times = zip(*log, strict=True)
    turns = [i for i, name in enumerate(names) if name == "away 1"]
    begins = [len(names) - 1 - names[::-1].index("here"), *turns]  # before the first: the last of those who are here
    assert len(turns) == 5 and turns[-1] == len(names) - 1
    for begin, turn in zip(begins, turns, strict=False):
        assert set(names[begin + 1 : turn]) == {"ours"}
        assert times[turn] - times[begin + 1] >= clock.AWAKE, "ours was timed before it was awake"


def test_turns_alternate() -> None:
    turns: list[str] = []
    calls = [lambda: turns.append("a") or _wait(), lambda: turns.append("b") or _wait()]
    times = clock.interleave([functools.partial(clock.calls, call) for call in calls], 0.02, 4)
    assert len(times[0]) == len(times[1]) >= 4
    assert "".join(turns)[4:] == "ab" * len(times[0])  # after two warm-up calls each


def _wait() -> None:
    end = time.perf_counter() + 0.003
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(("held", "code"), [(False, 0), (True, 1)])
def test_a_short_bar_is_said_and_fails_only_strict_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held: bool, code: int
) -> None:
    table = {"linear slow": lambda: ops.linear(40, 96, 48, bar=1e9)}
    assert bench(monkeypatch, table, *(["--strict"] if held else [])) == code
    printed = capsys.readouterr().out
    assert "FALLS SHORT" in printed and "0 of 1 reached, 1 FALL SHORT" in printed


def test_studies_stand_beside_the_contests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their tables, their part of the file, a bar that counts, and one that fails without taking the others along."""
    held = {"model": "m", "step": "8x128", "stock_mib": 100.0, "ours_mib": 120.0, "ratio": 1.2, "bar": 1.15}
    bits = {"model": "m", "way": "stock", "dtype": "fp32", "pairs": 8, "differ": {"padding": 5}, "furthest": 1e-7}

    def missing() -> run.Results:
        raise clock.Missing("there is no /proc")

    made: dict[str, tuple[str, Callable[[], run.Results]]] = {
        "memory small": ("memory", lambda: [{**held, "verdict": "FALLS SHORT"}]),
        "bits small": ("bits", lambda: [bits]),
        "lost": ("lost", missing),
    }
    monkeypatch.setattr(run, "contests", lambda quick: {"softmax small": SMALL["softmax small"]})
    monkeypatch.setattr(run, "studies", lambda quick: made)
    monkeypatch.setattr(ops, "ELEMENT_BAR", None)
    out, threads = tmp_path / "a.json", torch.get_num_threads()
    try:
        assert run.main(["--quick", "--strict", "--json", str(out)]) == 1
        printed = capsys.readouterr().out
        assert "peak memory in MiB" in printed and "1.20" in printed and "FALLS SHORT" in printed
        assert "those with other bits than alone" in printed and "0 of 1 reached, 1 FALL SHORT" in printed
        assert "lost: not measured: there is no /proc" in printed
        content = json.loads(out.read_text())
        assert content["memory"][0]["ratio"] == 1.2 and content["bits"] == [bits] and "lost" not in content
        assert run.main(["--quick", "--only", "bits small", "--json", str(out)]) == 0
        content = json.loads(out.read_text())
        assert content["results"] == [] and content["only"] == ["bits small"] and "memory" not in content
    finally:
        torch.set_num_threads(threads)


def bars(quick: bool) -> dict[str, list[float | None]]:
    """Case -> bars, in the order of the rivals; ops are not built for it, nor are models."""
    table = {}
    for name, build in run.contests(quick).items():
        strict_bar: list[float | None] = []
        if build.func is strict.away:
            build, strict_bar = build.args[0], [build.args[3]]
        given = build.keywords
        if build.func is rerankers.model:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rerankers, "models", lambda *_: (None, None))
                table[name] = [r.bar for r in build().rivals] + strict_bar
        else:
            own = {ops.attention: ops.ATTENTION_BAR, ops.layer_norm: ops.ELEMENT_BAR}
            own |= {ops.softmax: ops.ELEMENT_BAR, ops.gelu: ops.ELEMENT_BAR}
            half = next((a for a in build.args if isinstance(a, torch.dtype) and a != torch.float32), None)
            table[name] = [None if half else given.get("bar", own.get(build.func)), *strict_bar]
    return table


def test_every_bar_of_the_issue_is_in_the_list() -> None:
    full = bars(False)
    base, large = ((768, 768), (768, 3072), (3072, 768)), ((1024, 1024), (1024, 4096), (4096, 1024))
    for k, n in (*base, *large):
        for m, bar in ((2048, 0.95), (512, 0.95), (128, 0.95), (64, 0.95), (16, None), (8, 1.0), (4, 1.0), (1, 1.0)):
            strictly = [1.0] if (k, n) in base and m in (2048, 128, 16, 1) else []
            assert full.pop(f"linear {m}x{k}x{n}") == [bar, *strictly]
    for name in ("16x128, 12", "8x256, 12", "5x384, 12", "4x512, 12", "4x512, 16"):
        assert full.pop(f"attention {name} heads of 64") == [1.2]
    for name in ("layer_norm + residual 2048x768", "layer_norm + residual 2048x1024", "layer_norm + residual 128x768"):
        assert (full.pop(name), full.pop(f"{name} bfloat16")) == ([1.5], [None])
    for name in ("activation gelu 2048x3072", "activation gelu 128x3072"):
        assert (full.pop(name), full.pop(f"{name} bfloat16")) == ([1.5], [None])
    for name in ("12288x128", "6144x512", "1536x128"):
        assert full.pop(f"softmax {name}") == [1.5]
    shares = {share: full.pop(f"sparse_ffn ReLU 1x4096x11008, {share}% active") for share in (2, 5, 10, 20, 50, 100)}
    assert shares == {2: [None], 5: [None], 10: [4.0], 20: [None], 50: [None], 100: [None]}
    assert full.pop("sparse_ffn ReLU 128x4096x11008, 10% active") == [1.0]
    assert full.pop("sparse_ffn ReGLU 1x4096x11008, 10% active") == [4.0]
    runtime = [1.15, 1.15, None]  # ONNX Runtime, its fused form, OpenVINO
    assert full.pop("bge-reranker-base, 8x128") == full.pop("bge-reranker-base, 4x512") == [1.2, *runtime, 1.0]
    assert full.pop("bge-reranker-base, 1x128") == [1.2, None, None, None]
    assert full.pop("bge-reranker-base, 32 of 16 to 512") == [3.8, 1.6, 1.25, None, None, None, 1.0]
    assert not any(bar for of in full.values() for bar in of), f"bars that the issue has not: {full}"
    assert memory.BAR == 1.15
    quick = bars(True)
    assert not any(bar for name, of in quick.items() if "bge" in name or "MiniLM" in name for bar in of)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--only", "nothing of the kind"], "names no case"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--json", "no/such/folder/x.json"], "there is no directory"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(argv)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bars_of_ops_are_held_in_float32_only(dtype: torch.dtype) -> None:
    built = [
        ops.attention(1, 4, 2, 16, dtype),
        ops.layer_norm(4, 8, dtype),
        ops.gelu(4, 8, dtype),
        ops.linear(4, 8, 8, dtype, 0.5),
    ]
    assert [c.rivals[0].bar for c in built] == ([1.2, 1.5, 1.5, 0.5] if dtype == torch.float32 else [None] * 4)
    assert ops.softmax(4, 8).rivals[0].bar == 1.5


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    run.write_json(out, {"a": 1})
    with pytest.raises(TypeError):
        run.write_json(out, {"a": object()})
    assert json.loads(out.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["times.json"]


def test_table_says_that_no_gpu_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    run.show(Console(width=150), {"cpu": "x"}, [clock.record("a case", "F.linear", [1e-3], [2e-3], 1.0)])
    printed = capsys.readouterr().out
    assert "not measured" in printed and "2.00" in printed and "ok" in printed


def test_rivals_are_stock_pytorch() -> None:
    contest = ops.linear(5, 32, 7)
    rows = contest.rivals[0].call.keywords
    assert torch.equal(contest.rivals[0].call(), F.linear(rows["x"], rows["weight"]))
