"""Runs steps, one after the other, each in a process of its own, and keeps all that they say.

DIR/STEP.jsonl holds what a step prints, line by line as it comes, so that nothing is lost when it or this program is killed.
A step with cases says {"begins": case} and {"finished": case} around what it finds, and {"left": [cases]} if its time is up. If
it dies or hangs within a case, that case gets the error, and the step goes on behind it. Lines of this program have "runner".
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.gpu_report.steps import LEAST, Step, allowance

Record = dict[str, Any]
QUIET = 90.0  # seconds without a word after which a case counts as stuck
LAST = 12  # lines kept of a step that did not end well
ENDED_WELL = ("ok", "part")


@dataclass
class Found:
    """What a step's file holds."""

    key: Record | None = None
    records: list[Record] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    begun: str | None = None  # and not finished
    left: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    end: Record | None = None


@dataclass(frozen=True)
class Result:
    step: Step
    status: str
    seconds: float
    limit: float
    records: Sequence[Record]
    why: str = ""
    last: Sequence[str] = ()
    kept: bool = False  # from an earlier run

    @property
    def wrong(self) -> list[Record]:
        return [r for r in self.records if r.get("wrong")]


def read(path: Path) -> Found:
    found = Found()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        if not line.lstrip().startswith("{"):
            found.text += [line] if line.strip() else []
            continue
        try:
            said = json.loads(line)
        except ValueError:
            found.broken.append(line[:400])
            continue
        if said.get("runner") == "begins":
            found.key, found.end = said["key"], None
        elif said.get("runner") == "ends":
            found.end = said
        elif "begins" in said:
            found.begun = said["begins"]
        elif "finished" in said:
            found.finished.append(said["finished"])
            found.begun = None
        elif "left" in said:
            found.left = said["left"]
        else:
            found.records.append(said)
    return found


def run(
    listed: Sequence[Step],
    folder: Path,
    key: Record,
    seconds: float,
    environment: Mapping[str, str],
    tell: Callable[[Step, str, Result | None], None],
    quiet: float = QUIET,
) -> list[Result]:
    """All steps, in the order in which they are listed. Those that did not end well in an earlier run come last."""
    until = time.time() + seconds
    results: dict[str, Result] = {}
    fresh, again = [], []
    for step in listed:
        before = read(folder / f"{step.name}.jsonl")
        if before.key == key and before.end and before.end["status"] == "ok":
            results[step.name] = Result(step, "ok", before.end["seconds"], before.end["limit"], before.records, kept=True)
            tell(step, "kept", results[step.name])
        else:
            (again if before.key == key and before.end else fresh).append(step)
    first = [s for s in again if any(s.name == other.needs for other in listed)]  # others wait for these
    order = [*first, *fresh, *(s for s in again if s not in first)]
    for i, step in enumerate(order):
        lacking = step.needs and step.needs in {s.name for s in listed} and results[step.needs].status not in ENDED_WELL
        given = allowance(step, order[i + 1 :], until - time.time())
        if lacking:
            results[step.name] = Result(step, "left out", 0.0, given, (), f"it needs the step {step.needs}")
        elif given < min(LEAST, step.seconds):
            kept = read(folder / f"{step.name}.jsonl")
            results[step.name] = Result(step, "no time", 0.0, given, kept.records if kept.key == key else ())
        else:
            tell(step, f"{given:.0f} s", None)
            results[step.name] = one(step, folder, key, given, environment, quiet)
        tell(step, results[step.name].status, results[step.name])
    return [results[s.name] for s in listed]


def one(step: Step, folder: Path, key: Record, limit: float, environment: Mapping[str, str], quiet: float = QUIET) -> Result:
    path, log = folder / f"{step.name}.jsonl", folder / f"{step.name}.log"
    before = read(path)
    started, until = time.time(), time.time() + limit
    log.unlink(missing_ok=True)
    _begin(path, before if before.key == key else Found(), key)
    status, why = "failed", ""
    while True:
        code, why = _process(step, path, log, until, quiet, {**environment, "GPU_REPORT_UNTIL": str(until)})
        found = read(path)
        if code == 0:
            status, why = _ended(step, found)
            break
        if time.time() >= until:
            status, why = "over time", f"it did not end within {limit:.0f} s"
            if found.begun:
                why += f", in {found.begun}"
            break
        if found.begun is None:
            break
        # the case that took the process along gets the error, and the rest may go on
        _write(path, {"case": found.begun, "error": why})
        _write(path, {"finished": found.begun})
        if until - time.time() < min(LEAST, step.seconds):
            status, why = "over time", f"no time was left behind {found.begun}: {why}"
            break
    spent = time.time() - started
    _write(path, {"runner": "ends", "status": status, "seconds": round(spent, 1), "limit": round(limit, 1), "why": why})
    found = read(path)
    last = [] if status in ENDED_WELL else [*found.broken, *_tail(log), *found.text][-LAST:]
    return Result(step, status, spent, limit, found.records, why, last)


def _begin(path: Path, before: Found, key: Record) -> None:
    """A file that holds what an earlier run finished, and nothing else."""
    kept = [r for r in before.records if r.get("case") in before.finished]
    lines = [{"runner": "begins", "key": key}, *kept, *({"finished": case} for case in dict.fromkeys(before.finished))]
    beside = path.with_name(f".{path.name}.new")
    beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)


def _ended(step: Step, found: Found) -> tuple[str, str]:
    if found.broken:
        return "broken", f"a line that is no JSON: {found.broken[0][:100]}"
    if step.probe and len(found.records) != 1:
        return "failed", f"a probe prints one line of JSON, this one printed {len(found.records)}"
    if not found.records and not found.left:
        return "failed", "it found nothing"
    if found.left:
        return "part", f"{len(found.left)} cases are left: {', '.join(found.left)[:200]}"
    return "ok", ""


def _process(step: Step, path: Path, log: Path, until: float, quiet: float, environment: Mapping[str, str]) -> tuple[int, str]:
    """The exit status of one process of the step, and what it died of."""
    more = {"GPU_REPORT_FILE": str(path), "GPU_REPORT_FOLDER": str(path.parent), "PYTHONUNBUFFERED": "1"}
    with open(path, "ab") as out, open(log, "ab") as errors:
        process = subprocess.Popen(
            step.command,
            stdout=out,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            env={**environment, **more},
            start_new_session=True,
        )
    why, size, since = "", -1, time.time()
    try:
        while process.poll() is None:
            time.sleep(0.05)
            now, here = time.time(), path.stat().st_size + log.stat().st_size
            if here != size:
                size, since = here, now
            # a step without cases may be silent for as long as it likes
            if now > until or (now - since > quiet and read(path).begun is not None):
                why = "" if now > until else f"no answer for {now - since:.0f} s"
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
        process.wait()
    if not path.read_bytes().endswith(b"\n"):
        with open(path, "ab") as out:
            out.write(b"\n")
    return process.returncode, why or f"the process ended with {process.returncode}: {' '.join(_tail(log)[-1:])[:300]}"


def _write(path: Path, line: Record) -> None:
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def _tail(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return [line for line in lines if line.strip()][-LAST:]
