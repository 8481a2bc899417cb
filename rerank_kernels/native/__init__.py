"""The compiled backends' Python side: loads the libraries, calls torch.ops.rerank_kernels, keeps sparse_ffn's layouts.

PyTorch's dispatcher picks cpu or cuda by the tensors; the six files here only add what a dispatcher cannot know.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def holding_threads() -> Iterator[None]:
    """Inside the block PyTorch's own operations run on this thread alone, and ours on as many as before; re-entrant.

    What PyTorch does between our ops is short, but its OpenMP threads spin for milliseconds after each, on the cores that ours
    want next, and in a forked child they are waited for for ever. Other threads of the program notice nothing.
    """
    before = torch.ops.rerank_kernels.hold_threads(0)
    try:
        yield
    finally:
        if before:
            torch.ops.rerank_kernels.hold_threads(before)


def threads() -> int:
    """How many threads an op on CPU tensors may use now: torch.get_num_threads(), or what that was when the block above began."""
    return int(torch.ops.rerank_kernels.hold_threads(-1)) if missing() is None else torch.get_num_threads()


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
