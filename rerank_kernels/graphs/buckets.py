"""Buckets: the sizes that graphs are captured for, and how the numbers of a call lie in the one buffer that a graph reads.

A graph has fixed sizes, so a call is filled up to the next bucket. What fills it are dead rows, of token 0, which belong to no
sequence, and sequences without tokens. Rows are independent of one another (NUMERICS.md): neither can move a bit of a live one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rerank_kernels.ops.sequences import Sequences

# Few tokens wait for the host, and dead rows cost them nothing. Of many each costs its share: at most a quarter here.
TOKENS = (*range(64, 257, 64), *range(384, 1025, 128), *range(1280, 2049, 256), *range(2560, 8193, 512))
SEQUENCES = (1, 8, 32, 128)
KEYS = (*TOKENS, 12288, 16384, 24576, 32768)  # of sequences that begin with tokens of others


class Reads(NamedTuple):
    """Where sequences read their keys, if some of them continue others."""

    rows: Tensor  # int64 [K], the token at each place of the whole sequences
    whole: Sequences


class Tokens(NamedTuple):
    """The packed tokens of a call, on the host: integers [total] each. Whoever makes them has looked at every number."""

    ids: Tensor
    types: Tensor | None  # None: 0 each
    positions: Tensor
    sequences: Sequences
    reads: Reads | None = None

    def to(self, device: torch.device) -> Tokens:
        """In one copy, but for the offsets: what waits for the device is the number of copies."""
        numbers = (self.ids, self.types, self.positions)
        there = iter(torch.stack([t.long() for t in numbers if t is not None]).to(device))
        ids, types, positions = (None if t is None else next(there) for t in numbers)
        assert ids is not None and positions is not None
        return Tokens(ids, types, positions, self.sequences.to(device))


class Bucket(NamedTuple):
    tokens: int
    sequences: int
    keys: int = 0  # 0: those of the tokens

    @property
    def numbers(self) -> int:
        """Of the buffer: ids, types, positions, places in the padded batch, and offsets; then index and offsets of the keys."""
        return 4 * self.tokens + self.sequences + 1 + (self.keys + self.sequences + 1 if self.keys else 0)

    @property
    def largest(self) -> Bucket:
        """Of those that have keys of their own, or none."""
        return Bucket(TOKENS[-1], SEQUENCES[-1], KEYS[-1] if self.keys else 0)


def bucket(tokens: Tokens) -> Bucket | None:
    """The smallest that holds them; None beyond the largest, and where there is nothing."""
    sequences, reads = tokens.sequences, tokens.reads
    t = next((n for n in TOKENS if n >= sequences.total), None)
    b = next((n for n in SEQUENCES if n >= sequences.count), None)
    k = 0 if reads is None else next((n for n in KEYS if n >= reads.whole.total), None)
    return None if t is None or b is None or k is None or not sequences.total else Bucket(t, b, k)


def write(buffer: Any, size: Bucket, tokens: Tokens) -> None:
    """All numbers of a call into an int64 array of NumPy: what an earlier call left there is overwritten."""
    sequences = tokens.sequences
    n, t = sequences.total, size.tokens
    for i, numbers in enumerate((tokens.ids, tokens.types, tokens.positions, sequences.index)):
        part = buffer[i * t : (i + 1) * t]
        part[:n] = 0 if numbers is None else numbers.numpy()
        part[n:] = 0
    end = 4 * t + size.sequences + 1
    _offsets(buffer[4 * t : end], sequences)
    if tokens.reads is not None:
        rows, whole = tokens.reads
        buffer[end : end + whole.total] = rows.numpy()
        buffer[end + whole.total : end + size.keys] = 0
        _offsets(buffer[end + size.keys : size.numbers], whole)


def _offsets(to: Any, sequences: Sequences) -> None:
    to[: sequences.count + 1] = sequences.cu_seqlens.numpy()
    to[sequences.count + 1 :] = sequences.total  # sequences without tokens, behind the last


@dataclass(frozen=True)
class Inputs:
    """The numbers of a call on the device, filled up to a bucket: int64 [T] each, and sequences, some without tokens."""

    ids: Tensor
    types: Tensor
    positions: Tensor
    places: Tensor  # where a token stands in the padded batch
    sequences: Sequences
    reads: Reads | None
    held: list[Tensor] = field(default_factory=list)  # what else a graph reads, and has to keep alive

    @classmethod
    def of(cls, buffer: Tensor, size: Bucket) -> Inputs:
        ids, types, positions, places = (buffer[i * size.tokens : (i + 1) * size.tokens] for i in range(4))
        end = 4 * size.tokens + size.sequences + 1
        sequences, reads = _sequences(buffer[4 * size.tokens : end], size.tokens), None
        if size.keys:
            at = end + size.keys
            reads = Reads(buffer[end:at], _sequences(buffer[at : size.numbers], size.keys))
        return cls(ids, types, positions, places, sequences, reads)


def _sequences(offsets: Tensor, total: int) -> Sequences:
    return Sequences(offsets.to(torch.int32), total, op="graph")
