"""The one clock: contestants take turns, and a record of each says how long its calls took.

Ours, theirs, theirs, ours, so that a busy machine hits all alike; a ratio is the median over the rounds of theirs / ours. On a
CPU a turn is a host clock around calls. On a GPU the turn of an op is a CUDA graph of several calls between two events: the
time of the kernels without that of the launching thread. Beside it stands the time of the same calls made from Python
(`call_ms`). The calls go round several copies of the tensors, enough that none finds its own in the L2 cache. A whole model,
which looks at its inputs, runs from Python between two synchronisations.

Who is in a process of its own takes turns with ours apart from the others: there both sleep while the other has its turn.
What one contestant does wrong stays in its own cell: a gate that falls, an error of the library, a kernel that does not start.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

TURN = 0.002  # seconds a turn lasts at least: the clock's own cost and the hand-over are noise beside it
MOST_ROUNDS, MOST_CALLS = 100, 64  # MOST_CALLS: of a graph
SLOW = 0.02  # seconds from which a call on a GPU needs no company
ENDLESS = 30.0  # seconds of a round from which two have to do
AWAKE = 0.05  # seconds of work after which a core and its caches are as they were before it slept


class Died(SystemExit):
    """Another process ended or gave no answer. Who can do without it catches this; else the run ends."""


class Missing(Exception):
    """A contestant that is not there, and why."""


class DeviceLost(Exception):
    """The device answers nothing any more, in this process."""


@dataclass(frozen=True)
class Contestant:
    """`call`: the i-th call takes the i-th set of tensors, round and round. `gate` raises AssertionError if it is wrong.

    `away` is for who has a process of its own: it starts and checks it, or raises Missing; what it returns times n calls.
    """

    name: str
    call: Callable[[int], object] = lambda i: None
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    gate: Callable[[], None] | None = None
    ours: bool = False
    graph: bool = True
    bar: float | None = None  # the least ratio theirs / ours that this project asks of itself
    away: Callable[[], Callable[[int], float]] | None = None


@dataclass(frozen=True)
class Work:
    """One case. fmas and bytes: what the task needs at least, not what any contestant does."""

    contestants: Sequence[Contestant]
    fmas: float = 0.0
    bytes: float = 0.0
    sets: int = 1
    about: Mapping[str, Any] = field(default_factory=dict)  # what a page wants to know of the case

    @property
    def ours(self) -> Contestant:
        return next(c for c in self.contestants if c.ours)


@dataclass(frozen=True)
class Pace:
    """Of one case: seconds of all its rounds, and how many there are at least; how long a round is of which three have to do,
    and of which the one has to do in which the contestants were made ready."""

    budget: float
    at_least: int
    long: float
    enough: float = math.inf


def settled() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(call: Callable[[int], object], n: int, awake: float = 0.0) -> float:
    """Of one of n calls. A process that slept while another had its turn makes them again until it is awake."""
    until = time.perf_counter() + awake
    while True:
        settled()
        start = time.perf_counter()
        for i in range(n):
            call(i)
        settled()
        now = time.perf_counter()
        if now >= until:
            return (now - start) / n


# ---- turns -----------------------------------------------------------------------------------------------------------------


class Turn(Protocol):
    """A contestant made ready: how many calls a turn has is settled. `lasts` is the seconds of a turn, `once` of a call."""

    lasts: float
    once: float

    def measure(self) -> tuple[float, float]:
        """Seconds per call: inside the device, and from Python."""


class HostTurn:
    def __init__(self, timed: Callable[[int], float]) -> None:
        self.timed = timed
        once = timed(1)
        start = time.perf_counter()
        self.lasts = once
        if once <= 1.0:
            once = timed(1)
            self.lasts = time.perf_counter() - start
        self.once, self.calls = once, max(1, math.ceil(TURN / max(once, 1e-7)))
        self.lasts += (self.calls - 1) * once

    def measure(self) -> tuple[float, float]:
        t = self.timed(self.calls)
        return t, t


class DeviceTurn:
    """Of a GPU, made inside the contestant's `around`: compiled, tried for how many calls it takes, captured if it can be."""

    def __init__(self, c: Contestant, sets: int) -> None:
        self.contestant = c
        self.graph: torch.cuda.CUDAGraph | None = None
        c.call(0)  # compiles, lays weights out
        settled()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once = seconds(c.call, 1)
        self.memory = torch.cuda.max_memory_allocated() - before
        if once < SLOW:
            once = min(once, seconds(c.call, 1))
        self.once = once
        self.loops = max(1, math.ceil(TURN / max(once, 1e-7)))
        self.calls = min(MOST_CALLS, self.loops)
        if once < SLOW:
            self.calls = max(self.calls, sets)
        if c.graph:
            self._capture()
        self.lasts = 2.0 * once
        if once < SLOW:
            self.lasts = sum(t * n for t, n in zip(self.measure(), (self.calls, self.loops), strict=True))

    def _capture(self) -> None:
        """Begun and ended by hand: torch.cuda.graph collects garbage first, which takes longer than all that is timed here."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
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
            settled()
        except Exception as error:  # then events around the calls themselves have to do
            still_there(error)
            return
        self.graph = graph

    def measure(self) -> tuple[float, float]:
        outside = seconds(self.contestant.call, self.loops)
        if not self.contestant.graph:
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


def still_there(error: BaseException) -> None:
    """Some errors of a kernel take the process's context with them, and every later call fails for the first one's sake."""
    if torch.cuda.is_initialized():
        try:
            settled()
            torch.cuda.empty_cache()
            torch.zeros(1, device="cuda").item()
        except Exception as after:
            raise DeviceLost(short(error)) from after


def short(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return (words if isinstance(error, (AssertionError, Missing, Died)) else f"{type(error).__name__}: {words}")[:400]


# ---- a case ----------------------------------------------------------------------------------------------------------------

Times = dict[str, list[tuple[float, float]]]
Wrong = dict[str, BaseException]
Cells = dict[str, dict[str, Any]]


def interleave(turns: Mapping[str, Turn], pace: Pace, arounds: Mapping[str, Any] | None = None) -> tuple[Times, Wrong]:
    """Everyone's times, one a round, and who failed on the way: the others go on."""
    once = sum(t.lasts for t in turns.values())
    if once > pace.enough:
        return {name: [(turn.once, turn.once)] for name, turn in turns.items()}, {}
    least = min(pace.at_least, 2 if once > ENDLESS else 3 if once > pace.long else pace.at_least)
    times: Times = {name: [] for name in turns}
    failed: Wrong = {}
    for number in range(max(least, min(MOST_ROUNDS, round(pace.budget / max(once, 1e-6))))):
        order: Iterable[str] = turns if number % 2 == 0 else reversed(list(turns))
        for name in (n for n in order if n not in failed):
            try:
                with (arounds or {}).get(name, contextlib.nullcontext)():
                    times[name].append(turns[name].measure())
            except (Exception, Died) as error:
                failed[name] = error
                still_there(error)
    return times, failed


def play(work: Work, pace: Pace, *, gates: bool = True, begins: Callable[[str], None] = lambda name: None) -> Cells:
    """Name of a contestant -> its times in milliseconds, or why it has none: "wrong", "error" or, not there, "why".

    `beside_ms` are ours in the rounds of who is away.
    """
    cells: Cells = {c.name: {"ours": c.ours, **({} if c.bar is None else {"bar": c.bar})} for c in work.contestants}
    here: dict[str, Turn] = {}
    away: dict[str, Turn] = {}
    for c in work.contestants:
        begins(c.name)
        start = time.perf_counter()
        try:
            with c.around():
                if gates and c.gate is not None:
                    c.gate()
                    settled()
                cells[c.name]["gate_s"] = time.perf_counter() - start
                if c.away is not None:
                    away[c.name] = HostTurn(c.away())
                elif torch.cuda.is_initialized():
                    here[c.name] = DeviceTurn(c, work.sets)
                else:
                    here[c.name] = HostTurn(functools.partial(seconds, c.call))
            cells[c.name]["prepare_s"] = time.perf_counter() - start
        except (Exception, Died) as error:
            cells[c.name] |= _said(error)
    begins("the clock")
    times, failed = interleave(here, pace, {c.name: c.around for c in work.contestants})
    if away:
        ours = HostTurn(functools.partial(seconds, work.ours.call, awake=AWAKE))
        apart, more = interleave({"": ours, **away}, pace)
        beside = [t * 1e3 for t, _ in apart.pop("")]
        times, failed = {**times, **apart}, {**failed, **more}
    for name, found in times.items():
        if name in failed:
            cells[name] |= _said(failed[name])
            continue
        inside, outside = ([t[i] * 1e3 for t in found] for i in (0, 1))
        cells[name] |= {"ms": statistics.median(inside), "all_ms": inside}
        if name in away:
            cells[name]["beside_ms"] = beside
        elif isinstance(turn := here[name], DeviceTurn):
            graph, memory = turn.graph is not None, turn.memory / 2**20
            cells[name] |= {"call_ms": statistics.median(outside), "graph": graph, "memory_mib": memory}
    here.clear()
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 24 * 2**30:
        gc.collect()
        torch.cuda.empty_cache()
    return cells


def _said(error: BaseException) -> dict[str, str]:
    if isinstance(error, AssertionError):
        return {"wrong": short(error)}
    if isinstance(error, (Missing, Died)):
        return {"why": short(error)}
    still_there(error)
    return {"error": short(error)}
