"""Builds rerank_kernels._C (ops on CPU tensors, torch stable ABI), rerank_kernels._cuda (the same ops on CUDA tensors; apart,
since it cannot load without PyTorch's CUDA libraries) and, in a checkout, rerank_kernels._host (pybind11, for tests).

A wheel holds what serves one Python as it does the next: _C and _cuda, tagged cp310-abi3, or Python alone, tagged py3-none-any.

RERANK_KERNELS_BUILD_CPU = auto (default: built if torch and a C++ compiler are there, else the package installs without it
and says so) | 0 (never) | 1 (required: a failure fails the install).
RERANK_KERNELS_BUILD_CUDA = auto (default: built if torch is a CUDA build and a CUDA toolkit of its major version is there; no
GPU is needed) | 0 | 1. CUDA_HOME says where the toolkit is, TORCH_CUDA_ARCH_LIST for which GPUs to compile: without it for
those that are here, or for all that we know if none is. CXX is the C++ compiler, with a wrapper or flags if it has some.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # before it reads pyproject.toml, which it would not understand
    raise SystemExit(
        f"rerank_kernels: setuptools {setuptools.__version__} is too old, 77 is needed; run: "
        f"{shlex.quote(sys.executable)} -m pip install 'setuptools>=77'"
    )
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = pathlib.Path(__file__).parent
WANT = os.environ.get("RERANK_KERNELS_BUILD_CPU", "auto")
WANT_CUDA = os.environ.get("RERANK_KERNELS_BUILD_CUDA", "auto")
CPU, HOST, CUDA = "rerank_kernels._C", "rerank_kernels._host", "rerank_kernels._cuda"
OLDEST_TORCH = (2, 10)

# The numeric contract's flags (NUMERICS.md, "Flags"): a compiler must neither fuse nor reorder what the source says.
NUMERIC_FLAGS = ["-ffp-contract=off", "-fno-fast-math", "-fno-unsafe-math-optimizations"]
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
    "-fno-math-errno",
    *NUMERIC_FLAGS,
]
GCC_FLAGS = ["-Wno-maybe-uninitialized"]  # clang does not know it
# Every symbol is looked up when the library is loaded: one that is missing is an error there, and what was looked up cannot be
# overwritten later. No table of names that nothing needs when it runs.
LINK_FLAGS = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-s"]


# Why a library is missing, for the package to say: read by rerank_kernels/backend/native/__init__.py.
NOT_BUILT = ROOT / "rerank_kernels" / "_not_built.txt"
NO_CUDA = ROOT / "rerank_kernels" / "_no_cuda.txt"


def leave_out(reason: str) -> None:
    """Install without the library, and let the package say why, since pip keeps quiet about it."""
    NOT_BUILT.write_text(reason + "\n", encoding="utf-8")
    say(f"installing without the C++ library: {reason}. The pytorch backend will serve, slower and with other bits")


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
    # stderr: pip shows it with -v, and when an install fails; without -v it shows nothing of what a build says
    print(f"rerank_kernels: {text}", file=sys.stderr, flush=True)


def toolkit_module() -> types.ModuleType:
    """tools/toolkit.py, which no package holds."""
    spec = importlib.util.spec_from_file_location("toolkit", ROOT / "tools" / "toolkit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> list[str] | None:
    """The C++ compiler as a command: CXX ("ccache g++", a path with spaces, with flags), else what is on PATH."""
    named = os.environ.get("CXX", "").strip()
    if not named:
        return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    command = [named] if os.access(named, os.X_OK) else shlex.split(named)
    return command if command and shutil.which(command[0]) else None


def one_word(command: list[str]) -> str:
    """The compiler as PyTorch and setuptools both take it, whatever their versions: a script stands for more than one word."""
    if len(command) == 1 and " " not in command[0]:
        return command[0]
    folder = tempfile.mkdtemp(prefix="rerank-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    script = pathlib.Path(folder) / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    os.environ["TORCH_NO_COMPILER_WRAPPER"] = "1"  # newer PyTorch puts ccache in front by itself
    return str(script)


def of_no_machine() -> list[str]:
    """Flags that let the names of files in the library begin here, and at torch: no path of the machine that built it."""
    import torch

    places = {os.path.abspath(ROOT): "", os.path.realpath(ROOT): "", os.path.dirname(os.path.abspath(torch.__file__)): "torch/"}
    return [f"-ffile-prefix-map={place}/={name}" for place, name in places.items()]


def why_not() -> str | None:
    """What a build lacks, None if nothing. Settles CXX, so that PyTorch and setuptools mean the same compiler."""
    command = compiler()
    if command is None:
        named = os.environ.get("CXX")
        said = f"CXX={named} is not there" if named else "no C++ compiler on PATH"
        return f"{said} (install g++ 11 or newer, or clang 14 or newer)"
    if lacks := why_not_compiler(command):
        return lacks
    os.environ["CXX"] = one_word(command)
    if importlib.util.find_spec("torch") is None:
        return "torch is not visible to the build: pip builds in an environment of its own unless told --no-build-isolation"
    try:
        import torch
        import torch.utils.cpp_extension
    except Exception as error:  # of a library that does not load, too
        return f"torch does not import: {type(error).__name__}: {' '.join(str(error).split())}"
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    return None


def why_not_compiler(command: list[str]) -> str | None:
    """A compiler that does not take a flag of the contract, or is too old for our C++, is known before the build."""
    probe = "#include <bit>\n#include <memory>\ntemplate <class T> concept Some = true;\nint main() {}\n"
    ask = [*command, "-x", "c++", *FLAGS, "-Werror", "-fsyntax-only", "-"]
    done = subprocess.run(ask, input=probe, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    if done.returncode == 0:
        return None
    return (
        f"the compiler {shlex.join(command)} ({version_of(command)}) does not compile our C++20: "
        f"{first_error(done.stderr)} (install g++ 11 or newer, or clang 14 or newer; CXX says which is taken)"
    )


def version_of(command: list[str]) -> str:
    said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    return said.partition("\n")[0].strip() or "it does not say which version"


def first_error(said: str) -> str:
    """The line of a compiler's or linker's words that says what is wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\b(fatal )?error\b|undefined reference|cannot find", line, re.IGNORECASE)]
    return (wrong or lines or ["it said nothing"])[0]


@contextlib.contextmanager
def heard() -> Iterator[list[bytes]]:
    """What the processes of a build write, for the reason of a failure; it is shown as it comes."""
    said: list[bytes] = []
    saved = os.dup(1), os.dup(2)
    read, write = os.pipe()

    def pass_on() -> None:
        while chunk := os.read(read, 65536):
            said.append(chunk)
            os.write(saved[1], chunk)

    thread = threading.Thread(target=pass_on)
    thread.start()
    try:
        for number in (1, 2):
            sys.stdout.flush()
            os.dup2(write, number)
        os.close(write)
        yield said
    finally:
        for number, before in zip((1, 2), saved, strict=True):
            sys.stdout.flush()
            os.dup2(before, number)
        thread.join()
        for number in (*saved, read):
            os.close(number)


def cuda_or_why_not() -> tuple[types.SimpleNamespace | None, str]:
    """What the CUDA library is built with (home, libraries, flags, gencode: nvcc's architectures, of_room: a room's), or what a
    build lacks.
    """
    import torch

    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is a build without CUDA"
    if not list((ROOT / "csrc" / "cuda").rglob("*.cu")):
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
        gencode, said = search.gencode(os.environ.get("TORCH_CUDA_ARCH_LIST"), kit, seen_gpus())
    except ValueError as error:
        return None, str(error)
    count = len({flag.partition(",")[0] for flag in gencode})
    say(
        f"building CUDA for {count} architecture{'s' * (count > 1)}, about {search.minutes(gencode)} minutes of this machine's "
        f"{os.cpu_count()} cores; RERANK_KERNELS_BUILD_CUDA=0 leaves it out "
        f"(nvcc {kit.release} of {kit.home}, {said})"
    )
    given = {"gencode": gencode, "flags": search.FLAGS, "of_room": search.of_room}
    return types.SimpleNamespace(home=kit.home, libraries=kit.libraries, **given), ""


def seen_gpus() -> list[str]:
    """The compute capabilities of the GPUs in this machine: ["90"]."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(found)]


def room_by_room(
    compile_all: Callable[..., list[str]], flags_of: Callable[[str, list[str]], list[str]]
) -> Callable[..., list[str]]:
    """A compiler's `compile` for sources of several rooms of csrc/cuda, each with the architectures that are its own."""

    def compiled(sources: list[str], *args: Any, extra_postargs: dict[str, list[str]], **options: Any) -> list[str]:
        gencode = [flag for flag in extra_postargs["nvcc"] if flag.startswith("-gencode")]
        rest = [flag for flag in extra_postargs["nvcc"] if flag not in gencode]
        groups: dict[tuple[str, ...], list[str]] = {}
        for source in sources:
            groups.setdefault(tuple(flags_of(pathlib.Path(source).parent.name, gencode)), []).append(source)
        objects = []
        for flags, group in groups.items():
            if flags:
                objects += compile_all(group, *args, extra_postargs={**extra_postargs, "nvcc": [*rest, *flags]}, **options)
        return objects

    return compiled


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
        """Each library by itself: with auto, one that fails is left out and says why, and the others stay."""

        def run(self) -> None:
            self.in_checkout = self.editable_mode or bool(self.inplace)  # setuptools clears inplace while it builds
            super().run()

        def build_extensions(self) -> None:
            wanted = {e.name: e for e in self.extensions if self.in_checkout or e.name != HOST}
            built = []
            for name, extension in wanted.items():
                self.extensions = [extension]  # PyTorch may dislike CUDA's toolkit, which must not cost the CPU library
                with heard() as said:
                    failed = self.failure_of_build()
                if failed is None:
                    built.append(extension)
                    continue
                if (name, "1") in ((CPU, WANT), (CPU, WANT_CUDA), (CUDA, WANT_CUDA)):
                    raise failed
                words = b"".join(said).decode(errors="replace")
                reason = f"it did not compile: {first_error(words or str(failed))} (pip install -v shows all of it)"
                if name == HOST:
                    say(f"leaving out rerank_kernels._host, which only tests use: {reason}")
                elif name == CUDA:
                    leave_out_cuda(reason)
                else:
                    leave_out(reason)
                    leave_out_cuda("it needs the C++ library, which did not compile")
                    break
            self.extensions = self.distribution.ext_modules = built
            self.settle({e.name for e in built})

        def build_extension(self, extension: setuptools.Extension) -> None:
            if extension.name == CUDA and with_cuda is not None:
                self.compiler.compile = room_by_room(self.compiler.compile, with_cuda.of_room)
            super().build_extension(extension)

        def failure_of_build(self) -> Exception | None:
            try:
                super().build_extensions()
            except Exception as error:  # of the compiler's check, of ninja, of the linker
                return error
            return None

        def settle(self, built: set[str]) -> None:
            """A library of an earlier build would be installed again, and package data was gathered before this step."""
            collected = pathlib.Path(self.build_lib) / "rerank_kernels"
            for folder in (collected, *([ROOT / "rerank_kernels"] if self.in_checkout else [])):
                for name in {CPU, HOST, CUDA} - built:
                    for old in folder.glob(f"{name.rpartition('.')[2]}.*so"):
                        old.unlink()
            for said in (NOT_BUILT, NO_CUDA):
                if said.exists() and collected.is_dir() and not self.in_checkout:
                    shutil.copy(said, collected)

    # File names relative to this folder: setuptools refuses absolute ones.
    kernels = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    quiet = [] if "clang" in version_of([os.environ["CXX"]]) else GCC_FLAGS
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the ABI of PyTorch 2.10: serves every later one too
    placeless = of_no_machine()
    facts = f"torch {torch.__version__}; flags {' '.join(FLAGS)}"
    built = [
        CppExtension(
            CPU,
            ["csrc/schema.cpp", *kernels],
            extra_compile_args=[*FLAGS, *quiet, *placeless, stable, f'-DRK_BUILD_FACTS="{facts}"'],
            extra_link_args=LINK_FLAGS,
            depends=headers,
            py_limited_api=True,
        )
    ]
    try:
        import pybind11
    except ImportError:
        say("pybind11 is not installed: leaving out rerank_kernels._host, which only tests use")
    else:
        built.append(
            CppExtension(
                HOST,
                ["csrc/host.cpp"],
                include_dirs=[pybind11.get_include()],
                extra_compile_args=[*FLAGS, *quiet, *placeless],
                extra_link_args=LINK_FLAGS,
                depends=headers,
            )
        )
    if with_cuda is not None:
        cpp_extension.CUDA_HOME = str(with_cuda.home)  # PyTorch's own guess is wrong where nvcc on PATH is a wrapper
        host = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", *NUMERIC_FLAGS, *placeless)]
        cuda = CUDAExtension(
            CUDA,
            sorted(str(p.relative_to(ROOT)) for kind in ("*.cpp", "*.cu") for p in (ROOT / "csrc" / "cuda").rglob(kind)),
            extra_compile_args={
                "cxx": [*FLAGS, *quiet, *placeless, stable, "-DUSE_CUDA"],
                "nvcc": [*with_cuda.flags, *with_cuda.gencode, *host],
            },
            extra_link_args=LINK_FLAGS,
            depends=[*headers, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cuh"))],
            py_limited_api=True,
        )
        if not (with_cuda.libraries / "libcudart.so").exists():  # pip's wheels have it under its full name only
            runtime = sorted(p.name for p in with_cuda.libraries.glob("libcudart.so.*"))
            cuda.libraries = [f":{runtime[0]}" if name == "cudart" and runtime else name for name in cuda.libraries]
        built.append(cuda)
    return built, {"build_ext": Build}


class Wheel(bdist_wheel):
    """With the tag of what was built, and nothing of an earlier build in it."""

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        if self.distribution.ext_modules:
            self.run_command("build_ext")
        self.root_is_pure = not self.distribution.ext_modules
        self.py_limited_api = False if self.root_is_pure else "cp310"
        super().run()


NOT_BUILT.unlink(missing_ok=True)
NO_CUDA.unlink(missing_ok=True)
ext_modules, cmdclass = extensions()
setuptools.setup(ext_modules=ext_modules, cmdclass={**cmdclass, "bdist_wheel": Wheel})
