"""The calls that together compile every kernel of backend triton, and the programs that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import rerank_kernels as rk
from rerank_kernels.backend.triton import attention, linear
from simulated import triton as simulated


def calls(arch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel of the backend in every tile, at the sizes of usual models: all in the first dtype that it has, in others
    what differs by more than conversions. Of the tiles of attention the first, which is the one taken, with a window too,
    and with a cap."""

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    for dtype, t in ((torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")):
        x, few, weight, bias = zeros(dtype, 256, 768), zeros(dtype, 2, 768), zeros(dtype, 1024, 768), zeros(dtype, 1024)
        full: dict[str, Any] = {"activation": "gelu", "residual": zeros(dtype, 256, 1024)}
        if dtype == torch.float32:
            yield t, partial(rk.normalize, x)
            yield t, partial(rk.softmax, x, -1)
            yield t, partial(rk.mean, x, -1)
            yield f"{t}, gelu", partial(rk.activation, x, "gelu")
            yield t, partial(rk.pool, x, "mean", cu_seqlens=offsets)
            yield t, partial(rk.sigmoid, x)
            yield t, partial(rk.rotary, x.view(256, 12, 64), x[:, :32], x[:, :32])
            for rows in (few, x):
                down = weight.t().contiguous()
                yield f"{t}, {len(rows)} rows, gate", partial(rk.sparse_ffn, rows, weight, down, gate_weight=weight)
        if dtype != torch.bfloat16:
            yield t, partial(rk.layer_norm, x, x[0], x[0], residual=x)
            yield f"{t}, rms", partial(rk.rms_norm, x, x[0], offset=1, residual=x)
            for way, small in enumerate(linear.TILES):
                if dtype == torch.float32 or small == linear.TILES[-1]:
                    call = partial(rk.linear, x, weight, bias, **full)
                    yield f"{t}, gelu, residual, tile {small[0]} x {small[1]}", _with(linear, way, call)
            for d in (64, 128) if dtype == torch.float32 else (64,):
                q = zeros(dtype, 256, 4, d)
                capped = ({"causal": True, "softcap": 50.0},) if d == 128 else ()
                for options in ({}, {"causal": True}, *capped):
                    call = partial(rk.attention, q, q, q, cu_seqlens=offsets, **options)
                    yield ", ".join([t, f"D = {d}", *options]), call
        if dtype == torch.float32:
            continue
        for way, tile in enumerate(linear.tensor_tiles(arch)):
            if dtype == torch.float16 or way == 3:
                call = partial(rk.linear, x, weight, bias, mode="tensor", **full)
                yield f"{t}, gelu, residual, tile {tile.rows} x {tile.columns}", _with(linear, way, call)
        for d in (64, 96, 128, 256) if dtype == torch.float16 else ():
            q = zeros(dtype, 256, 4, d)
            for way, part in enumerate(attention.tensor_tiles(d, arch)):
                spills = d == 256 and arch == 90  # with a window: the page says so
                windows: tuple[dict[str, Any], ...] = ({},) if way or d == 96 or spills else ({}, {"window": (30, 30)})
                if d == 128 and not way:
                    windows += ({"window": (30, 30), "softcap": 50.0},)
                for options in windows:
                    call = partial(rk.attention, q, q, q, cu_seqlens=offsets, mode="tensor", **options)
                    words = [t, f"D = {d}", *options, f"{part.rows} rows", f"{part.warps} warps"]
                    yield ", ".join(words), _with(attention, way, call)


def _with(module: Any, way: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> None:
        before, module.force = module.force, way
        try:
            call()
        finally:
            module.force = before

    return forced


def compiled(arch: int) -> dict[str, tuple[str, simulated.Compiled]]:
    """By PTX, so that what several calls share is there once: the call that came first, and the program."""
    found: dict[str, tuple[str, simulated.Compiled]] = {}
    for what, call in calls(arch):
        before = len(simulated.used)
        with simulated.simulated_triton(arch=arch, starts=False):
            call()
        for program in simulated.used[before:]:
            found.setdefault(program.ptx, (what, program))
    return found
