"""`python bench/run.py --scaling`: pairs per second over batch and over length, and pairs whose bits depend on the batch.

Whole rerankers with random weights: all-MiniLM-L6's shape in float32 with 1 and 2 threads on a CPU, bge-reranker-base's in
float16 and float32 on a GPU. Contestants take turns, as everywhere; of what takes many seconds the first time has to do.
The bits: each pair's logit from batches of n against the same pair's alone, same model, same process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

import rerank_kernels as rk
from bench.cases import shapes
from bench.cases.models import EQUAL, PADDED, SINGLE, SORTED, Model, stock_model
from bench.cases.ops import Place
from bench.harness.turns import Pace, play

BATCHES, LENGTHS, AT_LENGTH = (1, 4, 16, 64, 256), (16, 64, 128, 256, 512), 16
BITS = (1, 2, 3, 4, 8, 16, 32, 64)
PACE = Pace(budget=0.0, at_least=5, long=5.0, enough=10.0)


def measure(kind: str, console: Console, *, quick: bool = False) -> dict[str, Any]:
    place = Place(torch.device(kind))
    name, dtypes = (shapes.MINILM, ("fp32",)) if kind == "cpu" else (shapes.BASE, ("fp16", "fp32"))
    batches, lengths = (BATCHES[:3], LENGTHS[:3]) if quick else (BATCHES, LENGTHS)
    found: dict[str, Any] = {"model": name, "points": [], "bits": []}
    points = [("batch", n, shapes.lengths(n)) for n in batches]
    points += [("length", n, (n,) * (4 if quick else AT_LENGTH)) for n in lengths]
    with torch.no_grad():
        for dtype in dtypes:
            for threads in (1, 2) if kind == "cpu" else (torch.get_num_threads(),):
                torch.set_num_threads(threads)
                for axis, x, of in points:
                    here = {"axis": axis, "x": x, "threads": threads, "dtype": dtype}
                    line = [{**here, **point} for point in _point(Model(place, shapes.RERANKERS[name], of, dtype))]
                    found["points"] += line
                    words = ", ".join(f"{p['way']} {p['pairs_per_s']:.3g}" for p in line)
                    console.print(f"{name}, {dtype}, {threads} threads, {axis} {x}: {words} pairs/s", highlight=False)
            of = shapes.lengths(16 if quick else 64)
            for bits in _bits(Model(place, shapes.RERANKERS[name], of, dtype)):
                found["bits"].append({"dtype": dtype, **bits})
                console.print(f"{dtype}, batches of {bits['batch']}: {bits['way']}: {bits['differ']} of {bits['pairs']} differ")
    return found


def _ways(model: Model) -> list[tuple[str, str]]:
    """Every mode of the default backend."""
    ways = model.place.ways(model.dtype)
    return [way for way in ways if way[0] == ways[0][0]]


def _point(model: Model) -> Iterator[dict[str, Any]]:
    kept = {PADDED, SORTED, SINGLE, EQUAL, *map(" ".join, _ways(model))}
    work = model.contest(one_by_one=True)
    cells = play(replace(work, contestants=[c for c in work.contestants if c.name in kept]), PACE, gates=False)
    for way, cell in cells.items():
        if "ms" in cell:
            s = cell["ms"] / 1e3
            yield {"way": PADDED if way == EQUAL else way, "seconds": s, "pairs_per_s": len(model.rows) / s}
        else:  # a mode that is not there
            print(f"{way}: {cell.get('error') or cell['why']}")


def _bits(model: Model) -> Iterator[dict[str, Any]]:
    pairs = len(model.rows)
    for way in (("stock",), *_ways(model)):
        try:
            one = stock_model(*model.key) if way == ("stock",) else model.ours(way[1])
        except Exception as error:  # a mode that is not there
            print(f"{' '.join(way)}: {error}")
            continue
        with rk.use(way[0]) if way != ("stock",) else torch.no_grad():
            run = lambda batch, one=one: one(**model.place.on(batch)).logits  # noqa: E731
            alone = shapes.in_batches(model.shape, model.rows, 1, run)
            for batch in (n for n in BITS if n <= pairs):
                differ, furthest = shapes.differ(shapes.in_batches(model.shape, model.rows, batch, run), alone)
                yield {"way": " ".join(way), "batch": batch, "pairs": pairs, "differ": differ, "furthest": furthest}
