"""Fixtures of every stack's tests, and the file that a run leaves for stacks/compare.py."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import common
import pytest
import torch

PINS = Path(__file__).parent / "pins"
CASES = [(model, dtype) for model in ("minilm", "xlmr") for dtype in common.DTYPES if (model, dtype) != ("xlmr", "bfloat16")]


def pytest_report_header(config: pytest.Config) -> str:
    import rerank_kernels as rk
    from rerank_kernels.backend import registry

    return f"rerank_kernels from {Path(rk.__file__).parent}, backend {registry.active('cpu').name}"


def versions(name: str) -> dict[str, str]:
    """Of what the stack pins, as installed, which has to be what it pins."""
    lines = [line for line in (PINS / f"{name}.txt").read_text().splitlines() if not line.startswith("#")]
    wanted = {line.partition("==")[0].partition("[")[0]: line.partition("==")[2] for line in lines}
    found = {n: importlib.metadata.version(n).partition("+")[0] for n in wanted}
    assert found == wanted, "what is installed is not what is pinned; remove .stacks, and make stacks builds it anew"
    return {"python": platform.python_version()} | found


@pytest.fixture(scope="session")
def stack() -> str:
    """The name of the environment: that of its file in stacks/pins."""
    return os.environ["STACKS_NAME"]


@pytest.fixture(scope="session")
def results(stack: str) -> Iterator[common.Results]:
    found = common.Results(Path(os.environ["STACKS_RESULTS"]) / f"{stack}.json", {"stack": stack, "versions": versions(stack)})
    began = time.monotonic()
    yield found
    found.note("about", "seconds", round(time.monotonic() - began, 1))
    found.note("about", "threads", torch.get_num_threads())


@pytest.fixture(params=CASES, ids=[f"{model} {dtype}" for model, dtype in CASES])
def case(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """A model folder of stacks/prepare.py and the dtype to load it in."""
    model, dtype = request.param
    return str(common.data() / model), getattr(torch, dtype)
