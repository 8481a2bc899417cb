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
    package = pathlib.Path(__file__).parent.parent
    found = sorted(package.glob("_C*.so"))
    if not found:
        said = package / "_not_built.txt"  # by setup.py
        why = said.read_text(encoding="utf-8").strip() if said.exists() else "this is a checkout that was never installed"
        return f"the C++ library was not built: {why}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the C++ library does not load with torch {torch.__version__}: {error}"
    return None
