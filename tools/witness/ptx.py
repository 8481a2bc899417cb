"""PTX: its kernels, what in them is outside the contract, and the dye that shows what ptxas fuses."""

from __future__ import annotations

import re
from collections import Counter

_INSTRUCTION = re.compile(r"^\s*(?:\{\s*)?(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);", re.MULTILINE)
_FLOAT = re.compile(r"\.(f16|f16x2|bf16|bf16x2|f32|f32x2|f64|tf32|e4m3\w*|e5m2\w*)\b")
_ARITHMETIC = {"add", "sub", "mul", "fma", "mad", "div", "sqrt", "rcp", "neg", "abs", "min", "max", "copysign", "testp"}
_ROUNDS = {"add", "sub", "mul", "fma", "mad", "div", "sqrt", "rcp"}
_NEVER = {"ex2", "lg2", "sin", "cos", "tanh", "rsqrt", "mma", "wmma", "wgmma", "tcgen05", "atom", "red", "multimem", "call"}
_TENSOR = {  # those of mode "tensor", by what ptxas makes of them
    "HMMA": re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(f16|bf16)\.\1\.f32"),
    "HGMMA": re.compile(
        r"wgmma\.(mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(f16|bf16)\.\2|(fence|commit_group|wait_group)\.sync\.aligned)"
    ),
}
_WHICH_CHIP = re.compile(r"%(smid|nsmid|warpid|nwarpid|gridid|clock|clock64|globaltimer)\b")


def ptx_kernels(ptx: str) -> dict[str, str]:
    """Mangled name -> text, from .entry to the closing brace: the last one, since asm statements may have some of their own."""
    kernels = {}
    for part in re.split(r"(?=\.(?:entry|func)\b)", ptx):
        if m := re.match(r"\.entry\s+(\w+)\s*\(.*^\}", part, re.MULTILINE | re.DOTALL):
            kernels[m[1]] = m[0]
    return kernels


def outside_contract(kernel: str, tensor: str | None = None) -> Counter[str]:
    """The instructions of a kernel's PTX that the contract does not have: bits left open, or other than its float32 steps.
    `tensor`: a kernel of mode "tensor", which may have its room's one instruction besides: HMMA or HGMMA.
    """
    found: Counter[str] = Counter()
    for op, operands in _INSTRUCTION.findall(kernel):
        root, *parts = op.split(".")
        kind = _FLOAT.findall(op)
        if tensor and _TENSOR[tensor].fullmatch(op):
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
