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

from .once import alone
from .parse import SimulatorError

HERE = Path(__file__).resolve().parent
# No flag here changes a result: no contraction, no fast-math; the two last say only that nobody reads errno or traps.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math"]
WANTED = ["avx2", "fma", "f16c", "bmi2"]  # AVX-512 was no faster


def cache_folder() -> Path:
    return Path(os.environ.get("RERANK_KERNELS_CACHE") or HERE.parents[1] / "build" / "ptxsim")


def _cpu_flags() -> list[str]:
    """-mavx2 and so on if this processor has them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        words = set(Path("/proc/cpuinfo").read_text().split("\nflags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return []
    return ["-m" + name for name in WANTED] if words.issuperset(WANTED) else []


def _objects(flags: list[str]) -> dict[Path, str]:
    """Each source of the machine with a hash of all that its object file depends on."""
    headers = b"".join(p.read_bytes() for p in sorted((HERE / "machine").glob("*.h")))
    start = hashlib.sha256("\n".join(flags).encode() + headers).digest()
    sources = sorted((HERE / "machine").glob("*.cpp"), key=lambda p: -p.stat().st_size)
    return {p: hashlib.sha256(start + p.name.encode() + p.read_bytes()).hexdigest()[:16] for p in sources}


def _build(target: Path, flags: list[str], objects: dict[Path, str]) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        raise SimulatorError("the PTX simulator needs g++ (or $CXX)")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def build(source: Path) -> str:
            made = target.parent / f"{source.stem}-{objects[source]}.o"
            if not made.exists():
                out = os.path.join(folder, made.name)
                done = subprocess.run([compiler, *flags, "-c", str(source), "-o", out], capture_output=True, text=True)
                if done.returncode:
                    raise SimulatorError(f"the simulator's machine does not compile: {source.name}\n{done.stderr[:4000]}")
                os.replace(out, made)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            made = list(pool.map(build, objects))
        whole = os.path.join(folder, "machine.so")
        done = subprocess.run([compiler, "-shared", *made, "-o", whole], capture_output=True, text=True)
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
    objects = _objects(flags)
    target = cache_folder() / f"machine-{hashlib.sha256(''.join(objects.values()).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        with alone(target):
            if not target.exists():
                _build(target, flags, objects)
    return Library(target)
