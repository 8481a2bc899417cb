"""`python bench/run.py --against REV`: where a kernel got slower, or other bits, since REV.

REV's package goes into a temporary folder with a library of its own: this tree's, if csrc/ and setup.py are the same, else one
that is built once and kept under bench/out/built. Each of the two revisions has a process, which makes this tree's cases with
its own package; the two take turns. A case is called slower if the median over the rounds of this / REV is above 1.05, four of
five rounds agree that it is above 1, and so they do when the case is made and timed once more.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from rich.console import Console

import rerank_kernels as rk
from bench import OUT, ROOT
from bench.cases.contests import on_a_cpu
from bench.harness.turns import HostTurn, Pace, interleave
from bench.harness.worker import Ready, Worker
from bench.pages.results import digits
from bench.pages.tables import Table

SLOWER = 1.05
BUILT = OUT / "built"


class Side(Protocol):
    """One revision's process: asked to make a case ready, then for turns (harness/worker.py)."""

    def ask(self, function: str, **arguments: Any) -> dict[str, Any]: ...

    def turn(self, calls: int) -> float: ...


# ---- comparing -------------------------------------------------------------------------------------------------------------


def compare(cases: Sequence[str], this: Side, other: Side, pace: Pace, **how: Any) -> Iterator[dict[str, Any]]:
    """One record a case; ratio is this / other: above 1 this tree is slower."""
    for case in cases:
        record = _compared(case, {"this": this, "REV": other}, pace, how)
        if record["verdict"] in ("SLOWER", "faster"):
            again = _compared(case, {"this": this, "REV": other}, pace, how)
            record = again | {"verdict": again["verdict"] if again["verdict"] == record["verdict"] else "", "first": record}
        yield record


def _compared(case: str, sides: Mapping[str, Side], pace: Pace, how: Mapping[str, Any]) -> dict[str, Any]:
    ready = {who: side.ask(f"{__name__}:prepare", case=case, **how) for who, side in sides.items()}
    if errors := [f"{who}: {said['error']}" for who, said in ready.items() if "error" in said]:
        return {"case": case, "error": "; ".join(errors), "verdict": "not compared"}
    times, failed = interleave({who: HostTurn(side.turn) for who, side in sides.items()}, pace)
    for error in failed.values():
        raise error
    this, other = ([t for t, _ in times[who]] for who in sides)
    return {"case": case, **verdict(this, other), "same_bits": ready["this"]["bits"] == ready["REV"]["bits"]}


def verdict(this: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(this, other, strict=True))
    fifth = len(ratios) // 5
    low, ratio, high = ratios[fifth], statistics.median(ratios), ratios[-1 - fifth]
    word = "SLOWER" if ratio > SLOWER and low > 1.0 else "faster" if ratio < 1.0 / SLOWER and high < 1.0 else ""
    times = {"this_ms": statistics.median(this) * 1e3, "rev_ms": statistics.median(other) * 1e3}
    return {**times, "ratio": ratio, "low": low, "high": high, "rounds": len(ratios), "verdict": word}


def show(console: Console, rev: str, records: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for r in records:
        if "error" in r:
            rows.append((r["case"], "", "-", "-", "-", f"not compared: {r['error']}"))
            continue
        times = digits(r["this_ms"]), digits(r["rev_ms"]), f"{r['ratio']:.2f} ({r['low']:.2f}..{r['high']:.2f})"
        rows.append((r["case"], r["verdict"], *times, "" if r["same_bits"] else "other bits"))
    about = f"this / {rev}: above 1 this tree is slower; in brackets what four of five rounds agree on"
    Table(("case", "", "this ms", f"{rev} ms", "this / REV", ""), rows, about).show(console)
    slower = [r["case"] for r in records if r["verdict"] == "SLOWER"]
    told = f": {', '.join(slower)}" if slower else ""
    console.print(f"slower than {rev}: {len(slower)} of {len(records)}{told}", markup=False, soft_wrap=True)


# ---- the two processes' side -----------------------------------------------------------------------------------------------


def listed(tree: str, device: str, quick: bool) -> dict[str, Any]:
    """The cases. On a GPU a case has one of our ways: "linear 1x768x768 fp16: cuda tensor"."""
    if not pathlib.Path(rk.__file__).is_relative_to(tree):
        raise RuntimeError(f"{tree} was asked for, and {rk.__file__} was imported")
    if device == "cpu":
        return {"cases": list(on_a_cpu(quick))}
    from bench.harness import gpu

    table = [n for n, (of_quick, _) in gpu.jobs().items() if (of_quick or not quick) and "compiled" not in n]
    ways = gpu.place(device, False).ways
    return {"cases": [f"{name}: {' '.join(way)}" for name in table for way in ways(name.rpartition(" ")[2])]}


def prepare(case: str, device: str, quick: bool) -> Ready:
    if device == "cpu":
        ours = on_a_cpu(quick)[case]().ours
    else:
        from bench.harness import gpu

        name, _, way = case.rpartition(": ")
        (ours,) = (c for c in gpu.jobs()[name][1](gpu.place(device, False)).contestants if c.name == way)

    def call(i: int) -> object:  # clocked from Python, as a user meets it
        with ours.around():
            return ours.call(i)

    return call, {"bits": _bits(call(0))}


def _bits(result: Any) -> str:
    digest = hashlib.sha256()
    for t in [result] if isinstance(result, torch.Tensor) else result:
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- the other revision ----------------------------------------------------------------------------------------------------


def checked_out(rev: str, folder: pathlib.Path, console: Console, root: pathlib.Path = ROOT) -> None:
    """REV's package and its library in `folder`, and nothing else. SystemExit says what does not work."""
    archive = subprocess.run(["git", "-C", str(root), "archive", "--format=tar", rev], capture_output=True)
    if archive.returncode:
        raise SystemExit(f"--against {rev}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as name:
        tree = pathlib.Path(name)
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
        if compiled_from(tree) == compiled_from(root):
            libraries = sorted(pathlib.Path(rk.__file__).parent.glob("*.so"))
        else:
            libraries = _built(tree, console)
        shutil.copytree(tree / "rerank_kernels", folder / "rerank_kernels")
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
    how = {"device": args.device, "quick": args.quick}
    pace = Pace(0.5, 9, 2.0) if args.quick else Pace(3.0, 15, 2.0)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checked_out(args.against, pathlib.Path(folder), console)
        sides = [Worker(pathlib.Path(tree), threads=args.threads) for tree in (ROOT, folder)]
        try:
            said = [w.ask(f"{__name__}:listed", tree=str(t), **how) for w, t in zip(sides, (ROOT, folder), strict=True)]
            if errors := [s["error"] for s in said if "error" in s]:
                raise SystemExit(f"--against {args.against}: {errors[0]}")
            cases = [c for c in said[0]["cases"] if c in said[1]["cases"]]
            cases = [c for c in cases if not args.only or any(o in c for o in args.only)]
            for record in compare(cases, *sides, pace, **how):
                records.append(record)
                words = record.get("error") or f"{record['ratio']:.2f} {record['verdict']}"
                console.print(f"{len(records)}/{len(cases)} {record['case']}: {words}", markup=False, highlight=False)
        finally:
            for side in sides:
                side.close()
    show(console, args.against, records)
    slower = any(r["verdict"] == "SLOWER" for r in records)
    return records, 1 if (args.strict and slower) or not records else 0
