"""A contestant in a process of its own: this side asks over a pipe, the other one makes ready and takes a turn.

Two libraries in one process would share its cores badly: the threads of each spin for some milliseconds after a call, in wait
for the next one, and are in the way of whoever has the next turn. A process that has no turn sleeps.

Lines of JSON: {"prepare": what} is answered by what the contestant says of itself, {"turn": calls} by {"seconds": of a call}.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PAUSE = 0.02  # seconds after which no thread spins any more


class Died(SystemExit):
    """The other side's process ended. Who can do without it catches this; else the run ends."""


class Worker:
    """The asking side."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, pause: float = 0.0) -> None:
        self.pause = pause
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said = self._answer()

    def prepare(self, what: Any) -> dict[str, Any]:
        return self._ask({"prepare": what})

    def turn(self, calls: int) -> float:
        time.sleep(self.pause)
        seconds = float(self._ask({"turn": calls})["seconds"])
        time.sleep(self.pause)
        return seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # what it died of is in the answer that does not come
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Died(f"a contestant's process ended with {self.process.wait()}; its message is above")
        return json.loads(line)


Ready = tuple[Callable[[], Any], dict[str, Any]]  # the call that a turn makes, and the answer


def serve(prepare: Callable[[Any], Ready], seconds: Callable[[Callable[[], Any], int], float], **first: Any) -> int:
    """The other side, until the pipe closes: answers on what was stdout, so that nothing a library prints comes between."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    say(first)
    call: Callable[[], Any] = lambda: None  # noqa: E731
    for line in sys.stdin:
        question = json.loads(line)
        if "turn" in question:
            say({"seconds": seconds(call, question["turn"])})
            continue
        call = lambda: None  # noqa: E731, the last case's tensors go before the next one's come
        try:
            call, answer = prepare(question["prepare"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        say(answer)
    return 0
