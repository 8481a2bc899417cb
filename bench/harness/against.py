"""`python bench/run.py --against REV`: where a kernel got slower, or other bits, since REV.

REV's package goes into a temporary folder with a library: this tree's, if csrc/ and setup.py are the same, else one that pip
builds once and keeps under bench/out/built. Each of the two revisions has a process, which makes this tree's cases with its own
package; the two take turns. A case is called slower if the median over the rounds of this / REV is above 1.05, four of five
rounds agree that it is above 1, and so they do when the case is made and timed once more.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

import rerank_kernels as rk
from bench import OUT, ROOT
from bench.cases import contests
from bench.cases.models import COMPILED
from bench.harness.turns import Contestant, Pace, Work, play
from bench.harness.worker import close, resident
from bench.pages.results import digits
from bench.pages.tables import Table

SLOWER = 1.05
BUILT = OUT / "built"


Side = Callable[[], Any]  # a revision's Worker; a new one if it died
Case = tuple[str, str]  # and whose call


def compare(cases: Sequence[Case], sides: Mapping[str, Side], pace: Pace, *how: Any) -> Iterator[dict[str, Any]]:
    """One record a case; sides: "this" and "REV"; ratio is this / REV: above 1 this tree is slower."""
    for case in cases:
        record = _compared(case, sides, pace, how)
        if record["verdict"] in ("SLOWER", "faster"):
            again = _compared(case, sides, pace, how)
            record = again | {"verdict": again["verdict"] if again["verdict"] == record["verdict"] else "", "first": record}
        yield record


def _compared(case: Case, sides: Mapping[str, Side], pace: Pace, how: Sequence[Any]) -> dict[str, Any]:
    bits = {}

    def ready(who: str) -> Callable[[int], float]:
        there = sides[who]()
        bits[who] = there.ask(contests.prepare, *case, *how, str(there.tree))
        turn: Callable[[int], float] = there.turn
        return turn

    contestants = [Contestant(who, ours=who == "this", away=functools.partial(ready, who)) for who in sides]
    cells, name = play(Work(contestants), pace, gates=False), ": ".join(filter(None, case))
    if lost := [f"{who}: {cell.get('why') or cell['error']}" for who, cell in cells.items() if "ms" not in cell]:
        return {"case": name, "error": "; ".join(lost), "verdict": "not compared"}
    found = verdict(*(cell["all_ms"] for cell in cells.values()))
    return {"case": name, **found, "same_bits": bits["this"] == bits["REV"]}


def verdict(this: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(this, other, strict=True))
    fifth = len(ratios) // 5
    low, ratio, high = ratios[fifth], statistics.median(ratios), ratios[-1 - fifth]
    word = "SLOWER" if ratio > SLOWER and low > 1.0 else "faster" if ratio < 1.0 / SLOWER and high < 1.0 else ""
    times = {"this_ms": statistics.median(this), "rev_ms": statistics.median(other)}
    return {**times, "ratio": ratio, "low": low, "high": high, "rounds": len(ratios), "verdict": word}


def show(console: Console, rev: str, records: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for r in records:
        if "error" in r:
            rows.append((r["case"], r["verdict"], "-", "-", "-", r["error"]))
        else:
            times = digits(r["this_ms"]), digits(r["rev_ms"]), f"{r['ratio']:.2f} ({r['low']:.2f}..{r['high']:.2f})"
            rows.append((r["case"], r["verdict"], *times, "" if r["same_bits"] else "other bits"))
    about = f"this / {rev}: above 1 this tree is slower; in brackets what four of five rounds agree on"
    Table(("case", "", "this ms", f"{rev} ms", "this / REV", ""), rows, about).show(console)
    slower = [r["case"] for r in records if r["verdict"] == "SLOWER"]
    told = f": {', '.join(slower)}" if slower else ""
    console.print(f"slower than {rev}: {len(slower)} of {len(records)}{told}", markup=False, soft_wrap=True)


def checked_out(rev: str, folder: pathlib.Path, console: Console, root: pathlib.Path = ROOT) -> None:
    """REV's package and its library in `folder`, and nothing else. SystemExit says what does not work."""

    def git(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True)

    commit = git("rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}").stdout.decode().strip()
    if not commit:
        raise SystemExit(f"--against {rev}: git knows no such commit")
    sources = "--", "csrc", "setup.py"
    if (
        git("diff", "--quiet", commit, *sources).returncode == 0
        and not git("ls-files", "-o", "--exclude-standard", *sources).stdout
    ):
        package = git("archive", "--format=tar", commit, "rerank_kernels").stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=package, check=True)
        for library in pathlib.Path(rk.__file__).parent.glob("*.so"):
            shutil.copy(library, folder / "rerank_kernels")
        return
    console.print("pip builds the other revision's library; it is kept for the next time")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    environment = {**os.environ, "PIP_CACHE_DIR": str(BUILT / torch.__version__), "RERANK_KERNELS_BUILD_CPU": "1"}
    environment["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    done = subprocess.run([*pip, f"git+file://{root}@{commit}"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--against: the other revision does not build:\n{(done.stdout + done.stderr)[-3000:]}")


def listed(device: str, quick: bool) -> list[Case]:
    """On a GPU a case has each of our ways."""
    table = [name for name in contests.listed(device, quick) if not name.endswith(COMPILED)]
    if device == "cpu":
        return [(name, "") for name in table]
    return [(name, " ".join(way)) for name in table for way in contests.place(device).ways(name.rpartition(" ")[2])]


def measured(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    pace = Pace(0.5, 9, 2.0) if args.quick else Pace(3.0, 15, 2.0)
    cases = [c for c in listed(args.device, args.quick) if not args.only or any(o in ": ".join(c) for o in args.only)]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checked_out(args.against, pathlib.Path(folder), console)
        trees = {"this": ROOT, "REV": pathlib.Path(folder)}
        sides = {who: functools.partial(resident, who, tree=tree, threads=args.threads) for who, tree in trees.items()}
        try:
            for side in sides.values():  # both are there before either is timed
                side()
            for record in compare(cases, sides, pace, args.quick, args.device):
                records.append(record)
                words = record.get("error") or f"{record['ratio']:.2f} {record['verdict']}"
                console.print(f"{len(records)}/{len(cases)} {record['case']}: {words}", markup=False, highlight=False)
        finally:
            close()
    show(console, args.against, records)
    return records
