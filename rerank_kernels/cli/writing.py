"""What the commands write: stdout, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rerank_kernels.cli import interrupt
from rerank_kernels.cli.errors import InputError
from rerank_kernels.printable import escaped, printable

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
        self.shown = name == STDOUT and file.isatty()

    def write(self, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        with naming(self.name):
            self.file.write(printable(data.decode("utf-8", "replace")).encode() if self.shown else data)

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
                may_write(place)
                mode = mode_of(place)
                remove_left_over(place)
                with interrupt.held():
                    handle, beside = _beside(place)
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


def document(found: Any) -> str:
    """JSON for a file: what is not finite is null."""
    return escaped(json.dumps(_finite(found), indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def may_write(place: Path) -> None:
    """A file that open() could not write is not replaced either."""
    if place.exists():
        with open(place, "r+b"):
            pass


def _beside(place: Path) -> tuple[int, str]:
    """A new file beside `place`. A lock says that its process lives; who finds one without it may remove it."""
    while True:
        handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part")
        with contextlib.suppress(OSError, ImportError):  # no locks here: nobody can take one, and nothing is removed
            lock(handle)
        if os.path.exists(beside):
            return handle, beside
        os.close(handle)  # another process took it for left over before it was locked


def remove_left_over(place: Path) -> None:
    """What a process left beside `place` that ended before it could clean up."""
    for found in place.parent.glob(f".{glob.escape(place.name)}.*.part"):
        with contextlib.suppress(OSError, ImportError), open(found, "r+b") as file:
            lock(file.fileno())
            os.unlink(found)


def lock(handle: int) -> None:
    """For this process alone, until the file is closed. BlockingIOError if another process has it."""
    import fcntl  # not on every system

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
