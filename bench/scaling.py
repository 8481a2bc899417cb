"""`python bench/run.py --scaling`: pairs per second over batch and over length, and pairs whose bits hang on the batch.

Whole rerankers with random weights: all-MiniLM-L6's shape in float32 with 1 and 2 threads on a CPU, bge-reranker-base's in
float16 and float32 on a GPU. Contestants take turns, as everywhere; what takes seconds is timed once, without a warm-up.
The bits: each pair's logit from batches of n against the same pair's alone, same model, same process.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import device
import shapes
import torch
from rich.console import Console
from torch import Tensor

import rerank_kernels as rk

MINILM = "cross-encoder/ms-marco-MiniLM-L6-v2"
BATCHES, LENGTHS, AT_LENGTH = (1, 4, 16, 64, 256), (16, 64, 128, 256, 512), 16
BITS = (1, 2, 3, 4, 8, 16, 32, 64)
ONCE = 3.0  # seconds from which one time has to do
Run = Callable[[], Any]
Logits = Callable[[dict[str, Tensor]], Tensor]


def lengths(count: int) -> tuple[int, ...]:
    """The first `count` of the mixed lengths, which repeat after 32."""
    return tuple(device.MIXED[i % len(device.MIXED)] for i in range(count))


def measure(kind: str, console: Console, *, quick: bool = False, shape: str | None = None) -> dict[str, Any]:
    place = device.Place(torch.device(kind))
    name = shape or (MINILM if kind == "cpu" else device.BASE)
    dtypes = ("fp32",) if kind == "cpu" else ("fp16", "fp32")
    batches, lengths_ = (BATCHES[:3], LENGTHS[:3]) if quick else (BATCHES, LENGTHS)
    found: dict[str, Any] = {"model": name, "points": [], "bits": []}
    with torch.no_grad():
        for dtype in dtypes:
            for threads in (1, 2) if kind == "cpu" else (torch.get_num_threads(),):
                torch.set_num_threads(threads)
                points = [("batch", n, lengths(n)) for n in batches]
                points += [("length", n, (n,) * (4 if quick else AT_LENGTH)) for n in lengths_]
                for axis, x, of in points:
                    for point in _point(place, name, dtype, of):
                        found["points"].append({"axis": axis, "x": x, "threads": threads, "dtype": dtype, **point})
                    words = ", ".join(
                        f"{p['way']} {p['pairs_per_s']:.3g}" for p in found["points"] if _at(p, axis, x, threads, dtype)
                    )
                    console.print(f"{name}, {dtype}, {threads} threads, {axis} {x}: {words} pairs/s", highlight=False)
            for line in _bits(place, name, dtype, 16 if quick else 64):
                found["bits"].append(line)
                console.print(f"{dtype}, batches of {line['batch']}: {line['way']}: {line['differ']} of {line['pairs']} differ")
    return found


def _at(point: dict[str, Any], *place: Any) -> bool:
    return (point["axis"], point["x"], point["threads"], point["dtype"]) == place


def _ways(place: device.Place, name: str, dtype: str) -> Iterator[tuple[str, Logits]]:
    """What gives logits: stock, and ours in every mode of the default backend."""
    stock = device.stock_model(name, dtype, place.device)
    yield "stock", lambda batch: stock(**batch).logits
    first = device.WAYS[place.device.type][0][0]
    for backend, mode in place.ways(dtype):
        if backend == first:
            try:
                model = device.patched_model(name, dtype, place.device, mode)
            except Exception as error:  # a mode that is not there
                print(f"{backend} {mode}: {error}")
                continue
            yield f"{backend} {mode}", functools.partial(_served, backend, model)


def _served(backend: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    with rk.use(backend):
        return model(**batch).logits


def _point(place: device.Place, name: str, dtype: str, lengths_: Sequence[int]) -> list[dict[str, Any]]:
    shape = shapes.RERANKERS[name]
    rows = shapes.tokens(shape, tuple(lengths_))
    whole = device.on(place, shapes.padded(shape, rows))
    runs: dict[str, Run] = {}
    for way, logits in _ways(place, name, dtype):
        if way == "stock":
            runs["stock, padded"] = functools.partial(logits, whole)
            mixed = len({*map(len, rows)}) > 1
            for words, of in (("sorted in 8s", 8), ("one by one", 1)):
                if len(rows) > of and (mixed or of == 1):
                    each = [device.on(place, batch) for batch in shapes.batches(shape, rows, of)]
                    runs[f"stock, {words}"] = functools.partial(_each, logits, each)
        else:
            runs[way] = functools.partial(logits, whole)
    first = {way: _seconds(run, place) for way, run in runs.items()}
    times = {way: [t] if t > ONCE else [_seconds(runs[way], place)] for way, t in first.items()}
    if max(first.values()) <= ONCE:
        for _ in range(4):
            for way, run in runs.items():
                times[way].append(_seconds(run, place))
    seconds = {way: statistics.median(t) for way, t in times.items()}
    return [{"way": way, "seconds": s, "pairs_per_s": len(rows) / s} for way, s in seconds.items()]


def _each(logits: Logits, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    return [logits(batch) for batch in batches]


def _seconds(run: Run, place: device.Place) -> float:
    start = time.perf_counter()
    run()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _bits(place: device.Place, name: str, dtype: str, pairs: int) -> Iterator[dict[str, Any]]:
    shape = shapes.RERANKERS[name]
    rows = shapes.tokens(shape, lengths(pairs))
    for way, logits in _ways(place, name, dtype):
        alone = _in_batches(place, shape, rows, logits, 1)
        for batch in (n for n in BITS if n <= pairs):
            got = _in_batches(place, shape, rows, logits, batch)
            differ = int((got.view(torch.int32) != alone.view(torch.int32)).any(1).sum())
            furthest = float((got - alone).abs().max())
            yield {"way": way, "dtype": dtype, "batch": batch, "pairs": pairs, "differ": differ, "furthest": furthest}


def _in_batches(place: device.Place, shape: shapes.Shape, rows: list[Tensor], logits: Logits, of: int) -> Tensor:
    batches = [device.on(place, shapes.padded(shape, rows[i : i + of])) for i in range(0, len(rows), of)]
    return torch.cat([logits(batch).float().cpu() for batch in batches])
