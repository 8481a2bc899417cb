"""The numeric mode of a call: an op's `mode`, else that of the patched model whose forward is running, else "portable".

Per model, thread and task; restored on any exit. There is no global switch: what a model gives must not hang on who set what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backends import registry

_of_the_model: ContextVar[str] = ContextVar("rerank_kernels_mode", default="portable")


@contextlib.contextmanager
def of_the_model(mode: str) -> Iterator[None]:
    """Inside the block ops that are not told otherwise compute in `mode`."""
    token = _of_the_model.set(mode)
    try:
        yield
    finally:
        _of_the_model.reset(token)


def resolve(op: str, mode: str | None, **operands: Tensor) -> str:
    """The mode of this call; in mode "tensor" the operands of the product must be half precision, all of one dtype."""
    mode = _of_the_model.get() if mode is None else mode
    check.choice(op, "mode", mode, registry.MODES)
    if mode == "tensor":
        first = next(iter(operands))
        for name, t in operands.items():
            if t.dtype not in (torch.float16, torch.bfloat16) or t.dtype != operands[first].dtype:
                like = "" if name == first else f" like {first}, {operands[first].dtype}"
                raise TypeError(
                    f"{op}: {name} must be float16 or bfloat16{like} in mode 'tensor', got {t.dtype}; "
                    "convert the model with .half() or .bfloat16(), or take mode='portable'"
                )
    return mode
