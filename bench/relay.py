"""`python bench/run.py --device cuda`: a worker process runs the cases and notes every step in a journal; if it dies, another
goes on behind the case and contestant that killed it. A kernel that faults takes its process's GPU context along, and the rest
of the run must not be lost to it.

The journal is a file of JSON lines: {"begins": [case, contestant]}, {"done": case, ...}, {"lost": [case, contestant, why]}.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import device
import report
import torch
from results import line_of, ratios, show
from rich.console import Console
from turns import DeviceLost, play

from rerank_kernels.backend import registry

STEP = 150.0  # seconds without a step after which the worker counts as stuck
MOST_WORKERS = 12
RUN = pathlib.Path(__file__).parent / "run.py"


class Journal:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def write(self, **line: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        whole = self.path.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def done(self) -> dict[str, dict[str, Any]]:
        return {line["done"]: line for line in self.lines() if "done" in line}

    def lost(self) -> dict[str, dict[str, str]]:
        """Case -> contestant -> why."""
        table: dict[str, dict[str, str]] = {}
        for line in self.lines():
            if "lost" in line:
                case, contestant, why = line["lost"]
                table.setdefault(case, {})[contestant] = why
        return table

    def unfinished(self) -> tuple[str, str] | None:
        """The case and contestant that the last worker began and did not end."""
        last: tuple[str, str] | None = None
        for line in self.lines():
            if "begins" in line:
                last = (line["begins"][0], line["begins"][1])
            elif "done" in line or "lost" in line:
                last = None
        return last


# ---- the worker ------------------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace, table: Mapping[str, device.Job]) -> int:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    place = device.Place(torch.device(args.device), compile=not args.no_compile)
    if args.share:
        return _compile_ahead(args, table, place)
    journal = Journal(args.worker)
    if not any("machine" in line for line in journal.lines()):
        _busy(place)
        journal.write(machine=report.machine(args.device))
    done, lost = journal.done(), journal.lost()
    budget, at_least = (0.1, 5) if args.quick else (0.25, 7)
    for number, (name, job) in enumerate(table.items(), 1):
        if name in done:
            continue
        if time.time() > args.until:
            break
        started = time.perf_counter()
        gone = lost.get(name, {})
        contestants: dict[str, Any] = {}
        notes, flops, moved, sets = "", 0.0, 0.0, 1
        step = ["building the case"]

        def begins(contestant: str, name: str = name, step: list[str] = step) -> None:
            step[0] = contestant
            journal.write(begins=[name, contestant])

        try:
            begins(step[0])
            if not {"building the case", "the clock"} & gone.keys():
                built = job.build(place)
                notes, flops, moved, sets = built.notes, built.flops, built.bytes, built.sets
                kept = [c for c in built.contestants if c.name not in gone]
                built = type(built)(kept, flops, moved, sets, notes)
                contestants = play(built, place.device, budget=budget, at_least=at_least, begins=begins)
                del built, kept
        except DeviceLost as error:
            journal.write(lost=[name, step[0], str(error)])
            print(f"  {name}: {step[0]} took the device's context along: {error}", flush=True)
            os._exit(3)
        except Exception as error:
            gone = {**gone, step[0]: f"{type(error).__name__}: {error}"[:400]}
        for contestant, why in gone.items():
            contestants[contestant] = {"ours": contestant.split(" ")[0] in registry.BACKENDS, "error": why}
        seconds = time.perf_counter() - started
        journal.write(
            done=name,
            group=job.group,
            flops=flops,
            bytes=moved,
            sets=sets,
            notes=notes,
            contestants=contestants,
            took_s=seconds,
        )
        print(f"{number:3d}/{len(table)} {seconds:5.1f} s  {line_of(name, journal.done()[name])}", flush=True)
    _busy(place)
    journal.write(machine_after=report.machine(args.device))
    return 0


def _busy(place: device.Place) -> None:
    """Half a second of work, so that the clocks that are read next are those of a GPU at work."""
    if place.device.type == "cuda":
        x = torch.randn(4096, 4096, device=place.device, dtype=torch.float16)
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            for _ in range(20):
                x @ x
            torch.cuda.synchronize()


def _compile_ahead(args: argparse.Namespace, table: Mapping[str, device.Job], place: device.Place) -> int:
    """This share's calls of what compiles at its first call, so that the process with the clock finds it in a cache on disk."""
    this, of = map(int, args.share.split("/"))
    for name, job in list(table.items())[this::of]:
        if time.time() > args.until or (job.group == "model" and not name.startswith("base")):
            continue
        try:
            for c in job.build(place).contestants:
                if c.name.startswith("triton") or c.name == "compile":
                    with c.around():
                        c.call(0)
            torch.cuda.synchronize()
        except Exception:  # the worker meets it again, and has a cell to say it in
            if place.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                except Exception:
                    os._exit(3)
    return 0


# ---- the run ---------------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace, argv: Sequence[str], console: Console) -> int:
    every = device.jobs()
    table = {n: j for n, j in every.items() if (j.quick or not args.quick) and chosen(n, args.only)}
    if args.worker is not None or args.share:
        with torch.no_grad():
            return work(args, table)
    if not table:
        console.print(f"--only {' '.join(args.only)} names no case; there are:\n  " + "\n  ".join(every), markup=False)
        return 2
    if args.list:
        print("\n".join(table))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch is a build without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        console.print("\n".join(f"{name}: not measured" for name in table), highlight=False)
        console.print(f"not measured: {why}")
        return 2
    started = time.time()
    args.until = started + args.budget
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(pathlib.Path(folder) / "journal")
        _compile_first(args, argv, table)
        supervise(journal, [*argv, "--worker", str(journal.path), "--until", str(args.until)], args.until, console)
        content = collected(journal, args, table, time.time() - started)
    if args.json is not None:
        report.write_json(args.json, content)
    show(content)
    if args.json is not None:
        print(f"written: {args.json}")
    wrong = any("wrong" in c for r in content["results"] for c in r["contestants"].values())
    return 1 if wrong or not content["results"] else 0


def chosen(name: str, only: Sequence[str] | None) -> bool:
    return not only or any(o in name for o in only)


def _compile_first(args: argparse.Namespace, argv: Sequence[str], table: Mapping[str, Any]) -> None:
    """Triton's and PyTorch's compilers take seconds a kernel on one core: a few processes compile before the clock starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(8, cores // 2, len(table) // 3)
    if args.device != "cuda" or count < 2 or registry.missing("triton") is not None:
        return
    started, limit = time.time(), 0.35 * args.budget
    command = [sys.executable, str(RUN), *argv, "--until", str(started + limit)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # PyTorch's compiler would start a process a core in each
    quiet["env"] = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    processes = [subprocess.Popen([*command, "--share", f"{i}/{count}"], **quiet) for i in range(count)]
    while any(p.poll() is None for p in processes) and time.time() < started + limit:
        time.sleep(0.2)
    for process in processes:
        process.kill()
        process.wait()
    print(f"{count} processes compiled ahead: {time.time() - started:.0f} s", flush=True)


def supervise(journal: Journal, command: Sequence[str], until: float, console: Console, step: float = STEP) -> None:
    """Workers, one after the other, until one comes to its end."""
    for _ in range(MOST_WORKERS):
        process = subprocess.Popen([sys.executable, str(RUN), *command])
        size, since = -1, time.time()
        why = ""
        while process.poll() is None:
            time.sleep(0.1)
            now = journal.path.stat().st_size if journal.path.exists() else 0
            if now != size:
                size, since = now, time.time()
            elif time.time() - since > step or time.time() > until + 60.0:
                why = f"no answer for {time.time() - since:.0f} s"
                process.send_signal(signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return
        if (begun := journal.unfinished()) is not None:
            journal.write(lost=[*begun, why or f"the process ended with {process.returncode}"])
            console.print(f"{begun[0]}: {begun[1]}: {journal.lost()[begun[0]][begun[1]]}; going on behind it", markup=False)
        elif not any("lost" in line or "begins" in line for line in journal.lines()):
            console.print("the worker does not start", style="bold red")
            return
        if time.time() > until:
            return


def collected(journal: Journal, args: argparse.Namespace, table: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    lines = journal.lines()
    results = [{"case": r.pop("done"), **r, "ratios": ratios(r["contestants"])} for r in journal.done().values()]
    return {
        "machine": next((line["machine"] for line in lines if "machine" in line), {}),
        "machine_after": next((line["machine_after"] for line in lines if "machine_after" in line), {}),
        "device": args.device,
        "quick": args.quick,
        "seconds": seconds,
        "not_measured": [n for n in table if n not in journal.done()],
        "results": results,
    }
