"""The sum inside of an op, stock's or ours, as something that can be asked for its order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rerank_kernels.order.reveal import Advance, NoTree, by_masks, by_ties
from rerank_kernels.order.tree import Floats, Tree

OPS = ("linear", "bmm", "sum", "mean", "softmax", "layer_norm", "attention")
STOCK, OURS = "stock", "rerank_kernels"
MOST = 16384  # terms
HEAD = 64  # features of attention's head
VECTORS = 8  # of random terms, added by the tree
LARGE = {torch.float32: 2.0**100, torch.bfloat16: 2.0**100, torch.float16: 2.0**15}
UNIT = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 2.0**-20}
COUNTED = {torch.float32: MOST, torch.bfloat16: 128, torch.float16: 512}  # units that a result counts exactly
TIE = -24.5 * float(np.log(2.0))  # e to this is 2^-24.5
WHY_NOT = {
    "mean": "a count divided by the terms is below what float16 holds",
    "attention": "a count divided by the keys is below what float16 holds",
    "softmax": "a result in half precision does not show the sum's last digit",
    "layer_norm": "a result in half precision does not show the mean's last digits",
}

DTYPES = {op: (torch.float32, torch.bfloat16) if op in ("mean", "attention") else (torch.float32,) for op in WHY_NOT}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass
class Summation:
    """line: the terms, a view into the operand. run: the op. part: how much of the sum its result is. counted: so many units at
    most in one call. finish: from a sum in float32 to the result, in each form that an op may choose; none if the result is
    made of more than the sum."""

    line: Tensor
    run: Callable[[], Tensor]
    large: float
    unit: float
    counted: int
    part: float = 1.0
    finish: Sequence[Callable[[Floats], Floats]] = ()
    calls: int = field(default=0, init=False)

    @property
    def terms(self) -> int:
        return len(self.line)

    def tree(self, advance: Advance = lambda done: None) -> Tree:
        return by_masks(self, advance)

    def left(self, i: int, others: Sequence[int], units: Sequence[int]) -> list[int]:
        found = [0] * len(others)
        for begin in range(0, len(units), self.counted):
            self.line.zero_()
            self.line[torch.tensor(units[begin : begin + self.counted], device=self.line.device)] = self.unit
            before = self.line.clone()
            self.line[i] = self.large
            for place, j in enumerate(others):
                self.line[j] = -self.large
                found[place] += whole(self.count(i, j), i, j)
                self.line[j] = before[j]
        return found

    def count(self, i: int, j: int) -> float:
        self.calls += 1
        return float(self.run()) / self.unit / self.part

    def agrees(self, tree: Tree) -> int | None:
        """In how many of VECTORS the tree gives the op's bits, for random terms; None if only the op can say."""
        if not self.finish or tree.most_at_once > 2:
            return None
        draw = torch.Generator().manual_seed(0)
        terms = torch.randn(self.terms, VECTORS, generator=draw).to(self.line.dtype)
        got = []
        for column in terms.unbind(1):
            self.line.copy_(column)
            got.append(self.run().float().item())
        want = tree.sum(terms.float().numpy())
        forms = [torch.from_numpy(f(want)).to(self.line.dtype).float().numpy() for f in self.finish]
        return max(int((np.array(got, np.float32) == form).sum()) for form in forms)


def whole(count: float, i: int, j: int) -> int:
    if not abs(count) <= MOST or abs(count - round(count)) >= 0.25:
        raise NoTree(f"with term {i} at +M and term {j} at -M, {count:g} units are left, and a plain sum leaves a whole number")
    return round(count)


class Mean(Summation):
    """The mean inside of layer_norm, from a normalised term: (x - mean) · 1 / √variance, where ±large make the variance."""

    def count(self, i: int, j: int) -> float:
        self.calls += 1
        k = next(k for k in range(3) if k not in (i, j))
        scaled = self.run()[k].double().item()
        return (float(self.line[k]) - scaled * float(np.sqrt(2.0 / self.terms))) * self.terms


class Tied(Summation):
    """The sum inside of softmax, whose terms are positive: term i is the largest, and its result is 1 / sum."""

    def tree(self, advance: Advance = lambda done: None) -> Tree:
        return by_ties(self, advance)

    def meets(self, i: int, j: int, k: int) -> bool:
        self.calls += 1
        self.line.fill_(-torch.inf)
        self.line[i], self.line[j], self.line[k] = 0.0, TIE, TIE
        result = self.run()[i].item()
        if not 0.999 < result <= 1.0:
            raise NoTree(f"1 beside terms of 2^-24.5 gives {result}")
        return result < 1.0


def summation(
    op: str, whose: str, *, terms: int, rows: int, row: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Summation:
    """The sum that makes one result of op: that of `row`, of `rows` rows (of attention: queries), and column 0 of `columns`."""
    if op in WHY_NOT and dtype not in DTYPES[op]:
        raise ValueError(f"order {op}: dtype must be {' or '.join(map(_name, DTYPES[op]))}, got {_name(dtype)}: {WHY_NOT[op]}")
    for name, value, most in (("terms", terms, MOST), ("rows", rows, None), ("columns", columns, None)):
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"order {op}: {name} must be {'at least 1' if most is None else f'1 to {most}'}, got {value}")
    if op == "layer_norm" and terms < 3:
        raise ValueError(f"order layer_norm: terms must be at least 3, got {terms}")
    if not 0 <= row < rows:
        raise ValueError(f"order {op}: row must be 0 to {rows - 1} where M is {rows}, got {row}; take a larger M")

    from rerank_kernels.ops import attention, linear, norm, softmax

    ours = whose == OURS
    how: dict[str, Any] = {"dtype": dtype, "device": device}
    scale = (LARGE[dtype], UNIT[dtype], COUNTED[dtype])
    # bfloat16 holds 64 / terms to a quarter of 1 / terms
    divided = (*scale[:2], 64 if dtype == torch.bfloat16 else scale[2], 1.0 / terms)
    count = np.float32(terms)
    total: tuple[Callable[[Floats], Floats], ...] = (lambda t: t,)
    mean: tuple[Callable[[Floats], Floats], ...] = (lambda t: t / count, lambda t: t * (np.float32(1.0) / count))
    if op == "attention":
        q = torch.zeros(rows, 1, HEAD, **how)
        k, v = torch.zeros(terms, 1, HEAD, **how), torch.ones(terms, 1, HEAD, **how)
        if ours:
            cu, cu_k = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (rows, terms))
            attend = functools.partial(attention.attention, q, k, v, cu_seqlens=cu, cu_seqlens_k=cu_k)
            return Summation(v[:, 0, 0], lambda: attend()[row, 0, 0], *divided, finish=mean)
        queries, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        stock = functools.partial(functional.scaled_dot_product_attention, queries, keys, values)
        return Summation(v[:, 0, 0], lambda: stock()[0, 0, row, 0], *divided, finish=mean)
    x = torch.ones(rows, terms, **how)
    if op == "linear":
        weight = torch.ones(columns, terms, **how)
        product = linear.linear if ours else functional.linear
        return Summation(x[row], lambda: product(x, weight)[row, 0], *scale, finish=total)
    if op == "bmm":
        a, b = x.expand(2, rows, terms).contiguous(), torch.ones(2, terms, columns, **how)
        entries = linear.bmm if ours else torch.bmm
        return Summation(a[0, row], lambda: entries(a, b)[0, row, 0], *scale, finish=total)
    if op == "sum":
        added = softmax.sum if ours else torch.sum
        return Summation(x[row], lambda: added(x, -1)[row], *scale, finish=total)
    if op == "mean":
        meant = softmax.mean if ours else torch.mean
        return Summation(x[row], lambda: meant(x, -1)[row], *divided, finish=mean)
    if op == "softmax":
        soft = softmax.softmax if ours else torch.softmax
        return Tied(x[row], lambda: soft(x, -1)[row], *scale)
    large = 2.0**40  # its square is a float32
    weight = torch.full((terms,), large, **how)
    if ours:
        return Mean(x[row], lambda: norm.layer_norm(x, weight, None, 1e-5)[row], large, *scale[1:])
    return Mean(x[row], lambda: functional.layer_norm(x, (terms,), weight, None, 1e-5)[row], large, *scale[1:])
