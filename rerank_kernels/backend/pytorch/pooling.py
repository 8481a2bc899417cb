"""pool, sigmoid, score_head: from hidden states to one vector per sequence, and from a vector to logit, score, complement.

pool: "cls" copies the first token; "mean" is one ascending chain of IEEE adds per feature, from +0, over the sequence's own
tokens, then one division. No tokens: 0. The head is `linear` twice and never leaves float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rerank_kernels.backend.pytorch.linear import linear, stable_sigmoid


def pool(x: Tensor, cu_seqlens: Tensor, mode: str, out_dtype: torch.dtype) -> Tensor:
    offsets = cu_seqlens.tolist()
    out = x.new_zeros(len(offsets) - 1, x.shape[1], dtype=torch.float32)
    for b, (start, stop) in enumerate(pairwise(offsets)):
        if start == stop:
            continue
        if mode == "cls":
            out[b] = x[start]
            continue
        for token in x[start:stop]:
            out[b] += token.float()
        out[b] /= stop - start
    return out.to(out_dtype)


def sigmoid(x: Tensor) -> Tensor:
    return stable_sigmoid(x.float())


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
    return logit, sigmoid(logit), sigmoid(-logit)
