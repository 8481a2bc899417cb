"""rotary over [T, H, D]: y_a = x_a · cos - x_b · sin, y_b = x_b · cos + x_a · sin; two rounded products and their sum.

A program takes some heads of one token, all their pairs, and copies the features behind the pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.triton.launch import blocks, start

ELEMENTS = 1024  # pairs of one program, at least one head's


@triton.jit(do_not_specialize=["H", "pairs", "D", "x_token", "x_head"])
def rotary_kernel(
    x, cos, sin, y, H, pairs, D, x_token: tl.int64, x_head: tl.int64, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(H, HEADS)
    token = (tl.program_id(0) // parts).to(tl.int64)
    head = ((tl.program_id(0) % parts) * HEADS + tl.arange(0, HEADS))[:, None]
    p = tl.arange(0, PAIRS)[None, :]
    turned = (head < H) & (p < pairs)
    c = tl.load(cos + token * pairs + p, mask=p < pairs, other=0.0).to(tl.float32)
    s = tl.load(sin + token * pairs + p, mask=p < pairs, other=0.0).to(tl.float32)
    if INTERLEAVED:
        at_a, at_b = 2 * p, 2 * p + 1
    else:
        at_a, at_b = p, p + pairs
    from_head, to_head = x + token * x_token + head * x_head, y + (token * H + head) * D
    a = tl.load(from_head + at_a, mask=turned, other=0.0).to(tl.float32)
    b = tl.load(from_head + at_b, mask=turned, other=0.0).to(tl.float32)
    tl.store(to_head + at_a, (a * c - b * s).to(y.dtype.element_ty), mask=turned)
    tl.store(to_head + at_b, (b * c + a * s).to(y.dtype.element_ty), mask=turned)
    for begin in range(2 * pairs, D, PAIRS):
        behind = (head < H) & (begin + p < D)
        tl.store(to_head + begin + p, tl.load(from_head + begin + p, mask=behind, other=0.0), mask=behind)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    (tokens, h, d), pairs = x.shape, cos.shape[1]
    y = x.new_empty(tokens, h, d, dtype=x.dtype)
    lanes = triton.next_power_of_2(pairs)
    heads = max(1, min(triton.next_power_of_2(h), ELEMENTS // lanes))
    start(
        rotary_kernel, (tokens * blocks(h, heads),), x, cos, sin, y, h, pairs, d, x.stride(0), x.stride(1),
        INTERLEAVED=interleaved, HEADS=heads, PAIRS=lanes,
    )  # fmt: skip
    return y
