"""layer_norm, rms_norm and normalize over rows [R, D].

layer_norm: s = x + residual; mean and var by row_sum; y = fma((s - mean) * (1 / sqrt(var + eps)), w, b).
rms_norm: the same with a mean of 0, and y = (s * (1 / sqrt(var + eps))) * w.
normalize: y = x / max(sqrt(row_sum(x * x)), eps), each square rounded.
Orders as NUMERICS.md has them. A warp takes a row, a thread a lane of the sum. A row is read for every pass,
after the first from caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.triton.launch import blocks, start
from rerank_kernels.backend.triton.numerics import LANES, fmadd, fold_lanes

ROWS = 4  # of one block, one warp each
AHEAD = 8  # loads of a lane under way


@triton.jit(do_not_specialize=["rows", "D"])
def norm_kernel(
    x, residual, weight, bias, y, rows, D: tl.int64, eps,
    RMS: tl.constexpr, PLUS_ONE: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """RMS: no mean is taken off; then PLUS_ONE: added to the weight, and ROUNDED: to x's dtype before the product with it."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    at = row * D
    count = D.to(tl.float32)

    mean = tl.zeros((ROWS, 1), tl.float32)
    if not RMS:
        sums = tl.zeros((ROWS, LANES), tl.float32)
        for begin in range(0, D, LANES * AHEAD):
            for step in tl.static_range(AHEAD):
                i = begin + step * LANES + lane
                sums = sums + _sum_of(x, residual, at, i, (row < rows) & (i < D))
        mean = tl.div_rn(fold_lanes(sums, ROWS), count)

    squares = tl.zeros((ROWS, LANES), tl.float32)
    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            c = tl.where(i < D, _sum_of(x, residual, at, i, (row < rows) & (i < D)) - mean, 0.0)
            squares = fmadd(c, c, squares)
    var = tl.div_rn(fold_lanes(squares, ROWS), count)
    rstd = tl.div_rn(tl.full((ROWS, 1), 1.0, tl.float32), tl.sqrt_rn(var + eps))

    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            there = (row < rows) & (i < D)
            normed = (_sum_of(x, residual, at, i, there) - mean) * rstd
            if ROUNDED:
                normed = normed.to(y.dtype.element_ty).to(tl.float32)
            w = tl.load(weight + i, mask=i < D, other=0.0).to(tl.float32)
            if PLUS_ONE:
                w = w + 1.0
            if bias is None:
                out = normed * w
            else:
                out = fmadd(normed, w, tl.load(bias + i, mask=i < D, other=0.0).to(tl.float32))
            tl.store(y + at + i, out.to(y.dtype.element_ty), mask=there)


@triton.jit
def _sum_of(x, residual, at, i, there):
    s = tl.load(x + at + i, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        s = s + tl.load(residual + at + i, mask=there, other=0.0).to(tl.float32)
    return s


@triton.jit(do_not_specialize=["rows", "D"])
def normalize_kernel(x, y, rows, D: tl.int64, eps, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    at = row * D

    squares = tl.zeros((ROWS, LANES), tl.float32)
    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            v = tl.load(x + at + i, mask=(row < rows) & (i < D), other=0.0).to(tl.float32)
            squares = squares + v * v
    length = tl.sqrt_rn(fold_lanes(squares, ROWS))
    length = tl.broadcast_to(tl.where(length < eps, eps, length), (ROWS, LANES))

    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            there = (row < rows) & (i < D)
            v = tl.load(x + at + i, mask=there, other=0.0).to(tl.float32)
            tl.store(y + at + i, tl.div_rn(v, length).to(y.dtype.element_ty), mask=there)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    return _norm(x, weight, bias, eps, residual, RMS=False, PLUS_ONE=False, ROUNDED=False)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool, rounded: bool, residual: Tensor | None) -> Tensor:
    return _norm(x, weight, None, eps, residual, RMS=True, PLUS_ONE=plus_one, ROUNDED=rounded)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, **constants: bool) -> Tensor:
    (rows, d), y = x.shape, torch.empty_like(x)
    start(
        norm_kernel, (blocks(rows, ROWS),), x, residual, weight, bias, y, rows, d, eps,
        **constants, ROWS=ROWS, AHEAD=AHEAD, num_warps=ROWS,
    )  # fmt: skip
    return y


def normalize(x: Tensor, eps: float) -> Tensor:
    rows, d = x.shape
    y = torch.empty_like(x)
    start(normalize_kernel, (blocks(rows, ROWS),), x, y, rows, d, eps, ROWS=ROWS, AHEAD=AHEAD, num_warps=ROWS)
    return y
