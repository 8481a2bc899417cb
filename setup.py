"""Builds rerank_kernels._C (ops, torch stable ABI) and rerank_kernels._host (pybind11, torch-free).

RERANK_KERNELS_BUILD_CPU = auto (default: built if torch and a C++ compiler are there, else the package installs without it
and says so) | 0 (never) | 1 (required: a failure fails the install).
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
WANT = os.environ.get("RERANK_KERNELS_BUILD_CPU", "auto")

# The numeric contract's flags (NUMERICS.md, "Flags"): a compiler must neither fuse nor reorder what the source says.
NUMERIC_FLAGS = ["-ffp-contract=off", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-fvisibility=hidden",
    "-fno-math-errno",
    *NUMERIC_FLAGS,
]


NOT_BUILT = ROOT / "rerank_kernels" / "_not_built.txt"  # read by rerank_kernels/native/__init__.py


def leave_out(reason: str) -> None:
    """Install without the library, and let the package say why, since pip keeps quiet about it."""
    NOT_BUILT.write_text(reason + "\n", encoding="utf-8")
    say(f"installing without the C++ library: {reason}; the pytorch backend will serve")


def say(text: str) -> None:
    # stderr: pip shows it with -v, and always when an install fails
    print(f"rerank_kernels: {text}", file=sys.stderr, flush=True)


def why_not() -> str | None:
    """What a build lacks, None if nothing."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler on PATH (install g++ 11 or newer)"
    try:
        import torch
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not visible to the build (install torch first, then pip install --no-build-isolation .)"
    return None


def extensions() -> tuple[list, dict]:
    if WANT not in ("auto", "0", "1"):
        raise SystemExit(f"RERANK_KERNELS_BUILD_CPU must be auto, 0 or 1, got {WANT!r}")
    reason = "RERANK_KERNELS_BUILD_CPU=0" if WANT == "0" else why_not()
    if reason is not None:
        if WANT == "1":
            raise SystemExit(
                f"rerank_kernels: the CPU library is required (RERANK_KERNELS_BUILD_CPU=1) and cannot be built: {reason}"
            )
        leave_out(reason)
        return [], {}

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """With auto, a failed compilation leaves the pure-Python package, and says so."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # of the compiler's check, of ninja, of the linker
                if WANT == "1":
                    raise
                leave_out(f"it did not compile ({error}; pip install -v shows the compiler's messages)")
                self.extensions = []  # nothing to copy
                collected = pathlib.Path(self.build_lib) / "rerank_kernels"  # package data was gathered before this step
                if not self.inplace and collected.is_dir():
                    shutil.copy(NOT_BUILT, collected)

    # File names relative to this folder: setuptools refuses absolute ones.
    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    facts = f"torch {torch.__version__}; flags {' '.join(FLAGS)}"
    built = [
        CppExtension(
            "rerank_kernels._C",
            ["csrc/schema.cpp", *kernels],
            extra_compile_args=[*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"],
            depends=headers,
            py_limited_api=True,
        )
    ]
    try:
        import pybind11
    except ImportError:
        say("pybind11 is not installed: leaving out rerank_kernels._host, which only tests and `rerank-kernels info` use")
    else:
        built.append(
            CppExtension(
                "rerank_kernels._host",
                ["csrc/host.cpp"],
                include_dirs=[pybind11.get_include()],
                extra_compile_args=[*FLAGS, f'-DRK_BUILD_FACTS="{facts}"'],
                depends=headers,
            )
        )
    return built, {"build_ext": Build}


NOT_BUILT.unlink(missing_ok=True)
ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
