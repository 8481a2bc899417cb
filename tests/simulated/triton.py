"""The triton backend on a machine without a GPU: its own Python, Triton's own compiler, and the PTX in the simulator.

    with simulated_triton(arch=90, race=True):
        rk.linear(x, weight)            # CPU tensors; rerank_kernels/backend/triton serves them

launch.run is replaced: arguments are specialised as Triton's launcher does it (its own function), the kernel is compiled with
the options of launch.OPTIONS for the architecture asked for, and its PTX runs here. What ptxas makes of the PTX is looked at
by tools/witness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ptxsim.program import Kernel, Module
from rerank_kernels.backend import registry

ROOT = Path(__file__).parent.parent.parent
BUILD = Path(os.environ.get("RERANK_KERNELS_CACHE", ROOT / "build" / "ptxsim"))
os.environ.setdefault("TRITON_CACHE_DIR", str(BUILD / "triton"))
PACKAGE = "rerank_kernels.backend.triton"


@dataclasses.dataclass(frozen=True)
class Edit:
    """How a mutant breaks a kernel: `old`, in rerank_kernels/backend/triton/<file>, becomes `new` wherever it stands."""

    file: str
    old: str
    new: str


@dataclasses.dataclass
class Options:
    arch: int = 80
    starts: bool = True
    launch: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Compiled:
    name: str
    ptx: str
    arguments: list[int]  # which of the kernel's arguments are left in the PTX
    shared: int
    threads: int
    constants: dict[str, Any]

    @functools.cached_property
    def kernel(self) -> Kernel:
        return Module(self.ptx).kernel(self.name)


_options = Options()
_compiled: dict[Any, Compiled] = {}
_binders: dict[Any, Callable[..., Any]] = {}
used: list[Compiled] = []  # by the launches so far


def programs() -> dict[Any, Compiled]:
    """What was compiled so far, by what the code was specialised for."""
    return dict(_compiled)


def missing() -> str | None:
    """Why nothing can be simulated here, None if it can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@contextlib.contextmanager
def simulated_triton(*, arch: int = 80, starts: bool = True, edit: Edit | None = None, **launch: Any) -> Iterator[None]:
    """Inside the block ops on CPU tensors are served by backend "triton". Re-entrant: the inner options hold inside.

    starts=False: kernels are compiled and not started, for architectures with instructions that the simulator does not have;
    results hold no numbers, and `used` has the programs.
    """
    global _options
    package = _edited(edit) if edit else PACKAGE
    launcher: Any = importlib.import_module(f"{package}.launch")
    before, registered_as, on_a_gpu = _options, registry.BACKENDS["triton"], (launcher.run, launcher.architecture)
    _options = Options(arch, starts, launch)
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    registry.BACKENDS["triton"] = dataclasses.replace(registered_as, package=package, devices=("cpu",), missing=lambda: None)
    _forget()
    launcher.run, launcher.architecture = run, lambda tensor: arch
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors hold NaN: a place that nobody writes shows
    try:
        with registry.use("triton"):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        _options = before
        launcher.run, launcher.architecture = on_a_gpu
        registry.BACKENDS["triton"] = registered_as
        _forget()


def _forget() -> None:
    registry.missing.cache_clear()
    registry._load.cache_clear()


def _edited(edit: Edit) -> str:
    """A copy of the package with something of it changed; its name."""
    folder = ROOT / PACKAGE.replace(".", "/")
    name = (
        "mutant_"
        + hashlib.sha256((repr(edit) + "".join(p.read_text() for p in sorted(folder.glob("*.py")))).encode()).hexdigest()[:20]
    )
    where = BUILD / "mutants"
    (where / name).mkdir(parents=True, exist_ok=True)
    for source in folder.glob("*.py"):
        text = source.read_text()
        if source.name == edit.file:
            assert edit.old in text, f"{edit.file} does not hold: {edit.old}"
            text = text.replace(edit.old, edit.new)
        (where / name / source.name).write_text(re.sub(rf"\b{re.escape(PACKAGE)}\b", name, text))
    if str(where) not in sys.path:
        sys.path.append(str(where))
    importlib.invalidate_caches()
    return name


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    bound, c = compiled(kernel, arguments, constants)
    used.append(c)
    if not _options.starts:
        return
    params, memory = bytearray(c.kernel.param_bytes), []
    left = [bound[i] for i in c.arguments]
    spare = len(c.kernel.params) - len(left)  # Triton's scratch memory, which none of our kernels asks for
    for p, value in zip(c.kernel.params, [*left, *[None] * spare], strict=True):
        if isinstance(value, tuple):
            value, name = value
            if value.numel():
                size = (sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1) * value.element_size()
                memory.append((value.data_ptr(), size, name.startswith("y"), name))
            value = value.data_ptr()
        data = _bytes(value, p.size)
        params[p.offset : p.offset + p.size] = data
    c.kernel.launch(grid, (c.threads,), bytes(params), c.shared, memory, **_options.launch)


def _bytes(value: Any, size: int) -> bytes:
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return (int(value or 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def compiled(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[list[Any], Compiled]:
    """The arguments by place, and the kernel as Triton specialises and compiles it for them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", _options.arch, 32)
    backend = make_backend(target)
    if kernel not in _binders:
        _binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, _ = _binders[kernel](*arguments, **constants)
    key = (kernel, _options.arch, tuple(map(str, special)), tuple(sorted((k, str(v)) for k, v in constants.items())))
    values = [(v, name) if isinstance(v, torch.Tensor) else v for name, v in bound.items()]
    if key not in _compiled:
        options, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, special, None)
        source = ASTSource(kernel, signature, constexprs, attributes)
        before, triton.knobs.runtime.add_stages_inspection_hook = triton.knobs.runtime.add_stages_inspection_hook, _no_ptxas
        try:
            made = triton.compile(source, target=target, options=options.__dict__)
        finally:
            triton.knobs.runtime.add_stages_inspection_hook = before
        m = made.metadata
        assert m.global_scratch_size == 0 and m.num_ctas == 1, f"{m.name} wants more than blocks of threads"
        left = [i for i, n in enumerate(signature) if signature[n] != "constexpr"]
        _compiled[key] = Compiled(m.name, made.asm["ptx"], left, m.shared, m.num_warps * 32, constants)
    return values, _compiled[key]


def _no_ptxas(*arguments: Any) -> tuple[str, str] | None:
    """Triton asks this hook for a part of its cache's key, then hands it the stages to change: the last one makes nothing."""
    if not arguments:
        return "PTX only", "PTX only"
    arguments[1]["cubin"] = lambda ptx, metadata: b""
    return None
