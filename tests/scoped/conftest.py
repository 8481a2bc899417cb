"""A scope on the pytorch backend promises less (README.md), so these tests want the C++ library."""

from __future__ import annotations

import pytest

from rerank_kernels.backend import registry


@pytest.fixture(autouse=True)
def _library() -> None:
    if why := registry.missing("cpu"):
        pytest.skip(f"backend cpu: {why}")
