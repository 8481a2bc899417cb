"""What each CPU kernel reaches of what the machine can do: FLOPs, bytes, the limit that follows, and the time taken.

The machine's own figures come from bench/limits.cpp, compiled here: fused multiply-adds a second, and bytes a second out of the
last-level cache and out of memory, with the threads of the run. A kernel's work is counted, not measured:

- fmas: operations for the multiplier (a fused multiply-add, a multiplication), a register of which counts as one. Products need
  one a term; for the element functions the count is numerics.h's, divisions left out.
- bytes: each tensor once, in or out. They come from memory where all of them are more than the last-level cache is asked to
  hold (16 MiB), and from that cache otherwise.

The limit is the longer of the two times; `reached` is limit / time.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from clock import Missing, calls, interleave

import rerank_kernels as rk

SOURCE = pathlib.Path(__file__).parent / "limits.cpp"
CACHED = 16 * 2**20  # bytes
GELU, EXP = 29, 11  # multiplications and fused multiply-adds of an element in numerics.h
Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    name: str
    fmas: float
    bytes: float
    call: Call


def machine(threads: int) -> dict[str, float]:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise Missing("there is no C++ compiler on PATH to build bench/limits.cpp with")
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "limits"
        flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
        built = subprocess.run([compiler, *flags, SOURCE, "-o", program], capture_output=True, text=True)
        if built.returncode:
            raise Missing(f"bench/limits.cpp does not compile: {built.stderr[-1000:]}")
        return json.loads(subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout)


def linear(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> Work:
    x, w = torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype)
    name = f"linear {m}x{k}x{n}" + ("" if dtype == torch.float32 else f" {str(dtype)[6:]}")
    return Work(name, m * k * n, x.element_size() * (m * k + n * k + m * n), lambda: rk.linear(x, w))


def attention(b: int, t: int, heads: int = 12, d: int = 64) -> Work:
    q, k, v = (torch.randn(b * t, heads, d) for _ in range(3))
    cu = torch.arange(0, b * t + 1, t, dtype=torch.int32)
    scores = b * heads * t * t
    work = scores * (2 * d + EXP + 1)
    return Work(f"attention {b}x{t}, {heads} heads of {d}", work, 16 * q.numel(), lambda: rk.attention(q, k, v, cu_seqlens=cu))


def elementwise() -> Iterator[Work]:
    for m in (128, 2048):
        x = torch.randn(m, 3072)
        yield Work(f"gelu {m}x3072", GELU * x.numel(), 8 * x.numel(), lambda x=x: rk.activation(x, "gelu"))
    for m, d in ((12288, 128), (6144, 512)):
        x = torch.randn(m, d)
        yield Work(f"softmax {m}x{d}", (EXP + 1) * x.numel(), 8 * x.numel(), lambda x=x: rk.softmax(x, -1))
    for m in (128, 2048):
        x, r, w, b = torch.randn(m, 768), torch.randn(m, 768), torch.randn(768), torch.randn(768)
        call = functools.partial(rk.layer_norm, x, w, b, 1e-5, residual=r)
        yield Work(f"layer_norm + residual {m}x768", 3 * x.numel(), 12 * x.numel(), call)


def sparse_ffn(active: float, k: int = 4096, f: int = 11008) -> Work:
    """Bytes: the coarse copy whole, and of the float32 weights, up and down, the active neurons' share."""
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(*s, generator=generator) * 0.02 for s in ((1, k), (f, k), (k, f)))
    n = round(active * f)
    bias = torch.full((f,), -float((x @ up.t()).flatten().topk(n).values[-1]) + 1e-7)
    size = f * k + 8 * n * k
    call = functools.partial(rk.sparse_ffn, x, up, down, up_bias=bias)
    return Work(f"sparse_ffn ReLU 1x{k}x{f}, {active:.0%} active", f * k + 2 * n * k, size, call)


def works() -> Iterator[Work]:
    for k, n in ((768, 768), (768, 3072), (3072, 768), (1024, 4096)):
        for m in (2048, 128, 1):
            yield linear(m, k, n)
    yield linear(2048, 768, 3072, torch.bfloat16)
    for b, t in ((16, 128), (4, 512)):
        yield attention(b, t)
    yield from elementwise()
    for active in (0.02, 0.1):
        yield sparse_ffn(active)


def measure(budget: float = 1.0) -> list[dict[str, Any]]:
    """One record a kernel; the first is the machine's."""
    threads = torch.get_num_threads()
    top = machine(threads)
    records: list[dict[str, Any]] = [{"threads": threads, **top}]
    for work in works():
        (times,) = interleave([functools.partial(calls, work.call)], budget, 5)
        seconds = statistics.median(times)
        reading = top["memory_gbs" if work.bytes > CACHED else "cache_gbs"] * 1e9
        arithmetic, memory = 2.0 * work.fmas / (top["gflops"] * 1e9), work.bytes / reading
        limit = max(arithmetic, memory)
        records.append(
            {
                "case": work.name,
                "fmas": work.fmas,
                "bytes": work.bytes,
                "limit_ms": limit * 1e3,
                "limited_by": "arithmetic" if arithmetic >= memory else "memory" if work.bytes > CACHED else "cache",
                "ms": seconds * 1e3,
                "reached": limit / seconds,
            }
        )
    return records
