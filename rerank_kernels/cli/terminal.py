"""What the commands show: tables on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from rerank_kernels.cli import interrupt
from rerank_kernels.cli.errors import say
from rerank_kernels.cli.writing import set_stdout
from rerank_kernels.printable import printable

SECONDS = 60.0  # between two lines of progress, where no bar can be seen


class Printable:
    """A stream of text from which nothing steers a terminal, whoever writes to it: we, a warning, a library's logger."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def theirs() -> None:
    """stderr as it was, for a program that runs in this process and colours its own lines."""
    if isinstance(sys.stderr, Printable):
        sys.stderr = sys.stderr.stream


@contextlib.contextmanager
def printable_stderr() -> Iterator[None]:
    before = sys.stderr
    if before is not None:
        sys.stderr = Printable(before)
    try:
        yield
    finally:
        sys.stderr = before


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """What Rust prints of a panic is no line of ours, and may hold anything: the error that follows says what happened."""
    if sys.stderr is None or interrupt.stderr != 2:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        saved = os.dup(2)
    except OSError:  # closed by the shell's 2>&-
        yield
        return
    panicked = False
    with tempfile.TemporaryFile() as kept:
        try:
            interrupt.stderr = saved
            os.dup2(kept.fileno(), 2)
            yield
        except BaseException as error:
            panicked = any(type(one).__name__ == "PanicException" for one in (error, error.__cause__))
            raise
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os.dup2(saved, 2)
            interrupt.stderr = 2
            os.close(saved)
            if not panicked:  # what others wrote meanwhile
                kept.seek(0)
                with contextlib.suppress(OSError):
                    os.write(2, kept.read())


def console() -> Any:
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end with exit code 1, which is a broken promise's

        def print(self, *objects: Any, **how: Any) -> None:
            super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **how)

    # a letter that stdout's encoding does not have is no reason to stop
    set_stdout(errors="replace")
    return Ours(width=_columns())


def _columns() -> int:
    """What the user says, else the terminal that stdout is (rich asks stdin's), else 140: a file has no width."""
    if (said := os.environ.get("COLUMNS", "")).isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, no file
        return 140


@contextlib.contextmanager
def progress(what: str, total: float | None, seconds: float | None = None) -> Iterator[Any]:
    """Yields a function that takes how far it is, of `total`, None if unknown.

    On stderr: a bar if that is a terminal, else one line every `seconds`.
    """
    if not sys.stderr.isatty():
        with _lines(what, total, SECONDS if seconds is None else seconds) as advance:
            yield advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    own = sys.stderr.stream if isinstance(sys.stderr, Printable) else sys.stderr  # the bar does steer the terminal
    with Progress(*columns, console=Console(file=own), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def _lines(what: str, total: float | None, seconds: float) -> Iterator[Any]:
    """A log shows that the command lives and how long it will: by the clock, for one step may take many minutes."""
    started, ended = time.monotonic(), threading.Event()
    steps: list[tuple[float, float]] = []  # when it was how far: at the first step, for a run that goes on, and at the last

    def advance(done: float) -> None:
        steps[1:] = [(time.monotonic(), done)]

    def tell() -> None:
        while not ended.wait(seconds):
            say(f"{what}: {_far(list(steps), total)} after {_duration(time.monotonic() - started)}{_left(list(steps), total)}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


def _far(steps: list[tuple[float, float]], total: float | None) -> str:
    done = steps[-1][1] if steps else 0.0
    if total is None:
        return f"{done:,.0f}"
    count = f"{done:,.0f} of {total:,.0f}, " if total > 1 else ""
    return f"{count}{done / total if total else 1.0:.0%}"


def _left(steps: list[tuple[float, float]], total: float | None) -> str:
    if total is None or len(steps) < 2 or steps[1][1] <= steps[0][1]:
        return ""
    (then, first), (_, done) = steps
    return f", about {_duration((time.monotonic() - then) * (total - done) / (done - first))} left"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
