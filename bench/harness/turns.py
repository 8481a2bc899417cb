"""The one clock: contestants take turns, and a record of each says how long its calls took.

Ours, theirs, theirs, ours, so that a busy machine hits all alike; a ratio is the median over the rounds of theirs / ours. On a
CPU a turn is a host clock around calls. On a GPU the turn of an op is a CUDA graph of several calls between two events: the
time of the kernels without that of the launching thread. Beside it stands the time of the same calls made from Python
(`call_ms`). The calls go round several copies of the tensors, enough that none finds its own in the L2 cache. A whole model,
which looks at its inputs, runs from Python between two synchronisations; beside it stands what a profiler adds up of the
kernels of one call (`kernels_ms`).

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

TURN = 0.002  # seconds a turn lasts at least: the clock's own cost and the hand-over are noise beside it
MOST_ROUNDS, MOST_CALLS = 100, 64  # MOST_CALLS: of a graph
SLOW = 0.02  # seconds from which a call on a GPU needs no company
WARM = 3  # calls on a GPU before any is timed: graphs, torch.compile's and ours, are recorded in the second
ENDLESS = 30.0  # seconds of a round from which two have to do
AWAKE = 0.05  # seconds of work after which a core and its caches are as they were before it slept
Cell = dict[str, Any]


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


def absent(name: str, why: str) -> Contestant:
    """A rival that cannot be here: its row says why."""

    def away() -> Callable[[int], float]:
        raise Missing(why)

    return Contestant(name, away=away)


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

    def record(self, case: str, cells: Mapping[str, Cell]) -> dict[str, Any]:
        """What the file of a run holds of the case."""
        return {"case": case, "group": "", **self.about, "flops": 2.0 * self.fmas, "bytes": self.bytes, "contestants": cells}


@dataclass(frozen=True)
class Pace:
    """Of one case: seconds of all its rounds, and how many there are at least; how long a round is of which three have to do,
    and of which the one has to do in which the contestants were made ready."""

    budget: float
    at_least: int
    long: float
    enough: float = math.inf

    def rounds(self, seconds: float) -> int:
        """Of so many seconds each."""
        least = min(self.at_least, 2 if seconds > ENDLESS else 3 if seconds > self.long else self.at_least)
        return max(least, min(MOST_ROUNDS, round(self.budget / max(seconds, 1e-6))))


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


def _calls(once: float) -> int:
    return max(1, math.ceil(TURN / max(once, 1e-7)))


class Turn:
    """A contestant made ready: how many calls a turn has is settled. `lasts` is the seconds of a turn, `once` of a call."""

    def __init__(self, timed: Callable[[int], float]) -> None:
        self.timed = timed
        self.once = self.lasts = timed(1)
        if self.once <= 1.0:
            start = time.perf_counter()
            self.once = timed(1)
            self.lasts = time.perf_counter() - start
        self.calls = _calls(self.once)
        self.lasts += (self.calls - 1) * self.once

    def measure(self) -> tuple[float, float]:
        """Seconds per call: those that count, and from Python."""
        t = self.timed(self.calls)
        return t, t

    def more(self) -> Cell:
        """What else its cell says; asked when all rounds are over, since a profiler may slow down what comes after it."""
        return {}


class DeviceTurn(Turn):
    """Of a GPU, made inside the contestant's `around`: compiled, tried for how many calls it takes, captured if it can be."""

    def __init__(self, c: Contestant, sets: int) -> None:
        self.contestant = c
        for _ in range(WARM):  # compiles, lays weights out
            c.call(0)
        self.once = seconds(c.call, 1)
        if quick := self.once < SLOW:
            self.once = min(self.once, seconds(c.call, 1))
        self.loops = _calls(self.once)
        self.calls = max(min(MOST_CALLS, self.loops), sets if quick else 1)
        self.graph = self._captured() if c.graph else None
        self.lasts = 2.0 * self.once
        if quick:
            self.lasts = sum(t * n for t, n in zip(self.measure(), (self.calls, self.loops), strict=True))

    def _all(self) -> None:
        for i in range(self.calls):
            self.contestant.call(i)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """Begun and ended by hand: torch.cuda.graph collects garbage first, which takes longer than all that is timed here."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self.contestant.call(0)  # what a library keeps per stream
                stream.synchronize()
                graph.capture_begin()
                try:
                    self._all()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
            graph.replay()
            settled()
        except Exception as error:  # then events around the calls themselves have to do
            still_there(error)
            return None
        return graph

    def measure(self) -> tuple[float, float]:
        outside = seconds(self.contestant.call, self.loops)
        if not self.contestant.graph:
            return outside, outside
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        (self.graph.replay if self.graph is not None else self._all)()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.calls, outside

    def more(self) -> Cell:
        of_model = {} if self.contestant.graph else {"kernels_ms": kernels_ms(self.contestant.call)}
        return {"graph": self.graph is not None, **of_model}


def kernels_ms(call: Callable[[int], object]) -> float | None:
    """The times of one call's kernels, added up by PyTorch's profiler; None where it sees none."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(0)
            settled()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(e.time_range.elapsed_us() for e in events) / 1e3 or None
    except Exception as error:  # a machine may forbid it
        still_there(error)
        return None


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
    return (words if isinstance(error, (AssertionError, Missing)) else f"{type(error).__name__}: {words}")[:400]


# ---- a case ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _into(cell: Cell) -> Iterator[None]:
    """What goes wrong inside is the cell's, in the place of a time: "wrong", "error" or, not there, "why"."""
    try:
        yield
    except Exception as error:
        kind = "wrong" if isinstance(error, AssertionError) else "why" if isinstance(error, Missing) else "error"
        cell[kind] = short(error)
        if kind == "error":
            still_there(error)


def interleave(turns: Mapping[str, Turn], pace: Pace, cells: Mapping[str, Cell], arounds: Mapping[str, Any]) -> None:
    """Everyone's times, one a round, into the cells; who fails on the way has no time, and the others go on."""
    once = sum(t.lasts for t in turns.values())
    times = {name: [(turn.once, turn.once)] if once > pace.enough else [] for name, turn in turns.items()}
    for number in range(pace.rounds(once) if once <= pace.enough else 0):
        order: Iterable[str] = turns if number % 2 == 0 else reversed(list(turns))
        for name in (n for n in order if not cells[n].keys() & {"error", "why"}):
            with _into(cells[name]), arounds.get(name, contextlib.nullcontext)():
                times[name].append(turns[name].measure())
    for name, found in times.items():
        if not cells[name].keys() & {"error", "why"}:
            inside, outside = ([t[i] * 1e3 for t in found] for i in (0, 1))
            cells[name] |= {"ms": statistics.median(inside), "all_ms": inside, "call_ms": statistics.median(outside)}
            with arounds.get(name, contextlib.nullcontext)():
                cells[name] |= turns[name].more()


def play(work: Work, pace: Pace, *, gates: bool = True, begins: Callable[[str], None] = lambda name: None) -> dict[str, Cell]:
    """Name of a contestant -> its times in milliseconds, or why it has none. `beside_ms`: ours in the rounds of who is away."""
    cells: dict[str, Cell] = {c.name: {"ours": c.ours, **({} if c.bar is None else {"bar": c.bar})} for c in work.contestants}
    here: dict[str, Turn] = {}
    away: dict[str, Turn] = {}
    for c in work.contestants:
        begins(c.name)
        with _into(cells[c.name]), c.around():
            if gates and c.gate is not None:
                c.gate()
                settled()
            if c.away is not None:
                away[c.name] = Turn(c.away())
            elif torch.cuda.is_initialized():
                here[c.name] = DeviceTurn(c, work.sets)
            else:
                here[c.name] = Turn(functools.partial(seconds, c.call))
    begins("the clock")
    interleave(here, pace, cells, {c.name: c.around for c in work.contestants})
    if work.ours.away is not None:  # all are
        interleave(away, pace, cells, {})
    elif away:
        beside: Cell = {}
        ours = Turn(functools.partial(seconds, work.ours.call, awake=AWAKE))
        interleave({"": ours, **away}, pace, {**cells, "": beside}, {"": work.ours.around})
        for name in away:
            cells[name]["beside_ms"] = beside.get("all_ms", [])
    here.clear()
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 24 * 2**30:
        gc.collect()
        torch.cuda.empty_cache()
    return cells
