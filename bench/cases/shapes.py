"""Shapes of real rerankers by model name, and the inputs the benchmark makes for them: fixed seeds, nothing downloaded.

The weights are random with the initialiser's spread, so a score means nothing; shapes, vocabulary and lengths are the real
ones, and they are what time and memory depend on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """An encoder with a sequence-classification head, as its config.json states it. kind: its prefix in transformers."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocab: int
    positions: int


BASE, LARGE, MINILM = "BAAI/bge-reranker-base", "BAAI/bge-reranker-large", "cross-encoder/ms-marco-MiniLM-L6-v2"
RERANKERS = {
    BASE: Shape("XLMRoberta", 12, 768, 3072, 12, 250002, 514),
    LARGE: Shape("XLMRoberta", 24, 1024, 4096, 16, 250002, 514),
    MINILM: Shape("Bert", 6, 384, 1536, 12, 30522, 512),
}

# Token counts of 32 query-document pairs as a client sends them, in no order: 16 to 512, median 107, 4,689 in all. Padded to
# the longest they fill 16,384 places, so 71 % of a padded batch is padding.
# fmt: off
MIXED_LENGTHS = (
    107, 226, 110, 512, 394, 124, 16, 40, 77, 58, 101, 108, 152, 344, 107, 89,
    95, 299, 22, 196, 52, 115, 65, 71, 136, 172, 46, 260, 83, 450, 28, 34,
)
# fmt: on
LONGEST = 512  # tokens that every one of these models takes


def shape(name: str, layers: int | None = None) -> Shape:
    """Cut to so many layers, if any are given."""
    return replace(RERANKERS[name], layers=layers or RERANKERS[name].layers)


def reranker(of: Shape) -> torch.nn.Module:
    """transformers' stock model in eval mode, attention by SDPA, one logit, float32."""
    import transformers as tf

    special = {} if of.kind == "Bert" else {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    config = getattr(tf, f"{of.kind}Config")(
        vocab_size=of.vocab,
        hidden_size=of.hidden,
        num_hidden_layers=of.layers,
        num_attention_heads=of.heads,
        intermediate_size=of.ffn,
        max_position_embeddings=of.positions,
        num_labels=1,
        attn_implementation="sdpa",
        **special,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = getattr(tf, f"{of.kind}ForSequenceClassification")(config).eval()
    return model


def twin(model: torch.nn.Module) -> Any:
    """A copy with modules of its own and the same weight tensors: to be patched while the original stays stock."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def tokens(of: Shape, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """One int64 row of random ordinary token ids per length, begun and ended with the model's special tokens."""
    generator = torch.Generator().manual_seed(seed)
    first, last = (101, 102) if of.kind == "Bert" else (0, 2)
    rows = [torch.randint(1000, of.vocab - 1000, (n,), generator=generator) for n in lengths]
    for row in rows:
        row[0], row[-1] = first, last
    return rows


def padded(of: Shape, rows: Sequence[Tensor], *, left: bool = False, more: int = 0) -> dict[str, Tensor]:
    """The batch a tokenizer would make of `rows`: padded to the longest and `more`, with its mask."""
    width = max(len(row) for row in rows) + more
    ids = torch.full((len(rows), width), 0 if of.kind == "Bert" else 1)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = row
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def by_length(rows: Sequence[Tensor]) -> list[int]:
    """The longest first; those of one length as they come."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


def lengths(count: int) -> tuple[int, ...]:
    """The first `count` of the mixed lengths, which repeat after 32."""
    return tuple(MIXED_LENGTHS[i % len(MIXED_LENGTHS)] for i in range(count))


def said(lengths: Sequence[int]) -> str:
    """As the names of cases have it."""
    batch, least, most = len(lengths), min(lengths), max(lengths)
    return f"{batch}x{most}" if least == most else f"{batch} of {least} to {most}"


def batches(of: Shape, rows: Sequence[Tensor], size: int) -> list[dict[str, Tensor]]:
    """Sorted by length, so many in a batch, each padded to its longest."""
    order = by_length(rows)
    return [padded(of, [rows[j] for j in order[i : i + size]]) for i in range(0, len(rows), size)]


def in_batches(
    of: Shape, rows: Sequence[Tensor], size: int, logits: Callable[[dict[str, Tensor]], Tensor], more: int = 0
) -> Tensor:
    """Every pair's logits in float32, from so many at a time in the order they have."""
    parts = [padded(of, rows[i : i + size], more=more) for i in range(0, len(rows), size)]
    return torch.cat([logits(part).float().cpu() for part in parts])


def differ(got: Tensor, want: Tensor) -> tuple[int, float]:
    """How many pairs have other bits, and the largest difference."""
    return int((got.view(torch.int32) != want.view(torch.int32)).any(1).sum()), float((got - want).abs().max())
