"""order: one op's trees, stock's and ours, by the number of rows and of threads; and in a sentence what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from rerank_kernels.order.reveal import NoTree
from rerank_kernels.order.sums import OURS, STOCK, VECTORS, summation
from rerank_kernels.order.text import lines, places
from rerank_kernels.order.tree import Tree, parting


@dataclass(frozen=True)
class Found:
    """tree, or why there is none. agrees: of VECTORS random vectors, in how many this tree gives the op's bits."""

    whose: str
    rows: int
    threads: int
    tree: Tree | None
    why_not: str
    agrees: int | None
    calls: int
    seconds: float


@dataclass(frozen=True)
class OrderReport:
    op: str
    terms: int
    dtype: str
    device: str
    row: int
    found: Sequence[Found]

    @property
    def ok(self) -> bool:
        """Ours has one tree whatever the rows, at each number of threads."""
        ours = [f for f in self.found if f.whose == OURS]
        return all(a.tree == b.tree for a in ours for b in ours if a.threads == b.threads)

    def at(self, found: Found) -> str:
        several = len({f.threads for f in self.found}) > 1
        return f"M = {found.rows}" + (f" with {_plural(found.threads, 'thread')}" if several else "")

    def text(self, full: bool = False) -> str:
        threads = sorted({f.threads for f in self.found})
        head = f"{self.op}: row {self.row} of M, {_plural(self.terms, 'term')}, {self.dtype}, {self.device}"
        said = [head + (f", {_plural(threads[0], 'thread')}" if len(threads) == 1 else "")]
        for whose in (STOCK, OURS):
            for alike in self._alike(whose):
                said += ["", f"{whose} at {_and(map(self.at, alike))}: {_about(alike)}"]
                if (tree := alike[0].tree) is not None:
                    said += [tree.full()] if full else ["  " + line for line in lines(tree)]
        return "\n".join([*said, "", *self.sentences()])

    def sentences(self) -> list[str]:
        said = []
        for whose in (STOCK, OURS):
            first, *others = self._alike(whose)
            if any(group[0].tree is None for group in (first, *others)):
                said.append(f"{whose}: a tree was not found everywhere, see above.")
            elif not others:
                same = "adds in the same order" if len(first) > 1 else "was asked once"
                said.append(f"{whose} {same} at {_and(map(self.at, first))}.")
            for other in others:
                said += self._parted(whose, first[0], other[0])
        return said

    def _parted(self, whose: str, a: Found, b: Found) -> list[str]:
        where = parting(a.tree, b.tree) if a.tree and b.tree else None
        if where is None:
            return []
        what, here, there = where
        said = f"{_sum_of(what)} is first added to {_sum_of(here)} at {self.at(a)}, and to {_sum_of(there)} at {self.at(b)}"
        return [f"{whose} adds in another order at {self.at(a)} than at {self.at(b)}: {said}."]

    def _alike(self, whose: str) -> list[list[Found]]:
        groups: list[list[Found]] = []
        for found in self.found:
            if found.whose == whose:
                same = [g for g in groups if g[0].tree == found.tree and g[0].why_not == found.why_not]
                if same:
                    same[0].append(found)
                else:
                    groups.append([found])
        return groups

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "terms": self.terms,
            "dtype": self.dtype,
            "device": self.device,
            "row": self.row,
            "sentences": self.sentences(),
            "found": [
                {
                    "whose": f.whose,
                    "rows": f.rows,
                    "threads": f.threads,
                    "calls": f.calls,
                    "seconds": round(f.seconds, 3),
                    "random_vectors": None if f.agrees is None else VECTORS,
                    "bits_equal": f.agrees,
                    "why_not": f.why_not or None,
                    "tree": None if f.tree is None else f.tree.as_dict(),
                }
                for f in self.found
            ],
        }


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _and(said: Iterable[str]) -> str:
    *most, last = said
    return f"{', '.join(most)} and {last}" if most else last


def _sum_of(terms: list[int]) -> str:
    return f"term {terms[0]}" if len(terms) == 1 else f"the sum of {len(terms)} terms ({places(terms)})"


def _about(alike: Sequence[Found]) -> str:
    first, calls, seconds = alike[0], sum(f.calls for f in alike), sum(f.seconds for f in alike)
    cost = f"{calls:,} calls, {seconds:.1f} s"
    if first.tree is None:
        return f"no tree, for {first.why_not}; {cost}"
    said = [f"depth {first.tree.depth}"]
    if first.tree.most_at_once > 2:
        said.append(f"up to {first.tree.most_at_once} terms at once, in an order that no result shows")
    if first.agrees is not None:
        counts = " and ".join(str(f.agrees) for f in alike) if len({f.agrees for f in alike}) > 1 else first.agrees
        said.append(f"this order in NumPy gives the op's bits for {counts} of {VECTORS} random rows")
    return "; ".join([*said, cost])


def order(
    op: str,
    *,
    terms: int,
    rows: Sequence[int],
    row: int = 0,
    threads: Sequence[int] | None = None,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[float], object] = lambda done: None,
) -> OrderReport:
    """The trees of `op`, stock's and ours, for each number of rows and each number of threads. progress: of 1."""
    device = torch.device(device)
    settings = [(w, r, t) for w in (STOCK, OURS) for t in threads or (torch.get_num_threads(),) for r in rows]
    shape: dict[str, Any] = {"terms": terms, "row": row, "columns": columns, "dtype": dtype, "device": device}
    for whose, some, _ in settings:  # a fault is known before the first tree
        summation(op, whose, rows=some, **shape)
    found = []
    with torch.inference_mode():
        for place, (whose, some, count) in enumerate(settings):
            started, tree, why_not, agrees = time.perf_counter(), None, "", None
            with _threads(count):
                asked = summation(op, whose, rows=some, **shape)
                try:
                    tree = asked.tree(lambda part, place=place: progress((place + part) / len(settings)))  # type: ignore[misc]
                    agrees = asked.agrees(tree)
                except NoTree as reason:
                    why_not = str(reason)
            found.append(Found(whose, some, count, tree, why_not, agrees, asked.calls, time.perf_counter() - started))
            progress((place + 1) / len(settings))
    return OrderReport(op, terms, str(dtype).removeprefix("torch."), str(device), row, found)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
