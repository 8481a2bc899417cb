"""What the commands write: stdout, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rerank_kernels.cli import interrupt
from rerank_kernels.cli.errors import InputError

STDOUT = "<stdout>"
NUMBERS = ("logit", "score", "complement")


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says what could not be written. If nobody reads our stdout, that is no failure, and stays BrokenPipeError."""
    try:
        yield
    except OSError as error:
        if name == STDOUT and isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"{name}: {error.strerror or error}") from None


class Out:
    """A place for bytes, or text as UTF-8, that says its name where it cannot take them."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name = file, name

    def write(self, data: str | bytes) -> None:
        with naming(self.name):
            self.file.write(data.encode() if isinstance(data, str) else data)

    def commit(self, records: int) -> None:
        """So many records are whole: who reads stdout has them now."""
        with naming(self.name):
            self.file.flush()


@contextlib.contextmanager
def writer(path: str) -> Iterator[Out]:
    """A file that takes the place of `path` when the block ends well, and leaves no trace if it does not."""
    if path == "-":
        set_stdout(encoding="utf-8", newline="\n")
        out = Out(sys.stdout.buffer, STDOUT)
        yield out
        out.commit(0)
        return
    place = real(path)
    file: IO[bytes] | None = None
    beside = ""
    try:
        with naming(path):
            if place.exists() and not place.is_file():  # /dev/null, a pipe: nothing to rename
                file = open(place, "wb")  # noqa: SIM115  closed below
            else:
                mode = mode_of(place)
                with interrupt.held():
                    handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part")
                    interrupt.files.add(beside)
                file = open(handle, "wb")  # noqa: SIM115
                interrupt.check()
        yield Out(file, path)
        with naming(path), interrupt.held():
            if beside:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if beside:
                interrupt.check()
                os.chmod(beside, mode)
                os.replace(beside, place)
                sync(place.parent)
    except BaseException:
        with interrupt.held():
            if file is not None:
                with contextlib.suppress(OSError):  # what could not be written once cannot be written now
                    file.close()
            if beside:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside)
        raise
    finally:
        interrupt.files.discard(beside)


def real(path: str) -> Path:
    """Where a file of that name goes: a link stays a link, a folder is none."""
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise InputError(f"{path}: Is a directory")
    return place


def mode_of(place: Path) -> int:
    """A file keeps its mode, a new one gets what open() would give it."""
    return stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o666 & ~_umask()


def sync(folder: Path) -> None:
    """The names in `folder` outlast a loss of power, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
