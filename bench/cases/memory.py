"""Peak memory of a stock and of a patched reranker: a fresh process each, the same weights, the same batches.

`measure` writes the weights to a temporary folder once; each process loads them as a user does, with from_pretrained, scores a
batch of equal lengths and then the mixed one, and tells its peak (VmHWM) after each step. The peak is set back once the model
is there and patched (Linux: clear_refs), so that what loading took for a moment hides nothing. The bar is for equal lengths:
in a mixed batch stock's padding takes memory of its own.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
from typing import Any

import torch

import rerank_kernels as rk
from bench.cases import shapes
from bench.harness import worker
from bench.harness.turns import Missing

BAR = 1.15  # ours / stock, at most
LENGTHS = {"8x128": (128,) * 8, "32 of 16 to 512": shapes.MIXED_LENGTHS}
STATUS = pathlib.Path("/proc/self/status")


def measure(name: str, shape: shapes.Shape, *, bar: float | None = BAR) -> list[dict[str, Any]]:
    """One record a step: MiB of stock and ours, and ours / stock."""
    if not STATUS.exists():
        raise Missing(f"there is no {STATUS}")
    with tempfile.TemporaryDirectory() as folder:
        _, stocks, ours = (worker.once(one, who, folder, shape) for who in ("save", "stock", "ours"))
    records = []
    for step, stock in stocks.items():
        ratio, held = ours[step] / stock, bar if step == "8x128" else None
        verdict = None if held is None else "ok" if ratio <= held else "FALLS SHORT"
        row = {"model": name, "step": step, "stock_mib": stock, "ours_mib": ours[step], "ratio": ratio}
        records.append({**row, "bar": held, "verdict": verdict})
    return records


def peak() -> float:
    """MiB."""
    match = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) / 1024


def one(who: str, folder: str, of: shapes.Shape) -> dict[str, float]:
    """The process's side."""
    from transformers import AutoModelForSequenceClassification

    if who == "save":
        shapes.reranker(of).save_pretrained(folder)
        return {}
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    if who == "ours":
        rk.patch(model)
    found = {"loaded": peak()}
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        for step, lengths in LENGTHS.items():
            batch = shapes.padded(of, shapes.tokens(of, lengths))
            for _ in range(2):
                model(**batch)
            found[step] = peak()
    return found
