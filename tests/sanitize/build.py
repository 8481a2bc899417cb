"""The C++ library with a sanitizer in it, and the two small libraries beside: built once per state of the sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# -O1: what is left of the source's accesses, and a stack that a report can name
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer"]
OF = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX") or "g++")
    if found is None:
        raise SystemExit("sanitize: there is no g++ (install it, or set CXX)")
    return found


def preload(sanitizer: str) -> str:
    """LD_PRELOAD for a Python that loads such a library: the sanitizer's own before all others, and libstdc++, which a program
    in C has not loaded and in which the sanitizer looks for what throws an exception."""
    found = []
    for name in (RUNTIME[sanitizer], "libstdc++.so.6"):
        said = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(said).is_absolute():
            raise SystemExit(f"sanitize: {compiler()} has no {name}: install g++ with its sanitizers")
        found.append(said)
    return " ".join(found)


def _flags() -> list[str]:
    """Those of setup.py that decide about arithmetic and language; how far to optimise is decided here."""
    from torch.utils import cpp_extension

    text = (ROOT / "setup.py").read_text()
    names: dict[str, list[str]] = {}
    exec(text[text.index("NUMERIC_FLAGS =") : text.index("GCC_FLAGS =")], names)
    kept = [f for f in names["FLAGS"] if not f.startswith(("-O", "-g"))]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DRK_BUILD_FACTS="a build with sanitizers"', "-fPIC"]
    wide = "-Wno-maybe-uninitialized"
    return [*kept, wide, *stable, *(f"-isystem{path}" for path in cpp_extension.include_paths())]


def _run(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"sanitize: this failed: {' '.join(map(str, command))}\n{done.stderr[:4000]}")


def libraries() -> dict[str, Path]:
    """address and thread: the library with that sanitizer and planted.cpp; guard: guard.cpp; planted: planted.cpp alone."""
    from torch.utils import cpp_extension

    sources = [ROOT / "csrc" / "schema.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), HERE / "planted.cpp"]
    everything = [*sorted((ROOT / "csrc").rglob("*.h")), *sources, HERE / "guard.cpp"]
    flags = _flags()
    version = subprocess.run([compiler(), "--version"], capture_output=True).stdout + repr((flags, SANITIZED, OF)).encode()
    state = hashlib.sha256(b"\0".join([version, *(p.read_bytes() for p in everything)])).hexdigest()[:16]
    folder = ROOT / "build" / "sanitize" / state
    made = {name: folder / f"{name}.so" for name in (*OF, "guard", "planted")}
    if all(path.exists() for path in made.values()):
        return made
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    # the largest first: they end together
    jobs = [
        (compiler(), *flags, *SANITIZED, *OF[name], "-c", source, "-o", folder / f"{name}-{source.stem}.o")
        for source in sorted(sources, key=lambda p: p.name not in ("linear.cpp", "attention.cpp", "norm.cpp"))
        for name in OF
    ]
    small = ["-std=c++20", "-O1", "-fPIC", "-shared"]
    jobs += [
        (compiler(), *small, HERE / "guard.cpp", "-o", made["guard"]),
        (compiler(), *small, "-DRK_ALONE", HERE / "planted.cpp", "-o", made["planted"]),
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda job: _run(*job), jobs))
    torch_libraries = Path(cpp_extension.library_paths()[0])
    linked = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}"]
    for name in OF:
        objects = sorted(folder.glob(f"{name}-*.o"))
        _run(compiler(), "-shared", *OF[name], *objects, *linked, "-o", made[name])
    return made
