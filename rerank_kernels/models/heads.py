"""Heads: what turns the tokens of a sequence into the numbers that a user reads, logits or an embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.pooling import HeadOutput, pool, score_head
from rerank_kernels.ops.sequences import Sequences


@dataclass(frozen=True)
class ClassificationHead:
    """out(activation(dense(one vector per sequence))): modules of the classifier, read at each call."""

    dense: nn.Linear
    out: nn.Linear
    activation: str = "tanh"
    pooling: str = "cls"

    def __call__(self, x: Tensor, sequences: Sequences) -> HeadOutput:
        """[total, D] -> float32 [B, L] each: logit, score, complement."""
        return score_head(
            pool(x, self.pooling, cu_seqlens=sequences),
            self.out.weight,
            self.out.bias,
            dense_weight=self.dense.weight,
            dense_bias=self.dense.bias,
            activation=self.activation,
        )


def embedding(x: Tensor, sequences: Sequences, pooling: str, normalise: bool) -> Tensor:
    """[total, D] -> float32 [B, D]: the mean over tokens, or the first, then x / max(|x|, 1e-12) if `normalise`."""
    y = pool(x, pooling, cu_seqlens=sequences, out_dtype=torch.float32)
    return normalize(y) if normalise else y
