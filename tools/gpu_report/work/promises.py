"""The promises, on a case of each op in each mode: right, repeatable, batch-invariant, padding-invariant, on this GPU. That the
bits are every machine's is `golden`'s to say.
"""

from __future__ import annotations

import sys

import torch

import cases as listed
import gpu
import invariants
import tensor
from rerank_kernels.backend import registry
from tools.gpu_report.work.cases import cases, say

CHECKS = {
    "right": invariants.right,
    "repeatable": invariants.repeatable,
    "batch-invariant": invariants.batch_invariant,
    "padding-invariant": invariants.padding_invariant,
}


def main(served_by: str) -> None:
    if reason := registry.missing(served_by):
        sys.exit(f"backend {served_by}: {reason}")
    todo = {f"{c}, {mode}, {str(d)[6:]}": (c, mode, d) for mode, c, dtypes in chosen() for d in dtypes}
    with registry.use(served_by):
        for name in cases(list(todo)):
            case, mode, dtype = todo[name]
            say(case=name, backend=served_by, mode=mode, **held(case, dtype))


def chosen() -> list[tuple[str, listed.Case, tuple[torch.dtype, ...]]]:
    """(mode, case, dtypes): the largest case of each op."""
    found = []
    for mode, among, dtypes in (
        ("tensor", tensor.CASES, tensor.HALVES),
        ("portable", listed.CASES, (torch.float32, torch.float16)),
    ):
        largest: dict[str, listed.Case] = {}
        for case in among:
            if case.op not in largest or size(case) > size(largest[case.op]):
                largest[case.op] = case
        found += [(mode, gpu.on_gpu(case), dtypes) for case in largest.values()]
    return found


def size(case: listed.Case) -> int:
    shapes = [(case.total, *shape) for shape in case.rows.values()] + list(case.shared.values())
    return sum(torch.Size(shape).numel() for shape in shapes)


def held(case: listed.Case, dtype: torch.dtype) -> dict[str, object]:
    fallen = []
    for name, check in CHECKS.items():
        try:
            check(case, dtype)
        except AssertionError as error:
            fallen.append(f"{name}: {' '.join(str(error).split())[:300]}")
    return {"holds": len(CHECKS) - len(fallen)} | ({"wrong": "; ".join(fallen)} if fallen else {})
