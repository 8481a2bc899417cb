"""What Triton and its ptxas make of rerank_kernels/backend/triton, read from PTX and machine code on a machine without a GPU.

    python tests/witness_triton.py             # the rules, for every kernel, tile and dtype; exit status 1 if one is broken
    python tests/witness_triton.py --check     # the same, and docs/GPU.md is what --write would write
    python tests/witness_triton.py --write     # the same, and writes the generated part of docs/GPU.md

Kernels are compiled as the backend's own calls ask for them (`calls`), assembled by the ptxas that Triton brings, with the
flags that Triton gives it, and disassembled. The rules are witness.py's, for mode portable word by word: no PTX instruction
outside the contract, no product that ptxas fused with a sum (dyed PTX), no spills and no other local memory, no atomics, no
tensor cores. A kernel of mode tensor has tensor cores, all of one kind (HMMA, on Hopper HGMMA), and keeps the other rules.
Shared memory is at most 99 KB a block; on Hopper, where mode tensor has tiles of its own, 227 KB.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import rerank_kernels as rk
import witness
from ptxsim import simulated_triton as simulated
from rerank_kernels.backend import library
from rerank_kernels.backend.triton import attention, linear

BEGIN = "<!-- written by tests/witness_triton.py --write: do not edit -->"
END = "<!-- end of what tests/witness_triton.py writes -->"
ARCHITECTURES = (80, 90, 120)
HALVES = (torch.float16, torch.bfloat16)
KB = 1024
# What is exact in any precision, and on sm_120 the sum of a float32 and a half, which is one rounding.
EXACT = re.compile(r"(abs|neg)\.|add\.rn\.f32\.b?f16\Z")


def shared_limit(arch: int, tensor: bool) -> int:
    return (227 if arch == 90 and tensor else 99) * KB


@dataclass(frozen=True)
class Program:
    """One kernel as one call compiles it, for one architecture."""

    name: str
    what: str  # the call
    arch: int
    ptx: str
    threads: int
    shared: int
    registers: int
    stack: int
    spills: int
    code: witness.Code
    dyed: witness.Code

    @property
    def tensor(self) -> bool:
        return self.name.endswith("_tensor_kernel")

    @property
    def matrix(self) -> Counter[str]:
        """HMMA.16816.F32 and the like."""
        return Counter(op for op in self.code.ops if op.split(".")[0].endswith("MMA") and op.split(".")[0] != "HFMA2")

    def defects(self) -> list[str]:
        outside = witness.outside_contract(self.ptx)
        outside = Counter({op: n for op, n in outside.items() if not EXACT.match(op)})
        forbidden = self.code.forbidden()
        told = []
        if self.tensor:
            root = "HGMMA" if self.arch == 90 else "HMMA"
            outside = Counter({op: n for op, n in outside.items() if op.split(".")[0] not in ("mma", "wgmma")})
            forbidden = Counter({op: n for op, n in forbidden.items() if op not in self.matrix})
            if {op.split(".")[0] for op in self.matrix} != {root}:
                told.append(f"wants {root}, has {witness._listed(self.matrix) or 'no tensor core'}")
        told += [f"PTX outside the contract: {witness._listed(outside)}"] if outside else []
        told += [f"ptxas fused: {witness._listed(ops)} in the dyed code"] if (ops := self.dyed.undyed()) else []
        told += [f"machine code: {witness._listed(forbidden)}"] if forbidden else []
        told += [f"{self.stack} bytes of stack, {self.spills} of spills"] if self.stack or self.spills else []
        limit = shared_limit(self.arch, self.tensor)
        told += [f"{self.shared} bytes of shared memory, more than {limit}"] if self.shared > limit else []
        return told


# ---- what is compiled


def calls(arch: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every kernel of the backend in every tile, at the sizes of usual models: all in the first dtype that it has, in others
    what differs by more than conversions. Of the tiles of attention the first, which is the one taken, with a window too."""

    def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    offsets = torch.tensor([0, 100, 256], dtype=torch.int32)
    for dtype, t in ((torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")):
        x, few, weight, bias = zeros(dtype, 256, 768), zeros(dtype, 2, 768), zeros(dtype, 1024, 768), zeros(dtype, 1024)
        full: dict[str, Any] = {"activation": "gelu", "residual": zeros(dtype, 256, 1024)}
        if dtype == torch.float32:
            yield t, partial(rk.normalize, x)
            yield t, partial(rk.softmax, x, -1)
            yield t, partial(rk.mean, x, -1)
            yield f"{t}, gelu", partial(rk.activation, x, "gelu")
            yield t, partial(rk.pool, x, "mean", cu_seqlens=offsets)
            yield t, partial(rk.sigmoid, x)
            for rows in (few, x):
                down = weight.t().contiguous()
                yield f"{t}, {len(rows)} rows, gate", partial(rk.sparse_ffn, rows, weight, down, gate_weight=weight)
        if dtype != torch.bfloat16:
            yield t, partial(rk.layer_norm, x, x[0], x[0], residual=x)
            yield f"{t}, rms", partial(rk.rms_norm, x, x[0], offset=1, residual=x)
            for way, small in enumerate(linear.TILES):
                if dtype == torch.float32 or small == linear.TILES[-1]:
                    call = partial(rk.linear, x, weight, bias, **full)
                    yield f"{t}, gelu, residual, tile {small[0]} x {small[1]}", _with(linear, way, call)
            for d in (64, 128) if dtype == torch.float32 else (64,):
                q = zeros(dtype, 256, 4, d)
                for options in ({}, {"causal": True}):
                    call = partial(rk.attention, q, q, q, cu_seqlens=offsets, **options)
                    yield ", ".join([t, f"D = {d}", *options]), call
        if dtype == torch.float32:
            continue
        for way, tile in enumerate(linear.tensor_tiles(arch)):
            if dtype == torch.float16 or way == 3:
                call = partial(rk.linear, x, weight, bias, mode="tensor", **full)
                yield f"{t}, gelu, residual, tile {tile.rows} x {tile.columns}", _with(linear, way, call)
        for d in (64, 96, 128, 256) if dtype == torch.float16 else ():
            q = zeros(dtype, 256, 4, d)
            for way, part in enumerate(attention.tensor_tiles(d, arch)):
                windows: tuple[dict[str, Any], ...] = ({},) if way or d == 96 else ({}, {"window": (30, 30)})
                for options in windows:
                    call = partial(rk.attention, q, q, q, cu_seqlens=offsets, mode="tensor", **options)
                    words = [t, f"D = {d}", *options, f"{part.rows} rows", f"{part.warps} warps"]
                    yield ", ".join(words), _with(attention, way, call)


def _with(module: Any, way: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> None:
        before, module.force = module.force, way
        try:
            call()
        finally:
            module.force = before

    return forced


def compiled(arch: int) -> dict[str, tuple[str, simulated.Compiled]]:
    """By PTX, so that what several calls share is there once: the call that came first, and the program."""
    found: dict[str, tuple[str, simulated.Compiled]] = {}
    for what, call in calls(arch):
        before = len(simulated.used)
        with simulated.simulated_triton(arch=arch, starts=False):
            call()
        for program in simulated.used[before:]:
            found.setdefault(program.ptx, (what, program))
    return found


# ---- ptxas


def assembled(ptx: str, arch: int) -> tuple[witness.Code, str]:
    """The only kernel's machine code, and what ptxas says of it."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", "--fmad=false", "--regAllocOptLevel=2"]
        command += [f"--gpu-name={sm_arch_from_capability(arch)}", str(source), "-o", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(said.stderr[:2000])
        text = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    (code,) = witness.machine_kernels(text).values()
    return code, said.stderr


def disassembler() -> Path:
    """Triton's own, which knows what its ptxas writes."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def witnessed(what: str, program: simulated.Compiled, arch: int) -> Program:
    code, said = assembled(program.ptx, arch)
    dyed, _ = assembled(witness.dyed(program.ptx), arch)

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    registers, stack = number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame")
    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Program(
        program.name, what, arch, program.ptx, program.threads, program.shared, registers, stack, spills, code, dyed
    )  # fmt: skip


def every(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Program]:
    jobs = [(what, program, arch) for arch in architectures for what, program in compiled(arch).values()]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: witnessed(*job), jobs))


# ---- the page


def page(found: list[Program]) -> str:
    import triton

    rows: dict[tuple[str, ...], dict[int, Program]] = {}
    for p in found:
        rows.setdefault((p.name, p.what), {})[p.arch] = p
    lines = [
        "| kernel | call | "
        + " | ".join(f"sm_{a}: registers x threads, shared KB" for a in ARCHITECTURES)
        + " | tensor cores |",
        "|---|---|" + "---|" * len(ARCHITECTURES) + "---|",
    ]
    merged: dict[tuple[str, ...], list[str]] = {}
    for (name, what), each in sorted(rows.items()):
        cells = [f"{p.registers} x {p.threads}, {p.shared / KB:.1f}" if (p := each.get(a)) else "" for a in ARCHITECTURES]
        matrix = sorted({".".join(op.split(".")[:2]) for p in each.values() for op in p.matrix})
        dtype, _, rest = what.partition(", ")
        merged.setdefault((name, rest, *cells, ", ".join(matrix)), []).append(dtype)
    for (name, rest, *cells), dtypes in merged.items():
        lines.append(f"| `{name}` | {', '.join([*dtypes, rest]).removesuffix(', ')} | {' | '.join(cells)} |")
    return "\n".join(
        [
            BEGIN,
            "",
            "## Triton's kernels",
            "",
            f"Triton {triton.__version__} and the ptxas that it brings; {len(found)} programs for "
            f"{', '.join(f'sm_{a}' for a in ARCHITECTURES)}, each kernel in every tile. In all of them: no spills, no local "
            "memory, no atomics, no product that ptxas fused with a sum, and outside mode tensor no instruction outside the "
            "contract. In mode tensor every tile has HMMA, on sm_90 HGMMA, and no other. `make cuda-check` looks. Sizes are "
            "those of usual models: attention in mode tensor does spill, and is slow, where a head has more than 128 features "
            "and their number is no multiple of 16.",
            "",
            "<details><summary>Registers and shared memory of every program</summary>",
            "",
            *lines,
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
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="only this one (may be repeated)")
    args = parser.parse_args()
    if reason := simulated.missing() or library.missing():  # the library holds the layouts of weights
        print("witness_triton:", reason)
        return 1
    import triton

    found = every(tuple(args.arch or ARCHITECTURES))
    broken = [f"{p.name}, {p.what}, sm_{p.arch}: {d}" for p in found for d in p.defects()]
    print("\n".join(broken) or f"witness_triton: {len(found)} programs of Triton {triton.__version__}, every rule holds")
    if args.write or args.check:
        text = witness.PAGE.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        old, _, after = rest.partition(END)
        new = (before if rest else before.rstrip("\n") + "\n\n") + page(found) + (after or "\n")
        if args.write:
            witness.PAGE.write_text(new, encoding="utf-8")
        elif (named := re.search(r"^Triton (\S+) and", old, re.MULTILINE)) and named[1] != triton.__version__:
            print(f"witness_triton: docs/GPU.md was written with Triton {named[1]}, this is {triton.__version__}: not compared")
        elif new != text:
            broken.append("stale")
            print("witness_triton: docs/GPU.md is stale: run tests/witness_triton.py --write")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
