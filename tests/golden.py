"""golden.json: hashes of the bits that numerics version N of the cpu backend gives, on every machine: of every case of every
op, and of the numbers at the end of every served way (finals.py): logits, scores, embeddings, cosines, what a system returns.

Other tests compare a result with another result of today, test_golden.py with yesterday's. A change of any bit is a new
numerics version: raise rerank_kernels.NUMERICS_VERSION (and the one in csrc/numerics.h), then

    python tests/golden.py --write

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
import torch
from torch import Tensor

import finals
import rerank_kernels
from cases import CASES, DTYPES, Case
from rerank_kernels.backend import registry

FILE = pathlib.Path(__file__).with_name("golden.json")
HOW = "see the head of tests/golden.py"
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


FIRST = finals.FAMILIES[:3]  # one hash for them all; each that came later has one of its own


def final_inputs(families: Sequence[str] = FIRST) -> str:
    """The tokens and weights that the served ways begin with: if this differs, a tokenizer or the generator changed."""
    tensors = [torch.tensor(finals.tokenizer(f)(text)["input_ids"]).int() for f in families for text in finals.TEXTS]
    weights = [p.detach() for f in families for head in (True, False) for p in finals.model(f, head=head).parameters()]
    return digest(*(t.view(torch.float32) for t in tensors), *weights)


def later_inputs() -> dict[str, str]:
    return {family: final_inputs([family]) for family in finals.FAMILIES if family not in FIRST}


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
