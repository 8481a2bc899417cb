"""How far is this chip's exp2 instruction (ex2.approx.ftz.f32) from the rounded result, and are its errors another
chip's?

A mode that takes it must know its bits: they are asked for 2^23 steps in each of [-1, 0), ..., [-4, -3). The line holds how
many results are how many last places off, and a hash of all bits. DIR/exp2.bin.gz has the differences, one byte each.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path

import torch
import triton
import triton.language as tl

SECONDS = 20
BLOCK = 1024


@triton.jit
def ex2(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    operand = tl.load(x + i)
    got = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [operand], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y + i, got)


def main() -> None:
    counts: dict[int, int] = {}
    hashed, kept = hashlib.sha256(), []
    for octave in range(4):  # -1 - fraction, ..., -4 - fraction: as softmax has them
        x = -(octave + torch.arange(1, 2**23 + 1, device="cuda", dtype=torch.float64) / 2**23).float()
        y = torch.empty_like(x)
        ex2[(x.numel() // BLOCK,)](x, y, BLOCK)
        want = torch.exp2(x.double()).float()
        off = (y.view(torch.int32) - want.view(torch.int32)).clamp(-128, 127)
        for value, count in zip(*(t.tolist() for t in off.unique(return_counts=True)), strict=True):
            counts[value] = counts.get(value, 0) + count
        hashed.update(y.cpu().numpy().tobytes())
        kept.append(off.to(torch.int8).cpu().numpy().tobytes())
    if folder := os.environ.get("GPU_REPORT_FOLDER"):
        (Path(folder) / "exp2.bin.gz").write_bytes(gzip.compress(b"".join(kept), 1))
    print(json.dumps({"last places off": dict(sorted(counts.items())), "results": 4 * 2**23, "sha256": hashed.hexdigest()}))


if __name__ == "__main__":
    main()
