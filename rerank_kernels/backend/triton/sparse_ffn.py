"""sparse_ffn for rows [M, K]: few rows skip what is inactive; many rows take the dense way, whose bits are the same.

1. The pre-activations of `first` (gate, or up without a gate), for all neurons: linear. Its epilogue activates where it can.
2. Which neurons are active? Their numbers and values side by side, ascending, for each row and each chunk of 512 neurons.
3. With a gate: dot products over the rows of up, for active neurons only.
4. down: per row and chunk of 512 neurons one fma chain per column over the active neurons, ascending.
5. The chunks' sums, added in ascending order from +0; the bias; the residual; one rounding.

Leaving out a zero term leaves every bit (NUMERICS.md, "sparse_ffn"). Nothing waits for the device. Every launch has the grid of
a row with all neurons active; blocks that find no neuron end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.firing import Firing, fired, gated
from rerank_kernels.backend.triton.launch import blocks, start
from rerank_kernels.backend.triton.linear import linear, linear_tensor
from rerank_kernels.backend.triton.numerics import CHUNK, fmadd
from rerank_kernels.backend.weights import FfnWeights, check_finite, contiguous, transposed

DENSE_ROWS = 8  # from here on a row's share of reading all weights costs less than its own walk. Only time depends on it.
NEURONS = 32  # of one block of 3
STEP = 32  # of K, likewise
COLUMNS = 128  # of one block of 4 and 5
AHEAD = 8  # neurons under way


@triton.jit
def active_kernel(
    first, candidates, y_count, y_neuron, y_value, threshold, F, chunks, ACTIVATED: tl.constexpr, SQUARED: tl.constexpr
):
    """2. Chunk c of row m, at m * chunks + c. What is not a number counts as active, as relu keeps it."""
    at = tl.program_id(0).to(tl.int64)
    f = (at % chunks) * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(first + (at // chunks) * F + f, mask=f < F, other=0.0)
    if not ACTIVATED:
        value = tl.where(value <= threshold, 0.0, value)
        if SQUARED:
            value = value * value
    if candidates is not None:
        value = tl.where(tl.load(candidates + (at // chunks) * F + f, mask=f < F, other=0) != 0, value, 0.0)
    active = tl.where(value <= 0.0, 0, 1)
    up_to = tl.cumsum(active)
    place = at * CHUNK + up_to - 1
    tl.store(y_neuron + place, f.to(tl.int32), mask=active != 0)
    tl.store(y_value + place, value, mask=active != 0)
    tl.store(y_count + at, tl.max(up_to))


@triton.jit
def up_kernel(
    x, weight, bias, count, neuron, value, y, K: tl.int32, chunks,
    UP_RELU: tl.constexpr, NEURONS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """3. y = act(gate) * up for some active neurons of one row and chunk."""
    at = (tl.program_id(0) // (CHUNK // NEURONS)).to(tl.int64)
    begin = tl.program_id(0) % (CHUNK // NEURONS) * NEURONS
    active = tl.load(count + at)
    if begin >= active:
        return
    i = (begin + tl.arange(0, NEURONS))[None, :]
    f = tl.load(neuron + at * CHUNK + i, mask=i < active, other=0).to(tl.int64)
    k = tl.arange(0, STEP)
    x_row = x + (at // chunks) * K
    total = tl.zeros((1, NEURONS), tl.float32)
    for chunk in range(0, K, CHUNK):
        s = tl.zeros((1, NEURONS), tl.float32)
        for step in range(chunk, tl.minimum(chunk + CHUNK, K), STEP):
            here = step + k
            a = tl.load(x_row + here[None, :], mask=here[None, :] < K, other=0.0)
            b = tl.load(weight + f * K + here[:, None], mask=(i < active) & (here[:, None] < K), other=0.0)
            s = tl.dot(a.to(tl.float32), b.to(tl.float32), s, input_precision="ieee")
        total = total + s
    if bias is not None:
        total = total + tl.load(bias + f, mask=i < active, other=0.0).to(tl.float32)
    gate = tl.load(value + at * CHUNK + i, mask=i < active, other=0.0)
    product = gate * total
    if UP_RELU:
        product = tl.where(total <= 0.0, 0.0, product)
    tl.store(y + at * CHUNK + i, product, mask=i < active)


@triton.jit
def down_kernel(count, neuron, value, down, y_sums, D, COLUMNS: tl.constexpr, AHEAD: tl.constexpr):
    """4. down: [F, D], so that a neuron's weights lie side by side."""
    columns = tl.cdiv(D, COLUMNS)
    at = (tl.program_id(0) // columns).to(tl.int64)
    d = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    active = tl.load(count + at)
    s = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, active, AHEAD):
        for step in tl.static_range(AHEAD):
            i = begin + step
            f = tl.load(neuron + at * CHUNK + i, mask=i < active, other=0).to(tl.int64)
            h = tl.load(value + at * CHUNK + i, mask=i < active, other=0.0)
            w = tl.load(down + f * D + d, mask=(i < active) & (d < D), other=0.0).to(tl.float32)
            s = tl.where(i < active, fmadd(w, h, s), s)
    tl.store(y_sums + at * D + d, s, mask=d < D)


@triton.jit
def sums_kernel(sums, bias, residual, y, chunks, D, COLUMNS: tl.constexpr):
    """5."""
    columns = tl.cdiv(D, COLUMNS)
    m = (tl.program_id(0) // columns).to(tl.int64)
    d = (tl.program_id(0) % columns) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for c in range(0, chunks):
        total = total + tl.load(sums + (m * chunks + c) * D + d, mask=d < D, other=0.0)
    if bias is not None:
        total = total + tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    if residual is not None:
        total = total + tl.load(residual + m * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + m * D + d, total.to(y.dtype.element_ty), mask=d < D)


def sparse_ffn(x: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    return _sparse_ffn(x, linear(x, *w.first, _epilogue(how), None, torch.float32), w, how)


def sparse_ffn_tensor(x: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    """Only what decides which neurons are active is computed on tensor cores, for any number of rows. The rest is as above,
    where sparse equals dense. So the number of rows is in no expression here either."""
    return _sparse_ffn(x, linear_tensor(x, *w.first, _epilogue(how), None, torch.float32), w, how)


def _epilogue(how: Firing) -> str | None:
    """What the first product's epilogue does of it."""
    return how.activation if how.plain else None


def _sparse_ffn(x: Tensor, first: Tensor, w: FfnWeights, how: Firing) -> Tensor:
    """From the first product in float32, behind its epilogue."""
    rows, f32 = x.shape[0], torch.float32
    if rows >= DENSE_ROWS:
        check_finite(w.down)
        hidden = first if how.plain else fired(first, how)
        if w.gate is not None and how.up_relu:
            hidden = gated(hidden, linear(x, w.up, w.up_bias, None, None, f32), how)
        elif w.gate is not None:
            hidden = linear(x, w.up, w.up_bias, None, None, f32, gate=hidden)
        return linear(hidden, w.down, w.down_bias, None, how.residual, x.dtype)

    down = transposed(w.down)
    neurons, d = down.shape
    width = int(CHUNK)
    chunks = blocks(neurons, width)
    count = x.new_empty(rows * chunks, dtype=torch.int32)
    neuron = x.new_empty(rows * chunks * width, dtype=torch.int32)
    value = torch.empty_like(neuron, dtype=f32)
    candidates = None if how.candidates is None else how.candidates.view(torch.uint8)
    start(
        active_kernel, (rows * chunks,), first, candidates, count, neuron, value, how.threshold, neurons, chunks,
        ACTIVATED=how.plain, SQUARED=how.activation == "relu2",
    )  # fmt: skip
    if w.gate is not None:
        grid = (rows * chunks * (width // NEURONS),)
        weight, product = contiguous(w.up), torch.empty_like(value)
        start(
            up_kernel, grid, x, weight, w.up_bias, count, neuron, value, product, x.shape[1], chunks,
            UP_RELU=how.up_relu, NEURONS=NEURONS, STEP=STEP, num_warps=1,
        )  # fmt: skip
        value = product
    sums = x.new_empty(rows * chunks, d, dtype=f32)
    grid = (rows * chunks * blocks(d, COLUMNS),)
    start(down_kernel, grid, count, neuron, value, down, sums, d, COLUMNS=COLUMNS, AHEAD=AHEAD)
    y = x.new_empty(rows, d)
    start(sums_kernel, (rows * blocks(d, COLUMNS),), sums, w.down_bias, how.residual, y, chunks, d, COLUMNS=COLUMNS)
    return y
