"""Heads: what turns the tokens of a sequence into the numbers that a user reads, logits or an embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rerank_kernels.models import lora
from rerank_kernels.models.packing import as_patched
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.pooling import HeadOutput, pool, score_head, sigmoid
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
        pooled = pool(x, self.pooling, cu_seqlens=sequences)
        if lora.is_lora(self.dense) or lora.is_lora(self.out):
            return self._with_adapters(pooled)
        as_patched(self.dense, nn.Linear)
        as_patched(self.out, nn.Linear)
        return score_head(
            pooled,
            self.out.weight,
            self.out.bias,
            dense_weight=self.dense.weight,
            dense_bias=self.dense.bias,
            activation=self.activation,
        )

    def _with_adapters(self, x: Tensor) -> HeadOutput:
        """The same chain, float32 throughout, where a layer or both have adapters."""
        for m, act in ((self.dense, self.activation), (self.out, None)):
            if lora.is_lora(m):
                x = lora.product(m, x, act, torch.float32)
            else:
                as_patched(m, nn.Linear)
                x = linear(x, m.weight, m.bias, activation=act, out_dtype=torch.float32, mode="portable")
        return HeadOutput(x, sigmoid(x), sigmoid(-x))


def embedding(x: Tensor, sequences: Sequences, pooling: str, normalise: bool) -> Tensor:
    """[total, D] -> float32 [B, D]: the mean over tokens, or the first, then x / max(|x|, 1e-12) if `normalise`."""
    y = pool(x, pooling, cu_seqlens=sequences, out_dtype=torch.float32)
    return normalize(y) if normalise else y
