"""Opcodes of the regular kind: one destination, sources of fixed types. decode.py has the others.

A form is the handler's name in machine/, one letter an operand (a capital is written) and the modifier bits:
W 32-bit cell (also 8 and 16 bits), D 64-bit cell, P predicate; f, g, h like w, d, w for immediates of f32, f64, 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .parse import BITS, ParseError

FTZ, SAT, RZ, RM, RP, RELU, NAN, ABS, RNA = 1, 2, 4, 8, 12, 16, 32, 64, 128
_ROUNDING = {"rn": 0, "rz": RZ, "rm": RM, "rp": RP, "rni": 0, "rzi": RZ, "rmi": RM, "rpi": RP, "rna": RNA}
_FLAGS = {"ftz": FTZ, "sat": SAT, "relu": RELU, "NaN": NAN, "xorsign": 0, "abs": ABS, "satfinite": 0}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


@dataclass(frozen=True)
class Form:
    name: str
    kinds: str
    mod: int = 0
    imm: int = 0


def cell(dtype: str) -> str:
    """The letter of a type's source operand."""
    if dtype == "pred":
        return "p"
    if dtype in ("f32", "f64"):
        return "f" if dtype == "f32" else "g"
    bits = BITS[dtype]
    if bits == 128:
        raise ParseError("128-bit registers")
    return "d" if bits == 64 else "h" if bits < 32 else "w"


def plain(dtype: str) -> str:
    """W or D, for a destination."""
    return {"w": "W", "h": "W", "f": "W", "d": "D", "g": "D", "p": "P"}[cell(dtype)]


def flags(mods: list[str]) -> int:
    mod = 0
    for m in mods:
        mod |= _ROUNDING.get(m, 0) | _FLAGS.get(m, 0)
    return mod


def _only(mods: list[str], allowed: str) -> None:
    for m in mods:
        if m not in allowed.split():
            raise ParseError(f"modifier .{m}")


def _same(name: str, dtype: str, sources: int, mod: int = 0, imm: int = 0) -> Form:
    return Form(name, plain(dtype) + cell(dtype) * sources, mod, imm)


_ONE = ("neg", "abs", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
_TWO = ("add", "sub", "mul", "div", "rem", "min", "max", "copysign")
_COUNT = {**dict.fromkeys(_ONE, 1), **dict.fromkeys(_TWO, 2), "fma": 3, "mad": 3, "sad": 3}  # sources


def _integer(base: str, mods: list[str], dtype: str) -> Form:
    if base in ("mul", "mad"):
        if mods[:1] == ["wide"]:
            wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[dtype]
            _only(mods[1:], "")
            return Form(f"{base}.wide.{dtype}", plain(wide) + cell(dtype) * 2 + (cell(wide) if base == "mad" else ""))
        if mods[:1] in (["lo"], ["hi"]):
            _only(mods[1:], "")
            return _same(f"{base}.{mods[0]}.{dtype}", dtype, _COUNT[base])
        raise ParseError("without .lo, .hi or .wide")
    if base in ("add", "sub") and mods == ["sat"]:
        return _same(f"{base}.sat.{dtype}", dtype, 2)
    _only(mods, "")
    return _same(f"{base}.{dtype}", dtype, _COUNT[base])


def _float(base: str, mods: list[str], dtype: str, operands: int) -> Form:
    mod = flags(mods)
    wide = dtype == "f64"
    base = "fma" if base == "mad" else base
    n = _COUNT[base]
    if base in ("min", "max"):
        _only(mods, "ftz NaN xorsign abs")
        if wide:
            return _same(f"{base}.f64", dtype, 2)
        if operands == 4:
            return _same(f"{base}3.f32", dtype, 3, mod)
        return _same(f"{base}.f32.mod" if mod else f"{base}.f32", dtype, 2, mod)
    if "approx" in mods or "full" in mods or base in ("rsqrt", "sin", "cos", "lg2", "ex2", "tanh"):
        _only(mods, "approx full ftz")
        return _same(f"{base}.approx{'.ftz' if wide and mod & FTZ else ''}.{dtype}", dtype, n, 0 if wide else mod)
    _only(mods, "rn rz rm rp ftz sat")
    if base in ("copysign",):
        return _same(f"{base}.{dtype}", dtype, n)
    return _same(f"{base}.{dtype}.mod" if mod and not (wide and base in ("neg", "abs")) else f"{base}.{dtype}", dtype, n, mod)


def _half(base: str, mods: list[str], dtype: str) -> Form:
    approx = ".approx" if base in ("ex2", "tanh") else ""
    _only(mods, "rn ftz sat relu NaN" + (" approx" if approx else ""))
    if "ftz" in mods and base not in ("ex2", "neg", "abs"):
        raise ParseError("modifier .ftz")  # subnormal halves are numbers like others here
    return _same(f"{base}{approx}.{dtype}", dtype, _COUNT[base], flags(mods) & ~FTZ)


@cache
def form(opcode: str, operands: int) -> Form | None:
    """The form of a regular opcode; None if decode.py must look at it."""
    parts = opcode.split(".")
    base, mods = parts[0], parts[1:]
    dtype = mods[-1] if mods else ""
    if base in _COUNT and "cc" not in mods:
        mods = mods[:-1]
        if dtype in INTEGERS:
            return _integer(base, mods, dtype)
        if dtype in ("f32", "f64"):
            return _float(base, mods, dtype, operands)
        if dtype == "f32x2":
            _only(mods, "rn ftz")
            return Form(f"{base}.f32x2", "D" + "d" * _COUNT[base], flags(mods))
        if dtype in HALVES:
            return _half("fma" if base == "mad" else base, mods, dtype)
        raise ParseError(f"type .{dtype}")
    if base in ("and", "or", "xor", "not", "cnot"):
        n = 1 if base in ("not", "cnot") else 2
        return Form(f"{base}.{dtype}", plain(dtype) + cell(dtype) * n)
    if base in ("shl", "shr"):
        return Form(f"{base}.{dtype}", plain(dtype) + cell(dtype) + "w")
    if base == "shf":
        return Form(opcode, "Wwww")
    if base == "bfe":
        return Form(opcode, plain(dtype) + cell(dtype) + "ww")
    if base == "bfi":
        return Form(opcode, plain(dtype) + cell(dtype) * 2 + "ww")
    if base in ("popc", "clz"):
        return Form(opcode, "W" + cell(dtype))
    if base == "bfind":
        return Form(f"bfind.{dtype}", "W" + cell(dtype), imm=int("shiftamt" in mods))
    if base == "brev":
        return _same(opcode, dtype, 1)
    if base in ("mul24", "mad24"):
        return _same(opcode, dtype, _COUNT[base[:3]])
    if base == "bmsk" and "clamp" in mods:
        return Form(opcode, "Www")
    if base == "szext" and "clamp" in mods:
        return Form("szext.clamp", "Www", imm=int(dtype == "s32"))
    if base in ("dp4a", "dp2a"):
        hi = 4 if "hi" in mods else 0
        a, b = mods[-2], mods[-1]
        return Form(base, "Wwww", (a == "s32") | (b == "s32") << 1 | hi)
    if base == "testp":
        return Form(opcode, "P" + cell(dtype))
    if base == "slct":
        return Form(f"slct.{BITS[mods[-2]]}.{dtype}", plain(mods[-2]) + cell(mods[-2]) * 2 + cell(dtype))
    return None
