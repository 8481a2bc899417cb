"""Offsets in shared memory, which another process changes while ops read them. Prints how many calls were refused, and served.

python tests/sanitize/changing.py [LIBRARY]
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import time

import torch

TOKENS = 48
GOOD = struct.pack("4i", 0, 16, 32, TOKENS)
WILD = [struct.pack("4i", *offsets, TOKENS) for offsets in ((0, 2**30, 32), (0, -(2**30), 32), (0, 16, 2**31 - 1))]
ENOUGH, SECONDS = 100, 60.0  # calls of either outcome; no longer than that


def change(memory: mmap.mmap) -> None:
    while True:
        for wild in WILD:
            memory[:16] = wild
            for _ in range(20):
                memory[:16] = GOOD


def main() -> None:
    if len(sys.argv) > 1:
        torch.ops.load_library(sys.argv[1])
    else:
        from rerank_kernels.backend import library

        assert library.missing() is None, library.missing()
    torch.set_num_threads(1)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory[:16] = GOOD
    writer = os.fork()
    if writer == 0:
        change(memory)
    cu = torch.frombuffer(memory, dtype=torch.int32, count=4)
    q, counts = torch.randn(TOKENS, 4, 32), [0, 0]
    end = time.monotonic() + SECONDS
    try:
        while min(counts) < ENOUGH and time.monotonic() < end:
            for call in (
                lambda: torch.ops.rerank_kernels.attention(q, q, q, cu, None, -1, -1, 0.5),
                lambda: torch.ops.rerank_kernels.attention(q, q, q, cu, cu, -1, -1, 0.5),
                lambda: torch.ops.rerank_kernels.pool(q.view(TOKENS, -1), cu, True, torch.float32),
            ):
                try:
                    call()
                    counts[1] += 1
                except RuntimeError:
                    counts[0] += 1
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
    print(*counts)


if __name__ == "__main__":
    main()
