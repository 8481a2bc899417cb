"""The program that each part of make sanitize runs: calls of a seed, on every instruction set that the machine has.

    python tests/sanitize/stress.py --seeds 1:40 [--library FILE] [--guarded] [--threads 3] [--hostile] [--seconds 60]

Well-formed calls must have one set of bits on all instruction sets and numbers of threads; hostile ones must be errors, or
right. The last line is JSON: how many calls there were, served and refused, by op and by kind. An access outside of an array
ends the process before.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import functools
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from sanitize.calls import Call, Hostile, Made, hostile
from sanitize.memory import Guarded

ISAS = ("avx512", "avx2", "scalar")


@functools.cache
def isas() -> list[str]:
    best = ISAS.index(torch.ops.rerank_kernels.force_isa("auto"))
    return list(ISAS[best:])


def say(line: str) -> None:
    """For who looks for the call that ended the process."""
    if "SAY" in os.environ:
        print(line, file=sys.stderr, flush=True)


def bits(out: tuple[torch.Tensor, ...]) -> list[bytes]:
    """One NaN is like another: its sign and payload are not part of the contract."""
    alike = [t.masked_fill(t.isnan(), torch.nan).contiguous().view(-1) if t.is_floating_point() else t for t in out]
    return [t.view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in alike]


def right(call: Call, threads: int) -> int:
    """Runs the call on each instruction set; the number of runs."""
    seen = []
    for isa in isas():
        torch.ops.rerank_kernels.force_isa(isa)
        for count in {1, threads}:
            torch.set_num_threads(count)
            seen.append((isa, count, bits(call.run())))
    torch.ops.rerank_kernels.force_isa("auto")
    torch.set_num_threads(1)  # PyTorch's own make the next arrays, and no sanitizer sees how those wait for one another
    for isa, count, got in seen[1:]:
        assert got == seen[0][2], f"{call}: {isa} with {count} threads has other bits than {seen[0][0]} with {seen[0][1]}"
    return len(seen)


def outcome(bad: Hostile) -> str:
    """refused, or served: with the bits of the call with a plain copy, if there is one."""
    try:
        got = bits(bad.call.run())
    except Exception:
        return "refused"
    assert not bad.must_fail, f"{bad.call} is served, with {bad.kind}"
    if bad.plain is not None:
        try:
            want = bits(bad.plain.run())
        except Exception as error:
            raise AssertionError(f"{bad.call} is served, and a plain copy is not: {error}") from error
        assert got == want, f"{bad.call}: other bits than with a plain copy"
    return "served"


Counts = collections.defaultdict[str, collections.Counter[str]]


def of_seed(options: argparse.Namespace, seed: int, guarded: Guarded, counts: Counts) -> None:
    if options.hostile:
        torch.ops.rerank_kernels.force_isa(options.isa or random.Random(seed).choice(isas()))
    made = Made(seed, guarded.place if options.guarded else lambda t: t, options.largest)
    for op in options.ops:
        call = made.call(op)
        say(f"{seed} {call}")
        if not options.hostile:
            runs = right(call, options.threads)
            counts["all"]["runs"] += runs
            counts[op]["served"] += runs
            continue
        for bad in hostile(call, random.Random(seed)):
            say(f"  {bad.kind}: {bad.call}")
            came = outcome(bad)
            counts["all"][came] += 1
            counts[bad.kind][came] += 1


def beside(options: argparse.Namespace, seed: int) -> None:
    """The same calls from several threads at once: each has the bits that it has alone."""
    made = Made(seed, largest=options.largest)
    calls = [made.call(op) for op in options.ops]
    alone = [bits(call.run()) for call in calls]
    wrong: list[str] = []

    def caller() -> None:
        torch.set_num_threads(options.threads)
        for call, want in zip(calls, alone, strict=True):
            if bits(call.run()) != want:
                wrong.append(str(call))

    callers = [threading.Thread(target=caller) for _ in range(options.callers)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert not wrong, f"other bits beside other callers: {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="1:20", help="FIRST:END")
    parser.add_argument("--library", type=Path, help="the C++ library; the package's own if not given")
    parser.add_argument("--guarded", action="store_true", help="arrays beside pages that nobody may touch")
    parser.add_argument("--hostile", action="store_true", help="hostile calls, not well-formed ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="of hostile calls; one of the machine's, by the seed, if not given")
    parser.add_argument("--callers", type=int, default=1, help="threads that make calls at once")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new seed after that")
    parser.add_argument("--largest", type=int, default=1)
    parser.add_argument("--ops", nargs="*", default=Made.OPS)
    parser.add_argument("--planted", help="the mistake of planted.cpp to make after all calls")
    parser.add_argument("--mistakes", type=Path, help="the library that holds them")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    if options.library is None:
        from rerank_kernels.backend import library

        assert library.missing() is None, library.missing()
    else:
        torch.ops.load_library(str(options.library))

    guarded = Guarded()
    counts: Counts = collections.defaultdict(collections.Counter)
    begun = time.monotonic()
    first, _, end = options.seeds.partition(":")
    for seed in range(int(first), int(end)):
        if time.monotonic() - begun > options.seconds:
            break
        counts["all"]["seeds"] += 1
        if options.callers > 1:
            beside(options, seed)
        of_seed(options, seed, guarded, counts)
        guarded.release()
    if options.planted:
        plant(options.planted, ctypes.CDLL(str(options.mistakes)), guarded)
    guard = getattr(ctypes.CDLL(None), "guarded_blocks", None)  # guard.cpp, where it was loaded
    kinds = {name: count for name, count in counts.items() if name != "all"}
    print(json.dumps({**counts["all"], "blocks": guard() if guard else 0, "isas": isas(), "kinds": kinds}))


def plant(mistake: str, of: ctypes.CDLL, guarded: Guarded) -> None:
    """Makes one of planted.cpp's mistakes. Where nobody sees it, the process ends as if nothing had been."""
    n = 40 if mistake == "over_write" else 48  # 160 bytes are no multiple of 64: what is behind them is no other page
    block = torch.zeros(n)
    if mistake == "guarded_over_read":
        block, n = guarded.place(torch.zeros(37)), 37
        mistake = "masked_over_read" if isas()[0] == "avx512" else "over_read"
    call = getattr(of, f"planted_{mistake}")
    if mistake == "overflow":
        call(ctypes.c_int(2**31 - 1))
    elif mistake == "race":
        call(ctypes.c_int64(30_000))  # milliseconds until somebody helps
    else:
        call(ctypes.c_void_p(block.data_ptr()), ctypes.c_int64(n))
    del block
    print(f"planted: {mistake}", file=sys.stderr)


if __name__ == "__main__":
    main()
