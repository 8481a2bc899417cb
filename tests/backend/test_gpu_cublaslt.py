"""cuBLASLt in place of ours on a real GPU (make gpu): with the setting and without it, the same bits at every M and in a graph.

Whether it serves at all is the chip's and the version's to say, and no test's: the last lines of a run show what it said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import conftest
import invariants
import rerank_kernels as rk
import tensor
from rerank_kernels.backend import registry
from rerank_kernels.backend.native import cublaslt, proven

pytestmark = pytest.mark.gpu
ROWS = (1, 16, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200, 333, 1000, 1024, 1025, 4095, 4096)
SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 4096), (24, 40))  # N, K


@pytest.fixture(autouse=True)
def served() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if reason := registry.missing("cuda"):
        pytest.skip(f"cuda backend: {reason}")
    conftest.on_gpu.append(torch.cuda.get_device_name())
    with registry.use("cuda"):
        yield


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    yield
    with pytest.MonkeyPatch.context() as inside:
        inside.setenv(proven.SETTING, "1")
        print(proven.said())


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(params=(cublaslt.PRODUCT, cublaslt.BIAS, cublaslt.RESIDUAL))
def call(request: pytest.FixtureRequest, shape: tuple[int, int], dtype: torch.dtype) -> Callable[[int], Tensor]:
    """rk.linear of the first m rows."""
    (n, k), form = shape, request.param

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda").to(dtype)

    x, w, bias, residual = random(max(ROWS), k), random(n, k), random(n), random(max(ROWS), n)

    def called(m: int) -> Tensor:
        b, r = bias if form == cublaslt.BIAS else None, residual[:m] if form == cublaslt.RESIDUAL else None
        return rk.linear(x[:m], w, b, residual=r, mode="tensor")

    return called


@pytest.fixture(params=tensor.HALVES, ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def test_the_setting_is_in_no_bit(call: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(proven.SETTING, "0")
    ours = {m: call(m) for m in ROWS}
    monkeypatch.setenv(proven.SETTING, "1")
    for m in ROWS:
        invariants.same(call(m), ours[m], f"M = {m}, with {proven.SETTING}=1 against without")


def test_in_a_graph(call: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured before its trial, and after it."""
    monkeypatch.setenv(proven.SETTING, "0")
    ours = call(200)
    monkeypatch.setenv(proven.SETTING, "1")
    monkeypatch.setattr(proven, "_here", {})
    for words in ("before its trial", "after it"):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(200)
        graph.replay()
        invariants.same(y, ours, f"captured {words}")
        call(200)
