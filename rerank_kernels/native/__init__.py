"""The compiled backends' Python side: loads the library, prepacks weights, calls torch.ops.rerank_kernels.

PyTorch's dispatcher picks cpu or cuda by the tensors; the six files here only add what a dispatcher cannot know.
"""

from __future__ import annotations

import functools
import pathlib

import torch


@functools.cache
def missing() -> str | None:
    """Loads the library once; says why it cannot."""
    found = sorted(pathlib.Path(__file__).parent.parent.glob("_C*.so"))
    if not found:
        return "the C++ library was not built (no compiler at install time, or RERANK_KERNELS_BUILD_CPU=0)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the C++ library does not load with torch {torch.__version__}: {error}"
    return None
