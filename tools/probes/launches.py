"""How much of a forward is the host's launching, and how much the kernels' own time: what would CUDA graphs gain?

Of bge-reranker-base, float16, in mode tensor: milliseconds of a forward from Python without graphs, the sum of its kernels'
times, how many it starts, and how long the longest of them take together.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType

SECONDS = 30
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))


def main() -> None:
    import rerank_kernels as rk
    from bench.cases import shapes

    shape = shapes.RERANKERS["BAAI/bge-reranker-base"]
    with torch.device("cuda"):
        model = shapes.reranker(shape).half()
    rk.patch(model, mode="tensor", graphs=False)
    rows = []
    for name, lengths in (("1x128", (128,)), ("8x128", (128,) * 8), ("32x128", (128,) * 32), ("mixed", shapes.MIXED_LENGTHS)):
        batch = {n: t.cuda() for n, t in shapes.padded(shape, shapes.tokens(shape, tuple(lengths))).items()}
        for _ in range(3):
            model(**batch)
        torch.cuda.synchronize()
        times = []
        for _ in range(11):
            start = time.perf_counter()
            model(**batch)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(**batch)
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
        spent: Counter[str] = Counter()
        for e in kernels:
            spent[e.name.split("(")[0][:60]] += e.time_range.elapsed_us()
        longest = {kernel: round(us / 1e3, 4) for kernel, us in spent.most_common(6)}
        rows.append([name, round(sorted(times)[5] * 1e3, 4), round(sum(spent.values()) / 1e3, 4), len(kernels), longest])
    print(json.dumps({"heads": ["batch", "ms", "ms of kernels", "kernels", "the longest, ms"], "rows": rows}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
