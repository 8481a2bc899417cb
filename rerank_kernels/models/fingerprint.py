"""Fingerprint: whether anything that a forward reads is another than it was at the forward's last call.

It is compared at each call, so it is made of what C compares in one go: the live __dict__ of every module, beside a copy. One
entry in it that is another sends the forward to the whole check of roles.py, which serves or refuses by name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_modules

from rerank_kernels.models.roles import Roles, places


class Fingerprint:
    """Of all modules that `roles` names below `root`: class, attributes, modules, parameters by identity, hooks, settings."""

    def __init__(self, root: Any, roles: Roles) -> None:
        self.modules: list[Any] = list({id(m): m for _, _, m, _ in places(root, roles) if m is not None}.values())
        self.types: list[Any] = list(map(type, self.modules))
        dicts = [m.__dict__ for m in self.modules]
        dicts += [held for m in self.modules for held in (m._modules, m._parameters, m._buffers) if held]
        dicts += list({id(c): vars(c) for d in dicts if (c := d.get("config")) is not None and hasattr(c, "__dict__")}.values())
        hooks = [hooks for m in self.modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.unhooked: list[Any] = [h for h in hooks if not h]
        self.live: list[dict[Any, Any]] = dicts + [h for h in hooks if h]
        self.copies = [dict(d) for d in self.live]
        self.classes = list(dict.fromkeys(self.types))
        self.forwards = [cls.forward for cls in self.classes]
        # Their values are read, and may be written in place. An inference tensor has no version, and no write to it is counted.
        self.buffers: list[Tensor] = [
            b for m in self.modules for b in m._buffers.values() if b is not None and not b.is_inference()
        ]
        self.versions = [b._version for b in self.buffers]

    def same(self) -> bool:
        try:
            return (
                self.live == self.copies
                and not any(self.unhooked)
                and list(map(type, self.modules)) == self.types
                and [cls.forward for cls in self.classes] == self.forwards
                and [b._version for b in self.buffers] == self.versions
                and not torch_modules._global_forward_hooks
                and not torch_modules._global_forward_pre_hooks
            )
        except Exception:  # two values of which == gives no bool, as two tensors do: they are not one object
            return False
