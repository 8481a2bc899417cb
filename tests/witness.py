"""What nvcc and ptxas make of csrc/cuda, read from PTX and machine code on a machine without a GPU.

    python tests/witness.py             # the rules, for every kernel on every architecture; exit status 1 if one is broken
    python tests/witness.py --check     # the same, and docs/GPU.md is what --write would write
    python tests/witness.py --write     # the same, and writes the generated part of docs/GPU.md

The rules, each a consequence of NUMERICS.md:
- PTX holds nothing outside the contract (`outside_contract`): arithmetic is float32 and .rn, nothing approximate, no tensor
  core, no atomic, and nothing that asks which multiprocessor it runs on or what time it is. The kernels of csrc/cuda/sm80/
  have tensor cores, by one instruction only: mma.sync.m16n8k16 with float32 sums.
- ptxas does not fuse what PTX holds apart. An FFMA may come from a PTX fma or from the inside of a division or square root, so
  counting says little. Instead the PTX is dyed: every fma.rn becomes fma.rz, and divisions, reciprocals and square roots become
  instructions that need no FFMA. Then every FFMA must be an FFMA.RZ: one without the dye is a product and a sum that ptxas
  fused. (Take the .rn from PTX's mul and add, and it does: test_witness.py.)
- Machine code holds no local memory (spills, arrays with computed indices), no atomics, and tensor cores where they belong.
- Kernels that stream move 16 bytes an instruction.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import toolkit

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
PAGE = ROOT / "docs" / "GPU.md"
BEGIN, END = "<!-- written by tests/witness.py --write: do not edit -->", "<!-- end of what tests/witness.py writes -->"
ARCHITECTURES = toolkit.ARCHITECTURES


# ---- PTX ------------------------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);", re.MULTILINE)
_FLOAT = re.compile(r"\.(f16|f16x2|bf16|bf16x2|f32|f32x2|f64|tf32|e4m3\w*|e5m2\w*)\b")
_ARITHMETIC = {"add", "sub", "mul", "fma", "mad", "div", "sqrt", "rcp", "neg", "abs", "min", "max", "copysign", "testp"}
_ROUNDS = {"add", "sub", "mul", "fma", "mad", "div", "sqrt", "rcp"}
_NEVER = {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "mma", "wmma", "wgmma", "tcgen05", "atom", "red", "multimem", "call"}
_TENSOR = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32")  # the one of mode "tensor"
_WHICH_CHIP = re.compile(r"%(smid|nsmid|warpid|nwarpid|gridid|clock|clock64|globaltimer)\b")


def ptx_kernels(ptx: str) -> dict[str, str]:
    """Mangled name -> text, from .entry to the closing brace."""
    return {m[1]: m[0] for m in re.finditer(r"\.entry\s+(\w+)\s*\(.*?^\}", ptx, re.MULTILINE | re.DOTALL)}


def outside_contract(kernel: str, tensor: bool = False) -> Counter[str]:
    """The instructions of a kernel's PTX that the contract does not have: bits left open, or other than its float32 steps.
    `tensor`: a kernel of mode "tensor", which may have that mode's one instruction besides.
    """
    found: Counter[str] = Counter()
    for op, operands in _INSTRUCTION.findall(kernel):
        root, *parts = op.split(".")
        kind = _FLOAT.findall(op)
        if tensor and _TENSOR.fullmatch(op):
            continue
        bad = root in _NEVER or {"approx", "ftz", "full", "sat"} & set(parts)
        if root in _ARITHMETIC and kind:
            bad = bad or set(kind) - {"f32", "f32x2"} or (root in _ROUNDS and "rn" not in parts)
        if root == "cvt":
            bad = bad or "f64" in kind or "tf32" in kind
        if which := _WHICH_CHIP.search(operands):
            op, bad = which[0], True
        if bad:
            found[op] += 1
    return found


def dyed(ptx: str) -> str:
    """PTX whose every fma shows in the machine code as FFMA.RZ, and in which nothing else needs one."""
    ptx = re.sub(r"\bfma\.rn\.(f32|f32x2)\b", r"fma.rz.\1", ptx)
    ptx = re.sub(r"\bdiv\.rn\.f32\b", "min.f32", ptx)
    return re.sub(r"\b(?:sqrt|rcp)\.rn\.f32\b", "mov.f32", ptx)


# ---- machine code ---------------------------------------------------------------------------------------------------------

_MACHINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")


@dataclass(frozen=True)
class Code:
    """A kernel's machine code."""

    ops: tuple[str, ...]
    operands: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]  # first and last instruction

    def count(self, *roots: str) -> int:
        return sum(op.split(".")[0] in roots for op in self.ops)

    def undyed(self) -> Counter[str]:
        fma = (op for op in self.ops if op.split(".")[0] in ("FFMA", "FFMA2") and "RZ" not in op.split("."))
        return Counter(fma)

    def wide(self, *roots: str) -> int:
        return sum(op.split(".")[0] in roots and "128" in op.split(".") for op in self.ops)

    def forbidden(self, tensor: bool = False) -> Counter[str]:
        found: Counter[str] = Counter()
        for op, operands in zip(self.ops, self.operands, strict=True):
            root, parts = op.split(".")[0], op.split(".")
            local = root in ("LDL", "STL")
            atomic = root in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS")
            # HFMA2.MMA with zeros is ptxas' way to load a constant; it is no tensor core
            matrix = root.endswith("MMA") and root != "HFMA2" and not (tensor and root == "HMMA")
            half = root in ("HFMA2", "HMUL2") and "RZ, RZ" not in operands
            half = half or (root == "HADD2" and "F32" not in parts)
            double = root in ("DADD", "DMUL", "DFMA")
            special = root == "MUFU" and parts[1] not in ("RCP", "RCP64H", "RSQ")  # these begin divisions and square roots
            if local or atomic or matrix or half or double or special:
                found[op] += 1
        return found

    def hot(self) -> tuple[int, int]:
        """Of the loop that is densest in FFMA, which is where a kernel that computes spends its time: these, and all its
        instructions, both without the loops inside it; (0, 0) without such a loop. One that divides is an epilogue's, if there
        is another. With tensor cores, of the loop with most HMMA: its instructions are also those for rows at odd addresses.
        """
        matrix = self.count("HMMA") > 0
        what, least = ("HMMA", 4) if matrix else ("FFMA", 8)
        found = []
        for a, b in self.loops:
            inside = {i for c, d in self.loops if (c, d) != (a, b) and a <= c and d <= b for i in range(c, d + 1)}
            own = [self.ops[i] for i in range(a, b + 1) if i not in inside]
            fma = sum(op.startswith(what) for op in own)
            if fma >= least:
                found.append((not any(op.startswith("MUFU") for op in own), fma if matrix else fma / len(own), fma, len(own)))
        return max(found, default=(False, 0.0, 0, 0))[2:]


def machine_kernels(text: str) -> dict[str, Code]:
    """From nvdisasm -c."""
    found = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        ops: list[str] = []
        operands: list[str] = []
        labels: dict[str, int] = {}
        jumps: list[tuple[str, int]] = []
        for line in section.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(ops)
            elif instruction := _MACHINE.search(line):
                if instruction[1].split(".")[0] == "BRA" and (to := re.search(r"\.L_\w+", instruction[2])):
                    jumps.append((to[0], len(ops)))
                ops.append(instruction[1])
                operands.append(instruction[2])
        loops: dict[int, int] = {}  # from where to where; several jumps back to one place are one loop
        for to, at in jumps:
            if labels.get(to, at) < at:  # a jump to itself ends the code
                loops[labels[to]] = max(at, loops.get(labels[to], at))
        found[section.split(",")[0].strip()] = Code(tuple(ops), tuple(operands), tuple(sorted(loops.items())))
    return found


# ---- one kernel on one architecture ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    mangled: str
    family: str
    arch: str
    ptx: str
    code: Code
    dyed: Code
    registers: int
    stack: int
    spills: int
    static_shared: int

    @property
    def name(self) -> str:
        return readable(self.mangled)

    @property
    def tensor(self) -> bool:
        return self.family.startswith("sm80/")

    def defects(self) -> list[str]:
        told = [f"PTX outside the contract: {_listed(ops)}"] if (ops := outside_contract(self.ptx, self.tensor)) else []
        told += [f"ptxas fused: {_listed(ops)} in the dyed code"] if (ops := self.dyed.undyed()) else []
        wanted = len(re.findall(r"\bfma\.rn\.f32\b", self.ptx)) + 2 * len(re.findall(r"\bfma\.rn\.f32x2\b", self.ptx))
        there = sum({"FFMA": 1, "FFMA2": 2}.get(op.split(".")[0], 0) for op in self.dyed.ops)
        told += [f"{wanted} fma in PTX, {there} in the dyed code"] if wanted > there else []
        told += [f"machine code: {_listed(ops)}"] if (ops := self.code.forbidden(self.tensor)) else []
        told += ["mode tensor, and no HMMA"] if self.tensor and not self.code.count("HMMA") else []
        told += [f"{self.stack} bytes of stack, {self.spills} of spills"] if self.stack or self.spills else []
        if streams(self.name) and not self.code.wide("LDG", "LDGSTS"):
            told.append("streams, but loads no 16 bytes at once")
        return told


# Kernels for rows whose length or address is not a multiple of 16 bytes, and those that read next to nothing.
NARROW = (
    r"^(softmax_long|axpy)_kernel<[^<>]*, 1>$",
    r"^((layer_norm|rms_norm|normalize)_long|score|active|finish)_kernel$",
)


def streams(name: str) -> bool:
    return not any(re.search(n, name) for n in NARROW)


def _listed(ops: Counter[str]) -> str:
    return ", ".join(f"{n} x {op}" for op, n in sorted(ops.items()))


@functools.cache
def readable(mangled: str) -> str:
    """linear_tile<128x64, f16, float>."""
    said = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void ", "", said.replace("rk::", ""))
    name = re.sub(r"\(.*\)$", "", name)
    return re.sub(r"\w*Tile<(\d+), (\d+),[^<>]*>", r"\1x\2", name)


def of_ptx(ptx: str, family: str, arch: str) -> list[Kernel]:
    kit = toolkit.find()
    assert kit is not None
    made, said = kit.assemble(ptx, arch)
    codes = machine_kernels(kit.disassemble(made))
    dyed_codes = machine_kernels(kit.disassemble(kit.assemble(dyed(ptx), arch)[0]))
    kernels = []
    for mangled, text in ptx_kernels(ptx).items():
        log = re.search(rf"entry function '{mangled}'.*?Used (\d+) registers[^\n]*", said, re.DOTALL)
        assert log is not None, f"ptxas says nothing of {mangled}"
        numbers = {
            key: int(m[1]) if (m := re.search(rf"(\d+) bytes {key}", log[0])) else 0
            for key in ("stack frame", "spill stores", "spill loads", "smem")
        }
        spills = numbers["spill stores"] + numbers["spill loads"]
        kernels.append(
            Kernel(
                mangled,
                family,
                arch,
                text,
                codes[mangled],
                dyed_codes[mangled],
                int(log[1]),
                numbers["stack frame"],
                spills,
                numbers["smem"],
            )
        )
    return kernels


def of_source(source: Path, arch: str) -> list[Kernel]:
    kit = toolkit.find()
    assert kit is not None
    return of_ptx(kit.ptx(source, arch).read_text(), f"{source.parent.name}/{source.stem}", arch)


def every(architectures: tuple[str, ...]) -> list[Kernel]:
    sources = sorted(CUDA.rglob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: of_source(*job), [(s, a) for a in architectures for s in sources])
        return [k for kernels in made for k in kernels]


# ---- occupancy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor, by compute capability; CUDA C++ Programming Guide, "Technical Specifications"."""

    warps: int
    blocks: int
    shared: int  # KB for all its blocks; every block takes 1 KB more than it asks for
    lanes: int  # float32 fma a clock


LIMITS = {
    "80": Limits(64, 32, 164, 64),
    "86": Limits(48, 16, 100, 128),
    "89": Limits(48, 24, 100, 128),
    "90": Limits(64, 32, 228, 128),
    "100": Limits(64, 32, 228, 128),
    "120": Limits(48, 24, 100, 128),
}
REGISTERS = 64 * 1024


def blocks_per_sm(arch: str, registers: int, shared: int, threads: int) -> int:
    """How many blocks a multiprocessor holds at once. Registers are dealt 256 at a time to a warp and warps in fours, shared
    memory 128 bytes at a time; cuda_occupancy.h in the toolkit says the same.
    """
    limit = LIMITS[arch]
    warps = math.ceil(threads / 32)
    by_registers = REGISTERS // (math.ceil(max(registers, 1) * 32 / 256) * 256) // 4 * 4 // warps
    by_shared = limit.shared * 1024 // (math.ceil((shared + 1024) / 128) * 128)
    return min(limit.blocks, limit.warps // warps, by_registers, by_shared)


# ---- launches -------------------------------------------------------------------------------------------------------------
# What the launchers ask for, from the launchers themselves: the library of ptxsim/, whose kernels here only note their launch.


@dataclass(frozen=True)
class Launch:
    mangled: str
    grid: tuple[int, int, int]
    block: int
    shared: int

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)


@contextlib.contextmanager
def recording() -> Iterator[tuple[Any, list[Launch]]]:
    """Inside the block ops on CPU tensors are served by csrc/cuda's launchers, and launches are noted instead of run: outputs
    hold no numbers. Gives ptxsim.simulated and the growing list.
    """
    from ptxsim import simulated
    from rerank_kernels.backend.library import missing

    if reason := missing():  # it holds the ops' signatures
        raise RuntimeError(f"launches cannot be noted: {reason}")
    noted: list[Launch] = []

    def note(name: bytes, grid: Any, block: Any, shared: int, arguments: Any, memory: Any, count: int) -> int:
        noted.append(Launch(name.decode(), (grid[0], grid[1], grid[2]), block[0] * block[1] * block[2], shared))
        return 0

    callback, library = simulated._LAUNCH(note), ctypes.CDLL(str(simulated.library()))
    with simulated.simulated():
        library.ptxsim_connect(callback)
        try:
            yield simulated, noted
        finally:
            library.ptxsim_connect(simulated._callback)


@dataclass(frozen=True)
class Shape:
    """A call of a real model, and what it costs at least."""

    label: str
    call: Any
    flop: float
    bytes: float
    tensor: bool = False  # on tensor cores


@functools.cache
def shapes() -> list[Shape]:
    """bge-reranker-base with 2,048 tokens (4 pairs of 512), and ReLULLaMA-7B's FFN for one token."""
    import torch

    import rerank_kernels as rk

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    m, d, f, t = 2048, 768, 3072, 512
    x, wide = zeros(m, d), zeros(m, f)
    offsets = torch.arange(0, m + 1, t, dtype=torch.int32)
    heads = zeros(m, 12, 64)
    k, n = 4096, 11008
    half = torch.float16
    token, up, down = zeros(1, k, dtype=half), zeros(n, k, dtype=half), zeros(k, n, dtype=half)
    return [
        Shape(
            "linear 2048 x 768 x 3072, float32",
            lambda: rk.linear(x, zeros(f, d), zeros(f), activation="gelu"),
            2.0 * m * d * f,
            4.0 * (m * d + d * f + m * f),
        ),
        Shape(
            "linear 2048 x 3072 x 768, float32",
            lambda: rk.linear(wide, zeros(d, f), zeros(d), residual=x),
            2.0 * m * d * f,
            4.0 * (m * f + d * f + 2 * m * d),
        ),
        Shape(
            "linear 2048 x 768 x 3072, float16, mode tensor",
            lambda: rk.linear(x.half(), zeros(f, d, dtype=half), activation="gelu", mode="tensor"),
            2.0 * m * d * f,
            2.0 * (m * d + d * f + m * f),
            tensor=True,
        ),
        Shape("linear 1 x 768 x 768, float32", lambda: rk.linear(x[:1], zeros(d, d), zeros(d)), 2.0 * d * d, 4.0 * d * d),
        Shape(
            "attention 4 x 512 tokens, 12 heads x 64, float32",
            lambda: rk.attention(heads, heads, heads, cu_seqlens=offsets),
            4.0 * m * t * d,
            4.0 * 4 * m * d,
        ),
        Shape(
            "layer_norm 2048 x 768 + residual, float32",
            lambda: rk.layer_norm(x, zeros(d), zeros(d), residual=x),
            8.0 * m * d,
            4.0 * 3 * m * d,
        ),
        Shape(
            "sparse_ffn 4096 x 11008 gated, 1 token, 10 % active, float16",
            lambda: rk.sparse_ffn(token, up, down, gate_weight=up),
            2.0 * 1.2 * k * n,
            2.0 * 1.2 * k * n,
        ),
    ]


def other_calls() -> Iterator[Any]:
    """Calls that together reach every kernel there is, with every way of every launcher forced."""
    import torch

    import cases
    import rerank_kernels as rk

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    for a in cases.DTYPES:
        x, heads = zeros(a, 256, 768), zeros(a, 256, 12, 64)
        yield lambda x=x: rk.activation(x, "gelu")
        yield lambda x=x: rk.pool(x, "mean", cu_seqlens=offsets)
        yield lambda x=x: rk.score_head(x, x[:1], x[0, :1])
        yield lambda q=heads: rk.attention(q, q, q, cu_seqlens=offsets)
        for d in (32, 64, 96, 128, 192, 256) if a != torch.float32 else ():
            q = zeros(a, 256, 4, d)
            yield lambda q=q: rk.attention(q, q, q, cu_seqlens=offsets, mode="tensor")
        for rows, d in ((256, 768), (64, 2048), (3, 30000), (3, 65536), (3, 65537)):
            x = zeros(a, rows, d)
            yield lambda x=x: rk.layer_norm(x, x[0], x[0], residual=x)
            yield lambda x=x: rk.rms_norm(x, x[0], residual=x)
            yield lambda x=x: rk.normalize(x)
            yield lambda x=x: rk.softmax(x, -1)
            yield lambda x=x: rk.sum(x, -1)
        for b in cases.DTYPES:
            for k, f, d in ((768, 1024, 768), (33, 65, 31)):
                x, up, down = zeros(a, 2, k), zeros(b, f, k), zeros(b, d, f)
                yield lambda x=x, up=up: rk.linear(x, up)
                yield lambda x=x, up=up, down=down: rk.sparse_ffn(x, up, down)
                yield lambda x=x, up=up, down=down: rk.sparse_ffn(x, up, down, gate_weight=up)
                if a == b != torch.float32:
                    yield lambda x=x, up=up: rk.linear(x, up, mode="tensor")


def launches() -> tuple[list[list[Launch]], dict[str, Launch]]:
    """Of each of `shapes`; and one of every kernel: a real shape's if there is one, else another call's, at best unforced."""
    with recording() as (simulated, noted):

        def of(call: Any) -> list[Launch]:
            before = len(noted)
            call()
            return noted[before:]

        real = [of(shape.call) for shape in shapes()]
        one = {launch.mangled: launch for each in real for launch in each}
        calls = list(other_calls())
        forced = [(None, 0), *((kernel, way) for kernel, count in simulated.launchers().items() for way in range(count))]
        for kernel, way in forced:
            with simulated.forced(kernel, way) if kernel else contextlib.nullcontext():
                for launch in (launch for call in calls for launch in of(call)):
                    one.setdefault(launch.mangled, launch)
    return real, one


# ---- the page -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """From the maker's data sheets: float32 outside tensor cores, float16 in them with float32 sums, memory bandwidth."""

    name: str
    arch: str
    multiprocessors: int
    flops: float
    tensor_flops: float
    bandwidth: float


CHIPS = (
    Chip("A100 80 GB SXM", "80", 108, 19.5e12, 312e12, 2039e9),
    Chip("L4", "89", 58, 30.3e12, 121e12, 300e9),
    Chip("H100 SXM", "90", 132, 67e12, 989e12, 3350e9),
    Chip("RTX 4090", "89", 128, 82.6e12, 165e12, 1008e9),
)


def _microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}" if us >= 1 else f"{us:.2f}"


def _big(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "


def estimates(kernels: dict[tuple[str, str], Kernel], real: list[list[Launch]]) -> list[str]:
    lines = [
        "| call | FLOP, bytes | " + " | ".join(c.name for c in CHIPS) + " | launches |",
        "|---|---|" + "---|" * len(CHIPS) + "---|",
    ]
    for shape, noted in zip(shapes(), real, strict=True):
        cells = []
        for chip in CHIPS:
            compute = shape.flop / (chip.tensor_flops if shape.tensor else chip.flops)
            memory = shape.bytes / chip.bandwidth
            unit = "mma" if shape.tensor else "fma"
            cell = f"{_microseconds(max(compute, memory))} {unit if compute > memory else 'memory'}"
            if compute > memory and not shape.tensor:
                fma, all_ops = max(kernels[n.mangled, chip.arch].code.hot() for n in noted)  # of the kernel that computes most
                slots = LIMITS[chip.arch].lanes / 128
                cell += f", {_microseconds(compute / min(1.0, fma / all_ops / slots))} issue"
            cells.append(cell)
        told = "; ".join(f"`{readable(n.mangled)}` {n.blocks:,} x {n.block}" for n in noted)
        lines.append(f"| {shape.label} | {_big(shape.flop)}FLOP, {_big(shape.bytes)}B | {' | '.join(cells)} | {told} |")
    return lines


def table(kernels: dict[tuple[str, str], Kernel], one: dict[str, Launch]) -> list[str]:
    """A row a kernel; instances of a template with equal figures share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for mangled in sorted({m for m, _ in kernels}, key=lambda m: (kernels[m, ARCHITECTURES[0]].family, readable(m))):
        each = {a: kernels[mangled, a] for a in ARCHITECTURES}
        launch = one[mangled]
        shared = each["80"].static_shared + launch.shared
        resident = {a: blocks_per_sm(a, k.registers, k.static_shared + launch.shared, launch.block) for a, k in each.items()}
        warps = {a: resident[a] * math.ceil(launch.block / 32) for a in each}
        others = [a for a in ARCHITECTURES if a not in ("80", "120")]

        def between(values: list[int]) -> str:
            return f"{min(values)}" if min(values) == max(values) else f"{min(values)}..{max(values)}"

        def full(k: Kernel) -> str:
            fma, all_ops = k.code.hot()
            return f"{fma} / {all_ops}" if fma else ""

        family, *_ = {k.family for k in each.values()}
        figures = (
            family,
            readable(mangled).split("<")[0],
            f"{launch.block}",
            f"{shared / 1024:.1f}",
            *(f"{each[a].registers} | {resident[a]} x {launch.block // 32} = {warps[a]}" for a in ("80", "120")),
            f"{between([each[a].registers for a in others])} | {between([warps[a] for a in others])}",
            full(each["80"]),
        )
        rows.setdefault(figures, []).append(readable(mangled).partition("<")[2].removesuffix(">"))
    lines = [
        "| room/family | kernel | threads | shared KB | sm_80 registers | blocks x warps | sm_120 registers | blocks x warps "
        "| others' registers | warps | hot loop: fma or mma / all |",
        "|" + "---|" * 11,
    ]
    for (family, name, *figures), instances in rows.items():
        arguments = f"`<{'>` `<'.join(instances)}>`" if instances[0] else ""
        lines.append(f"| {family} | `{name}` {arguments} | {' | '.join(figures)} |")
    return lines


def page(found: list[Kernel]) -> str:
    kernels = {(k.mangled, k.arch): k for k in found}
    real, one = launches()
    count = len({k.mangled for k in found})
    fma = sum(len(re.findall(r"\bfma\.rn\.f32\b", k.ptx)) for k in found)
    kit = toolkit.find()
    assert kit is not None
    limits = [
        "| | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|" + "---|" * len(ARCHITECTURES),
        *(
            f"| {what} | " + " | ".join(str(getattr(LIMITS[a], field)) for a in ARCHITECTURES) + " |"
            for what, field in (
                ("warps", "warps"),
                ("blocks", "blocks"),
                ("shared KB", "shared"),
                ("float32 fma a clock", "lanes"),
            )
        ),
    ]
    return "\n".join(
        [
            BEGIN,
            "",
            f"nvcc {kit.release}; {count} kernels for each of {', '.join('sm_' + a for a in ARCHITECTURES)}. In all of them: "
            "no instruction outside the contract, no spills and no local memory, no atomics, and tensor cores in those of mode "
            f"tensor only; {fma:,} fma in PTX, and no product that ptxas fused with a sum.",
            "",
            "## Times: estimated, not measured",
            "",
            *estimates(kernels, real),
            "",
            "Microseconds: the larger of FLOP / (the data sheet's float32 rate outside tensor cores; for mode tensor its "
            "float16 rate in them) and bytes / bandwidth, every operand moved once. `issue`: with the instructions beside fma "
            "in the hot loop, at 128 issued a clock. "
            "Left out: latency, the last wave, caches, clocks under load. Launches, blocks x threads, are the launchers' own.",
            "",
            "<details><summary>Registers, shared memory and occupancy of every kernel</summary>",
            "",
            *table(kernels, one),
            "",
            "Threads and shared memory as in the calls above; for a kernel that they do not reach, in a call with 256 x 768 "
            "features, a longer row, or a way forced on the launcher. Occupancy from these limits of a multiprocessor "
            "with 65,536 registers (CUDA C++ Programming Guide, "
            '"Technical Specifications per Compute Capability"; `cuda_occupancy.h`):',
            "",
            *limits,
            "",
            "</details>",
            "",
            END,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the generated part of docs/GPU.md")
    parser.add_argument("--check", action="store_true", help="fail if docs/GPU.md is not what --write would write")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this architecture (may be repeated)")
    args = parser.parse_args()
    kit = toolkit.find()
    if kit is None:
        print("witness: no nvcc here: install a CUDA toolkit, or with pip", " ".join(toolkit.found.WHEELS))
        return 1
    found = every(tuple(args.arch or ARCHITECTURES))
    broken = [f"{k.name}, sm_{k.arch}: {defect}" for k in found for defect in k.defects()]
    print("\n".join(broken) or f"witness: {len(found)} kernels of nvcc {kit.release}, every rule holds")
    if args.write or args.check:
        text = PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        old, _, after = rest.partition(END)
        new = before + page(found) + after
        if args.write:
            PAGE.write_text(new, encoding="utf-8")
        elif f"nvcc {kit.release};" not in old:
            print(f"witness: docs/GPU.md was written with another nvcc than {kit.release}: not compared")
        elif new != text:
            broken.append("stale")
            print("witness: docs/GPU.md is stale: run tests/witness.py --write")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
