"""LoRA as PEFT puts it into a model: a linear layer with adapters beside it, served without merging.

y = act(x · Wᵀ + bias + Σ s B(A x)) over the active adapters, in their order (NUMERICS.md, "A LoRA layer"). Which adapters are
active, merged or disabled is read at each call, as PEFT itself reads it. What is no plain LoRA is refused: DoRA, another base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rerank_kernels.errors import PatchError
from rerank_kernels.models.bound import Forward, class_of, hooked, name_of, whole_name_of
from rerank_kernels.ops.linear import activation, linear
from rerank_kernels.ops.opaque import opaque

LINEAR = "peft.tuners.lora.layer.Linear"
SAVED = "peft.utils.other.ModulesToSaveWrapper"  # around a head that was trained whole
MERGE = "merge it first: model = peft_model.merge_and_unload(), then rk.patch(model)"


_WATCHED = "what stands in it has hooks or a forward of its own, which do not run; remove them"


def _watched(m: Any) -> bool:
    """Whether a module that is never called has what would run if it were."""
    return hooked(m) or not isinstance(vars(m).get("forward"), Forward | None)


def is_lora(m: object) -> bool:
    return name_of(m) == LINEAR


def problem(m: Any) -> str | None:
    """Why a layer of class LINEAR, with the adapters that are active now, cannot be served; None if it can."""
    if type(m.base_layer) is not nn.Linear:
        return f"its base_layer is a {whole_name_of(m.base_layer)}; {MERGE}"
    if m.disable_adapters and m.merged:
        return "its adapters are disabled and merged, and the next stock call would unmerge them; call unmerge_adapter() first"
    for name in _active(m):
        variant = getattr(m, "lora_variant", {}).get(name)  # before version 0.16 a flag
        if variant is not None or m.use_dora.get(name):
            return f"adapter {name!r} is no plain LoRA ({'DoRA' if variant is None else class_of(variant)}); {MERGE}"
        if m.fan_in_fan_out:
            return f"fan_in_fan_out is set; {MERGE}"
        for inner in (m.lora_A[name], m.lora_B[name]):
            if type(inner) is not nn.Linear:
                return f"adapter {name!r} holds a {whole_name_of(inner)}; {MERGE}"
        if m.lora_dropout[name].training and getattr(m.lora_dropout[name], "p", 0.0):
            return f"the dropout of adapter {name!r} is set to train; call model.eval()"
        if any(map(_watched, (m.lora_A[name], m.lora_B[name], m.lora_dropout[name]))):
            return _WATCHED
    return _WATCHED if _watched(m.base_layer) else None


def saved_problem(m: Any) -> str | None:
    """Why a wrapper of class SAVED cannot be served; None if it can."""
    if not m.disable_adapters and len(m.active_adapters) > 1:
        return f"several of its modules are active at once; {MERGE}"
    return None


def held(m: Any) -> Any:
    """The module that a wrapper of class SAVED uses now; any other module is itself."""
    if name_of(m) != SAVED:
        return m
    names = [] if m.disable_adapters else m.active_adapters
    return m.modules_to_save[names[0]] if names else m.original_module


def product(
    m: Any, x: Tensor, act: str | None = None, out_dtype: torch.dtype | None = None, residual: Tensor | None = None
) -> Tensor:
    """What `linear` of a plain layer is, for one of class LINEAR."""
    if (why := problem(m)) is not None:
        raise PatchError(f"LoRA: a layer of the patched model cannot be served as it is now: {why}")
    base, names = m.base_layer, _active(m)
    if not names:
        return linear(x, base.weight, base.bias, activation=act, residual=residual, out_dtype=out_dtype)
    y = linear(x, base.weight, base.bias, out_dtype=torch.float32)
    for name in names:
        a, b = m.lora_A[name], m.lora_B[name]
        # adapters are float32 beside a half body, which mode tensor does not take
        low = linear(x, a.weight, a.bias, out_dtype=torch.float32, mode="portable")
        y = added(y, linear(low, b.weight, b.bias, out_dtype=torch.float32, mode="portable"), float(m.scaling[name]))
    y = y if act is None else activation(y, act)
    return (y if residual is None else y + residual.float()).to(out_dtype or x.dtype)


@opaque(lambda y, update, scale: y.new_empty(y.shape))
def added(y: Tensor, update: Tensor, scale: float) -> Tensor:
    """y + update · scale, rounded twice; an op, for a compiler that a model was exported to would make one fma of it."""
    return y + update * scale


def _active(m: Any) -> list[str]:
    """The adapters that are added to the base layer's product."""
    return [] if m.disable_adapters or m.merged else [name for name in m.active_adapters if name in m.lora_A]
