"""A process that answers requests, and may die without the run: a rival's, another revision's, a study's, a GPU's cases.

Two libraries in one process would share its cores badly: the threads of each spin for some milliseconds after a call, in wait
for the next one. A process that has no turn sleeps. And a setting may need a process of its own (MKL_CBWR is read once), or a
kernel that faults may take its process along.

A function with its arguments goes there, and what it returns comes back. Where that is (call, answer), a number n is a turn: n
calls, answered by the seconds of one. Meanwhile a function may say what it begins (`step`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.harness.turns import AWAKE, Missing, seconds, short

PAUSE = 0.02  # seconds after which no thread spins any more
Calls = Callable[[int], object]  # the i-th of a turn
_asking: Connection[Any, Any] | None = None  # in a worker's process


class Worker:
    """The asking side. `at` is the last step that was said to begin; `patience` the seconds after which silence is death."""

    def __init__(
        self,
        tree: Path | None = None,
        environment: Mapping[str, str] | None = None,
        *,
        threads: int | None = None,
        pause: float = 0.0,
        awake: float = 0.0,
        patience: float | None = None,
        program: Sequence[str] = (__file__,),
    ) -> None:
        self.tree, self.pause, self.awake, self.patience, self.at = tree, pause, awake, patience, ""
        paths = [str(tree or ""), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self.pipe, there = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, *program, str(there.fileno()), str(threads or torch.get_num_threads())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})},
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
        )
        there.close()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Missing says what went wrong there, or that it died."""
        self.send((function, arguments))
        return self.answer()

    def turn(self, calls: int) -> float:
        time.sleep(self.pause)
        self.send((calls, self.awake))
        seconds: float = self.answer()
        time.sleep(self.pause)
        return seconds

    def send(self, question: tuple[Any, Any]) -> None:
        with contextlib.suppress(OSError):  # what it died of is in the answer that does not come
            self.pipe.send(question)

    def answer(self) -> Any:
        while True:
            try:
                if not self.pipe.poll(self.patience):
                    self.kill()
                    raise Missing(f"no answer for {self.patience:.0f} s")
                kind, said = self.pipe.recv()
            except (EOFError, OSError):
                raise Missing(f"its process ended with {self.process.wait()}; its message is above") from None
            if kind == "error":
                raise Missing(f"failed: {said}")
            if kind == "answer":
                return said
            self.at = said

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


_resident: dict[str, Worker] = {}


def resident(name: str, **how: Any) -> Worker:
    """The process of this name, which stays until `close`; a new one if it is dead. Missing if it does not start."""
    if name not in _resident or _resident[name].process.poll() is not None:
        _resident[name] = Worker(**how)
        _resident[name].ask(dict)
    return _resident[name]


def rival(name: str, **how: Any) -> Worker:
    """A resident that sleeps while others have their turns, and is awake before it is timed."""
    return resident(name, pause=PAUSE, awake=AWAKE, **how)


def close() -> None:
    while _resident:
        _resident.popitem()[1].kill()


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """The answer of a process that is there for this question alone."""
    with Worker() as worker:
        return worker.ask(function, *arguments)


def step(name: str) -> None:
    """What begins now, for the asking side; nothing where nobody asks."""
    if _asking is not None:
        _asking.send(("step", name))


def serve(pipe: Connection[Any, Any], threads: int) -> None:
    """Until the pipe closes."""
    global _asking
    _asking = pipe
    torch.set_num_threads(threads)
    nothing: Calls = lambda i: None  # noqa: E731
    call = nothing
    with torch.no_grad(), contextlib.suppress(EOFError):
        while True:
            try:
                function, arguments = pipe.recv()
                if isinstance(function, int):
                    answer = seconds(call, function, arguments)
                else:
                    call = nothing  # the last case's tensors go before the next one's come
                    answer = function(*arguments)
                    if isinstance(answer, tuple):
                        call, answer = answer
                pipe.send(("answer", answer))
            except EOFError:
                raise
            except Exception as error:
                pipe.send(("error", short(error)))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    from bench.harness import worker

    worker.serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
