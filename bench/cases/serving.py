"""A machine shared as servers share it: several processes of the same model, several callers in one, other work beside.

Each process is asked for single pairs of 128 tokens, one call after the other, by each of its callers; all begin at a word, and
what counts is how many pairs all of them finish in the same seconds. Ours and stock take turns.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import rerank_kernels as rk
from bench.cases import shapes
from bench.harness.machine import cores
from bench.harness.worker import Worker

WAYS = {  # name -> processes, callers in each, processes beside them that only burn time, at the lowest priority
    "one process, one caller": (1, 1, 0),
    "one process, 4 callers": (1, 4, 0),
    "2 processes": (2, 1, 0),
    "4 processes": (4, 1, 0),
    "one process, every core busy at low priority": (1, 1, cores()),
}
WHO: dict[str, dict[str, str]] = {"stock": {}, "ours": {}, "stock, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}
ROUNDS = 3
BURN = "import os\nos.nice(19)\nwhile True: pass"


def measure(seconds: float, name: str = shapes.MINILM) -> list[dict[str, Any]]:
    """One record per way: pairs per second of each who, and ours / stock, as medians over the rounds."""
    records = []
    for way, (processes, callers, burners) in WAYS.items():
        done: dict[str, list[float]] = {}
        for who, environment in WHO.items():
            with contextlib.ExitStack() as open_, _burning(burners):
                crowd = [open_.enter_context(Worker(environment=environment)) for _ in range(processes)]
                _together(crowd, load, who == "ours", name)
                done[who] = [_together(crowd, rate, seconds, callers) for _ in range(ROUNDS)]
        rates = {who: statistics.median(found) for who, found in done.items()}
        records.append({"way": way, "model": name, "rates": rates, "all": done, "ratio": rates["ours"] / rates["stock"]})
    return records


def _together(crowd: Sequence[Worker], function: Callable[..., float], *arguments: Any) -> float:
    """Pairs per second of all of them."""
    for worker in crowd:
        worker.send((function, arguments))
    return sum(worker.answer() for worker in crowd)


@contextlib.contextmanager
def _burning(count: int) -> Iterator[None]:
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


_loaded: list[Callable[[], object]] = []


def load(ours: bool, name: str) -> float:
    shape = shapes.RERANKERS[name]
    model = shapes.reranker(shape)
    if ours:
        rk.patch(model)
    batch = shapes.padded(shape, shapes.tokens(shape, (128,)))
    _loaded[:] = [lambda: model(**batch)]
    return rate(0.5, 1)


def rate(seconds: float, callers: int) -> float:
    """Pairs per second of so many callers."""
    until = time.perf_counter() + seconds

    def call(_: int) -> float:
        count, start = 0, time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() < until:
                _loaded[0]()
                count += 1
        return count / (time.perf_counter() - start)

    with ThreadPoolExecutor(callers) as crowd:
        return sum(crowd.map(call, range(callers)))
