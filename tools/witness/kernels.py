"""One CUDA kernel on one architecture: what nvcc and ptxas made of it, and which rules it breaks."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import toolkit
from tools.witness.machine import Code, machine_kernels
from tools.witness.ptx import dyed, outside_contract, ptx_kernels

CUDA = Path(__file__).parent.parent.parent / "csrc" / "cuda"
TENSOR_ROOMS = {"sm80": "HMMA", "sm90": "HGMMA"}  # the folders of CUDA whose kernels have tensor cores, and their instruction
ARCHITECTURES = toolkit.ARCHITECTURES
# Where ptxas sees that sums are +0 it takes scale-d = 0 instead, which may turn the sign of a zero: in these it is in no bit.
SIGN_OF_ZERO_IS_FREE = ("sm90/attention",)


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
    serialized: tuple[str, ...] = ()  # ptxas' warnings: wgmma that run one by one, or a fence that it had to add

    @property
    def name(self) -> str:
        return readable(self.mangled)

    @property
    def tensor(self) -> str | None:
        """The matrix instruction of its room, None if that has none."""
        return TENSOR_ROOMS.get(self.family.partition("/")[0])

    def defects(self) -> list[str]:
        told = [f"PTX outside the contract: {listed(ops)}"] if (ops := outside_contract(self.ptx, self.tensor)) else []
        told += [f"ptxas fused: {listed(ops)} in the dyed code"] if (ops := self.dyed.undyed()) else []
        wanted = len(re.findall(r"\bfma\.rn\.f32\b", self.ptx)) + 2 * len(re.findall(r"\bfma\.rn\.f32x2\b", self.ptx))
        there = sum({"FFMA": 1, "FFMA2": 2}.get(op.split(".")[0], 0) for op in self.dyed.ops)
        told += [f"{wanted} fma in PTX, {there} in the dyed code"] if wanted > there else []
        told += [f"machine code: {listed(ops)}"] if (ops := self.code.forbidden(self.tensor)) else []
        told += [f"mode tensor, and no {self.tensor}"] if self.tensor and not self.code.count(self.tensor) else []
        told += [f"ptxas waits for every wgmma: {said}" for said in self.serialized]
        if self.family not in SIGN_OF_ZERO_IS_FREE and self.code.from_nothing():
            told.append("a chain of wgmma starts from scale-d = 0, not from registers that hold +0")
        told += [said] if (said := registers_lacking(self.ptx, self.registers)) else []
        told += [f"{self.stack} bytes of stack, {self.spills} of spills"] if self.stack or self.spills else []
        if streams(self.name) and not self.code.wide("LDG", "LDGSTS") and not self.code.count("UTMALDG"):
            told.append("streams, but loads no 16 bytes at once")
        return told


def registers_lacking(ptx: str, registers: int) -> str | None:
    """Where warpgroups hand registers to each other: a block has those that it was started with, `registers` a thread, and who
    asks for more waits for ever. One warpgroup gives, the others take; ptxas need not start with all that a thread may have.
    """
    gives, takes = (re.search(rf"setmaxnreg\.{way}\.\S+\s+(\d+)", ptx) for way in ("dec", "inc"))
    threads = re.search(r"\.maxntid\s+(\d+)", ptx)
    if takes is None:
        return None
    assert gives and threads, "setmaxnreg of a kernel that does not say how many threads it has, or where nobody gives"
    groups, each = int(threads[1]) // 128, -(-registers // 8) * 8
    wanted = (groups - 1) * int(takes[1]) + int(gives[1])
    return (
        f"setmaxnreg: {wanted} registers for {groups} warpgroups that start with {each} each" * (wanted > groups * each) or None
    )


# Kernels for rows whose length or address is not a multiple of 16 bytes, and those that read next to nothing.
NARROW = (
    r"^(softmax_long|axpy)_kernel<[^<>]*, 1>$",
    r"^((layer_norm|rms_norm|normalize)_long|score|active|finish)_kernel$",
)


def streams(name: str) -> bool:
    return not any(re.search(n, name) for n in NARROW)


def listed(ops: Counter[str]) -> str:
    return ", ".join(f"{n} x {op}" for op, n in sorted(ops.items()))


@functools.cache
def readable(mangled: str) -> str:
    """linear_tile<128x64, f16, float>."""
    said = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"^void ", "", said.replace("rk::", ""))
    name = re.sub(r"\(.*\)$", "", name)
    return re.sub(r"\w*Tile<(\d+), (\d+),[^<>]*>", r"\1x\2", name)


def of_ptx(ptx: str, family: str, arch: str, target: str | None = None) -> list[Kernel]:
    """`target`: what ptxas is told, if it is not `arch`."""
    kit = toolkit.find()
    assert kit is not None
    target = target or arch
    made, said = kit.assemble(ptx, target)
    codes = machine_kernels(kit.disassemble(made))
    dyed_codes = machine_kernels(kit.disassemble(kit.assemble(dyed(ptx), target)[0]))
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
                tuple(re.findall(rf"\((C75\d\d)\)[^\n]*'{mangled}'", said)),
            )
        )
    return kernels


def arch_of(source: Path, arch: str) -> str | None:
    """As what a source is compiled where `arch` is asked for: in a room for Hopper alone "90a" for "90", and None for "80"."""
    only = toolkit.found.ROOMS.get(source.parent.name)
    return arch if only is None else next((a for a in only if a.rstrip("af") == arch), None)


def of_source(source: Path, arch: str) -> list[Kernel]:
    kit, name = toolkit.find(), arch_of(source, arch)
    assert kit is not None and name is not None
    return of_ptx(kit.ptx(source, name).read_text(), f"{source.parent.name}/{source.stem}", arch, name)


def every(architectures: tuple[str, ...]) -> list[Kernel]:
    sources = sorted(CUDA.rglob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: of_source(*job), [(s, a) for a in architectures for s in sources if arch_of(s, a)])
        return [k for kernels in made for k in kernels]
