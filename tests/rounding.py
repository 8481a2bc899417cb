"""Are the single float operations that PyTorch and NumPy do between our ops correctly rounded, here, under this setting?

    python tests/rounding.py          # JSON: operation -> how many results are not the correctly rounded one

A program, for MKL reads MKL_CBWR and PyTorch ATEN_CPU_CAPABILITY once, when they start: test_between.py runs it in a process
for each setting. SWEPT is what that test lets stand between our ops: an operation that is not swept here is not allowed there.

Truth is float64, rounded to float32 once more, which is one rounding of the exact value: products of two float32 are exact in
float64; for +, -, ÷ and √ 53 bits are enough that the second rounding sees what the first one lost (2 · 24 + 2 would do:
Figueroa, "When is double rounding innocuous?", 1995); subnormal quotients keep 2^-48 from a midpoint, or hit it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
LARGE = 100_003  # elements: above PyTorch's grain of 32,768, so that two threads share them; not a multiple of any vector
SIZES = range(1, 68)  # tails of every length, before and after whole vectors
OFFSETS = (0, 1, 2, 5)  # elements from where memory is aligned

# aten's name -> (on tensors, in float64). NumPy's are named likewise.
BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "aten.add.Tensor": (torch.add, np.add),
    "aten.sub.Tensor": (torch.sub, np.subtract),
    "aten.mul.Tensor": (torch.mul, np.multiply),
    "aten.div.Tensor": (torch.div, np.divide),
    "numpy.subtract": (lambda a, b: torch.from_numpy(a.numpy() - b.numpy()), np.subtract),
}
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CONVERSION = "aten._to_copy.default"
SWEPT = (*BINARY, CONVERSION)
# What the pytorch backend computes with, and promises on one machine only: an element has the same bits wherever it stands.
ELEMENTWISE: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "torch.exp": (torch.exp, torch.float32),
    "torch.exp of float64": (torch.exp, torch.float64),
    "torch.tanh": (torch.tanh, torch.float32),
    "torch.special.erfc of float64": (torch.special.erfc, torch.float64),
}


def operands(n: int = LARGE) -> tuple[Floats, Floats]:
    """Any exponent, subnormals and zeros too, either sign; every other b is within 26 binades of its a, where sums round."""
    random = np.random.Generator(np.random.PCG64(7))
    exponent = random.integers(0, 255, n)
    near = np.clip(exponent + random.integers(-26, 27, n), 0, 254)
    other = np.where(np.arange(n) % 2, near, random.integers(0, 255, n))
    fractions = random.integers(0, 1 << 23, (2, n))
    few = random.integers(0, 1 << 23, (2, n)) & -(1 << 18)  # short ones: ties
    fractions = np.where(random.integers(0, 3, (2, n)) == 0, few, fractions)
    signs = random.integers(0, 2, (2, n)) << 31
    a, b = (
        (s | e << 23 | f).astype(np.uint32).view(np.float32)
        for s, e, f in zip(signs, (exponent, other), fractions, strict=True)
    )
    return a, b


def wrong(got: Tensor, want: Floats) -> int:
    """A NaN is a NaN."""
    bits = got.contiguous().numpy().view(np.uint32) != want.view(np.uint32)
    return int((bits & ~(np.isnan(got.numpy()) & np.isnan(want))).sum())


def rounded(f: Callable[..., Any], *values: Floats) -> Floats:
    return np.asarray(f(*(v.astype(np.float64) for v in values))).astype(np.float32)


def placed(x: Tensor, n: int, offset: int) -> Tensor:
    """n elements in memory of their own, `offset` elements from its start."""
    own = torch.empty(n + offset, dtype=x.dtype)
    own[offset:] = x[offset : offset + n]
    return own[offset:]


def of_binary(f: Callable[..., Any], truth: Callable[..., Any]) -> int:
    a, b = operands()
    want, x, y = rounded(truth, a, b), torch.from_numpy(a), torch.from_numpy(b)
    count = wrong(f(x, y), want)
    gaps = torch.stack([x, y], -1)
    count += wrong(f(gaps[:, 0], gaps[:, 1]), want)
    count += wrong(f(x[:97, None], y[None, :101]), rounded(truth, a[:97, None], b[None, :101]))
    for n in SIZES:
        for offset in OFFSETS:
            count += wrong(f(placed(x, n, offset), placed(y, n, offset)), want[offset : offset + n])
    return count


def of_one_number() -> int:
    """A tensor and a number of Python's, which is float32 by then: haystack's calibration_factor, the 1 of 1 - cosine."""
    a, _ = operands()
    x, count = torch.from_numpy(a), 0
    for value in (0.25, 1.0, -3.7, 1e-30):
        number = np.float32(value)
        count += wrong(x * value, rounded(np.multiply, a, number)) + wrong(x[1:8] * value, rounded(np.multiply, a[1:8], number))
        count += wrong(torch.from_numpy(number - a), rounded(np.subtract, number, a))
    return count


def of_conversions() -> int:
    """float32 to half precision, to nearest even and subnormals too, by integers; and back, exactly."""
    a, _ = operands()
    edges = [*(2.0**-n for n in range(30)), 65504, 65519.996, 65520, 3.4e38]
    a = np.concatenate([a, np.asarray(edges, np.float32)])
    count = 0
    for dtype in HALVES.values():
        digits, lowest = (11, -24) if dtype == torch.float16 else (8, -133)
        wide = a.astype(np.float64)
        step = np.maximum(np.frexp(wide)[1].astype(np.int64) - digits, lowest)
        whole = np.rint(np.ldexp(wide, -step))  # to even
        want = np.ldexp(whole, step)
        largest = torch.finfo(dtype).max
        want = np.where(np.abs(want) > largest, np.copysign(np.inf, want), want).astype(np.float32)
        x = torch.from_numpy(a)
        count += wrong(x.to(dtype).float(), want)
        for n in SIZES:
            for offset in OFFSETS:
                count += wrong(placed(x, n, offset).to(dtype).float(), want[offset : offset + n])
    return count


def moved(f: Callable[[Tensor], Tensor], dtype: torch.dtype) -> int:
    """How often an element has other bits than in a large tensor: in a tail, off a boundary, in a view, at two threads."""
    x = (torch.arange(LARGE) * 7919 % 40_009 / 1000 - 20).to(dtype)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    want = f(x).view(integer)
    torch.set_num_threads(before)
    count = int((f(x).view(integer) != want).sum()) + int((f(torch.stack([x, x], -1)[:, 0]).view(integer) != want).sum())
    for n in SIZES:
        for offset in OFFSETS:
            count += int((f(placed(x, n, offset)).view(integer) != want[offset : offset + n]).sum())
    return count


def sweep() -> dict[str, int]:
    from rerank_kernels.backend.pytorch.norm import square_root

    positive = np.abs(operands()[0])
    roots, x = rounded(np.sqrt, positive), torch.from_numpy(positive)
    found = {name: 0 for name in (*SWEPT, "a number of Python's", "square_root", "torch.sqrt", *ELEMENTWISE)}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, (f, truth) in BINARY.items():
            found[name] += of_binary(f, truth)
        found["a number of Python's"] += of_one_number()
        found[CONVERSION] += of_conversions()
        for name, root in (("square_root", square_root), ("torch.sqrt", torch.sqrt)):
            found[name] += wrong(root(x), roots) + sum(wrong(root(placed(x, n, 1)), roots[1 : n + 1]) for n in SIZES)
        for name, (function, dtype) in ELEMENTWISE.items():
            found[name] += moved(function, dtype)
    return found


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    with np.errstate(all="ignore"):
        print(json.dumps(sweep()))
