"""PEFT's PeftModel: the model below its tuner. LoRA's layers in it are served as they are (rerank_kernels/models/lora.py)."""

from __future__ import annotations

from typing import Any

from rerank_kernels.models.bound import class_of
from rerank_kernels.patching.systems.resolved import Resolved, own_methods


def model(obj: Any, cls: type) -> Resolved:
    found = Resolved(f"PEFT {class_of(obj)}", obj)
    tuner = obj.base_model
    if type(tuner).__module__.startswith("peft.tuners."):
        found.modules["base_model.model"] = tuner.model
        found.notes.append("adapters may be switched, disabled and merged after patch: each call reads which are active")
    else:  # a prompt is learned, and put before the tokens of each call
        found.problems.append("its adapter works on the tokens of a call, not in layers, and is not served; LoRA is")
    found.problems += own_methods(obj, cls, ("_enable_peft_forward_hooks",))
    return found
