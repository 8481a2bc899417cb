"""The hashes that are written down, against those of this GPU: golden.json, which every machine gives, and golden_tensor.json,
which an H100 gave, or so far the simulator; another architecture may give others there.
"""

from __future__ import annotations

import sys

import torch

import cases as listed
import golden
import gpu
from rerank_kernels.backend import registry
from tools.gpu_report.work.cases import cases, say

WRITTEN_ON = (9, 0)  # golden_tensor.json's GPU


def main(served_by: str) -> None:
    if reason := registry.missing(served_by):
        sys.exit(f"backend {served_by}: {reason}")
    todo = {f"{case}, portable": lambda case=case: portable(case) for case in listed.CASES}
    if served_by == "cuda":
        todo |= {f"{case}, tensor": lambda case=case: in_tensor_mode(case) for case in gpu.TENSOR_CASES}
    with registry.use(served_by):
        for name in cases(list(todo)):
            say(case=name, backend=served_by, **todo[name]())


def portable(case: listed.Case) -> dict[str, object]:
    want = golden.read()["cases"].get(str(case), {})
    got = {str(d)[6:]: golden.digest(*gpu.on("cuda", case, d)) for d in listed.DTYPES}
    other = [d for d, digest in got.items() if digest != want.get(d)]
    return {"mode": "portable", "equal": len(got) - len(other)} | (
        {"wrong": f"other bits in {', '.join(other)}"} if other else {}
    )


def in_tensor_mode(case: gpu.OnGpu) -> dict[str, object]:
    want, by = gpu.golden_tensor().get(str(case), ({}, "nobody"))
    got = gpu.hashes(case)
    other = [d for d, digest in got.items() if digest != want.get(d)]
    found: dict[str, object] = {"mode": "tensor", "equal": len(got) - len(other)}
    if other and torch.cuda.get_device_capability() == WRITTEN_ON:
        found["wrong"] = f"other bits in {', '.join(other)} than {by} gave"
    elif other:
        found["note"] = f"other bits in {', '.join(other)} than {by} gave, as another architecture may have"
    return found
