"""Builds rerank_kernels._C (ops on CPU tensors, torch stable ABI), rerank_kernels._cuda (the same ops on CUDA tensors; apart,
since it cannot load without PyTorch's CUDA libraries) and rerank_kernels._host (pybind11, torch-free).

RERANK_KERNELS_BUILD_CPU = auto (default: built if torch and a C++ compiler are there, else the package installs without it
and says so) | 0 (never) | 1 (required: a failure fails the install).
RERANK_KERNELS_BUILD_CUDA = auto (default: built if torch is a CUDA build and a CUDA toolkit of its major version is there; no
GPU is needed) | 0 | 1. CUDA_HOME says where the toolkit is, TORCH_CUDA_ARCH_LIST for which GPUs to compile.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any

from setuptools import setup

ROOT = pathlib.Path(__file__).parent
WANT = os.environ.get("RERANK_KERNELS_BUILD_CPU", "auto")
WANT_CUDA = os.environ.get("RERANK_KERNELS_BUILD_CUDA", "auto")
CUDA = "rerank_kernels._cuda"

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


# Why a library is missing, for the package to say: read by rerank_kernels/native/__init__.py.
NOT_BUILT = ROOT / "rerank_kernels" / "_not_built.txt"
NO_CUDA = ROOT / "rerank_kernels" / "_no_cuda.txt"


def leave_out(reason: str) -> None:
    """Install without the library, and let the package say why, since pip keeps quiet about it."""
    NOT_BUILT.write_text(reason + "\n", encoding="utf-8")
    say(f"installing without the C++ library: {reason}; the pytorch backend will serve")


def leave_out_cuda(reason: str) -> None:
    NO_CUDA.write_text(reason + "\n", encoding="utf-8")
    say(f"installing without the CUDA library: {reason}")


def refuse_cuda(reason: str) -> None:
    """Leave the CUDA library out, unless it was required."""
    if WANT_CUDA == "1":
        raise SystemExit(
            f"rerank_kernels: the CUDA library is required (RERANK_KERNELS_BUILD_CUDA=1) and cannot be built: {reason}"
        )
    leave_out_cuda(reason)


def say(text: str) -> None:
    # stderr: pip shows it with -v, and always when an install fails
    print(f"rerank_kernels: {text}", file=sys.stderr, flush=True)


def toolkit_module() -> types.ModuleType:
    """csrc/toolkit.py, which no package holds."""
    spec = importlib.util.spec_from_file_location("toolkit", ROOT / "csrc" / "toolkit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def cuda_or_why_not() -> tuple[types.SimpleNamespace | None, str]:
    """What the CUDA library is built with (home, libraries, gencode: nvcc's architecture flags), or what a build lacks."""
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        return None, "csrc/cuda holds no kernels"
    wanted = int(torch.version.cuda.split(".")[0])
    search = toolkit_module()
    kit = search.find(wanted)
    wheels = f"pip install {' '.join(repr(f'{name}=={torch.version.cuda}.*') for name in search.WHEELS)}"
    if kit is None:
        named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        where = f"CUDA_HOME={named} holds no bin/nvcc that runs" if named else "no nvcc on PATH, in /usr/local/cuda or from pip"
        return None, f"no CUDA toolkit: {where} (install CUDA {torch.version.cuda}'s, or {wheels})"
    release = ".".join(map(str, kit.version))
    if kit.version[0] != wanted:
        return None, (
            f"the CUDA toolkit at {kit.home} is {release}, and torch {torch.__version__} is built for {torch.version.cuda}: "
            f"install a toolkit {wanted}.x (CUDA_HOME says where it is, or {wheels}) or a torch built for CUDA {kit.version[0]}"
        )
    try:
        gencode, said = search.gencode(os.environ.get("TORCH_CUDA_ARCH_LIST"), kit)
    except ValueError as error:
        return None, str(error)
    say(f"CUDA library: nvcc {kit.release} of {kit.home}, {said}")
    return types.SimpleNamespace(home=kit.home, libraries=kit.libraries, gencode=gencode, flags=search.FLAGS), ""


def apart(object_filenames: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """norm.cpp and norm.cu would both become norm.o: the latter becomes norm.cu.o."""

    def names(sources: list[str], *args: Any, **options: Any) -> list[str]:
        plain = object_filenames(sources, *args, **options)
        return [o[:-2] + ".cu.o" if str(s).endswith(".cu") else o for s, o in zip(sources, plain, strict=True)]

    return names


def extensions() -> tuple[list, dict]:
    for variable, value in (("CPU", WANT), ("CUDA", WANT_CUDA)):
        if value not in ("auto", "0", "1"):
            raise SystemExit(f"RERANK_KERNELS_BUILD_{variable} must be auto, 0 or 1, got {value!r}")
    reason = "RERANK_KERNELS_BUILD_CPU=0" if WANT == "0" else why_not()
    if reason is not None:
        if WANT == "1":
            raise SystemExit(
                f"rerank_kernels: the CPU library is required (RERANK_KERNELS_BUILD_CPU=1) and cannot be built: {reason}"
            )
        refuse_cuda(f"it needs the C++ library: {reason}")
        leave_out(reason)
        return [], {}
    if WANT_CUDA == "0":
        with_cuda = None
        leave_out_cuda("RERANK_KERNELS_BUILD_CUDA=0")
    else:
        with_cuda, reason = cuda_or_why_not()
        if with_cuda is None:
            refuse_cuda(reason)

    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        """With auto, a failed compilation leaves the pure-Python package, or one without CUDA, and says so."""

        def build_extensions(self) -> None:
            cpu = [e for e in self.extensions if e.name != CUDA]
            cuda = [e for e in self.extensions if e.name == CUDA]
            if not cuda:
                self.forget_cuda()
            try:
                self.extensions = cpu
                super().build_extensions()
            except Exception as error:  # of the compiler's check, of ninja, of the linker
                if "1" in (WANT, WANT_CUDA):
                    raise
                leave_out(f"it did not compile ({error}; pip install -v shows the compiler's messages)")
                leave_out_cuda("it needs the C++ library, which did not compile")
                self.extensions = []  # nothing to copy
                self.forget_cuda()
                self.collect(NOT_BUILT, NO_CUDA)
                return
            try:
                if cuda:  # by itself: PyTorch first checks the toolkit, and what it dislikes must not cost the CPU library
                    self.extensions = cuda
                    self.compiler.object_filenames = apart(self.compiler.object_filenames)
                    super().build_extensions()
                self.extensions = [*cpu, *cuda]
            except Exception as error:
                if WANT_CUDA == "1":
                    raise
                leave_out_cuda(f"it did not compile ({error}; pip install -v shows the compiler's messages)")
                self.extensions = cpu
                self.forget_cuda()
                self.collect(NO_CUDA)

        def forget_cuda(self) -> None:
            """A library of an earlier build would be installed again."""
            folder = ROOT / "rerank_kernels" if self.inplace else pathlib.Path(self.build_lib) / "rerank_kernels"
            for old in folder.glob("_cuda*.so"):
                old.unlink()

        def collect(self, *said: pathlib.Path) -> None:
            """Package data was gathered before this step."""
            collected = pathlib.Path(self.build_lib) / "rerank_kernels"
            if not self.inplace and collected.is_dir():
                for path in said:
                    shutil.copy(path, collected)

    # File names relative to this folder: setuptools refuses absolute ones.
    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the ABI of PyTorch 2.10: serves every later one too
    facts = f"torch {torch.__version__}; flags {' '.join(FLAGS)}"
    built = [
        CppExtension(
            "rerank_kernels._C",
            ["csrc/schema.cpp", *kernels],
            extra_compile_args=[*FLAGS, stable],
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
    if with_cuda is not None:
        cpp_extension.CUDA_HOME = str(with_cuda.home)  # PyTorch's own guess is wrong where nvcc on PATH is a wrapper
        host = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", *NUMERIC_FLAGS)]
        cuda = CUDAExtension(
            CUDA,
            sorted(str(p.relative_to(ROOT)) for kind in ("*.cpp", "*.cu") for p in (ROOT / "csrc" / "cuda").rglob(kind)),
            extra_compile_args={"cxx": [*FLAGS, stable, "-DUSE_CUDA"], "nvcc": [*with_cuda.flags, *with_cuda.gencode, *host]},
            depends=[*headers, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cuh"))],
            py_limited_api=True,
        )
        if not (with_cuda.libraries / "libcudart.so").exists():  # pip's wheels have it under its full name only
            runtime = sorted(p.name for p in with_cuda.libraries.glob("libcudart.so.*"))
            cuda.libraries = [f":{runtime[0]}" if name == "cudart" and runtime else name for name in cuda.libraries]
        built.append(cuda)
    return built, {"build_ext": Build}


NOT_BUILT.unlink(missing_ok=True)
NO_CUDA.unlink(missing_ok=True)
ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
