"""What patch() puts into the __dict__ of a module or of an object around it: a forward, a method; and what runs inside them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rerank_kernels.backend import library, registry
from rerank_kernels.backend.modes import PORTABLE, Mode, of_the_model
from rerank_kernels.errors import PatchError

NOT_COMPILED = (
    "a patched model runs as it is, for fused arithmetic has other bits: torch.compile works around it without fullgraph=True; "
    "the ops alone (rk.linear, ...) compile with fullgraph=True"
)


class Forward:
    """The `forward` of one module: `function`, of models/registry.py, called with the module first; counts its calls.

    It computes in `mode`, served by `backend` where one was chosen, whatever the program around it has set.

    Not a types.MethodType: that pickles as getattr(module, name), and silently comes back as the class's own forward,
    unpatched. This one copies and pickles with its module, and a copy's forward reads the copy's weights.
    """

    def __new__(cls, *args: Any) -> Forward:
        global _serve
        if _serve is _serve_eagerly:
            # torch.compile must call it, not look inside: fused arithmetic has other bits. Here and not at import, for the
            # compiler takes seconds to import; in __new__, for pickle and deepcopy pass here too.
            _serve = torch.compiler.disable(_serve_eagerly, reason=NOT_COMPILED)
        return super().__new__(cls)

    def __init__(
        self, module: nn.Module, function: Callable[..., Any], mode: Mode = PORTABLE, backend: str | None = None
    ) -> None:
        self.module = module
        self.function = function
        self.mode = mode
        self.backend = backend
        self.calls = 0
        self.seen: Any = None  # what a forward that reads other modules saw of them at its last call (fingerprint.py)
        self._know_class()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _serve(self, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("seen", "cls", "stock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.seen = None
        self._know_class()

    def _know_class(self) -> None:
        self.cls = type(self.module)
        self.stock = self.cls.forward

    def see_class(self) -> None:
        """Raise if the module is of another class by now, or its class has another forward: ours stands for the old one."""
        cls = type(self.module)
        if cls is not self.cls or cls.forward is not self.stock:
            changed = f"is of class {cls.__qualname__} now" if cls is not self.cls else "has another forward in its class now"
            raise PatchError(
                f"{self.cls.__qualname__}.forward: the module {changed}, and rk.patch() saw another; undo that, or call "
                "rk.unpatch(model), after which its class's own forward runs"
            )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Ops inside the block are this forward's: counted, in its mode, on its backend, without gradients."""
        self.calls += 1
        with serving(self.mode, self.backend):
            yield

    @property
    def __signature__(self) -> inspect.Signature:
        """Callers that filter arguments by inspect.signature(model.forward) see the class's own signature."""
        return inspect.signature(type(self.module).forward.__get__(self.module))


class Method:
    """A method of an object that holds a model, in place of its class's own: `function`, called with this first.

    It stands in the __dict__ of its holder, and copies and pickles with it, for the same reason as Forward does. `report` is
    what patch() returned; `patch` is patch() itself with the same choices, for a method after which there is another model.
    """

    def __init__(
        self,
        holder: Any,
        name: str,
        function: Callable[..., Any],
        mode: Mode,
        strict: bool,
        backend: str | None,
        report: Any,
        patch: Callable[[Any], Any],
    ) -> None:
        self.holder = holder
        self.name = name
        self.function = function
        self.mode = mode
        self.strict = strict
        self.backend = backend
        self.report = report
        self.patch = patch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own."""
        bound: Callable[..., Any] = getattr(type(self.holder), self.name).__get__(self.holder)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)


@contextlib.contextmanager
def serving(mode: Mode, backend: str | None) -> Iterator[None]:
    """Ops inside the block compute in `mode`, on `backend` where one was chosen, without gradients."""
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(registry.use(backend, asked_by=f"patch(model, backend={backend!r})"))
        stack.enter_context(registry.settled())
        stack.enter_context(of_the_model(mode))
        stack.enter_context(torch.no_grad())
        if registry.serves_cpu("cpu"):
            stack.enter_context(library.holding_threads())
        yield


def _serve_eagerly(self: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.is_grad_enabled():
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{class_of(self.module)}.forward: an input asks for gradients and rerank_kernels is forward only; "
                    "run under torch.inference_mode(), or call rk.unpatch(model) to train"
                )
    self.see_class()
    with self.serving():
        return self.function(self.module, *args, **kwargs)


_serve = _serve_eagerly


def name_of(m: object) -> str:
    """The class of m as a string, so that absent classes need no import. A subclass that overrides nothing is its parent."""
    cls: Any = type(m)
    return _name_of(cls)


@functools.lru_cache(maxsize=1024)
def _name_of(cls: Any) -> str:
    served = served_class(cls)
    return f"{served.__module__}.{served.__qualname__}"


# What a class body may hold without a change to what an instance computes.
_NEUTRAL = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__init__", "__repr__", "__str__", "extra_repr"}
_NEUTRAL |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__classdictcell__"}
_NEUTRAL |= {"__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__", "__type_params__", "config_class"}


def served_class(cls: Any) -> Any:
    """The nearest ancestor of cls, or cls itself, whose forward computes what that of cls does.

    A subclass is its parent where its body overrides nothing: what it adds are methods under new names, which no forward of
    the parent can call. What its __init__ changed is in the instance, where patch() looks.
    """
    while issubclass(cls, nn.Module) and cls is not nn.Module:
        parent: Any = next((c for c in cls.__bases__ if issubclass(c, nn.Module)), nn.Module)
        inherited = {*dir(parent), *(name for c in parent.__mro__ for name in vars(c).get("__annotations__", ()))}
        own = {name: value for c in cls.__mro__ if c not in parent.__mro__ for name, value in vars(c).items()}
        if parent is nn.Module or not all(
            name in _NEUTRAL or (_wrapped(value, getattr(parent, name, None)) if name in inherited else _plain(name, value))
            for name, value in own.items()
        ):
            break
        cls = parent
    return cls


def _plain(name: str, value: object) -> bool:
    """Whether a new name in a class body can only be a method that nobody calls, or a constant: no descriptor, no dunder."""
    return not (name.startswith("__") and name.endswith("__")) and not hasattr(type(value), "__set__")


def _wrapped(value: Any, inherited: object) -> bool:
    """Whether a method is the inherited one, in a wrapper that transformers puts around it in each subclass."""
    theirs = getattr(value, "__globals__", {}).get("__name__", "").startswith("transformers.")
    return theirs and inspect.unwrap(value) is inspect.unwrap(inherited)  # type: ignore[arg-type]


def class_of(m: object) -> str:
    return type(m).__qualname__


def hooked(m: nn.Module) -> bool:
    """Whether m has forward hooks that a forward above m, which never calls m, would ignore."""
    if not m._forward_hooks and not m._forward_pre_hooks:
        return False
    hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
    # transformers leaves its own in place after a stock output_hidden_states=True; our forward serves that option itself
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
