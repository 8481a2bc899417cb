"""What stands for PEFT where it is not installed: its LoRA layer, its wrapper of a head, and the objects around a model.

Classes with the real ones' modules and names, by which they are found, and with those lines of theirs that decide about a bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from systems import of


@of("peft.tuners.lora.layer")
class Linear(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_magnitude_vector = nn.ParameterDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_variant: dict[str, Any] = {}
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = self.fan_in_fan_out = False

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def add(self, name: str, r: int, alpha: float, draw: torch.Generator) -> None:
        n, k = self.weight.shape
        self.lora_A[name], self.lora_B[name] = nn.Linear(k, r, bias=False), nn.Linear(r, n, bias=False)
        self.lora_dropout[name], self.scaling[name], self.use_dora[name] = nn.Dropout(0.1), alpha / r, False
        with torch.no_grad():
            for p in (self.lora_A[name].weight, self.lora_B[name].weight):
                p.copy_(torch.randn(p.shape, generator=draw) * 0.15)  # type: ignore[operator]

    def delta(self, name: str) -> Tensor:
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]  # type: ignore[operator]

    def merge(self) -> None:
        for name in self.active_adapters:
            self.base_layer.weight.data += self.delta(name)  # type: ignore[operator]
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self.base_layer.weight.data -= self.delta(self.merged_adapters.pop())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.lora_A:
                    low = self.lora_A[name](self.lora_dropout[name](x.to(self.lora_A[name].weight.dtype)))  # type: ignore[arg-type]
                    result = result + self.lora_B[name](low) * self.scaling[name]
        return result.to(x.dtype)


@of("peft.utils.other")
class ModulesToSaveWrapper(nn.Module):
    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module, self.modules_to_save = original_module, nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.disable_adapters = False

    def forward(self, *args: Any) -> Any:
        off = self.disable_adapters or not self.active_adapters
        return (self.original_module if off else self.modules_to_save[self.active_adapters[0]])(*args)


@of("peft.tuners.lora.model")
class LoraModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)


@of("peft.peft_model")
class PeftModel(nn.Module):
    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def layers(self) -> list[Any]:
        return [m for m in self.modules() if isinstance(m, Linear | ModulesToSaveWrapper)]

    def set_adapter(self, *names: str) -> None:
        for m in self.layers():
            m.active_adapters = list(names)

    def disable(self, off: bool = True) -> None:
        for m in self.layers():
            m.disable_adapters = off

    def merge_adapter(self) -> None:
        for m in self.layers():
            if isinstance(m, Linear):
                m.merge()

    def unmerge_adapter(self) -> None:
        for m in self.layers():
            if isinstance(m, Linear):
                m.unmerge()

    def merge_and_unload(self) -> Any:
        self.merge_adapter()
        inner: Any = self.base_model.model
        for path, m in list(inner.named_modules()):
            holder, _, name = path.rpartition(".")
            if isinstance(m, Linear):
                setattr(inner.get_submodule(holder), name, m.base_layer)
            elif isinstance(m, ModulesToSaveWrapper):
                setattr(inner.get_submodule(holder), name, m.modules_to_save[m.active_adapters[0]])
        return inner


@of("peft.peft_model")
class PeftModelForSequenceClassification(PeftModel):
    pass


def adapted(model: Any, targets: Sequence[str] = ("query", "value"), *, saves: bool = True, seed: int = 5) -> Any:
    """`model` with adapters "default" (active) and "other" on the layers whose paths end in `targets`, in a PeftModel.

    saves: its head is one of each adapter's own, as PEFT's task type SEQ_CLS has it.
    """
    draw = torch.Generator().manual_seed(seed)
    for path, m in list(model.named_modules()):
        if type(m) is nn.Linear and path.endswith(tuple(targets)):
            layer = Linear(m)
            layer.add("default", 4, 9.0, draw)
            layer.add("other", 3, 5.0, draw)
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, layer)
    if saves:
        head = "score" if hasattr(model, "score") else "classifier"
        wrapper = ModulesToSaveWrapper(getattr(model, head))
        for adapter in ("default", "other"):
            wrapper.modules_to_save[adapter] = copy.deepcopy(getattr(model, head))
            with torch.no_grad():
                for p in wrapper.modules_to_save[adapter].parameters():
                    p.copy_(torch.randn(p.shape, generator=draw) * 0.15)
        setattr(model, head, wrapper)
    made = PeftModelForSequenceClassification(LoraModel(model)).eval()
    made.set_adapter("default")
    return made
