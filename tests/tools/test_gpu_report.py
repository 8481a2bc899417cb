"""tools/gpu_report with steps that only pretend: the sharing of time, restarts, steps that die, hang or say nonsense, the page.

What a GPU would do is not here. That bits which differ come out red is: a launcher whose way 1 is wrong on purpose.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import pages
from tools.gpu_report import goals, machine, outcome, page, runner
from tools.gpu_report.runner import Result
from tools.gpu_report.steps import PROBES, Step, allowance, planned, probes_in, steps

ROOT = Path(__file__).parents[2]

KEY = {"gpu": "none", "revision": "1"}
PROGRAM = ROOT / "tools" / "gpu_report"


def step(name: str, code: str, seconds: float = 20.0, **more: Any) -> Step:
    """A step that runs these lines; `say(...)` prints a line of JSON."""
    begin = "import json, os, sys, time\ndef say(**line): print(json.dumps(line), flush=True)\n"
    return Step(name, f"What does {name} say?", (sys.executable, "-c", begin + code), seconds, **more)


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., list[Result]]:
    def run(*listed: Step, key: dict[str, Any] = KEY, seconds: float = 60.0, quiet: float = 30.0) -> list[Result]:
        told: list[str] = []
        environment = {"GPU_REPORT_TEST": str(tmp_path), "PATH": "/usr/bin:/bin"}
        return runner.run(listed, tmp_path, key, seconds, environment, lambda s, words, r: told.append(words), quiet)

    return run


ONCE = "open(os.environ['GPU_REPORT_TEST'] + '/ran', 'a').write('x')\n"


CASES = f"sys.path[:0] = [{str(ROOT)!r}]\nfrom tools.gpu_report.work.cases import cases\n"


def ran(tmp_path: Path) -> int:
    return len((tmp_path / "ran").read_text())


# ---- the sharing of time


def test_all_the_time_is_shared_out_as_it_is_wanted() -> None:
    listed = [Step("build", "", (), 100, fixed=True), Step("a", "", (), 10), Step("b", "", (), 30)]
    assert [given for _, given in planned(listed, 180)] == [100, 20, 60]
    assert [given for _, given in planned(listed, 120)] == [100, 5, 15]


def test_no_step_starves_a_later_one_and_what_one_leaves_is_for_those_behind_it() -> None:
    early, late = Step("a", "", (), 1000), Step("b", "", (), 10)
    given = allowance(early, [late], 101)
    assert given == pytest.approx(100)
    assert allowance(late, [], 101 - 30) == 71  # the early one took 30


def test_a_build_that_takes_longer_than_usual_may_have_all_the_time_that_there_is() -> None:
    assert allowance(Step("build", "", (), 60, fixed=True), [Step("a", "", (), 10)], 400) == 400


def test_the_order_is_by_value() -> None:
    names = [s.name for s in steps()]
    assert names[:6] == ["build", "golden-cuda", "promises-cuda", "ways-cuda", "models", "probe-arithmetic"]
    assert (
        names.index("probe-cublaslt") < names.index("models-compiled") < names.index("ways-triton") < names.index("probe-mufu")
    )
    assert sorted(names) == sorted(set(names)) and {s.name for s in probes_in(PROBES)} <= set(names), "each once"
    assert {s.needs for s in steps()[1:]} == {"build"} and {s.needs for s in steps(build=False)} == {None}


def test_probes_are_discovered_with_their_question_and_time(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text('"""Is it\nso?\n\nMore."""\nSECONDS = 7\n')
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "c.py").write_text("def broken(:\n")
    (tmp_path / "_shared.py").write_text("")
    found = probes_in(tmp_path)
    assert [(s.name, s.seconds) for s in found] == [("probe-a", 20.0), ("probe-b", 7.0), ("probe-c", 20.0)]
    assert found[1].question == "Is it so?"
    assert "does not parse" in found[2].question


@pytest.mark.parametrize("path", sorted(PROBES.glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_probe_asks_a_question_and_prints_json(path: Path) -> None:
    tree = ast.parse(path.read_text())
    question = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    assert question.endswith("?"), "the first lines of a probe are its question"
    assert path.read_text().count("print(json.dumps(") == 1


# ---- what becomes of a step


def test_a_step_that_ends_well_is_kept_and_not_run_again(go: Callable[..., list[Result]], tmp_path: Path) -> None:
    good = step("good", ONCE + "say(case='x', value=1)")
    (first,) = go(good)
    (second,) = go(good)
    assert (first.status, second.status, second.kept) == ("ok", "ok", True)
    assert first.records == second.records == [{"case": "x", "value": 1}]
    assert ran(tmp_path) == 1


def test_another_gpu_or_revision_runs_it_again(go: Callable[..., list[Result]], tmp_path: Path) -> None:
    good = step("good", ONCE + "say(value=1)")
    go(good)
    go(good, key={**KEY, "gpu": "another"})
    assert ran(tmp_path) == 2


def test_a_step_that_dies_is_noted_with_its_last_words_and_the_next_one_runs(go: Callable[..., list[Result]]) -> None:
    bad, good = go(step("bad", "say(value=1); print('last words', file=sys.stderr); sys.exit(3)"), step("good", "say(value=2)"))
    assert bad.status == "failed" and "ended with 3: last words" in bad.why and "last words" in bad.last
    assert bad.records == [{"value": 1}]
    assert good.status == "ok"


def test_a_step_over_its_time_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    child = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 5; touch {tmp_path}/late']); "
    slow = step("slow", "say(case='a'); " + child + "time.sleep(60)")
    bad = runner.one(slow, tmp_path, KEY, 4.0, {"PATH": "/usr/bin:/bin"})
    assert bad.status == "over time" and "within 4 s" in bad.why and bad.records == [{"case": "a"}]
    time.sleep(3.0)
    assert not (tmp_path / "late").exists()


def test_a_broken_line_is_told_and_costs_no_other(go: Callable[..., list[Result]]) -> None:
    broken, good = go(step("broken", "say(value=1); print('{\"value\": nope}'); say(value=2)"), step("good", "say(value=2)"))
    assert broken.status == "broken" and "nope" in broken.why
    assert broken.records == [{"value": 1}, {"value": 2}]
    assert good.status == "ok"


@pytest.mark.parametrize(("lines", "count"), [("", 0), ("say(a=1); say(a=2)", 2)])
def test_a_probe_prints_one_line(go: Callable[..., list[Result]], lines: str, count: int) -> None:
    (bad,) = go(step("probe-x", lines, probe=True))
    assert bad.status == "failed" and f"printed {count}" in bad.why


def test_a_case_that_takes_the_process_along_gets_the_error_and_the_rest_goes_on(go: Callable[..., list[Result]]) -> None:
    """As a kernel that faults does; and one that hangs."""
    code = """
for name in cases(['a', 'dies', 'b', 'hangs', 'c']):
    if name == 'dies': print('illegal address', file=sys.stderr, flush=True); os._exit(9)
    if name == 'hangs': time.sleep(60)
    say(case=name, value=1)
"""
    (found,) = go(step("mixed", CASES + code), quiet=3.0)
    assert found.status == "ok"
    assert [r["case"] for r in found.records] == ["a", "dies", "b", "hangs", "c"]
    assert "illegal address" in found.records[1]["error"] and "no answer" in found.records[3]["error"]


def test_out_of_time_it_goes_on_behind_the_cases_that_it_finished(go: Callable[..., list[Result]], tmp_path: Path) -> None:
    code = f"""
for name in cases(['a', 'b', 'c']):
    {ONCE}
    say(case=name, until=os.environ['GPU_REPORT_UNTIL'])
    if len(open(os.environ['GPU_REPORT_TEST'] + '/ran').read()) == 1: os.environ['GPU_REPORT_UNTIL'] = '0'
"""
    listed = step("long", CASES + code)
    (part,) = go(listed)
    assert part.status == "part" and "b, c" in part.why and len(part.records) == 1
    (whole,) = go(listed)
    assert whole.status == "ok" and [r["case"] for r in whole.records] == ["a", "b", "c"]
    assert whole.records[0] == part.records[0]
    assert ran(tmp_path) == 3


def test_a_report_that_was_killed_goes_on(go: Callable[..., list[Result]], tmp_path: Path) -> None:
    lines = [{"runner": "begins", "key": KEY}, {"begins": "a"}, {"case": "a", "value": 1}, {"finished": "a"}, {"begins": "b"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"case": "b", "val')
    (found,) = go(step("x", CASES + "for name in cases(['a', 'b']): say(case=name, value=2)"))
    assert found.status == "ok" and [(r["case"], r["value"]) for r in found.records] == [("a", 1), ("b", 2)]


def test_what_failed_before_runs_last(go: Callable[..., list[Result]], tmp_path: Path) -> None:
    order = "open(os.environ['GPU_REPORT_TEST'] + '/order', 'a').write('{0} '); say(a=1); sys.exit({1})"
    first, second = step("first", order.format("first", 1)), step("second", order.format("second", 0))
    go(first)
    go(first, second)
    assert (tmp_path / "order").read_text().split() == ["first", "second", "first"]


def test_without_its_build_a_step_is_left_out_and_without_time_not_begun(go: Callable[..., list[Result]]) -> None:
    listed = step("build", "sys.exit(1)", fixed=True), step("a", "say(a=1)", needs="build")
    build, a = go(*listed)
    assert (build.status, a.status) == ("failed", "left out") and "build" in a.why
    assert [r.status for r in go(step("b", "say(a=1)"), seconds=0.5)] == ["no time"]


# ---- bits that differ are red


@pytest.fixture
def found_wrong(monkeypatch: pytest.MonkeyPatch) -> outcome.Content:
    """Ways of a launcher whose way 1 is wrong in one bit of one value, as the step `ways` records them."""
    from bench.cases import ops
    from bench.harness import turns
    from tools.gpu_report.work import ways

    taken: list[int | None] = [None]

    @contextlib.contextmanager
    def forced(backend: str, launcher: str, way: int) -> Iterator[None]:
        taken[0] = way
        try:
            yield
        finally:
            taken[0] = None

    def ours(i: int) -> tuple[torch.Tensor]:
        y = torch.ones(4, 4)
        if taken[0] == 1:
            y[3, 2] = torch.nextafter(y[3, 2], torch.tensor(2.0))
        return (y,)

    def build(place: Any) -> turns.Work:
        gate: Callable[[], None] = lambda: None  # noqa: E731
        made = turns.Contestant("cuda tensor", ours, gate=gate, ours=True, graph=False)
        other = turns.Contestant("triton tensor", ours, gate=gate, ours=True, graph=False)
        return turns.Work([made, other, turns.Contestant("eager", lambda i: None, graph=False)], 1.0, 1.0)

    monkeypatch.setattr(ways, "forced", forced)
    monkeypatch.setattr(ways, "ways", lambda *_: {"linear_tensor": 3, "linear_hopper_tensor": 1})
    reached: set[str] = set()
    records = ways.timed("linear 4x4x4 fp16", build, ops.Place(), "cuda", reached)
    assert reached == {"linear_tensor", "linear_hopper_tensor"}
    (step,) = [s for s in steps() if s.name == "ways-cuda"]
    result = Result(step, "ok", 1.0, 2.0, [{"case": "linear 4x4x4 fp16", **r} for r in records])
    return outcome.content({"gpu": "a <b>chip</b>", "began": 0.0}, [result])


def test_a_way_with_other_bits_is_wrong_and_no_other_is(found_wrong: outcome.Content) -> None:
    (record,) = outcome.wrong(found_wrong)
    assert record["who"] == "cuda tensor, way 1" and record["way"] == 1 and "ms" not in record
    timed = {r["who"] for r in found_wrong["records"] if "ms" in r}
    room = "cuda tensor, way linear_hopper_tensor 0"
    assert timed == {"cuda tensor", "cuda tensor, way 0", "cuda tensor, way 2", room, "eager"}
    (hopper,) = [r for r in found_wrong["records"] if r["who"] == room]
    assert (hopper["launcher"], hopper["way"], hopper["backend"], hopper["mode"]) == (
        "linear_hopper_tensor",
        0,
        "cuda",
        "tensor",
    )
    assert found_wrong["steps"][0]["wrong"] == 1


def test_it_is_red_in_the_terminal_and_on_the_page(found_wrong: outcome.Content) -> None:
    said = outcome.terminal(found_wrong)
    assert "1 WRONG" in said and "way 1 against its own choice" in said
    html = page.written(found_wrong)
    assert 'class="verdict bad"' in html and "1 WRONG" in html and "do not hold" in html
    assert "<b>chip</b>" not in html and "&lt;b&gt;chip" in html
    assert "<script" not in html and "src=" not in html and "href=" not in html


def test_the_page_of_a_run_in_which_all_is_well() -> None:
    listed = steps()
    records = {
        "golden-cuda": [{"case": "softmax", "backend": "cuda", "mode": "portable", "equal": 3}],
        "models": [
            {
                "case": "base 1x128 fp16",
                "who": who,
                "ours": ours,
                "backend": who.split()[0],
                "mode": mode,
                "way": None,
                "ms": ms,
            }
            for who, ours, mode, ms in (("cuda tensor", True, "tensor", 2.0), ("eager", False, None, 3.0))
        ],
        "probe-rates": [{"TFLOP/s": {"int8": 1000}}],
    }
    found = outcome.content({"gpu": "chip", "began": 0.0}, [Result(s, "ok", 1, 2, records.get(s.name, [])) for s in listed])
    html = page.written(found)
    assert 'class="verdict good"' in html and "1.50" in html and "int8" in html
    assert [s.name for s in listed if f">{s.name}" not in html] == []
    ill = outcome.content(
        {"gpu": "chip", "began": 0.0}, [Result(listed[0], "failed", 1, 2, [], "no compiler", ["error: no g++"])]
    )
    assert "did not end well" in page.written(ill) and "error: no g++" in page.written(ill)


def test_the_tables_are_put_into_a_page_of_the_project(found_wrong: outcome.Content, tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    target.write_text("".join(f"<!-- gpu-report:{n} -->\n<!-- /gpu-report -->\n" for n in ("machine", "ways-cuda", "models")))
    assert pages.write(target, outcome.WRITER, outcome.blocks(found_wrong)) == ["machine", "ways-cuda"]
    assert "| linear 4x4x4 fp16 |" in target.read_text()


# ---- the pieces that read other programs' words


NCU = """==PROF== Connected to process 1
a line of the program
==PROF== Disconnected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","linear_tensor<128, 256>","GPU Speed Of Light Throughput","Duration","us","11.5"
"0","1","linear_tensor<128, 256>","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","70.1"
"1","1","finish","GPU Speed Of Light Throughput","Duration","us","2.5"
"""


def test_what_ncu_prints_is_read() -> None:
    from tools.gpu_report.work import counters

    first, second = counters.kernels(NCU)
    assert first == {
        "kernel": "linear_tensor<128, 256>",
        "metrics": {"Duration, us": "11.5", "Compute (SM) Throughput, %": "70.1"},
    }
    assert second["kernel"] == "finish"
    assert counters.kernels("==ERROR== no permission\n") == []


def test_the_kernels_furthest_behind_are_counted() -> None:
    from tools.gpu_report.work import counters

    def record(case: str, who: str, ms: float, way: int | None = None) -> dict[str, Any]:
        return {"case": case, "who": who, "ms": ms, "ours": who != "eager", "way": way}

    records = [record("linear 1 fp16", "eager", 1.0), record("linear 2 fp16", "eager", 1.0)]
    records += [record("linear 1 fp16", "cuda tensor", 1.5), record("linear 2 fp16", "cuda tensor", 3.0)]
    records += [record("linear 1 fp16", "cuda tensor, way 1", 9.0, 1), {"case": "linear 1 fp16", "who": "x", "wrong": "y"}]
    assert list(counters.slowest(records).values()) == [("linear 2 fp16", "cuda tensor")]


# ---- the machine


WHOLE = {"torch": "2.13.0", "cuda": "13.0", "gpus": 1, "gpu": "H100", "capability": "9.0", "nvcc": "13.0", "compiler": "g++"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"cuda": None}, "a build without CUDA"),
        ({"gpus": 0}, "finds none"),
        ({"gpu": "T4", "capability": "7.5"}, "8.0 or newer: T4 has 7.5"),
        ({"nvcc": None}, "nvcc, of CUDA 13"),
        ({"compiler": None}, "a C++ compiler"),
        ({"missing": ["pytest"]}, "Python packages: pytest; with a network: "),
        ({"no torch": "ImportError: x"}, "cannot import it"),
    ],
)
def test_what_is_missing_is_named_with_what_would_work(change: dict[str, Any], said: str | None) -> None:
    told = machine.lacks({**WHOLE, **change})
    assert told == [] if said is None else len(told) == 1 and said in told[0]


def test_without_a_build_no_compiler_is_asked_for() -> None:
    assert machine.lacks({**WHOLE, "nvcc": None, "compiler": None, "missing": ["setuptools"]}, build=False) == []


def test_a_change_of_any_source_is_another_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    before = machine.revision()
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert machine.revision() != before
    assert {"gpu", "torch", "driver", "revision"} <= set(machine.key({}))


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True)


@functools.cache
def gpu() -> bool:
    return torch.cuda.is_available()


def test_a_dry_run_lists_the_steps_in_order_on_any_machine(tmp_path: Path) -> None:
    done = program("--dry-run", "--minutes", "8", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    places = [done.stdout.find(f" {s.name} ") for s in steps()]
    assert -1 not in places and places == sorted(places)
    assert "Has cuBLASLt an algorithm that splits no sum" in done.stdout
    assert gpu() or "missing here: " in done.stdout
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path) -> None:
    if gpu():
        pytest.skip("there is a GPU")
    done = program("--out", str(tmp_path / "out"), "--only", "golden")
    assert done.returncode == 2 and "cannot run here" in done.stderr and "run this with" in done.stderr
    assert program("--place", str(tmp_path / "page.md"), "--out", str(tmp_path)).returncode == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--minutes", "nan"), "--minutes must be a number above 0, got nan"),
        (("--minutes", "inf"), "--minutes must be a number above 0, got inf"),
        (("--minutes", "0"), "--minutes must be a number above 0, got 0"),
        (("--only", "nonsense"), "--only nonsense names no step; there are golden-cuda, "),
        (("--only", "build"), "--only build names no step; there are golden-cuda, "),
    ],
)
def test_wrong_options(capsys: Any, wrong: tuple[str, ...], said: str) -> None:
    from tools.gpu_report.__main__ import main

    with pytest.raises(SystemExit) as end:
        main([*wrong, "--dry-run"])
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("op", ["normalize", "rms_norm", "sum"])
def test_a_case_that_bench_has_not_passes_its_gate(op: str) -> None:
    from bench.cases import ops
    from rerank_kernels.backend import registry
    from tools.gpu_report.work import ways

    if reason := registry.missing("cpu"):
        pytest.skip(reason)
    with registry.use("cpu"):
        ways.over_rows(ops.Place(), op, 16, 64).ours.gate()  # type: ignore[misc]


def test_every_launcher_with_several_ways_has_a_case() -> None:
    from simulated import cuda as simulated

    if reason := simulated.missing():
        pytest.skip(reason)
    from tools.gpu_report.work import launchers, ways

    modes = {"fp32": ("portable",), "fp16": ("portable", "tensor"), "bf16": ("portable", "tensor")}
    words = [(name.split(" ")[0], name.split(" ")[-1]) for name in ways.table()]
    there = simulated.launchers()
    reached = {n for op, dtype in words for mode in modes[dtype] for n in launchers.of(op, mode, there, (9, 0))}
    assert reached == set(there)


def test_a_rooms_launchers_are_for_its_gpus() -> None:
    from tools.gpu_report.work import launchers

    there = {
        "linear": 10,
        "linear_tensor": 6,
        "linear_hopper_tensor": 4,
        "attention_hopper_tensor": 2,
        "row_sum": 2,
        "row_x": 1,
    }
    assert launchers.of("linear", "tensor", there, (9, 0)) == {"linear_tensor": 6, "linear_hopper_tensor": 4}
    assert launchers.of("linear", "tensor", there, (8, 0)) == {"linear_tensor": 6}
    assert launchers.of("linear", "portable", there, (9, 0)) == {"linear": 10}
    assert launchers.of("sum", "portable", there, (9, 0)) == {"row_sum": 2}
    assert [n for n in there if not launchers.fits(n, (10, 0))] == ["linear_hopper_tensor", "attention_hopper_tensor"]


# ---- goals


def record(
    case: str, who: str, ms: float, step: str = "models", mode: str | None = "tensor", way: int | None = None
) -> dict[str, Any]:
    ours = who.startswith(("cuda", "triton"))
    return {"step": step, "case": case, "who": who, "ours": ours, "mode": mode if ours else None, "way": way, "ms": ms}


COMPILED = "compile, reduce-overhead"
FAST = [
    record("base 32x128 fp16", "cuda tensor", 2.9),
    record("base 32x128 fp16, compiled: reduce-overhead", COMPILED, 3.1, "models-compiled"),
    record("base 32x128 fp16, compiled: default", "compile, default", 0.1, "models-compiled"),
]
WAYS = [
    record("linear 4096x768x768 fp16", "cuda tensor", 1.0, "ways-cuda"),
    record("linear 4096x768x768 fp16", "cuda tensor, way 1", 0.5, "ways-cuda", way=1),
    record("linear 4096x768x768 fp16", "eager", 0.95, "ways-cuda"),
    record("linear 4096x768x768 fp16", "triton tensor", 1.5, "ways-triton"),
    record("linear 128x768x768 fp16", "cuda tensor", 9.0, "ways-cuda"),
    record("linear 128x768x768 fp16", "eager", 1.0, "ways-cuda"),
]


def test_goals_are_reached_missed_or_never_measured() -> None:
    def verdicts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return [(row[2], row[-1]) for row in goals.rows(records)]

    never = ("–", goals.NEVER)
    assert verdicts([]) == [never] * len(goals.GOALS)
    assert verdicts(FAST) == [("1.07", goals.REACHED), never, never, ("2.90 ms", goals.REACHED), never, never, never]
    slow = [*FAST, record("large 8x128 fp16", "cuda tensor", 2.0), record("large 8x128 fp16", COMPILED, 1.8)]
    assert verdicts(slow)[0] == ("0.90", goals.MISSED), "the worst case is the goal's"
    assert goals.rows(slow)[0][3] == "large 8x128 fp16"
    assert verdicts(WAYS)[4] == ("0.95", goals.REACHED), "its own choice by the better backend, and no small M"
    assert verdicts([record("base 1x128 fp16", "cuda tensor", 1.3)])[2] == ("1.30 ms", goals.MISSED)
    assert verdicts([record("base 1x128 fp16", "cuda portable", 1.3, mode="portable")])[2] == never


def test_every_goal_has_cases_in_the_steps_that_it_names() -> None:
    from tools.gpu_report.work import models, ways

    for goal in goals.GOALS:
        names = ways.table() if goal.steps == goals.WAYS else models.table()
        cases = [case for case in names if re.search(goal.case, case)]
        assert cases, f"{goal.words}: nothing measures it"
        if goal.rival and "reduce-overhead" in goal.rival:
            assert [case for case in cases if case.endswith("compiled: reduce-overhead")]


def test_models_are_timed_in_two_steps_and_no_case_in_both() -> None:
    from tools.gpu_report.work import models

    (plain,) = [s for s in steps() if s.name == "models"]
    (compiled,) = [s for s in steps() if s.name == "models-compiled"]
    first, second = (models.listed(*s.command[3:]) for s in (plain, compiled))
    assert not {*first} & {*second} and {*first, *second} == {*models.table()}
    assert {case[3] for case in second.values()} == {"default", "reduce-overhead", "max-autotune"}


def test_the_page_has_the_goals_as_they_are() -> None:
    """Measured or not: the goals and what is wanted are those of goals.py."""
    there = pages.text(ROOT / "docs" / "SPEED.md", outcome.WRITER, "goals")
    rows = [line.strip("| ").split(" | ") for line in there.splitlines()[2:]]
    assert [tuple(row[:2]) for row in rows] == [goal.row(None)[:2] for goal in goals.GOALS]
    for row in rows:
        assert row[-1] in (goals.NEVER, goals.REACHED, goals.MISSED)
        assert (row[2] == "–") == (row[-1] == goals.NEVER)


def test_goals_stand_in_the_terminal_and_on_the_page(found_wrong: outcome.Content) -> None:
    assert goals.NEVER in outcome.terminal(found_wrong) and "Goals" in page.written(found_wrong)
    assert outcome.blocks(found_wrong)["goals"].count(goals.NEVER) == len(goals.GOALS)  # type: ignore[union-attr]


# ---- what the first steps look at can be wrong, and is told


@pytest.mark.parametrize("off", [False, True])
def test_a_case_with_other_bits_than_written_down_is_wrong(off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import cases
    from rerank_kernels.backend import registry
    from tools.gpu_report.work import golden

    if reason := registry.missing("cpu"):
        pytest.skip(reason)

    def on(device: str, case: cases.Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        (out,) = case.call(case.make_rows(dtype), case.make_shared(dtype))
        if off and dtype == torch.float16:
            out = out.clone()
            out.view(torch.int16).view(-1)[-1] ^= 1
        return (out,)

    monkeypatch.setattr(golden.gpu, "on", on)
    with registry.use("cpu"):
        found = golden.portable(next(c for c in cases.CASES if c.op == "normalize"))
    assert found["equal"] == 3 - off and found.get("wrong") == ("other bits in float16" if off else None)


def test_a_fallen_promise_is_wrong() -> None:
    """A sum in which a row's place in the batch has a say."""
    import cases
    from tools.gpu_report.work import promises

    class Wrong(cases.Case):
        def call(self, rows: cases.Tensors, shared: cases.Tensors, lengths: tuple[int, ...] | None = None) -> Any:
            (out,) = super().call(rows, shared, lengths)
            return (out + 1e-3 * (torch.arange(len(out)) == 7),)

    (case,) = [c for c in cases.CASES if str(c) == "sum-1000"]
    assert promises.held(case, torch.float32) == {"holds": 4}
    wrong = Wrong(case.op, case.label, case.rows, case.shared, case.options, count=case.count)
    found = promises.held(wrong, torch.float32)
    assert "batch-invariant" in str(found["wrong"]) and found["holds"] < 4
