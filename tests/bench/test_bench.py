"""bench/: its gate catches a wrong and a batch-dependent kernel, its file is whole or absent, its inputs are as stated."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import cases
import rerank_kernels as rk
from bench import run
from bench.cases import contests, decoders, memory, models, ops, shapes
from bench.harness import turns
from bench.pages import results, tables
from rerank_kernels.backend import registry

PLACE = ops.Place()
SMALL = {
    "linear small": lambda: ops.linear(PLACE, 40, 96, 48),
    "layer_norm small": lambda: ops.layer_norm(PLACE, 40, 64),
    "softmax small": lambda: ops.softmax(PLACE, 40, 50),
    "gelu small": lambda: ops.gelu(PLACE, 40, 33, "bf16"),
    "attention small": lambda: ops.attention(PLACE, (70, 70), 2, 16),
    "bmm small": lambda: ops.bmm(PLACE, 40, 12, 16, 9, "fp32"),
    "sparse_ffn small": lambda: ops.sparse_ffn(PLACE, 1, 64, 200, gate=True),
}
TINY = shapes.Shape("XLMRoberta", 2, 32, 64, 2, 3000, 514)


def bench(monkeypatch: pytest.MonkeyPatch, table: dict[str, Callable[[], turns.Work]], *argv: str) -> int:
    monkeypatch.setattr(run, "contested", lambda quick: table)
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
        assert shape.hidden % shape.heads == 0, name
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
        ours, theirs = r["contestants"].values()
        assert ours["ours"] and not theirs["ours"] and len(ours["all_ms"]) == len(theirs["all_ms"]) >= 3
        (line,) = results.lines(r)
        assert line["ours_ms"] > 0 and line["theirs_ms"] > 0 and math.isfinite(line["ratio"])
    facts = held["machine"]
    assert facts["numerics"] == rk.NUMERICS_VERSION
    assert facts["backend"] == registry.active("cpu").name
    assert facts["torch"] == torch.__version__ and facts["threads"] >= 1 and facts["cores"] >= 1 and facts["cpu"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in SMALL)


def caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> str:
    """What the bench says of the kernel that is in place now: it must fail, time nothing and write nothing."""
    monkeypatch.setattr(run, "play", lambda *_, **__: pytest.fail("timed in spite of the gate"))
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
    bias = torch.full
    monkeypatch.setattr(torch, "full", lambda shape, value, **how: bias(shape, value + 1.0, **how))
    monkeypatch.setitem(SMALL, "sparse_ffn other", lambda: ops.sparse_ffn(PLACE, 1, 64, 200, gate=False))
    assert "neurons are active, want 20" in caught(monkeypatch, tmp_path, capsys, "sparse_ffn other")


@pytest.mark.parametrize("gate", [False, True])
def test_sparse_and_dense_compute_the_same(gate: bool) -> None:
    ours, dense = ops.sparse_ffn(PLACE, 1, 64, 200, gate=gate).contestants
    torch.testing.assert_close(ours.call(0)[0], dense.call(0))


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    contests.forget()
    yield
    contests.forget()


@pytest.mark.usefixtures("tiny_model")
@torch.no_grad()
def test_whole_model_and_its_three_rivals() -> None:
    lengths = (16, 40, 9, 30, 30, 8, 21, 12, 33)
    model = models.Model(PLACE, TINY, lengths, "fp32")
    ours, *rivals = model.contest().contestants
    ours.gate()
    padded, eights, single = (r.call(0) for r in rivals)
    order = sorted(range(9), key=lambda i: lengths[i], reverse=True)
    for ways in (eights, single):
        torch.testing.assert_close(torch.cat(ways), padded[0][order], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.call(0), padded[0], atol=1e-4, rtol=0)
    stock, patched = models.stock_model(*model.key), model.ours()
    assert all(a is b for a, b in zip(stock.parameters(), patched.parameters(), strict=True)), "the weights are not shared"
    with pytest.raises(AssertionError, match="alone against in the batch"):
        model.gate(lambda: stock, "stock")
    right = {i: ours.call(0)[i] for i in model.telling()}
    model.near_truth(right, "an engine")
    with pytest.raises(AssertionError, match=r"an engine, pair \d: logit 0.001 from float64"):
        model.near_truth({i: logit + 1e-3 for i, logit in right.items()}, "an engine")


@torch.no_grad()
@pytest.mark.parametrize("dtype", decoders.SLACK)
def test_decoders_and_their_gate(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The gate falls for a model that looks at the batch, at what is cached, or computes something else."""
    sizes = {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 8, "head_dim": 16}
    monkeypatch.setattr(decoders, "SHAPES", {"tiny": ("Qwen3", sizes)})
    contests.forget()
    try:
        for token in (False, True):
            ours, *rivals = decoders.contest(PLACE, "tiny", 2, (7, 12) if not token else (12,), dtype, token).contestants
            assert ours.gate is not None
            ours.gate()
            slack = {"atol": 0.2 if dtype == "bf16" else 1e-4, "rtol": 0.0}
            for rival in rivals:
                torch.testing.assert_close(ours.call(0).float(), rival.call(1).float(), **slack)
            torch.testing.assert_close(ours.call(0), ours.call(1), atol=0.0, rtol=0.0)  # the cache is cut back
        made = decoders.stacks("tiny", 2)
        ids, mask = torch.arange(24).view(2, 12), torch.ones(2, 12, dtype=torch.int64)
        looks: list[tuple[Callable[[Tensor], float], str]] = [
            (lambda ids: 0.1 * ids.shape[0], "alone"),
            (lambda ids: 0.1 * ids.shape[1], "behind"),
            (lambda ids: 0.1, "from"),
        ]
        for wrong, says in looks:

            def model(wrong: Callable[[Tensor], float] = wrong, **given: Any) -> Any:
                out = made[dtype, "ours"](**given)
                out.last_hidden_state = out.last_hidden_state + wrong(given["input_ids"])
                return out

            with pytest.raises(AssertionError, match=says):
                decoders.gate({**made, (dtype, "ours"): model}, 12, ids, mask, dtype)
    finally:
        contests.forget()


# ---- the clock -------------------------------------------------------------------------------------------------------------

OURS = turns.Contestant("ours", ours=True)
QUICK = turns.Pace(0.0, 3, 10.0)


def cell(ms: list[float], ours: bool = False, **more: Any) -> dict[str, Any]:
    return {"ours": ours, "ms": statistics.median(ms), "all_ms": ms, **more}


def test_ratio_and_verdict() -> None:
    def line(ours: list[float], theirs: list[float], **more: Any) -> dict[str, Any]:
        (found,) = results.lines({"case": "case", "contestants": {"ours": cell(ours, True), "rival": cell(theirs, **more)}})
        return found

    found = line([1.0, 2.0, 1.0], [3.0, 6.0, 2.0], bar=3.0)
    assert (found["ratio"], found["ours_ms"], found["theirs_ms"], found["verdict"]) == (3.0, 1.0, 3.0, "ok")
    assert line([1.0], [2.9], bar=3.0)["verdict"] == "FALLS SHORT" and line([1.0], [0.5])["verdict"] is None
    assert line([9.0], [4.0], beside_ms=[2.0])["ratio"] == 2.0, "who is away has rounds of its own with ours"


def test_who_is_missing_or_wrong_has_a_row_and_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    def lost(error: Exception) -> Callable[[int], float]:
        raise error

    rivals = [
        turns.Contestant("a", away=lambda: lost(AssertionError("logit 1 from float64's")), bar=1.0),
        turns.Contestant("b", bar=0.0),
        turns.Contestant("c", away=lambda: lost(turns.Missing("not installed: engine")), bar=1.0),
        turns.Contestant("d", lambda i: lost(ValueError("no such shape"))),
    ]
    result = {"case": "case", "group": "g", "contestants": turns.play(turns.Work([OURS, *rivals]), QUICK)}
    a, b, c, d = results.lines(result)
    assert a["ratio"] is None and a["verdict"] is None and a["why"].startswith("WRONG: logit 1")
    assert c["why"] == "not installed: engine" and d["why"] == "ValueError: no such shape" and b["verdict"] == "ok"
    tables.show(Console(width=150), {"results": [result]})
    printed = capsys.readouterr().out
    assert "a: WRONG: logit 1 from float64's (case and 0 more)" in printed and "c: not installed: engine" in printed


def test_who_fails_in_a_turn_leaves_the_others_their_times() -> None:
    left = [3]

    def fails(i: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise ValueError("no more")

    cells = turns.play(turns.Work([OURS, turns.Contestant("a", fails), turns.Contestant("b")]), QUICK)
    assert cells["a"]["error"] == "ValueError: no more" and "ms" in cells["b"] and "ms" in cells["ours"]


def test_who_is_away_has_turns_of_its_own_with_ours() -> None:
    """Ours beside a sleeper is timed apart from ours beside a rival in this process, and once it is awake again."""
    log: list[tuple[str, float]] = []

    def called(name: str) -> None:
        log.append((name, time.perf_counter()))

    away = turns.Contestant("away", away=lambda: lambda n: called(f"away {n}") or 1.0)
    here = turns.Contestant("here", lambda i: called("here") or _wait())
    ours = replace(OURS, call=lambda i: called("ours") or _wait())
    cells = turns.play(turns.Work([ours, here, away]), QUICK)
    assert [len(c["all_ms"]) for c in cells.values()] == [3, 3, 3] and len(cells["away"]["beside_ms"]) == 3
    names, times = zip(*log, strict=True)
    apart = names.index("ours", len(names) - 1 - names[::-1].index("here"))  # behind the last of those who are here
    began = apart
    for i in range(apart, len(names)):
        if names[i] == "ours" and names[i - 1] != "ours":
            began = i
        elif names[i] != "ours" and names[i - 1] == "ours":
            assert times[i] - times[began] >= turns.AWAKE, "ours was timed before it was awake"
    assert names[apart:].count("away 1") == 3


def test_turns_alternate() -> None:
    order: list[str] = []
    contestants = [replace(OURS, call=lambda i: order.append("a") or _wait())]
    contestants.append(turns.Contestant("b", lambda i: order.append("b") or _wait()))
    cells = turns.play(turns.Work(contestants), turns.Pace(0.02, 4, 10.0))
    assert len(cells["ours"]["all_ms"]) == len(cells["b"]["all_ms"]) >= 4
    assert ("abba" * len(order)).startswith("".join(order)[4:])  # after two warm-up calls each


def test_what_takes_long_has_fewer_rounds() -> None:
    pace = turns.Pace(5.0, 7, long=0.1, enough=1.0)

    class Fake(turns.Turn):
        def __init__(self, seconds: float) -> None:
            self.lasts = self.once = seconds

        def measure(self) -> tuple[float, float]:
            return self.once, self.once

    def rounds(seconds: float) -> int:
        cell: turns.Cell = {}
        turns.interleave({"a": Fake(seconds)}, pace, {"a": cell}, {})
        return len(cell["all_ms"])

    assert [rounds(s) for s in (0.05, 0.11, 0.5, 2.0)] == [100, 45, 10, 1]
    assert [rounds(s) for s in (0.9,)] == [6]


def _wait() -> None:
    end = time.perf_counter() + 0.003
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize(("held", "code"), [(False, 0), (True, 1)])
def test_a_short_bar_is_said_and_fails_only_strict_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], held: bool, code: int
) -> None:
    table = {"linear slow": lambda: ops.linear(PLACE, 40, 96, 48, bar=1e9)}
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
        raise turns.Missing("there is no /proc")

    made: dict[str, tuple[str, Callable[[], run.Results]]] = {
        "memory small": ("memory", lambda: [{**held, "verdict": "FALLS SHORT"}]),
        "bits small": ("bits", lambda: [bits]),
        "lost": ("lost", missing),
    }
    monkeypatch.setattr(run, "contested", lambda quick: {"softmax small": SMALL["softmax small"]})
    monkeypatch.setattr(run, "studies", lambda quick: made)
    monkeypatch.setattr(ops, "ELEMENT_BAR", None)
    out, threads = tmp_path / "a.json", torch.get_num_threads()
    try:
        assert run.main(["--quick", "--strict", "--json", str(out)]) == 1
        printed = capsys.readouterr().out
        assert "120 MiB" in printed and "1.20, FALLS SHORT" in printed
        assert "of 8 pairs" in printed and "0 of 1 reached, 1 FALL SHORT" in printed
        assert "lost: not measured: there is no /proc" in printed
        content = json.loads(out.read_text())
        assert content["memory"][0]["ratio"] == 1.2 and content["bits"] == [bits] and "lost" not in content
        assert run.main(["--quick", "--only", "bits small", "--json", str(out)]) == 0
        content = json.loads(out.read_text())
        assert content["results"] == [] and content["only"] == ["bits small"] and "memory" not in content
    finally:
        torch.set_num_threads(threads)


def bars(quick: bool) -> dict[str, list[float | None]]:
    """Case -> bars, in the order of the rivals; nothing is made for it but tensors of no memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.Place, "random", lambda self, shape, dtype, seed, scale=1.0: torch.zeros(()).expand(shape))
        patch.setattr(ops, "_ffn", lambda *of: (ops.Op("sparse_ffn", "", {"x": (1,)}, {}), torch.arange(11008.0)[None]))
        patch.setattr(models, "stock_model", lambda *_: None)
        work = {name: build() for name, build in run.contested(quick).items()}
    return {name: [c.bar for c in w.contestants if not c.ours] for name, w in work.items()}


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
    for name in ("llama-3.2-1b", "qwen3-0.6b"):
        for what, of in (("1x512, fp32", [1.0]), ("8x128, fp32", [1.0]), ("8 of 40 to 500, fp32", [1.5])):
            assert full.pop(f"{name}, 3 layers, {what}") == of
        assert full.pop(f"{name}, 3 layers, 1 token after 512, fp32") == [1.0]
        assert full.pop(f"{name}, 3 layers, 1 token after 512, bf16") == [None, 1.6]
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


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "times.json"
    run.write(out, {"a": 1})
    with pytest.raises(TypeError):
        run.write(out, {"a": object()})
    assert json.loads(out.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["times.json"]


def test_rivals_are_stock_pytorch() -> None:
    op = ops.Op("linear", "5x32x7", {"x": (32,)}, {"weight": (7, 32)}, count=5)
    work = ops.linear(PLACE, 5, 32, 7)
    assert torch.equal(work.contestants[1].call(0), F.linear(op.held["rows"]["x"], op.held["shared"]["weight"]))
