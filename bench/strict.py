"""MKL's own reproducible mode beside ours: stock PyTorch in a process of its own that was started with MKL_CBWR=...,STRICT.

The setting is read at MKL's first call, so it takes a process; strict mode promises the same bits whatever the threads and the
alignment. `away` puts such a process into a contest, as one more rival that makes the same calls as the first. `bits` counts
what it leaves unfixed: the pairs whose logit has other bits than alone, of a small reranker, for stock, stock in strict mode
and ours.

`python bench/strict.py` is a contestant's process; bench/run.py starts it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import shapes
import torch
from clock import Away, Contest, Missing, Turn, calls_awake
from torch import Tensor
from workers import PAUSE, Died, Ready, Worker, serve

BAR = 1.0
NAME = "MKL strict"
CASES = tuple(f"linear {m}x{k}x{n}" for k, n in ((768, 768), (768, 3072), (3072, 768)) for m in (2048, 128, 16, 1))
MODELS = ("8x128", "4x512", "32 of 16 to 512")  # of bge-reranker-base
WAYS = ("stock", f"stock, {NAME}", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCHES, EQUAL, PAIRS = (2, 7, 32), 64, 64  # tokens a pair, where lengths are equal
_workers: list[Worker] = []


def setting() -> str:
    """As the issue has it, where the machine can."""
    return f"{'AVX512' if 'AVX512' in torch.backends.cpu.get_cpu_capability() else 'AVX2'},STRICT"


def chosen(case: str) -> bool:
    return case in CASES or (case.startswith("bge-reranker-base") and case.rpartition(", ")[2] in MODELS)


def says() -> str | None:
    """The mode that MKL itself names under this setting: on CPUs it does not know it takes another than was asked for."""
    code = "import torch; torch.mm(torch.ones(64, 64), torch.ones(64, 64))"
    environment = {**os.environ, "MKL_CBWR": setting(), "MKL_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    match = re.search(r"\bCNR:(\S+)", done.stdout)
    return match[1] if match else None


def away(build: Callable[[], Contest], case: str, quick: bool, bar: float | None = BAR) -> Contest:
    """The contest, and its first rival in strict mode. A bar is for whole runs."""
    contest = build()
    first = contest.rivals[0].name
    there = functools.partial(ready, {"case": case, "quick": quick, "rival": first})
    return replace(contest, rivals=[*contest.rivals, Away(f"{first}, {NAME}", there, bar)])


def ready(what: Mapping[str, Any]) -> Turn:
    if not torch.backends.mkl.is_available():
        raise Missing("this PyTorch has no MKL")
    if not _workers:
        arguments = ["--threads", str(torch.get_num_threads())]
        _workers.append(Worker([__file__, *arguments], {"MKL_CBWR": setting()}, pause=PAUSE))
    try:
        said = _workers[0].prepare(what)
    except Died as error:
        _workers.clear()
        raise Missing(f"failed: {error}") from error
    if "error" in said:
        raise Missing(f"failed: {said['error']}")
    return _workers[0].turn


def used() -> bool:
    return bool(_workers)


def close() -> None:
    while _workers:
        _workers.pop().close()


# ---- the bits --------------------------------------------------------------------------------------------------------------


def bits(name: str, layers: int | None = None, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One record a way and dtype: what changed -> the pairs, of so many, whose bits are not those of the pair alone."""
    shape = replace(shapes.RERANKERS[name], layers=layers or shapes.RERANKERS[name].layers)
    found = []
    for way in WAYS:
        if NAME in way and not torch.backends.mkl.is_available():
            continue
        worker = Worker([__file__, "--threads", "1"], {"MKL_CBWR": setting() if NAME in way else ""})
        try:
            for dtype in DTYPES:
                what = {"shape": dataclasses.asdict(shape), "dtype": dtype, "ours": way == "ours", "pairs": pairs}
                said = worker.prepare({"bits": what})
                if "error" in said:
                    raise Missing(f"{way}, {dtype}: {said['error']}")
                found.append({"model": name, "way": way, "dtype": dtype, "pairs": pairs, **said})
        finally:
            worker.close()
    return found


def _count(shape: shapes.Shape, dtype: str, ours: bool, pairs: int) -> dict[str, Any]:
    import rerank_kernels as rk

    model = shapes.reranker(shape).to(DTYPES[dtype])
    if ours:
        rk.patch(model)

    def logits(rows: Sequence[Tensor], of: int, more: int = 0) -> Tensor:
        parts = [rows[i : i + of] for i in range(0, len(rows), of)]
        return torch.cat([model(**shapes.padded(shape, list(p), more=more)).logits.float() for p in parts])

    mixed = shapes.tokens(shape, tuple(shapes.MIXED_LENGTHS[i % len(shapes.MIXED_LENGTHS)] for i in range(pairs)))
    equal = shapes.tokens(shape, (EQUAL,) * pairs)
    alone, alone_equal = logits(mixed, 1), logits(equal, 1)
    got = {f"batches of {n}": (logits(equal, n), alone_equal) for n in BATCHES}
    # the longest pairs have no room for padding
    short = [i for i, row in enumerate(mixed) if len(row) <= shapes.LONGEST - 37]
    got["padding"] = (logits([mixed[i] for i in short], 1, more=37), alone[short])
    torch.set_num_threads(2)
    got["2 threads"] = (logits(mixed, 1), alone)
    torch.set_num_threads(1)
    differ = {n: int((a.view(torch.int32) != b.view(torch.int32)).any(1).sum()) for n, (a, b) in got.items()}
    return {"differ": differ, "furthest": max(float((a - b).abs().max()) for a, b in got.values())}


# ---- the contestant's process ----------------------------------------------------------------------------------------------


def prepare(what: Mapping[str, Any]) -> Ready:
    if "bits" in what:
        of = what["bits"]
        return lambda: None, _count(shapes.Shape(**of["shape"]), of["dtype"], of["ours"], of["pairs"])
    import run

    contest = run.contests(what["quick"])[what["case"]]()
    (rival,) = (r for r in contest.rivals if r.name == what["rival"])
    return rival.call, {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Stock PyTorch with settings of its own; bench/run.py starts it.")
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args(argv).threads)
    with torch.no_grad():
        return serve(prepare, calls_awake)


if __name__ == "__main__":
    sys.exit(main())
