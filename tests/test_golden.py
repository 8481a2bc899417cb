"""golden.json: hashes of the bits that numerics version N of the cpu backend gives, on every machine: of every case of every
op, and of the numbers at the end of every served way (finals.py): logits, scores, embeddings, cosines, what a system returns.

The other tests compare a result with another result of today; this one with yesterday's. A change of any bit is a new numerics
version: raise rerank_kernels.NUMERICS_VERSION (and the one in csrc/numerics.h), then

    python tests/test_golden.py --write

The same command adds new cases. It refuses to replace a hash of the same numerics version; --force does that, for a version
that has not been released yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import conftest
import finals
import rerank_kernels
from cases import DTYPES, Case
from invariants import force_isa
from rerank_kernels.backend import registry
from rerank_kernels.backend.registry import Backend

CASES = cases.CASES
FILE = pathlib.Path(__file__).with_name("golden.json")
Hashes = dict[str, dict[str, str]]


def digest(*tensors: Tensor) -> str:
    """Shape and little-endian bytes."""
    h = hashlib.sha256()
    for t in tensors:
        assert not t.isnan().any(), "a NaN's payload is not part of the contract"
        bits = t.contiguous().view(torch.int32 if t.dtype == torch.float32 else torch.int16).numpy()
        h.update(repr(tuple(t.shape)).encode())
        h.update(np.ascontiguousarray(bits, bits.dtype.newbyteorder("<")).tobytes())
    return h.hexdigest()


def inputs(case: Case) -> str:
    """One hash for all dtypes: if this differs, the generator changed, not a kernel."""
    tensors = [t for d in DTYPES for t in (*case.make_rows(d).values(), *case.make_shared(d).values())]
    return digest(*tensors)


def outputs(case: Case, dtype: torch.dtype) -> str:
    return digest(*case.call(case.make_rows(dtype), case.make_shared(dtype)))


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text())


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


FIRST = finals.FAMILIES[:3]  # one hash for them all; each that came later has one of its own


def final_inputs(families: Sequence[str] = FIRST) -> str:
    """The tokens and weights that the served ways begin with: if this differs, a tokenizer or the generator changed."""
    tensors = [torch.tensor(finals.tokenizer(f)(text)["input_ids"]).int() for f in families for text in finals.TEXTS]
    weights = [p.detach() for f in families for head in (True, False) for p in finals.model(f, head=head).parameters()]
    return digest(*(t.view(torch.float32) for t in tensors), *weights)


def later_inputs() -> dict[str, str]:
    return {family: final_inputs([family]) for family in finals.FAMILIES if family not in FIRST}


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


HOW = "see the head of tests/test_golden.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("--force", action="store_true", help="replace hashes of the same numerics version")
    force = parser.parse_args().force
    version = rerank_kernels.NUMERICS_VERSION
    old = read() if FILE.exists() else {"numerics_version": version, "cases": {}}
    new: Hashes = {}
    with registry.use("cpu"):
        for case in CASES:
            new[str(case)] = {"inputs": inputs(case), **{str(d)[6:]: outputs(case, d) for d in DTYPES}}
        ends = {way: digest(*finals.WAYS[way]()()) for way in finals.WAYS}
    before = old.get("finals", {})
    changed = [name for name, hashes in new.items() if old["cases"].get(name, hashes) != hashes]
    changed += [way for way, one in ends.items() if before.get(way, one) != one]
    later = old.get("later inputs", {})
    changed += [f"inputs of {family}" for family, one in later_inputs().items() if later.get(family, one) != one]
    if changed and old["numerics_version"] == version and not force:
        print(f"numerics version {version} has other hashes for {', '.join(changed)}: nothing written.")
        print("Raise rerank_kernels.NUMERICS_VERSION, or --force if version", version, "was never released.")
        return 1
    whole = {
        "numerics_version": version,
        "cases": new,
        "final inputs": final_inputs(),
        "later inputs": later_inputs(),
        "finals": ends,
    }
    FILE.write_text(json.dumps(whole, indent=1) + "\n")
    versions = f"numerics version {old['numerics_version']} -> {version}"
    print(f"{len(new)} cases, {len(ends)} served ways, {len(changed)} changed, {versions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
