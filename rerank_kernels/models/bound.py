"""What patch() puts into the __dict__ of a module or of an object around it: a forward, a method; and what runs inside them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rerank_kernels.backend import library, registry
from rerank_kernels.backend.modes import PORTABLE, Mode, of_the_model
from rerank_kernels.errors import PatchError
from rerank_kernels.graphs.captured import Graphs
from rerank_kernels.models.activity import Activity
from rerank_kernels.ops.opaque import asking, nothing_around, refuse_onnx, symbolic, traced

NOT_COMPILED = (
    "a patched model runs as it is, for fused arithmetic has other bits: torch.compile works around it without fullgraph=True, "
    "torch.export.export() takes it with strict=False; the ops alone (rk.linear, ...) compile with fullgraph=True"
)
TRACED_BY = "torch.export.export(model, ..., strict=False) and torch.jit.trace() take it"


# Every Forward by its number, which torch.export with strict=True can take where it cannot take a module.
_forwards: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Forward:
    """The `forward` of one module: `function`, of models/registry.py, called with the module first; counts its calls.

    It computes in `mode`, served by `backend` where one was chosen, whatever the program around it has set. Once it is undone
    it is the class's own forward, wherever it is still held: a user's wrapper, or accelerate's, calls what it found.

    Not a types.MethodType: that pickles as getattr(module, name), and silently comes back as the class's own forward,
    unpatched. This one copies and pickles with its module, and a copy's forward reads the copy's weights.
    """

    undone = False  # also of one that an older version has pickled
    predictor: Callable[[int, Tensor], Tensor] | None = None  # likewise: patch(model, predictor=...)
    wants_graphs = True  # likewise: patch(model, graphs=...)

    def __new__(cls, *args: Any) -> Forward:
        global _serve
        if _serve is _serve_eagerly:
            # torch.compile must call it, not look inside: fused arithmetic has other bits. Here and not at import, for the
            # compiler takes seconds to import; in __new__, for pickle and deepcopy pass here too.
            _serve = torch.compiler.disable(_serve_eagerly, reason=NOT_COMPILED)
        return super().__new__(cls)

    def __init__(
        self, module: nn.Module, function: Callable[..., Any], mode: Mode = PORTABLE, backend: str | None = None,
        graphs: bool = True,
    ) -> None:  # fmt: skip
        self.module = module
        self.function = function
        self.mode = mode
        self.backend = backend
        self.wants_graphs = graphs
        self.graphs = Graphs()
        self.calls = 0
        self.seen: Any = None  # what a forward that reads other modules saw of them at its last call (fingerprint.py)
        self.activity = Activity()
        self._know_class()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate's unwrap_model() makes a method of what it finds
            args = args[1:]
        if self.undone:
            return type(self.module).forward(self.module, *args, **kwargs)
        strict = torch.compiler.is_exporting() and torch.compiler.is_dynamo_compiling()  # torch.export with strict=True
        if (
            strict
            and self.mode.name == PORTABLE.name
            and self.backend is None
            and nothing_around()
            and _class_seen(self.number)
        ):
            return self.function(self.module, *args, **kwargs)
        return _serve(self, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("seen", "cls", "stock", "number", "activity", "graphs")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.seen = None
        self.activity = Activity()
        self.graphs = Graphs()
        self._know_class()

    def _know_class(self) -> None:
        self.number = next(_numbers)
        _forwards[self.number] = self
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
    def __code__(self) -> CodeType:
        """torch.export names the place that it traces by it."""
        code: CodeType = self.function.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        """Callers that filter arguments by inspect.signature(model.forward) see the class's own signature."""
        return inspect.signature(type(self.module).forward.__get__(self.module))


class Refusal:
    """What stands beside a Forward in the __dict__ of its module, where a tracer asks before it reads the class's own forward.

    That is the stock one. torch.jit.script asks for `__prepare_scriptable__`, torch.fx.symbolic_trace calls `_get_name`.

    It is called with nothing, and gives the name of the class unless such a tracer calls. It knows the Forward, which unpatch()
    has to find where another one stands before it.
    """

    ASKED: ClassVar = {"__prepare_scriptable__": "torch.jit.script", "_get_name": "torch.fx.symbolic_trace"}

    def __init__(self, forward: Forward, asked: str) -> None:
        self.forward = forward
        self.asked = asked

    def __call__(self) -> str:
        name = type(self.forward.module).__name__
        if self.asked != "_get_name" or symbolic():
            raise PatchError(
                f"{name}: {self.ASKED[self.asked]} reads the source of the class, and not the patched forward; {TRACED_BY}, "
                "and rk.unpatch(model) gives back the stock one"
            )
        return name


class Lock:
    """A threading.RLock that a forked child finds open, whoever held it in the parent, and that a copy has of its own."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._renew()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._process == os.getpid():  # else this is the child of a thread that was inside
            self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


class Method:
    """A method of an object that holds a model, in place of its class's own: `function`, called with this first.

    It stands in the __dict__ of its holder, and copies and pickles with it, for the same reason as Forward does. `report` is
    what patch() returned; `patch` is patch() itself with the same choices, for a method after which there is another model.
    Once it is undone it is the class's own method, wherever it is still held. `lock` is for a method that many threads may
    call and one has to complete.
    """

    undone = False

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
        self.lock = Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if self.undone else self.function(self, *args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own."""
        bound: Callable[..., Any] = getattr(type(self.holder), self.name).__get__(self.holder)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)


class Methods(dict[str, Method]):
    """The Methods of one holder by name, in its __dict__ beside them: unpatch() has to find one that a user has wrapped."""

    KEY = "_rerank_kernels_methods"

    @classmethod
    def of(cls, holder: Any) -> Methods:
        """Those of `holder`; a shallow copy brings those of another."""
        found = vars(holder).get(cls.KEY)
        mine = isinstance(found, cls) and all(method.holder is holder for method in found.values())
        return found if mine else cls()

    def put(self, method: Method) -> None:
        held = vars(method.holder)
        self[method.name] = held[method.name] = method
        held[self.KEY] = self

    def take_out(self, name: str) -> None:
        """Undo the method called `name`; what a user put before it stays."""
        method = self.pop(name)
        method.undone = True
        held = vars(method.holder)
        if held.get(name) is method:
            del held[name]
        if not self:
            held.pop(self.KEY, None)


# Held while models or objects are patched or undone, and while an object that was patched before it had its model gets one.
CHANGING = Lock()


def held_forward(m: nn.Module) -> Any:
    """What stands as `forward` in the __dict__ of m, None if nothing does; a Forward also where it was made a method of m.

    Where hidden states were asked for, transformers 4 leaves the class's own forward there: that is nothing.
    """
    found = m.__dict__.get("forward")
    inner = getattr(found, "__func__", None)
    if inner is not None and inner is getattr(type(m), "forward", None) and getattr(found, "__self__", None) is m:
        return None
    return inner if isinstance(inner, Forward) else found


def numbered(number: int) -> Forward:
    return _forwards[number]


def _class_seen(number: int) -> bool:
    """see_class, for a tracer that takes apart what it can: called, and not taken apart."""
    _forwards[number].see_class()
    return True


_class_seen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_of(m: nn.Module) -> Forward | None:
    """The Forward that serves calls of m now."""
    found = held_forward(m)
    return found if isinstance(found, Forward) and not found.undone else None


def served_by(m: nn.Module) -> Forward | None:
    """The Forward that patch() made for m, also where a user's wrapper stands before it."""
    found = m.__dict__.get("_get_name")
    return found.forward if isinstance(found, Refusal) and found.forward.module is m else forward_of(m)


@contextlib.contextmanager
def serving(mode: Mode, backend: str | None) -> Iterator[None]:
    """Ops inside the block compute in `mode`, on `backend` where one was chosen, without gradients."""
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(registry.use(backend, asked_by=f"patch(model, backend={backend!r})"))
        stack.enter_context(registry.settled())
        stack.enter_context(of_the_model(mode))
        if not traced():  # a graph would hold neither, or leave gradients off after an error; the ops have none anyway
            stack.enter_context(torch.no_grad())
            if registry.serves_cpu("cpu"):
                stack.enter_context(library.holding_threads())
        yield


def _serve_eagerly(self: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.is_grad_enabled() and asking(enumerate(_tensors((args, kwargs)))) is not None:
        raise RuntimeError(
            f"{class_of(self.module)}.forward: an input asks for gradients and rerank_kernels is forward only; "
            "run under torch.inference_mode(), or call rk.unpatch(model) to train"
        )
    if symbolic():
        raise PatchError(
            f"{class_of(self.module)}.forward: it has to look at numbers, and torch.fx.symbolic_trace has none; {TRACED_BY}"
        )
    if traced():
        refuse_onnx(f"{class_of(self.module)}.forward")
    self.see_class()
    with self.serving():
        return self.function(self.module, *args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments: sentence-transformers' modules take a dict of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


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


# Whose modules hold weights in another form than as floats.
QUANTISERS = (
    *("bitsandbytes.", "torchao.", "torch.ao.nn.", "transformers.integr", "optimum.quanto.", "quanto.", "hqq.", "awq."),
    *("auto_gptq.", "gptqmodel.", "auto_round.", "compressed_tensors.", "eetq.", "aqlm.", "vptq.", "quark.", "fbgemm_gpu."),
)


def served_class(cls: Any) -> Any:
    """The nearest ancestor of cls, or cls itself, whose forward computes what that of cls does.

    A subclass is its parent where its body overrides nothing: what it adds are methods under new names, which no forward of
    the parent can call. What its __init__ changed is in the instance, where patch() looks.
    """
    while issubclass(cls, nn.Module) and cls is not nn.Module and not cls.__module__.startswith(("peft.", *QUANTISERS)):
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


def whole_name_of(m: object) -> str:
    """The class of m itself, with where it is from."""
    return f"{type(m).__module__}.{type(m).__qualname__}"


def class_of(m: object) -> str:
    return type(m).__qualname__


def hooked(m: nn.Module) -> bool:
    """Whether m has forward hooks that a forward above m, which never calls m, would ignore."""
    if not m._forward_hooks and not m._forward_pre_hooks:
        return False
    hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
    # transformers leaves its own in place after a stock output_hidden_states=True; our forward serves that option itself
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
