"""What each CPU kernel reaches of what the machine can do: FLOPs, bytes, the limit that follows, and the time taken.

The machine's own figures come from limits.cpp, compiled here: fused multiply-adds per second, and bytes per second out of the
last-level cache and out of memory, with the threads of the run. A kernel's work is counted, not measured (cases/ops.py):

- fmas: operations for the multiplier (a fused multiply-add, a multiplication), a register of which counts as one. Products need
  one a term; for the element functions the count is numerics.h's, divisions left out.
- bytes: each tensor once, in or out. They come from memory where all of them are more than the last-level cache is asked to
  hold (16 MiB), and from that cache otherwise.

The limit is the longer of the two times; `reached` is limit / time.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from bench.cases import ops
from bench.harness.turns import Missing, Pace, Work, play

SOURCE = pathlib.Path(__file__).parent / "limits.cpp"
CACHED = 16 * 2**20  # bytes
MEASURED = re.compile(
    r"linear (2048|128|1)x(768x768|768x3072|3072x768|1024x4096)|linear 2048x768x3072 bfloat16"
    r"|attention (16x128|4x512), 12 .*|activation gelu \d+x3072|softmax (12288x128|6144x512)"
    r"|layer_norm \+ residual \d+x768|sparse_ffn ReLU 1x.*, (2|10)% active"
)


def machine(threads: int) -> dict[str, float]:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Missing(f"there is no C++ compiler on PATH to build {SOURCE.name} with")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread", "-o", f"{folder}/limits"]
        built = subprocess.run([compiler, *flags, SOURCE], capture_output=True, text=True)
        if built.returncode:
            raise Missing(f"{SOURCE.name} does not compile: {built.stderr[-1000:]}")
        return json.loads(subprocess.check_output([f"{folder}/limits", str(threads)]))


def measure(budget: float = 1.0) -> list[dict[str, Any]]:
    """One record a kernel; the first is the machine's."""
    threads = torch.get_num_threads()
    top = machine(threads)
    records: list[dict[str, Any]] = [{"threads": threads, **top}]
    for name, build in ops.on_a_cpu():
        if MEASURED.fullmatch(name):
            work = build(ops.Place())
            (cell,) = play(Work([work.ours]), Pace(budget, 5, 10.0), gates=False).values()
            records.append({"case": name, **reached(work, cell["ms"], top)})
    return records


def reached(work: Work, ms: float, top: Mapping[str, float]) -> dict[str, Any]:
    memory = "memory" if work.bytes > CACHED else "cache"
    limits = {"arithmetic": 2e-6 * work.fmas / top["gflops"], memory: 1e-6 * work.bytes / top[f"{memory}_gbs"]}
    by = max(limits, key=lambda name: limits[name])
    found = {"limit_ms": limits[by], "limited_by": by, "ms": ms, "reached": limits[by] / ms}
    return {"fmas": work.fmas, "bytes": work.bytes, **found}
