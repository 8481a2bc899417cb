"""`python bench/run.py --against REV`: where a kernel got slower, or other bits, since REV.

REV's files go into a temporary folder with a library of their own: this tree's, if csrc/ and setup.py are the same, else one
that is built once and kept under bench/out/built. Each of the two revisions has a process, which makes this tree's cases with
its own package; the two take turns, this, REV, REV, this, so that a busy machine hits both alike. A case is called slower if
the median over the rounds of this / REV is above 1.05, four of five rounds agree that it is above 1, and so they do when the
case is made and timed once more.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from results import ROOT, digits
from rich.console import Console
from rich.table import Table
from workers import Ready, Worker, serve

import rerank_kernels as rk

SLOWER = 1.05
BUILT = ROOT / "bench" / "out" / "built"


class Side(Protocol):
    """One revision, made ready for one case after the other."""

    def prepare(self, case: str) -> dict[str, Any]:
        """{"seconds": of a call, "bits": of the result}, or {"error": ...}."""

    def turn(self, calls: int) -> float:
        """Seconds per call."""


# ---- comparing -------------------------------------------------------------------------------------------------------------


def compare(cases: Sequence[str], this: Side, other: Side, *, budget: float, at_least: int) -> Iterator[dict[str, Any]]:
    """One record a case; ratio is this / other: above 1 this tree is slower."""
    for case in cases:
        record = _compared(case, this, other, budget, at_least)
        if record["verdict"] in ("SLOWER", "faster"):
            again = _compared(case, this, other, budget, at_least)
            record = again | {"verdict": again["verdict"] if again["verdict"] == record["verdict"] else "", "first": record}
        yield record


def _compared(case: str, this: Side, other: Side, budget: float, at_least: int) -> dict[str, Any]:
    ready = [side.prepare(case) for side in (this, other)]
    if errors := [f"{who}: {r['error']}" for who, r in zip(("this", "REV"), ready, strict=True) if "error" in r]:
        return {"case": case, "error": "; ".join(errors), "verdict": "not compared"}
    seconds = max(1e-7, *(r["seconds"] for r in ready))
    calls = max(1, math.ceil(0.002 / seconds))
    rounds = max(at_least if seconds < 1.0 else 3, min(100, round(budget / (2 * calls * seconds))))
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        turns = [(times[0], this), (times[1], other)]
        for held, side in turns if number % 2 == 0 else reversed(turns):
            held.append(side.turn(calls))
    return {"case": case, **verdict(*times), "same_bits": ready[0]["bits"] == ready[1]["bits"]}


def verdict(this: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(this, other, strict=True))
    fifth = len(ratios) // 5
    low, ratio, high = ratios[fifth], statistics.median(ratios), ratios[-1 - fifth]
    if ratio > SLOWER and low > 1.0:
        word = "SLOWER"
    elif ratio < 1.0 / SLOWER and high < 1.0:
        word = "faster"
    else:
        word = ""
    return {
        "this_ms": statistics.median(this) * 1e3,
        "rev_ms": statistics.median(other) * 1e3,
        "ratio": ratio,
        "low": low,
        "high": high,
        "rounds": len(ratios),
        "verdict": word,
    }


def show(console: Console, rev: str, records: Sequence[Mapping[str, Any]]) -> None:
    table = Table(caption=f"this / {rev}: above 1 this tree is slower; in brackets what four of five rounds agree on")
    for name in ("case", "this ms", f"{rev} ms", "ratio", "", ""):
        table.add_column(name, justify="right" if "ms" in name or name == "ratio" else "left", no_wrap=name != "case")
    colours = {"SLOWER": "[bold red]SLOWER[/]", "faster": "[green]faster[/]"}
    for r in records:
        if "error" in r:
            table.add_row(r["case"], "-", "-", "-", "", f"not compared: {r['error']}"[:80])
            continue
        spread = f"{r['ratio']:.2f} ({r['low']:.2f}..{r['high']:.2f})"
        bits = "" if r["same_bits"] else "[yellow]other bits[/]"
        table.add_row(r["case"], digits(r["this_ms"]), digits(r["rev_ms"]), spread, colours.get(r["verdict"], ""), bits)
    console.print(table)
    slower = [r["case"] for r in records if r["verdict"] == "SLOWER"]
    told = f": {', '.join(slower)}" if slower else ""
    console.print(f"slower than {rev}: {len(slower)} of {len(records)}{told}", markup=False, soft_wrap=True)


# ---- the two processes -----------------------------------------------------------------------------------------------------


class Process(Worker):
    """A Side in a process of its own, which imports rerank_kernels from `tree`."""

    def __init__(self, tree: pathlib.Path, arguments: Sequence[str]) -> None:
        path = os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])
        super().__init__([__file__, str(tree), *arguments], {"PYTHONPATH": path})
        self.cases: list[str] = self.said["cases"]


def served(args: argparse.Namespace) -> int:
    """The process's side."""
    if not pathlib.Path(rk.__file__).is_relative_to(args.tree):
        raise SystemExit(f"--against: {args.tree} was asked for, and {rk.__file__} was imported")
    torch.set_num_threads(args.threads)
    made, names = (_on_gpu if args.device == "cuda" else _on_cpu)(args)

    def prepare(case: str) -> Ready:
        call = made(case)
        bits = _bits(call())
        return call, {"seconds": min(_seconds(call, 1) for _ in range(2)), "bits": bits}

    with torch.no_grad():
        return serve(prepare, _seconds, cases=[n for n in names if not args.only or any(o in n for o in args.only)])


def _on_cpu(args: argparse.Namespace) -> tuple[Callable[[str], Callable[[], Any]], list[str]]:
    import run

    table = run.contests(args.quick)
    return lambda name: table[name]().ours, list(table)


def _on_gpu(args: argparse.Namespace) -> tuple[Callable[[str], Callable[[], Any]], list[str]]:
    """A case and one way of ours: "linear 1x768x768 fp16: cuda tensor". Turns are clocked from Python, as a user meets them."""
    import device

    place = device.Place(torch.device("cuda"), compile=False)
    names = {
        f"{name}: {' '.join(way)}": name
        for name, job in device.jobs().items()
        for way in place.ways(name.rpartition(" ")[2])
        if (job.quick or not args.quick) and "compiled" not in name
    }

    def prepare(case: str) -> Callable[[], Any]:
        name, _, way = case.rpartition(": ")
        (c,) = (c for c in device.jobs()[name].build(place).contestants if c.name == way)

        def call() -> Any:
            with c.around():
                return c.call(0)

        return call

    return prepare, list(names)


def _seconds(call: Callable[[], Any], calls: int) -> float:
    _settled()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _settled()
    return (time.perf_counter() - start) / calls


def _settled() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bits(result: Any) -> str:
    digest = hashlib.sha256()
    for t in [result] if isinstance(result, torch.Tensor) else result:
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- the other revision ----------------------------------------------------------------------------------------------------


def checked_out(rev: str, folder: pathlib.Path, console: Console, root: pathlib.Path = ROOT) -> None:
    """REV's files and its library in `folder`. SystemExit says what does not work."""
    archive = subprocess.run(["git", "-C", str(root), "archive", "--format=tar", rev], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"--against {rev}: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    if compiled_from(folder) == compiled_from(root):
        libraries = sorted(pathlib.Path(rk.__file__).parent.glob("*.so"))
    else:
        libraries = _built(folder, console)
    for library in libraries:
        shutil.copy(library, folder / "rerank_kernels")


def compiled_from(tree: pathlib.Path) -> str:
    """A hash of all that a library is made of, PyTorch's version included."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in [tree / "setup.py", *sorted(p for p in (tree / "csrc").rglob("*") if p.is_file() and p.suffix != ".pyc")]:
        digest.update(f"{path.relative_to(tree)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _built(tree: pathlib.Path, console: Console) -> list[pathlib.Path]:
    kept = BUILT / compiled_from(tree)
    if not kept.is_dir():
        console.print("building the other revision's library; it is kept for the next time")
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
        done = subprocess.run(command, cwd=tree, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        libraries = sorted((tree / "rerank_kernels").glob("*.so"))
        if done.returncode or not libraries:
            raise SystemExit(f"--against: the other revision does not build:\n{(done.stdout + done.stderr)[-3000:]}")
        BUILT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as beside:
            for library in libraries:
                shutil.copy(library, beside)
            shutil.copytree(beside, kept)
    return sorted(kept.glob("*.so"))


def main(args: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], int]:
    """The records, and the exit code."""
    arguments = ["--threads", str(args.threads), "--device", args.device]
    arguments += ["--quick"] * args.quick + [x for only in args.only or () for x in ("--only", only)]
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        checked_out(args.against, tree, console)
        sides = [Process(ROOT, arguments), Process(tree, arguments)]
        try:
            budget, at_least = (0.5, 9) if args.quick else (3.0, 15)
            records = []
            cases = [case for case in sides[0].cases if case in sides[1].cases]
            for record in compare(cases, *sides, budget=budget, at_least=at_least):
                records.append(record)
                words = record.get("error") or f"{record['ratio']:.2f} {record['verdict']}"
                console.print(f"{len(records)}/{len(cases)} {record['case']}: {words}", markup=False, highlight=False)
        finally:
            for side in sides:
                side.close()
    show(console, args.against, records)
    slower = any(r["verdict"] == "SLOWER" for r in records)
    return records, 1 if (args.strict and slower) or not records else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One revision's side of --against; bench/run.py starts it.")
    parser.add_argument("tree", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append")
    sys.exit(served(parser.parse_args()))
