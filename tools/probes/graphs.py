"""What do CUDA graphs gain: a call without one, a call that is replayed, and the sum of the kernels' times of both?

Of bge-reranker-base, float16, in mode tensor, in milliseconds; whether the bits are equal; and what graphs cost: the time of a
capture, and the memory that it takes. A replay fills the batch up to its bucket, so its kernels may take longer.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

SECONDS = 40
DEVICE = "cuda"
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
LENGTHS = {"1x16": (16,), "1x128": (128,), "8x128": (128,) * 8, "32x128": (128,) * 32, "1x512": (512,), "16x512": (512,) * 16}


def milliseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(15):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(sorted(times)[7] * 1e3, 4)


def kernels(call: Callable[[], Any]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    spent = [e.time_range.elapsed_us() for e in profile.events() if e.device_type == DeviceType.CUDA]
    return round(sum(spent) / 1e3, 4)


def main() -> None:
    import rerank_kernels as rk
    from bench.cases import shapes

    shape = shapes.RERANKERS["BAAI/bge-reranker-base"]
    with torch.device(DEVICE):
        eager = shapes.reranker(shape).half()
    graphed = copy.deepcopy(eager)
    rk.patch(eager, mode="tensor", graphs=False)
    report = rk.patch(graphed, mode="tensor")
    rows: list[list[Any]] = []
    for name, lengths in (*LENGTHS.items(), ("mixed", tuple(shapes.MIXED_LENGTHS))):
        batch = {n: t.to(DEVICE) for n, t in shapes.padded(shape, shapes.tokens(shape, tuple(lengths))).items()}
        eager(**batch)
        if not rows:
            graphed(**batch)  # the first call of a model captures nothing
        torch.cuda.synchronize()
        before, start = torch.cuda.memory_reserved(), time.perf_counter()
        graphed(**batch)  # captures, where its bucket is new; the first of all the largest bucket too
        torch.cuda.synchronize()
        capture, memory = time.perf_counter() - start, torch.cuda.memory_reserved() - before
        both = [m(**batch).logits for m in (eager, graphed)]
        equal = bool(torch.equal(*(t.view(torch.int32) for t in both)))
        times = [f(lambda m=m, batch=batch: m(**batch)) for f in (milliseconds, kernels) for m in (eager, graphed)]
        rows.append([name, equal, *times, round(capture * 1e3, 1), memory >> 20])
    heads = [
        "batch",
        "equal bits",
        "ms without",
        "ms with",
        "ms of kernels without",
        "with",
        "ms of captures",
        "MiB of captures",
    ]
    print(json.dumps({"heads": heads, "rows": rows, "graphs": report.graphs()}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
