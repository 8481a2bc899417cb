"""The backends that the tests run in the simulator, on CPU tensors, and the context manager in which each of them serves."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager

# backend -> (its context manager in the file that is named for it, beside `missing`; what runs)
SIMULATED = {
    "cuda": ("simulated", "nvcc's PTX for compute_80"),
    "triton": ("simulated_triton", "Triton's PTX for compute_80"),
}


def missing(name: str) -> str | None:
    """Why a backend cannot be simulated here, None if it can."""
    return importlib.import_module(f"simulated.{name}").missing()


def simulator(name: str) -> Callable[..., AbstractContextManager[None]]:
    return getattr(importlib.import_module(f"simulated.{name}"), SIMULATED[name][0])
