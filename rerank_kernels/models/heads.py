"""Heads: what turns the tokens of a sequence into the numbers that a user reads, logits or an embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rerank_kernels.models import lora
from rerank_kernels.models.packing import as_patched, norm
from rerank_kernels.ops.linear import activation, linear
from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.opaque import opaque
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
            x = _wide(m, x, act)
        return HeadOutput(x, sigmoid(x), sigmoid(-x))


def _wide(m: nn.Linear, x: Tensor, act: str | None) -> Tensor:
    """A head's layer, with adapters or without; float32."""
    if lora.is_lora(m):
        return lora.product(m, x, act, torch.float32)
    as_patched(m, nn.Linear)
    return linear(x, m.weight, m.bias, activation=act, out_dtype=torch.float32, mode="portable")


@dataclass(frozen=True)
class NormedHead:
    """out(norm(activation(dense(one vector per sequence)))), in float32: modules of the classifier, read at each call."""

    dense: nn.Linear
    norm: nn.LayerNorm
    out: nn.Linear
    activation: str
    pooling: str  # "cls" or "mean"

    def __call__(self, x: Tensor, sequences: Sequences) -> HeadOutput:
        """[total, D] -> float32 [B, L] each: logit, score, complement."""
        pooled = pool(x, self.pooling, cu_seqlens=sequences, out_dtype=torch.float32)
        as_patched(self.norm, nn.LayerNorm)
        normed = norm(self.norm, _wide(self.dense, pooled, self.activation))
        if lora.is_lora(self.out):
            logit = lora.product(self.out, normed, out_dtype=torch.float32)
            return HeadOutput(logit, sigmoid(logit), sigmoid(-logit))
        as_patched(self.out, nn.Linear)
        return score_head(normed, self.out.weight, self.out.bias)


@dataclass(frozen=True)
class LastTokenHead:
    """score(the last token of each sequence): the classifier's module, read at each call."""

    score: nn.Linear

    def __call__(self, x: Tensor, sequences: Sequences) -> HeadOutput:
        """[total, D] -> float32 [B, L] each: logit, score, complement. A sequence without tokens is a vector of zeros."""
        last = last_rows(x, sequences.cu_seqlens)
        if lora.is_lora(self.score):
            logit = lora.product(self.score, last, out_dtype=torch.float32)
            return HeadOutput(logit, sigmoid(logit), sigmoid(-logit))
        as_patched(self.score, nn.Linear)
        return score_head(last, self.score.weight, self.score.bias)


@dataclass(frozen=True)
class AnswerHead:
    """The log-odds of one word of the vocabulary beside another, at the last token of each sequence.

    The two rows of the language head are subtracted in float32 before the one dot. Two logits that are rounded first keep both
    errors: up to 0.06 each between 16 and 32 in bfloat16. A head with a cap on its logits, or with adapters, has two.
    """

    words: nn.Linear  # the language head
    yes: int
    no: int | None = None  # None: the logit of `yes` alone
    cap: float | None = None  # how far its logits go

    def __call__(self, x: Tensor, sequences: Sequences) -> HeadOutput:
        """[total, D] -> float32 [B, 1] each: logit, score, complement."""
        last = last_rows(x, sequences.cu_seqlens)
        if lora.is_lora(self.words):
            return self._of_two(lora.product(self.words, last, out_dtype=torch.float32)[:, self._rows])
        as_patched(self.words, nn.Linear)
        if self.cap is not None:
            # one by one: a list as an index is copied to the device, and a graph cannot hold that
            both = None if self.words.bias is None else torch.stack([self.words.bias[i] for i in self._rows]).float()
            weights = torch.stack([self.words.weight[i] for i in self._rows]).float()
            return self._of_two(score_head(last, weights, both).logit)
        row, bias = self.words.weight[self.yes].float(), None
        if self.words.bias is not None:
            bias = self.words.bias[self.yes, None].float()
        if self.no is not None:
            row = row - self.words.weight[self.no].float()
            bias = None if bias is None else bias - self.words.bias[self.no].float()
        return score_head(last, row[None], bias)

    @property
    def _rows(self) -> list[int]:
        return [self.yes] if self.no is None else [self.yes, self.no]

    def _of_two(self, logits: Tensor) -> HeadOutput:
        """Of float32 [B, 2], or 1. Each has its cap first, so no one dot is their difference."""
        each = capped(logits, self.cap)
        logit = each if self.no is None else each[:, :1] - each[:, 1:]
        return HeadOutput(logit, sigmoid(logit), sigmoid(-logit))


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """float32 logits as cap · tanh(logits / cap), step by step, so none is further from 0 than `cap`; None: as they are."""
    if cap is None:
        return logits
    limit = logits.new_full((1,), cap)  # a tensor, for by a number a GPU multiplies with its inverse
    return activation(logits / limit, "tanh") * limit


@dataclass
class Asked:
    """Two words, or one, that a caller wants of a language head in place of a logit for each word of the vocabulary."""

    yes: int
    no: int | None = None
    answered: bool = False  # by a patched language head; stock's does not know that it was asked

    def answer(self, words: nn.Linear, x: Tensor, sequences: Sequences, cap: float | None) -> Tensor:
        """[total, D] -> float32 [B, 1, 1]: logits of one place and one word, the log-odds of AnswerHead."""
        self.answered = True
        return AnswerHead(words, self.yes, self.no, cap)(x, sequences).logit[:, None]


_asked: ContextVar[Asked | None] = ContextVar("rerank_kernels_asked", default=None)


@contextlib.contextmanager
def asking(yes: int, no: int | None = None) -> Iterator[Asked]:
    """Inside the block a patched *ForCausalLM gives the answer to this, and computes no other logit."""
    question = Asked(yes, no)
    token = _asked.set(question)
    try:
        yield question
    finally:
        _asked.reset(token)


def asked() -> Asked | None:
    """What is asked around this call; None: all words are wanted."""
    return _asked.get()


@opaque(lambda x, cu_seqlens: x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1]))
def last_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[total, D] -> [B, D]: the last token of each sequence, zeros for one without tokens."""
    cu = cu_seqlens.long()
    if not x.shape[0]:
        return x.new_zeros(cu.shape[0] - 1, x.shape[1])
    rows = x.index_select(0, (cu[1:] - 1).clamp(min=0))
    return rows.masked_fill((cu[1:] == cu[:-1])[:, None], 0.0)


def embedding(x: Tensor, sequences: Sequences, pooling: str, normalise: bool) -> Tensor:
    """[total, D] -> float32 [B, D]: the mean over tokens, or the first, then x / max(|x|, 1e-12) if `normalise`."""
    y = pool(x, pooling, cu_seqlens=sequences, out_dtype=torch.float32)
    return normalize(y) if normalise else y
