"""A device for graphs on a machine without a GPU: what a graph would hold is recorded op by op, and run again at each replay.

A recording raises on what a real capture forbids: a look at a number, a copy to or from the host, a shape that depends on
numbers. What a GPU leaves undefined holds NaN here: rows of no sequence, and what lies in memory before it is written. A copy
to the device is made at the last moment at which a GPU may make it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rerank_kernels.graphs import device

FORBIDDEN = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "unique_dim"),
    *("_unique2", "unique_consecutive", "bincount", "lift_fresh", "lift_fresh_copy", "pin_memory", "_pin_memory", "allclose"),
}
LOOKS = {"tolist", "numpy", "item", "cpu", "cuda", "__bool__", "__int__", "__float__", "__index__", "__array__", "to_dense"}
simulated = False  # the kernels are a GPU's own, and take offsets that end before the last row
OFFSETS = {"attention": 3, "attention_tensor": 3, "pool": 1}  # ops that read offsets -> which argument they are
FAKE = {"new_empty", "empty", "empty_like", "new_empty_strided", "empty_strided"}


class Refused(RuntimeError):
    """What CUDA would say."""


def short(function: Any) -> str:
    return str(function.overloadpacket).rpartition(".")[2]


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As on a GPU, where the kernels of ops that read offsets leave alone what is of no sequence; a CPU refuses it."""
    name = short(function)
    if simulated or name not in OFFSETS or "rerank_kernels" not in str(function):
        return function(*args, **kwargs)
    given = list(args)
    total = int(given[OFFSETS[name]][-1])
    if name == "pool":
        return function(args[0][:total], *args[1:], **kwargs)
    of_keys = total if given[4] is None else int(given[4][-1])
    given[:3] = [t[:n] for t, n in zip(args, (total, of_keys, of_keys), strict=False)]
    found = function(*given, **kwargs)
    return torch.cat([found, found.new_full((args[0].shape[0] - total, *found.shape[1:]), float("nan"))])


def addresses(value: Any) -> Any:
    """A graph knows memory, and no object that has other memory by now."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {name: addresses(inner) for name, inner in value.items()}
    return type(value)(map(addresses, value)) if type(value) in (list, tuple) else value


class Emulated(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, short(function)
        copied = name == "_to_copy" and kwargs.get("device") not in (None, torch.device("cpu"))
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in FORBIDDEN or copied or repeats or masked:
            raise Refused(f"operation not permitted when stream is capturing: {name}")
        out = run(function, args, kwargs)
        self.steps.append((function, addresses(args), addresses(kwargs), out))
        return out


class Looking(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        key = args[1] if name in ("__getitem__", "__setitem__") else ()
        if name in LOOKS or any(isinstance(k, list) for k in (key if isinstance(key, tuple) else (key,))):
            raise Refused(f"operation not permitted when stream is capturing: {name}")
        return function(*args, **(kwargs or {}))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Recorder:
    """graphs.device.Device. memory: for how many tokens a capture finds some."""

    made: list[Recorder]
    memory = 1 << 30
    slow = False  # so that another thread would come in, if it could

    def __init__(self, where: torch.device) -> None:
        assert where.type == "cpu"
        self.captures: list[int] = []
        self.replayed = self.inside = 0
        self.pinned: list[tuple[np.ndarray, list[Callable[[], None]]]] = []
        self.turn = 0
        type(self).made.append(self)

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        self.inside += 1
        assert self.inside == 1, "two calls at once"
        try:
            yield
        finally:
            self.inside -= 1

    def settle(self) -> None:
        assert self.inside == 0

    def zeros(self, numbers: int) -> Tensor:
        self.pinned = [(np.zeros(numbers, np.int64), []) for _ in range(device.PINNED)]
        self.buffer = torch.zeros(numbers, dtype=torch.int64, device="cpu")
        return self.buffer

    def send(self, write: Callable[[Any], None], to: Tensor) -> None:
        self.turn = (self.turn + 1) % len(self.pinned)
        array, coming = self.pinned[self.turn]
        write(array[: to.shape[0]])
        if self.slow:
            time.sleep(0.002)
        coming.append(lambda: to.copy_(torch.from_numpy(array[: to.shape[0]])))

    def arrive(self) -> None:
        for _, coming in self.pinned:
            for copy in coming:
                copy()
            coming.clear()

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Emulated():
            body()
        self.captures.append(-1)
        with Looking(), Recording() as recording:
            inputs, outputs = body()
        tokens = inputs.ids.shape[0]
        if tokens > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {tokens} tokens")
        self.captures[-1] = tokens
        steps, outside = recording.steps, {storage(self.buffer)}

        def again() -> None:
            self.replayed += 1
            self.arrive()
            fresh = []  # what a step makes, and no step before it: other graphs have used that memory since
            for _, args, kwargs, out in steps:
                known = {storage(t) for t in tensors([*args, *kwargs.values()])} | outside
                fresh.append([t for t in tensors(out) if storage(t) not in known])
            for made in fresh:
                for t in made:
                    t.fill_(float("nan") if t.is_floating_point() else 0)
            for (function, args, kwargs, out), made in zip(steps, fresh, strict=True):
                found = tensors(run(function, args, kwargs)) if made or function._schema.is_mutable else []
                for t, new in zip(tensors(out), found, strict=False):
                    if any(t is one for one in made) and short(function) not in FAKE:
                        t.copy_(new)

        return again, (inputs, outputs)


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, backends: tuple[str, ...] = ("cpu",)) -> Iterator[type[Recorder]]:
    """Inside the block a CPU is a device that has graphs. Gives the class, whose `made` are those that forwards made."""

    class Here(Recorder):
        made: list[Recorder] = []  # noqa: RUF012

    with monkeypatch.context() as patch:
        patch.setitem(device.DEVICES, "cpu", (Here, backends))
        yield Here
