"""Hardware counters of our kernels that the steps `ways-…` found furthest behind their rivals, read by Nsight Compute.

work counters             picks them, and starts ncu on this file for each
work counters CASE WHO    makes that call once, between the profiler's start and stop
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from typing import Any

from tools.gpu_report.runner import read
from tools.gpu_report.work.cases import cases, folder, say

MOST = 6
WAYS = ("ways-cuda", "ways-triton")  # the steps with the times
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
SECTIONS += ("Occupancy", "LaunchStats")


def main(case: str = "", who: str = "") -> None:
    if case:
        once(case, who)
        return
    ncu = shutil.which("ncu")
    if ncu is None:
        say(note="no ncu on PATH: it comes with Nsight Compute; nothing was counted")
        return
    chosen = slowest([r for name in WAYS for r in read(folder() / f"{name}.jsonl").records])
    if not chosen:
        sys.exit("the steps before have no times of ours beside a rival's: nothing to choose from")
    for name in cases(list(chosen)):
        case, who = chosen[name]
        for record in counted(ncu, case, who):
            say(case=name, who=who, **record)


def slowest(records: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Name -> (case, who): one of each op, mode and dtype first, by our own choice's time over the best rival's."""
    best: dict[str, float] = {}
    for r in records:
        if "ms" in r and not r["ours"]:
            best[r["case"]] = min(r["ms"], best.get(r["case"], r["ms"]))
    ours = [r for r in records if "ms" in r and r["ours"] and r["way"] is None and r["case"] in best]
    ours.sort(key=lambda r: r["ms"] / best[r["case"]], reverse=True)
    kinds: dict[tuple[str, ...], dict[str, Any]] = {}
    for r in ours:
        kinds.setdefault((r["case"].split(" ")[0], r["case"].split(" ")[-1], r["who"]), r)
    return {f"{r['case']}, {r['who']}": (r["case"], r["who"]) for r in list(kinds.values())[:MOST]}


def counted(ncu: str, case: str, who: str) -> list[dict[str, Any]]:
    """One record per kernel that the call starts."""
    work = os.path.dirname(__file__)
    command = [ncu, "--csv", "--page", "details", "--profile-from-start", "off", "--clock-control", "none"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    done = subprocess.run([*command, sys.executable, work, "counters", case, who], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if "ERR_NVGPUCTRPERM" in said:
        return [{"error": "the driver lets only an administrator read counters (ERR_NVGPUCTRPERM)"}]
    found = kernels(done.stdout)
    return found or [{"error": f"ncu ended with {done.returncode}: {' '.join(said.split())[-300:]}"}]


def kernels(said: str) -> list[dict[str, Any]]:
    """Of ncu's table, which stands between lines of its own and of the program."""
    lines = said.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[begin:]):
        if row.get("Metric Name"):
            record = found.setdefault(row["ID"], {"kernel": row["Kernel Name"], "metrics": {}})
            unit = f", {row['Metric Unit']}" if row.get("Metric Unit") else ""
            record["metrics"][f"{row['Metric Name']}{unit}"] = row["Metric Value"]
    return list(found.values())


def once(case: str, who: str) -> None:
    import torch

    from bench.harness import gpu
    from tools.gpu_report.work.ways import table

    work = table()[case](gpu.place("cuda", False))
    (one,) = [c for c in work.contestants if c.name == who]
    with torch.no_grad(), one.around():
        for i in range(3):  # compiled, laid out, warm
            one.call(i)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        one.call(3)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
