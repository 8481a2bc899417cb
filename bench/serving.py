"""A machine shared as servers share it: several processes of the same model, several callers in one, other work beside.

Each process is asked for single pairs of 128 tokens, one call after the other, by each of its callers; all begin at a word, and
what counts is how many pairs all of them finish in the same seconds. Ours and stock take turns. `python bench/serving.py` is
one of these processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rerankers
import shapes
import torch
from workers import Died

import rerank_kernels as rk

WAYS = {  # name -> processes, callers in each, processes beside them that only burn time, at the lowest priority
    "one process, one caller": (1, 1, 0),
    "one process, 4 callers": (1, 4, 0),
    "2 processes": (2, 1, 0),
    "4 processes": (4, 1, 0),
    "one process, every core busy at low priority": (1, 1, -1),
}
WHO = ("stock", "ours")
SLEEPY = {"stock, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"}}
ROUNDS = 3
BURN = "import os\nos.nice(19)\nwhile True: pass"


def measure(seconds: float = 2.0, name: str = rerankers.MINILM) -> list[dict[str, Any]]:
    """One record a way: pairs a second of each who, and ours / stock, as medians over the rounds."""
    records = []
    for way, (processes, callers, burners) in WAYS.items():
        beside = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) if burners else 0
        done: dict[str, list[float]] = {}
        for who in (*WHO, *SLEEPY):
            with _started(who, name, processes, callers) as crowd, _burning(beside):
                done[who] = [_round(crowd, seconds) for _ in range(ROUNDS)]
        rates = {who: statistics.median(found) for who, found in done.items()}
        records.append({"way": way, "model": name, "rates": rates, "all": done, "ratio": rates["ours"] / rates["stock"]})
    return records


@contextlib.contextmanager
def _started(who: str, name: str, processes: int, callers: int) -> Iterator[list[subprocess.Popen[str]]]:
    kind = who.partition(",")[0]
    command = [sys.executable, __file__, kind, name, "--callers", str(callers), "--threads", str(torch.get_num_threads())]
    pipes: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    crowd = [subprocess.Popen(command, env=os.environ | SLEEPY.get(who, {}), **pipes) for _ in range(processes)]
    try:
        for process in crowd:
            _said(process)
        yield crowd
    finally:
        for process in crowd:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _burning(count: int) -> Iterator[None]:
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


def _round(crowd: Sequence[subprocess.Popen[str]], seconds: float) -> float:
    """Pairs a second of all of them."""
    for process in crowd:
        assert process.stdin is not None
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
    return sum(float(_said(process)) for process in crowd)


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise Died(f"a process of the study ended with {process.wait()}")
    return line


def one(who: str, name: str, callers: int, threads: int) -> None:
    """The process's side: a line with seconds on stdin, one with pairs a second on stdout."""
    torch.set_num_threads(threads)
    shape = shapes.RERANKERS[name]
    model = shapes.reranker(shape)
    if who == "ours":
        rk.patch(model)
    batch = shapes.padded(shape, shapes.tokens(shape, (128,)))

    def call(until: float, done: list[float]) -> None:
        count, start = 0, time.perf_counter()
        with torch.inference_mode():
            while time.perf_counter() < until:
                model(**batch)
                count += 1
        done.append(count / (time.perf_counter() - start))

    call(time.perf_counter() + 0.5, [])
    print("ready", flush=True)
    for line in sys.stdin:
        done: list[float] = []
        until = time.perf_counter() + float(line)
        crowd = [threading.Thread(target=call, args=(until, done)) for _ in range(callers)]
        for caller in crowd:
            caller.start()
        for caller in crowd:
            caller.join()
        print(sum(done), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One process of the study of serving; bench/run.py starts it.")
    parser.add_argument("who", choices=WHO)
    parser.add_argument("name", choices=list(shapes.RERANKERS))
    parser.add_argument("--callers", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args(argv)
    one(args.who, args.name, args.callers, args.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
