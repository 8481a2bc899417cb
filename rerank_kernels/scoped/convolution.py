"""Convolution as a product: each place's window is a row, and an output is `dot` of it with a filter, then the bias.

The terms of a row stand as in the filter: channel, then place in the window. What padding adds is zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rerank_kernels.ops.linear import bmm, linear
from rerank_kernels.scoped.refusal import Refusal, floats


def convolution(
    input: Tensor,  # noqa: A002  PyTorch's name
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if transposed:
        raise Refusal("a transposed convolution has no route yet")
    floats(input=input, weight=weight, bias=bias)
    places = weight.dim() - 2
    steps, around, apart = (list(v) * (places if len(v) == 1 else 1) for v in (stride, padding, dilation))
    x = torch.constant_pad_nd(input, [n for pad in reversed(around) for n in (pad, pad)], 0.0) if any(around) else input
    for d in range(places):
        x = x.unfold(2 + d, apart[d] * (weight.shape[2 + d] - 1) + 1, steps[d])[..., :: apart[d]]
    # [B, C, places out, places in a window]
    batch, channels, out = x.shape[0], x.shape[1], x.shape[2 : 2 + places]
    count, filters = math.prod(out), weight.shape[0]
    x = x.reshape(batch, groups, channels // groups, count, -1).transpose(2, 3).flatten(3)  # [B, groups, count, K]
    if groups == 1:
        y = linear(x[:, 0], weight.flatten(1), bias).transpose(1, 2)
    else:
        w = weight.reshape(groups, filters // groups, -1).transpose(1, 2)
        w = w.expand(batch, *w.shape).flatten(0, 1)
        y = bmm(x.flatten(0, 1), w, out_dtype=torch.float32).view(batch, groups, count, -1)
        y = y.transpose(2, 3).reshape(batch, filters, count)
        y = (y if bias is None else y + bias.float()[:, None]).to(input.dtype)
    return y.reshape(batch, filters, *out)


ROUTES = {"convolution": convolution}
