"""What the simulator's own tests share: kernels of a few lines of PTX, exact roundings, expected refusals."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from .program import SimulatorError, run

HEAD = ".version 8.5\n.target sm_80\n.address_size 64\n"
STORE = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32", "tf32": "b32"}
LETTER = {
    "b16": "h",
    "u16": "h",
    "s16": "h",
    "b32": "r",
    "u32": "r",
    "s32": "r",
    "f32": "f",
    "b64": "d",
    "u64": "d",
    "s64": "d",
    "f64": "g",
}
WIDTH = {"h": 2, "r": 4, "f": 4, "d": 8, "g": 8}
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .b64 %d<40>; .reg .f64 %g<40>;\n"
START = "mov.u32 %r0, %tid.x;\n"


def kernel(body: str, params: int = 4, before: str = "") -> str:
    """A kernel `k` with `params` 64-bit parameters, in %d1, %d2 ...; %r0 is the thread."""
    names = ", ".join(f".param .u64 a{i}" for i in range(params))
    loads = "".join(f"ld.param.u64 %d{i + 1}, [a{i}];\n" for i in range(params))
    body = body.replace("; ", ";\n")  # one statement per line: a report names the line
    return f"{HEAD}{before}\n.visible .entry k({names})\n{{\n{REGISTERS}{START}{loads}{body}\nret;\n}}\n"


def elementwise(op: str, out: str, ins: list[str], *arrays: np.ndarray, extra: str = "") -> np.ndarray:
    """d[i] = op(a[i], b[i], c[i]), one thread per element; `op` without operands, or with {d} {a} {b} {c} named."""
    n = len(arrays[0])
    types = [STORE.get(t, t) for t in [out, *ins]]
    body, registers = "", []
    for i, t in enumerate(types):
        letter = LETTER[t]
        registers.append(f"%{letter}{10 + i}")
        body += f"mul.wide.u32 %d{20 + i}, %r0, {WIDTH[letter]};\nadd.s64 %d{20 + i}, %d{20 + i}, %d{i + 1};\n"
        if i:
            body += f"ld.global.{t} {registers[i]}, [%d{20 + i}];\n"
    names = dict(zip("dabc", registers, strict=False))
    body += extra.format(**names)
    body += (op.format(**names) if "{" in op else f"{op} {', '.join(registers)}") + ";\n"
    body += f"st.global.{types[0]} [%d20], {registers[0]};"
    result = np.zeros(n, {"h": np.uint16, "r": np.uint32, "f": np.float32, "d": np.uint64, "g": np.float64}[LETTER[types[0]]])
    text = kernel(body, len(types))
    assert n <= 1024
    run(text, "k", 1, n, [result, *arrays])
    return result


def same(got: np.ndarray, want: np.ndarray) -> None:
    """Equal bits; a NaN is a NaN."""
    want = np.asarray(want, got.dtype)
    integer = {2: np.uint16, 4: np.uint32, 8: np.uint64}[got.dtype.itemsize]
    equal = got.view(integer) == want.view(integer)
    if got.dtype.kind == "f":
        equal |= np.isnan(got) & np.isnan(want)
    bad = np.flatnonzero(~equal)
    assert bad.size == 0, f"{bad.size} differ, first at {bad[0]}: {got[bad[0]]!r}, wanted {want[bad[0]]!r}"


def rounded(x: Fraction, direction: str, bits: int = 24, low: int = -149, high: int = 128) -> float:
    """An exact number rounded to a floating-point format: `bits` of precision, multiples of 2^low, below 2^high."""
    if x == 0:
        return 0.0
    sign, x = (-1 if x < 0 else 1), abs(x)
    e = math.floor(math.log2(x.numerator) - math.log2(x.denominator))
    while Fraction(2) ** e > x:
        e -= 1
    while Fraction(2) ** (e + 1) <= x:
        e += 1
    unit = Fraction(2) ** max(e - bits + 1, low)
    q, rest = divmod(x, unit)
    up = {"rz": False, "rm": sign < 0 and rest > 0, "rp": sign > 0 and rest > 0}.get(
        direction, rest > unit / 2 or (rest == unit / 2 and q % 2 == 1)
    )
    value = (int(q) + up) * unit
    if value >= Fraction(2) ** high:
        largest = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** (high - 1)
        value_float = (
            math.inf
            if direction == "rn" or (direction == "rp" and sign > 0) or (direction == "rm" and sign < 0)
            else float(largest)
        )
        return sign * value_float
    return sign * float(value)


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def refused(text: str, *expect: str, grid: int = 1, block: int = 32, args: list[object] | None = None, **options: Any) -> str:
    with pytest.raises(SimulatorError) as e:
        run(text, "k", grid, block, args if args is not None else [np.zeros(64, np.uint32)], **options)
    for part in expect:
        assert part in str(e.value), str(e.value)
    return str(e.value)
