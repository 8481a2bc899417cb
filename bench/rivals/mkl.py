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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import rerank_kernels as rk
from bench.cases import contests, shapes
from bench.cases.ops import DTYPES, Build
from bench.harness import worker
from bench.harness.turns import Contestant, Missing, Work

BAR = 1.0
NAME = "MKL strict"
CASES = tuple(f"linear {m}x{k}x{n}" for k, n in ((768, 768), (768, 3072), (3072, 768)) for m in (2048, 128, 16, 1))
MODELS = ("8x128", "4x512", "32 of 16 to 512")  # of bge-reranker-base
WAYS = ("stock", f"stock, {NAME}", "ours")
OF_BITS = ("fp32", "bf16")
BATCHES, EQUAL, PAIRS = (2, 7, 32), 64, 64  # tokens a pair, where lengths are equal


def environment() -> dict[str, str]:
    """As the issue has it, where the machine can."""
    return {"MKL_CBWR": f"{'AVX512' if 'AVX512' in torch.backends.cpu.get_cpu_capability() else 'AVX2'},STRICT"}


def chosen(case: str) -> bool:
    return case in CASES or (case.startswith("bge-reranker-base") and case.rpartition(", ")[2] in MODELS)


def says() -> str | None:
    """The mode that MKL itself names under this setting: on CPUs it does not know it takes another than was asked for."""
    command = [sys.executable, "-c", "import torch; torch.mm(torch.ones(64, 64), torch.ones(64, 64))"]
    done = subprocess.run(command, env={**os.environ, **environment(), "MKL_VERBOSE": "1"}, capture_output=True, text=True)
    match = re.search(r"\bCNR:(\S+)", done.stdout)
    return match[1] if match else None


def away(build: Build, case: str, quick: bool, bar: float | None = BAR) -> Work:
    """The contest, and its first rival under that setting. A bar is for whole runs."""
    work = build()
    first = next(c.name for c in work.contestants if not c.ours)
    there = functools.partial(ready, case, first, quick)
    return dataclasses.replace(work, contestants=[*work.contestants, Contestant(f"{first}, {NAME}", bar=bar, away=there)])


def ready(case: str, who: str, quick: bool) -> Callable[[int], float]:
    if not torch.backends.mkl.is_available():
        raise Missing("this PyTorch has no MKL")
    there = worker.rival(NAME, environment=environment())
    there.ask(contests.prepare, case, who, quick)
    return there.turn


def bits(shape: shapes.Shape, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One record per way and dtype: what changed -> the pairs, of so many, whose bits are not those of the pair alone."""
    found = []
    for way in WAYS:
        strictly = NAME in way
        if strictly and not torch.backends.mkl.is_available():
            continue
        with worker.Worker(environment=environment() if strictly else {"MKL_CBWR": ""}, threads=1) as there:
            for dtype in OF_BITS:
                said = there.ask(count, shape, dtype, way == "ours", pairs)
                found.append({"way": way, "dtype": dtype, "pairs": pairs, **said})
    return found


def count(of: shapes.Shape, dtype: str, ours: bool, pairs: int) -> dict[str, Any]:
    """In that process."""
    model: Any = shapes.reranker(of).to(DTYPES[dtype])
    if ours:
        rk.patch(model)

    def logits(rows: Sequence[Tensor], size: int, more: int = 0) -> Tensor:
        return shapes.in_batches(of, rows, size, lambda batch: model(**batch).logits, more=more)

    mixed, equal = shapes.tokens(of, shapes.lengths(pairs)), shapes.tokens(of, (EQUAL,) * pairs)
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
