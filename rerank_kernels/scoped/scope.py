"""`with rk.invariant():` any model, and code between models, gives each row the bits that it gets alone.

PyTorch calls two modes of this file per thread, as long as a scope is open there. One stands above autograd: it lets ops arrive
whole below, before PyTorch takes them apart by shape, strides or what asks for gradients. The other stands below and does what
`table` says of each op. Whether a scope is open is told per task, so a task that shares the thread sees stock PyTorch.

Nothing is hooked, wrapped or replaced: when the last scope of a thread ends, the two modes are gone, after an error too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from rerank_kernels.errors import InvariantError, InvariantWarning
from rerank_kernels.scoped import elementwise, table
from rerank_kernels.scoped.refusal import Refusal
from rerank_kernels.scoped.report import InvariantReport

_LET = "rk.invariant(strict=False) lets it through with a warning, and promises nothing then"


class _Scope:
    """One `with`. Tasks and threads that it leaves behind inherit it, and see by `over` that it ended."""

    def __init__(self, strict: bool) -> None:
        self.report = InvariantReport(strict)
        self.over = False


_open: ContextVar[_Scope | None] = ContextVar("rerank_kernels_invariant", default=None)


def _now() -> _Scope | None:
    scope = _open.get()
    return None if scope is None or scope.over else scope


@contextlib.contextmanager
def invariant(strict: bool = True) -> Iterator[InvariantReport]:
    """Inside the block PyTorch's ops give bits that do not depend on batch, padding or threads, whatever model calls them.

    strict: an op that has no route and is not exact by nature is an InvariantError that names op, module and reason. If
    False, it is computed as PyTorch does, with one InvariantWarning per op, and nothing is promised of what it leads to.

    For this thread and task alone; re-entrant, the innermost block's `strict` counts; restored on any exit. Forward only: run
    it under torch.inference_mode() or torch.no_grad(). Gives a report of the calls so far. Padding is in no result where a
    mask of scaled_dot_product_attention hides it. rk.patch is faster for the models that it takes.
    """
    scope = _Scope(strict)
    token = _open.set(scope)
    try:
        with _held():
            yield scope.report
    finally:
        scope.over = True
        _open.reset(token)


class _Held(threading.local):
    """The modes of a thread, and how many scopes need them: tasks may end theirs in another order than they began them."""

    def __init__(self) -> None:
        self.count = 0
        self.modes: tuple[Any, Any] = _Above(), _Below()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _held() -> Iterator[None]:
    above, below = _HELD.modes
    if _HELD.count == 0:
        below.__enter__()
        above.__enter__()
    _HELD.count += 1
    try:
        yield
    finally:
        _HELD.count -= 1
        if _HELD.count == 0:
            _take_off(above, overrides._get_current_function_mode_stack(), overrides)
            _take_off(below, _python_dispatch._get_current_dispatch_mode_stack(), _python_dispatch)


def _take_off(mode: Any, stack: list[Any], module: Any) -> None:
    """Ends a mode that others may stand upon: a task's whose turn it is not."""
    upon = stack[stack.index(mode) + 1 :]
    for _ in upon:
        module._pop_mode()
    mode.__exit__(None, None, None)
    for other in upon:
        module._push_mode(other)


class _Above(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A property's getter computes nothing, and models ask for shapes all the time.
        if getattr(func, "__name__", "") == "__get__" or _now() is None:
            return func(*args, **(kwargs or {}))
        with torch._C._AutoDispatchBelowAutograd():
            return func(*args, **(kwargs or {}))


class _Below(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        scope, kwargs = _now(), kwargs or {}
        if scope is None:
            return func(*args, **kwargs)
        served = _looked_up(func)
        tensors = [t for t in _tensors(args, kwargs) if isinstance(t, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and served.op != "aten::detach":
            raise InvariantError(
                f"rk.invariant: {served.op}{_module()}: an argument asks for gradients and rerank_kernels is forward only; "
                "run under torch.inference_mode() or torch.no_grad()"
            )
        if any(t.is_meta for t in tensors):  # shapes alone
            return func(*args, **kwargs)
        try:
            return self._call(scope.report, served, func, tensors, args, kwargs)
        except Refusal as refusal:
            why = str(refusal)
        if scope.report.strict:
            raise InvariantError(f"rk.invariant: {served.op}{_module()}: {why}; {_LET}")
        if served.op not in scope.report.let_through:
            scope.report.let_through[served.op] = why
            warnings.warn(
                f"rk.invariant: {served.op}{_module()}: {why}; PyTorch computes it, and nothing is promised of the result",
                InvariantWarning,
                stacklevel=_outside(),
            )
        return func(*args, **kwargs)

    def _call(
        self, report: InvariantReport, served: table.Served, func: Any, tensors: list[Tensor], args: Any, kwargs: Any
    ) -> Any:
        if served.exact or (served.exact_of_integers and _integers(tensors, args)):
            if served.one_step and any(t.is_complex() for t in tensors):
                raise Refusal("of complex numbers it is more than one step per element")
            report.exact[served.op] += 1
            return func(*args, **kwargs)
        known = served.route is not None or served.pieces is not None
        if known and any(t.numel() == 0 for t in tensors):  # there is nothing to add
            report.exact[served.op] += 1
            return func(*args, **kwargs)
        if served.route is not None:
            y = served.route(**dict(zip(served.names, args, strict=False)), **kwargs)
        elif served.pieces is not None:
            y = elementwise.in_pieces(served.pieces, args, kwargs)
        elif served.parts:
            with self:
                return func.decompose(*args, **kwargs)
        else:
            raise Refusal(served.why)
        report.routed[served.op] += 1
        return args[0].copy_(y) if served.in_place else y


_HELD = _Held()
_looked_up: Callable[[Any], table.Served] = functools.cache(table.look_up)


def _tensors(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _integers(tensors: list[Tensor], args: Any) -> bool:
    """No tensor and no number among the arguments has a fraction."""
    return not any(t.is_floating_point() or t.is_complex() for t in tensors) and all(
        a.is_integer() for a in args if isinstance(a, float)
    )


def _module() -> str:
    """ " in encoder.layer.0 (Layer)": the innermost module whose forward runs, by its path in the outermost."""
    frame: Any = sys._getframe(1)
    inner = outer = None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            inner = owner if inner is None else inner
            outer = owner
        frame = frame.f_back
    if inner is None or outer is None:
        return ""
    path = next((name for name, module in outer.named_modules() if module is inner), "")
    return f" in {path or 'the model'} ({type(inner).__name__})"


def _outside() -> int:
    """The stack level of the user's line, for a warning."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("rerank_kernels", "torch"):
        frame, level = frame.f_back, level + 1
    return level
