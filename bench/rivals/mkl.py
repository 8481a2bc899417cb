"""MKL's own strict setting beside ours: stock PyTorch in a process of its own that was started with MKL_CBWR=...,STRICT.

The setting is read at MKL's first call, so it takes a process. It promises the same bits whatever the threads and the
alignment. `away` puts such a process into a contest, as one more rival that makes the same calls as the first. `bits` counts
what it leaves unfixed: the pairs whose logit has other bits than alone, of a small reranker, for stock, stock under it
and ours.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rerank_kernels as rk
from bench.cases import shapes
from bench.cases.contests import on_a_cpu
from bench.cases.ops import DTYPES, Build
from bench.harness.turns import AWAKE, Contestant, Missing, Work
from bench.harness.worker import PAUSE, Died, Ready, Worker

BAR = 1.0
NAME = "MKL strict"
CASES = tuple(f"linear {m}x{k}x{n}" for k, n in ((768, 768), (768, 3072), (3072, 768)) for m in (2048, 128, 16, 1))
MODELS = ("8x128", "4x512", "32 of 16 to 512")  # of bge-reranker-base
WAYS = ("stock", f"stock, {NAME}", "ours")
OF_BITS = ("fp32", "bf16")
BATCHES, EQUAL, PAIRS = (2, 7, 32), 64, 64  # tokens a pair, where lengths are equal
_workers: list[Worker] = []


def setting() -> str:
    """As the issue has it, where the machine can."""
    return f"{'AVX512' if 'AVX512' in torch.backends.cpu.get_cpu_capability() else 'AVX2'},STRICT"


def chosen(case: str) -> bool:
    return case in CASES or (case.startswith("bge-reranker-base") and case.rpartition(", ")[2] in MODELS)


def says() -> str | None:
    """The mode that MKL itself names under this setting: on CPUs it does not know it takes another than was asked for."""
    code = "import torch; torch.mm(torch.ones(64, 64), torch.ones(64, 64))"
    environment = {**os.environ, "MKL_CBWR": setting(), "MKL_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    match = re.search(r"\bCNR:(\S+)", done.stdout)
    return match[1] if match else None


def away(build: Build, case: str, quick: bool, bar: float | None = BAR) -> Work:
    """The contest, and its first rival under that setting. A bar is for whole runs."""
    work = build()
    first = next(c.name for c in work.contestants if not c.ours)
    there = functools.partial(ready, {"case": case, "quick": quick, "rival": first})
    return replace(work, contestants=[*work.contestants, Contestant(f"{first}, {NAME}", bar=bar, away=there)])


def ready(what: Mapping[str, Any]) -> Callable[[int], float]:
    if not torch.backends.mkl.is_available():
        raise Missing("this PyTorch has no MKL")
    if not _workers:
        _workers.append(Worker(environment={"MKL_CBWR": setting()}, pause=PAUSE, awake=AWAKE))
    try:
        said = _workers[0].ask(f"{__name__}:prepare", **what)
    except Died as error:
        _workers.clear()
        raise Missing(f"failed: {error}") from error
    if "error" in said:
        raise Missing(f"failed: {said['error']}")
    return _workers[0].turn


def used() -> bool:
    return bool(_workers)


def close() -> None:
    while _workers:
        _workers.pop().close()


# ---- the bits --------------------------------------------------------------------------------------------------------------


def bits(name: str, layers: int | None = None, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One record per way and dtype: what changed -> the pairs, of so many, whose bits are not those of the pair alone."""
    shape = replace(shapes.RERANKERS[name], layers=layers or shapes.RERANKERS[name].layers)
    found = []
    for way in WAYS:
        if NAME in way and not torch.backends.mkl.is_available():
            continue
        worker = Worker(environment={"MKL_CBWR": setting() if NAME in way else ""}, threads=1)
        try:
            for dtype in OF_BITS:
                what = {"shape": dataclasses.asdict(shape), "dtype": dtype, "ours": way == "ours", "pairs": pairs}
                said = worker.ask(f"{__name__}:count", **what)
                if "error" in said:
                    raise Missing(f"{way}, {dtype}: {said['error']}")
                found.append({"model": name, "way": way, "dtype": dtype, "pairs": pairs, **said})
        finally:
            worker.close()
    return found


# ---- the contestant's process ----------------------------------------------------------------------------------------------


def count(shape: Mapping[str, Any], dtype: str, ours: bool, pairs: int) -> dict[str, Any]:
    of = shapes.Shape(**shape)
    model: Any = shapes.reranker(of).to(DTYPES[dtype])
    if ours:
        rk.patch(model)

    def logits(rows: Sequence[Tensor], at_a_time: int, more: int = 0) -> Tensor:
        return shapes.in_batches(of, rows, at_a_time, lambda batch: model(**batch).logits, more=more)

    mixed = shapes.tokens(of, shapes.lengths(pairs))
    equal = shapes.tokens(of, (EQUAL,) * pairs)
    alone, alone_equal = logits(mixed, 1), logits(equal, 1)
    got = {f"batches of {n}": (logits(equal, n), alone_equal) for n in BATCHES}
    # the longest pairs have no room for padding
    short = [i for i, row in enumerate(mixed) if len(row) <= shapes.LONGEST - 37]
    got["padding"] = (logits([mixed[i] for i in short], 1, more=37), alone[short])
    torch.set_num_threads(2)
    got["2 threads"] = (logits(mixed, 1), alone)
    torch.set_num_threads(1)
    found = {n: shapes.differ(a, b) for n, (a, b) in got.items()}
    return {"differ": {n: d for n, (d, _) in found.items()}, "furthest": max(f for _, f in found.values())}


def prepare(case: str, quick: bool, rival: str) -> Ready:
    work = on_a_cpu(quick)[case]()
    return next(c for c in work.contestants if c.name == rival).call, {}
