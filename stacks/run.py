"""Every stack of stacks/pins in an environment of its own: `make stacks`, or python stacks/run.py [NAME ...] in the main venv.

Builds a wheel of this checkout and the environments that are missing, installs the wheel into them, runs each one's tests, and
lets stacks/compare.py hold the systems' bits against one another. Everything is kept in .stacks, and a second run
installs nothing that has not changed. What cannot be installed is a failure: nothing is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from compare import TESTS
from compare import main as compare
from rich.console import Console

HERE = Path(__file__).parent
ROOT = HERE.parent
KEPT = ROOT / ".stacks"
# A model comes from a folder or not at all, and nobody is told that a test ran.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "TOKENIZERS_PARALLELISM": "false",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
INSTALL = ("-m", "pip", "install", "--quiet", "--no-compile")  # of most files nobody will ask for the bytecode
console = Console(soft_wrap=True, highlight=False)


class Failed(Exception):
    pass


def call(what: str, command: Sequence[str | Path], **env: str) -> None:
    """Shows what is done, how long it took, and all that it said if it failed."""
    began = time.monotonic()
    console.print(f"{what} ...", end="")
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    console.print(f" {time.monotonic() - began:.0f} s")
    if done.returncode:
        raise Failed(f"{what}: exit code {done.returncode}\n{shlex.join(map(str, command))}\n{done.stdout.decode()}")


def environment(**more: str) -> dict[str, str]:
    """Without PYTHONPATH: what a stack imports is what was installed into it."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RERANK_KERNELS_BACKEND")} | QUIET | more


def stamp_of(*paths: Path) -> str:
    hashed = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".toml", ".txt") and not file.name.startswith("_no"):
                hashed.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return hashed.hexdigest()


def unless(stamp: Path, wanted: str) -> bool:
    return not (stamp.is_file() and stamp.read_text() == wanted)


def wheel() -> tuple[Path, str]:
    """A wheel of this checkout with the C++ library, built by the main venv's tools; and the hash of what it is made of.

    From a copy: a build leaves files in its tree, and says there why it left a library out.
    """
    folder, parts = KEPT / "wheel", [ROOT / name for name in ("rerank_kernels", "csrc", "setup.py", "pyproject.toml")]
    hashed = stamp_of(*parts)
    if unless(folder / "stamp", hashed):
        shutil.rmtree(folder, ignore_errors=True)
        source = folder / "source"
        source.mkdir(parents=True)
        for part in (*parts, *(ROOT / name for name in ("README.md", "LICENSE", "MANIFEST.in", "NUMERICS.md"))):
            if part.is_dir():
                shutil.copytree(part, source / part.name, ignore=shutil.ignore_patterns("*.so", "_no*.txt", "__pycache__"))
            else:
                shutil.copy(part, source)
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
        call("wheel", pip, RERANK_KERNELS_BUILD_CPU="1", RERANK_KERNELS_BUILD_CUDA="0")
        (folder / "stamp").write_text(hashed)
    (found,) = folder.glob("*.whl")
    return found, hashed


def venv(folder: Path, name: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    call(f"{name}: environment", [sys.executable, "-m", "venv", folder])


def site_of(python: Path) -> Path:
    return next((python.parent.parent / "lib").glob("python3*/site-packages"))


def with_torch(torch: str) -> Path:
    """The python of an environment that holds PyTorch and what it needs, and nothing else: it is large, and all stacks see it
    behind their own packages."""
    folder = KEPT / "torch"
    python = folder / "bin" / "python"
    if unless(folder / "stamp", torch):
        venv(folder, "torch")
        call(torch.split()[0], [python, *INSTALL, *shlex.split(torch)])  # by itself: TORCH may name an index of its own
        (folder / "stamp").write_text(torch)
    return python


def build(name: str, torch: str, built: Path, hashed: str) -> Path:
    """The stack's environment, with the wheel in it; its python."""
    folder = KEPT / name
    python, pins, tests = folder / "bin" / "python", HERE / "pins" / f"{name}.txt", HERE / "pins" / "tests.txt"
    wanted = stamp_of(pins, tests) + torch
    if unless(folder / "stamp", wanted):
        venv(folder, name)
        (site_of(python) / "torch.pth").write_text(f"{site_of(with_torch(torch))}\n")
        call(f"{name}: pins", [python, *INSTALL, "-r", pins, "-r", tests])
        (folder / "stamp").write_text(wanted)
    if unless(folder / "wheel", hashed):
        # with what it depends on, as a user would: conftest.py sees to it that this moved no pin
        install = f"{python} -m pip uninstall --quiet --yes rerank-kernels; exec {python} -m pip install --quiet {built}"
        call(f"{name}: rerank_kernels", ["sh", "-c", install])
        (folder / "wheel").write_text(hashed)
    return python


def test(name: str, python: Path, arguments: Sequence[str]) -> bool:
    """Runs the stack's tests, whose output is shown; True if all passed."""
    (KEPT / "results").mkdir(exist_ok=True)
    (KEPT / "results" / f"{name}.json").unlink(missing_ok=True)
    said = {"STACKS_NAME": name, "STACKS_DATA": str(KEPT / "data"), "STACKS_RESULTS": str(KEPT / "results")}
    # Not `python -m pytest`, which would put this checkout before what is installed. -W: the systems' own warnings fill pages.
    command = [
        python.with_name("pytest"),
        HERE / TESTS[name],
        "-o",
        "addopts=",
        "-rs",
        "-W",
        "ignore",
        "--durations=3",
        *arguments,
    ]
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment(**said)).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The tests of every system that rk.patch takes, each in its own environment.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TESTS)}; all if none is given")
    parser.add_argument(
        "--torch", default=os.environ.get("TORCH", "torch==2.13.0"), help="what pip is given to install PyTorch"
    )
    parser.add_argument("--place", action="store_true", help="write the figures into the pages; only for a run of all")
    parser.add_argument("-k", help="passed on to pytest, and nothing is compared: only these tests")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(TESTS):
        parser.error(f"no such stack: {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
    names = [name for name in TESTS if name in args.names] or list(TESTS)
    began, failed = time.monotonic(), []
    try:
        KEPT.mkdir(exist_ok=True)
        built, hashed = wheel()
        call("models and pairs", [sys.executable, HERE / "prepare.py", KEPT / "data"])
        for i, name in enumerate(names):
            since = time.monotonic()
            console.rule(f"{name}, {i + 1} of {len(names)}, after {since - began:.0f} s", align="left")
            python = build(name, args.torch, built, hashed)
            if not test(name, python, ["-k", args.k] if args.k else []):
                failed.append(name)
            console.print(f"{name}: {time.monotonic() - since:.0f} s{', FAILED' if name in failed else ''}")
    except Failed as error:
        console.print(str(error), markup=False)
        return 1
    if not args.k:
        failed += compare([*names, *(["--place"] if args.place and not failed else [])]) * ["compare"]
    console.print(
        f"{len(names)} stacks: {time.monotonic() - began:.0f} s; "
        + (f"FAILED: {', '.join(failed)}" if failed else "all passed")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
