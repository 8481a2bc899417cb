"""Argument checks with one message shape: `op: argument must be WANTED, got CAME; WHAT WOULD WORK`."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_NAMES = "float32, float16 or bfloat16"


def fail(op: str, argument: str, wanted: str, came: object, hint: str = "") -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {wanted}, got {came}{'; ' + hint if hint else ''}")


def integers(op: str, name: str, value: Any) -> tuple[int, ...]:
    """One integer or several, of any type that is one by itself."""
    try:
        return (operator.index(value),)
    except TypeError:
        pass
    try:
        return tuple(map(operator.index, value))
    except TypeError:
        fail(op, name, "an integer, or several", repr(value))


def shape_of(t: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in t.shape) + "]"


def floating(op: str, **tensors: Tensor | None) -> None:
    """Each is a dense tensor of a supported dtype, all on one device, or None."""
    device = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}; use torch.as_tensor(...)")
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be {FLOAT_NAMES}, got {t.dtype}; convert it with .float()")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {t.layout}; use .to_dense()")
        try:
            if t.untyped_storage().nbytes() < t.nbytes:  # or a few values that are shown as many
                stored(op, name, t)
        except NotImplementedError:  # torch.func's wrappers have none: the op is called again with what they hold
            pass
        if device is None:
            device, first = t.device, name
        else:
            on_device(op, name, t, first, device)


def stored(op: str, name: str, t: Tensor) -> None:
    """Its storage holds what its sizes and strides say. PyTorch does not look before it copies; our library does."""
    try:
        held = t.untyped_storage().nbytes()
    except NotImplementedError:  # torch.func's wrappers have none
        return
    if t.numel() == 0:
        return
    last = t.storage_offset() + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    if held < (last + 1) * t.element_size():
        wanted = f"a tensor with memory for its {t.numel()} elements"
        fail(op, name, wanted, f"a storage of {held} bytes", "it was freed or made smaller: give a tensor that has its values")


def shape(op: str, name: str, t: Tensor, *want: int | str) -> None:
    """`want` holds sizes, or names for sizes that are free: shape("linear", "weight", w, "N", 768)."""
    sizes = t.shape
    fits = len(sizes) == len(want)
    if fits:
        for n, w in zip(sizes, want, strict=True):  # a plain loop: every op of a small model asks this several times
            # torch.jit.trace has tensors for sizes, which the op that is traced looks at when it runs
            if not isinstance(w, str) and not isinstance(n, Tensor) and n != w:
                fits = False
    if not fits:
        fail(op, name, "[" + ", ".join(str(w) for w in want) + "]", shape_of(t))


def choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        fail(op, name, "one of " + ", ".join(repr(a) for a in allowed), repr(value))


def on_device(op: str, name: str, t: object, like: str, device: torch.device) -> None:
    if isinstance(t, Tensor) and t.device != device:
        fail(op, name, f"on {device} like {like}", f"a tensor on {t.device}", f"move it with .to({str(device)!r})")
