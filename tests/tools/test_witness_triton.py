"""tools/witness on Triton's kernels with one deliberate fault each, which it must find. Run by `make cuda-check`, after it has
looked at every kernel and at docs/GPU.md."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import rerank_kernels as rk
from conftest import ran
from simulated import triton as simulated
from simulated.triton import Edit, simulated_triton
from tools.witness.triton_kernels import witnessed

pytestmark = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def _triton() -> None:
    ran("triton")


def said(arch: int, edit: Edit | None, **options: Any) -> str:
    """What is said of a linear with gelu, 2048 x 768 x 768."""
    x, w = torch.zeros(2048, 768).half(), torch.zeros(768, 768).half()
    with simulated_triton(arch=arch, starts=False, edit=edit):
        rk.linear(x, w, activation="gelu", **options)
    return "\n".join(witnessed("", simulated.used[-1], arch).defects())


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("mode", ["portable", "tensor"])
def test_kernels_as_they_should_be_have_no_defects(arch: int, mode: str) -> None:
    assert said(arch, None, mode=mode) == ""


@pytest.mark.parametrize(
    ("arch", "mode", "edit", "found"),
    [
        (
            90,
            "tensor",
            Edit("linear.py", "LinearTensorTile(128, 128, 8, 4)", "LinearTensorTile(32, 64, 4, 4)"),
            "wants HGMMA, has",
        ),
        (
            80,
            "tensor",
            Edit("linear.py", "LinearTensorTile(128, 128, 8, 3)", "LinearTensorTile(128, 128, 4, 3)"),
            "of spills",
        ),
        (
            80,
            "tensor",
            Edit("linear.py", "LinearTensorTile(128, 128, 8, 3)", "LinearTensorTile(128, 128, 8, 6)"),
            "of shared memory",
        ),
        (80, "portable", Edit("linear.py", 'input_precision="ieee"', 'input_precision="tf32"'), "machine code: .*HMMA"),
        (
            80,
            "portable",
            Edit("launch.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True'),
            "PTX outside the contract",
        ),
    ],
)
def test_a_faulty_kernel_is_found(arch: int, mode: str, edit: Edit, found: str) -> None:
    assert re.search(found, said(arch, edit, mode=mode)), found
