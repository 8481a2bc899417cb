"""The installs that docs/INSTALL.md speaks of, made and run: `make installs`, or python tests/installs.py [NAME ...] [--place]

Each row gets a venv of its own, with the torch, the transformers and the compiler that it names, and a copy of these sources
installed with the C++ library required. What was installed then runs, away from the sources: the golden hashes of every op on
the cpu backend, the patch of every model type, and `verify shape:tiny`. A row that names no torch sees that of the Python
that runs this program, through a .pth file. Nothing is skipped: what cannot be installed or does not pass is a failure.

What came out is kept in build/installs; --place writes the table into docs/INSTALL.md, between `<!-- installs:matrix -->` and
`<!-- /installs -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from tools import pages  # noqa: E402

KEPT = ROOT / "build" / "installs"
PAGE = ROOT / "docs" / "INSTALL.md"
TOOLS = ("setuptools>=77", "ninja", "pytest>=8", "pytest-xdist>=3.6", "mpmath>=1.3", "numpy>=1.26", "rich>=13", "jinja2>=3.1")


@dataclass(frozen=True)
class Row:
    about: str
    requirements: tuple[str, ...] = ()  # for pip; none: those of the Python that runs this
    environment: dict[str, str] = field(default_factory=dict)


# The ends of what pyproject.toml claims, each with a CXX of two words, which torch takes otherwise in each version; and clang.
ROWS = {
    "oldest": Row("the oldest torch and transformers", ("torch==2.10.*", "transformers==4.57.*"), {"CXX": "env g++"}),
    "newest": Row("the newest torch and transformers that pip takes", ("torch", "transformers"), {"CXX": "env g++"}),
    "clang": Row("clang", (), {"CC": "clang", "CXX": "clang++"}),
}
FACTS = """
import json, platform, sys, torch, transformers, rerank_kernels as rk
from importlib.metadata import distribution
assert "site-packages" in rk.__file__, rk.__file__
table = rk.backends()
assert all(row["cpu"] == "yes" for row in table.values()), str(table)
x, w = torch.randn(5, 64), torch.randn(8, 64)
assert torch.equal(rk.linear(x, w)[3:4], rk.linear(x[3:4], w))
print(json.dumps({
    "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    "build": torch.ops.rerank_kernels.build_info(), "isa": torch.ops.rerank_kernels.force_isa(""),
    "wheel": distribution("rerank-kernels").read_text("WHEEL").split("Tag: ")[1].split()[0],
}))
"""


class Failed(Exception):
    pass


def call(what: str, command: Sequence[str | Path], cwd: Path, **more: str) -> str:
    """Says what is done and how long it took; all that it wrote if it failed."""
    began = time.monotonic()
    print(f"  {what} ...", end="", flush=True)
    left_out = ("PYTHONPATH", "RERANK_KERNELS_BACKEND", "CC", "CXX")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"} | more
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f" {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        raise Failed(f"{what}: exit code {done.returncode}\n{shlex.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def venv_of(row: Row, folder: Path) -> Path:
    """The row's Python. Without a torch of its own it sees our packages, pip among them, but not our editable install."""
    borrowed = [] if row.requirements else ["--without-pip"]
    call("venv", [sys.executable, "-m", "venv", *borrowed, folder], ROOT)
    python = folder / "bin" / "python"
    if row.requirements:
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--no-cache-dir",
            "--no-compile",
            "--progress-bar",
            "off",
            *row.requirements,
            *TOOLS,
        ]
        call(" ".join(["pip install", *row.requirements]), pip, ROOT)
    else:
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
        (site / "first.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(name: str, row: Row, scratch: Path) -> dict[str, Any]:
    print(f"{name}: {row.about}", flush=True)
    python, sources, away = venv_of(row, scratch / "venv"), scratch / "sources", scratch / "away"
    left_out = (
        ".git",
        ".venv",
        ".stacks",
        "build",
        "dist",
        "*.so",
        "*.egg-info",
        "__pycache__",
        "_not_built.txt",
        "_no_cuda.txt",
    )
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*left_out))
    required = {"RERANK_KERNELS_BUILD_CPU": "1", "RERANK_KERNELS_BUILD_CUDA": "0", **row.environment}
    call("build", [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", sources], scratch, **required)
    shutil.rmtree(sources / "rerank_kernels")  # what the tests import is the install
    away.mkdir()
    found: dict[str, Any] = json.loads(call("import", [python, "-c", FACTS], away).splitlines()[-1])
    kept = (
        "test_golden.py and cpu or test_inputs or test_close_to_stock or test_bits_do_not_depend_on_the_batch or test_unpatch"
    )
    tests = [
        python,
        "-m",
        "pytest",
        "-n",
        "auto",
        "--maxprocesses",
        "8",
        "tests/ops/test_golden.py",
        "tests/models/test_hf.py",
        "-k",
        kept,
    ]
    said = call("tests", tests, sources, RERANK_KERNELS_REQUIRE="cpu")
    found["tests"] = int(re.findall(r"(\d+) passed", said)[-1])
    if "skipped" in said:
        raise Failed(f"tests: some were skipped\n{said}")
    call("verify shape:tiny", [python, "-m", "rerank_kernels", "verify", "shape:tiny", "--no-process"], away)
    return found


def table() -> str:
    def cells(found: dict[str, Any]) -> list[str]:
        compiler = found["build"].partition(";")[0].removeprefix("compiler ")
        compiler = compiler if "lang" in compiler else f"g++ {compiler}"
        versions = [found[key].partition("+")[0] for key in ("torch", "transformers", "python")]
        return [found["about"], *versions, compiler, f"`{found['wheel']}`", f"{found['isa']}: {found['tests']} tests, verify"]

    rows = [cells(json.loads(path.read_text())) for name in ROWS if (path := KEPT / f"{name}.json").exists()]
    return pages.markdown(("install", "torch", "transformers", "Python", "compiler", "wheel", "ran on"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ROWS)}; all if none is named")
    parser.add_argument("--place", action="store_true", help="write the table of what came out into docs/INSTALL.md")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ROWS):
        parser.error(f"there is no install {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    KEPT.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.names or ROWS:
        began = time.monotonic()
        (KEPT / f"{name}.json").unlink(missing_ok=True)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                found = run(name, ROWS[name], Path(scratch))
        except Failed as error:
            failed.append(name)
            print(error, file=sys.stderr)
            continue
        (KEPT / f"{name}.json").write_text(json.dumps({"about": ROWS[name].about, **found}))
        print(f"  all of it: {time.monotonic() - began:.0f} s", flush=True)
    print(table())
    if args.place and not failed:
        pages.write(PAGE, "installs", {"matrix": table()})
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
