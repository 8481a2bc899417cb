"""The launchers of the CUDA library that have several ways, and how to force one."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

# Rooms whose launchers have names of their own, linear_hopper_tensor, and the compute capabilities on which they are taken.
ROOMS = {"hopper": ((9, 0),)}


def listed() -> dict[str, int]:
    """name -> how many ways."""
    return {n: int(count) for n, count in (entry.split() for entry in torch.ops.rerank_kernels.launchers().split(", "))}


def named(op: str, mode: str) -> str:
    """The launcher that serves an op on every GPU."""
    return {"sum": "row_sum"}.get(op, op) + ("_tensor" if mode == "tensor" else "")


def fits(name: str, capability: tuple[int, int]) -> bool:
    """Whether a launcher is one that such a GPU takes."""
    return all(capability in where for room, where in ROOMS.items() if room in name.split("_"))


def of(op: str, mode: str, among: dict[str, int], capability: tuple[int, int]) -> dict[str, int]:
    """Those that may serve an op on such a GPU: the one of every GPU, and those of rooms for this one."""
    own = named(op, mode)
    stem = own.removesuffix("_tensor")
    rooms = "|".join(f"_{room}" for room in ROOMS)
    pattern = re.compile(f"{stem}({rooms})?{own[len(stem) :]}")
    return {name: count for name, count in among.items() if pattern.fullmatch(name) and fits(name, capability)}


@contextlib.contextmanager
def forced(launcher: str, way: int) -> Iterator[None]:
    """Inside, it takes this way for every call."""
    torch.ops.rerank_kernels.force_launch(launcher, way)
    try:
        yield
    finally:
        torch.ops.rerank_kernels.force_launch(launcher, -1)
