"""The public ops as torch.compile sees them: each one opaque call, with the shape of its result and nothing inside.

What stands in an op (checks, the weights' layouts, the mode of the model around) cannot be a graph. And arithmetic that a
compiler fused would have other bits. So while torch.compile traces, a call of rk.linear becomes one of
torch.ops.rerank_kernels_compiled.linear. Its kernel is the public function itself, which runs as it is when the graph runs.
Outside of a compiler none of this is used.

A result has no gradient, as in eager; an input that asks for one is the same error.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import torch

from rerank_kernels.ops.sequences import Sequences, as_tensor

NAMESPACE = "rerank_kernels_compiled"
P = ParamSpec("P")
R = TypeVar("R")

# op -> schema (None: inferred), function, fake: what `register` makes an op of
_declared: dict[str, tuple[str | None, Callable[..., Any], Callable[..., Any]]] = {}
_made: dict[str, Any] = {}
_library: torch.library.Library | None = None


def register(name: str) -> bool:
    """Makes the opaque op when a compiler asks for it first: a program that compiles nothing does not wait for it at import."""
    global _library
    if name not in _made:
        if _library is None:
            _library = torch.library.Library(NAMESPACE, "DEF")
        schema, function, fake = _declared[name]

        def without_gradient(*args: Any, **kwargs: Any) -> Any:
            # The function is given what the caller gave, Parameters included, and sees to gradients itself.
            with torch._C._AutoDispatchBelowAutograd():
                return _made[name](*args, **kwargs)

        _library.define(name + (schema or inferred(function)), tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, without_gradient, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _made[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return True


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


# What torch.compiler.assume_constant_result does, without importing the compiler: a trace calls it and does not look inside.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opaque(
    fake: Callable[..., Any],
    *,
    result: Callable[..., Any] | None = None,
    schema: str | None = None,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives a public op its opaque form. fake: empty tensors of the result's shape, strides and dtype; result: makes what the
    function returns out of the tuple that an op returns. Arguments and result are those of its annotations; where a schema
    cannot hold one, schema: what it holds instead, in the order of the function; arguments: the function's own, made to fit."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _declared[name] = schema, function, fake

        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                register(name)
                op = getattr(getattr(torch.ops, NAMESPACE), name)
                given = {n: as_tensor(value) for n, value in kwargs.items()}
                out = op(*args, **given) if arguments is None else op(*arguments(*args, **given))
                return out if result is None else result(*out)
            return function(*args, **kwargs)

        return public

    return decorate
