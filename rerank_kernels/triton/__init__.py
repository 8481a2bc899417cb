"""Triton kernels for CUDA tensors, mode portable: the bits of csrc/numerics.h, with numerics.py as its twin.

Weights are read as nn.Linear holds them. This file does not import Triton, so that a machine without it can ask what it lacks.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot run here, None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None if torch.cuda.is_available() else "no CUDA device"
