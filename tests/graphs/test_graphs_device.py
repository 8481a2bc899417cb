"""Gpu: in which order it calls CUDA. A stand-in for torch.cuda writes the calls down; what they do, a real GPU has to show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rerank_kernels.graphs import device


class Stream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: Any) -> None:
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log, self.name = log, f"event {sum(one.startswith('made') for one in log)}"
        log.append(f"made {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")

    def record(self, stream: Stream) -> None:
        self.log.append(f"{self.name} behind {stream.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    streams = [Stream(written, "stream")]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    @contextlib.contextmanager
    def graph(graph: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        written.append(f"capture into {pool} on {stream.name}, {capture_error_mode}")
        with on(stream):
            yield
        written.append("captured")

    class CUDAGraph:
        def replay(self) -> None:
            written.append(f"replay on {streams[-1].name}")

    cuda = torch.cuda
    for name, fake in {
        "Event": lambda: Event(written),
        "Stream": lambda where: Stream(written, "side"),
        "stream": on,
        "current_stream": lambda: streams[-1],
        "device": lambda where: contextlib.nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "graph": graph,
        "CUDAGraph": CUDAGraph,
    }.items():
        monkeypatch.setattr(cuda, name, fake)
    monkeypatch.setattr(device.Gpu, "_on_the_host", lambda self, n: torch.zeros(n, dtype=torch.int64))
    return written


def test_order_of_calls(log: list[str]) -> None:
    gpu = device.Gpu(torch.device("cpu"))
    buffer = gpu.zeros(4)
    seen: list[list[int]] = []

    def body() -> str:
        log.append("body")
        return "out"

    with gpu.using():
        replay, out = gpu.capture(body)
    for i in range(3):
        with gpu.using():
            gpu.send(lambda array, i=i: array.fill(i), buffer[:3])
            replay()
            seen.append(buffer.tolist())
    gpu.settle()
    done, first, second = "event 0", "event 1", "event 2"
    turn = lambda event: [  # noqa: E731
        f"stream waits for {done}",
        f"host waits for {event}",
        f"{event} behind stream",
        "replay on stream",
        f"{done} behind stream",
    ]
    assert out == "out" and seen == [[i, i, i, 0] for i in range(3)]
    assert log == [
        *(f"made event {i}" for i in range(3)),
        f"stream waits for {done}",
        "side waits for stream",
        "body",
        "capture into pool on side, thread_local",
        "body",
        "captured",
        "stream waits for side",
        f"{done} behind stream",
        *turn(second),
        *turn(first),
        *turn(second),
        f"host waits for {done}",
    ]


def test_a_capture_that_fails_leaves_the_streams_in_order(log: list[str]) -> None:
    gpu = device.Gpu(torch.device("cpu"))

    def body() -> None:
        raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError), gpu.using():
        gpu.capture(body)
    assert log[-2:] == ["stream waits for side", "event 0 behind stream"]


def test_pinned_memory_is_the_hosts_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "zeros", lambda *size, **how: asked.update(how))
    device.Gpu._on_the_host(None, 4)  # type: ignore[arg-type]
    assert asked["device"] == "cpu" and asked["pin_memory"]
