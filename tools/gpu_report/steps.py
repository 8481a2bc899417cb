"""The steps in order, what matters most first, and how the time is shared out among them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = ROOT / "tools" / "gpu_report" / "work"
PROBES = ROOT / "tools" / "probes"
PROBE_SECONDS = 20.0
WAYS = "How fast is each way of {} beside cuBLAS and SDPA, and do all ways give equal bits?"
# Probes on which decisions wait: whether instructions are one arithmetic, what graphs gain, whether cuBLASLt has our bits.
FIRST = ("probe-arithmetic", "probe-graphs", "probe-launches", "probe-cublaslt")
LEAST = 5.0  # seconds below which no step is started


@dataclass(frozen=True)
class Step:
    name: str
    question: str
    command: Sequence[str]
    seconds: float  # what it wants of eight minutes
    fixed: bool = False  # takes what it takes, about that many seconds: without it there is no other
    needs: str | None = None  # a step that must have ended well
    probe: bool = False  # prints one line of JSON, and no cases


def work(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(WORK), name, *arguments)


def steps(probes: Path = PROBES, build: bool = True) -> list[Step]:
    """By value: are the bits right, how fast is what a user has, and what decides what comes next; the rest behind."""
    needs = "build" if build else None
    compiled = "How fast are whole models beside torch.compile's modes reduce-overhead and max-autotune?"
    listed = [
        Step(
            "golden-cuda", "Does backend cuda give the bits of golden.json and golden_tensor.json?", work("golden", "cuda"), 25
        ),
        Step("promises-cuda", "Do the promises hold on backend cuda, in every mode?", work("promises", "cuda"), 20),
        Step("ways-cuda", WAYS.format("CUDA's launchers"), work("ways", "cuda"), 60),
        Step("models", "How fast are whole models beside stock eager, SDPA and torch.compile?", work("models"), 60),
        *ordered(probes_in(probes), FIRST),
        Step("models-compiled", compiled, work("models", "compiled"), 80),
        Step("golden-triton", "Does backend triton give the bits of golden.json?", work("golden", "triton"), 40),
        Step("promises-triton", "Do the promises hold on backend triton, in every mode?", work("promises", "triton"), 20),
        Step("ways-triton", WAYS.format("Triton's kernels"), work("ways", "triton"), 40),
        *[s for s in probes_in(probes) if s.name not in FIRST],
        Step("counters", "What do hardware counters say of the slowest kernels?", work("counters"), 30),
    ]
    listed = [Step(s.name, s.question, s.command, s.seconds, s.fixed, needs, s.probe) for s in listed]
    if build:
        listed = [Step("build", "Does it compile for this GPU?", work("build"), build_seconds(), fixed=True), *listed]
    return listed


def ordered(found: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """Those of the names that are there, in the names' order."""
    return [s for name in names for s in found if s.name == name]


def build_seconds() -> float:
    """About: 300 s of one core, of which the longest file is a fifth."""
    return max(60.0, 300.0 / (os.cpu_count() or 1))


def probes_in(folder: Path) -> list[Step]:
    """Read, not imported: a file that does not parse is a step that says so when it runs."""
    found = []
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_"):
            continue
        question, seconds = "it does not say", PROBE_SECONDS
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except SyntaxError as error:
            question = f"it does not parse: {error}"
        else:
            question = " ".join((ast.get_docstring(tree) or question).partition("\n\n")[0].split())
            for line in tree.body:
                names = [t.id for t in line.targets if isinstance(t, ast.Name)] if isinstance(line, ast.Assign) else []
                if "SECONDS" in names and isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
                    seconds = float(line.value.value)  # type: ignore[arg-type]
        found.append(Step(f"probe-{path.stem}", question, (sys.executable, str(path)), seconds, probe=True))
    return found


def allowance(step: Step, later: Sequence[Step], remaining: float) -> float:
    """Seconds for this step of what remains, with `later` behind it: a fixed one may take all, and the others share the rest as
    they want it, so that no early one starves a later one, and what one leaves is for all behind it.
    """
    if step.fixed:
        return max(0.0, remaining)
    rest = remaining - sum(s.seconds for s in later if s.fixed)
    wanted = step.seconds + sum(s.seconds for s in later if not s.fixed)
    return max(0.0, min(remaining, step.seconds * rest / wanted))


def planned(listed: Sequence[Step], seconds: float) -> list[tuple[Step, float]]:
    """Each step with its time, if all take all of theirs, and the fixed ones what they usually take."""
    plan = []
    for i, step in enumerate(listed):
        given = allowance(step, listed[i + 1 :], seconds)
        given = min(given, step.seconds) if step.fixed else given
        plan.append((step, given))
        seconds -= given
    return plan
