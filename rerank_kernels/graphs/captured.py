"""Graphs: what was captured of one forward, and why a call was not replayed. Threads and streams take turns here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rerank_kernels.graphs.buckets import SEQUENCES, TOKENS, Bucket, Inputs, Tokens, bucket, write
from rerank_kernels.graphs.device import Device

R = TypeVar("R")
Outputs = tuple[Tensor, ...]
Body = Callable[[Inputs], Outputs]
Keep = Callable[[Inputs, Outputs], R]

MOST = 256  # graphs of one forward: beyond it all are dropped, for a caller that asks for other words of a head at each call
SHARED_FROM = 1 << 20  # bytes of an output that all graphs of a body write to one place, or each would keep its own
FIRST = "the first call of a model as it is"
BEYOND = f"more than {TOKENS[-1]:,} tokens or {SEQUENCES[-1]} sequences, or none"


@dataclass(frozen=True)
class _Captured:
    replay: Callable[[], None]
    inputs: Inputs
    outputs: Outputs


class Graphs:
    """Of one forward."""

    def __init__(self) -> None:
        self.replays = 0
        self.without: Counter[str] = Counter()  # why -> calls that ran without a graph
        self._lock = threading.RLock()
        self._device: Device | None = None
        self._drop(None, None)

    def __len__(self) -> int:
        return len(self._captured)

    def leave(self, why: str) -> None:
        """Count a call that runs without a graph."""
        with self._lock:
            self.without[why] += 1

    def become(self, state: object, make: Callable[[], Device]) -> None:
        """Drop all graphs, with their memory: from now on they are captured of `state`, which knows what they read."""
        with self._lock:
            self._drop(state, make)

    def forget(self) -> None:
        """Drop all graphs, with their memory."""
        with self._lock:
            self._drop(None, None)

    def run(self, state: object, what: Hashable, tokens: Tokens, body: Body, keep: Keep[R]) -> R | None:
        """keep(inputs, outputs) of body(inputs) for `tokens`; None where it has to run without a graph.

        state: what the caller knows the model to be. If another thread has found it to be another by now, nothing is replayed.
        what: names the body. keep: has to copy what it keeps, for the next replay writes the outputs anew.
        """
        size = bucket(tokens)
        with self._lock:
            found = self._replayable(state, size)
            if isinstance(found, str):
                self.leave(found)
                return None
            device, size = found
            with device.using():
                one = self._find(device, what, size, body)
                if isinstance(one, str):
                    self.leave(one)
                    return None
                device.send(lambda array: write(array, size, tokens), self._buffer[: size.numbers])
                one.replay()
                self.replays += 1
                return keep(one.inputs, one.outputs)

    def _drop(self, state: object, make: Callable[[], Device] | None) -> None:
        if self._device is not None:
            self._device.settle()  # a graph on its way may not lose its memory
        self.state, self._make, self._device, self._calls = state, make, None, 0
        self._captured: dict[tuple[Hashable, Bucket], _Captured] = {}
        self._refused: dict[Hashable, str] = {}  # what -> why it cannot be captured
        self._ceiling = TOKENS[-1] + 1  # tokens for which there was no memory
        self._places: dict[Hashable, Outputs] = {}  # what -> where its largest graph writes
        self._buffer = torch.empty(0, device="cpu")

    def _replayable(self, state: object, size: Bucket | None) -> tuple[Device, Bucket] | str:
        """The device, or why a call runs without a graph whatever it computes."""
        if size is None:
            return BEYOND
        if state is not self.state or self._make is None:
            return "a model that another thread changes"
        if len(self) > MOST:
            self._drop(state, self._make)
        self._calls += 1
        if self._calls == 1:  # who changes the model between all calls would capture at each of them
            return FIRST
        if self._device is None:
            self._device = self._make()
        return self._device, size

    def _find(self, device: Device, what: Hashable, size: Bucket, body: Body) -> _Captured | str:
        """The graph, captured at its first call; or why there is none."""
        if (found := self._captured.get((what, size))) is not None:
            return found
        # The largest one first: the memory that it needs serves all others after it.
        for one in (size,) if self._captured else dict.fromkeys((size.largest, size)):
            if what not in self._refused and one.tokens < self._ceiling:
                self._try(device, what, one, body)
        if what in self._refused:
            return self._refused[what]
        return self._captured.get((what, size), f"no memory to capture {self._ceiling:,} tokens")

    def _try(self, device: Device, what: Hashable, size: Bucket, body: Body) -> None:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not self._buffer.shape[0]:
                    self._buffer = device.zeros(Bucket(1, 1, 1).largest.numbers)
                # What is captured runs once before, and must not take for a token what a call of another size left there.
                buffer = self._buffer[: size.numbers].zero_()

                def run() -> tuple[Inputs, Outputs]:
                    inputs = Inputs.of(buffer, size)
                    return inputs, self._placed(what, body(inputs))

                replay, (inputs, outputs) = device.capture(run)
            except torch.OutOfMemoryError:
                self._ceiling = min(self._ceiling, size.tokens)
            except Exception as error:  # an op that waits for the device, or copies to it; or what the call itself will say
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._refused[what] = f"capture was refused: {first:.120}"
            else:
                self._captured[what, size] = _Captured(replay, inputs, outputs)
                if size == size.largest:
                    self._places.setdefault(what, outputs)

    def _placed(self, what: Hashable, outputs: Outputs) -> Outputs:
        """Outputs where the largest graph has its own: only one replay runs at a time, and what it gives is copied."""
        places = self._places.get(what, ())
        if len(places) != len(outputs):
            return outputs
        return tuple(
            place[: t.shape[0]].copy_(t) if t.nbytes >= SHARED_FROM else t for place, t in zip(places, outputs, strict=True)
        )
