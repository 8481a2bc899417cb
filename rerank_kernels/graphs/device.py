"""Gpu: all that graphs need of CUDA. Tests put a recorder in its place that raises on what a real capture forbids."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
PINNED = 2  # buffers that are filled in turn, so that the host need not wait for the call before


class Device(Protocol):
    def using(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block the device is current, and its work comes after that of all blocks before, whatever their stream."""

    def settle(self) -> None:
        """Wait for the end of the last of those blocks."""

    def zeros(self, numbers: int) -> Tensor:
        """int64, for what graphs read."""

    def send(self, write: Callable[[Any], None], to: Tensor) -> None:
        """One copy to the device, of what `write` writes into an array of the host; the host does not wait for it."""

    def capture(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What replays `body`, and what it returned, which each replay writes anew."""


def capturing() -> bool:
    """Whether what runs now goes into a graph of somebody else."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Gpu:
    """A CUDA device. All graphs of one Gpu share a pool of memory, so no two of them may run at once: `using` sees to it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._stream: Any = None
        self._done = torch.cuda.Event()
        self._pinned: list[tuple[Tensor, Any]] = []
        self._turn = 0

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def settle(self) -> None:
        self._done.synchronize()

    def zeros(self, numbers: int) -> Tensor:
        self._pinned = [(self._on_the_host(numbers), torch.cuda.Event()) for _ in range(PINNED)]
        return torch.zeros(numbers, dtype=torch.int64, device=self.device)

    def _on_the_host(self, numbers: int) -> Tensor:
        return torch.zeros(numbers, dtype=torch.int64, device="cpu", pin_memory=True)

    def send(self, write: Callable[[Any], None], to: Tensor) -> None:
        self._turn = (self._turn + 1) % PINNED
        pinned, copied = self._pinned[self._turn]
        copied.synchronize()  # the copy out of this buffer, two calls ago, may be still to come
        part = pinned[: to.shape[0]]
        write(part.numpy())
        to.copy_(part, non_blocking=True)
        copied.record(torch.cuda.current_stream())

    def capture(self, body: Callable[[], T]) -> tuple[Callable[[], None], T]:
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                body()  # before it is captured: kernels are loaded, and Triton compiles its own
            # of this thread alone: what others do meanwhile on streams of their own is theirs
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = body()
        finally:
            here.wait_stream(self._stream)
        return graph.replay, out


# Type of a device -> what captures there, and the backends whose forwards it captures.
DEVICES: dict[str, tuple[Callable[[torch.device], Device], tuple[str, ...]]] = {"cuda": (Gpu, ("cuda", "triton"))}
