"""A process that answers requests, and may die without the run: a rival's, another revision's, a GPU's cases.

Two libraries in one process would share its cores badly: the threads of each spin for some milliseconds after a call, in wait
for the next one. A process that has no turn sleeps. And a setting may need a process of its own (MKL_CBWR is read once), or a
kernel that faults may take its process along.

Lines of JSON. {"call": "module:function", "with": arguments} is answered by what the function returns. Where that is (call,
answer), {"turn": n} makes n calls and is answered by the seconds of one. Meanwhile a function may say what it begins (`step`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.harness.turns import Died, seconds

PAUSE = 0.02  # seconds after which no thread spins any more
Ready = tuple[Callable[[int], object], dict[str, Any]]  # the i-th call of a turn, and the answer
_out: TextIO | None = None  # in a worker's process: where it answers


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
        self.pause, self.awake, self.patience, self.at = pause, awake, patience, ""
        places = [*([str(tree)] if tree else []), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, *program, str(threads or torch.get_num_threads())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._read = b""

    def ask(self, function: str, **arguments: Any) -> dict[str, Any]:
        self.send({"call": function, "with": arguments})
        return self.answer()

    def turn(self, calls: int) -> float:
        time.sleep(self.pause)
        self.send({"turn": calls, "awake": self.awake})
        seconds = float(self.answer()["seconds"])
        time.sleep(self.pause)
        return seconds

    def send(self, question: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # what it died of is in the answer that does not come
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        while "step" in (said := json.loads(self._line())):
            self.at = said["step"]
        return said

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        while b"\n" not in self._read:
            if not select.select([self.process.stdout], [], [], self.patience)[0]:
                self.kill()
                raise Died(f"no answer for {self.patience:.0f} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise Died(f"a contestant's process ended with {self.process.wait()}; its message is above")
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def step(name: str) -> None:
    """What begins now, for the asking side; nothing where nobody asks."""
    _say({"step": name})


def _say(answer: Mapping[str, Any]) -> None:
    if _out is not None:
        _out.write(json.dumps(answer) + "\n")
        _out.flush()


def serve(threads: int) -> None:
    """The other side, until the pipe closes. It answers on what was stdout, so that nothing a library prints comes between."""
    global _out
    _out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    call: Callable[[int], object] = lambda i: None  # noqa: E731
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            if "turn" in asked:
                _say({"seconds": seconds(call, asked["turn"], asked["awake"])})
                continue
            call = lambda i: None  # noqa: E731, the last case's tensors go before the next one's come
            try:
                module, _, function = asked["call"].partition(":")
                answer = getattr(importlib.import_module(module), function)(**asked["with"])
                if isinstance(answer, tuple):
                    call, answer = answer
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:400]}
            _say(answer)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    from bench.harness import worker

    worker.serve(int(sys.argv[1]))
