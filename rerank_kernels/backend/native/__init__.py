"""The ops of the C++ and CUDA libraries. PyTorch's dispatcher picks cpu or cuda by the tensors; most are called as they are.

A family has a file here for what a dispatcher cannot know: how a weight is laid out, which way serves how many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def direct(op: str) -> Callable[..., Any] | None:
    """The library's op of this name, for what no file beside this one serves."""
    return getattr(getattr(torch.ops.rerank_kernels, op, None), "default", None)
