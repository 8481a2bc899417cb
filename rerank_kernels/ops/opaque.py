"""The public ops as torch.compile sees them: each one opaque call, with the shape of its result and nothing inside.

What stands in an op (checks, the weights' layouts, the mode of the model around) cannot be a graph. And arithmetic that a
compiler fused would have other bits. So while torch.compile traces, a call of rk.linear becomes one of
torch.ops.rerank_kernels_compiled.linear. Its kernel is the public function itself, which runs as it is when the graph runs.
Outside of a compiler none of this is used.

A result has no gradient, as in eager; an input that asks for one is the same error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

NAMESPACE = "rerank_kernels_compiled"
P = ParamSpec("P")
R = TypeVar("R")

# op -> schema, function, fake: what `register` makes an op of
_declared: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {}
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

        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, without_gradient, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        _made[name] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return True


# What torch.compiler.assume_constant_result does, without importing the compiler: a trace calls it and does not look inside.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]


def opaque(
    schema: str,
    fake: Callable[..., Any],
    result: Callable[..., Any] | None = None,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Gives a public op its opaque form. schema: arguments and result, in the order of the function; fake: empty tensors of the
    result's shape, strides and dtype; result: makes what the function returns out of the tuple that an op returns; arguments:
    the function's own as a schema can hold them."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _declared[name] = schema, function, fake

        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                register(name)
                op = getattr(getattr(torch.ops, NAMESPACE), name)
                out = op(*args, **kwargs) if arguments is None else op(*arguments(*args, **kwargs))
                return out if result is None else result(*out)
            return function(*args, **kwargs)

        return public

    return decorate
