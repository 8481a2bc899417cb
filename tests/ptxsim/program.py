"""PTX on the CPU: `Module(text).kernel(name).launch(...)`, or `run(...)` on numpy arrays. README.md says what that proves."""

from __future__ import annotations

import ctypes
import re
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from .decode import Program, decode
from .instructions import BRANCH, BRANCH_TABLE
from .library import library
from .parse import ModuleText, ParseError, SimulatorError, Variable

__all__ = ["Kernel", "LaunchReport", "Module", "ParseError", "SimulatorError", "run"]

Region = tuple[int, int, bool, str]  # address, bytes, writable, name


@dataclass
class LaunchReport:
    """What a launch did: per opcode, how many times a warp ran it, and how many lanes did."""

    seconds: float
    executed: Counter[str] = field(default_factory=Counter)
    lanes: Counter[str] = field(default_factory=Counter)


class Module:
    """One PTX text. Kernels are decoded when they are first asked for."""

    def __init__(self, ptx: str) -> None:
        self.text = ModuleText(ptx)
        self._kernels: dict[str, Kernel] = {}
        self._memory: dict[str, ctypes.Array[ctypes.c_char]] = {}
        self._addresses: dict[str, int] = {}

    @property
    def kernels(self) -> list[str]:
        return list(self.text.kernels)

    def kernel(self, name: str) -> Kernel:
        if name not in self.text.kernels:
            raise SimulatorError(f"no kernel {name}; there are: {', '.join(self.text.kernels) or 'none'}")
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]

    def variable(self, name: str) -> Variable:
        return self.text.variables["global"].get(name) or self.text.variables["const"][name]

    def address_of(self, name: str) -> int:
        """Where a .global or .const variable lies; made and filled when it is first asked for."""
        if name in self._addresses:
            return self._addresses[name]
        v = self.variable(name)
        memory = ctypes.create_string_buffer(v.size + 256)
        base = (ctypes.addressof(memory) + 255) // 256 * 256
        self._memory[name] = memory
        self._addresses[name] = base
        element = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}.get(
            v.type, 8 if v.type.endswith("64") else 4
        )
        for i, value in enumerate(v.values):
            number = value if isinstance(value, int) else self.address_of(value[0]) + value[1]
            data = (number & ((1 << 8 * element) - 1)).to_bytes(element, "little")
            ctypes.memmove(base + i * element, data, element)
        return base

    def regions(self) -> list[Region]:
        constant = self.text.variables["const"]
        return [(base, self.variable(name).size, name not in constant, name) for name, base in self._addresses.items()]


class Kernel:
    def __init__(self, module: Module, name: str) -> None:
        began = time.perf_counter()
        lib = library()
        self.module, self.name = module, name
        function = module.text.kernels[name]
        self.params = function.params
        self.param_bytes = max((p.offset + p.size for p in self.params), default=0)
        self.required = self._threads(function.head, "reqntid")
        self.most = self._threads(function.head, "maxntid")
        program = decode(module.text, name, lib.names, lib.specials, module.address_of)
        self.opcodes = [r.opcode for r in program.code]
        self.static_shared = program.static_shared
        self.file_bytes = program.file_bytes
        self._free = lib.c.ptxsim_free
        self._handle = self._load(program)
        self.decode_seconds = time.perf_counter() - began

    @staticmethod
    def _threads(head: str, word: str) -> tuple[int, int, int] | None:
        m = re.search(rf"\.{word}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head)
        return (int(m[1]), int(m[2] or 1), int(m[3] or 1)) if m else None

    def _load(self, p: Program) -> int:
        at = p.offsets
        packed = bytearray()
        pool: list[int] = []
        one = struct.Struct("<IBBH6iqiiii")
        for r in p.code:
            x = [at[v] if v >= 0 else -1 for v in r.x] + [-1] * (6 - len(r.x))
            target, more = r.target, r.number
            if r.control == BRANCH:
                target = p.labels[str(r.target)]
            if r.control == BRANCH_TABLE:
                more = len(pool)
                pool += [p.labels[label] for label in r.labels]
            elif r.more:
                more = len(pool)
                pool += [at[v] if v >= 0 else -1 for v in r.more]
            target = int(target)
            if target >= 1 << 31:
                target -= 1 << 32
            packed += one.pack(r.op, r.control, r.negate, r.mod, *x, r.imm if r.imm < 1 << 63 else r.imm - (1 << 64),
                               at[r.guard] if r.guard >= 0 else -1, target, more, r.line)  # fmt: skip
        constants = [n for v, wide, value in p.constants for n in (at[v], int(wide), value)]
        specials = [n for v, which in p.specials for n in (at[v], which)]
        touches = []
        for t in p.touches:
            touches.append(len(pool) if t else -1)
            pool += [len(t), *t] if t else []
        sizes = [len(p.code), len(pool), len(p.constants), len(p.specials), p.file_bytes, p.static_shared, p.local_bytes,
                 p.shared_granule, p.global_granule, p.watched]  # fmt: skip
        handle: int = library().c.ptxsim_program(
            bytes(packed),
            (ctypes.c_int32 * (len(pool) + 1))(*pool),
            (ctypes.c_uint64 * (len(constants) + 1))(*constants),
            (ctypes.c_uint32 * (len(specials) + 1))(*specials),
            (ctypes.c_uint32 * len(sizes))(*sizes),
            (ctypes.c_int32 * (len(touches) + 1))(*touches),
        )
        return handle

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free(ctypes.c_void_p(self._handle))

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        params: bytes,
        shared: int = 0,
        memory: Sequence[Region] = (),
        *,
        sched: int = 0,
        seed: int = 1,
        race: bool = False,
        lazy_async: bool = False,
        mma: int = 0,
        max_steps: int = 4_000_000_000,
    ) -> LaunchReport:
        """Runs the kernel. params: the parameter block as PTX lays it out (self.params). memory: what it may touch."""
        grid, block = [*grid, 1, 1][:3], [*block, 1, 1][:3]
        threads = block[0] * block[1] * block[2]
        what = f"{self.name}<<<{tuple(grid)}, {tuple(block)}, {shared}>>>"
        if len(params) != self.param_bytes:
            raise SimulatorError(f"{what}: {len(params)} bytes of parameters given, {self.param_bytes} wanted")
        if not 1 <= threads <= 1024 or min(grid) < 1 or max(grid[1:]) > 65535 or block[2] > 64:
            raise SimulatorError(f"{what}: not a launch that a GPU takes")
        if self.required and tuple(block) != self.required:
            raise SimulatorError(f"{what}: the kernel wants blocks of {self.required}")
        if self.most and threads > self.most[0] * self.most[1] * self.most[2]:
            raise SimulatorError(f"{what}: the kernel takes at most {self.most} threads a block")
        regions = [*memory, *self.module.regions()]
        flat = [n for address, size, writable, _ in regions for n in (address, address + size, int(writable))]
        names = "".join(name.replace("\n", " ") + "\n" for _, _, _, name in regions)
        n = len(self.opcodes)
        counts = np.zeros(2 * n, np.uint64)
        message = ctypes.create_string_buffer(1 << 16)
        seconds = ctypes.c_double()
        problems = library().c.ptxsim_launch(
            ctypes.c_void_p(self._handle), (ctypes.c_uint32 * 8)(*grid, *block, shared, len(params)), params,
            (ctypes.c_uint64 * (len(flat) + 1))(*flat), len(regions), names.encode(),
            (ctypes.c_int64 * 6)(sched, int(race), int(lazy_async), mma, seed, max_steps), message, len(message),
            counts.ctypes.data_as(ctypes.c_void_p), ctypes.byref(seconds),
        )  # fmt: skip
        if problems:
            raise SimulatorError(f"{what}: {problems} problem(s)\n" + self._with_lines(message.value.decode()))
        report = LaunchReport(seconds.value)
        for opcode, warps, lanes in zip(self.opcodes, counts[:n].tolist(), counts[n:].tolist(), strict=True):
            if warps:
                report.executed[opcode] += warps
                report.lanes[opcode] += lanes
        return report

    def _with_lines(self, text: str) -> str:
        lines = self.module.text.lines

        def line(m: re.Match[str]) -> str:
            n = int(m[1])
            return f"PTX line {n}: {' '.join(lines[n - 1].split())}" if 0 < n <= len(lines) else f"PTX line {n}"

        return re.sub(r"\{line (\d+)\}", line, text)

    def pack(self, args: Sequence[object]) -> tuple[bytes, list[Region]]:
        """Arrays, numbers and bytes to a parameter block, and the arrays as memory; one that is not writable is read-only."""
        if len(args) != len(self.params):
            raise SimulatorError(f"{self.name}: {len(args)} arguments given, {len(self.params)} wanted")
        out, regions = bytearray(self.param_bytes), []
        for i, (p, a) in enumerate(zip(self.params, args, strict=True)):
            if isinstance(a, np.ndarray):
                regions.append((a.ctypes.data, a.nbytes, bool(a.flags.writeable), f"argument {i}"))
                data = a.ctypes.data.to_bytes(8, "little")
            elif a is None:
                data = bytes(8)
            elif isinstance(a, bytes | bytearray):
                data = bytes(a)
            elif isinstance(a, float | np.floating):
                data = struct.pack("<f" if p.size == 4 else "<d", float(a))
            else:
                data = (int(a) & ((1 << 8 * p.size) - 1)).to_bytes(p.size, "little")  # type: ignore[call-overload]
            if len(data) != p.size:
                raise SimulatorError(f"{self.name}: argument {i} has {len(data)} bytes, {p.size} wanted")
            out[p.offset : p.offset + p.size] = data
        return bytes(out), regions


@lru_cache(maxsize=16)
def _module(ptx: str) -> Module:
    return Module(ptx)


def run(
    ptx: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[object],
    shared: int = 0,
    memory: Sequence[Region] = (),
    **options: Any,
) -> LaunchReport:
    """One launch on numpy arrays (changed in place), None, numbers and bytes. memory: what else it may touch; options: as
    Kernel.launch has them.
    """
    k = _module(ptx).kernel(kernel)
    params, arrays = k.pack(args)
    grid, block = ([v] if isinstance(v, int) else v for v in (grid, block))
    return k.launch(grid, block, params, shared, [*arrays, *memory], **options)
