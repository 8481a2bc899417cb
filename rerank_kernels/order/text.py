"""A tree in few lines: chains, folds, and parts that are alike are said once."""

from __future__ import annotations

from collections.abc import Sequence

from rerank_kernels.order.tree import Tree

MANY = 16  # lines from which a tree is told another way, if that is shorter
RUNS = 6  # of terms that have no step, or of parts that are not alike: the first few


def lines(tree: Tree) -> list[str]:
    told = _Writer(tree, whole=False).of(tree.root)
    return told if len(told) <= MANY else min(told, _Writer(tree, whole=True).of(tree.root), key=len)


def places(terms: Sequence[int]) -> str:
    """0, 1, .. 511"""
    said: list[str] = []
    begin = 0
    while begin < len(terms):
        if len(said) >= RUNS:
            return ", ".join(said) + f" and {len(terms) - begin} more"
        end = begin + 1
        while end + 1 < len(terms) and terms[end + 1] - terms[end] == terms[begin + 1] - terms[begin]:
            end += 1
        if end - begin > 2 and end < len(terms):
            said.append(f"{terms[begin]}, {terms[begin + 1]}, .. {terms[end]}")
            begin = end + 1
        else:
            said.append(str(terms[begin]))
            begin += 1
    return ", ".join(said)


class _Writer:
    """whole: a chain goes on for as long as it can, whatever is added to it."""

    def __init__(self, tree: Tree, whole: bool) -> None:
        self.tree, self.whole = tree, whole
        self.shapes = self._shapes()

    def _shapes(self) -> list[int]:
        """Per node a number, the same for what is alike but for where it begins. Chains of terms that are equally far apart are
        alike however long: so are the lanes and the chunks of n terms, for any n."""
        tree, ends = self.tree, {term: (0, term) for term in range(self.tree.terms)}  # of a chain: its step and its last term
        known: dict[object, int] = {}
        found = [0] * tree.terms
        for node, children in enumerate(tree.nodes, tree.terms):
            first, *others = sorted(children, key=lambda c: (-tree.sizes[c], tree.firsts[c]))
            step, last = ends.get(first, (0, 0))
            if (
                len(others) == 1
                and others[0] < tree.terms
                and first in ends
                and others[0] - last == (step or others[0] - last) > 0
            ):
                ends[node] = (others[0] - last, others[0])
                form: object = ends[node][0]
            else:
                begin = tree.firsts[node]
                form = tuple(sorted((tree.firsts[c] - begin, found[c]) for c in children))
            found.append(known.setdefault(form, len(known) + 1))
        return found

    def of(self, node: int) -> list[str]:
        tree = self.tree
        if node < tree.terms:
            return [f"term {node}"]
        if len(children := self._sorted(node)) > 2:
            return self._parts(children, f"at once {len(children)}", len(children))
        parts, steps = self._fold(node)
        if len(parts) > 2:  # of two parts both are true, and a chain is the simpler word
            return self._parts(parts, f"{len(parts)}", len(parts), f", folded by {', '.join(map(str, steps))}")
        parts = self._chain(node)
        return self._parts(parts, f"a chain of {len(parts)}", len(parts))

    def _sorted(self, node: int) -> list[int]:
        return sorted(self.tree.children(node), key=self.tree.firsts.__getitem__)

    def _fold(self, node: int) -> tuple[list[int], list[int]]:
        """Down while each node adds two of one shape: the parts, and from the first additions on how far apart those were."""
        parts = [node]
        steps: list[int] = []
        while all(len(self.tree.children(p)) == 2 for p in parts):
            pairs = [self._sorted(p) for p in parts]
            apart = {self.tree.firsts[b] - self.tree.firsts[a] for a, b in pairs}
            if len(apart) > 1 or len({self.shapes[c] for pair in pairs for c in pair}) > 1:
                break
            steps += apart
            parts = [c for pair in pairs for c in pair]
        return sorted(parts, key=self.tree.firsts.__getitem__), steps[::-1]

    def _chain(self, node: int) -> list[int]:
        """What is added one after the other, the first one first. All but the first and the last are of one shape."""
        found: list[int] = []
        while len(self.tree.children(node)) == 2 and not (found and len(self._fold(node)[0]) > 3):
            rest, part = sorted(self.tree.children(node), key=lambda c: (-self.tree.sizes[c], self.tree.firsts[c]))
            last = len(found) == 1 and self.tree.sizes[part] > self.tree.sizes[found[0]] > 1  # a shorter one ends a chain
            if found and self.shapes[part] != self.shapes[found[-1]] and not (last or self.whole):
                break
            found.append(part)
            node = rest
        found = [node, *reversed(found)]
        if (
            len(found) > 2 and self.shapes[found[0]] == self.shapes[found[1]]
        ):  # the first two have no order: take that of the rest
            first, second, third = (self.tree.firsts[p] for p in found[:3])
            if third - first == first - second:
                found[:2] = [found[1], found[0]]
        return found

    def _parts(self, parts: list[int], what: str, count: int, how: str = "") -> list[str]:
        """Runs of parts that are alike, each said once."""
        runs: list[list[int]] = []
        for part in parts:
            if runs and self.shapes[runs[-1][0]] == self.shapes[part]:
                runs[-1].append(part)
            else:
                runs.append([part])
        if len(runs) == 1:
            said, below = self._run(runs[0])
            return [f"{what} {said}{how}{':' if below else ''}", *below]
        told = [(self.shapes[run[0]], len(run)) for run in runs]
        again = next((p for p in range(2, RUNS) if len(runs) >= 3 * p and told[: 2 * p] == told[:p] * 2), len(runs))
        times = next((k for k in range(1, len(runs)) if told[k * again : (k + 1) * again] != told[:again]), 1)
        found = [f"{what} parts{how}:"]
        for run in runs[:again]:
            found += self._told(run)
        if times > 1:
            found.append(f"  and so on, {times} times in all")
            for run in runs[times * again :][:RUNS]:
                found += self._told(run)
            if (left := len(runs) - times * again - RUNS) > 0:
                found.append(f"  and {left} more")
        return found

    def _told(self, run: list[int]) -> list[str]:
        if len(run) == 1:
            return ["  " + line for line in self.of(run[0])]
        said, below = self._run(run)
        return [f"  {len(run)} {said}{':' if below else ''}", *("  " + line for line in below)]

    def _run(self, parts: list[int]) -> tuple[str, list[str]]:
        firsts, sizes = [self.tree.firsts[p] for p in parts], sorted({self.tree.sizes[p] for p in parts})
        if sizes == [1]:
            return f"terms: {places(firsts)}", []
        first, *rest = self.of(parts[0])
        said = f"parts of {' or '.join(map(str, sizes))} terms, which begin at {places(firsts)}"
        return said, [f"  the first: {first}", *("  " + line for line in rest)]
