"""The C++ and CUDA libraries: loads them, says why it cannot, and what each lacks."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from urllib.parse import unquote

import torch

from rerank_kernels.backend.modes import MODES
from rerank_kernels.names import OPS
from rerank_kernels.version import NUMERICS_VERSION

PACKAGE = pathlib.Path(__file__).parent.parent
ON_A_GPU = ("launchers", "force_launch", "open_room")  # ops that the CUDA library alone has a kernel for


@functools.cache
def missing() -> str | None:
    """Loads the C++ library once; says why it cannot."""
    return _load("_C", "the C++ library", "_not_built.txt")


@functools.cache
def missing_cuda() -> str | None:
    """Loads the CUDA library once; says why it cannot, or that there is no GPU. Its ops' signatures are the C++ library's."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    reason = missing() or _load("_cuda", "the CUDA library", "_no_cuda.txt")
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= (8, 0) else f"the kernels need compute capability 8.0, this GPU has {best[0]}.{best[1]}"


@contextlib.contextmanager
def holding_threads() -> Iterator[None]:
    """Inside the block PyTorch's own operations run on this thread alone, and ours on as many as before; re-entrant.

    What PyTorch does between our ops is short. But its OpenMP threads spin for milliseconds after each, on the cores that ours
    need next, and in a forked child it waits for them for ever. Other threads of the program notice nothing.
    """
    before = torch.ops.rerank_kernels.hold_threads(0)
    try:
        yield
    finally:
        if before:
            torch.ops.rerank_kernels.hold_threads(before)


def threads() -> int:
    """How many threads an op on CPU tensors may use now: torch.get_num_threads(), or what that was before the block above."""
    return int(torch.ops.rerank_kernels.hold_threads(-1)) if missing() is None else torch.get_num_threads()


@functools.cache
def launch_tables() -> dict[str, Any]:
    """The tiles of mode tensor of each room of csrc/cuda, as its tiles.h has them: csrc/cpu/tables.cpp says in which form."""
    tables: dict[str, Any] = json.loads(torch.ops.rerank_kernels.launch_tables())
    return tables


def _load(stem: str, what: str, reason: str) -> str | None:
    found = sorted(PACKAGE.glob(f"{stem}*.so"))
    if not found:
        if hidden := _hidden_install(stem):
            return f"{what} is not here: {hidden}"
        said = PACKAGE / reason  # by setup.py
        why = said.read_text(encoding="utf-8").strip() if said.exists() else "this is a checkout that was never installed"
        return f"{what} was not built: {why}; run: {build_command()}" if stem == "_C" else f"{what} was not built: {why}"
    if other := second_copy():
        return other
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{what} does not load with torch {torch.__version__}: {error}"
    if unfit := _unfit("CUDA" if stem == "_cuda" else "CPU"):
        return f"{what} at {found[0]} does not fit this package: {unfit}; run: {build_command()}"
    return None


def second_copy() -> str | None:
    """Which other copy of the C++ library serves this process, None if none does: ops can be registered only once."""
    namespace = torch.ops.rerank_kernels
    if not hasattr(namespace, "loaded_from"):  # none is there, or one of an older version, of which _unfit says what it lacks
        return None
    first = namespace.loaded_from()
    if any(os.path.realpath(first) == os.path.realpath(path) for path in PACKAGE.glob("_C*.so")):
        return None
    return (
        f"two copies of rerank_kernels are in one process: the C++ library of {first} was loaded first and serves, "
        f"the Python files are of {PACKAGE}; import only one of them in a process"
    )


def _unfit(key: str) -> str | None:
    """What the library lacks of what the Python side asks of it."""
    namespace = torch.ops.rerank_kernels

    def there(op: str) -> bool:
        has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key  # its own, or one for every device
        return hasattr(namespace, op) and (
            (key == "CPU" and (op.endswith("_tensor") or op in ON_A_GPU)) or has_kernel(f"rerank_kernels::{op}", key)
        )

    if lost := [op for op in called() if not there(op)]:
        return f"it has no {', '.join(lost)}"
    if not hasattr(namespace, "numerics_version"):
        return f"it does not say its numerics version, and the package has {NUMERICS_VERSION}"
    if (built := namespace.numerics_version()) != NUMERICS_VERSION:
        return f"it was compiled for numerics version {built}, and the package has {NUMERICS_VERSION}"
    return None


def build_command() -> str:
    """What a user runs to get the C++ library."""
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    sources = PACKAGE.parent
    if (sources / "setup.py").exists():
        build = f"{pip} --no-build-isolation --no-deps -e {shlex.quote(str(sources))}"
    else:
        build = f"{pip} --no-build-isolation --no-deps {_sources() or '.'}"
    try:
        enough = int(metadata.version("setuptools").split(".")[0]) >= 77
    except (metadata.PackageNotFoundError, ValueError):
        enough = False
    return build if enough else f"{pip} 'setuptools>=77' && {build}"


def _installs() -> Iterator[metadata.Distribution]:
    """Our installs on sys.path: a checkout's own egg-info may be one of them."""
    return iter(metadata.distributions(name="rerank-kernels"))


def _sources() -> str | None:
    """The folder that pip installed this package from, if it is still there."""
    for install in _installs():
        if (direct := install.read_text("direct_url.json")) is not None:
            folder = unquote(json.loads(direct)["url"].partition("file://")[2])
            if folder and (pathlib.Path(folder) / "setup.py").exists():
                return shlex.quote(folder)
    return None


def _hidden_install(stem: str) -> str | None:
    """What is wrong where Python runs in a checkout without a library, while a package with one is installed."""
    for install in _installs():
        there = pathlib.Path(str(install.locate_file(PACKAGE.name))).resolve()
        if there != PACKAGE.resolve() and any(there.glob(f"{stem}*.so")):
            return (
                f"Python runs inside the checkout {PACKAGE.parent}, which hides the install in {there}; "
                f"run it in another directory, or build the checkout too: {build_command()}"
            )
    return None


@functools.cache
def called() -> tuple[str, ...]:
    """The library's ops that backend/ calls, by name or as they are: what a library must have."""
    here = pathlib.Path(__file__).parent
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(here.glob("**/*.py")))
    served = {name for path in here.glob("native/*.py") for name in re.findall(r"^def (\w+)\(", path.read_text(), re.MULTILINE)}
    direct = {mode.function(op) for mode in MODES.values() for op in OPS} - served
    return tuple(sorted(direct | set(re.findall(r"torch\.ops\.rerank_kernels\.(\w+)\(", text))))
