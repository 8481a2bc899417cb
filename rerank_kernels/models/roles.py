"""Roles: what a forward takes for granted of each module below it, as data; and whether a model is so.

A forward of ours calls none of the modules below it. It takes their weights and computes what their classes are known to
compute. Each architecture states in a table beside its forward, role by role, what it reads: the path, the classes, the
attributes with the values that it assumes, the parameters with their sizes. patch() checks all of it before it changes
anything, and a call checks it again when the fingerprint (fingerprint.py) says that something is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from rerank_kernels import check
from rerank_kernels.models import lora
from rerank_kernels.models.bound import QUANTISERS, Forward, class_of, held_forward, hooked, name_of, served_class


class Assumed(NamedTuple):
    """An attribute of a module, and what it has to be. `a.b` is the attribute b of a."""

    attribute: str
    wanted: str
    holds: Callable[[Any, Any], bool]  # (the value, the module) -> whether the forward computes the same as the module's own
    needed: bool = False  # an attribute that not every version of a library has is read only where it is there


def equal(attribute: str, wanted: object) -> Assumed:
    return Assumed(attribute, repr(wanted), lambda value, _: type(value) is type(wanted) and value == wanted)


def off(attribute: str) -> Assumed:
    """None, False, 0: whatever means no."""
    return Assumed(attribute, "False", lambda value, _: not value)


def is_scale(attribute: str, size: str) -> Assumed:
    """1 / sqrt of another attribute, which the attention op takes when nobody says another."""
    wanted = f"{size} ** -0.5"
    return Assumed(attribute, wanted, lambda value, m: isinstance(value, float) and value == getattr(m, size, 0) ** -0.5)


@dataclass(frozen=True)
class Role:
    """One place in a model: what may stand there, and what is read of it.

    classes: names as name_of gives them; a subclass that overrides nothing counts as its parent.
    parameters: name -> sizes. A size is a number, or a name for what is the same at all places; a name in lower case is the
    same within one member of a list of modules only; "..." is any shape. A parameter whose name ends in "?" may be None.
    An adapter around a Linear, and PEFT's wrapper around a head, may stand where the role says so (lora.py).

    drops: the attribute that says how much is dropped at random in training, for modules that do.
    """

    classes: frozenset[str]
    assumes: tuple[Assumed, ...] = ()
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: bool = False
    drops: str | None = None
    adapters: frozenset[str] = frozenset()  # classes of PEFT that may stand around what stands here
    ask: Callable[[Any], str | None] | None = None  # what else may stand in the way, in its own words


PEFT = frozenset({lora.LINEAR, lora.SAVED})
# A module in one of those: lora.py says at each call which of them count, and reads them then.
INSIDE = Role(frozenset(), parameters={"weight?": ("...",), "bias?": ("...",)})
# What says which of them count.
SWITCHES = ("_active_adapter", "active_adapters", "_disable_adapters", "disable_adapters")
Roles = Mapping[str, Role]  # path below the model -> role; "*" in a path: every member of a list of modules
ABSENT = object()
HOOKS = "forward hooks"  # what a problem with them ends in


class Problem(NamedTuple):
    module: nn.Module
    why: str


def problems(root: Any, roles: Roles, *, weights: bool = True) -> dict[str, Problem]:
    """Path below `root` -> why the module there is not what its role says. Empty: the forward computes what stock would.

    weights: look at the parameters too.
    """
    found: dict[str, Problem] = {}
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        found[""] = Problem(root, f"has global {HOOKS}")
    sizes: Sizes = {}
    for path, scope, m, role in places(root, roles):
        if m is None:
            if not role.optional:
                found.setdefault("", Problem(root, f"{path} is missing"))
            continue
        why = wrong(m, role, training=root.training) or _inside(m, path)
        if why is None and weights:
            why = wrong_weights(m, role, sizes, scope, f"{path}." if path else "")
        if why is not None:
            found.setdefault(path, Problem(m, why))
    if weights and not found and (apart := _wrong_device(root)) is not None:
        found[apart[0]] = Problem(root.get_submodule(apart[0]), apart[1])
    return found


def places(root: Any, roles: Roles) -> Iterator[tuple[str, str, Any, Role]]:
    """(path, list member that it is in, module, role) of every place; the module is None where there is none."""
    for pattern, role in roles.items():
        found = [("", "", root)]
        for part in pattern.split(".") if pattern else ():
            found = [
                (f"{path}.{name}" if path else name, f"{path}.{name}" if part == "*" else scope, inner)
                for path, scope, m in found
                if m is not None
                for name, inner in (list(getattr(m, "_modules", {}).items()) if part == "*" else [(part, _held(m, part))])
            ]
        for path, scope, m in found:
            yield path, scope, m, role
            if name_of(m) in PEFT:
                yield from ((f"{path}.{inner}", scope, module, INSIDE) for inner, module in m.named_modules() if inner)
                if lora.held(m) is not m:
                    yield path, scope, lora.held(m), role


def _held(m: Any, name: str) -> Any:
    """The module that m's own forward would find: an attribute may hide a module of the same name."""
    held = getattr(lora.held(m), name, None)
    return held if isinstance(held, nn.Module) else None


def wrong(m: Any, role: Role, *, training: bool = False) -> str | None:
    """Why m, its parameters aside, is not what `role` says; None if it is."""
    if role is INSIDE:
        return None
    if name_of(m) not in role.classes | role.adapters:
        return f"{_readable(role.classes)} must stand here"
    if name_of(m) in PEFT:
        return lora.problem(m) if name_of(m) == lora.LINEAR else lora.saved_problem(m)
    if (why := overridden(m)) is not None:
        return why
    if role.ask is not None and (why := role.ask(m)) is not None:
        return why
    for attribute, wanted, holds, needed in role.assumes:
        value: Any = m
        for part in attribute.split("."):
            value = getattr(value, part, ABSENT)
        if (value is ABSENT and needed) or (value is not ABSENT and not holds(value, m)):
            came = "nothing" if value is ABSENT else _shown(value)
            return f"{attribute} must be {wanted}, got {came}"
    if role.drops is not None and m.training and not training:
        share: Any = m
        for part in role.drops.split("."):
            share = getattr(share, part, 0.0)
        if share != 0.0:
            return f"is set to train, and drops {share} at random; call model.eval()"
    return None


def overridden(m: Any) -> str | None:
    """Why what m computes may be something else than what its class is known for."""
    served, name = type(m), name_of(m)
    if name != f"{served.__module__}.{served.__qualname__}":  # a subclass
        served = served_class(served)
        if name != f"{served.__module__}.{served.__qualname__}":
            return "its class overrides more than when it was first seen"
    for c in own_classes(served):
        package = c.__module__.partition(".")[0]
        for method, value in vars(c).items():
            theirs = getattr(value, "__module__", None)
            if callable(value) and isinstance(theirs, str) and theirs.partition(".")[0] != package:
                return f"{method} of its class was replaced by one of {theirs}"
    return _shadowing(m, served)


# Inherited ones that a forward of transformers calls, besides those of its own class.
_CALLED = {"_call_impl", "_wrapped_call_impl", "get_extended_attention_mask", "invert_attention_mask", "get_head_mask"}


def own_classes(cls: Any) -> Iterator[Any]:
    """cls and its ancestors, up to the one whose forward it has; not nn.Module, to which libraries add methods of their own."""
    for c in cls.__mro__:
        if c is nn.Module:
            return
        yield c
        if "forward" in vars(c):
            return


def _shadowing(m: Any, served: Any) -> str | None:
    """A method of its own that m has in its __dict__, besides forward, and that its class's forward may call."""
    for name, value in m.__dict__.items():
        if (
            callable(value)
            and name != "forward"
            and (name in _CALLED or any(callable(vars(c).get(name)) for c in own_classes(served)))
        ):
            return f"has a {name} of its own in its __dict__"
    return None


def _inside(m: Any, path: str) -> str | None:
    """What a forward above m, which never calls m, would ignore. The root is called, so hooks and wrappers of its own run."""
    if not path:
        return None
    if not isinstance(held_forward(m), Forward | None):
        return own_forward(m)
    return f"has {HOOKS}" if hooked(m) else None


def own_forward(m: Any) -> str:
    """What to say of a module with a forward in its __dict__ that is not ours."""
    if "_hf_hook" in m.__dict__:
        return (
            "is dispatched by accelerate, which put a forward of its own there; load the model without device_map, "
            "or call accelerate.hooks.remove_hook_from_submodules(model)"
        )
    return "has a forward of its own in its __dict__"


# ---- parameters -------------------------------------------------------------------------------------------------------------

ONE_DEVICE = "move all of the model to one device, or load it without device_map"
FLOAT_CHECKPOINT = "load the float checkpoint of it, or call model.dequantize() where the quantiser can"


def quantised(m: Any) -> bool:
    """Whether a module whose class stands in no table is a quantiser's."""
    floats = [t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    return name_of(m).startswith(QUANTISERS) or any(t.dtype in _CODES for t in floats)


_CODES = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}


Sizes = dict[tuple[str, str], tuple[int, str]]  # (list member or "", name of a size) -> what it is, and where it was seen first


def wrong_weights(m: Any, role: Role, sizes: Sizes, scope: str = "", prefix: str = "") -> str | None:
    """Why a parameter of m cannot be read; None if all can."""
    if name_of(m) in PEFT:
        m = getattr(m, "base_layer", None) or lora.held(m)
    for key, names in role.parameters.items():
        name = key.removesuffix("?")
        p: Any = getattr(m, name, None)
        if p is None and key.endswith("?"):
            continue
        if (why := wrong_tensor(p)) is not None:
            return f"{name} {why}"
        if names != ("...",) and (why := _wrong_shape(p, names, sizes, scope, prefix + name)) is not None:
            return f"{name} {why}"
    return None


def _wrong_shape(p: Tensor, names: tuple[str, ...], sizes: Sizes, scope: str, where: str) -> str | None:
    keys = [(scope if name.islower() else "", name) for name in names]
    known = [sizes.get(key, (None, "")) for key in keys]
    if p.dim() != len(names) or 0 in p.shape or any(w not in (None, n) for (w, _), n in zip(known, p.shape, strict=True)):
        want = ", ".join(name if w is None else str(w) for name, (w, _) in zip(names, known, strict=True))
        as_of = "".join(f" as {of} has it" for _, of in known if of)
        return f"must be [{want}]{as_of}, got {check.shape_of(p)}"
    for key, size in zip(keys, p.shape, strict=True):
        sizes.setdefault(key, (size, where))
    return None


def _wrong_device(root: Any) -> tuple[str, str] | None:
    """(path of a module, why) of the first parameter that is on another device than the first of all."""
    first: tuple[str, torch.device] | None = None
    for path, p in root.named_parameters():
        first = first or (path, p.device)
        if p.device != first[1]:
            module, _, name = path.rpartition(".")
            return module, f"{name} must be on {first[1]} as {first[0]} is, got {p.device}; {ONE_DEVICE}"
    return None


def wrong_tensor(p: Any) -> str | None:
    """Why a kernel cannot read p as numbers that lie in memory; None if it can."""
    if p is None:
        return "is missing"
    if not isinstance(p, Tensor):
        return f"must be a torch.Tensor, got {type(p).__name__}"
    if type(p) not in (Tensor, nn.Parameter) and not type(p).__module__.startswith(("torch._subclasses", "torch._functorch")):
        return f"must be a plain tensor, got {type(p).__module__}.{type(p).__qualname__}; {FLOAT_CHECKPOINT}"
    if p.dtype not in check.FLOATS:
        cure = "call model.float()" if p.dtype.is_floating_point and p.dtype.itemsize > 1 else FLOAT_CHECKPOINT
        return f"must be {check.FLOAT_NAMES}, got {p.dtype}; {cure}"
    if p.layout != torch.strided:
        return f"must be dense, got layout {p.layout}; call .to_dense() on it"
    if p.device.type == "meta":
        return "is on device meta, where no values are; load the model without device_map, so that all of it is in memory"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {check.shape_of(value)} of other values"
    if isinstance(value, nn.Module):
        return class_of(value)
    return getattr(value, "__name__", None) or repr(value)


def _readable(classes: frozenset[str]) -> str:
    return " or ".join(sorted(name.rpartition(".")[2] for name in classes))
