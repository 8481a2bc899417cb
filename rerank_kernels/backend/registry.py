"""The one registry: which backends there are, why the others are not, and who serves an op on a device.

The choice depends on the op, the device, the mode and what the user says, never on a shape. Default by device: cpu takes "cpu",
else "pytorch"; cuda takes "cuda", else "triton". RERANK_KERNELS_BACKEND changes it, `with use("pytorch")` for a block, and
patch(model, backend="triton") for one model: the narrower of them wins. A backend that was asked for and is missing is an
error. Nothing falls back silently: where pytorch serves because the C++ library is missing, a FallbackWarning says so, once
per process.
A new backend is one folder with the seven family names and one entry in BACKENDS.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from rerank_kernels.backend import library, triton
from rerank_kernels.backend.modes import MODES, PORTABLE, PROMISES, TENSOR, Mode
from rerank_kernels.errors import BackendError, FallbackWarning
from rerank_kernels.names import OPS

ENVIRONMENT = "RERANK_KERNELS_BACKEND"


@dataclass(frozen=True)
class Backend:
    name: str
    package: str  # holds the seven family modules
    devices: tuple[str, ...]
    promises: Mapping[str, tuple[str, ...]]  # the modes that it has, by name -> what it promises in each
    missing: Callable[[], str | None]  # why it cannot run here, None if it can


_BOTH = {mode.name: mode.promises for mode in (PORTABLE, TENSOR)}
BACKENDS = {
    b.name: b
    for b in (
        Backend("cpu", "rerank_kernels.backend.native", ("cpu",), {"portable": PROMISES}, lambda: library.missing()),
        Backend("cuda", "rerank_kernels.backend.native", ("cuda",), _BOTH, lambda: library.missing_cuda()),
        Backend("triton", "rerank_kernels.backend.triton", ("cuda",), _BOTH, lambda: triton.missing()),
        Backend("pytorch", "rerank_kernels.backend.pytorch", ("cpu",), {"portable": PROMISES[:3]}, lambda: None),
    )
}

_asked: ContextVar[tuple[str, str] | None] = ContextVar("rerank_kernels_backend", default=None)  # (backend, who asked)
_before: ContextVar[dict[Any, Callable[..., Any]] | None] = ContextVar("rerank_kernels_settled", default=None)


@contextlib.contextmanager
def use(name: str, *, asked_by: str | None = None) -> Iterator[None]:
    """Serve every op inside the block from backend `name`; re-entrant, restored on any exit, per thread and task.

    asked_by: what errors call whoever asked, "use('cpu')" if not given.
    """
    asked_by = asked_by or f"use({name!r})"
    get(name, asked_by)
    token = _asked.set((name, asked_by))
    try:
        yield
    finally:
        _asked.reset(token)


def _word() -> tuple[str, str] | None:
    """(backend, who asked), None where nobody did."""
    asked = _asked.get()
    if asked is None and (name := os.environ.get(ENVIRONMENT)):
        asked = name, ENVIRONMENT
    return asked


def asked() -> str | None:
    """The backend that use() or patch(model, backend=...) chose for what runs now, None where neither did."""
    chosen = _asked.get()
    return None if chosen is None else chosen[0]


def active(device: torch.device | str = "cpu") -> Backend:
    """The backend that serves `device` now."""
    kind = torch.device(device).type
    if (asked := _word()) is not None:
        name, asked_by = asked
        chosen = get(name, asked_by)
        if kind not in chosen.devices:
            raise BackendError(f"backend {name!r} (asked for by {asked_by}) does not serve {kind} tensors; {_who(kind)}")
        return chosen
    for candidate in BACKENDS.values():
        if kind in candidate.devices and missing(candidate.name) is None:
            return candidate
    raise BackendError(f"no backend serves {kind} tensors; {_who(kind)}; move the tensors with .to('cpu')")


def serves_cpu(name: str) -> bool:
    """Whether it is backend `name` that serves CPU tensors now."""
    try:
        return active("cpu").name == name
    except BackendError:  # one was asked for that has no CPU
        return False


def select(op: str, device: torch.device, mode: Mode = PORTABLE) -> Callable[..., Any]:
    """The function that computes `op` on `device` in `mode`."""
    before = _before.get()
    if before is None:
        return _select(op, device, mode)
    asked = op, device, mode, _asked.get()
    function = before.get(asked)
    if function is None:
        function = before[asked] = _select(op, device, mode)
    return function


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside the block the environment is read once per op and device: a model's forward asks for the same few all the time."""
    token = _before.set({})
    try:
        yield
    finally:
        _before.reset(token)


def _select(op: str, device: torch.device, mode: Mode) -> Callable[..., Any]:
    chosen = active(device)
    if chosen.name == "pytorch" and _word() is None:
        _fall_back()
    if mode.name not in chosen.promises:
        having = " or ".join(having_mode(mode))
        raise BackendError(
            f"{op}: mode {mode.name!r} needs {mode.needs}, and backend {chosen.name!r} serves {torch.device(device).type} "
            f"tensors without; move them to a GPU for backend {having}, or take mode='portable'"
        )
    return _load(chosen.name, op, mode)


_said_fallback = threading.Lock()


def _fall_back() -> None:
    """Before the first op that pytorch serves in the place of cpu: a warning that says why and what cures it."""
    if other := library.second_copy():
        raise BackendError(other)
    if not _said_fallback.acquire(blocking=False):
        return
    try:
        frame, level = sys._getframe(1), 2
        inside = ("rerank_kernels", "torch", "transformers")  # the warning points at the user's line
        while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in inside:
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"rerank_kernels: pytorch serves in place of cpu, slower and with other bits than the documented digits "
            f"({ENVIRONMENT}=pytorch keeps it so, without this warning). {missing('cpu')}",
            FallbackWarning,
            stacklevel=level,
        )
    except FallbackWarning:  # made an error by the user's filter: each op is one
        _said_fallback.release()
        raise


@functools.cache
def missing(name: str) -> str | None:
    """Why backend `name` cannot run here, None if it can. Decided once per process."""
    return BACKENDS[name].missing()


@functools.cache
def _load(name: str, op: str, mode: Mode = PORTABLE) -> Callable[..., Any]:
    package, function = importlib.import_module(BACKENDS[name].package), None
    if importlib.util.find_spec(f"{package.__name__}.{OPS[op]}"):
        module = importlib.import_module(f"{package.__name__}.{OPS[op]}")
        function = getattr(module, mode.function(op), None)
    if function is None and hasattr(package, "direct"):  # nothing stands before the op itself
        function = package.direct(mode.function(op))
    if function is None:
        raise BackendError(f"{mode.function(op)}: backend {name!r} has no such op")
    return function


def get(name: str, asked_by: str) -> Backend:
    """Backend `name`, or an error that says who asked for it, why it is not there, and what is."""
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
    """op -> backend -> "yes" or the reason of the gap; prints as a table.

    .modes: for each mode but "portable", by name, the same for the ops that it changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modes: dict[str, dict[str, dict[str, str]]] = {mode.name: {} for mode in MODES.values() if mode.ops}

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Rows to show: each op, and below it one per mode that changes it."""
        for op, row in self.items():
            yield op, row
            for mode, rows in self.modes.items():
                if op in rows:
                    yield f"{op}, mode {mode}", rows[op]

    def promises(self) -> Iterator[str]:
        """One line per backend: what it serves and promises in which mode, or why it is not there."""
        for b in BACKENDS.values():
            said = f"promises {', '.join(b.promises['portable'])}"
            if "tensor" in b.promises:
                said += f"; in mode tensor {', '.join(b.promises['tensor'])}, on one GPU architecture"
            there = f"serves {', '.join(b.devices)}; {said}"
            yield f"{b.name}: {missing(b.name) or there}"

    def __str__(self) -> str:
        rows = dict(self.rows())
        wide = max(len(op) for op in rows) + 2
        lines = ["op".ljust(wide) + "".join(name.ljust(10) for name in BACKENDS)]
        for op, row in rows.items():
            lines.append(op.ljust(wide) + "".join(("yes" if v == "yes" else "-").ljust(10) for v in row.values()))
        return "\n".join([*lines, *self.promises()])

    __repr__ = __str__


def backends() -> BackendTable:
    """Which backend has which op here in which mode, and why not where it has not."""
    table = BackendTable()
    for op in OPS:
        table[op] = {name: _gap(name, op) or "yes" for name in BACKENDS}
        for mode, rows in table.modes.items():
            if op in MODES[mode].ops:
                rows[op] = {name: without_mode(name, MODES[mode]) or _gap(name, op, MODES[mode]) or "yes" for name in BACKENDS}
    return table


def having_mode(mode: Mode) -> list[str]:
    """The names of the backends that have it."""
    return [b.name for b in BACKENDS.values() if mode.name in b.promises]


def without_mode(name: str, mode: Mode) -> str | None:
    """Why backend `name` cannot serve `mode` here, None if it can."""
    if mode.name not in BACKENDS[name].promises:
        return f"has no mode {mode}; {' and '.join(having_mode(mode))} have, on a GPU"
    if mode != TENSOR or name != "triton" or missing(name) is not None:
        return missing(name)
    from rerank_kernels.backend.triton import launch

    gaps = []
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        try:
            launch.matrix_instruction(10 * major + minor)
        except BackendError as error:
            gaps.append(str(error))
        else:
            return None
    return gaps[0] if gaps else None


def _gap(name: str, op: str, mode: Mode = PORTABLE) -> str | None:
    if reason := missing(name):
        return reason
    try:
        _load(name, op, mode)
    except BackendError as error:
        return str(error)
    return None
