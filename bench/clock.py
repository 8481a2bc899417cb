"""Contestants taking turns on a CPU: what a contest is, how long a turn lasts, what a record of it holds.

Ours, theirs, ours, theirs, so that a busy machine hits both alike; ratio is the median over the rounds of theirs / ours, above
1 we are faster. bench/turns.py is the same for a GPU.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_MEASURED = "not measured"  # in this run: --device cuda measures it, on a machine with a GPU
TURN = 0.002  # seconds a turn lasts at least: the clock's own cost and the hand-over are noise beside it
MOST_ROUNDS = 200
LONG, ENDLESS = 10.0, 30.0  # seconds of a round from which three rounds, and two, have to do
AWAKE = 0.05  # seconds of work after which a core and its caches are as they were before it slept
Turn = Callable[[int], float]  # makes so many calls, returns the seconds of one


class Missing(Exception):
    """A contestant that is not there, and why."""


@dataclass(frozen=True)
class Rival:
    name: str
    call: Callable[[], object]
    bar: float | None = None


@dataclass(frozen=True)
class Away:
    """A rival in a process of its own: `ready` starts and checks it, and raises Missing, or AssertionError if it is wrong."""

    name: str
    ready: Callable[[], Turn]
    bar: float | None = None


@dataclass(frozen=True)
class Contest:
    """One line or more of the table: our call, the others', and the gate, which raises AssertionError if ours is wrong."""

    ours: Callable[[], object]
    rivals: Sequence[Rival | Away]
    gate: Callable[[], None]
    about: Mapping[str, Any] = field(default_factory=dict)  # what a figure wants to know of the case


def calls(call: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - start) / n


def calls_awake(call: Callable[[], object], n: int) -> float:
    """`calls`, of a process that slept while another had its turn: made again until it is awake, and the last are timed."""
    awake = time.perf_counter() + AWAKE
    while True:
        seconds = calls(call, n)
        if time.perf_counter() >= awake:
            return seconds


def interleave(turns: Sequence[Turn], budget: float, at_least: int) -> list[list[float]]:
    """Seconds per call, one list a contestant, all of one length: rounds of one turn each until `budget` seconds are spent."""
    first = [turn(1) for turn in turns]
    again = [t if t > 1.0 else turn(1) for turn, t in zip(turns, first, strict=True)]
    repeats = [max(1, math.ceil(TURN / max(t, 1e-7))) for t in again]
    at_least = min(at_least, 2 if sum(again) > ENDLESS else 3 if sum(again) > LONG else at_least)
    times: list[list[float]] = [[] for _ in turns]
    end = time.perf_counter() + budget
    while len(times[0]) < at_least or (time.perf_counter() < end and len(times[0]) < MOST_ROUNDS):
        for held, turn, n in zip(times, turns, repeats, strict=True):
            held.append(turn(n))
    return times


def measure(name: str, contest: Contest, budget: float, at_least: int) -> list[dict[str, Any]]:
    """One record a rival; who is missing or wrong has no time, and the record says why.

    Who is in this process takes turns with ours first; who is in another has turns of its own with ours, where both sleep.
    """
    made: dict[str, dict[str, Any]] = {}
    here = [r for r in contest.rivals if isinstance(r, Rival)]
    if here:
        ours, *theirs = interleave(
            [functools.partial(calls, c) for c in (contest.ours, *(r.call for r in here))], budget, at_least
        )
        made |= {r.name: record(name, r.name, ours, t, r.bar) for r, t in zip(here, theirs, strict=True)}
    turns: dict[str, Turn] = {}
    away = [r for r in contest.rivals if isinstance(r, Away)]
    for rival in away:
        try:
            turns[rival.name] = rival.ready()
        except (Missing, AssertionError) as error:
            why = f"WRONG: {error}" if isinstance(error, AssertionError) else str(error)
            made[rival.name] = absent(name, rival.name, why, rival.bar)
    if turns:
        ours, *theirs = interleave([functools.partial(calls_awake, contest.ours), *turns.values()], budget, at_least)
        times = dict(zip(turns, theirs, strict=True))
        made |= {r.name: record(name, r.name, ours, times[r.name], r.bar) for r in away if r.name in times}
    return [{**made[r.name], **contest.about} for r in contest.rivals]


def record(case: str, rival: str, ours: Sequence[float], theirs: Sequence[float], bar: float | None) -> dict[str, Any]:
    ratio = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    return {
        "case": case,
        "against": rival,
        "ours_ms": statistics.median(ours) * 1e3,
        "theirs_ms": statistics.median(theirs) * 1e3,
        "ratio": ratio,
        "bar": bar,
        "verdict": verdict(ratio, bar),
        "rounds": len(ours),
        "ours_all_ms": [t * 1e3 for t in ours],
        "theirs_all_ms": [t * 1e3 for t in theirs],
        "gpu": NOT_MEASURED,
    }


def absent(case: str, rival: str, why: str, bar: float | None) -> dict[str, Any]:
    """`record` of a rival without a time."""
    timeless = dict.fromkeys(("ours_ms", "theirs_ms", "ratio", "verdict"))
    lists: dict[str, Any] = {"rounds": 0, "ours_all_ms": [], "theirs_all_ms": []}
    return {"case": case, "against": rival, **timeless, "bar": bar, **lists, "gpu": NOT_MEASURED, "why": why}


def verdict(ratio: float, bar: float | None) -> str | None:
    return None if bar is None else "ok" if ratio >= bar else "FALLS SHORT"
