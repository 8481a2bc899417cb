"""Builds the machine (machine/*.cpp) with g++, once, into a cache, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .parse import SimulatorError

HERE = Path(__file__).resolve().parent
# No flag here changes a result: no contraction, no fast-math; the two last say only that nobody reads errno or traps.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]
WANTED = ["avx2", "fma", "f16c", "bmi2"], ["avx512f", "avx512bw", "avx512dq", "avx512vl"]


def cache_folder() -> Path:
    return Path(os.environ.get("RERANK_KERNELS_CACHE") or HERE.parents[1] / "build" / "ptxsim")


def _cpu_flags() -> list[str]:
    """-mavx2 and so on, as far as this processor has them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        words = set(Path("/proc/cpuinfo").read_text().split("\nflags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return []
    out: list[str] = []
    for group in WANTED:
        if not words.issuperset(group):
            break
        out += ["-m" + name for name in group]
    return out


def _build(target: Path, flags: list[str]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        raise SimulatorError("the PTX simulator needs g++ (or $CXX)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compile(source: Path) -> str:
            out = os.path.join(folder, source.stem + ".o")
            done = subprocess.run([compiler, *flags, "-c", str(source), "-o", out], capture_output=True, text=True)
            if done.returncode:
                raise SimulatorError(f"the simulator's machine does not compile: {source.name}\n{done.stderr[:4000]}")
            return out

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile, sorted((HERE / "machine").glob("*.cpp"), key=lambda p: -p.stat().st_size)))
        whole = os.path.join(folder, "machine.so")
        done = subprocess.run([compiler, "-shared", *objects, "-o", whole], capture_output=True, text=True)
        if done.returncode:
            raise SimulatorError(f"the simulator's machine does not link\n{done.stderr[:4000]}")
        os.replace(whole, target)  # whole or not at all, also with two processes at it


class Library:
    def __init__(self, path: Path) -> None:
        c = ctypes.CDLL(str(path))
        c.ptxsim_names.restype = ctypes.c_char_p
        c.ptxsim_program.restype = ctypes.c_void_p
        c.ptxsim_free.argtypes = [ctypes.c_void_p]
        handlers, _, specials = c.ptxsim_names().decode().partition("\n\n")
        self.names = {name: i for i, name in enumerate(handlers.split("\n"))}
        self.specials = {name: i for i, name in enumerate(specials.split("\n")) if name}
        self.c = c


@functools.cache
def library() -> Library:
    flags = FLAGS + _cpu_flags()
    digest = hashlib.sha256("\n".join(flags).encode())
    for source in sorted((HERE / "machine").iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    target = cache_folder() / f"machine-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        _build(target, flags)
    return Library(target)
