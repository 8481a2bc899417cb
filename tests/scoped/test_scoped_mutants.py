"""Mistakes that a scope could make, each caught by a test of this folder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_scope
import test_scoped_attention
import torch
import torch.nn.functional as F
from torch import Tensor

import rerank_kernels as rk
from rerank_kernels.scoped import attention, products, scope, sums, table
from scoped_cases import CASES, NEEDS, hold

pytestmark = NEEDS


def replaced(monkeypatch: pytest.MonkeyPatch, op: str, **changes: Any) -> None:
    def look_up(function: Any) -> table.Served:
        served = table.look_up(function)
        return dataclasses.replace(served, **changes) if served.op == f"aten::{op}" else served

    monkeypatch.setattr(scope, "_looked_up", look_up)


def _contiguous_alone(**given: Any) -> Tensor:
    return products.linear(**given) if given["input"].is_contiguous() else F.linear(**given)


def _without_alpha(self: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return products.addmm(self, mat1, mat2, beta)


def _beta_of_nothing(self: Tensor, mat1: Tensor, mat2: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return self * beta + products.addmm(self, mat1, mat2, 0, alpha)


def _of_one(self: Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    return sums.mean(self, dim[:1], keepdim)


@pytest.mark.parametrize(
    ("name", "op", "changes"),
    [
        ("linear", "linear", {"exact": True}),
        ("mv", "mv", {"exact": True}),
        ("softmax, first", "_softmax", {"exact": True}),
        ("sum", "sum", {"exact": True}),
        ("pow", "pow", {"exact": True}),
        ("sigmoid", "sigmoid", {"exact": True}),
        ("linear", "linear", {"route": _contiguous_alone}),
        ("addmm, alpha and beta", "addmm", {"route": _without_alpha}),
        ("addmm, beta of nan", "addmm", {"route": _beta_of_nothing}),
        ("mean of several", "mean", {"route": _of_one}),
    ],
    ids=lambda value: (
        ", ".join(f"{k} {getattr(v, '__name__', v)}" for k, v in value.items()) if isinstance(value, dict) else value
    ),
)
def test_a_wrong_route_is_caught(name: str, op: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hold(CASES[name], torch.float32)
    replaced(monkeypatch, op, **changes)
    with pytest.raises(AssertionError):
        hold(CASES[name], torch.float32)


def _multiplied(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **how: Any) -> Tensor:
    """Hidden keys get the weight 0 in place of being skipped."""
    s = products.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).view(*query.shape[:-1], key.shape[2]) / 4
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -math.inf)
    return products.bmm(sums.softmax(s, -1).flatten(0, 1), value.flatten(0, 1)).view(query.shape)


def test_a_mask_that_is_multiplied_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, "scaled_dot_product_attention", route=_multiplied)
    with pytest.raises(AssertionError):
        test_scoped_attention.hold("bool", False, torch.float32)


def test_keys_counted_from_the_first_column_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_the_first(mask: Tensor, visible: Tensor) -> Tensor:
        return torch.zeros(mask.shape[0], dtype=torch.int64)

    monkeypatch.setattr(attention, "_first_seen", from_the_first)
    with pytest.raises(AssertionError):
        test_scoped_attention.test_keys_count_from_the_first_that_is_seen()


def test_a_way_chosen_by_all_rows_of_a_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query with gaps sends the whole batch another way."""
    look = attention._look

    def all_or_none(mask: Tensor, visible: Tensor) -> attention.Seen:
        seen = look(mask, visible)
        other = seen.other | seen.other.any()
        return seen._replace(other=other)

    assert_rows_of_a_mask_are_independent()
    monkeypatch.setattr(attention, "_look", all_or_none)
    with pytest.raises(AssertionError):
        assert_rows_of_a_mask_are_independent()


def assert_rows_of_a_mask_are_independent() -> None:
    q, k, v = (test_scoped_attention.heads(2, 4, 200, 16, seed=i) for i in range(3))
    mask = torch.ones(2, 1, 200, 200, dtype=torch.bool)
    mask[1, :, 3, 50:90] = False
    y = test_scoped_attention.attend(q, k, v, mask)
    assert torch.equal(y[:1], test_scoped_attention.attend(q[:1], k[:1], v[:1], mask[:1]))


@contextlib.contextmanager
def _left_on() -> Iterator[None]:
    above, below = scope._HELD.modes
    below.__enter__()
    above.__enter__()
    yield
    above.__exit__(None, None, None)
    below.__exit__(None, None, None)


def test_a_scope_that_an_error_leaves_on_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope, "_held", _left_on)
    modes = scope._HELD.modes
    with monkeypatch.context() as inner, pytest.raises(AssertionError):
        inner.setattr(scope, "_now", lambda: scope._Scope(True))  # and the task is not asked
        test_scope.test_an_error_ends_the_scope()
    for mode in modes:
        mode.__exit__(None, None, None)


def test_a_scope_that_a_nested_one_ends_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def invariant(strict: bool = True) -> Iterator[Any]:
        with scope._held():
            scope._open.set(made := scope._Scope(strict))
            try:
                yield made.report
            finally:
                scope._open.set(None)

    monkeypatch.setattr(rk, "invariant", invariant)
    with pytest.raises(AssertionError):
        test_scope.test_nesting_keeps_the_outer_scope()


def test_a_scope_of_the_whole_process_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task beside it would be in it."""
    count: list[scope._Scope] = []
    stock: Callable[..., Any] = scope._Scope.__init__

    def begin(self: scope._Scope, strict: bool) -> None:
        stock(self, strict)
        count.append(self)

    monkeypatch.setattr(scope._Scope, "__init__", begin)
    monkeypatch.setattr(scope, "_now", lambda: next((s for s in count if not s.over), None))
    with pytest.raises(AssertionError):
        test_scope.test_tasks_of_one_thread_end_in_any_order()
