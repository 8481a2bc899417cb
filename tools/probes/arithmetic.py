"""Is every one of Hopper's matrix instructions one arithmetic: mma.sync, wgmma from shared memory and from registers, of 8 to
256 columns, with its operands exchanged?

Mode tensor's sums are defined by the arithmetic, so any of them may serve if they are. Sums of 16 products with and without a
sum before, and chains of 768, compared bit for bit with mma.sync's; every NaN counts as the same. Besides: what scale-d = 0
does to a zero's sign in place of registers that hold +0. And whether zero times a large number counts as large, since then a
step of hidden keys, whose weights are +0, would cut bits off a sum.

One line of JSON: how many sums were compared, how many differ, a row for each kind of operands and instruction that differs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import _cubin
import torch
from _wgmma import COLUMNS
from mma_and_wgmma import KINDS, operands
from torch import Tensor

SECONDS = 30
WIDE = 7680  # columns: a multiple of all that an instruction has
SIZES = ((16, 8192, False), (16, 8192, True), (768, 512, False))  # K, rows, whether there is a sum before
SHARED, REGISTERS, SCALE_D = 0, 1, 2
DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}


def sums(kernels: Any, name: str, a: Tensor, b: Tensor, c: Tensor | None, way: int = SHARED) -> Tensor:
    """a [rows, K] b [columns, K]^T + c, by the kernel of that name."""
    width = 8 if name.endswith("sync") else int(name.rpartition("_")[2])
    d = torch.full((len(a), len(b)), float("nan"), device=a.device)
    kernels[name]((len(b) // width, len(a) // 64), 128, a, b, c, d, a.shape[1], len(b), way)
    return d


def instructions(kernels: Any, half: str, a: Tensor, b: Tensor, c: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for n in COLUMNS:
        yield f"wgmma n{n}", sums(kernels, f"sums_{half}_{n}", a, b, c)
        yield f"wgmma n{n}, a in registers", sums(kernels, f"sums_{half}_{n}", a, b, c, REGISTERS)
    turned = None if c is None else c.t().contiguous()
    yield "wgmma n64, a and b exchanged", sums(kernels, f"sums_{half}_64", b, a, turned).t()
    if c is None:
        yield "wgmma n64, scale-d = 0", sums(kernels, f"sums_{half}_64", a, b, None, SCALE_D)


def differing(got: Tensor, want: Tensor) -> tuple[int, int, list[str] | None]:
    """How many differ, how many of these in the sign of a zero only, and the first that does in more."""
    differ = (got.contiguous().view(torch.int32) != want.view(torch.int32)) & ~(got.isnan() & want.isnan())
    zeros = differ & (got == 0) & (want == 0)
    first = (differ & ~zeros).nonzero()[:1].tolist()
    shown = [float(t[first[0][0], first[0][1]]).hex() for t in (got, want)] if first else None
    return int(differ.sum()), int(zeros.sum()), shown


def beside_zeros(kernels: Any, half: str, dtype: torch.dtype, rows: int = 512, zero: float = 0.0) -> dict[str, int]:
    """By instruction, how many small sums differ if every second product is zero times a large number, not zero times zero."""
    a, b = operands("normal", rows, 16, torch.float32, 4) * 2.0**-6, operands("normal", WIDE, 16, torch.float32, 5) * 2.0**-6
    c = operands("normal", rows, WIDE, torch.float32, 6) * 2.0**-12
    a[:, 1::2], b[:, 1::2] = zero, 0.0
    large = b.clone()
    large[:, 1::2] = 2.0**14
    found = {}
    for name, kernel in (("mma.sync", f"sums_{half}_sync"), ("wgmma n64", f"sums_{half}_64")):
        want, got = (sums(kernels, kernel, a.to(dtype), w.to(dtype), c) for w in (b, large))
        found[name] = differing(got, want)[0]
    return found


def main() -> None:
    kernels = _cubin.load("sums")
    until = float(os.environ.get("GPU_REPORT_UNTIL", "inf")) - 3.0
    compared, rows = 0, []
    by_instruction: dict[str, list[int]] = {}
    for dtype, half in DTYPES.items():
        for kind in KINDS:
            for k, height, before in SIZES:
                if time.time() > until:
                    break  # what was found must still be printed
                a, b = operands(kind, height, k, dtype, 1), operands(kind, WIDE, k, dtype, 2)
                c = operands(kind, height, WIDE, torch.float32, 3) if before else None
                want = sums(kernels, f"sums_{half}_sync", a, b, c)
                for name, got in instructions(kernels, half, a, b, c):
                    differ, zeros, shown = differing(got, want)
                    compared += got.numel()
                    tally = by_instruction.setdefault(name, [0, 0, 0])
                    for i, count in enumerate((got.numel(), differ, zeros)):
                        tally[i] += count
                    if differ:
                        rows.append([half, kind, k, before, name, got.numel(), differ, zeros, shown])
    zeros_beside = {half: beside_zeros(kernels, half, dtype) for dtype, half in DTYPES.items()}
    heads = ["dtype", "operands", "K", "a sum before", "instruction", "sums", "differ", "of these a zero's sign", "the first"]
    said = {"compared": compared, "differ": sum(r[6] for r in rows), "instructions": by_instruction}
    print(json.dumps({**said, "a zero beside a large factor counts in": zeros_beside, "heads": heads, "rows": rows}))


if __name__ == "__main__":
    with torch.no_grad():
        _cubin.says_why(main)
