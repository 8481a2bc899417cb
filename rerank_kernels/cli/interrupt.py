"""Signals that end the command: Ctrl-C, SIGTERM, SIGHUP. Each cleans up, says one line, and the exit code is 130.

A signal raises KeyboardInterrupt where that can be caught and cleaned up. Where it cannot - inside the imports of torch and
transformers, which turn it into other errors or print it - the process cleans up and ends at once. Where something must be done
whole, it waits (held). It also waits for the pairs in work of a run that can be resumed (patient).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

LINE = "rerank-kernels: interrupted"
PATIENT = b"rerank-kernels: stopping when the pairs in work are done; once more to stop at once\n"
AGAIN = 2.0  # seconds in which a second signal does not disturb the cleaning up after the first

stderr = 2  # where lines go that Python's own stream cannot write now
files: set[str] = set()  # to be removed by a process that ends at once
came = False  # a signal was seen
_held = _patient = 0
_loading = _over = False
_raised = -AGAIN


def _handle(number: int, frame: object) -> None:
    global came, _raised
    first, came = not came, True
    if _patient and first and not _over:
        with contextlib.suppress(OSError):
            os.write(stderr, PATIENT)
    elif _held or _over or time.monotonic() < _raised + AGAIN:
        pass
    elif _loading:
        leave()
    else:
        _raised = time.monotonic()
        raise KeyboardInterrupt


def leave() -> None:
    """End the process as an interrupted one, without Python's own end: no code of others runs, no traceback is printed."""
    for path in files:
        with contextlib.suppress(OSError):
            os.unlink(path)
    with contextlib.suppress(OSError):
        os.write(stderr, LINE.encode() + b"\n")
    os._exit(130)


def check() -> None:
    """Raise what came while it was held, or what other code caught and dropped."""
    if came and not _over:
        raise KeyboardInterrupt


@contextlib.contextmanager
def held() -> Iterator[None]:
    """What is done here is done whole; check() afterwards."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """The first signal only asks for the end: whoever works here calls check() often."""
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1


def over() -> None:
    """The work is done: a signal no longer changes what is said of it."""
    global _over
    _over = True


@contextlib.contextmanager
def loading(ours: bool) -> Iterator[None]:
    """Imports: a signal ends the process at once, if it is `ours`."""
    global _loading
    before, _loading = _loading, ours
    try:
        yield
    finally:
        _loading = before


@contextlib.contextmanager
def caught(ours: bool) -> Iterator[None]:
    """Handle the signals. ours: the process ends after this, and a signal at its very end changes nothing any more.

    A signal that is ignored stays ignored (nohup); only the main thread may say so, and only there does it matter.
    """
    global came, _over, _raised
    came, _over, _raised = False, False, -AGAIN
    before: dict[int, Any] = {}
    hook = sys.unraisablehook

    def unraisable(what: Any) -> None:  # an interrupt in a destructor: check() will see it
        if not (came and what.exc_type is KeyboardInterrupt):
            hook(what)

    try:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and (now := signal.getsignal(number)) is not signal.SIG_IGN:
                before[number] = now
                signal.signal(number, _handle)
        sys.unraisablehook = unraisable
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.SIG_IGN if ours else handler)
