"""Whole models with random weights beside the same models in stock PyTorch: eager attention, SDPA, torch.compile.

Cases, contestants and clock are bench's. Here a pair's logit alone must have the bits that it has in the batch; the distance
from float64 is for `make bench`, which has the time.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch

import invariants
from bench.cases import models, ops, shapes
from bench.harness import gpu
from bench.harness.turns import Contestant, DeviceLost, Pace, Work, play
from tools.gpu_report.work.cases import cases, say
from tools.gpu_report.work.ways import begun, flat

PACE = Pace(0.25, 5, 0.5)
BATCHES = {"32x128": (128,) * 32, "mixed": shapes.MIXED_LENGTHS, "32x512": (512,) * 32, "8x128": (128,) * 8, "1x128": (128,)}
BASE, LARGE = shapes.BASE, shapes.LARGE
Case = tuple[str, Sequence[int], str, str]  # model, lengths, dtype, torch.compile's mode, if it is beside that


def table() -> dict[str, Case]:
    """What matters most first; torch.compile takes its time."""
    found: dict[str, Case] = {}

    def add(model: str, batches: Sequence[str], dtype: str, compiled: str = "") -> None:
        for batch in batches:
            name = f"{models.SHORT[model]} {batch} {dtype}{', compiled: ' if compiled else ''}{compiled}"
            found[name] = (model, BATCHES[batch], dtype, compiled)

    add(BASE, ("32x128", "mixed", "1x128"), "fp16")
    add(BASE, ("32x512", "8x128"), "fp16")
    add(LARGE, ("32x128", "mixed", "1x128"), "fp16")
    add(BASE, ("32x128", "mixed"), "fp32")
    add(BASE, ("32x128", "mixed"), "bf16")
    add(LARGE, ("32x512", "8x128"), "fp16")
    add(BASE, ("32x512", "1x128"), "fp32")
    add(LARGE, ("32x128",), "bf16")
    add(LARGE, ("32x128",), "fp32")
    add(BASE, ("1x128", "32x128", "mixed"), "fp16", "reduce-overhead")
    add(LARGE, ("32x128",), "fp16", "reduce-overhead")
    add(BASE, ("32x512", "8x128"), "fp16", "reduce-overhead")
    add(BASE, ("32x128", "1x128"), "fp16", "max-autotune")
    add(LARGE, ("mixed", "1x128"), "fp16", "reduce-overhead")
    add(BASE, ("32x128", "1x128"), "fp16", "default")
    add(LARGE, ("32x512", "8x128"), "fp16", "reduce-overhead")
    return found


def listed(*only: str) -> dict[str, Case]:
    """Without a word: what needs no compiler of torch's. `compiled`: the rest."""
    return {n: case for n, case in table().items() if (only or not case[3]) and all(word in n for word in only)}


def main(*only: str) -> None:
    place = gpu.place("cuda", False)
    chosen = listed(*only)
    with torch.no_grad():
        for name in cases(list(chosen)):
            work = work_of(place, *chosen[name])
            try:
                found = play(work, PACE, begins=begun)
            except DeviceLost as error:
                sys.exit(f"the device's context is gone: {error}")
            for who, result in found.items():
                say(case=name, **flat(who, result, work))


def work_of(place: ops.Place, name: str, lengths: Sequence[int], dtype: str, compiled: str) -> Work:
    model = models.Model(place, shapes.RERANKERS[name], lengths, dtype)
    work = model.contest(compiled=compiled or None)
    return dataclasses.replace(work, contestants=[with_bits(c, model) if c.ours else c for c in work.contestants])


def with_bits(one: Contestant, model: models.Model) -> Contestant:
    mode = one.name.split(" ")[1]

    def gate() -> None:
        full = one.call(0)
        for i in sorted({0, len(model.rows) - 1}):
            alone = model.ours(mode)(**model.padded([model.rows[i]])).logits[0]
            invariants.same(alone, full[i], f"{one.name}, pair {i} alone against in the batch")  # type: ignore[index]

    return dataclasses.replace(one, gate=gate)
