"""The tests are tested: every mutant must fail the test of the promise that it breaks, and the honest kernel must pass it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import cases
import invariants
import mutants
from conftest import require
from mutants import HONEST, MUTANTS, Mutant
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import PORTABLE
from rerank_kernels.ops.sequences import Sequences

Serve = Callable[..., None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """serve(linear=kernel): every op from the honest kernels, this one from the given one."""

    def serve(**kernels: Callable[..., Any]) -> None:
        monkeypatch.setattr(registry, "select", lambda op, device, mode=PORTABLE: {**HONEST, **kernels}[op])

    return serve


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(serve: Serve, mutant: Mutant) -> None:
    case = cases.get(mutant.case)
    assert case.op == mutant.op
    serve()
    if mutant.test is not invariants.thread_invariant:  # which the honest kernels of this file do not promise
        mutant.test(case, mutant.dtype)
    serve(**{mutant.op: mutant.kernel})
    with pytest.raises(AssertionError, match=r"differ|beyond the bound"):
        mutant.test(case, mutant.dtype)


@pytest.mark.parametrize("case", ["pool-33-mean", "attention-D40-H2of2-T70"])
def test_mask_mutant_is_caught(serve: Serve, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    serve()
    invariants.padding_invariant(cases.get(case), torch.float32)
    monkeypatch.setattr(Sequences, "from_mask", mutants.mask_ignored)
    with pytest.raises(AssertionError):
        invariants.padding_invariant(cases.get(case), torch.float32)


def test_every_invariant_and_every_op_has_a_mutant() -> None:
    public = {n: f for n, f in vars(invariants).items() if inspect.isfunction(f) and f.__module__ == invariants.__name__}
    wanted = {n for n, f in public.items() if n[0] != "_" and list(inspect.signature(f).parameters) == ["case", "dtype"]}
    assert wanted >= {"right", "repeatable", "hidden_keys"} and {m.test.__name__ for m in MUTANTS} == wanted
    assert {m.op for m in MUTANTS} == set(HONEST) == set(registry.OPS)


@pytest.mark.parametrize("op", registry.OPS)
def test_new_memory_of_the_cpu_backend_holds_nan(op: str) -> None:
    """What the library asks PyTorch for is filled before the kernel sees it (conftest.py): a place nobody writes would show."""
    require("cpu")
    case = next(c for c in cases.CASES if c.op == op and c.total)
    rows, shared = case.make_rows(torch.float32), case.make_shared(torch.float32)
    with registry.use("cpu"):
        case.call(rows, shared)  # weights laid out
        with torch.profiler.profile() as ran:
            out = case.call(rows, shared)
    called = Counter(e.name for e in ran.events())
    assert called["aten::fill_"] == called["aten::empty"] + called["aten::empty_strided"] >= len(out), called


def test_differences_are_reported_in_full() -> None:
    want = torch.tensor([[1.0, 2.0], [0.0, float("nan")]])
    got = want.clone()
    invariants.same(got, want, "nan")
    got[1, 0] = -0.0
    with pytest.raises(
        AssertionError, match=r"zeros: 1 of 4 values differ, by up to 0 ulp; first at \(1, 0\): got 0x80000000 \(-0"
    ):
        invariants.same(got, want, "zeros")
    got = torch.nextafter(want, torch.tensor(3.0))
    with pytest.raises(
        AssertionError, match=r"3 of 4 .* at \(0, 0\): got 0x3f800001 \(1.00000011.*want 0x3f800000 \(1.0\), 1 ulp"
    ):
        invariants.same(got, want, "neighbours")
    with pytest.raises(AssertionError, match=r"signs: .* by up to 3 ulp"):
        invariants.same(torch.tensor([2.0**-149]), torch.tensor([-(2.0**-148)]), "signs")
    with pytest.raises(AssertionError, match=r"dtype torch.float16, want torch.float32"):
        invariants.same(torch.zeros(1).half(), torch.zeros(1), "dtypes")
    with pytest.raises(AssertionError, match=r"shape \(1,\), want \(2,\)"):
        invariants.same(torch.zeros(1), torch.zeros(2), "shapes")
