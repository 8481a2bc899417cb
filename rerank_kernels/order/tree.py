"""The order of a sum as a tree: its terms are the leaves, and each node adds what its children are.

Of two numbers a + b is b + a, so children have no order. A node with more than two children adds them at once, as a tensor core
may. Two trees are equal if the same sets of terms become sums on the way.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Tree:
    """Leaves are 0 .. terms - 1. Node terms + k has the children nodes[k], made before it; the last one is the whole sum."""

    terms: int
    nodes: tuple[tuple[int, ...], ...]

    @property
    def root(self) -> int:
        return self.terms + len(self.nodes) - 1

    def children(self, node: int) -> tuple[int, ...]:
        return self.nodes[node - self.terms] if node >= self.terms else ()

    @cached_property
    def sizes(self) -> list[int]:
        found = [1] * self.terms
        for children in self.nodes:
            found.append(sum(found[c] for c in children))
        return found

    @cached_property
    def firsts(self) -> list[int]:
        """The lowest term of each node."""
        found = list(range(self.terms))
        for children in self.nodes:
            found.append(min(found[c] for c in children))
        return found

    @cached_property
    def depth(self) -> int:
        """Additions one after the other, on the longest way from a term to the whole sum."""
        found = [0] * self.terms
        for children in self.nodes:
            found.append(1 + max(found[c] for c in children))
        return found[-1]

    @property
    def most_at_once(self) -> int:
        return max(map(len, self.nodes), default=1)

    @cached_property
    def keys(self) -> list[int]:
        """A number per node that says which terms it adds: the sum of 128 random bits per term."""
        draw = random.Random(0)
        found = [draw.getrandbits(128) for _ in range(self.terms)]
        for children in self.nodes:
            found.append(sum(found[c] for c in children) % (1 << 128))
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tree) and self.terms == other.terms and set(self.keys) == set(other.keys)

    def __hash__(self) -> int:
        return hash((self.terms, frozenset(self.keys)))

    def leaves(self, node: int) -> list[int]:
        found, waiting = [], [node]
        while waiting:
            one = waiting.pop()
            if one < self.terms:
                found.append(one)
            waiting.extend(self.children(one))
        return sorted(found)

    def sum(self, values: Floats) -> Floats:
        """[terms, vectors] -> [vectors]: this order in float32, for a tree whose nodes add two at a time."""
        if self.most_at_once > 2:
            raise ValueError(f"a node adds {self.most_at_once} terms at once, and no float32 sum in NumPy does that")
        found = list(values.astype(np.float32))
        for a, b in self.nodes:
            found.append(found[a] + found[b])
        return found[-1]

    def full(self) -> str:
        """All of it: ((0 + 1) + 2) + 3."""
        said: list[str] = []
        waiting: list[int | str] = [self.root]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                said.append(one)
            elif one < self.terms:
                said.append(str(one))
            else:
                first, *others = sorted(self.children(one), key=lambda c: (-self.sizes[c], self.firsts[c]))
                waiting.extend([")"] if one != self.root else [])
                for other in reversed(others):
                    waiting.extend((other, " + "))
                waiting.extend([first, *(["("] if one != self.root else [])])
        return "".join(said)

    def as_dict(self) -> dict[str, Any]:
        return {
            "terms": self.terms,
            "depth": self.depth,
            "most_at_once": self.most_at_once,
            "nodes": [list(children) for children in self.nodes],
        }


class Growth:
    """A tree that grows: join makes a node of nodes that are there."""

    def __init__(self, terms: int) -> None:
        self.terms = terms
        self.nodes: list[tuple[int, ...]] = []

    def join(self, *children: int) -> int:
        if len(children) == 1:
            return children[0]
        self.nodes.append(children)
        return self.terms + len(self.nodes) - 1

    def chain(self, parts: Sequence[int]) -> int:
        """One after the other, in the order given."""
        total = parts[0]
        for part in parts[1:]:
            total = self.join(total, part)
        return total

    def fold(self, parts: Sequence[int]) -> int:
        """Part l takes part l + half, until one is left. Their number is a power of two."""
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [self.join(parts[i], parts[i + half]) for i in range(half)]
        return parts[0]

    def tree(self) -> Tree:
        return Tree(self.terms, tuple(self.nodes))


def parting(a: Tree, b: Tree) -> tuple[list[int], list[int], list[int]] | None:
    """Where two orders part first: the smallest sum that both make, and to which terms each adds it. None: nowhere."""
    mine, others = _parents(a), _parents(b)
    nodes = {key: node for node, key in enumerate(a.keys)}
    for key in sorted(mine.keys() & others.keys(), key=lambda k: (a.sizes[nodes[k]], a.firsts[nodes[k]])):
        if a.keys[mine[key]] != b.keys[others[key]]:
            here = a.leaves(nodes[key])
            there = [sorted(set(tree.leaves(up[key])) - set(here)) for tree, up in ((a, mine), (b, others))]
            return here, there[0], there[1]
    return None


def _parents(tree: Tree) -> dict[int, int]:
    return {tree.keys[c]: tree.terms + k for k, children in enumerate(tree.nodes) for c in children}
