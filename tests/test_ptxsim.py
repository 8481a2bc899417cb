"""The PTX simulator against values that were not computed by it, and against programs with a known defect.

Each test is a few lines of PTX by hand; the last ones are compiled by nvcc where it is there.
"""

from __future__ import annotations

import math
import random
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from ptxsim.open_bits import open_bits
from ptxsim.program import Module, SimulatorError, run

HEAD = ".version 8.5\n.target sm_80\n.address_size 64\n"
STORE = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32", "tf32": "b32"}
LETTER = {"b16": "h", "u16": "h", "s16": "h", "b32": "r", "u32": "r", "s32": "r", "f32": "f", "b64": "d", "u64": "d", "s64": "d", "f64": "g"}
WIDTH = {"h": 2, "r": 4, "f": 4, "d": 8, "g": 8}
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<40>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .b64 %d<40>; .reg .f64 %g<40>;\n"
START = "mov.u32 %r0, %tid.x;\n"


def kernel(body: str, params: int = 4, before: str = "") -> str:
    """A kernel `k` with `params` 64-bit parameters, in %d1, %d2 ...; %r0 is the thread."""
    names = ", ".join(f".param .u64 a{i}" for i in range(params))
    loads = "".join(f"ld.param.u64 %d{i + 1}, [a{i}];\n" for i in range(params))
    body = body.replace("; ", ";\n")  # one statement a line: a report names the line
    return f"{HEAD}{before}\n.visible .entry k({names})\n{{\n{REGISTERS}{START}{loads}{body}\nret;\n}}\n"


def elementwise(op: str, out: str, ins: list[str], *arrays: np.ndarray, extra: str = "") -> np.ndarray:
    """d[i] = op(a[i], b[i], c[i]), one thread an element; `op` without operands, or with {d} {a} {b} {c} named."""
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


SPECIAL = np.array([0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x3F7FFFFF, 0x40490FDB, 0x34000000, 0x4B7FFFFF], np.uint32)  # fmt: skip


def floats(seed: int, n: int = 512) -> np.ndarray:
    """All exponents, and the special ones."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    x[: n // 4] = (x[: n // 4] & 0x80FFFFFF) | 0x3F000000
    x[-len(SPECIAL) :] = SPECIAL
    rng.shuffle(x)
    return x.view(np.float32)


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
        value_float = math.inf if direction == "rn" or (direction == "rp" and sign > 0) or (direction == "rm" and sign < 0) else float(largest)
        return sign * value_float
    return sign * float(value)


# ---- f32


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_f32_against_numpy(op: str) -> None:
    a, b = floats(1), floats(2)
    with np.errstate(all="ignore"):
        want = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[op](a, b)
    same(elementwise(f"{op}.rn.f32", "f32", ["f32", "f32"], a, b), want)


def test_f32_of_one_argument() -> None:
    a = floats(3)
    with np.errstate(all="ignore"):
        same(elementwise("sqrt.rn.f32", "f32", ["f32"], a), np.sqrt(a))
        same(elementwise("rcp.rn.f32", "f32", ["f32"], a), np.float32(1) / a)
    same(elementwise("neg.f32", "f32", ["f32"], a), -a)
    same(elementwise("abs.f32", "f32", ["f32"], a), np.abs(a))


@pytest.mark.parametrize("direction", ["rn", "rz", "rm", "rp"])
def test_f32_rounding_directions(direction: str) -> None:
    rng = np.random.default_rng(4)
    a, b, c = (np.ldexp(rng.standard_normal(200), rng.integers(-70, 60, 200)).astype(np.float32) for _ in range(3))
    c[:50] = (-(a[:50].astype(np.float64) * b[:50])).astype(np.float32)
    a[50], b[50], c[50] = 2.0**-100, 2.0**-49, 0
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    same(elementwise(f"fma.{direction}.f32", "f32", ["f32"] * 3, a, b, c), np.array([rounded(x, direction) for x in exact], np.float32))
    exact = [Fraction(float(x)) + Fraction(float(z)) for x, z in zip(a, c, strict=True)]
    same(elementwise(f"add.{direction}.f32", "f32", ["f32"] * 2, a, c), np.array([rounded(x, direction) for x in exact], np.float32))
    exact = [Fraction(float(x)) / Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    same(elementwise(f"div.{direction}.f32", "f32", ["f32"] * 2, a, b), np.array([rounded(x, direction) for x in exact], np.float32))


def test_ftz_and_sat() -> None:
    a, b = floats(5), floats(6)
    flushed = [np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x) for x in (a, b)]
    with np.errstate(all="ignore"):
        want = flushed[0] * flushed[1]
        want = np.where(np.abs(want) < 2.0**-126, np.copysign(np.float32(0), want), want)
        same(elementwise("mul.rn.ftz.f32", "f32", ["f32"] * 2, a, b), want)
        want = np.where(np.isnan(a + b), np.float32(0), np.clip(a + b, 0, 1)) + np.float32(0)
    same(elementwise("add.rn.sat.f32", "f32", ["f32"] * 2, a, b), want)


def test_min_max() -> None:
    a, b = floats(7), floats(8)
    a[:4], b[:4] = [0.0, -0.0, np.nan, 1], [-0.0, 0.0, 1, np.nan]
    lo = [float(x) if y != y else float(y) if x != x else min((float(x), float(y)), key=lambda v: (v, math.copysign(1, v))) for x, y in zip(a, b, strict=True)]
    hi = [float(x) if y != y else float(y) if x != x else max((float(x), float(y)), key=lambda v: (v, math.copysign(1, v))) for x, y in zip(a, b, strict=True)]
    same(elementwise("min.f32", "f32", ["f32"] * 2, a, b), np.array(lo, np.float32))
    same(elementwise("max.f32", "f32", ["f32"] * 2, a, b), np.array(hi, np.float32))
    some_nan = np.isnan(a) | np.isnan(b)
    same(elementwise("max.NaN.f32", "f32", ["f32"] * 2, a, b), np.where(some_nan, np.float32(np.nan), np.array(hi, np.float32)))


def test_f64() -> None:
    rng = np.random.default_rng(9)
    a, b, c = (np.ldexp(rng.standard_normal(100), rng.integers(-300, 300, 100)) for _ in range(3))
    c[:30] = -(a[:30] * b[:30])
    want = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    same(elementwise("fma.rn.f64", "f64", ["f64"] * 3, a, b, c), np.array(want))
    same(elementwise("div.rn.f64", "f64", ["f64"] * 2, a, b), a / b)
    with np.errstate(all="ignore"):
        same(elementwise("cvt.rn.f32.f64", "f32", ["f64"], a), a.astype(np.float32))
        same(elementwise("cvt.f64.f32", "f64", ["f32"], floats(1)), floats(1).astype(np.float64))
    down = np.array([rounded(Fraction(x), "rm") for x in a.tolist()], np.float32)
    same(elementwise("cvt.rm.f32.f64", "f32", ["f64"], a), down)


# ---- integers


def numbers(bits: int, seed: int, n: int = 128) -> list[int]:
    rng = random.Random(seed)
    edge = [0, 1, 2, 31, 32, 63, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    return (edge + [rng.getrandbits(rng.randint(1, bits)) for _ in range(n)])[:n]


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def truncating(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add": lambda a, b, c, n: a + b,
    "sub": lambda a, b, c, n: a - b,
    "mul.lo": lambda a, b, c, n: a * b,
    "mul.hi": lambda a, b, c, n: a * b >> n,
    "mad.lo": lambda a, b, c, n: a * b + c,
    "mad.hi": lambda a, b, c, n: (a * b >> n) + c,
    "div": lambda a, b, c, n: truncating(a, b) if b else -1,
    "rem": lambda a, b, c, n: a - b * truncating(a, b) if b else a,
    "min": lambda a, b, c, n: min(a, b),
    "max": lambda a, b, c, n: max(a, b),
    "sad": lambda a, b, c, n: c + abs(a - b),
}


@pytest.mark.parametrize("type", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(type: str) -> None:
    n = int(type[1:])
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[n]
    a, b, c = numbers(n, 1), numbers(n, 2)[::-1], numbers(n, 3)
    arrays = [np.array(x, dtype) for x in (a, b, c)]
    value = (lambda x: signed(x, n)) if type[0] == "s" else (lambda x: x)
    for op, f in INTEGER.items():
        count = 3 if op[:3] in ("mad", "sad") else 2
        got = elementwise(f"{op}.{type}", type, [type] * count, *arrays[:count])
        want = [f(value(x), value(y), value(z), n) & ((1 << n) - 1) for x, y, z in zip(a, b, c, strict=True)]
        assert got.tolist() == want, op
    if n < 64:
        wide = type[0] + str(2 * n)
        got = elementwise(f"mul.wide.{type}", wide, [type] * 2, *arrays[:2])
        assert got.tolist() == [value(x) * value(y) & ((1 << 2 * n) - 1) for x, y in zip(a, b, strict=True)]
    if type[0] == "s":
        assert elementwise(f"neg.{type}", type, [type], arrays[0]).tolist() == [-value(x) & ((1 << n) - 1) for x in a]
        assert elementwise(f"abs.{type}", type, [type], arrays[0]).tolist() == [abs(value(x)) & ((1 << n) - 1) for x in a]


@pytest.mark.parametrize("n", [16, 32, 64])
def test_shifts_and_logic(n: int) -> None:
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[n]
    m = (1 << n) - 1
    a, b = numbers(n, 4), numbers(n, 5)[::-1]
    by = [random.Random(6).choice([0, 1, 5, n - 1, n, n + 7, 255]) for _ in a]
    x, y, s = np.array(a, dtype), np.array(b, dtype), np.array(by, np.uint32)
    assert elementwise(f"shl.b{n}", f"b{n}", [f"b{n}", "u32"], x, s).tolist() == [v << k & m for v, k in zip(a, by, strict=True)]
    assert elementwise(f"shr.u{n}", f"u{n}", [f"u{n}", "u32"], x, s).tolist() == [v >> k for v, k in zip(a, by, strict=True)]
    assert elementwise(f"shr.s{n}", f"s{n}", [f"s{n}", "u32"], x, s).tolist() == [signed(v, n) >> k & m for v, k in zip(a, by, strict=True)]
    for op, f in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        assert elementwise(f"{op}.b{n}", f"b{n}", [f"b{n}"] * 2, x, y).tolist() == [f(v, u) for v, u in zip(a, b, strict=True)]
    assert elementwise(f"not.b{n}", f"b{n}", [f"b{n}"], x).tolist() == [~v & m for v in a]


def field(v: int, pos: int, length: int, n: int, sign: bool) -> int:
    """bfe as the PTX ISA's pseudo-code has it."""
    pos, length, msb = pos & 255, length & 255, n - 1
    bit = lambda i: v >> i & 1  # noqa: E731
    fill = bit(min(pos + length - 1, msb)) if sign and length else 0
    return sum((bit(pos + i) if i < length and pos + i <= msb else fill) << i for i in range(n))


def insert(a: int, b: int, pos: int, length: int, n: int) -> int:
    pos, length = pos & 255, length & 255
    for i in range(length):
        if pos + i < n:
            b = b & ~(1 << pos + i) | (a >> i & 1) << pos + i
    return b


@pytest.mark.parametrize("n", [32, 64])
def test_bit_fields(n: int) -> None:
    dtype = np.uint32 if n == 32 else np.uint64
    a, b = numbers(n, 7), numbers(n, 8)
    rng = random.Random(9)
    pos, length = [rng.choice([0, 3, 16, n - 1, n, 200]) for _ in a], [rng.choice([0, 1, 8, n - 1, n, 77, 255]) for _ in a]
    x, p, k = np.array(a, dtype), np.array(pos, np.uint32), np.array(length, np.uint32)
    for sign in "us":
        got = elementwise(f"bfe.{sign}{n}", f"{sign}{n}", [f"{sign}{n}", "u32", "u32"], x, p, k)
        assert got.tolist() == [field(v, q, r, n, sign == "s") for v, q, r in zip(a, pos, length, strict=True)]
    for q, r in ((0, 8), (5, 3), (n - 4, 9), (n, 3), (3, 0)):
        got = elementwise(f"bfi.b{n} {{d}}, {{a}}, {{b}}, {q}, {r}", f"b{n}", [f"b{n}"] * 2, x, np.array(b, dtype))
        assert got.tolist() == [insert(v, u, q, r, n) for v, u in zip(a, b, strict=True)]
    assert elementwise(f"popc.b{n}", "u32", [f"b{n}"], x).tolist() == [v.bit_count() for v in a]
    assert elementwise(f"clz.b{n}", "u32", [f"b{n}"], x).tolist() == [n - v.bit_length() for v in a]
    assert elementwise(f"brev.b{n}", f"b{n}", [f"b{n}"], x).tolist() == [int(f"{v:0{n}b}"[::-1], 2) for v in a]
    assert elementwise(f"bfind.u{n}", "u32", [f"u{n}"], x).tolist() == [v.bit_length() - 1 & 0xFFFFFFFF for v in a]
    low = [~signed(v, n) if signed(v, n) < 0 else v for v in a]
    assert elementwise(f"bfind.s{n}", "u32", [f"s{n}"], x).tolist() == [v.bit_length() - 1 & 0xFFFFFFFF for v in low]


def test_permutations_and_lop3() -> None:
    a, b, c = numbers(32, 10), numbers(32, 11)[::-1], numbers(32, 12)
    x, y, z = (np.array(v, np.uint32) for v in (a, b, c))
    for table in (0xE8, 0x96, 0x3C, 0x01):
        want = [sum((table >> (4 * (p >> i & 1) + 2 * (q >> i & 1) + (r >> i & 1)) & 1) << i for i in range(32)) for p, q, r in zip(a, b, c, strict=True)]
        assert elementwise(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table}", "b32", ["b32"] * 3, x, y, z).tolist() == want

    def permuted(p: int, q: int, sel: int) -> int:
        data = (q << 32 | p).to_bytes(8, "little")
        chosen = [data[sel >> 4 * i & 7] for i in range(4)]
        return int.from_bytes(bytes(255 * (v >> 7) if sel >> 4 * i & 8 else v for i, v in enumerate(chosen)), "little")

    assert elementwise("prmt.b32", "b32", ["b32"] * 3, x, y, z).tolist() == [permuted(p, q, r) for p, q, r in zip(a, b, c, strict=True)]
    for op, f in {
        "shf.l.wrap": lambda p, q, s: (q << 32 | p) << (s & 31) >> 32,
        "shf.r.wrap": lambda p, q, s: (q << 32 | p) >> (s & 31),
        "shf.l.clamp": lambda p, q, s: (q << 32 | p) << min(s, 32) >> 32,
        "shf.r.clamp": lambda p, q, s: (q << 32 | p) >> min(s, 32),
    }.items():
        got = elementwise(f"{op}.b32", "b32", ["b32"] * 3, x, y, z).tolist()
        assert got == [f(p, q, r) & 0xFFFFFFFF for p, q, r in zip(a, b, c, strict=True)], op
    signed_bytes = lambda v: [signed(v >> 8 * i, 8) for i in range(4)]  # noqa: E731
    want = [sum(p * q for p, q in zip(signed_bytes(i), signed_bytes(j), strict=True)) + k & 0xFFFFFFFF for i, j, k in zip(a, b, c, strict=True)]
    assert elementwise("dp4a.s32.s32", "s32", ["s32"] * 3, x, y, z).tolist() == want


def test_carry_chain() -> None:
    a, b = numbers(64, 13), numbers(64, 14)[::-1]
    x, y = np.array(a, np.uint64), np.array(b, np.uint64)
    split = "mov.b64 {{%r20, %r21}}, {a};\nmov.b64 {{%r22, %r23}}, {b};\n"
    join = "mov.b64 {d}, {{%r24, %r25}}"
    for op, f in (("add", int.__add__), ("sub", int.__sub__)):
        text = f"{op}.cc.u32 %r24, %r20, %r22;\n{op}c.u32 %r25, %r21, %r23;\n{join}"
        assert elementwise(text, "u64", ["u64"] * 2, x, y, extra=split).tolist() == [f(p, q) & (1 << 64) - 1 for p, q in zip(a, b, strict=True)]


# ---- conversions


def test_every_half() -> None:
    bits = np.arange(65536, dtype=np.uint16)
    for start in range(0, 65536, 1024):
        some = bits[start : start + 1024]
        if start in (0, 1024, 0x3C00, 0x7C00, 0x8000, 0xFC00):
            same(elementwise("cvt.f32.f16", "f32", ["f16"], some), some.view(np.float16).astype(np.float32))
            same(elementwise("cvt.f32.bf16", "f32", ["bf16"], some), (some.astype(np.uint32) << 16).view(np.float32))


def test_to_16_bits() -> None:
    a = floats(15, 1024)
    a[:200] = np.ldexp(np.random.default_rng(0).standard_normal(200), np.random.default_rng(1).integers(-30, 18, 200))
    a[:8] = [65519.996, 65520, -65520, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0000001, 2049, 2051]
    number = ~np.isnan(a)
    with np.errstate(all="ignore"):
        want = a.astype(np.float16).view(np.uint16)
    got = elementwise("cvt.rn.f16.f32", "f16", ["f32"], a)
    assert (got[number] == want[number]).all() and (got[~number] == 0x7FFF).all()
    exact = [rounded(Fraction(float(x)), "rn", 8, -133) if np.isfinite(x) else float(x) for x in a[number]]
    want = (np.array(exact, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    got = elementwise("cvt.rn.bf16.f32", "bf16", ["f32"], a)
    zero = got[number] & 0x7FFF == 0
    assert ((got[number] == want) | zero & (want & 0x7FFF == 0)).all() and (got[~number] == 0x7FFF).all()
    exact = [rounded(Fraction(float(x)), "rz", 11, -24, 16) if np.isfinite(x) else float(x) for x in a[number]]
    want = np.array(exact, np.float32).astype(np.float16)
    got = elementwise("cvt.rz.f16.f32", "f16", ["f32"], a)[number].view(np.float16)
    assert (got == want).all()
    got = elementwise("cvt.rn.f16x2.f32", "f16x2", ["f32", "f32"], a, a[::-1].copy())
    single = elementwise("cvt.rn.f16.f32", "f16", ["f32"], a)
    assert (got >> 16 == single).all() and (got & 0xFFFF == single[::-1]).all()


def test_tf32() -> None:
    a = floats(16)
    a = a[np.isfinite(a) & (np.abs(a) < 2.0**126)]
    got = elementwise("cvt.rna.tf32.f32", "tf32", ["f32"], a).view(np.float32)
    for x, y in zip(a.tolist(), got.tolist(), strict=True):
        below, above = rounded(Fraction(x), "rz", 11, -136), x
        unit = Fraction(2) ** max(math.frexp(x)[1] - 11, -136) if x else Fraction(1)
        rest = abs(Fraction(x)) - abs(Fraction(below))
        above = abs(Fraction(below)) + (unit if rest * 2 >= unit and rest else 0)
        assert abs(Fraction(y)) == above, x


@pytest.mark.parametrize("to", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_float_to_integer(to: str) -> None:
    a = floats(17, 256)
    a[:60] = np.arange(60, dtype=np.float32) * 0.5 - 15
    n = int(to[1:])
    low, high = (-(1 << n - 1), (1 << n - 1) - 1) if to[0] == "s" else (0, (1 << n) - 1)
    rule = {"rni": lambda v: round(Fraction(v)), "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    out = "u64" if n == 64 else "u32" if n == 32 else "u16"
    for mode, f in rule.items():
        want = []
        for v in a.tolist():
            if math.isnan(v):
                value = -(1 << 63) if n == 64 else 0
            elif math.isinf(v):
                value = high if v > 0 else low
            else:
                value = min(max(f(v), low), high)
            want.append(value & (1 << n) - 1)
        got = elementwise(f"cvt.{mode}.{to}.f32", out, ["f32"], a)
        assert (got & ((1 << n) - 1) if n < 64 else got).tolist() == want, mode


def test_integer_to_float() -> None:
    for type, dtype in (("s32", np.int32), ("u32", np.uint32), ("s64", np.int64), ("u64", np.uint64)):
        n = int(type[1:])
        a = numbers(n, 18)
        values = [signed(v, n) if type[0] == "s" else v for v in a]
        x = np.array(a, np.uint32 if n == 32 else np.uint64).view(dtype)
        for mode in ("rn", "rz", "rm", "rp"):
            want = np.array([rounded(Fraction(v), mode) for v in values], np.float32)
            same(elementwise(f"cvt.{mode}.f32.{type}", "f32", [type], x), want)
        same(elementwise(f"cvt.rn.f64.{type}", "f64", [type], x), np.array([float(v) for v in values]))


def test_integer_widths() -> None:
    a = np.array(numbers(32, 19), np.uint32)
    assert elementwise("cvt.s32.s8", "s32", ["u32"], a).tolist() == [signed(int(v), 8) & 0xFFFFFFFF for v in a]
    assert elementwise("cvt.u32.u8", "u32", ["u32"], a).tolist() == [int(v) & 255 for v in a]
    assert elementwise("cvt.s64.s32", "s64", ["s32"], a).tolist() == [signed(int(v), 32) & (1 << 64) - 1 for v in a]
    assert elementwise("cvt.u64.u32", "u64", ["u32"], a).tolist() == a.tolist()
    assert elementwise("cvt.s8.s32", "u32", ["s32"], a).tolist() == [signed(int(v), 8) & 0xFFFFFFFF for v in a]
    assert elementwise("cvt.sat.s8.s32", "s16", ["s32"], a)[:3].tolist() == [0, 1, 2]
    assert (elementwise("cvt.sat.u8.s32", "u16", ["s32"], a) & 255).tolist() == [min(max(signed(int(v), 32), 0), 255) for v in a]


# ---- comparisons


def test_comparisons() -> None:
    a, b = floats(20, 256), floats(21, 256)
    a[:40] = b[:40]
    ordered = {"eq": np.equal, "ne": lambda x, y: (x < y) | (x > y), "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    nan = np.isnan(a) | np.isnan(b)
    for name, f in ordered.items():
        for suffix in ("", "u"):
            want = f(a, b) & ~nan if not suffix else f(a, b) | nan
            got = elementwise(f"setp.{name}{suffix}.f32 %p1, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p1", "u32", ["f32"] * 2, a, b)
            assert (got == want).all(), name + suffix
    assert (elementwise("setp.nan.f32 %p1, {a}, {b};\nselp.u32 {d}, 1, 0, %p1", "u32", ["f32"] * 2, a, b) == nan).all()
    x, y = np.array(numbers(32, 22), np.uint32), np.array(numbers(32, 23)[::-1], np.uint32)
    got = elementwise("setp.lt.s32 %p1|%p2, {a}, {b};\nselp.u32 %r30, 1, 0, %p1;\nselp.u32 {d}, 2, 0, %p2;\nor.b32 {d}, {d}, %r30", "u32", ["u32"] * 2, x, y)
    assert (got == np.where(x.view(np.int32) < y.view(np.int32), 1, 2)).all()
    text = "setp.hi.u32 %p3, {a}, 1000;\nsetp.lo.{op}.u32 %p1, {{a}}, {{b}}, {no}%p3;\nselp.u32 {{d}}, 1, 0, %p1"
    for op, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for no in ("", "!"):
            got = elementwise(text.replace("{a}, 1000", "{{a}}, 1000").format(op=op, no=no), "u32", ["u32"] * 2, x, y)
            assert (got == f(x < y, (x > 1000) ^ (no == "!"))).all()
    assert (elementwise("set.gt.u32.f32", "u32", ["f32"] * 2, a, b) == np.where(a > b, 0xFFFFFFFF, 0)).all()
    assert (elementwise("set.gt.f32.f32", "f32", ["f32"] * 2, a, b) == np.where(a > b, 1, 0)).all()
    assert (elementwise("slct.b32.s32", "b32", ["b32", "b32", "s32"], x, y, x) == np.where(x.view(np.int32) >= 0, x, y)).all()
    assert (elementwise("testp.subnormal.f32 %p1, {a};\nselp.u32 {d}, 1, 0, %p1", "u32", ["f32"], a) == ((a != 0) & (np.abs(a) < 2.0**-126))).all()


# ---- halves


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_half_arithmetic(type: str) -> None:
    rng = np.random.default_rng(24)
    bits = rng.integers(0, 1 << 16, (3, 256)).astype(np.uint16)
    bits[:, :128] = bits[:, :128] & 0x83FF | 0x3800 if type == "f16" else bits[:, :128] & 0x80FF | 0x3F00
    shape = (11, -24, 16) if type == "f16" else (8, -133, 128)
    value = (lambda v: v.view(np.float16).astype(np.float32)) if type == "f16" else (lambda v: (v.astype(np.uint32) << 16).view(np.float32))
    a, b, c = (value(v) for v in bits)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    want = [rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "rn", *shape) for x, y, z in zip(a[finite], b[finite], c[finite], strict=True)]
    got = value(elementwise(f"fma.rn.{type}", type, [type] * 3, *bits))[finite]
    assert (got == np.array(want, np.float32)).all()
    pairs = [(v.astype(np.uint32) | v[::-1].astype(np.uint32) << 16) for v in bits]
    got = elementwise(f"fma.rn.{type}x2", f"{type}x2", [f"{type}x2"] * 3, *pairs)
    assert (value((got & 0xFFFF).astype(np.uint16))[finite] == np.array(want, np.float32)).all()
    assert (value((got >> 16).astype(np.uint16))[::-1][finite] == np.array(want, np.float32)).all()
    both = np.isfinite(a) & np.isfinite(b)
    want = [rounded(Fraction(float(x)) - Fraction(float(y)), "rn", *shape) for x, y in zip(a[both], b[both], strict=True)]
    assert (value(elementwise(f"sub.rn.{type}", type, [type] * 2, *bits[:2]))[both] == np.array(want, np.float32)).all()


# ---- memory


def test_vectors_and_narrow_loads() -> None:
    data = np.arange(64 * 16, dtype=np.uint8) * 37
    out = np.zeros((64, 8), np.int32)
    body = """
        shl.b32 %r1, %r0, 4; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d1, %d10; add.s64 %d12, %d2, %d10; add.s64 %d12, %d12, %d10;
        ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d11];
        ld.global.s8 %r14, [%d11+3]; ld.global.u8 %r15, [%d11+3]; ld.global.s16 %r16, [%d11+6]; ld.global.nc.u16 %r17, [%d11+6];
        st.global.v4.u32 [%d12], {%r10, %r11, %r12, %r13}; st.global.v2.u32 [%d12+16], {%r14, %r15}; st.global.v2.b32 [%d12+24], {%r16, %r17};"""
    run(kernel(body, 2), "k", 1, 64, [data, out])
    rows = data.reshape(64, 16)
    assert (out[:, :4] == rows.copy().view(np.int32)).all()
    assert (out[:, 4] == rows[:, 3].view(np.int8)).all() and (out[:, 5] == rows[:, 3]).all()
    assert (out[:, 6] == rows.copy().view(np.int16)[:, 3]).all() and (out[:, 7] == rows.copy().view(np.uint16)[:, 3]).all()


def test_spaces_and_generic_addresses() -> None:
    """The same four bytes through shared (static and dynamic), local, const and global memory, by name and by generic address."""
    out = np.zeros((64, 6), np.uint32)
    before = ".const .align 4 .u32 table[4] = {11, 22, 33, 44};\n.global .align 8 .u64 where[2] = {table, generic(table)+8};\n.extern .shared .align 16 .b8 dynamic[];\n"
    body = """
        .shared .align 4 .b8 fixed[256]; .local .align 8 .b8 frame[16];
        shl.b32 %r1, %r0, 2; mov.u32 %r2, fixed; add.u32 %r2, %r2, %r1; add.u32 %r3, %r0, 100; st.shared.u32 [%r2], %r3;
        mov.u32 %r4, dynamic; add.u32 %r4, %r4, %r1; add.u32 %r5, %r0, 200; st.shared.u32 [%r4], %r5;
        mov.u64 %d10, frame; cvta.local.u64 %d11, %d10; add.u32 %r6, %r0, 300; st.u32 [%d11+4], %r6; ld.local.u32 %r7, [%d10+4];
        bar.sync 0;
        xor.b32 %r8, %r1, 252; mov.u64 %d12, fixed; cvta.shared.u64 %d12, %d12; cvt.u64.u32 %d13, %r8; add.s64 %d12, %d12, %d13; ld.u32 %r9, [%d12];
        mov.u32 %r10, dynamic; add.u32 %r10, %r10, %r8; ld.shared.u32 %r11, [%r10];
        and.b32 %r12, %r0, 3; mul.wide.u32 %d14, %r12, 4; mov.u64 %d15, table; add.s64 %d15, %d15, %d14; ld.const.u32 %r13, [%d15];
        ld.global.u64 %d16, [where+8]; ld.u32 %r14, [%d16];
        isspacep.shared %p1, %d12; isspacep.local %p2, %d12; selp.u32 %r15, 1, 0, %p1; selp.u32 %r16, 2, 0, %p2; or.b32 %r15, %r15, %r16;
        mad.wide.u32 %d20, %r0, 24, %d1;
        st.global.u32 [%d20], %r7; st.global.u32 [%d20+4], %r9; st.global.u32 [%d20+8], %r11; st.global.u32 [%d20+12], %r13;
        st.global.u32 [%d20+16], %r14; st.global.u32 [%d20+20], %r15;"""
    for sched in (0, 1, 2):
        run(kernel(body, 1, before), "k", 1, 64, [out], shared=256, sched=sched, race=True)
        t = np.arange(64)
        want = np.stack([t + 300, 100 + 63 - t, 200 + 63 - t, np.array([11, 22, 33, 44])[t % 4], np.full(64, 33), np.ones(64)], 1)
        assert (out == want).all()


def test_parameters_of_all_sizes() -> None:
    text = f"""{HEAD}.visible .entry k(.param .u64 .ptr .global .align 4 o, .param .u8 a, .param .align 8 .b8 s[24], .param .f32 x)
    {{ {REGISTERS} ld.param.u64 %d1, [o]; ld.param.u8 %r1, [a]; ld.param.u32 %r2, [s+4]; mov.b64 %d2, s; ld.param.u32 %r3, [%d2+16];
       ld.param.f32 %f1, [x]; st.global.u32 [%d1], %r1; st.global.u32 [%d1+4], %r2; st.global.u32 [%d1+8], %r3; st.global.f32 [%d1+12], %f1; ret; }}"""
    k = Module(text).kernel("k")
    assert [(p.offset, p.size) for p in k.params] == [(0, 8), (8, 1), (16, 24), (40, 4)]
    out = np.zeros(4, np.uint32)
    run(text, "k", 1, 1, [out, 200, np.arange(6, dtype=np.uint32).tobytes(), 1.5])
    assert out.tolist() == [200, 1, 4, 0x3FC00000]


# ---- divergence, calls


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_loops_of_different_length(sched: int) -> None:
    """Collatz: every lane its own number of steps, a branch inside the loop."""
    body = """
        mad.lo.s32 %r1, %r0, 7, 1; mov.u32 %r2, 0;
        LOOP: setp.le.u32 %p1, %r1, 1; @%p1 bra DONE;
        and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra EVEN;
        mad.lo.u32 %r1, %r1, 3, 1; bra NEXT;
        EVEN: shr.u32 %r1, %r1, 1;
        NEXT: add.u32 %r2, %r2, 1; bra LOOP;
        DONE: mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r2;"""
    out = np.zeros(70, np.uint32)
    run(kernel(body, 1), "k", 1, 70, [out], sched=sched, seed=5)

    def steps(n: int) -> int:
        count = 0
        while n > 1:
            n, count = (3 * n + 1 if n % 2 else n // 2), count + 1
        return count

    assert out.tolist() == [steps(7 * t + 1) for t in range(70)]


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_branch_table_and_calls(sched: int) -> None:
    before = """.func (.param .b32 result) twice_plus(.param .b32 x, .param .b32 y)
    { .reg .b32 %r<9>; .reg .pred %p1; ld.param.u32 %r1, [x]; ld.param.u32 %r2, [y]; setp.gt.u32 %p1, %r1, 5; @%p1 bra BIG;
      mad.lo.u32 %r3, %r1, 2, %r2; st.param.b32 [result], %r3; ret; BIG: st.param.b32 [result], %r1; ret; }"""
    body = """
        and.b32 %r1, %r0, 3; TABLE: .branchtargets A, B, C, A;
        brx.idx %r1, TABLE;
        A: mov.u32 %r2, 10; bra JOIN; B: mov.u32 %r2, 20; bra JOIN; C: mov.u32 %r2, 30; bra JOIN;
        JOIN: { .param .b32 p0; .param .b32 p1; .param .b32 q; st.param.b32 [p0], %r0; st.param.b32 [p1], %r2; call.uni (q), twice_plus, (p0, p1); ld.param.b32 %r3, [q]; }
        mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r3;"""
    out = np.zeros(32, np.uint32)
    run(kernel(body, 1, before), "k", 1, 32, [out], sched=sched)
    assert out.tolist() == [t if t > 5 else 2 * t + [10, 20, 30, 10][t % 4] for t in range(32)]


def test_random_programs() -> None:
    """Straight-line integer code with forward branches against the same program in Python: liveness, cells, divergence."""
    for seed in range(12):
        rng = random.Random(seed)
        lines, model = [], []
        live = [f"%r{i}" for i in range(1, 6)]
        for i in range(120):
            d = f"%r{rng.randint(1, 50)}"
            a, b = rng.choice(live), rng.choice([*live, str(rng.randint(0, 1000))])
            op = rng.choice(["add.u32", "sub.u32", "mul.lo.u32", "xor.b32", "and.b32", "or.b32", "min.u32", "max.s32"])
            if rng.random() < 0.15 and i < 110:
                skip = rng.randint(1, 9)
                lines.append(f"setp.lt.u32 %p1, {a}, {b}; @%p1 bra L{i + skip};")
                model.append(("skip", a, b, i + skip))
            else:
                guard = rng.random() < 0.2
                lines.append((f"setp.gt.s32 %p2, {a}, {b}; @!%p2 " if guard else "") + f"{op} {d}, {a}, {b};")
                model.append((op, a, b, d, guard))
                if d not in live:
                    live.append(d)
        text = "".join(f"L{i}: {line}\n" for i, line in enumerate(lines))
        start = "".join(f"mad.lo.u32 %r{i}, %r0, {rng.randint(1, 99)}, {rng.randint(0, 9)};\n" for i in range(1, 51))
        scale = [(int(w.split(",")[2]), int(w.split(",")[3].split(";")[0])) for w in start.splitlines()]
        ends = "".join(f"st.global.u32 [%d5+{4 * i}], %r{i};\n" for i in range(1, 51))
        out = np.zeros((48, 51), np.uint32)
        body = f"{start}{text}L{len(lines)}: mad.wide.u32 %d5, %r0, 204, %d1;\n{ends}"
        body += "".join(f"L{i}: " for i in range(len(lines) + 1, len(lines) + 9))
        for sched in range(3):
            out[:] = 0
            run(kernel(body, 1), "k", 1, 48, [out], sched=sched, seed=seed)
            for t in range(48):
                reg = {f"%r{i}": t * m + c & 0xFFFFFFFF for i, (m, c) in enumerate(scale, 1)}
                at = 0
                while at < len(model):
                    step = model[at]
                    a, b = (reg[v] if v[0] == "%" else int(v) for v in step[1:3])
                    at += 1
                    if step[0] == "skip":
                        at = step[3] if a < b else at
                        continue
                    if step[4] and signed(a, 32) > signed(b, 32):
                        continue
                    value = {"add": a + b, "sub": a - b, "mul": a * b, "xor": a ^ b, "and": a & b, "or": a | b, "min": min(a, b),
                             "max": max(signed(a, 32), signed(b, 32))}[step[0][:3].rstrip(".")]  # fmt: skip
                    reg[step[3]] = value & 0xFFFFFFFF
                assert out[t, 1:].tolist() == [reg[f"%r{i}"] for i in range(1, 51)], (seed, sched, t)


# ---- collectives


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX ISA's pseudo-code."""
    segment, clamp, b = c >> 8 & 31, c & 31, b & 31
    top, bottom = lane & segment | clamp & ~segment & 31, lane & segment
    j, inside = {
        "up": (lane - b, lane - b >= top), "down": (lane + b, lane + b <= top), "bfly": (lane ^ b, lane ^ b <= top),
        "idx": (bottom | b & ~segment & 31, (bottom | b & ~segment & 31) <= top),
    }[mode]  # fmt: skip
    return (j, True) if inside else (lane, False)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str) -> None:
    for b, c in ((1, 0x1F), (3, 0x1F), (5, 0x181F), (16, 0x1F), (1, 0), (2, 0x1C03)):
        out = np.zeros((32, 2), np.uint32)
        body = f"""mul.lo.u32 %r1, %r0, 3; shfl.sync.{mode}.b32 %r2|%p1, %r1, {b}, {c}, -1; selp.u32 %r3, 1, 0, %p1;
            mad.wide.u32 %d5, %r0, 8, %d1; st.global.v2.u32 [%d5], {{%r2, %r3}};"""
        run(kernel(body, 1), "k", 1, 32, [out])
        want = [shuffled(mode, lane, b, c) for lane in range(32)]
        assert out.tolist() == [[3 * j, int(p)] for j, p in want]


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_collectives_of_part_of_a_warp(sched: int) -> None:
    """Odd and even lanes go different ways and vote, match and reduce among themselves."""
    out = np.zeros((32, 6), np.uint32)
    half = """
        setp.gt.u32 %p2, %r0, 20; vote.sync.ballot.b32 %r10, %p2, {m}; vote.sync.any.pred %p3, %p2, {m}; vote.sync.all.pred %p4, !%p2, {m};
        selp.u32 %r11, 1, 0, %p3; selp.u32 %r12, 2, 0, %p4; or.b32 %r11, %r11, %r12;
        shr.u32 %r13, %r0, 2; match.any.sync.b32 %r14, %r13, {m}; redux.sync.add.s32 %r15, %r0, {m}; redux.sync.max.u32 %r16, %r0, {m};
        elect.sync %r17|%p5, {m};"""
    body = f"""
        and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 0; @%p1 bra EVEN;
        {half.format(m="0xaaaaaaaa")} bra JOIN;
        EVEN: {half.format(m="0x55555555")}
        JOIN: mad.wide.u32 %d5, %r0, 24, %d1;
        st.global.v2.u32 [%d5], {{%r10, %r11}}; st.global.v2.u32 [%d5+8], {{%r14, %r15}}; st.global.v2.u32 [%d5+16], {{%r16, %r17}};"""
    run(kernel(body, 1), "k", 1, 32, [out], sched=sched)
    for lane in range(32):
        mine = [j for j in range(32) if j % 2 == lane % 2]
        ballot = sum(1 << j for j in mine if j > 20)
        match = sum(1 << j for j in mine if j // 4 == lane // 4)
        assert out[lane].tolist() == [ballot, 1, match, sum(mine), mine[-1], mine[0]]


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_barriers(sched: int) -> None:
    """Two named barriers between a producing and a consuming warp, a reduction over the block, threads that left before."""
    body = """
        .shared .align 4 .b8 box[256];
        setp.ge.u32 %p1, %r0, 96; @%p1 bra OUT;
        setp.ge.u32 %p2, %r0, 64; @%p2 bra REST;
        setp.ge.u32 %p3, %r0, 32; @%p3 bra CONSUME;
        shl.b32 %r2, %r0, 2; mov.u32 %r3, box; add.u32 %r3, %r3, %r2; add.u32 %r4, %r0, 7; st.shared.u32 [%r3], %r4;
        bar.arrive 1, 64; bar.sync 2, 64; bra REST;
        CONSUME: bar.sync 1, 64; sub.u32 %r5, 63, %r0; shl.b32 %r5, %r5, 2; mov.u32 %r3, box; add.u32 %r3, %r3, %r5; ld.shared.u32 %r6, [%r3];
        mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r6; bar.sync 2, 64;
        REST: setp.lt.u32 %p4, %r0, 5; bar.red.popc.u32 %r7, 0, %p4; bar.red.or.pred %p5, 0, %p4;
        @!%p5 bra OUT; mad.wide.u32 %d6, %r0, 4, %d2; st.global.u32 [%d6], %r7;
        OUT:"""
    a, b = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    run(kernel(body, 2), "k", 1, 128, [a, b], sched=sched, race=True)
    assert a[32:64].tolist() == [31 - i + 7 for i in range(32)] and b[:96].tolist() == [5] * 96 and not b[96:].any()


# ---- asynchronous copies


COPIES = """
    .shared .align 16 .b8 stage[2048];
    shl.b32 %r1, %r0, 4; mov.u32 %r2, stage; add.u32 %r3, %r2, %r1; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d1, %d10;
    cp.async.cg.shared.global [%r3], [%d11], 16; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+1024], [%d11+4], 4, 4; cp.async.ca.shared.global [%r3+1028], [%d11+4], 4, 0;
    cp.async.ca.shared.global [%r3+1032], [%d11], 8, 3; cp.async.commit_group;
    {wait}
    bar.sync 0;
    xor.b32 %r4, %r1, 1008; add.u32 %r5, %r2, %r4; ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r5];
    mad.wide.u32 %d5, %r0, 32, %d2; st.global.v4.u32 [%d5], {{%r10, %r11, %r12, %r13}};
    {last}
    ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r3+1024]; st.global.v4.u32 [%d5+16], {{%r10, %r11, %r12, %r13}};"""


@pytest.mark.parametrize("lazy", [False, True])
def test_asynchronous_copies(lazy: bool) -> None:
    x = np.arange(1, 257, dtype=np.uint32) * 0x01010101
    out = np.zeros((64, 8), np.uint32)
    body = COPIES.format(wait="cp.async.wait_group 1;", last="cp.async.wait_all;")
    for sched in (0, 1, 2):
        run(kernel(body, 2), "k", 1, 64, [x, out], lazy_async=lazy, race=True, sched=sched)
        rows = x.reshape(64, 4)
        assert (out[:, :4] == rows[::-1]).all()
        assert (out[:, 4:] == np.stack([rows[:, 1], 0 * rows[:, 0], rows[:, 0] & 0xFFFFFF, 0 * rows[:, 0]], 1)).all()


# ---- matrices


def mma(shape: str, types: str, counts: tuple[int, int, int], a: np.ndarray, b: np.ndarray, c: np.ndarray, model: int) -> np.ndarray:
    """One warp: fragments come as [32, registers] of u32, in and out."""
    na, nb, nc = counts
    register = lambda base, n: "{" + ", ".join(f"%r{base + i}" for i in range(n)) + "}"  # noqa: E731
    body = "".join(f"mad.wide.u32 %d{10 + i}, %r0, {4 * n}, %d{i + 1};\n" for i, n in enumerate((na, nb, nc, nc)))
    for i, (base, n) in enumerate(((10, na), (20, nb), (30, nc))):
        body += "".join(f"ld.global.b32 %r{base + k}, [%d{10 + i}+{4 * k}];\n" for k in range(n))
    body += f"mma.sync.aligned.{shape}.row.col.{types} {register(40, nc)}, {register(10, na)}, {register(20, nb)}, {register(30, nc)};\n"
    body += "".join(f"st.global.b32 [%d13+{4 * k}], %r{40 + k};\n" for k in range(nc))
    out = np.zeros((32, nc), np.uint32)
    run(kernel(body, 4), "k", 1, 32, [a, b, c, out], mma=model)
    return out


def fragments(x: np.ndarray, y: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """A [16, K] and B [K, 8], as unsigned integers of 32 / each bits, to the registers of m16n8k*: PTX ISA, figures of mma.m16n8k16."""
    k = x.shape[1]
    chunks = k // (4 * each)
    a, b = np.zeros((32, 2 * chunks), np.uint32), np.zeros((32, chunks), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for q in range(chunks):
            for e in range(each):
                col = q * 4 * each + t * each + e
                shift = 32 // each * e
                a[lane, 2 * q] |= np.uint32(int(x[g, col]) << shift)
                a[lane, 2 * q + 1] |= np.uint32(int(x[g + 8, col]) << shift)
                b[lane, q] |= np.uint32(int(y[col, g]) << shift)
    return a, b


def scattered(c: np.ndarray) -> np.ndarray:
    """C [16, 8] to four registers a lane, and back by the inverse."""
    return np.array([[c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]] for g in range(8) for t in range(4)])


@pytest.mark.parametrize("types", ["f32.f16.f16.f32", "f32.bf16.bf16.f32", "f32.tf32.tf32.f32", "s32.s8.s8.s32", "f16.f16.f16.f16"])
def test_mma_on_small_integers(types: str) -> None:
    """Where every order gives the same sum all four models must give it."""
    kind = types.split(".")[1]
    k, each = {"f16": (16, 2), "bf16": (16, 2), "tf32": (8, 1), "s8": (32, 4)}[kind]
    rng = np.random.default_rng(25)
    x, y, c = rng.integers(-5, 6, (16, k)), rng.integers(-5, 6, (k, 8)), rng.integers(-9, 10, (16, 8))
    bits = {
        "f16": lambda v: v.astype(np.float16).view(np.uint16), "bf16": lambda v: v.astype(np.float32).view(np.uint32) >> 16,
        "tf32": lambda v: v.astype(np.float32).view(np.uint32), "s8": lambda v: v.astype(np.int8).view(np.uint8),
    }[kind]  # fmt: skip
    a, b = fragments(bits(x), bits(y), each)
    want = scattered(x @ y + c)
    start = scattered(c)
    half = types.startswith("f16")
    if types.startswith("s32"):
        start, want = start.astype(np.int32).view(np.uint32), want.astype(np.int32).view(np.uint32)
    elif half:
        start, want = (np.ascontiguousarray(v.astype(np.float16)).view(np.uint32) for v in (start, want))
    else:
        start, want = (v.astype(np.float32).view(np.uint32) for v in (start, want))
    for model in range(4):
        got = mma(f"m16n8k{k}", types, (a.shape[1], b.shape[1], 2 if half else 4), a, b, np.ascontiguousarray(start), model)
        assert (got == want).all(), model


def test_the_four_models_differ_as_said() -> None:
    rng = np.random.default_rng(26)
    x, y, c = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float32)
    x[0] = 0
    x[0, 0], x[0, 1], y[:, 0], c[0, 0] = 1, 1, 1, 2.0**30
    a, b = fragments(x.view(np.uint16), y.view(np.uint16), 2)
    got = [mma("m16n8k16", "f32.f16.f16.f32", (4, 2, 4), a, b, scattered(c).astype(np.float32).view(np.uint32), model) for model in range(4)]
    chain = lambda order: np.array([[_chain(c[i, j], x[i, order], y[order, j]) for j in range(8)] for i in range(16)], np.float32)  # noqa: E731
    exact = np.array([[rounded(Fraction(float(c[i, j])) + sum(Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x[i], y[:, j], strict=True)), "rn") for j in range(8)] for i in range(16)], np.float32)  # fmt: skip
    assert (got[0] == scattered(chain(np.arange(16))).astype(np.float32).view(np.uint32)).all()
    assert (got[3] == scattered(chain(np.arange(15, -1, -1))).astype(np.float32).view(np.uint32)).all()
    assert (got[1] == scattered(exact).astype(np.float32).view(np.uint32)).all()
    error = np.abs(got[2].view(np.float32).astype(np.float64) - scattered(exact))
    assert (error <= 2.0**-20 * np.maximum(np.abs(scattered(exact)), 8)).all() and (got[2] != got[1]).any()


def _chain(s: np.float32, a: np.ndarray, b: np.ndarray) -> float:
    total = Fraction(float(s))
    for p, q in zip(a.tolist(), b.tolist(), strict=True):
        total = Fraction(rounded(total + Fraction(p) * Fraction(q), "rn"))
    return float(total)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans: str) -> None:
    x = np.arange(32 * 8, dtype=np.uint16)
    out, back = np.zeros((32, 4), np.uint32), np.zeros(32 * 8, np.uint16)
    body = f"""
        .shared .align 16 .b8 tile[1024];
        shl.b32 %r1, %r0, 4; mov.u32 %r2, tile; add.u32 %r3, %r2, %r1; cvt.u64.u32 %d10, %r1; add.s64 %d11, %d1, %d10; add.s64 %d12, %d2, %d10; add.s64 %d13, %d3, %d10;
        ld.global.v4.u32 {{%r10, %r11, %r12, %r13}}, [%d11]; st.shared.v4.u32 [%r3], {{%r10, %r11, %r12, %r13}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];
        st.global.v4.u32 [%d12], {{%r20, %r21, %r22, %r23}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r20, %r21, %r22, %r23}}; bar.warp.sync -1;
        ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r3+512]; st.global.v4.u32 [%d13], {{%r10, %r11, %r12, %r13}};"""
    run(kernel(body, 3), "k", 1, 32, [x, out, back], race=True)
    m = x.reshape(4, 8, 8)
    m = m.transpose(0, 2, 1) if trans else m
    assert out.view(np.uint16).reshape(32, 4, 2).tolist() == [[m[k, lane // 4, lane % 4 * 2 :][:2].tolist() for k in range(4)] for lane in range(32)]
    assert (back == x).all()


# ---- atomics


def test_atomics() -> None:
    out = np.zeros(8, np.uint32)
    out[2] = 1000
    body = """
        .shared .align 4 .b8 cell[4]; mov.u32 %r2, cell; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [%r2], 0; bar.sync 0;
        atom.shared.add.u32 %r3, [%r2], 2; bar.sync 0; ld.shared.u32 %r4, [%r2]; @%p1 red.global.add.u32 [%d1], %r4;
        red.global.max.u32 [%d1+4], %r0; atom.global.min.u32 %r5, [%d1+8], %r0; red.global.add.f32 [%d1+12], 0f3F800000;
        atom.global.cas.b32 %r6, [%d1+16], 0, 77; atom.global.exch.b32 %r7, [%d1+20], 5; red.global.or.b32 [%d1+24], %r0; atom.global.inc.u32 %r8, [%d1+28], 9;"""
    run(kernel(body, 1), "k", 3, 64, [out], race=True, sched=2)
    assert out.tolist() == [3 * 128, 63, 0, 0x43400000, 77, 5, 63, 192 % 10]


# ---- defects


def refused(text: str, *expect: str, grid: int = 1, block: int = 32, args: list[object] | None = None, **options: object) -> str:
    with pytest.raises(SimulatorError) as e:
        run(text, "k", grid, block, args if args is not None else [np.zeros(64, np.uint32)], **options)
    for part in expect:
        assert part in str(e.value), str(e.value)
    return str(e.value)


EXCHANGE = """
    .shared .align 4 .b8 box[256]; shl.b32 %r1, %r0, 2; mov.u32 %r2, box; add.u32 %r3, %r2, %r1; st.shared.u32 [%r3], %r0;
    {barrier}
    xor.b32 %r4, %r1, {other}; add.u32 %r4, %r4, %r2; ld.shared.u32 %r5, [%r4]; mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r5;"""


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_dropped_barrier(sched: int) -> None:
    good = kernel(EXCHANGE.format(barrier="bar.sync 0;", other=252), 1)
    run(good, "k", 1, 64, [np.zeros(64, np.uint32)], race=True, sched=sched)
    refused(kernel(EXCHANGE.format(barrier="", other=252), 1), "race", "shared+", "ld.shared.u32", block=64, race=True, sched=sched)
    refused(kernel(EXCHANGE.format(barrier="bar.warp.sync -1;", other=252), 1), "race", block=64, race=True, sched=sched)


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_dropped_warp_barrier(sched: int) -> None:
    run(kernel(EXCHANGE.format(barrier="bar.warp.sync -1;", other=60), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True, sched=sched)
    refused(kernel(EXCHANGE.format(barrier="", other=60), 1), "race", block=64, race=True, sched=sched)


def test_write_after_read() -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;", other=252) + "\n{} st.shared.u32 [%r3], 5;"
    run(kernel(body.replace("{}", "bar.sync 0;"), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True)
    refused(kernel(body.replace("{}", ""), 1), "race: write", "after its read", block=64, race=True)


def test_two_writers() -> None:
    body = ".shared .align 4 .b8 box[4]; mov.u32 %r2, box; st.shared.u32 [%r2], {};"
    run(kernel(body.format("7"), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True)  # the same value: let pass
    refused(kernel(body.format("%r0"), 1), "race: write", "after its write", block=64, race=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_missing_wait(lazy: bool) -> None:
    x, out = np.arange(256, dtype=np.uint32), np.zeros((64, 8), np.uint32)
    for wait, last in (("", "cp.async.wait_all;"), ("cp.async.wait_group 2;", "cp.async.wait_all;"), ("cp.async.wait_group 1;", "")):
        text = kernel(COPIES.format(wait=wait, last=last), 2)
        refused(text, "cp.async", "not waited for", block=64, args=[x, out], race=True, lazy_async=lazy)
    run(kernel(COPIES.format(wait="", last="cp.async.wait_all;"), 2), "k", 1, 64, [x, out], lazy_async=True)
    assert (out[:, 0] == 0x7FC0DEAD).any()  # without the race detector, too: a warp that goes on at once finds nothing


def test_out_of_bounds() -> None:
    text = kernel("mad.wide.u32 %d5, %r0, 4, %d1; ld.global.u32 %r1, [%d5]; st.global.u32 [%d5+4], %r1;", 1)
    run(text, "k", 1, 32, [np.zeros(33, np.uint32)])
    refused(text, "out-of-bounds store of 4 bytes at argument 0+128", "a buffer of 128 bytes", "thread (31,0,0)", "st.global.u32 [%d5+4]", args=[np.zeros(32, np.uint32)])
    refused(text, "out-of-bounds load", args=[np.zeros(16, np.uint32)])
    refused(text, "out-of-bounds load", args=[None])
    refused(kernel(".shared .align 4 .b8 s[64]; mov.u32 %r1, s; ld.shared.u32 %r2, [%r1+64];", 1), "out-of-bounds load", "shared address 64")
    refused(kernel(".local .align 4 .b8 s[64]; mov.u64 %d2, s; ld.local.u32 %r2, [%d2+64];", 1), "out-of-bounds load", "local address 64")


def test_misaligned() -> None:
    refused(kernel("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d1+8];", 1), "misaligned load of 16 bytes", "block (0,0,0), thread (0,0,0)")
    refused(kernel(".shared .align 4 .b8 s[64]; mov.u32 %r1, s; cp.async.ca.shared.global [%r1], [%d1+2], 4;", 1), "misaligned cp.async")


def test_read_only() -> None:
    x = np.zeros(64, np.uint32)
    x.flags.writeable = False
    refused(kernel("st.global.u32 [%d1+8], 1;", 1), "argument 0+8, which is read-only", args=[x])
    refused(kernel("red.global.add.u32 [%d1+8], 1;", 1), "read-only", args=[x])


def test_divergent_collective() -> None:
    lanes = "setp.lt.u32 %p1, %r0, 16; @%p1 bra SKIP; {} SKIP: bar.warp.sync -1;"
    refused(kernel(lanes.format("shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;"), 1), "deadlock", "shfl.sync", "bar.warp.sync")
    refused(kernel(lanes.format("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff;"), 1), "not in the member mask 0x0000ffff")
    refused(kernel(lanes.format("shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xffff0000;"), 1), "shuffle from lane 0, which does not take part")
    refused(kernel("setp.lt.u32 %p1, %r0, 16; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:", 1), "deadlock", "aligned barrier")
    refused(kernel("setp.lt.u32 %p1, %r0, 16; @%p1 ret; mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};", 1), "all 32 lanes")  # fmt: skip


def test_deadlock() -> None:
    text = refused(kernel("setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 1; bra B; A: bar.sync 2; B:", 1), "deadlock in block (0,0,0)", block=64)
    assert "waits at barrier 1" in text and "waits at barrier 2" in text and "PTX line" in text
    refused(kernel("L: bra L;", 1), "endless", max_steps=10000)


def test_spinning_lanes_let_others_on() -> None:
    """Lane 0 waits for lane 1 of its own warp: independent threads, whatever the schedule."""
    body = """setp.eq.u32 %p1, %r0, 0; @!%p1 bra SET; SPIN: ld.volatile.global.u32 %r1, [%d1]; setp.eq.u32 %p2, %r1, 0; @%p2 bra SPIN; bra OUT;
              SET: st.volatile.global.u32 [%d1], 1; OUT:"""
    for sched in (0, 1, 2):
        run(kernel(body, 1), "k", 1, 2, [np.zeros(1, np.uint32)], sched=sched)


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_race_between_blocks(sched: int) -> None:
    base = "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, {step}, %r0; mad.wide.u32 %d5, %r2, 4, %d1;"
    run(kernel(base.format(step=32) + "st.global.u32 [%d5], %r2;", 1), "k", 4, 32, [np.zeros(128, np.uint32)], race=True, sched=sched)
    text = kernel(base.format(step=31) + "st.global.u32 [%d5], %r2;", 1)
    said = refused(text, "race between blocks", "argument 0+", "st.global.u32", grid=4, args=[np.zeros(128, np.uint32)], race=True, sched=sched)
    assert said.count("block (") >= 2
    text = kernel(base.format(step=32) + "st.global.u32 [%d5], 1; ld.global.u32 %r3, [%d1]; st.global.u32 [%d2], 1;", 2)
    refused(text, "race between blocks", grid=4, args=[np.zeros(128, np.uint32), np.zeros(1, np.uint32)], race=True, sched=sched)


def test_race_within_a_block_through_global_memory() -> None:
    body = "mad.wide.u32 %d5, %r0, 4, %d1; st.global.u32 [%d5], %r0; {} xor.b32 %r1, %r0, 63; mad.wide.u32 %d6, %r1, 4, %d1; ld.global.u32 %r2, [%d6];"
    run(kernel(body.format("bar.sync 0;"), 1), "k", 1, 64, [np.zeros(64, np.uint32)], race=True)
    refused(kernel(body.format(""), 1), "race: ", "argument 0+", "st.global.u32 [%d5]", "ld.global.u32 %r2", block=64, race=True)


def test_unknown_text() -> None:
    for bad, why in (("frobnicate.u32 %r1, %r0;", "unknown instruction"), ("add.rn.u32 %r1, %r0, %r0;", "modifier"), ("add.u32 %r1, %r0, %d1;", "operand %d1"),
                     ("mov.u32 %r1, %nowhere;", "special register"), ("bra GONE;", "no label GONE"), ("ld.global.u32 %d1, %r0;", "address"),
                     ("ld.global.mystery %r1, [%d1];", "not understood")):  # fmt: skip
        assert "PTX line" in refused(kernel(bad, 1), why)
    with pytest.raises(SimulatorError, match="no kernel z; there are: k"):
        Module(kernel("", 1)).kernel("z")
    with pytest.raises(SimulatorError, match="not a launch that a GPU takes"):
        run(kernel("", 1), "k", 1, 2048, [None])


def test_counts() -> None:
    report = run(kernel("fma.rn.f32 %f1, %f2, %f3, %f4; setp.lt.u32 %p1, %r0, 5; @%p1 fma.rn.f32 %f1, %f2, %f3, %f4;", 1), "k", 2, 40, [None])
    assert report.lanes["fma.rn.f32"] == 2 * (40 + 5) and report.executed["fma.rn.f32"] == 2 * 4


def test_open_bits() -> None:
    body = """add.rn.f32 %f1, %f2, %f3; mul.f32 %f4, %f1, %f1; ex2.approx.ftz.f32 %f5, %f4; div.full.f32 %f6, %f5, %f4; red.global.add.f32 [%d1], %f1;
        red.global.add.u32 [%d1], 1; mov.u32 %r1, %clock; fma.rn.f32 %f1, %f1, %f1, %f1; div.rn.f32 %f1, %f1, %f1; sub.s32 %r2, %r1, %r0;
        mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1,%r2,%r3,%r4};"""
    found = open_bits(kernel(body, 1), "k")
    opcodes = sorted(op for counts in found.values() for op in counts)
    assert opcodes == ["div.full.f32", "ex2.approx.ftz.f32", "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "mov.u32", "mul.f32", "red.global.add.f32"]
    assert open_bits(kernel("fma.rn.f32 %f1, %f1, %f1, %f1;", 1), "k") == {}


# ---- what nvcc makes


SOURCE = """
extern "C" __global__ void sums(const float* x, float* y, int n) {
    __shared__ float part[8];
    float s = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) s = __fadd_rn(s, x[(size_t)blockIdx.x * n + i]);
    for (int half = 16; half > 0; half /= 2) s = __fadd_rn(s, __shfl_down_sync(0xffffffffu, s, half));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < blockDim.x / 32; i++) s = __fadd_rn(s, part[i]);
        y[blockIdx.x] = s / sqrtf((float)n);
    }
}"""


def test_compiled_by_nvcc(tmp_path) -> None:  # type: ignore[no-untyped-def]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    (tmp_path / "sums.cu").write_text(SOURCE)
    subprocess.run([nvcc, "-ptx", "-O3", "--fmad=false", "-arch=sm_80", "sums.cu", "-o", "sums.ptx"], cwd=tmp_path, check=True)
    ptx = (tmp_path / "sums.ptx").read_text()
    assert open_bits(ptx, "sums") == {}
    n = 1000
    x = np.random.default_rng(27).standard_normal((3, n)).astype(np.float32)
    want = np.zeros(3, np.float32)
    for row in range(3):
        lanes = np.zeros(128, np.float32)
        for i in range(n):
            lanes[i % 128] += x[row, i]
        for half in (16, 8, 4, 2, 1):
            for w in range(0, 128, 32):
                for i in range(half):
                    lanes[w + i] += lanes[w + i + half]
        total = lanes[0]
        for w in (32, 64, 96):
            total += lanes[w]
        want[row] = total / np.sqrt(np.float32(n))
    for sched in (0, 1, 2):
        y = np.zeros(3, np.float32)
        run(ptx, "sums", 3, 128, [x, y, n], sched=sched, race=True)
        same(y, want)
    dropped = "\n".join("" if "bar.sync" in line else line for line in ptx.split("\n"))
    refused(dropped.replace("sums(", "k(").replace("sums_param", "k_param"), "race", grid=3, block=128, args=[x, np.zeros(3, np.float32), n], race=True)
