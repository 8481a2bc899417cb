"""What the files of runs hold, and how a line of a table is made of it; needs neither PyTorch nor this package.

A result is one case: {"case", "group", "contestants": name -> cell, ...}. A cell (harness/turns.py) has "ms" and "all_ms", one
a round, or why it has none: "wrong", "error", or "why" it is not there; "ours"; and where there is one, the "bar". On a GPU
"ms" of an op is its kernels' time, of a model a call's; "call_ms" and "kernels_ms" are the other one.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

Cells = Mapping[str, Mapping[str, Any]]
LOST = {"wrong": "WRONG: ", "error": "", "why": ""}
ALONE = ("limits", "serving")  # studies that are whole in themselves, also where one was all of a run


def kept(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """ "cpu", "cuda", "scaling-cpu", "scaling-cuda", "limits", "serving", "decoders" -> the newest whole run in `folder`.

    Not --quick, --against or --only.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
        content = json.loads(path.read_text())
        if content.get("quick"):
            continue
        found |= {study: content for study in ALONE if study in content}
        if any(r.get("group") == "decoder" for r in content.get("results", ())):
            found["decoders"] = content  # likewise
        if content.get("only") or "against" in content:
            continue
        device = content.get("device", "cpu")
        if "scaling" in content:
            found[f"scaling-{device}"] = content
        elif all("contestants" in r for r in content.get("results", [{}])):
            found[device] = content
    return found


def digits(ms: float) -> str:
    return f"{ms:.{0 if ms >= 1000 else 1 if ms >= 100 else 2 if ms >= 1 else 3}f}"


def said(cell: Mapping[str, Any]) -> str:
    """A time, and in brackets what was measured beside it."""
    if "ms" not in cell:
        return "-"
    call, kernels = cell.get("call_ms", cell["ms"]), cell.get("kernels_ms")
    beside = f" (kernels {digits(kernels)})" if kernels else f" (call {digits(call)})" if call != cell["ms"] else ""
    return f"{digits(cell['ms'])} ms{beside}"


def lost(cell: Mapping[str, Any]) -> str | None:
    """Why there is no time."""
    return next((f"{word}{cell[key]}" for key, word in LOST.items() if key in cell), None)


def ours(cells: Cells, mode: str = "") -> str | None:
    """Our best in this mode; where none has a time, one that says why."""
    names = [n for n, c in cells.items() if c["ours"] and n.endswith(mode)]
    return min(names, key=lambda n: cells[n].get("ms", float("inf")), default=None)


def lines(result: Mapping[str, Any], mode: str = "") -> Iterator[dict[str, Any]]:
    """A line for every rival, beside our best in this mode; who has no time has no ratio, and says why.

    The ratio is the median over the rounds of theirs / ours: above 1 ours is faster. Who is away has rounds with ours apart.
    """
    cells: Cells = result["contestants"]
    best = ours(cells, mode)
    for name, c in cells.items():
        if c["ours"]:
            continue
        line: dict[str, Any] = {"case": result["case"], "against": name, "bar": c.get("bar"), "ratio": None, "verdict": None}
        if best is None or (why := lost(cells[best]) or lost(c)):
            yield line | {"why": "not served" if best is None else why}
            continue
        beside = c.get("beside_ms") or cells[best]["all_ms"]
        line |= {"ours": best, "ours_ms": statistics.median(c.get("beside_ms") or [cells[best]["ms"]]), "theirs_ms": c["ms"]}
        line["ratio"] = statistics.median(t / o for t, o in zip(c["all_ms"], beside, strict=False))
        if line["bar"] is not None:
            line["verdict"] = "ok" if line["ratio"] >= line["bar"] else "FALLS SHORT"
        yield line


def reach(result: Mapping[str, Any]) -> str:
    """Our best: TFLOP/s (T) where a call has a hundred operations or more for every byte, else GB/s (G)."""
    cells = result["contestants"]
    best = ours(cells)
    if best is None or "ms" not in cells[best]:
        return "-"
    if result["flops"] >= 100 * result["bytes"]:
        return f"{result['flops'] / cells[best]['ms'] * 1e-9:.1f}T"
    return f"{result['bytes'] / cells[best]['ms'] * 1e-6:.0f}G"


def line_of(result: Mapping[str, Any]) -> str:
    """Everyone's time, and what our best reaches."""
    words = (
        f"{n} {said(c) if 'ms' in c else 'WRONG' if 'wrong' in c else 'not timed'}" for n, c in result["contestants"].items()
    )
    return f"{result['case']}: {', '.join(words)}; {reach(result)}"
