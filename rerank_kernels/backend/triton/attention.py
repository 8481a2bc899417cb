"""attention over packed sequences, bidirectional or windowed (causal is a window), grouped heads, any D.

For each query row: s_j = dot(q, k_j) * scale, or tanh(that / softcap) * softcap; max exact; e_j = exp(s_j - max);
l = row_sum(e), lane j mod 32; out = dot(e, v) / l over keys, in chunks of 64. j counts from the sequence's own first key
(NUMERICS.md, "attention"). Query i stands at place T_k - T_q + i of its keys, and `place` is that here; a row that sees no key
gives 0.

A block has ROWS queries of one head and goes over the keys twice, 32 at a step, which are the 32 lanes of l. First it finds the
maximum, then l and out. Scores are made twice and stored nowhere. Offsets are read on the device only.

Mode tensor ("Mode tensor" there) goes over the keys once, in tiles of 128 (64 for heads wider than 128) from the sequence's
first key, ascending, with a running maximum m. For a tile: s_j = dot_tensor(q, k_j), in some calls scaled and capped
(`weighing`), -inf where hidden; m' = max(m, max s_j), in which a NaN stays; p_j = exp2_short(s_j - m') rounded to half
precision; r = exp2_short(m - m'). acc = acc * r, then the matrix instructions' chain over the tile's keys, of p times v;
l = l * r, then the same chain of p times 1. out = (acc + 0) / l, or NaN where m ends as no finite number.

l stands in as many columns as the instruction wants, which are all the same. With wgmma it is l transposed, ones times p
transposed: products commute, and p then comes out of shared memory. Two products that share p in registers are what an H100
gave wrong sums for (`parts`).

A tile in which a row sees no key changes nothing for that row: m' = m, r = 1 exactly, p = 0 exactly. Only the sign of a
zero in acc could turn, so the end adds +0. Thus which tiles a block visits, that is how many rows it has, is in no
expression. While nothing was seen m is -inf, and 0 stands in for m' where it would give inf - inf.

Features are taken as LOW + HIGH, powers of two (40 = 32 + 16), both parts one chain; zeros fill what D leaves of them.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.triton import launch
from rerank_kernels.backend.triton.launch import blocks, matrix_instruction, start
from rerank_kernels.backend.triton.numerics import (
    CHUNK,
    KEY_TILE,
    LANES,
    MINUS_INFINITY,
    exp2_short,
    exp_of_negative,
    fmadd,
    fold_lanes,
    larger,
    tanh_of,
)

ROWS = 32  # queries of one block
STEP = 16  # features at a time, of q and k
WIDEST = 128  # features of v of one block
ONES = 16  # columns in which a row's sum stands; with wgmma its rows, 64
LOG2_E = 1.4426950408889634
SEQUENCES = 256  # offsets looked at together
FARTHEST = 1 << 30  # keys back: a place below 0 less that many is still an int32
force: int | None = None  # for tests: the tile of mode tensor to take


class AttentionTensorTile(NamedTuple):
    rows: int
    warps: int
    stages: int  # tiles of keys under way
    edge: int = 1  # the same, where some keys are hidden from some row


@triton.jit(do_not_specialize=["keys_begin", "keys_end", "B", "total", "total_k", "left", "right"])
def attention_kernel(
    q, k, v, cu_seqlens, keys_begin, keys_end, y, q_token, q_head, k_token, k_head, v_token, v_head,
    B, total, total_k, H, GROUP, D: tl.int32, left, right, scale, softcap,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, FEATURES: tl.constexpr,
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
    first, rows = _span(cu_seqlens + b, cu_seqlens + b + 1, total)
    row = (tile - first // ROWS - b) * ROWS
    if (row < 0) | (row >= rows):
        return
    k_begin, length = _span(keys_begin + b, keys_end + b, total_k)
    head = tl.program_id(1).to(tl.int64)
    d = (tl.program_id(2) * FEATURES + tl.arange(0, FEATURES))[None, :]
    i = (row + tl.arange(0, ROWS))[:, None]
    place = i + (length - rows)
    q_row = q + head * q_head + (first + i).to(tl.int64) * q_token
    k_first = k + (head // GROUP) * k_head + k_begin.to(tl.int64) * k_token
    v_first = v + (head // GROUP) * v_head + k_begin.to(tl.int64) * v_token

    # the keys that some row of the block sees, by whole chunks of `out`
    key_begin = 0
    key_end = length
    if WINDOWED:
        begin = row + (length - rows)
        if (left >= 0) & (begin > left):
            key_begin = (begin - left) // KEY_TILE * KEY_TILE
        if right >= 0:
            key_end = tl.minimum(length, begin + ROWS + tl.minimum(right, tl.maximum(length, rows)))

    largest = tl.full((ROWS, LANES), MINUS_INFINITY, tl.float32)
    for key in range(key_begin, key_end, LANES):
        j = (key + tl.arange(0, LANES))[None, :]
        s = _scores(q_row, k_first, k_token, i < rows, j, length, D, scale, softcap, CAPPED, ROWS, STEP)
        largest = tl.maximum(largest, tl.where(_seen(place, j, length, left, right, WINDOWED), s, MINUS_INFINITY))
    top = tl.max(largest, axis=1, keep_dims=True)  # a NaN loses to a number here: l brings it back

    lanes = tl.zeros((ROWS, LANES), tl.float32)
    total_sum = tl.zeros((ROWS, FEATURES), tl.float32)
    for chunk in range(key_begin, key_end, KEY_TILE):
        out = tl.zeros((ROWS, FEATURES), tl.float32)
        for key in range(chunk, tl.minimum(chunk + KEY_TILE, key_end), LANES):
            j = (key + tl.arange(0, LANES))[None, :]
            seen = _seen(place, j, length, left, right, WINDOWED)
            s = _scores(q_row, k_first, k_token, i < rows, j, length, D, scale, softcap, CAPPED, ROWS, STEP)
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

    below = fold_lanes(lanes, ROWS)
    below = tl.where(below == 0.0, 1.0, below)  # the row sees no key, and its sums are +0; else it is 1 or more, or a NaN
    result = tl.div_rn(total_sum, tl.broadcast_to(below, (ROWS, FEATURES)))
    at = ((first + i).to(tl.int64) * H + head) * D + d
    tl.store(y + at, result.to(y.dtype.element_ty), mask=(i < rows) & (d < D))


@triton.jit
def _span(begin, end, total):
    """First token and length of a sequence. Clamped: wrong offsets lead to wrong rows, but never outside the arrays."""
    first = tl.minimum(tl.maximum(tl.load(begin), 0), total)
    return first, tl.minimum(tl.maximum(tl.load(end), first), total) - first


@triton.jit
def _seen(place, j, length, left, right, WINDOWED: tl.constexpr):
    """What rows beyond the last one see is nobody's."""
    seen = (place < length) & (j < length)
    if WINDOWED:
        seen = seen & ((left < 0) | (place - j <= left)) & ((right < 0) | (j - place <= right))
    return seen


@triton.jit
def _scores(
    q_row, k_first, k_token, there, j, length, D, scale, softcap,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The scores: chunks of 512 features, one fma chain in each. Zeros beyond D, beyond the sequence's keys, and for rows that
    are not `there`. A term that depends on the places of query and key would be added at the end.
    """
    total = tl.zeros((ROWS, LANES), tl.float32)
    for chunk in range(0, D, CHUNK):
        s = tl.zeros((ROWS, LANES), tl.float32)
        for begin in range(chunk, tl.minimum(chunk + CHUNK, D), STEP):
            d = begin + tl.arange(0, STEP)
            a = tl.load(q_row + d[None, :], mask=there & (d[None, :] < D), other=0.0)
            b = tl.load(k_first + j.to(tl.int64) * k_token + d[:, None], mask=(j < length) & (d[:, None] < D), other=0.0)
            s = tl.dot(a.to(tl.float32), b.to(tl.float32), s, input_precision="ieee")
        total = total + s
    return _score(total, scale, softcap, CAPPED)


@triton.jit
def _score(dot, scale, softcap, CAPPED: tl.constexpr):
    s = dot * scale
    if CAPPED:
        s = tanh_of(tl.div_rn(s, tl.full(s.shape, 1.0, tl.float32) * softcap)) * softcap
    return s


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    (total, heads, d), sequences = q.shape, cu_seqlens.shape[0] - 1
    y = q.new_empty(total, heads, d)
    features = min(WIDEST, max(16, triton.next_power_of_2(d)))
    tiles = total // ROWS + sequences if total else 0
    start(
        attention_kernel, (tiles, heads, blocks(d, features)), q, k, v, cu_seqlens, *_keys_of(cu_seqlens, cu_seqlens_k), y,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        sequences, total, k.shape[0], heads, heads // k.shape[1], d, left, right, scale, softcap,
        WINDOWED=left >= 0 or right >= 0, CAPPED=softcap != 0.0, ROWS=ROWS, STEP=STEP, FEATURES=features,
        num_warps=8 if features > 64 else 4, maxnreg=launch.REGISTERS,
    )  # fmt: skip
    return y


def _keys_of(cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each sequence's keys begin and end: packed, or anywhere ([2, B])."""
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return (keys[0], keys[1]) if keys.dim() == 2 else (keys, keys[1:])


@triton.jit(do_not_specialize=["keys_begin", "keys_end", "B", "total", "total_k", "left", "right"])
def attention_tensor_kernel(
    q, k, v, cu_seqlens, keys_begin, keys_end, y, q_token, q_head, k_token, k_head, v_token, v_head,
    B, total, total_k, H, GROUP, left, right, scale, softcap, c, least,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KEYS: tl.constexpr, ONES: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, SEQUENCES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    # as above, the last b whose first tile is not behind ours
    tile = tl.program_id(0)
    b = 0
    for begin in range(0, B, SEQUENCES):
        one = begin + tl.arange(0, SEQUENCES)
        starts = tl.load(cu_seqlens + one, mask=one < B, other=0) // ROWS + one <= tile
        b = tl.maximum(b, tl.max(tl.where(starts & (one < B), one, 0)))
    first, rows = _span(cu_seqlens + b, cu_seqlens + b + 1, total)
    row = (tile - first // ROWS - b) * ROWS
    if (row < 0) | (row >= rows):
        return
    k_begin, length = _span(keys_begin + b, keys_end + b, total_k)
    head = tl.program_id(1).to(tl.int64)
    i = row + tl.arange(0, ROWS)
    place = i + (length - rows)
    q_first = q + head * q_head + first.to(tl.int64) * q_token
    k_first = k + (head // GROUP) * k_head + k_begin.to(tl.int64) * k_token
    v_first = v + (head // GROUP) * v_head + k_begin.to(tl.int64) * v_token

    # tiles of keys: some row sees a key of [begin, end), every row sees all keys of [whole, whole_end)
    begin, end, whole = 0, length, 0
    at = row + (length - rows)
    if LEFT:
        left = tl.minimum(left, tl.maximum(length, rows))  # more hides nothing, and may leave what an int32 can say
        begin = tl.maximum(at - left, 0) // KEYS * KEYS
        whole = tl.cdiv(tl.maximum(at + ROWS - 1 - left, 0), KEYS) * KEYS
    if RIGHT:
        right = tl.minimum(right, tl.maximum(length, rows))
        end = tl.minimum(length, at + ROWS + right)
        whole_end = tl.maximum(tl.minimum(length, at + right + 1), 0) // KEYS * KEYS
    else:
        whole_end = length // KEYS * KEYS
    # the keys that each row sees: [earliest, latest]
    earliest, latest = (place - left if LEFT else place), tl.minimum(place + right, length - 1) if RIGHT else place

    # rows beyond the last are the last once more: nothing of them is stored
    query = tl.minimum(i, rows - 1)
    q_low = _features(q_first, query, q_token, rows, D, 0, LOW, LOW <= D, False)
    q_high = q_low
    if HIGH > 0:
        q_high = _features(q_first, query, q_token, rows, D, LOW, HIGH, LOW + HIGH <= D, False)
    top = tl.full((ROWS,), MINUS_INFINITY, tl.float32)
    bottom = tl.zeros((ONES, ROWS) if TURNED else (ROWS, ONES), tl.float32)
    low = tl.zeros((ROWS, LOW), tl.float32)
    high = tl.zeros((ROWS, HIGH if HIGH > 0 else 16), tl.float32)
    if LEFT:
        for key in tl.range(begin, tl.minimum(whole, end), KEYS, num_stages=EDGE):
            top, bottom, low, high = _visit(
                key, q_low, q_high, k_first, v_first, k_token, v_token, earliest, latest, length, scale, softcap, c, least,
                top, bottom, low, high, LEFT, RIGHT, SCALED, CAPPED, D, LOW, HIGH, KEYS, TURNED, True,
            )  # fmt: skip
    for key in tl.range(whole, whole_end, KEYS):
        top, bottom, low, high = _visit(
            key, q_low, q_high, k_first, v_first, k_token, v_token, earliest, latest, length, scale, softcap, c, least,
            top, bottom, low, high, LEFT, RIGHT, SCALED, CAPPED, D, LOW, HIGH, KEYS, TURNED, False,
        )  # fmt: skip
    for key in tl.range(tl.maximum(whole, whole_end), end, KEYS, num_stages=EDGE):
        top, bottom, low, high = _visit(
            key, q_low, q_high, k_first, v_first, k_token, v_token, earliest, latest, length, scale, softcap, c, least,
            top, bottom, low, high, LEFT, RIGHT, SCALED, CAPPED, D, LOW, HIGH, KEYS, TURNED, True,
        )  # fmt: skip

    below = tl.max(bottom, axis=0) if TURNED else tl.max(bottom, axis=1)
    # a NaN or an infinity of q and k: no weight is right
    below = tl.where(tl.abs(top) < float("inf"), below, float("nan"))
    y_row = y + ((first + i).to(tl.int64) * H + head)[:, None] * D
    sees = (length > 0) & (i >= 0)
    if RIGHT:
        sees = sees & (place + right >= 0)
    _store(y_row, low, below, i, sees, rows, D, 0, LOW)
    if HIGH > 0:
        _store(y_row, high, below, i, sees, rows, D, LOW, HIGH)


@triton.jit
def _visit(
    key, q_low, q_high, k_first, v_first, k_token, v_token, earliest, latest, length, scale, softcap, c, least,
    top, bottom, low, high,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys. MASKED: some of them may be hidden from some row, or lie beyond the sequence."""
    j = key + tl.arange(0, KEYS)
    s = tl.dot(q_low, tl.trans(_features(k_first, j, k_token, length, D, 0, LOW, LOW <= D, MASKED)))
    if HIGH > 0:
        s = tl.dot(q_high, tl.trans(_features(k_first, j, k_token, length, D, LOW, HIGH, LOW + HIGH <= D, MASKED)), s)
    if SCALED:
        s = _score(s, scale, softcap, CAPPED)  # a term that depends on the query's place and j would be added here
    if MASKED:
        if RIGHT:
            seen = j[None, :] <= latest[:, None]
        else:
            seen = (j < length)[None, :]
        if LEFT:
            seen = seen & (j[None, :] >= earliest[:, None])
        s = tl.where(seen, s, MINUS_INFINITY)
    new_top = larger(top, tl.reduce(s, 1, larger))
    base = tl.where(new_top == MINUS_INFINITY, 0.0, new_top)
    shrink = exp2_short(top - base, c, least)
    weights = exp2_short(s - base[:, None], c, least).to(v_first.dtype.element_ty)
    if TURNED:
        ones = tl.full((bottom.shape[0], KEYS), 1.0, weights.dtype)
        bottom = tl.dot(ones, tl.trans(weights), bottom * shrink[None, :])
    else:
        ones = tl.full((KEYS, bottom.shape[1]), 1.0, weights.dtype)
        bottom = tl.dot(weights, ones, bottom * shrink[:, None])
    value = _features(v_first, j, v_token, length, D, 0, LOW, LOW <= D, MASKED)
    low = tl.dot(weights, value, low * shrink[:, None])
    if HIGH > 0:
        value = _features(v_first, j, v_token, length, D, LOW, HIGH, LOW + HIGH <= D, MASKED)
        high = tl.dot(weights, value, high * shrink[:, None])
    return new_top, bottom, low, high


@triton.jit
def _features(
    first, j, token, length, features, BEGIN: tl.constexpr, WIDTH: tl.constexpr, INSIDE: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """WIDTH features from BEGIN on of tokens j. Zeros beyond `features`, unless all are INSIDE, and, if MASKED, beyond the
    sequence."""
    d = (BEGIN + tl.arange(0, WIDTH))[None, :]
    at = first + j.to(tl.int64)[:, None] * token + d
    if MASKED and INSIDE:
        value = tl.load(at, mask=(j < length)[:, None], other=0.0)
    elif MASKED:
        value = tl.load(at, mask=(j < length)[:, None] & (d < features), other=0.0)
    elif not INSIDE:
        value = tl.load(at, mask=d < features, other=0.0)
    else:
        value = tl.load(at)
    return value


@triton.jit
def _store(y_row, total, bottom, i, sees, rows, features, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """0 for a row that sees no key, whatever came in as 0 * inf."""
    d = (BEGIN + tl.arange(0, WIDTH))[None, :]
    result = tl.div_rn(total + 0.0, tl.broadcast_to(bottom[:, None], total.shape))
    result = tl.where(sees[:, None], result, 0.0)
    tl.store(y_row + d, result.to(y_row.dtype.element_ty), mask=(i < rows)[:, None] & (d < features))


def tensor_tiles(d: int, arch: int) -> tuple[AttentionTensorTile, ...]:
    """For heads of d features on this compute capability (90 for 9.0); the first is taken, the others are for the tests.

    Those without spills (tools/witness), but for heads of more than 128 with a window on Hopper. With more than 64 features on
    Hopper that takes loads at the edges that do not pass through registers; elsewhere q and a part of k in registers leave room
    for few rows.
    """
    wgmma = matrix_instruction(arch) == "wgmma"
    if d > 128:
        return (AttentionTensorTile(64, 8, 2, edge=2),) if wgmma else (AttentionTensorTile(32, 8, 2),)
    if d > 64:
        small = AttentionTensorTile(32, 4, 2), AttentionTensorTile(32, 8, 2)
        return (AttentionTensorTile(64, 8, 3, edge=3),) if wgmma else small
    rows = 32 if arch >= 100 else 64
    few, spread = AttentionTensorTile(rows, 4, 3), AttentionTensorTile(rows, 8, 3)
    return (spread, few) if wgmma else (few, spread)


def keys(d: int) -> int:
    """Of a tile: with the head's features alone it is in the expression of an output."""
    return 128 if d <= 128 else 64


@functools.lru_cache(64)
def weighing(scale: float, softcap: float) -> tuple[float, float, bool]:
    """c, least and scaled of csrc/weighing.h, which says why."""
    c = ctypes.c_float(ctypes.c_float(scale).value * LOG2_E).value
    scaled = softcap != 0.0 or not 2.0**-64 <= c <= 2.0**64
    if scaled:
        c = ctypes.c_float(LOG2_E).value
    (bits,) = struct.unpack("<i", struct.pack("<f", 127.0 / c))
    while _float_of(bits) * c > 127.0:
        bits -= 1
    while _float_of(bits + 1) * c <= 127.0:
        bits += 1
    return c, -_float_of(bits), scaled


def _float_of(bits: int) -> float:
    (x,) = struct.unpack("<f", struct.pack("<i", bits))
    return float(x)


def parts(d: int, arch: int) -> tuple[int, int]:
    """What d features are filled up to, in one part or two: 40 = 32 + 16.

    With mma.sync a part of the keys is held in registers, so 128 = 64 + 64; 96 = 64 + 64 and 160 = 128 + 64, since 32 spilled.
    With wgmma it is one part. Two products there that share the weights in registers gave other values of the second part at
    every run, and wrote outside memory, on an H100 with Triton 3.6 (tests/backend/test_gpu_tensor.py, heads of 40, 80 and 96).
    """
    if matrix_instruction(arch) == "wgmma":
        return triton.next_power_of_2(max(16, d)), 0
    low, least = (WIDEST if d > 128 else 64, 64) if d > 64 else (max(16, 1 << d.bit_length() - 1), 16)
    return low, triton.next_power_of_2(max(least, d - low)) if d > low else 0


def attention_tensor(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    (total, heads, d), sequences = q.shape, cu_seqlens.shape[0] - 1
    y = q.new_empty(total, heads, d)
    arch = launch.architecture(q)
    tile = tensor_tiles(d, arch)[force or 0]
    low, high = parts(d, arch)
    c, least, scaled = weighing(scale, softcap)
    turned = matrix_instruction(arch) == "wgmma"
    tiles = total // tile.rows + sequences if total else 0
    start(
        attention_tensor_kernel, (tiles, heads), q, k, v, cu_seqlens, *_keys_of(cu_seqlens, cu_seqlens_k), y,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        sequences, total, k.shape[0], heads, heads // k.shape[1], min(left, FARTHEST), right, scale, softcap, c, least,
        LEFT=left >= 0, RIGHT=right >= 0, SCALED=scaled, CAPPED=softcap != 0.0, D=d, LOW=low, HIGH=high,
        KEYS=keys(d), ONES=64 if turned else ONES, TURNED=turned,
        ROWS=tile.rows, SEQUENCES=SEQUENCES, EDGE=tile.edge, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
