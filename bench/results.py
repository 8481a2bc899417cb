"""What the files of runs hold, and how a line of a table is made of it; needs neither PyTorch nor this package."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


def kept(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """ "cpu", "cuda", "scaling-cpu", "scaling-cuda", "limits", "serving" -> the newest whole run in `folder`.

    Not --quick, --against or --only.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime):
        content = json.loads(path.read_text())
        for study in ("limits", "serving"):
            if study in content and not content.get("quick"):
                found[study] = content  # whole in itself, also where it was all of the run
        if content.get("quick") or content.get("only") or "against" in content:
            continue
        device = content.get("device", "cpu")
        if "scaling" in content:
            found[f"scaling-{device}"] = content
        elif "results" in content:
            found[device] = content
    return found


def digits(ms: float) -> str:
    return f"{ms:.{0 if ms >= 1000 else 1 if ms >= 100 else 2 if ms >= 1 else 3}f}"


def ratios(contestants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours -> theirs -> median over the rounds of theirs / ours: above 1 ours is faster."""
    timed = {n: c for n, c in contestants.items() if "ms" in c}
    return {
        a: {
            b: statistics.median(t / o for t, o in zip(timed[b]["all_ms"], timed[a]["all_ms"], strict=False))
            for b in timed
            if not timed[b]["ours"]
        }
        for a in timed
        if timed[a]["ours"]
    }


# ---- the table -------------------------------------------------------------------------------------------------------------

LETTERS = {"compile": "c", "one by one": "o", "sorted 8s": "s", "varlen": "v", "b-inv": "b", "no mask": "n"}
FIRST = ("eager", "padded")
COLUMNS = ("cuda portable", "cuda tensor", "triton portable", "triton tensor")


def _cell(contestant: Mapping[str, Any] | None) -> str:
    if contestant is None:
        return "-"
    return "WRONG" if "wrong" in contestant else "error" if "error" in contestant else digits(contestant["ms"])


def reach(result: Mapping[str, Any]) -> str:
    """Our best: TFLOP/s (T) where a call has a hundred operations or more for every byte, else GB/s (G)."""
    c = result["contestants"]
    if (name := _best(c, [n for n in c if c[n]["ours"]])) is None:
        return "-"
    if result["flops"] >= 100 * result["bytes"]:
        return f"{result['flops'] / c[name]['ms'] * 1e-9:.1f}T"
    return f"{result['bytes'] / c[name]['ms'] * 1e-6:.0f}G"


def best_ratio(contestants: Mapping[str, Mapping[str, Any]], mode: str) -> tuple[str, str, float] | None:
    """Our best in this mode, the best of theirs, and theirs / ours."""
    ours = _best(contestants, [n for n in contestants if contestants[n]["ours"] and n.endswith(mode)])
    theirs = _best(contestants, [n for n in contestants if not contestants[n]["ours"]])
    return None if ours is None or theirs is None else (ours, theirs, ratios(contestants)[ours][theirs])


def _best(contestants: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str | None:
    timed = [n for n in names if "ms" in contestants.get(n, {})]
    return min(timed, key=lambda n: contestants[n]["ms"], default=None)


def line_of(name: str, result: Mapping[str, Any]) -> str:
    """Times in ms; the best of theirs over our best portable and our best tensor; what our best reaches."""
    c = result["contestants"]
    theirs = [n for n in c if not c[n]["ours"]]
    other = _best(c, [n for n in theirs if n not in FIRST])
    cells = [_cell(c.get(n)) for n in _columns(c)]
    cells.append(next((_cell(c[n]) for n in FIRST if n in c), "-"))
    cells.append(f"{_cell(c[other])}{LETTERS[other]}" if other else "-")
    for mode in ("portable", "tensor"):
        found = best_ratio(c, mode)
        cells.append("-" if found is None else f"{found[2]:.2f}")
    cells.append(reach(result))
    return row(name, cells)


def row(name: str, cells: Sequence[str]) -> str:
    return f"{name:31s}" + "".join(f" {x:>6s}" for x in cells)


def _columns(contestants: Mapping[str, Any]) -> tuple[str, ...]:
    on_gpu = any(n in COLUMNS for n in contestants)
    return COLUMNS if on_gpu or not contestants else (*[n for n in contestants if contestants[n]["ours"]], "", "")[:4]


def show(content: Mapping[str, Any]) -> None:
    """Plain lines, the shortest that hold it all, and what matters most last: a log may be cut at its beginning."""
    said: dict[tuple[str, str], list[str]] = {}
    for r in content["results"]:
        for name, c in r["contestants"].items():
            if "wrong" in c or "error" in c:
                said.setdefault((name, c.get("wrong") or c["error"]), []).append(r["case"])
    for (name, words), where in said.items():
        print(f"{name}: {words[:200]} ({where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''})")
    for facts in ("machine", "machine_after"):
        print(f"{facts}: " + ", ".join(f"{k} {v}" for k, v in content[facts].items()))
    if content["not_measured"]:
        print(f"not measured, out of time: {', '.join(content['not_measured'])}"[:600])
    print(row("ms; x: theirs / ours", ("cuda", "cuda-T", "triton", "trit-T", "stock", "other", "x port", "x tens", "reach")))
    groups = list(dict.fromkeys(r["group"] for r in content["results"]))
    for r in sorted(content["results"], key=lambda r: -groups.index(r["group"])):
        print(line_of(r["case"], r))
    print("stock: eager without TF32, or SDPA, or the model as it is (mixed lengths: padded). other: the best of the others:")
    print("  " + ", ".join(f"{letter} {name}" for name, letter in LETTERS.items()) + f". {content['seconds']:.0f} s in all")
