"""The program that each part of make sanitize runs: calls of a seed, on every instruction set that the machine has.

    python tests/sanitize/stress.py --seeds 1:40 [--library FILE] [--guarded] [--threads 3] [--hostile] [--seconds 60]

Well-formed calls must have one set of bits on all instruction sets and numbers of threads; hostile ones must be errors, or
right. The last line is JSON: how many calls there were, served and refused, by op and by kind. An access outside of an array
ends the process before.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from sanitize.calls import Call, Hostile, Made, hostile
from sanitize.memory import Guarded

ISAS = ("avx512", "avx2", "scalar")


def isas() -> list[str]:
    best = ISAS.index(torch.ops.rerank_kernels.force_isa("auto"))
    return list(ISAS[best:])


def say(line: str) -> None:
    """For who looks for the call that ended the process."""
    if "SAY" in os.environ:
        print(line, file=sys.stderr, flush=True)


def bits(out: tuple[torch.Tensor, ...]) -> list[bytes]:
    return [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in out]


def right(call: Call, threads: int) -> int:
    """Runs the call on each instruction set; the number of runs."""
    seen = []
    for isa in isas():
        torch.ops.rerank_kernels.force_isa(isa)
        for count in {1, threads}:
            torch.set_num_threads(count)
            seen.append((isa, count, bits(call.run())))
    torch.ops.rerank_kernels.force_isa("auto")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", default="1:20", help="FIRST:END")
    parser.add_argument("--library", type=Path, help="the C++ library; the package's own if not given")
    parser.add_argument("--guarded", action="store_true", help="arrays beside pages that nobody may touch")
    parser.add_argument("--hostile", action="store_true", help="hostile calls, not well-formed ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new seed after that")
    parser.add_argument("--largest", type=int, default=1)
    parser.add_argument("--ops", nargs="*", default=Made.OPS)
    parser.add_argument("--planted", help="the mistake to make after all calls: over_read or race")
    options = parser.parse_args()
    faulthandler.enable()
    if options.library is None:
        from rerank_kernels.backend import library

        assert library.missing() is None, library.missing()
    else:
        torch.ops.load_library(str(options.library))

    guarded = Guarded()
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.defaultdict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    begun = time.monotonic()
    first, _, end = options.seeds.partition(":")
    for seed in range(int(first), int(end)):
        if time.monotonic() - begun > options.seconds:
            break
        counts["seeds"] += 1
        made = Made(seed, guarded.place if options.guarded else lambda t: t, options.largest)
        for op in options.ops:
            call = made.call(op)
            say(f"{seed} {call}")
            if not options.hostile:
                runs = right(call, options.threads)
                counts["runs"] += runs
                kinds[op]["served"] += runs
                continue
            for bad in hostile(call, random.Random(seed)):
                say(f"  {bad.kind}: {bad.call}")
                came = outcome(bad)
                counts[came] += 1
                kinds[bad.kind][came] += 1
        guarded.release()
    if options.planted == "over_read":
        planted_over_read(guarded)
    elif options.planted == "race":
        torch.set_num_threads(4)
        torch.ops.rerank_kernels.planted(torch.zeros(64), "race")
    print(json.dumps({**counts, "isas": isas(), "kinds": kinds}))


def planted_over_read(guarded: Guarded) -> None:
    """One element too many, by a masked load where there is AVX-512."""
    torch.ops.rerank_kernels.planted(guarded.place(torch.zeros(37)), "over_read")


if __name__ == "__main__":
    main()
