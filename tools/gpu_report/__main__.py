"""python tools/gpu_report [--minutes N] [--out DIR] [--dry-run] [--only STEP] [--no-build] [--place PAGE]: see the package."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:1] = [str(ROOT)]  # instead of this folder, whose names are not for everyone

from tools import pages  # noqa: E402
from tools.gpu_report import machine, outcome  # noqa: E402
from tools.gpu_report.runner import Result, run  # noqa: E402
from tools.gpu_report.steps import Step, planned, steps  # noqa: E402

WIDTH = 20  # of a step's name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make gpu-report", description="Checks and times this library on the GPU of this machine, within a few minutes."
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it, the build included (default: 8)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu-report", metavar="DIR", help="default: build/gpu-report"
    )
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="only steps with this in their name")
    parser.add_argument("--no-build", action="store_true", help="take the library that this python has installed")
    parser.add_argument("--dry-run", action="store_true", help="list the steps in order, with their times, and end")
    parser.add_argument(
        "--place", type=Path, metavar="PAGE", help="write the tables of DIR/report.json into this page, and end"
    )
    args = parser.parse_args(argv)
    if not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes must be a number above 0, got {args.minutes:g}")
    folder = args.out.resolve()
    if args.place:
        return place(folder, args.place)
    build = not args.no_build
    listed = [s for s in steps(build=build) if not args.only or s.name == "build" or any(w in s.name for w in args.only)]
    if not [s for s in listed if s.name != "build"]:
        parser.error(f"--only {' '.join(args.only)} names no step; there are {', '.join(s.name for s in steps(build=False))}")
    environment = machine.environment(folder, build)
    facts = machine.facts(environment)
    lacking = machine.lacks(facts, build)
    if args.dry_run:
        print(plan(listed, 60 * args.minutes))
        print("\n".join(f"missing here: {words}" for words in lacking) or f"this machine can run it: {facts['gpu']}")
        return 0
    if lacking:
        print("gpu-report cannot run here. Missing:", *lacking, sep="\n  - ", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "tools/gpu_report", *(sys.argv[1:] if argv is None else argv)])
    about = {**facts, "began": time.time(), "command": command, "minutes": args.minutes}
    print(
        f"{facts['gpu']}, compute capability {facts['capability']}, torch {facts['torch']}: {args.minutes:g} minutes, {folder}"
    )
    if build and not facts["ninja"]:
        print("no ninja: the build takes one core, and minutes; with a network: pip install ninja")
    found = report(listed, folder, machine.key(facts), 60 * args.minutes, environment, about)
    print(outcome.terminal(found))
    print(f"\nwritten: {folder / 'report.json'}, {folder / 'report.html'}; to help, send report.json back")
    return 1 if outcome.wrong(found) or outcome.unwell(found) else 0


def plan(listed: list[Step], seconds: float) -> str:
    lines, before = [], 0.0
    for number, (step, given) in enumerate(planned(listed, seconds), 1):
        lines.append(f"{number:2d}. {step.name:{WIDTH}s} {given:5.0f} s  from {before:4.0f} s  {step.question}")
        before += given
    return "\n".join(
        [f"{len(listed)} steps, {before:.0f} s if each takes all of its time; what one leaves is for those behind it", *lines]
    )


def report(
    listed: list[Step], folder: Path, key: machine.Facts, seconds: float, environment: dict[str, str], about: machine.Facts
) -> outcome.Content:
    """Runs, and writes what is there after every step: whoever breaks it off has the rest."""
    done: dict[str, Result] = {}

    def keep() -> outcome.Content:
        found = outcome.content(about, [done[s.name] for s in listed if s.name in done])
        outcome.write(folder / "report.json", found)
        return found

    def tell(step: Step, words: str, result: Result | None) -> None:
        if result is None:
            print(f"[{len(done) + 1}/{len(listed)}] {step.name}, up to {words}: {step.question}", flush=True)
            return
        done[step.name] = result
        keep()
        said = f"{len(result.records)} findings" + (f", {len(result.wrong)} WRONG" if result.wrong else "")
        why = f": {result.why}" if result.why else ""
        print(f"      {step.name}: {words}, {result.seconds:.0f} s, {said}{why}", flush=True)
        for last in result.last[-4:]:
            print(f"    {last[:160]}")

    try:
        run(listed, folder, key, seconds, environment, tell)
    except KeyboardInterrupt:
        print("broken off; the same command goes on from here")
    about["seconds"] = round(time.time() - about["began"], 1)
    found = keep()
    from tools.gpu_report import page

    (folder / "report.html").write_text(page.written(found), encoding="utf-8")
    return found


def place(folder: Path, path: Path) -> int:
    source = folder / "report.json"
    if not source.is_file():
        print(f"there is no {source}: run this first without --place, or name its folder with --out", file=sys.stderr)
        return 2
    try:
        changed = pages.write(path, outcome.WRITER, outcome.blocks(json.loads(source.read_text(encoding="utf-8"))))
    except pages.Wrong as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{path}: {', '.join(changed) or 'nothing'} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
