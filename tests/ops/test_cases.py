"""The table of cases itself: it covers every op, and its truths, which carry error bounds, are the ops' own float64 truths."""

from __future__ import annotations

import pytest
import torch

import cases
from cases import Case
from rerank_kernels.backend.registry import OPS

CASES = cases.CASES


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases(op: str) -> None:
    """Without a case no invariant, no truth and no golden hash of the op is ever looked at."""
    of_op = [case for case in CASES if case.op == op]
    assert of_op and all(case in cases.of(OPS[op]) for case in of_op)


def test_truths_are_the_ops_own(case: Case) -> None:
    rows, shared = case.make_rows(torch.float32), case.make_shared(torch.float32)
    options = {name: value for name, value in case.options.items() if name != "out_dtype"}
    wide = {name: t.double() for name, t in {**rows, **shared}.items()}
    want = cases.TRUTHS[case.op](**wide, **options, **case.sequences())
    want = (want,) if isinstance(want, torch.Tensor) else tuple(want)
    got = case.near(rows, shared, tuple(w.float() for w in want))
    for near, w in zip(got, want, strict=True):
        torch.testing.assert_close(near.value, w.double(), rtol=1e-12, atol=1e-12)
