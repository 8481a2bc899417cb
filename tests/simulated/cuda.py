"""The CUDA backend on a machine without a GPU: its own launchers, as nvcc compiled them, and its kernels' PTX in the simulator.

    with simulated(race=True, sched=2):
        rk.linear(x, weight)            # CPU tensors; torch.ops.rerank_kernels.* go to csrc/cuda

csrc/cuda/*/*.cu are compiled by nvcc and linked with cudart.cpp in place of the CUDA runtime, csrc/cuda/torch/*.cpp by g++ for
CPU tensors (call.h). So Python, registration, launcher, grid, shared memory and arguments are the ones that a GPU would get;
only ptxas and the chip are left out. ptxsim/README.md says what that proves and what it does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.utils.cpp_extension

import toolkit
from ptxsim.once import alone
from ptxsim.program import Kernel, Module
from rerank_kernels.backend import registry, weights
from rerank_kernels.backend.native import hopper

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"
TENSOR_MAP = ROOT / "tests" / "ptxsim" / "machine" / "tensormap.h"
BUILD = Path(os.environ.get("RERANK_KERNELS_CACHE", ROOT / "build" / "ptxsim"))
SOURCES = tuple(sorted(str(p.relative_to(CUDA).with_suffix("")) for p in CUDA.rglob("*.cu")))  # "portable/linear"
# every op but those that are the CPU's own: one without a CUDA kernel fails, it is not the CPU's in disguise
NOT_ON_A_GPU = {"transpose_weight"}
SIGNATURES = {  # of the ops that compute something: "linear": "linear(Tensor x, ...) -> Tensor"
    text.partition("(")[0]: text
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    for text in re.findall(r'm\.op\("([^"]+)"', path.read_text())
}
OPS = tuple(name for name in SIGNATURES if name not in NOT_ON_A_GPU)
NAMESPACE = "rerank_kernels_simulated"


@dataclasses.dataclass(frozen=True)
class Edit:
    """How a mutant breaks a kernel: `old`, which stands once in csrc/cuda/<file>, becomes `new`."""

    file: str
    old: str
    new: str
    dtype: torch.dtype | None = None  # of the kernels of LONGEST only those for it and, in attention, for heads of 64 are left

    def only(self, dtype: torch.dtype) -> Edit:
        return dataclasses.replace(self, dtype=dtype)


# Where the kernels that nvcc compiles longest get their dtype and their width, and what is left of it in a mutant that sees one
# only. A kernel that was left out and is started all the same is a LookupError, which is no way to be caught.
_LINEAR = """if (g.x.dtype == Dtype::F32) w_half ? start(No(), Yes()) : start(No(), No());
    else w_half ? start(Yes(), Yes()) : start(Yes(), No());"""
_ATTENTION = """if (args.dtype == Dtype::F32) start(attention_rows<float>);
    else if (args.dtype == Dtype::F16) start(attention_rows<f16>);
    else start(attention_rows<bf16>);"""
_LINEAR_TENSOR = "g.x.dtype == Dtype::F16 ? linear_tensor_tile<T, f16> : linear_tensor_tile<T, bf16>"
_HOPPER_WAYS, FEW_HOPPER_WAYS = "std::make_integer_sequence<int, LINEAR_WAYS>()", (0, 2, 5)  # a tile of each kind
_LINEAR_HOPPER = "g.x.dtype == Dtype::F16 ? linear_hopper<T, f16> : linear_hopper<T, bf16>"
_ATTENTION_TENSOR = """if (args.dtype == Dtype::F16) start(attention_tensor_rows<WIDTH, f16>);
    else start(attention_tensor_rows<WIDTH, bf16>);"""
_ATTENTION_HOPPER = "args.dtype == Dtype::F16 ? attention_wgmma_rows<B, f16> : attention_wgmma_rows<B, bf16>"
_ATTENTION_HOPPER_WIDTH = "args.D == 64 ? way == 0 ? start<64, 0> : start<64, 1> : way == 0 ? start<128, 0> : start<128, 1>"
_ATTENTION_WIDTH = """args.D <= 32    ? start_attention<32>
                       : args.D <= 64  ? start_attention<64>
                       : args.D <= 96  ? start_attention<96>
                       : args.D <= 128 ? start_attention<128>
                       : args.D <= 192 ? start_attention<192>
                                       : start_attention<256>;"""
LONGEST = {
    torch.float32: [
        ("portable/linear.cu", _LINEAR, "start(No(), No());"),
        ("portable/attention.cu", _ATTENTION, "start(attention_rows<float>);"),
    ],
    torch.float16: [
        ("portable/linear.cu", _LINEAR, "start(Yes(), Yes());"),
        ("portable/attention.cu", _ATTENTION, "start(attention_rows<f16>);"),
        ("sm80/linear.cu", _LINEAR_TENSOR, "linear_tensor_tile<T, f16>"),
        ("sm90/linear.cu", _LINEAR_HOPPER, "linear_hopper<T, f16>"),
        ("sm90/linear.cu", _HOPPER_WAYS, f"std::integer_sequence<int, {', '.join(map(str, FEW_HOPPER_WAYS))}>()"),
        ("sm80/attention.cu", _ATTENTION_TENSOR, "start(attention_tensor_rows<WIDTH, f16>);"),
        ("sm80/attention.cu", _ATTENTION_WIDTH, "start_attention<64>;"),
        ("sm90/attention.cu", _ATTENTION_HOPPER, "attention_wgmma_rows<B, f16>"),
        ("sm90/attention.cu", _ATTENTION_HOPPER_WIDTH, "way == 0 ? start<64, 0> : start<64, 1>"),
    ],
}


@dataclasses.dataclass
class Options:
    """How the simulator runs kernels (program.py, Kernel.launch); `arch` is the architecture that nvcc compiles PTX for; a room
    may have its own.
    """

    arch: str = "80"
    launch: dict[str, Any] = dataclasses.field(default_factory=dict)
    edit: Edit | None = None
    poison: int = 0xFF  # the byte that new tensors are filled with: NaNs, so that a place nobody writes shows


class Gpu(NamedTuple):
    """What a launcher may ask the runtime about a device, and whether its driver makes tensor maps at all."""

    capability: int
    multiprocessors: int
    maps: int = 1


AMPERE, HOPPER = Gpu(80, 108), Gpu(90, 132)

_options = Options()
_signatures = torch.library.Library(NAMESPACE, "FRAGMENT")
_error: list[BaseException] = []
launched: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []  # (kernel, grid, block, shared) of the calls so far


class _Memory(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


_Three = ctypes.POINTER(ctypes.c_uint32)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    _Three,
    _Three,
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(_Memory),
    ctypes.c_uint64,
)


def missing() -> str | None:
    """Why nothing can be simulated here, None if it can."""
    return None if toolkit.find() else "no nvcc: neither a CUDA toolkit nor pip's nvidia-cuda-nvcc is installed"


@contextlib.contextmanager
def simulated(
    *,
    arch: str = "80",
    gpu: Gpu = AMPERE,
    edit: Edit | None = None,
    poison: int = 0xFF,
    trial: bool = False,
    **launch: Any,
) -> Iterator[None]:
    """Inside the block ops on CPU tensors are served by backend "cuda" on a GPU like `gpu`. Re-entrant: the inner options hold
    inside. trial: whether the kernels for Hopper serve after their trial alone; else they do without, whatever the environment
    says.
    """
    global _options
    loaded = ctypes.CDLL(str(library()))
    fill = ctypes.c_int.in_dll(loaded, "ptxsim_poison")
    facts = [ctypes.c_int.in_dll(loaded, f"ptxsim_{name}") for name in Gpu._fields]
    gpu_before = [fact.value for fact in facts]
    before, laid_out, registered_as = _options, weights.SCREENS_ON, dict(registry.BACKENDS)
    _options, weights.SCREENS_ON = Options(arch, launch, edit, poison), ()
    fill.value = poison
    for fact, value in zip(facts, gpu, strict=True):
        fact.value = value
    there, gone = registered_as["cuda"], registered_as["cpu"]
    registry.BACKENDS["cuda"] = dataclasses.replace(there, devices=("cpu",), missing=lambda: None)
    # its ops on CPU tensors are csrc/cuda's now: what a test asks of it here would be compared with itself
    why = "inside simulated() ops on CPU tensors are csrc/cuda's"
    registry.BACKENDS["cpu"] = dataclasses.replace(gone, missing=lambda: why)
    registry.missing.cache_clear()
    room = {
        "_here": {},
        "DEVICES": ("cpu",),
        "capability": lambda device: divmod(gpu.capability, 10),
        "processors": lambda device: gpu.multiprocessors,
        "on": lambda device: contextlib.nullcontext(),
        "apart": lambda device: contextlib.nullcontext(),
        "alive": lambda device: True,
        "capturing": lambda device: False,
        "ways": lambda launcher: range(launchers()[launcher]),
        "force": torch.ops.rerank_kernels_simulated.force_launch,
        "open_room": torch.ops.rerank_kernels_simulated.open_room,
        **({} if trial else {"setting": lambda: "1"}),
    }
    room_before = {name: getattr(hopper, name) for name in room}
    for name, value in room.items():
        setattr(hopper, name, value)
    try:
        with torch.library._scoped_library("rerank_kernels", "IMPL") as registered, registry.use("cuda"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is overridden is the point
                for op in OPS:
                    registered.impl(op, functools.partial(_call, op), "CPU", allow_override=True)
            yield
    finally:
        _options, weights.SCREENS_ON = before, laid_out
        fill.value = before.poison
        for fact, value in zip(facts, gpu_before, strict=True):
            fact.value = value
        for name, value in room_before.items():
            setattr(hopper, name, value)
        for here in hopper._here.values():  # the library was told something else meanwhile
            here.told = None
        for name in hopper.OPS:
            torch.ops.rerank_kernels_simulated.open_room(name, 0, False)
        registry.BACKENDS.update(registered_as)
        registry.missing.cache_clear()


def _call(op: str, *arguments: Any) -> Any:
    _error.clear()
    try:
        return getattr(getattr(torch.ops, NAMESPACE), op)(*arguments)
    except RuntimeError:
        if _error:
            raise _error.pop() from None
        raise


def launchers() -> dict[str, int]:
    """The launchers that have several ways to serve a call, and how many."""
    library()
    listed = torch.ops.rerank_kernels_simulated.launchers()
    return {name: int(count) for name, count in (entry.split() for entry in listed.split(", ") if entry)}


@contextlib.contextmanager
def forced(kernel: str, way: int) -> Iterator[None]:
    """Inside the block a launcher takes this way instead of its own choice."""
    library()
    torch.ops.rerank_kernels_simulated.force_launch(kernel, way)
    try:
        yield
    finally:
        torch.ops.rerank_kernels_simulated.force_launch(kernel, -1)


# ---- a kernel launch, from cudart.cpp


def _launch(name: bytes, grid: Any, block: Any, shared: int, arguments: Any, memory: Any, count: int) -> int:
    try:
        k = kernel(name.decode(), _options.arch, _options.edit)
        params = bytearray(max((p.offset + p.size for p in k.params), default=0))
        for i, p in enumerate(k.params):
            params[p.offset : p.offset + p.size] = ctypes.string_at(arguments[i], p.size)
        known = [(memory[i].address, memory[i].bytes, bool(memory[i].writable), f"memory {i}") for i in range(count)]
        g, b = (grid[0], grid[1], grid[2]), (block[0], block[1], block[2])
        launched.append((name.decode(), g, b, shared))
        k.launch(g, b, bytes(params), shared, known, **_options.launch)
    except BaseException as error:  # an exception cannot pass through C
        _error.append(error)
        return 1
    return 0


_callback = _LAUNCH(_launch)


def ptx(source: str, arch: str, edit: Edit | None = None) -> Path:
    """The PTX of one of SOURCES, compiled if nobody did before."""
    kit = toolkit.find()
    assert kit is not None
    assert edit is None or (CUDA / edit.file).is_file(), f"there is no {edit.file}: the edit would change nothing"
    if edit and edit.file.endswith(".cu") and edit.file != f"{source}.cu":
        edit = None  # it does not reach this one
    return kit.ptx((_edited(edit) if edit else CUDA) / f"{source}.cu", arch_of(source, arch))


def arch_of(source: str, arch: str = "80") -> str:
    """A room that is compiled for one architecture is that one's, whatever the others are compiled for."""
    only = toolkit.found.ROOMS.get(source.partition("/")[0])
    return only[0] if only else arch


@functools.cache
def module(source: str, arch: str, edit: Edit | None = None) -> Module:
    return Module(ptx(source, arch, edit).read_text())


@functools.cache
def _edited(edit: Edit) -> Path:
    """A copy of csrc/cuda with one line of it changed, and without the kernels that it does not need."""
    changed: dict[str, str] = {}
    for file, old, new in [(edit.file, edit.old, edit.new), *(LONGEST[edit.dtype] if edit.dtype else ())]:
        text = changed.get(file) or (CUDA / file).read_text()
        assert text.count(old) == 1, f"{file} holds {text.count(old)} times: {old}"
        changed[file] = text.replace(old, new)
    key = hashlib.sha256(repr(changed).encode())
    for p in sorted((ROOT / "csrc").rglob("*.*")):
        key.update(p.read_bytes())
    folder = BUILD / "edited" / key.hexdigest()[:20]
    with alone(folder):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
            shutil.copytree(ROOT / "csrc", scratch / "csrc", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
            for file, text in changed.items():
                (scratch / "csrc" / "cuda" / file).write_text(text)
            os.replace(scratch, folder)
    return folder / "csrc" / "cuda"


@functools.cache
def kernel(name: str, arch: str, edit: Edit | None = None) -> Kernel:
    return module(_source(name, arch), arch, edit).kernel(name)


@functools.cache
def _source(name: str, arch: str) -> str:
    for source in SOURCES:
        if name in module(source, arch).kernels:
            return source
    raise LookupError(f"no kernel {name} in the PTX of csrc/cuda")


# ---- the library: csrc/cuda for CPU tensors


@functools.cache
def library() -> Path:
    """Builds it, unless these sources were built before, and loads it."""
    registry.missing("cpu")  # loads the library that says what the ops' signatures are
    kit = toolkit.find()
    if kit is None:
        raise RuntimeError(missing())
    torch_side = [ROOT / "csrc" / "schema.cpp", *sorted((CUDA / "torch").glob("*.cpp"))]
    include = [HERE, ROOT / "csrc", *torch.utils.cpp_extension.include_paths()]
    flags = [
        "-O1",
        "-g0",
        "-std=c++20",
        "-fPIC",
        "-w",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-DRK_LIBRARY={NAMESPACE}",
    ]
    flags += ['-DRK_SIMULATED_CALL="call.h"', *(f"-I{p}" for p in include)]

    # Bsymbolic: our stand-in, not the libcudart that a CUDA build of torch has loaded for all
    link = ["-shared", "-Wl,-Bsymbolic"]
    key = hashlib.sha256("\0".join([torch.__version__, kit.release, *flags, *link]).encode())
    for p in sorted([*(ROOT / "csrc").rglob("*.[ch]*"), *HERE.glob("c*.[ch]*"), TENSOR_MAP]):
        key.update(p.name.encode() + p.read_bytes())
    made = BUILD / f"simulated-{key.hexdigest()[:20]}.so"
    with alone(made):
        if not made.exists():
            _build(kit, made, torch_side, flags, link)
    torch.ops.load_library(str(made))
    for signature in SIGNATURES.values():
        _signatures.define(signature)
    ctypes.CDLL(str(made)).ptxsim_connect(_callback)
    return made


def _build(kit: toolkit.Toolkit, made: Path, torch_side: list[Path], flags: list[str], link: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_host(source: Path) -> Path:
            out = Path(scratch) / f"{source.stem}.host.o"
            run("c++", *flags, "-c", source, "-o", out)
            return out

        devices = [
            pool.submit(kit.object, CUDA / f"{s}.cu", Path(scratch) / f"{s.replace('/', '-')}.cu.o", arch_of(s))
            for s in SOURCES
        ]
        hosts = [pool.submit(compile_host, s) for s in [*torch_side, HERE / "cudart.cpp"]]
        objects = [job.result() for job in [*hosts, *devices]]
        lib = Path(torch.__file__).parent / "lib"
        new = Path(scratch) / made.name
        run("c++", *link, *objects, "-o", new, f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}")
        os.replace(new, made)


def run(*command: Any) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\nfailed:\n{done.stdout}{done.stderr}")
