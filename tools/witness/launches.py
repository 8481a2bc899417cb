"""What the launchers ask for, from themselves: the library of tests/simulated, whose kernels here only note their launch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    mangled: str
    grid: tuple[int, int, int]
    block: int
    shared: int

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


@contextlib.contextmanager
def recording() -> Iterator[tuple[Any, list[Launch]]]:
    """Inside the block ops on CPU tensors are served by csrc/cuda's launchers, and launches are noted instead of run: outputs
    hold no numbers. Gives simulated.cuda and the growing list.
    """
    from rerank_kernels.backend.library import missing
    from simulated import cuda as simulated

    if reason := missing():  # it holds the ops' signatures
        raise RuntimeError(f"launches cannot be noted: {reason}")
    noted: list[Launch] = []

    def note(name: bytes, grid: Any, block: Any, shared: int, arguments: Any, memory: Any, count: int) -> int:
        noted.append(Launch(name.decode(), (grid[0], grid[1], grid[2]), block[0] * block[1] * block[2], shared))
        return 0

    callback, library = simulated._LAUNCH(note), ctypes.CDLL(str(simulated.library()))
    with simulated.simulated():
        library.ptxsim_connect(callback)
        try:
            yield simulated, noted
        finally:
            library.ptxsim_connect(simulated._callback)


@dataclass(frozen=True)
class Shape:
    """A call of a real model, and what it costs at least."""

    label: str
    call: Any
    flop: float
    bytes: float
    tensor: bool = False  # on tensor cores


@functools.cache
def shapes() -> list[Shape]:
    """bge-reranker-base with 2,048 tokens (4 pairs of 512), and ReLULLaMA-7B's FFN for one token."""
    import torch

    import rerank_kernels as rk

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    m, d, f, t = 2048, 768, 3072, 512
    x, wide = zeros(m, d), zeros(m, f)
    offsets = torch.arange(0, m + 1, t, dtype=torch.int32)
    heads = zeros(m, 12, 64)
    k, n = 4096, 11008
    half = torch.float16
    token, up, down = zeros(1, k, dtype=half), zeros(n, k, dtype=half), zeros(k, n, dtype=half)
    return [
        Shape(
            "linear 2048 x 768 x 3072, float32",
            lambda: rk.linear(x, zeros(f, d), zeros(f), activation="gelu"),
            2.0 * m * d * f,
            4.0 * (m * d + d * f + m * f),
        ),
        Shape(
            "linear 2048 x 3072 x 768, float32",
            lambda: rk.linear(wide, zeros(d, f), zeros(d), residual=x),
            2.0 * m * d * f,
            4.0 * (m * f + d * f + 2 * m * d),
        ),
        Shape(
            "linear 2048 x 768 x 3072, float16, mode tensor",
            lambda: rk.linear(x.half(), zeros(f, d, dtype=half), activation="gelu", mode="tensor"),
            2.0 * m * d * f,
            2.0 * (m * d + d * f + m * f),
            tensor=True,
        ),
        Shape("linear 1 x 768 x 768, float32", lambda: rk.linear(x[:1], zeros(d, d), zeros(d)), 2.0 * d * d, 4.0 * d * d),
        Shape(
            "attention 4 x 512 tokens, 12 heads x 64, float32",
            lambda: rk.attention(heads, heads, heads, cu_seqlens=offsets),
            4.0 * m * t * d,
            4.0 * 4 * m * d,
        ),
        Shape(
            "layer_norm 2048 x 768 + residual, float32",
            lambda: rk.layer_norm(x, zeros(d), zeros(d), residual=x),
            8.0 * m * d,
            4.0 * 3 * m * d,
        ),
        Shape(
            "sparse_ffn 4096 x 11008 gated, 1 token, 10 % active, float16",
            lambda: rk.sparse_ffn(token, up, down, gate_weight=up),
            2.0 * 1.2 * k * n,
            2.0 * 1.2 * k * n,
        ),
    ]


def other_calls() -> Iterator[Any]:
    """Calls that together reach every kernel there is, with every way of every launcher forced."""
    import torch

    import cases
    import rerank_kernels as rk

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    for a in cases.DTYPES:
        x, heads = zeros(a, 256, 768), zeros(a, 256, 12, 64)
        yield lambda x=x: rk.activation(x, "gelu")
        yield lambda x=x: rk.pool(x, "mean", cu_seqlens=offsets)
        yield lambda x=x: rk.score_head(x, x[:1], x[0, :1])
        yield lambda q=heads: rk.attention(q, q, q, cu_seqlens=offsets)
        yield lambda q=heads: rk.rotary(q, q[:, 0, :32], q[:, 0, :32])
        for d in (32, 64, 96, 128, 192, 256) if a != torch.float32 else ():
            q = zeros(a, 256, 4, d)
            yield lambda q=q: rk.attention(q, q, q, cu_seqlens=offsets, mode="tensor")
        for rows, d in ((256, 768), (64, 2048), (3, 30000), (3, 65536), (3, 65537)):
            x = zeros(a, rows, d)
            yield lambda x=x: rk.layer_norm(x, x[0], x[0], residual=x)
            yield lambda x=x: rk.rms_norm(x, x[0], residual=x)
            yield lambda x=x: rk.normalize(x)
            yield lambda x=x: rk.softmax(x, -1)
            yield lambda x=x: rk.sum(x, -1)
        for b in cases.DTYPES:
            for k, f, d in ((768, 1024, 768), (33, 65, 31)):
                x, up, down = zeros(a, 2, k), zeros(b, f, k), zeros(b, d, f)
                yield lambda x=x, up=up: rk.linear(x, up)
                yield lambda x=x, up=up, down=down: rk.sparse_ffn(x, up, down)
                yield lambda x=x, up=up, down=down: rk.sparse_ffn(x, up, down, gate_weight=up)
                if a == b != torch.float32:
                    yield lambda x=x, up=up: rk.linear(x, up, mode="tensor")


def launches() -> tuple[list[list[Launch]], dict[str, Launch]]:
    """Of each of `shapes`; and one of every kernel: a real shape's if there is one, else another call's, at best unforced."""
    with recording() as (simulated, noted):

        def of(call: Any) -> list[Launch]:
            before = len(noted)
            call()
            return noted[before:]

        real = [of(shape.call) for shape in shapes()]
        one = {launch.mangled: launch for each in real for launch in each}
        calls = list(other_calls())
        forced = [(None, 0), *((kernel, way) for kernel, count in simulated.launchers().items() for way in range(count))]
        for kernel, way in forced:
            with simulated.forced(kernel, way) if kernel else contextlib.nullcontext():
                for launch in (launch for call in calls for launch in of(call)):
                    one.setdefault(launch.mangled, launch)
        with simulated.simulated(gpu=simulated.HOPPER):
            for kernel, way in ((k, w) for k, w in forced if k and "_hopper_" in k):
                with simulated.forced(kernel, way):
                    for launch in (launch for call in calls for launch in of(call)):
                        one.setdefault(launch.mangled, launch)
    return real, one
