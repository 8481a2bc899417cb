"""The compiled backends' Python side: loads the libraries, calls torch.ops.rerank_kernels, keeps sparse_ffn's layouts.

PyTorch's dispatcher picks cpu or cuda by the tensors; the six files here only add what a dispatcher cannot know.
"""

from __future__ import annotations

import functools
import pathlib

import torch

PACKAGE = pathlib.Path(__file__).parent.parent


@functools.cache
def missing() -> str | None:
    """Loads the C++ library once; says why it cannot."""
    return _load("_C", "the C++ library", "_not_built.txt")


@functools.cache
def missing_cuda() -> str | None:
    """Loads the CUDA library once; says why it cannot, or that there is no GPU. Its ops' signatures are the C++ library's."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    reason = missing() or _load("_cuda", "the CUDA library", "_no_cuda.txt")
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return None if best >= (8, 0) else f"the kernels need compute capability 8.0, this GPU has {best[0]}.{best[1]}"


def _load(stem: str, what: str, reason: str) -> str | None:
    found = sorted(PACKAGE.glob(f"{stem}*.so"))
    if not found:
        said = PACKAGE / reason  # by setup.py
        why = said.read_text(encoding="utf-8").strip() if said.exists() else "this is a checkout that was never installed"
        return f"{what} was not built: {why}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{what} does not load with torch {torch.__version__}: {error}"
    return None
