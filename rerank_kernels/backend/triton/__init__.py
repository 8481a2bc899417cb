"""Triton kernels for CUDA tensors. Mode portable: the bits of csrc/numerics.h, with numerics.py as its twin; mode tensor:
<op>_tensor beside the op.

Weights are read as nn.Linear holds them. This file does not import Triton, so that a machine without it can ask what it lacks.
Triton compiles for other makers' GPUs too, but what is promised was looked at in NVIDIA's PTX alone: others are refused.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot run here, None if they can."""
    if torch.version.hip is not None:
        return (
            f"torch {torch.__version__} is a ROCm build, and AMD GPUs are not served: the kernels' bits were checked "
            "only in what Triton compiles for NVIDIA GPUs"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= (8, 0) else f"the kernels need compute capability 8.0, this GPU has {best[0]}.{best[1]}"
