"""The PTX simulator's arithmetic against values that were not computed by it: numpy, fractions, the ISA's pseudo-code."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest

from ptxsim.snippets import elementwise, rounded, same, signed

SPECIAL = np.array(  # zeros, the ends of the subnormal and normal numbers, ones, infinities, a NaN, and some more
    [
        *(0, 0x80000000, 1, 0x80000001, 0x7FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0x3F7FFFFF, 0x40490FDB, 0x34000000, 0x4B7FFFFF),
    ],
    np.uint32,
)


def floats(seed: int, n: int = 512) -> np.ndarray:
    """All exponents, and the special ones."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    x[: n // 4] = (x[: n // 4] & 0x80FFFFFF) | 0x3F000000
    x[-len(SPECIAL) :] = SPECIAL
    rng.shuffle(x)
    return x.view(np.float32)


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
    same(
        elementwise(f"fma.{direction}.f32", "f32", ["f32"] * 3, a, b, c),
        np.array([rounded(x, direction) for x in exact], np.float32),
    )
    exact = [Fraction(float(x)) + Fraction(float(z)) for x, z in zip(a, c, strict=True)]
    same(
        elementwise(f"add.{direction}.f32", "f32", ["f32"] * 2, a, c),
        np.array([rounded(x, direction) for x in exact], np.float32),
    )
    exact = [Fraction(float(x)) / Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    same(
        elementwise(f"div.{direction}.f32", "f32", ["f32"] * 2, a, b),
        np.array([rounded(x, direction) for x in exact], np.float32),
    )


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
    lo = [
        float(x) if y != y else float(y) if x != x else min((float(x), float(y)), key=lambda v: (v, math.copysign(1, v)))
        for x, y in zip(a, b, strict=True)
    ]
    hi = [
        float(x) if y != y else float(y) if x != x else max((float(x), float(y)), key=lambda v: (v, math.copysign(1, v)))
        for x, y in zip(a, b, strict=True)
    ]
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


@pytest.mark.parametrize("dtype", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(dtype: str) -> None:
    n = int(dtype[1:])
    cell = {16: np.uint16, 32: np.uint32, 64: np.uint64}[n]
    a, b, c = numbers(n, 1), numbers(n, 2)[::-1], numbers(n, 3)
    arrays = [np.array(x, cell) for x in (a, b, c)]
    value = (lambda x: signed(x, n)) if dtype[0] == "s" else (lambda x: x)
    for op, f in INTEGER.items():
        count = 3 if op[:3] in ("mad", "sad") else 2
        got = elementwise(f"{op}.{dtype}", dtype, [dtype] * count, *arrays[:count])
        want = [f(value(x), value(y), value(z), n) & ((1 << n) - 1) for x, y, z in zip(a, b, c, strict=True)]
        assert got.tolist() == want, op
    if n < 64:
        wide = dtype[0] + str(2 * n)
        got = elementwise(f"mul.wide.{dtype}", wide, [dtype] * 2, *arrays[:2])
        assert got.tolist() == [value(x) * value(y) & ((1 << 2 * n) - 1) for x, y in zip(a, b, strict=True)]
    if dtype[0] == "s":
        assert elementwise(f"neg.{dtype}", dtype, [dtype], arrays[0]).tolist() == [-value(x) & ((1 << n) - 1) for x in a]
        assert elementwise(f"abs.{dtype}", dtype, [dtype], arrays[0]).tolist() == [abs(value(x)) & ((1 << n) - 1) for x in a]


@pytest.mark.parametrize("n", [16, 32, 64])
def test_shifts_and_logic(n: int) -> None:
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[n]
    m = (1 << n) - 1
    a, b = numbers(n, 4), numbers(n, 5)[::-1]
    by = [random.Random(6).choice([0, 1, 5, n - 1, n, n + 7, 255]) for _ in a]
    x, y, s = np.array(a, dtype), np.array(b, dtype), np.array(by, np.uint32)
    assert elementwise(f"shl.b{n}", f"b{n}", [f"b{n}", "u32"], x, s).tolist() == [
        v << k & m for v, k in zip(a, by, strict=True)
    ]
    assert elementwise(f"shr.u{n}", f"u{n}", [f"u{n}", "u32"], x, s).tolist() == [v >> k for v, k in zip(a, by, strict=True)]
    assert elementwise(f"shr.s{n}", f"s{n}", [f"s{n}", "u32"], x, s).tolist() == [
        signed(v, n) >> k & m for v, k in zip(a, by, strict=True)
    ]
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
        want = [
            sum((table >> (4 * (p >> i & 1) + 2 * (q >> i & 1) + (r >> i & 1)) & 1) << i for i in range(32))
            for p, q, r in zip(a, b, c, strict=True)
        ]
        assert elementwise(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table}", "b32", ["b32"] * 3, x, y, z).tolist() == want

    def permuted(p: int, q: int, sel: int) -> int:
        data = (q << 32 | p).to_bytes(8, "little")
        chosen = [data[sel >> 4 * i & 7] for i in range(4)]
        return int.from_bytes(bytes(255 * (v >> 7) if sel >> 4 * i & 8 else v for i, v in enumerate(chosen)), "little")

    assert elementwise("prmt.b32", "b32", ["b32"] * 3, x, y, z).tolist() == [
        permuted(p, q, r) for p, q, r in zip(a, b, c, strict=True)
    ]
    for op, f in {
        "shf.l.wrap": lambda p, q, s: (q << 32 | p) << (s & 31) >> 32,
        "shf.r.wrap": lambda p, q, s: (q << 32 | p) >> (s & 31),
        "shf.l.clamp": lambda p, q, s: (q << 32 | p) << min(s, 32) >> 32,
        "shf.r.clamp": lambda p, q, s: (q << 32 | p) >> min(s, 32),
    }.items():
        got = elementwise(f"{op}.b32", "b32", ["b32"] * 3, x, y, z).tolist()
        assert got == [f(p, q, r) & 0xFFFFFFFF for p, q, r in zip(a, b, c, strict=True)], op
    signed_bytes = lambda v: [signed(v >> 8 * i, 8) for i in range(4)]  # noqa: E731
    want = [
        sum(p * q for p, q in zip(signed_bytes(i), signed_bytes(j), strict=True)) + k & 0xFFFFFFFF
        for i, j, k in zip(a, b, c, strict=True)
    ]
    assert elementwise("dp4a.s32.s32", "s32", ["s32"] * 3, x, y, z).tolist() == want


def test_carry_chain() -> None:
    a, b = numbers(64, 13), numbers(64, 14)[::-1]
    x, y = np.array(a, np.uint64), np.array(b, np.uint64)
    split = "mov.b64 {{%r20, %r21}}, {a};\nmov.b64 {{%r22, %r23}}, {b};\n"
    join = "mov.b64 {d}, {{%r24, %r25}}"
    for op, f in (("add", int.__add__), ("sub", int.__sub__)):
        text = f"{op}.cc.u32 %r24, %r20, %r22;\n{op}c.u32 %r25, %r21, %r23;\n{join}"
        assert elementwise(text, "u64", ["u64"] * 2, x, y, extra=split).tolist() == [
            f(p, q) & (1 << 64) - 1 for p, q in zip(a, b, strict=True)
        ]


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
    for name, dtype in (("s32", np.int32), ("u32", np.uint32), ("s64", np.int64), ("u64", np.uint64)):
        n = int(name[1:])
        a = numbers(n, 18)
        values = [signed(v, n) if name[0] == "s" else v for v in a]
        x = np.array(a, np.uint32 if n == 32 else np.uint64).view(dtype)
        for mode in ("rn", "rz", "rm", "rp"):
            want = np.array([rounded(Fraction(v), mode) for v in values], np.float32)
            same(elementwise(f"cvt.{mode}.f32.{name}", "f32", [name], x), want)
        same(elementwise(f"cvt.rn.f64.{name}", "f64", [name], x), np.array([float(v) for v in values]))


def test_integer_widths() -> None:
    a = np.array(numbers(32, 19), np.uint32)
    assert elementwise("cvt.s32.s8", "s32", ["u32"], a).tolist() == [signed(int(v), 8) & 0xFFFFFFFF for v in a]
    assert elementwise("cvt.u32.u8", "u32", ["u32"], a).tolist() == [int(v) & 255 for v in a]
    assert elementwise("cvt.s64.s32", "s64", ["s32"], a).tolist() == [signed(int(v), 32) & (1 << 64) - 1 for v in a]
    assert elementwise("cvt.u64.u32", "u64", ["u32"], a).tolist() == a.tolist()
    assert elementwise("cvt.s8.s32", "u32", ["s32"], a).tolist() == [signed(int(v), 8) & 0xFFFFFFFF for v in a]
    assert elementwise("cvt.sat.s8.s32", "s16", ["s32"], a)[:3].tolist() == [0, 1, 2]
    assert (elementwise("cvt.sat.u8.s32", "u16", ["s32"], a) & 255).tolist() == [
        min(max(signed(int(v), 32), 0), 255) for v in a
    ]


# ---- comparisons


def test_comparisons() -> None:
    a, b = floats(20, 256), floats(21, 256)
    a[:40] = b[:40]
    ordered = {
        "eq": np.equal,
        "ne": lambda x, y: (x < y) | (x > y),
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    nan = np.isnan(a) | np.isnan(b)
    for name, f in ordered.items():
        for suffix in ("", "u"):
            want = f(a, b) & ~nan if not suffix else f(a, b) | nan
            got = elementwise(
                f"setp.{name}{suffix}.f32 %p1, {{a}}, {{b}};\nselp.u32 {{d}}, 1, 0, %p1", "u32", ["f32"] * 2, a, b
            )
            assert (got == want).all(), name + suffix
    assert (elementwise("setp.nan.f32 %p1, {a}, {b};\nselp.u32 {d}, 1, 0, %p1", "u32", ["f32"] * 2, a, b) == nan).all()
    x, y = np.array(numbers(32, 22), np.uint32), np.array(numbers(32, 23)[::-1], np.uint32)
    got = elementwise(
        "setp.lt.s32 %p1|%p2, {a}, {b};\nselp.u32 %r30, 1, 0, %p1;\nselp.u32 {d}, 2, 0, %p2;\nor.b32 {d}, {d}, %r30",
        "u32",
        ["u32"] * 2,
        x,
        y,
    )
    assert (got == np.where(x.view(np.int32) < y.view(np.int32), 1, 2)).all()
    text = "setp.hi.u32 %p3, {a}, 1000;\nsetp.lo.{op}.u32 %p1, {{a}}, {{b}}, {no}%p3;\nselp.u32 {{d}}, 1, 0, %p1"
    for op, f in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for no in ("", "!"):
            got = elementwise(text.replace("{a}, 1000", "{{a}}, 1000").format(op=op, no=no), "u32", ["u32"] * 2, x, y)
            assert (got == f(x < y, (x > 1000) ^ (no == "!"))).all()
    assert (elementwise("set.gt.u32.f32", "u32", ["f32"] * 2, a, b) == np.where(a > b, 0xFFFFFFFF, 0)).all()
    assert (elementwise("set.gt.f32.f32", "f32", ["f32"] * 2, a, b) == np.where(a > b, 1, 0)).all()
    assert (elementwise("slct.b32.s32", "b32", ["b32", "b32", "s32"], x, y, x) == np.where(x.view(np.int32) >= 0, x, y)).all()
    assert (
        elementwise("testp.subnormal.f32 %p1, {a};\nselp.u32 {d}, 1, 0, %p1", "u32", ["f32"], a)
        == ((a != 0) & (np.abs(a) < 2.0**-126))
    ).all()


# ---- halves


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_arithmetic(dtype: str) -> None:
    rng = np.random.default_rng(24)
    bits = rng.integers(0, 1 << 16, (3, 256)).astype(np.uint16)
    bits[:, :128] = bits[:, :128] & 0x83FF | 0x3800 if dtype == "f16" else bits[:, :128] & 0x80FF | 0x3F00
    shape = (11, -24, 16) if dtype == "f16" else (8, -133, 128)
    value = (
        (lambda v: v.view(np.float16).astype(np.float32))
        if dtype == "f16"
        else (lambda v: (v.astype(np.uint32) << 16).view(np.float32))
    )
    a, b, c = (value(v) for v in bits)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    want = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "rn", *shape)
        for x, y, z in zip(a[finite], b[finite], c[finite], strict=True)
    ]
    got = value(elementwise(f"fma.rn.{dtype}", dtype, [dtype] * 3, *bits))[finite]
    assert (got == np.array(want, np.float32)).all()
    pairs = [(v.astype(np.uint32) | v[::-1].astype(np.uint32) << 16) for v in bits]
    got = elementwise(f"fma.rn.{dtype}x2", f"{dtype}x2", [f"{dtype}x2"] * 3, *pairs)
    assert (value((got & 0xFFFF).astype(np.uint16))[finite] == np.array(want, np.float32)).all()
    assert (value((got >> 16).astype(np.uint16))[::-1][finite] == np.array(want, np.float32)).all()
    both = np.isfinite(a) & np.isfinite(b)
    want = [rounded(Fraction(float(x)) - Fraction(float(y)), "rn", *shape) for x, y in zip(a[both], b[both], strict=True)]
    assert (value(elementwise(f"sub.rn.{dtype}", dtype, [dtype] * 2, *bits[:2]))[both] == np.array(want, np.float32)).all()
