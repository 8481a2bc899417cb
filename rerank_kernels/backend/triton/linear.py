"""linear: y = act(x · weightᵀ + bias) + residual for rows [M, K] and a weight [N, K]. Besides, bmm: the product
alone for B pairs of matrices; and the activations alone.

Order as NUMERICS.md, "linear": chunks of 512, inside a chunk one fma chain, k ascending. tl.dot in float32 with
input_precision="ieee" and an accumulator is that chain, fma(a[k], b[k], acc) with k ascending, on every architecture:
test_triton.py holds it on the PTX. What lies beyond K is zero on both sides. Tiles are chosen by M and N, and are in no
expression.

K has a type, so that K = 1 is not compiled as a constant. Then no loop would be left, and Triton would make one
dot of dot(a, b, 0) + total that starts from total. That is another expression.

Mode tensor ("Mode tensor" there) is one chain of matrix instructions over all of K, 16 k each, ascending, in one float32
accumulator; then + 0, and gelu has its short form where the result is half precision. A step of the loop is STEP k's in every
tile. So a last step that K does not fill ends in up to three instructions of nothing but zeros. They leave the accumulator as
it is (at most a -0 becomes +0, as the end makes it in any case). On Hopper the instruction is wgmma and wants 64 rows for four
warps. A smaller tile would get mma.sync: the tiles there have 64 rows at least. Which tile a call gets depends on M, N and the
architecture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.triton import launch
from rerank_kernels.backend.triton.launch import blocks, matrix_instruction, start
from rerank_kernels.backend.triton.numerics import CHUNK, activate
from rerank_kernels.backend.weights import contiguous

LinearTile = tuple[int, int, int, int]  # rows, columns, steps of K, warps
TILES: tuple[LinearTile, ...] = ((1, 32, 32, 1), (16, 32, 32, 2), (32, 64, 16, 4), (64, 64, 16, 8))
ELEMENTS = 1024  # of one block of an elementwise kernel
force: int | None = None  # for tests: the tile to take, of TILES or of tensor_tiles


class LinearTensorTile(NamedTuple):
    rows: int
    columns: int
    warps: int
    stages: int  # steps of K under way


STEP = 64  # k's a step of the loop, of every tile: see above
GROUP = 8  # tiles of rows whose blocks run side by side, so that they find each other's columns in the L2 cache
ENOUGH = 80  # blocks that keep most of a GPU busy
# From few rows to many; shared memory <= 99 KB but on Hopper, whose instruction wgmma is.
TENSOR_TILES = {
    "mma.sync": (
        LinearTensorTile(16, 64, 4, 4),
        LinearTensorTile(32, 64, 4, 4),
        LinearTensorTile(64, 64, 4, 4),
        LinearTensorTile(128, 128, 8, 3),
    ),
    "wgmma": (
        LinearTensorTile(64, 32, 4, 6),
        LinearTensorTile(64, 64, 4, 5),
        LinearTensorTile(64, 128, 4, 4),
        LinearTensorTile(128, 128, 8, 4),
    ),
}


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, weight, bias, gate, residual, y, M, N: tl.int32, K: tl.int32,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    batch = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    tile = tl.program_id(0) % (rows * columns)
    m = ((tile // columns).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    n = ((tile % columns) * BN + tl.arange(0, BN))[None, :]
    x_row = x + (batch * M + m) * K
    w_row = weight + (batch * N + n) * K
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
    _finish(total, bias, gate, residual, y, batch, m, n, M, N, ACTIVATION)


@triton.jit(do_not_specialize=["M"])
def linear_tensor_kernel(
    x, weight, bias, residual, y, M, N: tl.int32, K: tl.int32,
    ACTIVATION: tl.constexpr, WHOLE: tl.constexpr, FEW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # blocks down GROUP tiles of rows, then on to the next columns
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    batch = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    tile = tl.program_id(0) % (rows * columns)
    first = tile // (GROUP * columns) * GROUP
    inside = tile % (GROUP * columns)
    high = tl.minimum(rows - first, GROUP)
    m = ((first + inside % high).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    n = (inside // high * BN + tl.arange(0, BN))[None, :]
    # rows beyond the last are the last once more: nothing of them is stored, and the loop needs no mask for them. Unless they
    # are most of the tile: then all the chip would wait for one line of the L2 cache.
    x_row = x + (batch * M + tl.minimum(m, M - 1)) * K
    w_row = weight + (batch * N + tl.minimum(n, N - 1)) * K
    k = tl.arange(0, STEP)

    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, K, STEP):
        here = begin + k
        if FEW:  # less rows than a tile has
            a = tl.load(x_row + here[None, :], mask=(m < M) & (here[None, :] < K), other=0.0)
        elif WHOLE:  # K is a multiple of STEP
            a = tl.load(x_row + here[None, :])
        else:
            a = tl.load(x_row + here[None, :], mask=here[None, :] < K, other=0.0)
        if WHOLE:
            b = tl.load(w_row + here[:, None])
        else:
            b = tl.load(w_row + here[:, None], mask=here[:, None] < K, other=0.0)
        total = tl.dot(a, b, total)
    total = total + 0.0  # a sum that underflowed to -0, which a step of zeros makes +0
    _finish(total, bias, None, residual, y, batch, m, n, M, N, ACTIVATION)


@triton.jit
def _finish(total, bias, gate, residual, y, batch, m, n, M, N, ACTIVATION: tl.constexpr):
    if bias is not None:
        total = total + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    at = (batch * M + m) * N + n
    there = (m < M) & (n < N)
    if gate is not None:  # sparse_ffn: relu(gate) * up, and the zero itself where the gate is shut
        g = tl.load(gate + at, mask=there, other=0.0)
        total = tl.where(g == 0.0, g, g * total)
    if residual is not None:
        total = total + tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def activation_kernel(x, up, y, count, KIND: tl.constexpr, ELEMENTS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    v = activate(tl.load(x + i, mask=i < count, other=0.0).to(tl.float32), KIND)
    if up is not None:
        v = v * tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, v.to(y.dtype.element_ty), mask=i < count)


def choose(m: int, n: int) -> int:
    """Few rows: small tiles, so that there are blocks for a whole chip. The same on every GPU."""
    if m <= 4:
        return 0
    for way in (3, 2):
        if blocks(m, TILES[way][0]) * blocks(n, TILES[way][1]) >= 128:
            return way
    return 1


def tensor_tiles(arch: int) -> tuple[LinearTensorTile, ...]:
    """The tiles of mode tensor on this compute capability (90 for 9.0), all with the same matrix instruction."""
    return TENSOR_TILES[matrix_instruction(arch)]


def choose_tensor(batch: int, m: int, n: int, arch: int) -> LinearTensorTile:
    """The largest tile that leaves blocks for the whole GPU and no more than half of it empty; else the smallest."""
    tiles = tensor_tiles(arch)
    if force is not None:
        return tiles[force]
    for tile in reversed(tiles[1:]):
        if m > tile.rows // 2 and batch * blocks(m, tile.rows) * blocks(n, tile.columns) >= ENOUGH:
            return tile
    return tiles[0]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    _start(x[None], contiguous(weight)[None], bias, activation, gate, residual, y)
    return y


def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """b [B, N, K], like a weight."""
    y = a.new_empty(*a.shape[:2], b.shape[1], dtype=out_dtype)
    _start(a, b, None, None, None, None, y)
    return y


def _start(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, gate: Tensor | None, residual: Tensor | None, y: Tensor
) -> None:
    (batch, m, k), n = a.shape, b.shape[1]
    bm, bn, bk, warps = TILES[choose(m, n) if force is None else force]
    start(
        linear_kernel, (batch * blocks(m, bm) * blocks(n, bn),), a, b, bias, gate, residual, y, m, n, k,
        ACTIVATION=activation, BM=bm, BN=bn, BK=bk, num_warps=warps, maxnreg=launch.REGISTERS,
    )  # fmt: skip


def linear_tensor(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)
    bias = None if bias is None else bias.contiguous()
    if activation == "gelu" and out_dtype != torch.float32:
        activation = "gelu_short"
    _start_tensor(x[None], contiguous(weight)[None], bias, activation, residual, y)
    return y


def bmm_tensor(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    y = a.new_empty(*a.shape[:2], b.shape[1], dtype=out_dtype)
    _start_tensor(a, b, None, None, None, y)
    return y


def _start_tensor(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, y: Tensor
) -> None:
    (batch, m, k), n = a.shape, b.shape[1]
    tile = choose_tensor(batch, m, n, launch.architecture(a))
    start(
        linear_tensor_kernel, (batch * blocks(m, tile.rows) * blocks(n, tile.columns),), a, b, bias, residual, y, m, n, k,
        ACTIVATION=activation, WHOLE=k % STEP == 0, FEW=m < tile.rows,
        BM=tile.rows, BN=tile.columns, STEP=STEP, GROUP=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def activation(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    return elementwise(x, kind, x.dtype, up)


def elementwise(x: Tensor, kind: str, out_dtype: torch.dtype, up: Tensor | None = None) -> Tensor:
    y = torch.empty_like(x, dtype=out_dtype)
    start(activation_kernel, (blocks(x.numel(), ELEMENTS),), x, up, y, x.numel(), KIND=kind, ELEMENTS=ELEMENTS)
    return y
