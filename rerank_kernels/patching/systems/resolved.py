"""What a resolver found in an object that holds a model; the files beside this one fill it, one for each system."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from rerank_kernels.errors import PatchError
from rerank_kernels.models.bound import CHANGING, Method, class_of, forward_of


class Override(NamedTuple):
    """A method to put in place of `holder`'s own."""

    holder: Any
    name: str
    function: Callable[..., Any]
    about: str  # why, for the report


@dataclass
class Resolved:
    """Paths are attributes as one would write them behind the object that was given.

    problems: what stands in the way of the promise, each with what would work; an error if strict.
    notes: what stays the system's own, or the user's to set.
    """

    system: str
    obj: Any
    modules: dict[str, nn.Module] = field(default_factory=dict)
    overrides: dict[str, Override] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inside: list[Any] = field(default_factory=list)

    @property
    def holders(self) -> list[Any]:
        """Every object that may carry methods of ours, now or before."""
        return [self.obj, *self.inside]

    def override(self, cls: type, name: str, function: Callable[..., Any], about: str) -> None:
        """Put `function` in place of the method that `obj` has from `cls`; a subclass's own, a problem by then, stays."""
        if not _has_its_own(self.obj, cls, name):
            self.overrides[name] = Override(self.obj, name, function, about)

    def take(self, path: str, inner: Resolved) -> None:
        """What was found in the object at `path`."""
        self.inside += inner.holders
        self.modules |= {joined(path, p): module for p, module in inner.modules.items()}
        self.overrides |= {joined(path, p): override for p, override in inner.overrides.items()}
        self.problems += [f"{path}: {problem}" for problem in inner.problems]
        self.notes += [note for note in inner.notes if note not in self.notes]


def joined(path: str, inner: str) -> str:
    return f"{path}.{inner}" if path and inner else path or inner


def ancestor(obj: Any, name: str) -> type:
    """The class called `name` that `obj` is of."""
    return next(cls for cls in type(obj).__mro__ if cls.__qualname__ == name)


def own_methods(obj: Any, cls: type, names: tuple[str, ...]) -> list[str]:
    """A problem for each of the methods that the subclass of `obj`, or `obj` itself, has in place of those of `cls`."""
    known = f"of its own, and only that of {cls.__qualname__} is known"
    return [f"{class_of(obj)} has a {name} {known}" for name in names if _has_its_own(obj, cls, name)]


def _has_its_own(obj: Any, cls: type, name: str) -> bool:
    theirs = inspect.getattr_static(type(obj), name, None) is not inspect.getattr_static(cls, name, None)
    return theirs or not isinstance(vars(obj).get(name), Method | None)


def see_patched(method: Method, *models: nn.Module) -> None:
    """Raise if a model was put in after patch(), or unpatched by itself: ours around it would look like the whole promise.

    Not where unpatch() of the whole came while this call was on its way: it goes on, as stock's would.
    """
    if not method.strict or all(any(forward_of(m) is not None for m in model.modules()) for model in models):
        return
    with CHANGING:  # the methods are undone first, then the modules
        undone = method.undone
    if not undone:
        raise PatchError(
            f"{class_of(method.holder)}: its model is not the one that rk.patch() saw, or was unpatched by itself; "
            "call rk.unpatch() and rk.patch() with the whole object again"
        )
