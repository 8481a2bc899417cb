"""`python bench/run.py --scaling`: pairs per second over batch and over length, and pairs whose bits depend on the batch.

Whole rerankers with random weights: all-MiniLM-L6's shape in float32 with 1 and 2 threads on a CPU, bge-reranker-base's in
float16 and float32 on a GPU. Contestants take turns, as everywhere; of what takes many seconds the first time has to do.
The bits: each pair's logit from batches of n against the same pair's alone, same model, same process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

import rerank_kernels as rk
from bench.cases import shapes
from bench.cases.models import BASE, MINILM, Model, on, patched_model, stock_model
from bench.cases.ops import Place
from bench.harness.turns import Contestant, Pace, Work, play

BATCHES, LENGTHS, AT_LENGTH = (1, 4, 16, 64, 256), (16, 64, 128, 256, 512), 16
BITS = (1, 2, 3, 4, 8, 16, 32, 64)
PACE = Pace(budget=0.0, at_least=5, long=5.0, enough=10.0)


def measure(kind: str, console: Console, *, quick: bool = False) -> dict[str, Any]:
    place = Place(torch.device(kind))
    name, dtypes = (MINILM, ("fp32",)) if kind == "cpu" else (BASE, ("fp16", "fp32"))
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
                    line = [{**here, **point} for point in _point(place, name, dtype, of)]
                    found["points"] += line
                    words = ", ".join(f"{p['way']} {p['pairs_per_s']:.3g}" for p in line)
                    console.print(f"{name}, {dtype}, {threads} threads, {axis} {x}: {words} pairs/s", highlight=False)
            for bits in _bits(place, name, dtype, 16 if quick else 64):
                found["bits"].append(bits)
                console.print(f"{dtype}, batches of {bits['batch']}: {bits['way']}: {bits['differ']} of {bits['pairs']} differ")
    return found


def _first_ways(place: Place, dtype: str) -> list[tuple[str, str]]:
    """Every mode of the default backend."""
    ways = place.ways(dtype)
    return [way for way in ways if way[0] == ways[0][0]]


def _point(place: Place, name: str, dtype: str, lengths: Sequence[int]) -> list[dict[str, Any]]:
    model = Model(place, name, lengths, dtype)
    stock, kept = stock_model(*model.key), _first_ways(place, dtype)
    runs: dict[str, Callable[[int], object]] = {"stock, padded": lambda i: stock(**model.batch).logits}
    for words, of in (("sorted in 8s", 8), ("one by one", 1)):
        if len(lengths) > of and (len(set(lengths)) > 1 or of == 1):
            each = [on(place, batch) for batch in shapes.batches(model.shape, model.rows, of)]
            runs[f"stock, {words}"] = lambda i, each=each: [stock(**batch).logits for batch in each]  # type: ignore[misc]
    contestants = [Contestant(way, run, graph=False) for way, run in runs.items()]
    contestants += [c for c in model.contest().contestants if c.ours and tuple(c.name.split(" ")) in kept]
    cells = play(Work(contestants), PACE, gates=False)
    for way, cell in cells.items():
        if "ms" not in cell:  # a mode that is not there
            print(f"{way}: {cell['error']}")
    seconds = {way: cell["ms"] / 1e3 for way, cell in cells.items() if "ms" in cell}
    return [{"way": way, "seconds": s, "pairs_per_s": len(lengths) / s} for way, s in seconds.items()]


def _bits(place: Place, name: str, dtype: str, pairs: int) -> Iterator[dict[str, Any]]:
    model = Model(place, name, shapes.lengths(pairs), dtype)
    for way in ("stock", *_first_ways(place, dtype)):
        try:
            one = stock_model(*model.key) if way == "stock" else patched_model(*model.key, way[1])
        except Exception as error:  # a mode that is not there
            print(f"{way}: {error}")
            continue
        with rk.use(way[0]) if way != "stock" else torch.no_grad():
            run = lambda batch, one=one: one(**on(place, batch)).logits  # noqa: E731
            alone = shapes.in_batches(model.shape, model.rows, 1, run)
            for batch in (n for n in BITS if n <= pairs):
                differ, furthest = shapes.differ(shapes.in_batches(model.shape, model.rows, batch, run), alone)
                of = {"dtype": dtype, "batch": batch, "pairs": pairs, "differ": differ, "furthest": furthest}
                yield {"way": way if way == "stock" else " ".join(way), **of}
