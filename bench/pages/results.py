"""What the files of runs hold, and how a line of a table is made of it; needs neither PyTorch nor this package.

A result is one case: {"case", "group", "contestants": name -> cell, ...}. A cell (harness/turns.py) has "ms" and "all_ms", one
a round, or why it has none: "wrong", "error", or "why" it is not there; "ours"; and where there is one, the "bar".
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Cells = Mapping[str, Mapping[str, Any]]
WHY = {"wrong": "WRONG: ", "error": "", "why": ""}


def kept(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """ "cpu", "cuda", "scaling-cpu", "scaling-cuda", "limits", "serving", "decoders" -> the newest whole run in `folder`.

    Not --quick, --against or --only.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
        content = json.loads(path.read_text())
        for study in ("limits", "serving"):
            if study in content and not content.get("quick"):
                found[study] = content  # whole in itself, also where it was all of the run
        if any(r.get("group") == "decoder" for r in content.get("results", ())) and not content.get("quick"):
            found["decoders"] = content  # likewise
        if content.get("quick") or content.get("only") or "against" in content:
            continue
        device = content.get("device", "cpu")
        if "scaling" in content:
            found[f"scaling-{device}"] = content
        elif all("contestants" in r for r in content.get("results", [{}])):
            found[device] = content
    return found


def digits(ms: float) -> str:
    return f"{ms:.{0 if ms >= 1000 else 1 if ms >= 100 else 2 if ms >= 1 else 3}f}"


def ratio(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> float:
    """Median over the rounds of theirs / ours, above 1 ours is faster; who is away has rounds of its own with ours."""
    rounds = zip(theirs["all_ms"], theirs.get("beside_ms") or ours["all_ms"], strict=False)
    return statistics.median(t / o for t, o in rounds)


def ratios(contestants: Cells) -> dict[str, dict[str, float]]:
    """Ours -> theirs -> the ratio."""
    timed = {n: c for n, c in contestants.items() if "ms" in c}
    return {a: {b: ratio(timed[b], timed[a]) for b in timed if not timed[b]["ours"]} for a in timed if timed[a]["ours"]}


def lines(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a CPU's run, a line for every rival; who has no time has no ratio, and says why."""
    cells: Cells = result["contestants"]
    ours = next(c for c in cells.values() if c["ours"])
    for name, c in cells.items():
        if c["ours"]:
            continue
        line: dict[str, Any] = {"case": result["case"], "against": name, "bar": c.get("bar"), "ratio": None, "verdict": None}
        if lost := next((f"{word}{said[key]}" for said in (ours, c) for key, word in WHY.items() if key in said), None):
            yield line | {"why": lost}
            continue
        line |= {"ours_ms": statistics.median(c.get("beside_ms") or ours["all_ms"]), "theirs_ms": c["ms"]}
        line["ratio"] = ratio(c, ours)
        if line["bar"] is not None:
            line["verdict"] = "ok" if line["ratio"] >= line["bar"] else "FALLS SHORT"
        yield line


def best_ratio(contestants: Cells, mode: str) -> tuple[str, str, float] | None:
    """Our best in this mode, the best of theirs, and theirs / ours."""
    ours = _best(contestants, [n for n in contestants if contestants[n]["ours"] and n.endswith(mode)])
    theirs = _best(contestants, [n for n in contestants if not contestants[n]["ours"]])
    return None if ours is None or theirs is None else (ours, theirs, ratio(contestants[theirs], contestants[ours]))


def _best(contestants: Cells, names: Sequence[str]) -> str | None:
    timed = [n for n in names if "ms" in contestants[n]]
    return min(timed, key=lambda n: contestants[n]["ms"], default=None)


def reach(result: Mapping[str, Any]) -> str:
    """Our best: TFLOP/s (T) where a call has a hundred operations or more for every byte, else GB/s (G)."""
    c = result["contestants"]
    if (name := _best(c, [n for n in c if c[n]["ours"]])) is None:
        return "-"
    if result["flops"] >= 100 * result["bytes"]:
        return f"{result['flops'] / c[name]['ms'] * 1e-9:.1f}T"
    return f"{result['bytes'] / c[name]['ms'] * 1e-6:.0f}G"


def line_of(result: Mapping[str, Any]) -> str:
    """Everyone's time in ms, and what our best reaches."""
    cells = result["contestants"].items()
    said = (f"{n} {digits(c['ms']) if 'ms' in c else 'WRONG' if 'wrong' in c else 'error'}" for n, c in cells)
    return f"{result['case']}: {', '.join(said)}; {reach(result)}"
