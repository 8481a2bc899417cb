"""softmax and row sums over rows [R, D]. softmax: exact maximum; e = exp(x - max); sum by row_sum; e / sum.

Order as NUMERICS.md, "softmax" and "sum, mean". A warp takes a row, and each of its threads a lane of the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.triton.launch import blocks, start
from rerank_kernels.backend.triton.numerics import LANES, MINUS_INFINITY, exp_of_negative, fold_lanes

ROWS = 4  # of one block, one warp each
AHEAD = 8  # loads of a lane under way


@triton.jit(do_not_specialize=["rows", "D"])
def softmax_kernel(x, y, rows, D: tl.int64, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    at = row * D

    largest = tl.full((ROWS, LANES), MINUS_INFINITY, tl.float32)
    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            v = tl.load(x + at + i, mask=(row < rows) & (i < D), other=MINUS_INFINITY).to(tl.float32)
            largest = tl.maximum(largest, v)
    top = tl.max(largest, axis=1, keep_dims=True)  # a NaN loses to a number here: the sum brings it back

    sums = tl.zeros((ROWS, LANES), tl.float32)
    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            v = tl.load(x + at + i, mask=(row < rows) & (i < D), other=0.0).to(tl.float32)
            sums = sums + tl.where(i < D, exp_of_negative(v - top), 0.0)
    total = fold_lanes(sums, ROWS)

    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            there = (row < rows) & (i < D)
            e = exp_of_negative(tl.load(x + at + i, mask=there, other=0.0).to(tl.float32) - top)
            tl.store(y + at + i, tl.div_rn(e, tl.broadcast_to(total, (ROWS, LANES))).to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "D"])
def row_sum_kernel(x, y, rows, D: tl.int64, MEAN: tl.constexpr, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    sums = tl.zeros((ROWS, LANES), tl.float32)
    for begin in range(0, D, LANES * AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step * LANES + lane
            sums = sums + tl.load(x + row * D + i, mask=(row < rows) & (i < D), other=0.0).to(tl.float32)
    total = fold_lanes(sums, ROWS)
    if MEAN:
        total = tl.div_rn(total, D.to(tl.float32))
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < rows)


def softmax(x: Tensor) -> Tensor:
    rows, d = x.shape
    y = torch.empty_like(x)
    start(softmax_kernel, (blocks(rows, ROWS),), x, y, rows, d, ROWS=ROWS, AHEAD=AHEAD, num_warps=ROWS)
    return y


def sum(x: Tensor) -> Tensor:  # noqa: A001  torch's name
    return _row_sum(x, False)


def mean(x: Tensor) -> Tensor:
    return _row_sum(x, True)


def _row_sum(x: Tensor, divide: bool) -> Tensor:
    rows, d = x.shape
    y = x.new_empty(rows)
    start(row_sum_kernel, (blocks(rows, ROWS),), x, y, rows, d, MEAN=divide, ROWS=ROWS, AHEAD=AHEAD, num_warps=ROWS)
    return y
