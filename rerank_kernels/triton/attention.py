"""attention over packed sequences, bidirectional or windowed (causal is a window), grouped heads, any D.

For each query row: s_j = dot(q, k_j) * scale; max exact; e_j = exp(s_j - max); l = row_sum(e), lane j mod 32;
out = dot(e, v) / l over keys, in chunks of 64. j counts from the sequence's own first token (NUMERICS.md, "attention").

A block has ROWS queries of one head and goes over the keys twice, 32 at a step, which are the 32 lanes of l: first for the
maximum, then for l and out; scores are made twice and stored nowhere. cu_seqlens is read on the device only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.triton.launch import blocks, start
from rerank_kernels.triton.numerics import CHUNK, KEY_TILE, LANES, MINUS_INFINITY, exp_of_negative, fmadd, fold_lanes

ROWS = 32  # queries of one block
STEP = 16  # features at a time, of q and k
WIDEST = 128  # features of v of one block


@triton.jit(do_not_specialize=["B", "total", "left", "right"])
def attention_kernel(
    q, k, v, cu_seqlens, y, q_token, q_head, k_token, k_head, v_token, v_head,
    B, total, H, GROUP, D: tl.int32, left, right, scale,
    WINDOWED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    # Sequence b has the tiles from cu[b] // ROWS + b on: enough for its rows, and found without reading any length on the host.
    # The last b whose first tile is not behind ours:
    tile = tl.program_id(0)
    b = 0
    beyond = B
    while beyond - b > 1:
        middle = (b + beyond) // 2
        if tl.load(cu_seqlens + middle) // ROWS + middle <= tile:
            b = middle
        else:
            beyond = middle
    # clamped, so that wrong offsets lead to wrong rows but never outside the arrays
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    length = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), first), total) - first
    row = (tile - first // ROWS - b) * ROWS
    if (row < 0) | (row >= length):
        return
    head = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(2) * FEATURES + tl.arange(0, FEATURES))[None, :]
    i = (row + tl.arange(0, ROWS))[:, None]
    q_row = q + head * q_head + (first + i).to(tl.int64) * q_token
    k_first = k + (head // GROUP) * k_head + first.to(tl.int64) * k_token
    v_first = v + (head // GROUP) * v_head + first.to(tl.int64) * v_token

    # the keys that some row of the block sees, by whole chunks of `out`
    key_begin = 0
    key_end = length
    if WINDOWED:
        if (left >= 0) & (row > left):
            key_begin = (row - left) // KEY_TILE * KEY_TILE
        if right >= 0:
            key_end = tl.minimum(length, row + ROWS + tl.minimum(right, length))

    largest = tl.full((ROWS, LANES), MINUS_INFINITY, tl.float32)
    for key in range(key_begin, key_end, LANES):
        j = (key + tl.arange(0, LANES))[None, :]
        s = _scores(q_row, k_first, k_token, i, j, length, D, scale, ROWS, STEP)
        largest = tl.maximum(largest, tl.where(_seen(i, j, length, left, right, WINDOWED), s, MINUS_INFINITY))
    top = tl.max(largest, axis=1, keep_dims=True)  # a NaN loses to a number here: l brings it back

    lanes = tl.zeros((ROWS, LANES), tl.float32)
    total_sum = tl.zeros((ROWS, FEATURES), tl.float32)
    for chunk in range(key_begin, key_end, KEY_TILE):
        out = tl.zeros((ROWS, FEATURES), tl.float32)
        for key in range(chunk, tl.minimum(chunk + KEY_TILE, key_end), LANES):
            j = (key + tl.arange(0, LANES))[None, :]
            seen = _seen(i, j, length, left, right, WINDOWED)
            s = _scores(q_row, k_first, k_token, i, j, length, D, scale, ROWS, STEP)
            e = tl.where(seen, exp_of_negative(s - top), 0.0)
            lanes = lanes + e
            from_key = (key + tl.arange(0, LANES))[:, None]
            there = (from_key < length) & (d < D)
            values = tl.load(v_first + from_key.to(tl.int64) * v_token + d, mask=there, other=0.0).to(tl.float32)
            if WINDOWED:
                # 0 * NaN: where a hidden key's value may not be finite, keys go one by one, and the hidden ones are skipped
                if tl.max(tl.max((values - values != 0.0).to(tl.int32), axis=1), axis=0) != 0:
                    for one in range(0, LANES):
                        mine = tl.arange(0, LANES)[None, :] == one
                        weight = tl.max(tl.where(mine, e.to(tl.int32, bitcast=True), -2147483648), axis=1, keep_dims=True)
                        use = tl.max(tl.where(mine & seen, 1, 0), axis=1, keep_dims=True) != 0
                        at = v_first + tl.cast(key + one, tl.int64) * v_token + d
                        value = tl.load(at, mask=(key + one < length) & (d < D), other=0.0).to(tl.float32)
                        out = tl.where(use, fmadd(weight.to(tl.float32, bitcast=True), value, out), out)
                else:
                    out = tl.dot(e, values, out, input_precision="ieee")
            else:
                out = tl.dot(e, values, out, input_precision="ieee")
        total_sum = total_sum + out

    result = tl.div_rn(total_sum, tl.broadcast_to(fold_lanes(lanes, ROWS), (ROWS, FEATURES)))
    at = ((first + i).to(tl.int64) * H + head) * D + d
    tl.store(y + at, result.to(y.dtype.element_ty), mask=(i < length) & (d < D))


@triton.jit
def _seen(i, j, length, left, right, WINDOWED: tl.constexpr):
    seen = (i < length) & (j < length)
    if WINDOWED:
        seen = seen & ((left < 0) | (i - j <= left)) & ((right < 0) | (j - i <= right))
    return seen


@triton.jit
def _scores(q_row, k_first, k_token, i, j, length, D, scale, ROWS: tl.constexpr, STEP: tl.constexpr):
    """dot(q_i, k_j) * scale: chunks of 512 features, one fma chain in each. Zeros beyond D and beyond the sequence."""
    total = tl.zeros((ROWS, LANES), tl.float32)
    for chunk in range(0, D, CHUNK):
        s = tl.zeros((ROWS, LANES), tl.float32)
        for begin in range(chunk, tl.minimum(chunk + CHUNK, D), STEP):
            d = begin + tl.arange(0, STEP)
            a = tl.load(q_row + d[None, :], mask=(i < length) & (d[None, :] < D), other=0.0)
            b = tl.load(k_first + j.to(tl.int64) * k_token + d[:, None], mask=(j < length) & (d[:, None] < D), other=0.0)
            s = tl.dot(a.to(tl.float32), b.to(tl.float32), s, input_precision="ieee")
        total = total + s
    return total * scale


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, left: int, right: int, scale: float) -> Tensor:
    (total, heads, d), sequences = q.shape, cu_seqlens.shape[0] - 1
    y = q.new_empty(total, heads, d)
    features = min(WIDEST, max(16, triton.next_power_of_2(d)))
    tiles = total // ROWS + sequences if total else 0
    start(
        attention_kernel, (tiles, heads, blocks(d, features)), q, k, v, cu_seqlens, y,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        sequences, total, heads, heads // k.shape[1], d, left, right, scale,
        WINDOWED=left >= 0 or right >= 0, ROWS=ROWS, STEP=STEP, FEATURES=features, num_warps=4,
    )  # fmt: skip
    return y
