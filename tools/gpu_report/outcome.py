"""What a run found, as one flat object, and as tables: in a terminal, in pages of the project."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import pages
from tools.gpu_report import goals
from tools.gpu_report.runner import Record, Result

Content = Mapping[str, Any]
WRITER = "gpu-report"
TIMED = {
    "ways-cuda": "Ways of CUDA's launchers",
    "models": "Whole models",
    "models-compiled": "Whole models beside torch.compile",
    "ways-triton": "Ways of Triton's kernels",
}


def content(about: Record, results: Iterable[Result]) -> dict[str, Any]:
    results = list(results)
    steps = [
        {
            "name": r.step.name,
            "question": r.step.question,
            "status": r.status,
            "seconds": round(r.seconds, 1),
            "limit": round(r.limit, 1),
            "why": r.why,
            "last": list(r.last),
            "kept": r.kept,
            "wrong": len(r.wrong),
        }
        for r in results
    ]
    return {
        "about": about,
        "steps": steps,
        "records": [{"step": r.step.name, **record} for r in results for record in r.records],
    }


def write(path: Path, found: Content) -> None:
    """Beside it, then renamed: the file is there whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def wrong(found: Content) -> list[Record]:
    return [r for r in found["records"] if r.get("wrong")]


def unwell(found: Content) -> list[Record]:
    return [s for s in found["steps"] if s["status"] not in ("ok", "part")]


# ---- times


def by_case(found: Content, step: str) -> dict[str, list[Record]]:
    listed: dict[str, list[Record]] = {}
    for record in found["records"]:
        if record["step"] == step and "who" in record:
            listed.setdefault(record["case"], []).append(record)
    return listed


def fastest(records: Iterable[Record], ours: bool, mode: str | None = None, chosen: bool = True) -> Record | None:
    """`chosen`: only what the launcher chooses itself, no way that was forced."""
    timed = [r for r in records if "ms" in r and r["ours"] == ours and mode in (None, r["mode"])]
    timed = [r for r in timed if not chosen or r["way"] is None]
    return min(timed, key=lambda r: r["ms"], default=None)


def line(case: str, records: Sequence[Record]) -> list[str]:
    """Case; theirs; for each mode ours, theirs / ours; the fastest way where another than the chosen one is 5 % faster."""
    theirs = fastest(records, False)
    cells = [case, f"{digits(theirs['ms'])} ms, {theirs['who']}" if theirs else "–"]
    better = []
    for mode in ("portable", "tensor"):
        ours = fastest(records, True, mode)
        if ours is None:
            bad = next((r for r in records if r["ours"] and r["mode"] == mode), None)
            cells += ["WRONG" if bad and bad.get("wrong") else "error" if bad else "–", "–"]
            continue
        cells += [f"{digits(ours['ms'])} ms, {ours['backend']}", f"{theirs['ms'] / ours['ms']:.2f}" if theirs else "–"]
        same = [r for r in records if r["backend"] == ours["backend"]]
        way = fastest(same, True, mode, chosen=False)
        if way is not None and way["ms"] < 0.95 * ours["ms"]:
            better.append(f"{way['who']}: {digits(way['ms'])} ms")
    return [*cells, "; ".join(better) or "–"]


HEADS = ("", "theirs, the best", "portable", "theirs / portable", "tensor", "theirs / tensor", "a faster way")


def digits(ms: float) -> str:
    return f"{ms:.{0 if ms >= 1000 else 1 if ms >= 100 else 2 if ms >= 1 else 3}f}"


def verdict(step: Mapping[str, Any]) -> str:
    return f"{step['wrong']} WRONG" if step["wrong"] else step["status"]


def terminal(found: Content) -> str:
    rows = [("step", "status", "s", "of", "")]
    for s in found["steps"]:
        rows.append((s["name"], verdict(s), f"{s['seconds']:.0f}", f"{s['limit']:.0f}", s["why"][:70]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows]
    for step in TIMED:
        if listed := by_case(found, step):
            table = [HEADS, *(line(case, records) for case, records in listed.items())]
            widths = [max(len(row[i]) for row in table) for i in range(6)]
            lines += ["", step, *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in table)]
    if [r for r in found["records"] if "ms" in r]:
        lines += ["", "goals", *("  ".join(row) for row in goals.rows(found["records"]))]
    for record in wrong(found):
        lines.append(f"WRONG: {record['step']}: {record.get('case', '')}: {record.get('who', '')} {record['wrong']}")
    return "\n".join(lines)


# ---- pages of the project


def blocks(found: Content) -> dict[str, str | None]:
    """NAME -> what stands between <!-- gpu-report:NAME --> and <!-- /gpu-report -->."""
    about = found["about"]
    facts = [
        f"{n} {about[n]}"
        for n in ("gpu", "capability", "driver", "torch", "cuda", "nvcc", "triton", "revision")
        if about.get(n)
    ]
    made: dict[str, str | None] = {"machine": f"({', '.join(facts)})\n"}
    rows = [(s["name"], s["question"], verdict(s), f"{s['seconds']:.0f} s") for s in found["steps"]]
    made["steps"] = pages.markdown(("", "question", "status", "time"), rows)
    made["goals"] = pages.markdown(goals.HEADS, goals.rows(found["records"]))
    for step in TIMED:
        listed = by_case(found, step)
        made[step] = pages.markdown(HEADS, [line(c, records) for c, records in listed.items()]) if listed else None
    return made
