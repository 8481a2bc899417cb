"""What the commands show: tables on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from rerank_kernels.cli.writing import set_stdout


def console() -> Any:
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end with exit code 1, which is a fallen promise's

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
def progress(what: str, total: float | None) -> Iterator[Any]:
    """Yields a function that takes how far it is; a bar on stderr if that is a terminal. total: None if unknown."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
