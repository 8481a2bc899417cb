"""Peak memory of a stock and of a patched reranker: a fresh process each, the same weights, the same batches.

`measure` writes the weights to a temporary folder once; each process loads them as a user does, with from_pretrained, scores a
batch of equal lengths and then the mixed one, and tells its peak (VmHWM) after each step. The peak is set back once the model
is there and patched (Linux: clear_refs), so that what loading took for a moment hides nothing. The bar is for equal lengths:
in a mixed batch stock's padding takes memory of its own.

`python bench/memory.py` is one of these processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import shapes
import torch
from clock import Missing, verdict

import rerank_kernels as rk

BAR = 1.15  # ours / stock, at most
STEPS = ("loaded", "8x128", "32 of 16 to 512")
LENGTHS = {"8x128": (128,) * 8, "32 of 16 to 512": shapes.MIXED_LENGTHS}
STATUS = pathlib.Path("/proc/self/status")


def measure(name: str, layers: int | None = None, *, bar: float | None = BAR) -> list[dict[str, Any]]:
    """One record a step: MiB of stock and ours, and ours / stock."""
    if not STATUS.exists():
        raise Missing(f"there is no {STATUS}")
    shape = dataclasses.replace(shapes.RERANKERS[name], layers=layers or shapes.RERANKERS[name].layers)
    with tempfile.TemporaryDirectory() as folder:
        peaks = {}
        for who in ("save", "stock", "ours"):
            what = json.dumps(dataclasses.asdict(shape))
            command = [sys.executable, __file__, who, folder, what, "--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise Missing(f"{name}, {who}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
            if who != "save":
                peaks[who] = json.loads(done.stdout.splitlines()[-1])
    records = []
    for step in STEPS:
        stock, ours = peaks["stock"][step], peaks["ours"][step]
        held = bar if step == "8x128" else None
        said = verdict(-ours / stock, None if held is None else -held)
        row = {"model": name, "step": step, "stock_mib": stock, "ours_mib": ours, "ratio": ours / stock}
        records.append({**row, "bar": held, "verdict": said})
    return records


def peak() -> float:
    """MiB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) / 1024


def one(who: str, folder: str, threads: int, shape: shapes.Shape) -> dict[str, float]:
    """The process's side."""
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if who == "ours":
        rk.patch(model)
    found = {"loaded": peak()}
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        for step, lengths in LENGTHS.items():
            batch = shapes.padded(shape, shapes.tokens(shape, lengths))
            for _ in range(2):
                model(**batch)
            found[step] = peak()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory of one process; bench/run.py starts it.")
    parser.add_argument("who", choices=("save", "stock", "ours"))
    parser.add_argument("folder")
    parser.add_argument("shape", type=json.loads)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args(argv)
    shape = shapes.Shape(**args.shape)
    if args.who == "save":
        shapes.reranker(shape).save_pretrained(args.folder)
        return 0
    print(json.dumps(one(args.who, args.folder, args.threads, shape)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
