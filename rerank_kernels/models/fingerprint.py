"""Fingerprint: whether anything that a forward reads is another than it was at the forward's last call.

It is compared at each call, so it is made of lists that C compares in one go. One entry that is another sends the forward to
the whole check of roles.py, which serves or refuses by name.
"""

from __future__ import annotations

import copy
import sys
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_modules

from rerank_kernels.models.bound import name_of
from rerank_kernels.models.roles import SWITCHES, Roles, own_classes, places

_ALWAYS = ("_forward_hooks", "_forward_pre_hooks", "_modules", "_parameters", "_buffers")


REGISTRIES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
)


def _copied(d: dict[Any, Any]) -> dict[Any, Any]:
    """Of a config with what is inside its entries, such as rope_parameters: it is written in place too."""
    if "model_type" not in d and "transformers_version" not in d:
        return dict(d)
    return {key: copy.deepcopy(value) if type(value) in (dict, list) else value for key, value in d.items()}


class Fingerprint:
    """Of all modules that `roles` names below `root`: class, attributes read, modules and parameters, hooks, settings."""

    def __init__(self, root: Any, roles: Roles) -> None:
        read: dict[Any, set[str]] = {}
        for _, _, m, role in places(root, roles):
            if m is not None:
                attributes = {a.attribute.partition(".")[0] for a in role.assumes} | {
                    n.removesuffix("?") for n in role.parameters
                }
                read[m] = read.get(m, {"training", "forward", *SWITCHES}) | attributes
        self.modules = list(read)
        self.types: list[Any] = list(map(type, self.modules))
        self.dicts = [m.__dict__ for m in self.modules]
        self.sizes = list(map(len, self.dicts))  # a new attribute may hide a module, a parameter or the forward
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for m, names in read.items():
            alike.setdefault((*_ALWAYS, *sorted(names & m.__dict__.keys())), []).append(m.__dict__)
        self.attributes = [(get := itemgetter(*names), dicts, list(map(get, dicts))) for names, dicts in alike.items()]
        # What those attributes hold, where it is written in place.
        self.live: list[Any] = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers) if d]
        configs = [m.__dict__["config"] for m in self.modules if "config" in m.__dict__]
        self.live += {id(c): vars(c) for c in configs if hasattr(c, "__dict__")}.values()
        hooks = [hooks for m in self.modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.unhooked: list[Any] = [h for h in hooks if not h]
        self.live += [h for h in hooks if h]
        self.live += {c: vars(c) for t in self.types for c in own_classes(t)}.values()
        self.live.append(vars(sys.modules[name_of(root).rpartition(".")[0]]))  # the functions that its classes call
        for module, name in REGISTRIES:  # an attention or a mask of one's own, under the name of a stock one
            registry = getattr(sys.modules.get(module), name, None)
            self.live += [
                d for d in (getattr(registry, "_global_mapping", None), getattr(registry, "_local_mapping", None)) if d
            ]
        self.copies = list(map(_copied, self.live))
        self.configs = [(d, d["config"]) for d in self.dicts if "config" in d]
        buffers = [b for m in self.modules for b in m._buffers.values() if b is not None]
        self.buffers: list[Tensor] = [b for b in buffers if b.device.type == "cpu"]
        self.values = [b.clone() for b in self.buffers]  # no version counts a write through .data, or under inference_mode
        self.elsewhere: list[Tensor] = [b for b in buffers if b.device.type != "cpu" and not b.is_inference()]
        self.versions = [b._version for b in self.elsewhere]

    def same(self) -> bool:
        try:
            for get, dicts, were in self.attributes:
                if list(map(get, dicts)) != were:
                    return False
            return (
                list(map(len, self.dicts)) == self.sizes
                and all(d["config"] is config for d, config in self.configs)  # two that differ may be == in transformers
                and self.live == self.copies
                and not any(self.unhooked)
                and list(map(type, self.modules)) == self.types
                and all(map(torch.equal, self.buffers, self.values))
                and [b._version for b in self.elsewhere] == self.versions
                and not torch_modules._global_forward_hooks
                and not torch_modules._global_forward_pre_hooks
            )
        except Exception:  # an attribute is gone, or == of two values is no bool, as of two tensors
            return False
