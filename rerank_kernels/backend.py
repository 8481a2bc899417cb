"""The one registry: which backends there are, why the others are not, and who serves an op on a device.

The choice depends on the op, the device and the user's word, never on a shape: default by device (cpu: "cpu", else
"pytorch"; cuda: "cuda"), changed by `with use("pytorch")` or RERANK_KERNELS_BACKEND. Asked for and missing is an error;
nothing falls back quietly. A new backend is one folder with the six family names and one entry in BACKENDS.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

# op -> the family file that holds it in every backend's folder
OPS = {
    "layer_norm": "norm",
    "softmax": "softmax",
    "sum": "softmax",
    "mean": "softmax",
    "linear": "linear",
    "activation": "linear",
    "attention": "attention",
    "pool": "pooling",
    "sigmoid": "pooling",
    "score_head": "pooling",
    "sparse_ffn": "sparse_ffn",
}
# What tensor cores change: in mode "tensor" these ops are served by the family's function <op>_tensor; all others are the same
# in both modes.
TENSOR_OPS = ("linear", "bmm", "attention", "sparse_ffn")
MODES = ("portable", "tensor")
PROMISES = ("repeatable", "batch-invariant", "padding-invariant", "thread-invariant", "portable")
ENVIRONMENT = "RERANK_KERNELS_BACKEND"


class BackendError(RuntimeError):
    """No backend can serve the op on the device, or the one asked for is not there; the message says who can and why not."""


@dataclass(frozen=True)
class Backend:
    name: str
    package: str  # holds the six family modules
    devices: tuple[str, ...]
    promises: tuple[str, ...]
    missing: Callable[[], str | None]  # why it cannot run here, None if it can
    tensor: tuple[str, ...] = ()  # the promises of mode "tensor", on one GPU architecture; none: it has no such mode


def _native_missing() -> str | None:
    from rerank_kernels import native

    return native.missing()


def _cuda_missing() -> str | None:
    from rerank_kernels import native

    return native.missing_cuda()


def _triton_missing() -> str | None:
    from rerank_kernels import triton

    return triton.missing()


BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "rerank_kernels.native", ("cpu",), PROMISES, _native_missing),
        Backend("cuda", "rerank_kernels.native", ("cuda",), PROMISES, _cuda_missing, PROMISES[:4]),
        Backend("triton", "rerank_kernels.triton", ("cuda",), PROMISES, _triton_missing, PROMISES[:4]),
        Backend("pytorch", "rerank_kernels.pytorch", ("cpu",), PROMISES[:3], lambda: None),
    )
}

_asked: ContextVar[str | None] = ContextVar("rerank_kernels_backend", default=None)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Serve every op inside the block from backend `name`; re-entrant, restored on any exit, per thread and task."""
    _get(name, f"use({name!r})")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def active(device: torch.device | str = "cpu") -> Backend:
    """The backend that serves `device` now."""
    kind = torch.device(device).type
    name, asked_by = _asked.get(), "use(...)"
    if name is None:
        name, asked_by = os.environ.get(ENVIRONMENT) or None, ENVIRONMENT
    if name is not None:
        chosen = _get(name, asked_by)
        if kind not in chosen.devices:
            raise BackendError(f"backend {name!r} (asked for by {asked_by}) does not serve {kind} tensors; {_who(kind)}")
        return chosen
    for candidate in BACKENDS.values():
        if kind in candidate.devices and missing(candidate.name) is None:
            return candidate
    raise BackendError(f"no backend serves {kind} tensors; {_who(kind)}; move the tensors with .to('cpu')")


def select(op: str, device: torch.device, mode: str = "portable") -> Callable[..., Any]:
    """The function that computes `op` on `device`; in mode "tensor", for an op of TENSOR_OPS, the one named <op>_tensor."""
    chosen = active(device)
    if mode == "portable":
        return _load(chosen.name, op)
    if not chosen.tensor:
        having = " or ".join(b.name for b in BACKENDS.values() if b.tensor)
        raise BackendError(
            f"{op}: mode 'tensor' needs a GPU's tensor cores, and backend {chosen.name!r} serves {torch.device(device).type} "
            f"tensors without; move them to a GPU for backend {having}, or take mode='portable'"
        )
    return _load(chosen.name, f"{op}_tensor")


@functools.cache
def missing(name: str) -> str | None:
    """Why backend `name` cannot run here, None if it can. Decided once per process."""
    return BACKENDS[name].missing()


@functools.cache
def _load(name: str, op: str) -> Callable[..., Any]:
    module = importlib.import_module(f"{BACKENDS[name].package}.{OPS[op.removesuffix('_tensor')]}")
    function = getattr(module, op, None)
    if function is None:
        raise BackendError(f"{op}: backend {name!r} has no such op")
    return function


def _get(name: str, asked_by: str) -> Backend:
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r} (asked for by {asked_by}); there are {', '.join(BACKENDS)}")
    if reason := missing(name):
        others = _who(BACKENDS[name].devices[0])
        raise BackendError(f"backend {name!r} (asked for by {asked_by}) is not available: {reason}; {others}")
    return BACKENDS[name]


def _who(kind: str) -> str:
    words = []
    for b in BACKENDS.values():
        if kind not in b.devices:
            words.append(f"{b.name} serves {', '.join(b.devices)} only")
        else:
            words.append(f"{b.name}: {missing(b.name) or 'available'}")
    return "; ".join(words)


class BackendTable(dict[str, dict[str, str]]):
    """op -> backend -> "yes" or the reason of the gap; prints as a table."""

    def __str__(self) -> str:
        wide = max(len(op) for op in self) + 2
        lines = ["op".ljust(wide) + "".join(name.ljust(10) for name in BACKENDS)]
        lines += [
            op.ljust(wide) + "".join(("yes" if v == "yes" else "-").ljust(10) for v in row.values()) for op, row in self.items()
        ]
        for b in BACKENDS.values():
            lines.append(
                f"{b.name}: {missing(b.name) or 'serves ' + ', '.join(b.devices) + '; promises ' + ', '.join(b.promises)}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def backends() -> BackendTable:
    """Which backend has which op here, and why not where it has not."""
    table = BackendTable()
    for op in OPS:
        table[op] = {}
        for name in BACKENDS:
            reason = missing(name)
            if reason is None:
                try:
                    _load(name, op)
                except BackendError as error:
                    reason = str(error)
            table[op][name] = reason or "yes"
    return table
