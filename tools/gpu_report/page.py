"""report.html: the run for people, in the style of the pages of verify and bench, in one file that asks nothing of anyone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tools.gpu_report import goals
from tools.gpu_report.outcome import HEADS, TIMED, Content, by_case, fastest, line, unwell, verdict, wrong
from tools.gpu_report.steps import ROOT

STYLE = next((ROOT / "rerank_kernels").rglob("page.css"))  # that of the pages of verify and bench
HOW_TO_READ = (
    "Each step ran in a process of its own, within its time. Times are medians of turns, ours and theirs one after the other. "
    "An op's time is the device's, a model's is Python's. Every way of a launcher must give the bits of its own choice; a way "
    "that does not is WRONG. To help, send back report.json."
)


def written(found: Content) -> str:
    about, bad, ill = found["about"], wrong(found), unwell(found)
    if bad:
        head = f"Bits or promises do not hold: {_count(len(bad), 'finding is', 'findings are')} wrong"
    elif ill:
        head = f"Nothing is wrong; {_count(len(ill), 'step', 'steps')} of {len(found['steps'])} did not end well"
    else:
        head = "Every bit and every promise that was looked at holds"
    ways = [r for r in found["records"] if r["step"].startswith("ways-") and r.get("way") is not None]
    loader = FileSystemLoader([str(Path(__file__).parent), str(STYLE.parent)])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(
        gpu=str(about.get("gpu", "no GPU")),
        good=not bad and not ill,
        head=head,
        wrong=[{"case": "", "who": "", **r} for r in bad],
        tiles=[
            (f"{sum(r.get('equal', 0) for r in found['records']):,}", "results with the bits that are written down"),
            (f"{sum('ms' in r for r in ways):,} of {len(ways):,}", "forced ways with equal bits"),
            (f"{len(bad):,}", "findings that are wrong"),
        ],
        bars=list(_bars(found)),
        steps=[{**s, "verdict": verdict(s), "bad": bool(s["wrong"]) or s in ill} for s in found["steps"]],
        goal_heads=goals.HEADS,
        goals=[(row, row[-1] == goals.MISSED) for row in goals.rows(found["records"])],
        heads=HEADS,
        tables=[
            (title, [(line(case, records), any(r.get("wrong") for r in records)) for case, records in listed.items()])
            for step, title in TIMED.items()
            if (listed := by_case(found, step))
        ],
        findings=list(_findings(found)),
        facts=[(name, str(value)) for name, value in about.items() if name not in ("command", "began") and value is not None],
        command=str(about.get("command", "python tools/gpu_report")),
        when=datetime.fromtimestamp(float(about.get("began", 0.0)), timezone.utc),
        how_to_read=HOW_TO_READ,
    )


def _count(n: int, one: str, more: str) -> str:
    return f"{n:,} {one if n == 1 else more}"


def _bars(found: Content) -> Iterator[tuple[str, list[tuple[str, float, str]]]]:
    for case, records in by_case(found, "models").items():
        pair = [("ours", fastest(records, True)), ("stock", fastest(records, False))]
        timed = [(who, r) for who, r in pair if r is not None]
        if len(timed) == 2:
            most = max(r["ms"] for _, r in timed)
            yield case, [(who, r["ms"] / most, f"{r['ms']:.3g} ms, {r['who']}") for who, r in timed]


def _findings(found: Content) -> Iterator[tuple[str, str, bool]]:
    """(where, what, whether it could not run); the last words of a step that did not end well too."""
    for step in found["steps"]:
        if step["last"]:
            yield f"{step['name']}: its last lines", "\n".join(step["last"]), True
    for record in found["records"]:
        told = record["step"] == "counters" or record["step"].startswith("probe-") or "note" in record or "error" in record
        if told:
            where = ", ".join(str(record[n]) for n in ("step", "case", "who") if record.get(n))
            yield where, "\n".join(_lines(record)), bool(record.get("error"))


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A line per field, and one per row of a table in it."""
    for name, value in record.items():
        if name in ("step", "case", "who"):
            continue
        if isinstance(value, list):
            yield f"{name}:"
            yield from (f"  {json.dumps(v)}" for v in value)
        elif isinstance(value, dict):
            yield f"{name}:"
            yield from (f"  {n}: {v}" for n, v in value.items())
        else:
            yield f"{name}: {value}"
