"""What a NaN and an infinity in one place of one operand make of every op, in both modes (not_finite.py)."""

from __future__ import annotations

import pytest
import torch

import cases
import tensor
from cases import Case
from conftest import ran
from not_finite import not_finite
from rerank_kernels.backend.modes import TENSOR
from rerank_kernels.backend.registry import OPS, Backend
from simulated import served

LABELS = [
    "layer_norm-33",
    "layer_norm-384-residual",
    "rms_norm-33-before",
    "rms_norm-100-before-offset-residual-eps=1e-05",
    "normalize-33",
    "softmax-33",
    "sum-33",
    "mean-33",
    "linear-33x2-relu",
    "linear-64x7-residual",
    "linear-513x17-gelu",
    "bmm-5x513x3",
    *(str(c) for c in cases.CASES if c.op == "activation"),
    "rotary-D34-H5-P17",
    "attention-D40-H2of2-T70",
    "attention-D32-H4of1-T70-window=(7,3)",
    "attention-D64-H4of2-T70-causal=True-softcap=2.5",
    *(str(c) for c in cases.CASES if c.op == "pool" and c.rows["x"] == (33,)),
    "sigmoid-33",
    "score_head-100x33x3-gelu",
    "sparse_ffn-33x513x17-bias",
    "sparse_ffn-100x1030x64-gate",
]
CASES = [cases.get(label) for label in LABELS]


def test_every_op_is_here() -> None:
    assert {c.op for c in CASES} == set(OPS)
    assert set(TENSOR.ops) <= {c.op for c in CASES}


def test_not_finite(backend: Backend, case: Case) -> None:
    """In the simulator in float32 alone: kernels widen what they load."""
    for dtype in (torch.float32,) if backend.name in served.SIMULATED else cases.DTYPES:
        not_finite(case, dtype)


@pytest.mark.parametrize("by", [pytest.param(b, marks=[pytest.mark.exhaustive] * (b == "triton")) for b in tensor.BACKENDS])
@pytest.mark.parametrize("tensor_case", [cases.in_tensor_mode(c) for c in CASES if c.op in TENSOR.ops], ids=str)
def test_not_finite_in_mode_tensor(by: str, tensor_case: Case) -> None:
    ran(by)
    for dtype in tensor.HALVES:
        with tensor.simulated(by, tensor.H100):
            not_finite(tensor_case, dtype)
