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


# A check of checks.h that is taken out, and what then must be seen, under ASan and UBSan, when rotary is called.
CHECKS = {
    "shapes": ("if (!fits) refuse_shape", "if (false) refuse_shape", "null pointer"),
    "strides": ("if (!side_by_side &&", "if (false &&", "heap-buffer-overflow"),
    "memory": ("!over && end <= stored", "true", "heap-buffer-overflow"),
    "null": ("v.data != nullptr", "true", "null pointer"),
    "place": ("% uintptr_t(bytes) == 0", ">= 0", "misaligned address"),
}


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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def libraries() -> dict[str, Path]:
    """address and thread: the library with that sanitizer and planted.cpp; without ...: with ASan and without a check; guard:
    guard.cpp; planted: planted.cpp alone."""
    from torch.utils import cpp_extension

    sources = [ROOT / "csrc" / "schema.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), HERE / "planted.cpp"]
    sources.sort(key=lambda p: p.name not in ("linear.cpp", "attention.cpp", "norm.cpp"))  # what takes longest, first
    checks = ROOT / "csrc" / "checks.h"
    headers = b"".join(p.read_bytes() for p in sorted((ROOT / "csrc").rglob("*.h")))
    version = subprocess.run([compiler(), "--version"], capture_output=True).stdout
    start = hashlib.sha256(headers + version)
    flags, small, folder = _flags(), ["-std=c++20", "-O1", "-fPIC", "-shared"], ROOT / "build" / "sanitize"
    folder.mkdir(parents=True, exist_ok=True)

    def made_of(what: str, source: Path, ending: str, *flags: str) -> tuple[Path, tuple[object, ...]]:
        """Where it is kept, by the state of all that it is made of; the command that makes it."""
        state = start.copy()
        state.update(repr(flags).encode() + source.read_bytes())
        made = folder / f"{what}-{source.stem}-{state.hexdigest()[:16]}{ending}"
        return made, (compiler(), *flags, source, "-o", made.with_suffix(".part"))

    objects = {name: [made_of(name, s, ".o", *flags, *SANITIZED, *OF[name], "-c") for s in sources] for name in OF}
    alone = {
        "guard": made_of("plain", HERE / "guard.cpp", ".so", *small),
        "planted": made_of("plain", HERE / "planted.cpp", ".so", *small, "-DRK_ALONE"),
    }
    without: dict[str, tuple[Path, tuple[object, ...]]] = {}
    for name, (old, new, _) in CHECKS.items():
        copy = folder / f"without-{name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", copy / "csrc", ignore=shutil.ignore_patterns("cuda"))
        text = checks.read_text()
        assert text.count(old) == 1, f"checks.h does not hold {old!r} once"
        (copy / "csrc" / "checks.h").write_text(text.replace(old, new))
        rotary = copy / "csrc" / "cpu" / "rotary.cpp"
        without[name] = made_of(
            "without", rotary, f"-{name}.o", *flags, *SANITIZED, *OF["address"], f"-DRK_{_hash(old + new)}", "-c"
        )
    jobs = [job for pair in zip(*objects.values(), strict=True) for job in pair] + list(alone.values()) + list(without.values())
    kept = {made for made, _ in jobs}
    for old in folder.glob("*-*-*.*"):
        if old not in kept:
            old.unlink()

    def make(job: tuple[Path, tuple[object, ...]]) -> None:
        made, command = job
        if not made.exists():
            _run(*command)
            made.with_suffix(".part").rename(made)  # whole or not at all

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(make, jobs))
    torch_libraries = Path(cpp_extension.library_paths()[0])
    linked = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl", f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}"]
    wanted = {name: [made for made, _ in parts] for name, parts in objects.items()}
    for name, (made, _) in without.items():
        # first: of a function that several files hold, the first one's is linked
        wanted[f"without {name}"] = [made, *(o for o in wanted["address"] if "-rotary-" not in o.name)]
    libraries = {name: made for name, (made, _) in alone.items()}
    for name, parts in wanted.items():
        libraries[name] = folder / f"{name.replace(' ', '-')}.so"
        _run(compiler(), "-shared", *OF.get(name, OF["address"]), *parts, *linked, "-o", libraries[name])
    return libraries
