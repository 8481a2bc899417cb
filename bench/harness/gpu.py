"""`python bench/run.py --device cuda`: a worker runs one case after the other; if it dies, another goes on behind it.

A kernel that faults takes its process's GPU context along, and the rest of the run must not be lost to it. The worker says
which contestant it begins; the one that it died of has an error for a time, and the case runs again without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from bench.cases import models, ops, shapes
from bench.harness import files, worker
from bench.harness.turns import DeviceLost, Pace, play, settled, short
from bench.harness.worker import Died, Worker
from bench.pages.results import line_of, ratios
from bench.pages.tables import show_gpu
from rerank_kernels.backend import registry

START, STEP = 150.0, 150.0  # seconds without an answer, or without a step, after which the worker counts as stuck
MOST_WORKERS = 12
CASE = f"{__name__}:case"
BUILDING, CLOCK = "building the case", "the clock"
Job = tuple[bool, ops.Build]  # whether a quick run has it, and how to build it of a place


@functools.cache
def jobs() -> dict[str, Job]:
    """Name -> case, in the order in which they run: what is least missed when time runs out comes last."""
    mixed = shapes.MIXED_LENGTHS
    batches = {f"32 of {min(mixed)}..{max(mixed)}": mixed, "32x128": (128,) * 32, "32x512": (512,) * 32}
    every = (*models.on_a_gpu(batches, False), *ops.on_a_gpu(batches), *models.on_a_gpu(batches, True))
    return {name: (quick, build) for name, quick, build in every}


def place(device: str, compile: bool) -> ops.Place:  # noqa: A002  the option's name
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return ops.Place(torch.device(device), compile)


# ---- the worker's side -----------------------------------------------------------------------------------------------------


def case(name: str, gone: Mapping[str, str], device: str, compile: bool, quick: bool) -> dict[str, Any]:  # noqa: A002
    """The record of a case without those that are `gone`, each with why; {"lost": why} if the device is not there any more."""
    started = time.perf_counter()
    record: dict[str, Any] = {"case": name, "contestants": {}}
    gone, begun = dict(gone), [BUILDING]

    def begins(contestant: str) -> None:
        begun[0] = contestant
        worker.step(contestant)

    try:
        begins(BUILDING)
        if not {BUILDING, CLOCK} & gone.keys():
            work = jobs()[name][1](place(device, compile))
            record |= {"group": "", **work.about, "flops": 2.0 * work.fmas, "bytes": work.bytes, "sets": work.sets}
            kept = [c for c in work.contestants if c.name not in gone]
            pace = Pace(0.1, 5, 0.5) if quick else Pace(0.25, 7, 0.5)
            record["contestants"] = play(type(work)(kept, sets=work.sets), pace, begins=begins)
    except DeviceLost as error:
        return {"lost": f"it took the device's context along: {short(error)}"}
    except Exception as error:
        gone[begun[0]] = short(error)
    for contestant, why in gone.items():
        record["contestants"][contestant] = {"ours": contestant.split(" ")[0] in registry.BACKENDS, "error": why}
    return {"group": "", "flops": 0.0, "bytes": 0.0, **record, "took_s": time.perf_counter() - started}


def machine(device: str) -> dict[str, Any]:
    """Its facts after half a second of work, so that the clocks that are read are those of a GPU at work."""
    if device == "cuda":
        x = torch.randn(4096, 4096, device=device, dtype=torch.float16)
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            for _ in range(20):
                x @ x
            settled()
    return files.machine(device)


def compile_ahead(names: Sequence[str], device: str, compile: bool) -> dict[str, Any]:  # noqa: A002
    """What compiles at its first call is called once, so that the process with the clock finds it in a cache on disk."""
    for name in names:
        try:
            for c in jobs()[name][1](place(device, compile)).contestants:
                if c.name.startswith("triton") or c.name == "compile":
                    with c.around():
                        c.call(0)
            settled()
        except Exception:  # the worker meets it again, and has a cell to say it in
            try:
                settled()
            except Exception:
                os._exit(3)
    return {}


# ---- the run ---------------------------------------------------------------------------------------------------------------


class Crew:
    """One worker at a time, MOST_WORKERS in all."""

    def __init__(self, until: float, **how: Any) -> None:
        self.until, self.how, self.started = until, how, 0
        self.worker: Worker | None = None

    def ask(self, function: str, **arguments: Any) -> dict[str, Any]:
        if self.worker is None:
            if self.started == MOST_WORKERS:
                raise Died(f"{MOST_WORKERS} workers died")
            self.started += 1
            self.worker = Worker(patience=START, **self.how)
            self.worker.ask("builtins:dict")
        self.worker.at = ""
        self.worker.patience = max(1.0, min(STEP, self.until + 60.0 - time.time()))
        return self.worker.ask(function, **arguments)

    def dismiss(self) -> None:
        if self.worker is not None:
            self.worker.kill()
        self.worker = None


def run(table: Sequence[str], crew: Crew, console: Console, **how: Any) -> list[dict[str, Any]]:
    """The records, in their order, as far as the time goes."""
    records: list[dict[str, Any]] = []
    for number, name in enumerate(table, 1):
        gone: dict[str, str] = {}
        while time.time() <= crew.until:
            started = time.perf_counter()
            try:
                said = crew.ask(CASE, name=name, gone=gone, **how)
                lost = said.get("lost") or said.get("error")
            except Died as error:
                said, lost = {}, str(error)
            if lost is None:
                said["ratios"] = ratios(said["contestants"])
                records.append(said)
                words = f"{number:3d}/{len(table)} {time.perf_counter() - started:5.1f} s  {line_of(said)}"
                console.print(words, highlight=False, markup=False, soft_wrap=True)
                break
            step = crew.worker.at if crew.worker else ""
            crew.dismiss()
            if not step:  # it did not come to its first step
                console.print(f"the worker does not start: {lost}", style="bold red", markup=False)
                return records
            gone[step] = lost
            console.print(f"{name}: {step}: {lost}; going on behind it", markup=False)
    return records


def main(args: argparse.Namespace, console: Console) -> int:
    every = jobs()
    table = [n for n, (quick, _) in every.items() if (quick or not args.quick) and chosen(n, args.only)]
    if not table:
        console.print(f"--only {' '.join(args.only)} names no case; there are:\n  " + "\n  ".join(every), markup=False)
        return 2
    if args.list:
        print("\n".join(table))
        return 0
    if not torch.cuda.is_available():
        why = "this PyTorch is a build without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        console.print("\n".join(f"{name}: not measured" for name in table), highlight=False)
        console.print(f"not measured: {why}")
        return 2
    budget = args.budget or (60.0 if args.quick else 240.0)
    started = time.time()
    crew = Crew(started + budget)
    facts: dict[str, Any] = {}
    try:
        _compile_first(table, not args.no_compile, started, 0.35 * budget)
        facts["machine"] = crew.ask(f"{__name__}:machine", device=args.device)
        results = run(table, crew, console, device=args.device, compile=not args.no_compile, quick=args.quick)
        with contextlib.suppress(Died):
            facts["machine_after"] = crew.ask(f"{__name__}:machine", device=args.device)
    finally:
        crew.dismiss()
    content = {**facts, "device": args.device, "quick": args.quick, "seconds": time.time() - started, "results": results}
    content["not_measured"] = [n for n in table if n not in {r["case"] for r in results}]
    if args.json is not None:
        files.write_json(args.json, content)
    show_gpu(console, content)
    if args.json is not None:
        print(f"written: {args.json}")
    wrong = any("wrong" in c for r in results for c in r["contestants"].values())
    return 1 if wrong or not results else 0


def chosen(name: str, only: Sequence[str] | None) -> bool:
    return not only or any(o in name for o in only)


def _compile_first(table: Sequence[str], compile: bool, started: float, limit: float) -> None:  # noqa: A002
    """Triton's and PyTorch's compilers take seconds a kernel on one core: a few processes compile before the clock starts."""
    count = min(8, files.cores() // 2, len(table) // 3)
    if count < 2 or registry.missing("triton") is not None:
        return
    # PyTorch's compiler would start a process a core in each
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    crowd = [Worker(environment=environment, threads=2) for _ in range(count)]
    for i, one in enumerate(crowd):
        names = [n for n in table if not n.startswith("large")][i::count]
        one.send({"call": f"{__name__}:compile_ahead", "with": {"names": names, "device": "cuda", "compile": compile}})
    for one in crowd:
        one.patience = max(0.1, started + limit - time.time())
        with contextlib.suppress(Died):
            one.answer()
        one.kill()
    print(f"{count} processes compiled ahead: {time.time() - started:.0f} s", flush=True)
