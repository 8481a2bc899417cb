"""The ops as a tracer sees them: each one opaque call, with the shape of its result and nothing inside.

What stands in an op (checks, the weights' layouts, the mode of the model around) cannot be a graph. And arithmetic that a
compiler fused would have other bits. So while torch.compile, torch.export, torch.jit.trace, make_fx or fx traces, a call of
rk.linear becomes one of torch.ops.rerank_kernels_compiled.linear. Its kernel is the public function itself, which runs as it is
when the graph runs: with its checks, and with its errors. Outside of a tracer none of this is used.

Mode and backend of the model around are written into what is traced, but for torch.compile, whose graphs run in this process.

No result has a gradient: a Parameter counts as a number, and any other input that asks for gradients is an error. So is forward
mode (torch.func.jvp, jacfwd), which PyTorch would answer with zeros for an op that it does not know.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace

from rerank_kernels.backend import modes, registry
from rerank_kernels.ops.sequences import Sequences, as_tensor

NAMESPACE = "rerank_kernels_compiled"
P = ParamSpec("P")
R = TypeVar("R")

# op -> schema (None: inferred), function, fake: what `register` makes an op of
_declared: dict[str, tuple[str | None, Callable[..., Any], Callable[..., Any]]] = {}
_made: dict[str, Any] = {}
_library: torch.library.Library | None = None


def register(name: str) -> bool:
    """Makes the opaque op when a tracer asks for it first; `register_all` does it for graphs that were saved."""
    global _library
    if name not in _made:
        if _library is None:
            _library = torch.library.Library(NAMESPACE, "FRAGMENT")
        if hasattr(getattr(torch.ops, NAMESPACE), name):  # by another copy of this package, which errors of the library name
            _made[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
            return True
        schema, function, fake = _declared[name]

        def served(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            if backend is None:
                return function(*args, **kwargs)
            with registry.use(backend, asked_by=f"the graph, which was traced with backend {backend!r}"):
                return function(*args, **kwargs)

        def without_gradient(*args: Any, **kwargs: Any) -> Any:
            _refuse_when_run(name, args, kwargs)
            with torch._C._AutoDispatchBelowAutograd(), torch.no_grad():
                return _made[name](*args, **kwargs)

        def shaped(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
            return fake(*args, **kwargs)

        said = schema or inferred(function)
        said = said.replace(") -> ", ("" if "*" in said else ", *") + ", str? backend=None) -> ")
        _library.define(name + said, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, served, "CompositeExplicitAutograd")
        _library.impl(name, without_gradient, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shaped, lib=_library)
        _made[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return True


def register_all() -> None:
    """Makes every op that was declared, for a graph that was saved: it is loaded before anything traces here."""
    for name in _declared:
        register(name)


def inferred(function: Callable[..., Any]) -> str:
    """The schema that a function's annotations say: "(Tensor x, float eps=1e-12) -> Tensor"."""
    hints = {name: _without_sequences(hint) for name, hint in get_type_hints(function).items()}
    signature = inspect.signature(function)
    fields = getattr(hints["return"], "__annotations__", None) if issubclass(hints["return"], tuple) else None
    hints["return"] = tuple[(torch.Tensor,) * len(fields)] if fields else hints["return"]  # type: ignore[misc]  # named: all tensors

    def annotated() -> None: ...

    annotated.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(annotation=hints[p.name]) for p in signature.parameters.values()],
        return_annotation=hints["return"],
    )
    # an int of ours is a dimension, never a size
    return torch.library.infer_schema(annotated, mutates_args=()).replace("SymInt", "int")


def _without_sequences(hint: Any) -> Any:
    """What `as_tensor` leaves of an annotation: Tensor | Sequences | None -> Tensor | None."""
    kinds = get_args(hint)
    return functools.reduce(operator.or_, (kind for kind in kinds if kind is not Sequences)) if Sequences in kinds else hint


# ---- gradients --------------------------------------------------------------------------------------------------------------

_INSTEAD = "run under torch.inference_mode() or torch.no_grad(), or call rk.unpatch(model) to train"


def refuse_gradient(op: str, argument: str) -> NoReturn:
    raise RuntimeError(f"{op}: {argument} asks for gradients and rerank_kernels is forward only; {_INSTEAD}")


def refuse_forward_mode(op: str, argument: str) -> NoReturn:
    raise RuntimeError(
        f"{op}: {argument} carries a tangent (torch.func.jvp, jacfwd) and rerank_kernels has no derivatives; "
        "take PyTorch's own op for them, or call rk.unpatch(model)"
    )


def asking(values: Iterable[tuple[Any, Any]]) -> Any:
    """The key of the first tensor that asks for gradients, None if none does. A Parameter does not: it is a number to us."""
    for key, value in values:
        if isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, torch.nn.Parameter):
            return key
    return None


def refuse_tangents(op: str, values: Iterable[tuple[Any, Any]]) -> None:
    """Raise for a dual tensor of forward-mode AD. Asked only where a level of it is open."""
    for key, value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None:
            refuse_forward_mode(op, _argument(op, key))


def _argument(op: str, key: Any) -> str:
    """The name of an argument of op that was given by place."""
    if isinstance(key, str) or op not in _declared:
        return str(key)
    return list(inspect.signature(_declared[op][1]).parameters)[key]


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _refuse_when_run(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """In a graph that runs, or is traced further down: there a leaf may be a weight that came without its class."""
    given = _given(args, kwargs)
    if forward_ad._current_level >= 0:
        refuse_tangents(op, given)
    if torch.is_grad_enabled():
        for key, value in given:
            if type(value) is torch.Tensor and value.requires_grad and (key == 0 or not value.is_leaf):
                refuse_gradient(op, _argument(op, key))


def _refuse_while_traced(op: str, key: Any) -> bool:
    refuse_gradient(op, _argument(op, key))


# What torch.compiler.assume_constant_result does, without importing the compiler: a trace calls it and does not look inside.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]
_refuse_while_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- who traces -------------------------------------------------------------------------------------------------------------

_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE


def traced() -> bool:
    """Whether what is called now is written down, to be run again with other numbers."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return _fx_traces()
    return torch._C._get_dispatch_mode(_PROXY) is not None or torch._C._get_dispatch_mode(_FAKE) is not None  # make_fx


def _fx_traces() -> bool:
    """Whether torch.fx is at work on this thread: up to torch 2.13 a flag of its module says so, then a function."""
    since = getattr(_symbolic_trace, "_get_is_fx_tracing", None)
    return bool(_symbolic_trace._is_fx_tracing_flag if since is None else since())


def symbolic() -> bool:
    """Whether torch.fx.symbolic_trace is at work, which calls with proxies in place of tensors."""
    if not _fx_traces() or torch.compiler.is_compiling():  # torch.export sets the flag too, and make_fx
        return False
    return torch._C._get_dispatch_mode(_PROXY) is None


def refuse_onnx(op: str) -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{op}: ONNX has no operators with these bits; torch.export.export() and torch.jit.trace() take a patched model, "
            "and rk.unpatch(model) gives back the stock one, which ONNX takes"
        )


class _Unscriptable:
    """`__prepare_scriptable__` of what torch.jit.script asks before it reads any source."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self) -> NoReturn:
        raise RuntimeError(f"{self.what} cannot be scripted: its source is no TorchScript; take torch.jit.trace() instead")


def _write_down(name: str, fields: int, arguments: Callable[..., tuple[Any, ...]] | None, args: Any, kwargs: Any) -> Any:
    """The call of the opaque op in place of the function."""
    register(name)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    given = {n: as_tensor(value) for n, value in kwargs.items()}
    if torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling():
        mode, backend = _around(name)
        if name in modes.TENSOR.ops and given.get("mode") is None:
            given["mode"] = mode
        if backend is not None:
            given["backend"] = backend
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        # TorchScript keeps a Parameter as a tensor that asks for gradients, and the class is lost
        args = tuple(_number(value) for value in args)
        given = {n: _number(value) for n, value in given.items()}
    out = op(*args, **given) if arguments is None else op(*arguments(*args, **given))
    return tuple(out[i] for i in range(fields)) if fields else out


def _around(name: str) -> tuple[str, str | None]:
    """Mode and backend of the model around, where a graph of `name` may run anywhere."""
    refuse_onnx(name)
    return modes.around().name, registry.asked()


def nothing_around() -> bool:
    """Whether what is traced here runs in mode portable, on each device's own backend, and not in ONNX."""
    return modes.around() is modes.PORTABLE and registry.asked() is None and not torch.onnx.is_in_onnx_export()


_around._dynamo_marked_constant = True  # type: ignore[attr-defined]
nothing_around._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _number(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.nn.Parameter) else value


def opaque(
    fake: Callable[..., Any],
    *,
    result: Callable[..., Any] | None = None,
    schema: str | None = None,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives an op its opaque form. fake: empty tensors of the result's shape, strides and dtype; result: makes what the
    function returns out of the tuple that an op returns. Arguments and result are those of its annotations; where a schema
    cannot hold one, schema: what it holds instead, in the order of the function; arguments: the function's own, made to fit."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _declared[name] = schema, function, fake
        several = (schema or "").rpartition("->")[2].count("Tensor")
        fields = 0 if result is None else len(getattr(result, "_fields", ())) or several

        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            if traced():
                if torch.is_grad_enabled() and (key := asking(_given(args, kwargs))) is not None:
                    _refuse_while_traced(name, key)
                out = _write_down(name, fields, arguments, args, kwargs)
                return out if result is None else result(*out)
            if forward_ad._current_level >= 0:
                refuse_tangents(name, _given(args, kwargs))
            if not torch.is_grad_enabled():
                return function(*args, **kwargs)
            if (key := asking(_given(args, kwargs))) is not None:
                refuse_gradient(name, _argument(name, key))
            with torch.no_grad():
                return function(*args, **kwargs)

        public.__prepare_scriptable__ = _Unscriptable(name)  # type: ignore[attr-defined]
        return public

    return decorate
