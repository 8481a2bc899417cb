"""Which instructions of a kernel leave bits of its result open, by the PTX ISA: without running anything.

An empty answer means that the text alone fixes every bit, given that threads do not race (program.py's `race` looks for that).
"""

from __future__ import annotations

import re
from collections import Counter

from .parse import Function, ModuleText, statements

CONTRACTED = "no rounding modifier: ptxas may contract it with another one to an fma (build with --fmad=false, or write .rn)"
APPROXIMATE = "approximate: only an error bound is given, GPUs differ"
MATRIX = "tensor core: the order of the sum and its roundings are not specified"
FLOAT_ATOMIC = "floating-point atomic: the order of the terms is the scheduler's"
RETURNING_ATOMIC = "atomic whose old value comes back, or that is not commutative: it shows the order"
PLACE = "time or place: differs from run to run"

_FLOATING = r"(f16|bf16|f32|f64|f16x2|bf16x2|f32x2|tf32|e4m3|e5m2)"
_RULES = [
    (re.compile(rf"(add|sub|mul|mad)(\.(ftz|sat|relu))*\.{_FLOATING}\Z"), CONTRACTED),
    (re.compile(r".*\.(approx|full)\b.*"), APPROXIMATE),
    (re.compile(r"(tanh|ex2|lg2|sin|cos|rsqrt)\..*"), APPROXIMATE),
    (re.compile(rf"(mma|wmma\.mma|wgmma\.mma_async|tcgen05\.mma)\b.*\.{_FLOATING}\b.*"), MATRIX),
    (re.compile(r"tcgen05\.mma\b.*"), MATRIX),
    (re.compile(rf"(atom|red)\..*\b(add|noftz)\b.*{_FLOATING}.*"), FLOAT_ATOMIC),
    (re.compile(r"atom\..*|red\..*\b(inc|dec)\b.*"), RETURNING_ATOMIC),
]
_PLACES = re.compile(r"%(clock|clock64|clock_hi|globaltimer|globaltimer_lo|globaltimer_hi|smid|warpid)\b")
_OPCODE = re.compile(r"(?:@!?\s*[\w$%]+\s+)?([\w.:]+)")


def reason(opcode: str) -> str | None:
    """Why this opcode leaves bits open; None if it does not."""
    return next((why for rule, why in _RULES if rule.match(opcode)), None)


def open_bits(ptx: str | ModuleText, kernel: str) -> dict[str, dict[str, int]]:
    """{reason: {opcode: how many}}, the functions that the kernel calls included."""
    module = ptx if isinstance(ptx, ModuleText) else ModuleText(ptx)
    out: dict[str, Counter[str]] = {}
    todo: list[Function] = [module.kernels[kernel]]
    seen: set[str] = set()
    while todo:
        for s in statements(todo.pop()):
            if s.kind != "instruction":
                continue
            m = _OPCODE.match(s.text)
            opcode = m[1] if m else s.text
            why = PLACE if _PLACES.search(s.text) else reason(opcode)
            if why:
                out.setdefault(why, Counter())[opcode] += 1
            if opcode.startswith("call"):
                for name in re.findall(r"[\w$]+", s.text):
                    if name in module.functions and name not in seen:
                        seen.add(name)
                        todo.append(module.functions[name])
    return {why: dict(counts) for why, counts in out.items()}
