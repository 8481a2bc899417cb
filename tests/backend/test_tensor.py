"""Mode "tensor" in the simulator: right against float64, and every promise bit for bit, whatever a tensor core's way of adding.

A mirror of invariants.Promises for the ops that tensor cores change; the mutants are in test_tensor_mutants.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

import gpu
import invariants
import tensor
from cases import Case
from conftest import ran
from golden import digest
from rerank_kernels.backend.modes import TENSOR
from tensor import MODELS, simulated

CASES = tensor.CASES


# Triton compiles for minutes: test_triton.py has the short form that `make test` runs
@pytest.fixture(
    params=[
        pytest.param((b, d), id=f"{b}-{str(d)[6:]}", marks=[pytest.mark.exhaustive] * (b == "triton"))
        for b in tensor.BACKENDS
        for d in tensor.HALVES
    ]
)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[str, torch.dtype]]:
    ran(request.param[0])
    yield request.param


Served = tuple[str, torch.dtype]


@pytest.fixture
def models(served: Served, request: pytest.FixtureRequest) -> tuple[int, ...]:
    """Under which models the invariants are held. Batch-invariant: each in float16; the H100's in bfloat16, and for long
    sequences, which take long. Padding-invariant: the H100's, for what a kernel is given of a padded batch is the packed one's.
    `make test-all` takes each."""
    case = request.node.callspec.params["case"]
    short = served[1] == torch.float16 and max(case.lengths, default=0) <= 256 and "batch" in request.function.__name__
    return tuple(MODELS) if short or request.config.getoption("--exhaustive") else (tensor.H100,)


class TestTensor:
    def test_right(self, served: Served, case: Case) -> None:
        """Within the bound of NUMERICS.md of float64 on the rounded inputs, under every model; races are the same in each."""
        for model in MODELS:
            with simulated(served[0], model, race=model == tensor.H100):
                invariants.right(case, served[1])

    def test_repeatable(self, served: Served, case: Case) -> None:
        with simulated(served[0]):
            invariants.repeatable(case, served[1])

    def test_batch_invariant(self, served: Served, models: tuple[int, ...], case: Case) -> None:
        for model in models:
            with simulated(served[0], model):
                invariants.batch_invariant(case, served[1])

    def test_padding_invariant(self, served: Served, models: tuple[int, ...], case: Case) -> None:
        """Padded places hold NaN."""
        for model in models:
            with simulated(served[0], model):
                invariants.padding_invariant(case, served[1])

    def test_thread_invariant(self, served: Served, case: Case) -> None:
        with simulated(served[0], tensor.H100):
            invariants.schedule_invariant(case, served[1], lambda **how: simulated(served[0], tensor.H100, **how))


GOLDEN = gpu.golden_tensor()


def test_golden_tensor_is_whole() -> None:
    """Every case has a hash, of an H100 or of the simulator, and they are of today's version."""
    assert json.loads(gpu.TENSOR_FILE.read_text())["version"] == TENSOR.version
    assert set(GOLDEN) == {str(c) for c in CASES}
    assert {by for _, by in GOLDEN.values()} <= {"NVIDIA H100 80GB HBM3", "the simulator"}


@pytest.mark.parametrize("held", CASES, ids=str)
def test_same_bits_as_an_h100(held: Case) -> None:
    """Hashes that an H100 gave (`python tests/gpu.py golden` wrote them), against nvcc's PTX in the simulator with
    that chip's way of adding: kernels, launchers and the simulator's mma are held to real hardware on a machine without it.
    Where none gave one yet, as for all of version 2 but linear without gelu and bmm: against yesterday's simulator."""
    ran("cuda")
    hashes, by = GOLDEN[str(held)]
    for dtype in tensor.HALVES:
        with simulated("cuda", tensor.H100):
            got = digest(*held.call(held.make_rows(dtype), held.make_shared(dtype)))
        assert got == hashes[str(dtype)[6:]], f"{held}, {dtype}: not the bits of {by}"
