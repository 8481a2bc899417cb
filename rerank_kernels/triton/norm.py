"""layer_norm over rows [R, D]. s = x + residual; mean and var by row_sum; y = fma((s - mean) * (1 / sqrt(var + eps)), w, b).

Order as NUMERICS.md, "layer_norm". A warp takes a row, a thread a lane of the sum. A row is read three times, then from caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.triton.launch import blocks, start
from rerank_kernels.triton.numerics import LANES, fmadd, fold_lanes

ROWS = 4  # of one block, a warp each
AHEAD = 8  # loads of a lane under way


@triton.jit(do_not_specialize=["rows", "D"])
def layer_norm_kernel(x, residual, weight, bias, y, rows, D: tl.int64, eps, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, LANES)[None, :]
    at = row * D
    count = D.to(tl.float32)

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
            w = tl.load(weight + i, mask=i < D, other=0.0).to(tl.float32)
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    rows, d = x.shape
    y = torch.empty_like(x)
    bias = None if bias is None else bias.contiguous()
    start(
        layer_norm_kernel,
        (blocks(rows, ROWS),),
        x,
        residual,
        weight,
        bias,
        y,
        rows,
        d,
        eps,
        ROWS=ROWS,
        AHEAD=AHEAD,
        num_warps=ROWS,
    )
    return y
