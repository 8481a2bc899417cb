"""Contestants taking turns on one device: gate, preparation, clock. What is timed is bench/device.py's affair.

On a GPU an op's turn is a CUDA graph of several calls between two events, which is the kernels' time without the launching
thread's, and beside it the time of the same calls made from Python (`call_ms`). The calls go round several copies of the
tensors, enough that none finds its own in the L2 cache. A whole model, which looks at its inputs, runs from Python between two
synchronisations. Elsewhere every turn is a host clock around calls.

What one contestant does wrong stays in its own cell: a gate that falls, an error of the library, a kernel that does not start.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

TURN = 1.0e-3  # seconds a turn lasts at least: the clock's own cost and the hand-over are noise beside it
MOST_CALLS = 64


class DeviceLost(Exception):
    """The device answers nothing any more, in this process."""


@dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[[int], object]  # the i-th call takes the i-th set of tensors, round and round
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    gate: Callable[[], None] | None = None  # ours have one; it raises AssertionError if what we compute is wrong
    ours: bool = False
    graph: bool = True


@dataclass(frozen=True)
class Work:
    """One line of the table. flops and bytes: what the task needs at least, not what any contestant does."""

    contestants: Sequence[Contestant]
    flops: float
    bytes: float
    sets: int = 1
    notes: str = ""


Found = dict[str, dict[str, Any]]


def play(work: Work, device: torch.device, *, budget: float, at_least: int, begins: Callable[[str], None]) -> Found:
    """Name of a contestant -> its times in milliseconds, or {"wrong": ...} or {"error": ...}."""
    found: Found = {}
    turns: dict[str, _Turn] = {}
    for c in work.contestants:
        begins(c.name)
        try:
            started = time.perf_counter()
            with c.around():
                if c.gate is not None:
                    c.gate()
                _settled(device)
                gate_s = time.perf_counter() - started
                turns[c.name] = _Turn(c, work.sets, device)
            found[c.name] = {"ours": c.ours, "prepare_s": time.perf_counter() - started, "gate_s": gate_s}
        except AssertionError as error:
            found[c.name] = {"ours": c.ours, "wrong": _short(error)}
        except Exception as error:
            found[c.name] = {"ours": c.ours, "error": _short(error)}
            _still_there(device, error)
    begins("the clock")
    once = sum(t.lasts for t in turns.values())
    rounds = max(3 if once > 0.5 else at_least, min(60, round(budget / max(once, 1e-6))))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in list(turns.items()):
            try:
                with turn.contestant.around():
                    times[name].append(turn.measure())
            except Exception as error:
                del turns[name]
                found[name] = {"ours": turn.contestant.ours, "error": _short(error)}
                _still_there(device, error)
    for name, turn in turns.items():
        inside, outside = ([t[i] * 1e3 for t in times[name]] for i in (0, 1))
        found[name] |= {
            "ms": statistics.median(inside),
            "call_ms": statistics.median(outside),
            "all_ms": inside,
            "graph": turn.graph is not None,
            "memory_mib": turn.memory / 2**20,
        }
    turns.clear()
    if device.type == "cuda" and torch.cuda.memory_reserved() > 24 * 2**30:
        gc.collect()
        torch.cuda.empty_cache()
    return found


class _Turn:
    """A contestant made ready, inside its `around`: compiled, tried for how many calls a turn takes, captured if it can be."""

    def __init__(self, c: Contestant, sets: int, device: torch.device) -> None:
        self.contestant, self.device = c, device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.memory = 0.0
        c.call(0)  # compiles, lays weights out
        _settled(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        c.call(0)
        _settled(device)
        if device.type == "cuda":
            self.memory = torch.cuda.max_memory_allocated() - before
        once = min(self._from_python(1) for _ in range(2))
        self.calls = max(1, min(MOST_CALLS, math.ceil(2 * TURN / max(once, 1e-7))))
        if once < 20 * TURN:
            self.calls = max(self.calls, sets)
        self.loops = max(1, min(self.calls, math.ceil(TURN / max(once, 1e-7))))
        if device.type == "cuda" and c.graph:
            self._capture()
        self.lasts = sum(t * n for t, n in zip(self.measure(), (self.calls, self.loops), strict=True))

    def _capture(self) -> None:
        """Begun and ended by hand: torch.cuda.graph collects garbage first, which takes longer than all that is timed here."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self.contestant.call(0)  # what a library keeps per stream
                stream.synchronize()
                graph.capture_begin()
                try:
                    for i in range(self.calls):
                        self.contestant.call(i)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
            graph.replay()
            torch.cuda.synchronize()
        except Exception as error:  # then events around the calls themselves have to do
            _still_there(self.device, error)
            return
        self.graph = graph

    def measure(self) -> tuple[float, float]:
        """Seconds per call: inside the device, and from Python."""
        outside = self._from_python(self.loops)
        if self.device.type != "cuda" or not self.contestant.graph:
            return outside, outside
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for i in range(self.calls):
                self.contestant.call(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.calls, outside

    def _from_python(self, n: int) -> float:
        _settled(self.device)
        start = time.perf_counter()
        for i in range(n):
            self.contestant.call(i)
        _settled(self.device)
        return (time.perf_counter() - start) / n


def _settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _still_there(device: torch.device, error: Exception) -> None:
    """Some errors of a kernel take the process's context with them, and every later call fails for the first one's sake."""
    try:
        _settled(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.zeros(1, device=device).item()
    except Exception as after:
        raise DeviceLost(_short(error)) from after


def _short(error: Exception) -> str:
    words = " ".join(str(error).split())
    return (words if isinstance(error, AssertionError) else f"{type(error).__name__}: {words}")[:400]
