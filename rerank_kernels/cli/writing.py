"""What the commands write: stdout, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rerank_kernels.cli.errors import InputError

STDOUT = "<stdout>"
NUMBERS = ("logit", "score", "complement")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says what could not be written. Nobody reading our stdout is no failure, and stays BrokenPipeError."""
    try:
        yield
    except OSError as error:
        if name == STDOUT and isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"{name}: {error.strerror or error}") from None


class Out:
    def __init__(self, file: IO[str], name: str) -> None:
        self.file, self.name = file, name

    def write(self, text: str) -> None:
        with naming(self.name):
            self.file.write(text)


def shortest(*values: Any) -> list[float]:
    """Python floats that print as the shortest decimals which read back as these float32."""
    import numpy as np

    return [float(str(np.float32(value))) for value in values]


def line(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a field we only carry holds half of a surrogate pair
        text = json.dumps(record)
    return text + "\n"


@contextlib.contextmanager
def writer(path: str) -> Iterator[Out]:
    """A text file that takes the place of `path` when the block ends well, and leaves no trace if it does not."""
    if path == "-":
        set_stdout(encoding="utf-8", newline="\n")
        yield Out(sys.stdout, STDOUT)
        with naming(STDOUT):
            sys.stdout.flush()
        return
    place = Path(os.path.realpath(path))  # a link stays a link
    beside = None
    with naming(path):
        if place.is_dir():
            raise InputError(f"{path}: Is a directory")
        if place.exists() and not place.is_file():  # /dev/null, a pipe: nothing to rename
            file = open(place, "w", encoding="utf-8", newline="\n")  # noqa: SIM115  closed below
        else:
            # a file keeps its mode, a new one gets what open() would give it
            mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o666 & ~_umask()
            handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part")
            file = open(handle, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
    try:
        yield Out(file, path)
        with naming(path):
            if beside is not None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if beside is not None:
                os.chmod(beside, mode)
                os.replace(beside, place)
    except BaseException:
        with contextlib.suppress(OSError):  # what could not be written once cannot be written now
            file.close()
        if beside is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
        raise


def set_stdout(**how: str) -> None:
    if sys.stdout is None:  # closed by the shell's >&-
        raise InputError(f"{STDOUT}: is closed")
    sys.stdout.reconfigure(**how)  # type: ignore[union-attr]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_or_drop_stdout() -> None:
    """Python flushes stdout when it ends, and turns the exit code into 120 if that fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        drop_stdout()


def drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
