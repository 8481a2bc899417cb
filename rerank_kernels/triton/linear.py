"""linear: y = act(x · weightᵀ + bias) + residual for rows [M, K] and a weight [N, K], and the activations alone.

Order as NUMERICS.md, "linear": chunks of 512, inside a chunk one fma chain, k ascending. tl.dot in float32 with
input_precision="ieee" and an accumulator is that chain, fma(a[k], b[k], acc) with k ascending, on every architecture:
test_triton.py holds it on the PTX. What lies beyond K is zero on both sides. Tiles are chosen by M and N, and are in no
expression.

K has a type, so that K = 1 is not compiled as a constant: then no loop is left, and Triton makes dot(a, b, 0) + total one dot
that starts from total, which is another expression.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.native.pack import contiguous
from rerank_kernels.triton.launch import blocks, start
from rerank_kernels.triton.numerics import CHUNK, activate

Tile = tuple[int, int, int, int]  # rows, columns, steps of K, warps
TILES: tuple[Tile, ...] = ((1, 32, 32, 1), (16, 32, 32, 2), (32, 64, 16, 4), (64, 64, 16, 4))
ELEMENTS = 1024  # of one block of an elementwise kernel
force: int | None = None  # for tests: the tile to take


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, weight, bias, gate, residual, y, M, N: tl.int32, K: tl.int32,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BN)
    m = ((tl.program_id(0) // columns).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    n = ((tl.program_id(0) % columns) * BN + tl.arange(0, BN))[None, :]
    x_row = x + m * K
    w_row = weight + n.to(tl.int64) * K
    k = tl.arange(0, BK)

    total = tl.zeros((BM, BN), tl.float32)
    for chunk in range(0, K, CHUNK):
        s = tl.zeros((BM, BN), tl.float32)
        end = tl.minimum(chunk + CHUNK, K)
        for begin in range(chunk, end, BK):
            here = begin + k
            a = tl.load(x_row + here[None, :], mask=(m < M) & (here[None, :] < K), other=0.0)
            b = tl.load(w_row + here[:, None], mask=(n < N) & (here[:, None] < K), other=0.0)
            s = tl.dot(a.to(tl.float32), b.to(tl.float32), s, input_precision="ieee")
        total = total + s

    if bias is not None:
        total = total + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    at = m * N + n
    there = (m < M) & (n < N)
    if gate is not None:  # sparse_ffn: relu(gate) * up, and the zero itself where the gate is shut
        g = tl.load(gate + at, mask=there, other=0.0)
        total = tl.where(g == 0.0, g, g * total)
    if residual is not None:
        total = total + tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def activation_kernel(x, y, count, KIND: tl.constexpr, ELEMENTS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    v = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, activate(v, KIND).to(y.dtype.element_ty), mask=i < count)


def choose(m: int, n: int) -> int:
    """Few rows: small tiles, so that there are blocks for a whole chip. The same on every GPU."""
    if m <= 4:
        return 0
    for way in (3, 2):
        if blocks(m, TILES[way][0]) * blocks(n, TILES[way][1]) >= 128:
            return way
    return 1


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    y = x.new_empty(m, n, dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    bm, bn, bk, warps = TILES[choose(m, n) if force is None else force]
    start(
        linear_kernel, (blocks(m, bm) * blocks(n, bn),), x, contiguous(weight), bias, gate, residual, y, m, n, k,
        ACTIVATION=activation, BM=bm, BN=bn, BK=bk, num_warps=warps,
    )  # fmt: skip
    return y


def activation(x: Tensor, kind: str) -> Tensor:
    return elementwise(x, kind, x.dtype)


def elementwise(x: Tensor, kind: str, out_dtype: torch.dtype) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    start(activation_kernel, (blocks(x.numel(), ELEMENTS),), x, y, x.numel(), KIND=kind, ELEMENTS=ELEMENTS)
    return y
