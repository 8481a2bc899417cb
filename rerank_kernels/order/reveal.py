"""A sum's tree from its results alone, after the idea of FPRev (Xie and others, arXiv 2411.00442, 2024), by ways of our own.

Two ways ask a sum of n terms about its order, and both give `_grown` what it needs:

Masks, where terms may have signs. Term i is +M, term j is -M, the others are a unit that vanishes beside M. A unit that meets M
or -M before these two meet is lost. So what is left counts the units outside of the smallest sum that holds both i and j.

Ties, where terms are positive. Term i is 1, terms j and k are 2^-24.5, the others 0. Beside the 1 either is lost alone, but not
their sum. So a result above 1 says that j and k meet before i.

`_grown` takes a term and sorts all others by where they meet it. That gives the way from this term up to the whole sum, and
what hangs beside that way. Then it does the same for what hangs there. The first term suits most kernels. Where it does not, a
random one is taken, so that a tree of any form takes about n log n questions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from rerank_kernels.order.tree import Growth, Tree

CONFIRMED = 32  # questions that a tree must answer as the sum does, beside those that made it


class NoTree(Exception):
    """The answers belong to no order of additions; the message says what they look like."""


class Masked(Protocol):
    """left: how many units are left of the terms in `units`, where term i is +M and term j -M, for each j of `others`."""

    @property
    def terms(self) -> int: ...

    def left(self, i: int, others: Sequence[int], units: Sequence[int]) -> list[int]: ...


class Tied(Protocol):
    """meets: whether j and k meet before i."""

    @property
    def terms(self) -> int: ...

    def meets(self, i: int, j: int, k: int) -> bool: ...


Group = list[int]
Way = tuple[list[list[Group]], Group]
Ask = Callable[[int, Group, Group], Way]
Advance = Callable[[float], object]


def _nobody(done: float) -> None:
    """Nobody looks how far it is."""


def by_masks(sums: Masked, advance: Advance = _nobody) -> Tree:
    """The tree of a sum whose terms may have signs."""

    def ask(i: int, others: Group, units: Group) -> Way:
        by_size: dict[int, Group] = {}
        for j, size in zip(others, _sizes(sums, i, others, units), strict=True):
            by_size.setdefault(size, []).append(j)
        apart = by_size.pop(len(units), [])
        met = 1
        for size in sorted(by_size):
            met += len(by_size[size])
            if met != size:
                raise NoTree(f"term {i} would meet {met} terms in a sum of {size}: nothing is lost, or not always the same")
        return [[by_size[size]] for size in sorted(by_size)], apart

    tree = _grown(sums.terms, ask, advance)
    for i, j in _draws(tree.terms, 2):
        size = tree.sizes[_meeting(tree, i, j)]
        (found,) = _sizes(sums, i, [j], list(range(tree.terms)))
        if found != size:
            raise NoTree(f"terms {i} and {j} meet in a sum of {found} terms, and in one of {size} by the other answers")
    return tree


def by_ties(sums: Tied, advance: Advance = _nobody) -> Tree:
    """The tree of a sum of positive terms."""
    if sums.terms > 2 and all(sums.meets(*three) for three in ((0, 1, 2), (1, 2, 0), (2, 0, 1))):
        raise NoTree("nothing is lost beside 24 bits: it adds in wider numbers than float32, or exactly")

    def ask(i: int, others: Group, units: Group) -> Way:
        way: list[list[Group]] = []  # the nearest first
        for j in others:
            low, high = 0, len(way)
            while low < high:
                middle = (low + high) // 2
                k = way[middle][0][0]
                if sums.meets(k, i, j):
                    high = middle
                elif sums.meets(j, i, k):
                    low = middle + 1
                else:  # j and k meet i in one node, and are of one child of it or of two
                    child = [group for group in way[middle] if sums.meets(i, j, group[0])]
                    if child:
                        child[0].append(j)
                    else:
                        way[middle].append([j])
                    break
            else:
                way.insert(low, [[j]])
        return way, []

    tree = _grown(sums.terms, ask, advance)
    for i, j, k in _draws(tree.terms, 3):
        if sums.meets(i, j, k) != (_meeting(tree, j, k) < _meeting(tree, i, j) == _meeting(tree, i, k)):
            raise NoTree(f"of the terms {i}, {j} and {k} others meet first than by the other answers")
    return tree


def _grown(terms: int, ask: Ask, advance: Advance) -> Tree:
    """ask(i, others, units): the way of term i up from itself within `units`, a node's terms: per node on it the groups that
    hang beside it, the nearest first; and those of the others that this node adds to the child with i in it.

    A group is terms of one node's children. Which children is the next question, so `units` are all terms of that node.
    """
    growth, draw = Growth(terms), random.Random(0)

    def children(among: Group, units: Group, lowest: bool) -> list[int]:
        found = []
        while among:
            i = among[0 if lowest else draw.randrange(len(among))]
            way, apart = ask(i, [j for j in among if j != i], units) if len(among) > 1 else ([], [])
            node, met = i, [i]
            for groups in way:
                met = [*met, *(j for group in groups for j in group)]
                node = growth.join(node, *(c for group in groups for c in below(group, met, among, lowest)))
                advance(len(growth.nodes) / (terms - 1))
            found.append(node)
            among, lowest = apart, lowest and len(apart) <= 3 * len(among) // 4
        return found

    def below(group: Group, units: Group, among: Group, lowest: bool) -> list[int]:
        return children(group, units, lowest and len(group) <= 3 * len(among) // 4)

    whole = list(range(terms))
    growth.join(*children(whole, whole, True))
    return growth.tree()


def _sizes(sums: Masked, i: int, others: Sequence[int], units: Sequence[int]) -> list[int]:
    """Of how many terms of `units` is the smallest sum that holds both i and j, for each j of the others?"""
    found = []
    for j, left in zip(others, sums.left(i, others, units), strict=True):
        if not 0 <= left <= len(units) - 2:
            raise NoTree(f"with term {i} at +M and term {j} at -M, {left} of {len(units)} units are left: it is no plain sum")
        found.append(len(units) - left)
    return found


def _draws(terms: int, count: int) -> list[list[int]]:
    draw = random.Random(1)
    return [draw.sample(range(terms), count) for _ in range(CONFIRMED if terms >= count else 0)]


def _meeting(tree: Tree, *terms: int) -> int:
    """The node of the smallest sum that holds these."""
    above = {c: tree.terms + k for k, children in enumerate(tree.nodes) for c in children}
    ways = []
    for term in terms:
        way = [term]
        while way[-1] in above:
            way.append(above[way[-1]])
        ways.append(way)
    others = [set(way) for way in ways[1:]]
    return next(node for node in ways[0] if all(node in other for other in others))
