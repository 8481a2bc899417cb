"""Passes: which texts or pairs are computed together, and which of their first tokens once for several pairs.

A pass holds about batch_tokens tokens. Those that are shared count for each pair: a layer's attention reads them for each.

What is shared is found in the token ids. First come the tokens that all pairs of a pass begin with, as a rule a template's.
Behind them come those that all pairs of one query begin with. No bit changes: a decoder's token sees nothing behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rerank_kernels.scoring.tokenising import Ids


class Pass(NamedTuple):
    """Sequences of tokens, some of which continue earlier ones, and which of them are the ends of which texts or pairs."""

    sequences: list[Ids]
    before: list[int | None] | None  # of each sequence: the place of the one that it continues; None: no sequence does
    items: list[int]  # texts or pairs
    ends: list[int]  # of each item: the place of its last sequence


def passes(ids: Sequence[Ids], batch_tokens: int) -> Iterator[Pass]:
    """Of at most batch_tokens tokens, or one longer item; longest first, so memory runs out early or never."""
    for items in _filled(sorted(range(len(ids)), key=lambda i: -len(ids[i])), ids, batch_tokens):
        yield Pass([ids[i] for i in items], None, items, list(range(len(items))))


def shared_passes(ids: Sequence[Ids], queries: Sequence[str], batch_tokens: int, turns: Sequence[int]) -> Iterator[Pass]:
    """The same of pairs, where a query's stand side by side. Two share if for each of `turns` both are longer or neither is."""
    longest: dict[Hashable, int] = {}
    of = [(tuple(len(own) > turn for turn in turns), query) for own, query in zip(ids, queries, strict=True)]
    for own, group in zip(ids, of, strict=True):
        longest[group] = max(longest.get(group, 0), len(own))
    place = {group: i for i, group in enumerate(sorted(longest, key=lambda group: -longest[group]))}
    order = sorted(range(len(ids)), key=lambda i: (place[of[i]], -len(ids[i])))
    for items in _filled(order, ids, batch_tokens):
        tree = _Tree(ids, [], [], [], [])
        for side in _grouped(items, lambda i: of[i][0]):
            tree.put(side, None, 0, lambda i: of[i][1])
        none = len(tree.sequences) == len(items)
        yield Pass(tree.sequences, None if none else tree.before, tree.items, tree.ends)


def _filled(order: Iterable[int], ids: Sequence[Ids], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    total = 0
    for i in order:
        if batch and total + len(ids[i]) > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += len(ids[i])
    if batch:
        yield batch


def _grouped(items: list[int], by: Callable[[int], Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for i in items:
        found.setdefault(by(i), []).append(i)
    return list(found.values())


@dataclass
class _Tree:
    """A pass that grows."""

    ids: Sequence[Ids]
    sequences: list[Ids]
    before: list[int | None]
    items: list[int]
    ends: list[int]

    def put(self, items: list[int], before: int | None, done: int, by: Callable[[int], Hashable] | None) -> None:
        """What the items have in common behind their first `done` tokens, which `before` ends, then each group of them `by`
        something, or each by itself."""
        if len(items) > 1 and (common := _common([self.ids[i] for i in items], done)) > done:
            before, done = self._add(self.ids[items[0]][done:common], before), common
        if by is not None and len(items) > 1:
            for group in _grouped(items, by):
                self.put(group, before, done, None)
            return
        for i in items:
            self.items.append(i)
            self.ends.append(self._add(self.ids[i][done:], before))

    def _add(self, sequence: Ids, before: int | None) -> int:
        self.sequences.append(sequence)
        self.before.append(before)
        return len(self.sequences) - 1


def _common(ids: list[Ids], done: int) -> int:
    """How many first tokens all have in common, the last token of none of them; `done` of them are known."""
    first, common = ids[0], max(min(map(len, ids)) - 1, done)  # an empty one has nothing in common
    for other in ids[1:]:
        differs = np.flatnonzero(first[done:common] != other[done:common])
        if len(differs):
            common = done + int(differs[0])
    return common
