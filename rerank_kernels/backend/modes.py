"""Numeric modes: in which arithmetic the products of a call are added. The user chooses one; a shape never does.

The mode of a call is the op's `mode`, else that of the patched model whose forward runs, else PORTABLE. It is kept per model,
thread and task, and restored on any exit. There is no global switch: what a model gives must not depend on who set what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.version import NUMERICS_VERSION

# In the order in which NUMERICS.md, section 1, explains them.
PROMISES = ("repeatable", "batch-invariant", "padding-invariant", "thread-invariant", "machine-invariant")


@dataclass(frozen=True, eq=False)  # each is one object, so that a comparison and a hash cost nothing on the way to an op
class Mode:
    """A numeric mode.

    name: what the user writes. arithmetic: the class of its products, the way in which they are added; NUMERICS.md says it in
    full. version: of its bits; a change of any of them is another. ops: those that it changes; a backend serves each by a
    function named <op>_<mode>, and all other ops as in PORTABLE. promises: what a backend may promise in it, at most. operands:
    the dtypes that its products take, all of one call in one. needs: what a device must have for it.
    """

    name: str
    arithmetic: str
    version: int
    promises: tuple[str, ...]
    ops: tuple[str, ...] = ()
    operands: tuple[torch.dtype, ...] = check.FLOATS
    needs: str = ""

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, and what comes out of a pickle, is the mode itself."""
        return named, ("mode", self.name)

    def function(self, op: str) -> str:
        """The name of the function in a backend's folder that computes `op` in this mode."""
        return f"{op}_{self.name}" if op in self.ops else op

    def check(self, op: str, **operands: Tensor) -> None:
        """Raises TypeError where the mode does not take the operands of a product."""
        if self.operands == check.FLOATS:
            return
        first = next(iter(operands))
        for name, t in operands.items():
            if t.dtype not in self.operands or t.dtype != operands[first].dtype:
                like = "" if name == first else f" like {first}, {operands[first].dtype}"
                raise TypeError(
                    f"{op}: {name} must be float16 or bfloat16{like} in mode {self.name!r}, got {t.dtype}; "
                    "convert the model with .half() or .bfloat16(), or take mode='portable'"
                )


PORTABLE = Mode("portable", "fma32", NUMERICS_VERSION, PROMISES)
TENSOR = Mode(
    "tensor",
    "hopper",
    2,
    PROMISES[:4],  # on GPUs of one arithmetic class
    ("linear", "bmm", "attention", "sparse_ffn"),
    (torch.float16, torch.bfloat16),
    "a GPU's tensor cores",
)
MODES = {mode.name: mode for mode in (PORTABLE, TENSOR)}

_of_the_model: ContextVar[Mode] = ContextVar("rerank_kernels_mode", default=PORTABLE)


def named(op: str, mode: str | Mode) -> Mode:
    """The mode of that name; an error of `op` for any other."""
    if isinstance(mode, Mode):
        return mode
    check.choice(op, "mode", mode, tuple(MODES))
    return MODES[mode]


@contextlib.contextmanager
def of_the_model(mode: Mode) -> Iterator[None]:
    """Inside the block ops that are not told otherwise compute in `mode`."""
    token = _of_the_model.set(mode)
    try:
        yield
    finally:
        _of_the_model.reset(token)


def around() -> Mode:
    """The mode of the patched model whose forward runs, else PORTABLE."""
    return _of_the_model.get()


def resolve(op: str, mode: str | Mode | None, **operands: Tensor) -> Mode:
    """The mode of this call, with the operands of its product checked."""
    found = _of_the_model.get() if mode is None else named(op, mode)
    found.check(op, **operands)
    return found
