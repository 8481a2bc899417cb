"""What the tests of mode "tensor" share: the cases, the backends that have the mode, and the ways a tensor core may add.

PTX does not say in which order, and with how many digits, an mma adds its 16 products. The simulator has four models; whatever
is promised must hold under each of them, and the four must differ, or they prove nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

import cases
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import TENSOR
from simulated import served

MODELS = {0: "fma in order", 1: "exact sum, rounded once", 2: "aligned and cut off, as an H100 does", 3: "fma in reverse order"}
H100 = 2  # whose sums are that chip's, bit for bit
HALVES = (torch.float16, torch.bfloat16)
BACKENDS = tuple(registry.having_mode(TENSOR))
WIDEST_HEAD = 256


def of(op: str) -> list[cases.Case]:
    return [cases.in_tensor_mode(case) for case in cases.CASES if case.op == op]


CASES = [case for op in TENSOR.ops for case in of(op)]


def simulated(backend: str, model: int = 0, **how: Any) -> AbstractContextManager[None]:
    """Ops on CPU tensors are served by the backend's kernels; copies land at the last moment."""
    return served.simulator(backend)(mma=model, **{"lazy_async": True, **how})
