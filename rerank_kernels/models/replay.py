"""Replay: the packed forward of a model as a CUDA graph, on a device that has them; where it cannot be, the reason is counted.

What a graph was captured of is seen at each call: all that the fingerprint compares, and where each weight lies. A weight that
was moved, re-typed or replaced drops the graphs. One that was written in place is read by the next replay, as by any call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rerank_kernels.backend import registry
from rerank_kernels.graphs import device
from rerank_kernels.graphs.buckets import Tokens
from rerank_kernels.graphs.captured import Body, Graphs, Keep
from rerank_kernels.models import lora
from rerank_kernels.models.bound import Forward, name_of, served_by
from rerank_kernels.models.fingerprint import Fingerprint
from rerank_kernels.ops.opaque import traced

R = TypeVar("R")
_form = attrgetter("dtype", "shape")


class _State:
    """What graphs of a forward are captured of; `why`: what in it stands in the way of any."""

    def __init__(self, seen: Fingerprint, backend: str, why: Callable[[], str | None]) -> None:
        self.seen, self.backend = seen, backend
        self.select = registry.select  # the controls of verify put another one in its place, whose kernels are wrong
        held = [t for m in seen.modules for t in (*m._parameters.values(), *m._buffers.values())]
        self.tensors: list[Tensor] = [t for t in held if t is not None]
        self.pointers, self.forms, self.lies = self._looked()
        self.why = why()
        if any(name_of(m) in (lora.LINEAR, lora.SAVED) for m in seen.modules):
            self.why = "adapters, whose choice is read at each call"
        elif not all(self.lies):
            self.why = "a weight that is not contiguous, which is copied"

    def _looked(self) -> tuple[list[int], list[Any], list[bool]]:
        return (
            list(map(Tensor.data_ptr, self.tensors)),
            list(map(_form, self.tensors)),
            list(map(Tensor.is_contiguous, self.tensors)),
        )

    def same(self, seen: Fingerprint, backend: str) -> bool:
        known = self.seen is seen and self.backend == backend and self.select is registry.select
        return known and self._looked() == (self.pointers, self.forms, self.lies)


class Replay:
    """For one call of a model: its numbers are to be on the host."""

    def __init__(self, graphs: Graphs, state: _State) -> None:
        self.graphs = graphs
        self.state = state

    def leave(self, why: str) -> None:
        """The call runs without a graph."""
        self.graphs.leave(why)

    def run(self, what: Hashable, tokens: Tokens, body: Body, keep: Keep[R]) -> R | None:
        """Graphs.run."""
        return self.graphs.run(self.state, what, tokens, body, keep)


def possible(m: Any, where: torch.device, why: Callable[[], str | None] = lambda: None) -> Replay | None:
    """For a call of m, whose weights are at `where`, behind `ready`; None if no graph can serve it. why: what of the model
    stands in the way, asked again when the model is another."""
    if traced() or (forward := served_by(m)) is None or not forward.wants_graphs:
        return None
    if where.type not in device.DEVICES:
        if len(forward.graphs):  # it came from a GPU, where they would keep their memory
            forward.graphs.forget()
        return None
    found = _replay(forward, where, why)
    if isinstance(found, Replay):
        return found
    forward.graphs.leave(found)
    return None


def without(m: Any, where: torch.device, why: str) -> None:
    """Count a call of m that no graph serves; where one could, the report says why none did."""
    forward = None if traced() or where.type not in device.DEVICES else served_by(m)
    if forward is not None and forward.wants_graphs:
        forward.graphs.leave(why)


def _replay(forward: Forward, where: torch.device, why: Callable[[], str | None]) -> Replay | str:
    make, backends = device.DEVICES[where.type]
    if forward.seen is None:
        return "a call that is traced"
    if _get_current_dispatch_mode() is not None:
        return "a TorchDispatchMode around the call"
    if (backend := registry.active(where).name) not in backends:
        return f"backend {backend}"
    if device.capturing():
        return "a graph of somebody else, which is being captured"
    graphs, seen = forward.graphs, forward.seen
    state = graphs.state
    if not isinstance(state, _State) or not state.same(seen, backend):
        state = _State(seen, backend, why)
        graphs.become(state, lambda: make(where))
    return Replay(graphs, state) if state.why is None else state.why


def said(forward: Forward) -> str:
    """Of a report: what was captured, and what ran without."""
    graphs = forward.graphs
    if not forward.wants_graphs:
        return "off"
    where = next(forward.module.parameters()).device
    if where.type not in device.DEVICES:
        return "none, no GPU" if where.type == "cpu" else f"none on {where.type}"
    without = "".join(f"; {n} without: {why}" for why, n in sorted(graphs.without.items()))
    return f"{len(graphs)} captured, {graphs.replays} replayed{without}"
