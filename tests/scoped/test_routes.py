"""Every route of rk.invariant: a row's bits are those that it has alone, and near float64."""

from __future__ import annotations

import pytest
import torch

from rerank_kernels.scoped import exact, table
from scoped_cases import CASES, NEEDS, NO_TRUTH, ROWS, hold, rows
from tools import any_model, pages

pytestmark = NEEDS
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_a_row_has_the_bits_that_it_has_alone(name: str) -> None:
    for dtype in DTYPES:
        hold(CASES[name], dtype, name not in NO_TRUTH)


def test_stock_fails_what_is_asked() -> None:
    """The control: without the scope some of these depend on the batch, or on the layout."""
    x = rows(torch.float32)
    changed = {
        n
        for n, f in CASES.items()
        if n not in NO_TRUTH and not torch.equal(f(x), torch.cat([f(x[i : i + 1]) for i in range(ROWS)]))
    }
    assert changed & {"linear", "mm", "matmul", "bmm", "addmm", "conv1d", "conv2d", "mv"}, changed


def test_the_page_lists_the_ops() -> None:
    assert pages.text(any_model.PAGE, "any_model", "ops") == any_model.ops_written(), "run: python tools/any_model.py --write"


def test_no_op_is_in_two_tables() -> None:
    routed = {key.partition(".")[0] for key in table.ROUTES} | table.elementwise.IN_PIECES
    assert routed & (exact.MOVED | exact.CHOSEN) == set() and routed & exact.ONE_STEP == set()
    assert set(exact.WHY) & (exact.EXACT | routed) == set()
