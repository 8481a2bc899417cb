"""What goes wrong, as one line that a user can act on."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import NoReturn

from rerank_kernels.errors import BackendError
from rerank_kernels.printable import printable


class InputError(Exception):
    """What the user gave is at fault; the message is all they need to see."""


def fail_with(error: Exception) -> NoReturn:
    raise InputError(str(error)) from error


def message(error: BaseException) -> str:
    """One line if the user can act on it. All else is our fault: its traceback goes first, and 1 stays a broken promise."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (InputError, OSError, BackendError)):
        return str(error)
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return f"unexpected {type(error).__name__}: {error}"


def say(message: str) -> None:
    with contextlib.suppress(OSError):  # where stderr cannot be written the exit code has to do
        print("rerank-kernels:", printable(" ".join(message.splitlines())), file=sys.stderr, flush=True)
