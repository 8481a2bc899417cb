"""patch(model): makes a transformers encoder compute with rerank_kernels, in place; unpatch(model): exactly as it was.

One walk over named_modules, one table of forwards. A module whose class stands in FORWARDS gets a stateless forward of
its own; no class, no global, no parameter is changed. What stands in no table is unknown, and unknown is an error: a module
that keeps PyTorch's arithmetic would break the promise silently. So is a module inside an encoder that is not what the
encoder's forward takes it for (models/roles.py).

An encoder runs packed: the valid tokens are gathered at the embedding, [total, D] with cu_seqlens goes through all layers, and
pooling reads each sequence's own first token. Padding is never computed, so its side, length, id and content cannot change a
bit. This takes the whole encoder, so transformers' AttentionInterface is not needed; some models ignore it silently anyway.

Which classes are served, and how, is models/registry.py's to say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import PORTABLE, Mode, named
from rerank_kernels.errors import PatchError
from rerank_kernels.models import registry as models
from rerank_kernels.models.bound import CHANGING, Forward, Refusal, class_of, forward_of, held_forward, name_of
from rerank_kernels.models.registry import COMPILED, ENCODERS, EXACT, FORWARDS, GUARDS, LEAVES, PREFIXES
from rerank_kernels.models.roles import FLOAT_CHECKPOINT, own_forward, quantised
from rerank_kernels.ops.attention import MOST_IN_A_HEAD
from rerank_kernels.patching.report import Report


def patch(
    model: nn.Module, mode: str | Mode = PORTABLE, strict: bool = True, *, backend: str | None = None, graphs: bool = True
) -> Report:
    """patch of patch.py, which says what is promised, for a model of PyTorch or transformers with nothing around it."""
    for cls in type(model).__mro__:
        if cls.__name__ in HOLDERS:
            raise PatchError(f"model is a {cls.__name__}, a wrapper around the model to take; pass {HOLDERS[cls.__name__]}")
    with CHANGING:
        report = prepare(model, mode, strict, backend=backend, graphs=graphs)
        bind(report)
    return report


def bind(report: Report) -> None:
    """Put the forwards of a report in place."""
    for forward in report.forwards.values():
        held = forward.module.__dict__
        for asked in Refusal.ASKED:
            held[asked] = Refusal(forward, asked)
        held["forward"] = forward


def prepare(
    model: nn.Module, mode: str | Mode = PORTABLE, strict: bool = True, *, backend: str | None = None, graphs: bool = True
) -> Report:
    """What patch would do, with the forwards that bind() puts in place, and patch's errors; changes nothing."""
    if not isinstance(model, nn.Module):
        inside = isinstance(getattr(model, "model", None), nn.Module)
        hint = "if that is all of it that computes, pass its .model" if inside else NO_MODEL.get(type(model).__name__, HELP)
        wanted = "a torch.nn.Module, or an object of a system that is served"
        raise TypeError(f"patch: model must be {wanted}, got {type(model).__name__}; {hint}")
    mode = named("patch", mode)
    for cls in type(model).__mro__:
        if cls.__name__ in WRAPPERS:
            raise PatchError(f"patch: model is a {cls.__name__}, a wrapper around the model to patch; {WRAPPERS[cls.__name__]}")
    _as_before(model, mode, backend, graphs)
    if backend is not None:
        registry.get(backend, f"patch(model, backend={backend!r})")
    if mode != PORTABLE:
        _can_ever_serve(model, mode, backend)
    report, causes = _replacements(model, mode, backend, graphs)
    if strict and report.unknown:
        architectures = ", ".join(PREFIXES)
        leaves = ", ".join(dict.fromkeys(name.rsplit(".", 1)[1] for name in LEAVES))
        raise PatchError(
            f"patch: {class_of(model)} has modules that cannot be served; nothing was patched:"
            f"{_why(report.unknown, causes)}\n"
            f"Served are {architectures} encoders, with or without ForSequenceClassification, and {leaves}. "
            "With strict=False the modules above, and the encoder that holds them, keep stock arithmetic."
        )
    return report


def unknown(model: nn.Module) -> dict[str, str]:
    """The modules of `model` that cannot be served, path -> why."""
    return _replacements(model, PORTABLE, None, True)[0].unknown


def unpatch(model: nn.Module) -> None:
    """Undo patch: every module of `model` gets its class's own forward back, and nothing else was ever changed.

    A forward that was put before ours since then stays, and what it calls is the class's own from now on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    with CHANGING:
        for module in model.modules():
            held = module.__dict__
            ours: dict[str, Forward | Refusal] = {
                name: value for name, value in list(held.items()) if isinstance(value, Refusal)
            }
            if isinstance(forward := held_forward(module), Forward):
                ours["forward"] = forward
            for name, value in ours.items():
                forward = value.forward if isinstance(value, Refusal) else value
                if forward.module is module:  # a shallow copy holds another's
                    forward.undone = True
                    forward.graphs.forget()  # a report may hold the forward
                held.pop(name, None)


def _as_before(model: nn.Module, mode: Mode, backend: str | None, graphs: bool) -> None:
    """Two forwards of one model in two modes would give bits of neither mode."""
    for path, module in model.named_modules():
        forward = forward_of(module)
        if forward is not None and (forward.mode, forward.backend) != (mode, backend):
            was, asked = (f"mode {m.name!r}" + (f", backend {b!r}" if b else "") for m, b in
                          ((forward.mode, forward.backend), (mode, backend)))  # fmt: skip
            raise PatchError(
                f"patch: {path or 'the model'} ({class_of(module)}) is patched already, in {was}, and {asked} was asked for; "
                "call rk.unpatch(model) first"
            )
        if forward is not None and name_of(module) in ENCODERS and forward.wants_graphs != graphs:
            raise PatchError(
                f"patch: {path or 'the model'} ({class_of(module)}) is patched already, with graphs={forward.wants_graphs}, "
                f"and graphs={graphs} was asked for; call rk.unpatch(model) first"
            )


def _can_ever_serve(model: nn.Module, mode: Mode, backend: str | None) -> None:
    """Whether a mode of half precision can ever serve the model: operands of one dtype, and a GPU to move it to."""
    matrices = {name: p.dtype for name, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point()}
    first = next(iter(matrices.values()), torch.float16)
    for name, dtype in matrices.items():
        if dtype not in mode.operands or dtype != first:
            like = "" if first not in mode.operands or dtype == first else f" and {first} elsewhere"
            raise PatchError(
                f"patch: mode {mode.name!r} needs weights in float16 or bfloat16, all in one of them, "
                f"and {name} is {dtype}{like}; call model.half() or model.bfloat16() first, or take mode='portable'"
            )
    for path, m in model.named_modules():
        if (size := getattr(m, "attention_head_size", 0)) > MOST_IN_A_HEAD:
            raise PatchError(
                f"patch: mode {mode.name!r} needs heads of at most {MOST_IN_A_HEAD}, and attention_head_size of {path} is "
                f"{size}; take mode='portable'"
            )
    asked = [backend] if backend is not None else registry.having_mode(mode)
    gaps = {name: registry.without_mode(name, mode) for name in asked}
    if all(gaps.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in gaps.items())
        raise PatchError(f"patch: mode {mode.name!r} needs {mode.needs}, and none can be used here; {reasons}; "
                         "take mode='portable'")  # fmt: skip


def _why(unknown: dict[str, str], causes: dict[str, str]) -> str:
    """One line per class: first those with a reason of their own, then classes in no table; if there are none, the rest."""
    alike: dict[str, list[str]] = {}
    for path in sorted(causes, key=lambda path: not causes[path]) or unknown:
        alike.setdefault(unknown[path], []).append(path or "(the model itself)")
    many = {what: f" x {len(paths)}, e.g. " if len(paths) > 1 else " at " for what, paths in alike.items()}
    return "".join(f"\n  {what}{many[what]}{paths[0]}" for what, paths in alike.items())


def _replacements(model: nn.Module, mode: Mode, backend: str | None, graphs: bool) -> tuple[Report, dict[str, str]]:
    """The report, and of its unknown modules those that are the cause, as path -> reason."""
    modules = dict(model.named_modules())
    problems = {path: why for path, m in modules.items() if (why := _problem(m)) is not None}
    roots = [path for path, m in modules.items() if name_of(m) in ENCODERS]
    for root in roots:  # the encoder's forward does not call the modules inside it: they must be what it takes them for
        for inner, (m, why) in models.role_problems(modules[root]).items():
            path = f"{root}.{inner}" if root and inner else root or inner
            if problems.setdefault(path, why) == why:
                modules.setdefault(path, m)  # a module that stands at two places has one name
    served = [root for root in roots if not any(_inside(path, root) for path in problems)]
    covered = {path for path in modules for root in served if _inside(path, root)}

    report = Report(mode.name, {}, {}, {}, {}, backend)
    for path, m in modules.items():
        name, cls = name_of(m), class_of(m)
        if path in problems:
            why = problems[path] or (f"is quantised; {FLOAT_CHECKPOINT}" if quantised(m) else "")
            report.unknown[path] = f"{cls} ({why})" if why else _unmistakable(m)
            continue
        if name.rpartition(".")[2] != cls:
            report.notes.append(f"{path or 'the model'}: {cls} overrides nothing that is read, and is served as {name}")
        forward = None
        if name in EXACT:
            report.exact[path] = cls
            if name in GUARDS and path not in covered:
                forward = GUARDS[name]
        elif path in covered or name in LEAVES:
            report.replaced[path] = cls
            if path in served or path not in covered:
                forward = FORWARDS[name]
        elif name in ENCODERS:
            report.unknown[path] = f"{cls} (holds the unknown modules)"
        else:
            report.unknown[path] = f"{cls} (served only inside its whole model)"
        if forward is not None:
            report.forwards[path] = forward_of(m) or Forward(m, forward, mode, backend, graphs)
    return report, problems


def _unmistakable(m: nn.Module) -> str:
    """The class of m, which stands in no table; with its package where its name alone is that of a class that is served."""
    return name_of(m) if class_of(m) in SHORT else class_of(m)


def _problem(m: Any) -> str | None:
    """Why module m, by itself, cannot be served; "" if its class is in no table, None if it can."""
    if not isinstance(held_forward(m), Forward | None) and name_of(m) != COMPILED:
        return own_forward(m)
    return models.problem(m)


def _inside(path: str, root: str) -> bool:
    return root in ("", path) or path.startswith(root + ".")


SHORT = {name.rpartition(".")[2] for name in (*FORWARDS, *EXACT)}
WRAPPERS = {
    "DataParallel": "pass model.module",
    "DistributedDataParallel": "pass model.module",
}
NO_MODEL = {
    "str": "load it first, or take rk.Reranker(path)",
    "PosixPath": "load it first, or take rk.Reranker(path)",
    "list": "patch one at a time",
    "Pipeline": "pass its ranker, pipeline.get_component(name)",
}
HELP = "help(rk.patch) names what is taken"
# patch of patch.py takes these
HOLDERS = {
    "SentenceTransformer": "model[0].auto_model",
    "PeftModel": "model.base_model.model",
    "OptimizedModule": "model._orig_mod",
}
