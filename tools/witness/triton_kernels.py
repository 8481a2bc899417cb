"""One of Triton's kernels as a call compiles it: what Triton and its ptxas made of it, and which rules it breaks."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from simulated import triton as simulated
from tools.witness.kernels import listed
from tools.witness.machine import Code, machine_kernels
from tools.witness.ptx import dyed, outside_contract
from tools.witness.triton_calls import compiled

ARCHITECTURES = (80, 90, 120)
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
    code: Code
    dyed: Code

    @property
    def tensor(self) -> bool:
        return self.name.endswith("_tensor_kernel")

    @property
    def matrix(self) -> Counter[str]:
        """HMMA.16816.F32 and the like."""
        return Counter(op for op in self.code.ops if op.split(".")[0].endswith("MMA") and op.split(".")[0] != "HFMA2")

    def defects(self) -> list[str]:
        outside = outside_contract(self.ptx)
        outside = Counter({op: n for op, n in outside.items() if not EXACT.match(op)})
        forbidden = self.code.forbidden()
        told = []
        if self.tensor:
            root = "HGMMA" if self.arch == 90 else "HMMA"
            outside = Counter({op: n for op, n in outside.items() if op.split(".")[0] not in ("mma", "wgmma")})
            forbidden = Counter({op: n for op, n in forbidden.items() if op not in self.matrix})
            if {op.split(".")[0] for op in self.matrix} != {root}:
                told.append(f"wants {root}, has {listed(self.matrix) or 'no tensor core'}")
        told += [f"PTX outside the contract: {listed(outside)}"] if outside else []
        told += [f"ptxas fused: {listed(ops)} in the dyed code"] if (ops := self.dyed.undyed()) else []
        told += [f"machine code: {listed(forbidden)}"] if forbidden else []
        told += [f"{self.stack} bytes of stack, {self.spills} of spills"] if self.stack or self.spills else []
        limit = shared_limit(self.arch, self.tensor)
        told += [f"{self.shared} bytes of shared memory, more than {limit}"] if self.shared > limit else []
        return told


def assembled(ptx: str, arch: int) -> tuple[Code, str]:
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
    (code,) = machine_kernels(text).values()
    return code, said.stderr


def disassembler() -> Path:
    """Triton's own, which knows what its ptxas writes."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def witnessed(what: str, program: simulated.Compiled, arch: int) -> Program:
    code, said = assembled(program.ptx, arch)
    fused, _ = assembled(dyed(program.ptx), arch)

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    registers, stack = number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame")
    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Program(
        program.name, what, arch, program.ptx, program.threads, program.shared, registers, stack, spills, code, fused
    )  # fmt: skip


def every(architectures: tuple[int, ...] = ARCHITECTURES) -> list[Program]:
    jobs = [(what, program, arch) for arch in architectures for what, program in compiled(arch).values()]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: witnessed(*job), jobs))
