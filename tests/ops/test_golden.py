"""Every case and every served way has the bits that this numerics version gave when golden.py wrote their hashes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import conftest
import finals
import rerank_kernels
from cases import Case
from golden import HOW, digest, final_inputs, inputs, later_inputs, outputs, read
from invariants import force_isa
from rerank_kernels.backend import registry
from rerank_kernels.backend.registry import Backend

CASES = cases.CASES


def test_version() -> None:
    assert read()["numerics_version"] == rerank_kernels.NUMERICS_VERSION, "new numerics version: " + HOW


def test_no_stale_hashes() -> None:
    assert set(read()["cases"]) <= {str(case) for case in CASES}, HOW
    assert set(read()["finals"]) <= set(finals.WAYS), HOW


def test_inputs(case: Case) -> None:
    assert read()["cases"].get(str(case), {}).get("inputs") == inputs(case), f"{case}: not the inputs that were hashed; " + HOW


@pytest.mark.promise("machine-invariant")
def test_golden(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    want = read()["cases"].get(str(case), {}).get(str(dtype)[6:])
    assert want is not None, f"{case}: no hash yet; " + HOW
    got = outputs(case, dtype)
    assert got == want, f"{case}, {dtype}: other bits than numerics version {rerank_kernels.NUMERICS_VERSION} gave; " + HOW


def test_final_inputs() -> None:
    assert read()["final inputs"] == final_inputs(), "not the inputs that were hashed; " + HOW
    assert read()["later inputs"] == later_inputs(), "not the inputs that were hashed; " + HOW


@pytest.mark.parametrize("way", finals.WAYS)
def test_finals(way: str) -> None:
    """On each instruction set."""
    conftest.ran("cpu")
    want = read()["finals"].get(way)
    assert want is not None, f"{way}: no hash yet; " + HOW
    got = {}
    with registry.use("cpu"):
        run = finals.WAYS[way]()
        try:
            for isa in conftest.ISAS:
                try:
                    force_isa(isa)
                except RuntimeError:  # this CPU has it not
                    continue
                got[isa] = digest(*run())
        finally:
            force_isa("auto")
    version = rerank_kernels.NUMERICS_VERSION
    assert set(got.values()) == {want}, f"{way}: other bits than numerics version {version} gave, with {got}; " + HOW


def test_a_last_bit_of_one_embedding_moves_the_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    conftest.ran("cpu")

    def off(x: Tensor, eps: float = 1e-12) -> Tensor:
        y = rerank_kernels.normalize(x, eps).clone()
        y[-1, -1] = torch.nextafter(y[-1, -1], y.new_tensor(2.0))
        return y

    monkeypatch.setattr(rerank_kernels.models.heads, "normalize", off)
    with registry.use("cpu"):
        for way in (way for way in finals.WAYS if way.startswith("Reranker, embeddings")):
            assert digest(*finals.WAYS[way]()()) != read()["finals"][way]
