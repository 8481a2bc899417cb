"""Orders of sums: known ones come back exactly, our ops' trees are the contract's, and a wrong probe or op is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

import rerank_kernels as rk
from commands import bad, run
from conftest import require
from rerank_kernels.cli import order as command
from rerank_kernels.cli.parser import COMMANDS
from rerank_kernels.order import report, reveal, sums
from rerank_kernels.order.reveal import NoTree, by_masks, by_ties
from rerank_kernels.order.text import lines, places
from rerank_kernels.order.tree import Growth, Tree, parting

Floats = npt.NDArray[np.float32]
Add = Callable[[Floats], float]
LARGE = np.float32(2.0**100)


class Asked:
    """A function that adds, for both ways."""

    def __init__(self, terms: int, add: Add) -> None:
        self.terms, self.add = terms, add
        self.calls = 0

    def left(self, i: int, others: Sequence[int], units: Sequence[int]) -> list[int]:
        found = []
        for j in others:
            x = np.zeros(self.terms, np.float32)
            x[list(units)] = 1
            x[i], x[j] = LARGE, -LARGE
            self.calls += 1
            found.append(sums.whole(float(self.add(x)), i, j))
        return found

    def meets(self, i: int, j: int, k: int) -> bool:
        x = np.zeros(self.terms, np.float32)
        x[i], x[[j, k]] = 1, 2.0**-24.5
        self.calls += 1
        return float(self.add(x)) > 1


# ---- orders written in NumPy, and their trees ------------------------------------------------------------------------------


def chain(x: Floats) -> np.float32:
    return np.add.accumulate(x)[-1]


def chunks(x: Floats, chunk: int = 512) -> np.float32:
    return chain(np.array([chain(x[b : b + chunk]) for b in range(0, len(x), chunk)], np.float32))


def lanes(x: Floats, width: int = 32) -> np.float32:
    rows = np.zeros((-(-len(x) // width), width), np.float32)
    rows.ravel()[: len(x)] = x
    total = np.add.accumulate(rows, axis=0)[-1]
    while len(total) > 1:
        half = len(total) // 2
        total = total[:half] + total[half:]
    return total[0]


def pairwise(x: Floats) -> np.float32:
    return x[0] if len(x) == 1 else pairwise(x[: len(x) // 2]) + pairwise(x[len(x) // 2 :])


def chain_tree(n: int) -> Tree:
    return chunks_tree(n, n)


def chunks_tree(n: int, chunk: int = 512) -> Tree:
    growth = Growth(n)
    growth.chain([growth.chain(range(b, min(b + chunk, n))) for b in range(0, n, chunk)])
    return growth.tree()


def lanes_tree(n: int, width: int = 32) -> Tree:
    """Lanes without a term add nothing: fewer terms than lanes fold as if zeros stood there."""
    growth = Growth(n)
    parts = [growth.chain(range(lane, n, width)) if lane < n else -1 for lane in range(width)]
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [a if b < 0 else growth.join(a, b) for a, b in zip(parts[:half], parts[half:], strict=True)]
    return growth.tree()


def pairwise_tree(n: int) -> Tree:
    growth = Growth(n)

    def of(begin: int, end: int) -> int:
        middle = begin + (end - begin) // 2
        return begin if end - begin == 1 else growth.join(of(begin, middle), of(middle, end))

    of(0, n)
    return growth.tree()


KNOWN = {
    "chain": (chain, chain_tree),
    "descending": (lambda x: chain(x[::-1]), lambda n: _turned(chain_tree(n))),
    "pairwise": (pairwise, pairwise_tree),
    "lanes": (lanes, lanes_tree),
    "chunks": (chunks, chunks_tree),
}


def _turned(tree: Tree) -> Tree:
    n = tree.terms
    return Tree(n, tuple(tuple(n - 1 - c if c < n else c for c in children) for children in tree.nodes))


@pytest.mark.parametrize("ways", [by_masks, by_ties])
@pytest.mark.parametrize("n", [1, 2, 3, 40, 600])
@pytest.mark.parametrize("name", KNOWN)
def test_known_orders_come_back(name: str, n: int, ways: Callable[[Asked], Tree]) -> None:
    add, tree = KNOWN[name]
    n = min(n, 150) if name == "pairwise" else n  # it is slow in Python
    asked = Asked(n, add)
    assert ways(asked) == tree(n)
    per_term = math.log2(n) + 2 if n > 1 else 1
    assert asked.calls <= reveal.CONFIRMED + 3 + n * per_term * (1 if ways is by_masks else 2 * per_term)


@pytest.mark.parametrize("seed", range(8))
def test_any_tree_comes_back(seed: int) -> None:
    draw = np.random.default_rng(seed)
    growth, parts = Growth(90), list(range(90))
    while len(parts) > 1:
        a, b = (parts.pop(draw.integers(len(parts))) for _ in range(2))
        parts.append(growth.join(a, b))
    tree = growth.tree()
    for ways in (by_masks, by_ties):
        assert ways(Asked(90, tree.sum)) == tree
    x = draw.standard_normal((90, 3)).astype(np.float32)
    assert (tree.sum(x) == [tree.sum(column) for column in x.T]).all()


def test_terms_at_once_are_one_node() -> None:
    """As tensor cores add: eight products and the sum so far, and what is small beside the largest is lost."""

    def add(x: Floats) -> float:
        total = 0.0
        for b in range(0, len(x), 8):
            terms = [total, *map(float, x[b : b + 8])]
            most = max(map(abs, terms))
            total = math.fsum(t for t in terms if abs(t) > most * 2.0**-24)
        return total

    tree = by_masks(Asked(40, add))
    growth, total = Growth(40), ()
    for b in range(0, 40, 8):
        total = (growth.join(*total, *range(b, b + 8)),)
    assert tree == growth.tree() and tree.most_at_once == 9 and tree.depth == 5
    with pytest.raises(ValueError, match="9 terms at once"):
        tree.sum(np.ones(40, np.float32))
    assert lines(tree)[0].startswith("at once 9 parts")


def running_mean(x: Floats) -> float:
    mean = np.float32(0)
    for count, one in enumerate(x, 1):
        mean += (one - mean) / np.float32(count)
    return float(mean) * len(x)


NOT_TREES: dict[str, Add] = {
    "exact": lambda x: math.fsum(map(float, x)),
    "running mean": running_mean,
    "as many chunks as terms that are not 0": lambda x: float(chunks(x, 3 + int(np.count_nonzero(x)) % 5)),
    "of rounded terms": lambda x: float(chain(x * np.float32(0.3))),
}


@pytest.mark.parametrize("name", NOT_TREES)
def test_what_is_no_order_has_no_tree(name: str) -> None:
    with pytest.raises(NoTree):
        by_masks(Asked(50, NOT_TREES[name]))


def test_an_order_by_size_looks_like_all_at_once() -> None:
    """What the values decide is in no tree: -M comes first and M last, so nothing between them is ever left."""
    assert by_masks(Asked(50, lambda x: float(chain(np.sort(x))))).most_at_once == 50


def test_ties_beside_wider_numbers_have_no_tree() -> None:
    with pytest.raises(NoTree, match="wider"):
        by_ties(Asked(50, lambda x: float(x.astype(np.float64).sum())))


# ---- the contract ----------------------------------------------------------------------------------------------------------

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CONTRACT: dict[str, tuple[Callable[[int], Tree], tuple[torch.dtype, ...]]] = {
    "linear": (chunks_tree, (F32, F16, BF16)),
    "bmm": (chunks_tree, (F32, F16, BF16)),
    "sum": (lanes_tree, (F32, F16, BF16)),
    "mean": (lanes_tree, (F32, BF16)),
    "softmax": (lanes_tree, (F32,)),
    "layer_norm": (lanes_tree, (F32,)),
    "attention": (lambda n: chunks_tree(n, 64), (F32, BF16)),
}


def ours(op: str, terms: int, rows: int, dtype: torch.dtype = F32) -> sums.Summation:
    shape = {"terms": terms, "rows": rows, "row": rows - 1, "columns": 5, "dtype": dtype, "device": torch.device("cpu")}
    return sums.summation(op, sums.OURS, **shape)


@pytest.mark.parametrize("op", CONTRACT)
def test_our_trees_are_the_contract(op: str) -> None:
    """NUMERICS.md, section 2: dot has chunks of 512, row_sum 32 lanes; section 3: attention has chunks of 64 keys."""
    require("cpu")
    tree, dtypes = CONTRACT[op]
    with torch.inference_mode(), rk.use("cpu"):
        for dtype, terms, rows in [(F32, 1100, 1), *((dtype, 333, 7) for dtype in dtypes), (F32, 600, 2)]:
            asked = ours(op, terms, rows, dtype)
            found = asked.tree()
            assert found == tree(terms), f"{op} of {terms} {dtype}: {lines(found)}"
            assert asked.agrees(found) in (sums.VECTORS, None)
    assert set(CONTRACT) == set(sums.OPS) == set(command.OPS)


@pytest.mark.parametrize("op", CONTRACT)
def test_another_order_of_ours_is_noticed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an op that adds otherwise than the contract says has another tree."""
    other = chunks if CONTRACT[op][0] is lanes_tree else lanes
    asked = ours(op, 70, 1)
    if op == "softmax":
        run = lambda: torch.full((70,), float(1 / other(torch.exp(asked.line).numpy())))  # noqa: E731
    elif op == "layer_norm":

        def run() -> torch.Tensor:
            x = asked.line.numpy()
            mean = other(x) / np.float32(70)
            return torch.from_numpy((x - mean) * np.float32(math.sqrt(70 / 2)))
    else:
        run = lambda: torch.tensor(float(other(asked.line.float().numpy())) * asked.part)  # noqa: E731
    monkeypatch.setattr(asked, "run", run)
    found = asked.tree()
    assert found != CONTRACT[op][0](70) and found == (chunks_tree(70) if other is chunks else lanes_tree(70))


# ---- mutants of the probe --------------------------------------------------------------------------------------------------


def test_mutants_of_the_probe_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def caught(ways: Callable[[Asked], Tree], asked: Asked) -> bool:
        try:
            return ways(asked) != lanes_tree(100)
        except NoTree:
            return True

    class OneMore(Asked):
        def left(self, i, others, units):
            return [min(n + 1, len(units) - 2) for n in super().left(i, others, units)]

    class UnitsEverywhere(Asked):
        def left(self, i, others, units):
            return super().left(i, others, range(self.terms))

    class Reversed(Asked):
        def meets(self, i, j, k):
            return super().meets(j, i, k)

    assert not caught(by_masks, Asked(100, lanes)) and not caught(by_ties, Asked(100, lanes)), "the control"
    assert caught(by_masks, OneMore(100, lanes)) and caught(by_masks, UnitsEverywhere(100, lanes))
    assert caught(by_ties, Reversed(100, lanes))
    with monkeypatch.context() as changed:
        changed.setitem(globals(), "LARGE", np.float32(2.0**12))  # a unit does not vanish beside it
        assert caught(by_masks, Asked(100, lanes))


def test_confirming_catches_answers_that_depend_on_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that adds otherwise where the first term is small: the tree comes from other questions than its check."""

    class Late(Asked):
        def left(self, i, others, units):
            self.add = chunks if len(others) == 1 and len(units) == self.terms else lanes
            return super().left(i, others, units)

    with pytest.raises(NoTree, match="by the other answers"):
        by_masks(Late(100, lanes))
    monkeypatch.setattr(reveal, "CONFIRMED", 0)
    assert by_masks(Late(100, lanes)) == lanes_tree(100), "the control: nothing else notices"


def test_a_wrong_tree_does_not_give_the_bits() -> None:
    asked = ours("sum", 300, 1)
    assert asked.agrees(lanes_tree(300)) == sums.VECTORS
    assert (asked.agrees(chain_tree(300)) or 0) < sums.VECTORS


# ---- what is printed -------------------------------------------------------------------------------------------------------


def test_a_tree_in_few_lines() -> None:
    assert lines(chain_tree(512)) == ["a chain of 512 terms: 0, 1, .. 511"]
    assert lines(lanes_tree(100)) == [
        "32 parts of 3 or 4 terms, which begin at 0, 1, .. 31, folded by 16, 8, 4, 2, 1:",
        "  the first: a chain of 4 terms: 0, 32, .. 96",
    ]
    assert lines(chunks_tree(1100)) == [
        "a chain of 3 parts of 76 or 512 terms, which begin at 0, 512, 1024:",
        "  the first: a chain of 512 terms: 0, 1, .. 511",
    ]
    assert lines(_turned(chain_tree(9))) == ["a chain of 9 terms: 8, 7, .. 0"]
    assert lines(chain_tree(1)) == ["term 0"]
    assert chain_tree(4).full() == "((0 + 1) + 2) + 3" and chain_tree(1).full() == "0"
    assert places([0, 1, 2, 3, 8, 16, 24, 32, 5]) == "0, 1, .. 3, 8, 16, .. 32, 5"


def test_where_two_trees_part() -> None:
    assert parting(chain_tree(9), chain_tree(9)) is None
    assert parting(chain_tree(9), pairwise_tree(9)) == ([2], [0, 1], [3])
    assert parting(chunks_tree(9, 3), chunks_tree(9, 4)) == ([3], [4], [0, 1, 2])


def test_the_command_says_what_changes(capsys, tmp_path, monkeypatch) -> None:
    require("cpu")
    code, out, _ = run(capsys, "order", "sum", "--terms", "64", "--rows", "1", "8", "--json", tmp_path / "o.json")
    assert code == 0 and "rerank_kernels adds in the same order at M = 1 and M = 8." in out
    assert f"gives the op's bits for {sums.VECTORS} of {sums.VECTORS} random rows" in out
    written = json.loads((tmp_path / "o.json").read_text())
    assert [(f["whose"], f["rows"]) for f in written["found"]] == [(w, r) for w in (sums.STOCK, sums.OURS) for r in (1, 8)]
    tree = written["found"][2]["tree"]
    assert Tree(tree["terms"], tuple(map(tuple, tree["nodes"]))) == lanes_tree(64)
    assert "(0 + 32)" in run(capsys, "order", "sum", "--terms", "64", "--full")[1]

    def otherwise(op, whose, *, terms, rows, **shape):
        asked = sums.summation(op, whose, terms=terms, rows=rows, **shape)
        asked.run = lambda: torch.tensor(float((chain if rows == 1 else lanes)(asked.line.numpy())))
        return asked

    monkeypatch.setattr(report, "summation", otherwise)
    code, out, _ = run(capsys, "order", "sum", "--terms", "64", "--rows", "1", "8", "--threads", "1", "2")
    assert code == 1, "ours had two trees"
    where = "adds in another order at M = 1 with 1 thread than at M = 8 with 1 thread: "
    assert f"stock {where}term 0 is first added to term 1 at M = 1" in out and "and to term 32 at M = 8" in out
    assert f"rerank_kernels {where}" in out


def test_the_command_shows_what_has_no_tree(capsys) -> None:
    code, out, _ = run(capsys, "order", "layer_norm", "--terms", "48")
    assert code == 0 and "stock at M = 1 and M = 8: no tree, for " in out, "stock's layer_norm takes a running mean"


def test_the_command_refuses_by_name(capsys) -> None:
    assert "order" in COMMANDS
    said = bad(capsys, "order", "mean", "--dtype", "fp16")
    assert said.startswith("order mean: dtype must be float32 or bfloat16, got float16")
    assert bad(capsys, "order", "softmax", "--dtype", "bf16").startswith("order softmax: dtype must be float32, got bfloat16")
    assert bad(capsys, "order", "sum", "--row", "4") == "order sum: row must be 0 to 0 where M is 1, got 4; take a larger M"
    assert bad(capsys, "order", "sum", "--terms", "99999") == "order sum: terms must be 1 to 16384, got 99999"
    assert bad(capsys, "order", "layer_norm", "--terms", "2") == "order layer_norm: terms must be at least 3, got 2"
    assert "belongs to linear and bmm" in bad(capsys, "order", "sum", "--columns", "3")
    said = bad(capsys, "order", "sum", "--device", "nowhere")
    assert said.startswith("order sum: --device nowhere: ") and said.endswith("; leave it out for the CPU")
    assert run(capsys, "order", "sum", "--rows", "5", "8", "--row", "4", "--terms", "9")[0] == 0, "the advice"
