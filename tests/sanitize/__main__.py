"""make sanitize: nothing is read or written outside of an array, and no thread races another, whatever an op is called with.

    python tests/sanitize [--seconds 40] [--seed 1] [--only address guard thread]

address  the library built with ASan and UBSan: well-formed calls (calls.py), hostile ones, and the tests of a few families
guard    the library as it is installed, with arrays and all that it allocates beside pages that nobody may touch (memory.py,
         guard.cpp): what a masked load or store of AVX-512 touches is seen here alone
thread   the library built with TSan: ops on several threads of its own pool, from several callers at once

All on every instruction set of the machine. Each part also makes the mistakes that it is for (planted.cpp), and fails if it
does not see one. The seeds are the same in every run; --seed begins elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sanitize import build

STRESS = build.HERE / "stress.py"
SUPPRESSED = Path(__file__).with_name("thread.supp")
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0:verify_asan_link_order=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode=66:report_signal_unsafe=0:suppressions={SUPPRESSED}",
}
TESTS = ("norm", "softmax", "pooling")
OF_CPU = "not cuda and not triton and not pytorch and not golden"


@dataclass
class Run:
    part: str
    what: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    must_say: tuple[str, ...] = ()  # a control: the process must fail, with these words
    outcome: str = ""
    good: bool = False
    seconds: float = 0.0

    def go(self) -> Run:
        begun = time.monotonic()
        environment = {**os.environ, **SETTINGS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.environment}
        done = subprocess.run(self.command, capture_output=True, text=True, env=environment, cwd=build.ROOT)
        self.seconds = time.monotonic() - begun
        said = done.stdout + done.stderr
        if self.must_say:
            self.good = done.returncode != 0 and all(word in said for word in self.must_say)
            self.outcome = "seen" if self.good else f"NOT SEEN, exit status {done.returncode}"
        else:
            self.good = done.returncode == 0
            self.outcome = counted(done.stdout) if self.good else f"FAILED, exit status {done.returncode}"
        if not self.good:
            self.outcome += "\n" + report(said)
        return self


def report(said: str) -> str:
    """From where something was found, for about a screen."""
    first = re.search(
        r"runtime error:|ERROR: AddressSanitizer|WARNING: ThreadSanitizer|CHECK failed|Fatal Python error|guard:", said
    )
    return said[first.start() :][:4000] if first else said[-4000:]


def counted(said: str) -> str:
    last = said.strip().splitlines()[-1]
    if not last.startswith("{"):
        return next((line for line in said.splitlines() if line.startswith("cpu:")), last)
    counts = json.loads(last)
    words = {"seeds": "seeds", "runs": "calls", "refused": "refused", "served": "served", "blocks": "guarded blocks"}
    return (
        ", ".join(f"{counts[key]:,} {word}" for key, word in words.items() if counts.get(key))
        + " on "
        + ", ".join(counts["isas"])
    )


def runs(parts: list[str], libraries: dict[str, Path], seed: int, seconds: float) -> Iterator[Run]:
    def stress(*arguments: object) -> list[str]:
        return [sys.executable, str(STRESS), "--seeds", f"{seed}:{seed + 100_000}", *map(str, arguments)]

    def control(mistake: str, library: str, *arguments: object) -> list[str]:
        few = ["--seeds", "1:2", "--ops", "softmax", "--planted", mistake, "--mistakes", str(libraries[library])]
        return [sys.executable, str(STRESS), *few, *map(str, arguments)]

    if "address" in parts:
        ours = ["--library", libraries["address"]]
        loaded = {"LD_PRELOAD": build.preload("address")}
        yield Run("address", "well-formed", stress(*ours, "--seconds", seconds), loaded)
        yield Run("address", "hostile", stress(*ours, "--hostile", "--seconds", seconds), loaded)
        package = package_with(libraries["address"])
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-k",
            OF_CPU,
            *(str(build.ROOT / "tests" / "ops" / f"test_{t}.py") for t in TESTS),
        ]
        yield Run("address", "tests of three families", tests, {**loaded, "PYTHONPATH": str(package.parent)})
        for mistake, seen in (
            ("over_read", ("heap-buffer-overflow", "planted_over_read")),
            ("over_write", ("heap-buffer-overflow", "planted_over_write")),
            ("overflow", ("signed integer overflow", "planted.cpp")),
        ):
            command = control(mistake, "address", *ours)
            yield Run("address", f"control: {mistake.replace('_', '-')}", command, loaded, seen)
        for check, (_, _, word) in build.CHECKS.items():
            few = ["--seeds", "1:60", "--hostile", "--ops", "rotary", "--isa", "scalar"]
            command = [sys.executable, str(STRESS), *few, "--library", str(libraries[f"without {check}"])]
            yield Run("address", f"control: no check of {check}", command, loaded, (word,))
    if "guard" in parts:
        loaded = {"LD_PRELOAD": str(libraries["guard"])}
        yield Run("guard", "well-formed", stress("--guarded", "--seconds", seconds), loaded)
        yield Run("guard", "hostile", stress("--guarded", "--hostile", "--seconds", seconds), loaded)
        fault, behind = ("Segmentation fault", "in plant"), ("written behind the last byte",)
        yield Run("guard", "control: masked over-read of an input", control("guarded_over_read", "planted"), loaded, fault)
        yield Run("guard", "control: over-read of a block", control("over_read", "planted"), loaded, fault)
        yield Run("guard", "control: over-write of a block", control("over_write", "planted"), loaded, behind)
    if "thread" in parts:
        ours = ["--library", libraries["thread"], "--threads", 4, "--callers", 3]
        loaded = {"LD_PRELOAD": build.preload("thread")}
        yield Run("thread", "well-formed", stress(*ours, "--largest", 8, "--seconds", seconds), loaded)
        yield Run("thread", "control: race", control("race", "thread", *ours), loaded, ("data race", "planted_race"))


def package_with(library: Path) -> Path:
    """The package with that library in place of its own, for the tests."""
    copy = library.parent / "package" / "rerank_kernels"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(build.ROOT / "rerank_kernels", copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_not_built.txt"))
    shutil.copy(library, copy / "_C.abi3.so")
    for host in (build.ROOT / "rerank_kernels").glob("_host*.so"):
        shutil.copy(host, copy)
    return copy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each kind of calls (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="the first one (default: 1)")
    parser.add_argument("--only", nargs="+", choices=("address", "guard", "thread"), default=("address", "guard", "thread"))
    options = parser.parse_args()
    begun = time.monotonic()
    libraries = build.libraries()
    print(f"built in {time.monotonic() - begun:.0f} s", flush=True)
    good = True
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        waiting = [pool.submit(run.go) for run in runs(list(options.only), libraries, options.seed, options.seconds)]
        for future in waiting:
            run = future.result()
            good = good and run.good
            print(f"{run.part:8} {run.what:38} {run.seconds:5.0f} s  {run.outcome}", flush=True)
    print(f"{time.monotonic() - begun:.0f} s: {'nothing found' if good else 'SOMETHING IS WRONG'}")
    return not good


if __name__ == "__main__":
    sys.exit(main())
