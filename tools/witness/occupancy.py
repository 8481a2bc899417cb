"""How many blocks a multiprocessor holds at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor, by compute capability; CUDA C++ Programming Guide, "Technical Specifications"."""

    warps: int
    blocks: int
    shared: int  # KB for all its blocks; every block takes 1 KB more than it asks for
    lanes: int  # float32 fma per clock


LIMITS = {
    "80": Limits(64, 32, 164, 64),
    "86": Limits(48, 16, 100, 128),
    "89": Limits(48, 24, 100, 128),
    "90": Limits(64, 32, 228, 128),
    "100": Limits(64, 32, 228, 128),
    "120": Limits(48, 24, 100, 128),
}
REGISTERS = 64 * 1024


def blocks_per_sm(arch: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds at once. Registers are dealt 256 at a time to a warp and warps in fours, shared
    memory 128 bytes at a time; cuda_occupancy.h in the toolkit says the same.
    """
    limit = LIMITS[arch]
    warps = math.ceil(threads / 32)
    by_registers = REGISTERS // (math.ceil(max(registers, 1) * 32 / 256) * 256) // 4 * 4 // warps
    by_shared = limit.shared * 1024 // (math.ceil((shared + 1024) / 128) * 128)
    return min(limit.blocks, limit.warps // warps, by_registers, by_shared)
