"""golden.json: hashes of the bits that numerics version N of the cpu backend gives, on every machine.

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
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
import rerank_kernels
from cases import DTYPES, Case
from rerank_kernels import backend as registry
from rerank_kernels.backend import Backend

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


def test_inputs(case: Case) -> None:
    assert read()["cases"].get(str(case), {}).get("inputs") == inputs(case), f"{case}: not the inputs that were hashed; " + HOW


@pytest.mark.promise("portable")
def test_golden(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    want = read()["cases"].get(str(case), {}).get(str(dtype)[6:])
    assert want is not None, f"{case}: no hash yet; " + HOW
    got = outputs(case, dtype)
    assert got == want, f"{case}, {dtype}: other bits than numerics version {rerank_kernels.NUMERICS_VERSION} gave; " + HOW


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
    changed = [name for name, hashes in new.items() if old["cases"].get(name, hashes) != hashes]
    if changed and old["numerics_version"] == version and not force:
        print(f"numerics version {version} has other hashes for {', '.join(changed)}: nothing written.")
        print("Raise rerank_kernels.NUMERICS_VERSION, or --force if version", version, "was never released.")
        return 1
    FILE.write_text(json.dumps({"numerics_version": version, "cases": new}, indent=1) + "\n")
    print(f"{len(new)} cases, {len(changed)} changed, numerics version {old['numerics_version']} -> {version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
