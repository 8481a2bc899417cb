"""pool, sigmoid and score_head: from hidden states to one vector per sequence, and from a vector to logit, score, complement.

pool: a block takes some features of one sequence; mean is one ascending chain over its tokens, then one division (NUMERICS.md,
"pool"). The head is `linear` twice and never leaves float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rerank_kernels.backend.triton.launch import blocks, start
from rerank_kernels.backend.triton.linear import ELEMENTS, elementwise, linear
from rerank_kernels.backend.triton.numerics import sigmoid_of

FEATURES = 128  # of one block
AHEAD = 8  # tokens under way


@triton.jit(do_not_specialize=["total"])
def pool_kernel(x, cu_seqlens, y, total, D, MEAN: tl.constexpr, FEATURES: tl.constexpr, AHEAD: tl.constexpr):
    columns = tl.cdiv(D, FEATURES)
    b = tl.program_id(0) // columns
    d = (tl.program_id(0) % columns) * FEATURES + tl.arange(0, FEATURES)
    # clamped, so that wrong offsets lead to wrong rows but never outside the array
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1), begin), total)
    if not MEAN:
        end = tl.minimum(begin + 1, end)
    s = tl.zeros((FEATURES,), tl.float32)
    for first in range(begin, end, AHEAD):
        for step in tl.static_range(AHEAD):
            token = first + step
            s = s + tl.load(x + token.to(tl.int64) * D + d, mask=(d < D) & (token < end), other=0.0).to(tl.float32)
    s = tl.div_rn(s, tl.full((FEATURES,), 1.0, tl.float32) * tl.maximum(end - begin, 1).to(tl.float32))
    tl.store(y + b.to(tl.int64) * D + d, s.to(y.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["count"])
def score_kernel(logit, y, y_complement, count, ELEMENTS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    z = tl.load(logit + i, mask=i < count, other=0.0)
    tl.store(y + i, sigmoid_of(z), mask=i < count)
    tl.store(y_complement + i, sigmoid_of(0.0 - z), mask=i < count)


def pool(x: Tensor, cu_seqlens: Tensor, mode: str, out_dtype: torch.dtype) -> Tensor:
    total, d = x.shape
    sequences = cu_seqlens.shape[0] - 1
    y = x.new_empty(sequences, d, dtype=out_dtype)
    start(
        pool_kernel, (sequences * blocks(d, FEATURES),), x, cu_seqlens, y, total, d,
        MEAN=mode == "mean", FEATURES=FEATURES, AHEAD=AHEAD,
    )  # fmt: skip
    return y


def sigmoid(x: Tensor) -> Tensor:
    return elementwise(x, "sigmoid", torch.float32)


def score_head(
    pooled: Tensor,
    dense_weight: Tensor | None,
    dense_bias: Tensor | None,
    activation: str | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if dense_weight is not None:
        pooled = linear(pooled, dense_weight, dense_bias, activation, None, torch.float32)
    logit = linear(pooled, out_weight, out_bias, None, None, torch.float32)
    score, complement = torch.empty_like(logit), torch.empty_like(logit)
    start(score_kernel, (blocks(logit.numel(), ELEMENTS),), logit, score, complement, logit.numel(), ELEMENTS=ELEMENTS)
    return logit, score, complement
