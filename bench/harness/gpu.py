"""`python bench/run.py --device cuda`: a worker runs one case after the other; if it dies, another goes on behind it.

A kernel that faults takes its process's GPU context along, and the rest of the run must not be lost to it. The worker says
which contestant it begins; the one that it died of has an error for a time, and the case runs again without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from bench.cases import contests
from bench.cases.contests import place as place
from bench.cases.models import COMPILED
from bench.harness import machine, worker
from bench.harness.turns import DeviceLost, Missing, Pace, Work, play, settled, short
from bench.pages.results import line_of
from rerank_kernels.backend import registry

NAME = "GPU"  # of the worker
START, STEP = 150.0, 150.0  # seconds without an answer, or without a step, after which the worker counts as stuck
MOST_DEATHS = 12
BUILDING, CLOCK = "building the case", "the clock"


def case(name: str, gone: Mapping[str, str], device: str, compile: bool, quick: bool) -> dict[str, Any]:  # noqa: A002
    """The record of a case without those that are `gone`, each with why."""
    gone, begun, work, cells = dict(gone), "", Work(()), {}

    def begins(contestant: str) -> None:
        nonlocal begun
        begun = contestant
        worker.step(contestant)

    try:
        begins(BUILDING)
        if not {BUILDING, CLOCK} & gone.keys():
            work = contests.listed("cuda", quick)[name](contests.place(device, compile))
            kept = [c for c in work.contestants if c.name not in gone]
            pace = Pace(0.1, 5, 0.5) if quick else Pace(0.25, 7, 0.5)
            cells = play(dataclasses.replace(work, contestants=kept), pace, begins=begins)
    except DeviceLost:
        raise  # another worker goes on
    except Exception as error:
        gone[begun] = short(error)
    return work.record(name, {**cells, **{c: {"ours": c.split(" ")[0] in registry.BACKENDS, "error": gone[c]} for c in gone}})


def compile_ahead(names: Sequence[str], compile: bool) -> None:  # noqa: A002
    """What compiles at its first call is called once, so that the process with the clock finds it in a cache on disk. Not what
    tunes itself: beside others it would choose badly."""
    for name in names:
        try:
            for c in contests.listed("cuda", False)[name](contests.place("cuda", compile)).contestants:
                if c.name.startswith("triton") or ("compile" in c.name and "autotune" not in c.name):
                    with c.around():
                        c.call(0)
            settled()
        except Exception:  # the worker meets it again, and has a cell to say it in
            try:
                settled()
            except Exception:
                os._exit(3)


def run(table: Sequence[str], until: float, console: Console, *how: Any, **of_worker: Any) -> list[dict[str, Any]]:
    """The records, in their order, as far as the time goes."""
    records: list[dict[str, Any]] = []
    deaths = 0
    for number, name in enumerate(table, 1):
        gone: dict[str, str] = {}
        while (left := until - time.time()) > 0 and deaths < MOST_DEATHS:
            started, there = time.perf_counter(), None
            try:
                there = worker.resident(NAME, patience=START, **of_worker)
                there.at, there.patience = "", max(1.0, min(STEP * (4 if name.endswith(COMPILED) else 1), left + 60.0))
                records.append(there.ask(case, name, gone, *how))
            except Missing as error:
                if there is None or not there.at:  # it did not come to its first step
                    console.print(f"the worker does not start: {error}", style="bold red", markup=False)
                    return records
                there.kill()
                deaths += 1
                gone[there.at] = str(error)
                console.print(f"{name}: {there.at}: {error}; going on behind it", markup=False)
                continue
            words = f"{number:3d}/{len(table)} {time.perf_counter() - started:5.1f} s  {line_of(records[-1])}"
            console.print(words, highlight=False, markup=False, soft_wrap=True)
            break
    return records


def measured(table: Sequence[str], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What the file of the run holds."""
    budget, started = args.budget or (60.0 if args.quick else 240.0), time.time()
    _compile_first(table, not args.no_compile, started, 0.35 * budget)
    content: dict[str, Any] = {"machine": worker.resident(NAME, patience=START).ask(machine.facts, args.device)}
    results = run(table, started + budget, console, args.device, not args.no_compile, args.quick)
    with contextlib.suppress(Missing):
        content["machine_after"] = worker.resident(NAME, patience=START).ask(machine.facts, args.device)
    left = [n for n in table if n not in {r["case"] for r in results}]
    return {**content, "results": results, "not_measured": left, "seconds": time.time() - started}


def _compile_first(table: Sequence[str], compile: bool, started: float, limit: float) -> None:  # noqa: A002
    """Triton's and PyTorch's compilers take seconds a kernel on one core: a few processes compile before the clock starts."""
    count = min(8, machine.cores() // 2, len(table) // 3)
    if count < 2 or registry.missing("triton") is not None:
        return
    # PyTorch's compiler would start a process a core in each
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    crowd = [worker.Worker(environment=environment, threads=2) for _ in range(count)]
    for i, one in enumerate(crowd):
        one.send((compile_ahead, ([n for n in table if not n.startswith("large")][i::count], compile)))
    for one in crowd:
        with one, contextlib.suppress(Missing):
            one.patience = max(0.1, started + limit - time.time())
            one.answer()
    print(f"{count} processes compiled ahead: {time.time() - started:.0f} s", flush=True)


def absent() -> str | None:
    if torch.cuda.is_available():
        return None
    return "this PyTorch is a build without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
