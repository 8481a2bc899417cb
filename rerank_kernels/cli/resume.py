"""--resume: the work so far lies beside the output, in OUTPUT.resume/, and the same command line goes on from there.

    identity.json   what the work depends on: input, model, options, numerics; another run of these is refused by name
    output          the output so far
    journal         a line for each window that is whole in it: records, bytes, crc32 of these bytes, and a crc32 of the line

Bytes are on the disk before the line that counts them. What lies behind the last whole line, torn off by a kill or a loss of
power, is cut away; the window that it belonged to is computed again, and no other. At the end `output` is renamed into its
place and the folder removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from rerank_kernels.cli import interrupt, writing
from rerank_kernels.cli.errors import InputError, say

MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".jinja")


class Resumed(writing.Out):
    """The output so far: `records` are done, `begun` is whether anything is."""

    def __init__(self, file: IO[bytes], name: str, journal: IO[bytes], last: tuple[int, int, int] | None) -> None:
        super().__init__(file, name)
        self.journal = journal
        self.begun = last is not None
        self.records, self.bytes, self.crc = last or (0, 0, 0)

    def write(self, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        super().write(data)
        self.bytes, self.crc = self.bytes + len(data), zlib.crc32(data, self.crc)

    def commit(self, records: int, end: str = "") -> None:
        with writing.naming(self.name):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.journal.write(_line(records, self.bytes, self.crc, end))
            self.journal.flush()
            os.fsync(self.journal.fileno())
        self.records, self.begun = records, True


@contextlib.contextmanager
def resumed(path: str, identity: Mapping[str, str]) -> Iterator[Resumed | None]:
    """The output of an earlier run that was cut off, or a new one; None if all that it lacks is to be put in its place."""
    place = writing.real(path)
    if place.exists() and not place.is_file():
        raise InputError(f"--resume: {path} is no file, and cannot be gone on with")
    folder = place.with_name(place.name + ".resume")
    with contextlib.ExitStack() as stack:
        with writing.naming(path):
            journal = stack.enter_context(_opened(folder, identity))
            _same(identity, folder)
            last, ended = _read(journal)
            if not ended or (folder / "output").exists():
                file = stack.enter_context(open(folder / "output", "a+b"))
                _cut(file, last, folder)
                out = Resumed(file, path, journal, last)
                if out.records:
                    say(f"{folder}: goes on after {out.records:,} records")
        if ended:
            yield None
        else:
            try:
                yield out
                out.commit(out.records, " end")
            except BaseException:
                say(f"{folder} holds {out.records:,} records; the same command goes on from there")
                raise
        with writing.naming(path), interrupt.held():
            if (folder / "output").exists():
                os.chmod(folder / "output", writing.mode_of(place))
                os.replace(folder / "output", place)
                writing.sync(place.parent)
            for name in ("identity.json", "identity.part", "journal"):  # the identity first: without it nothing counts
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _opened(folder: Path, identity: Mapping[str, str]) -> IO[bytes]:
    """The journal, which no other process has; the identity lies beside it, and nothing is counted before it does."""
    fresh = not (folder / "identity.json").exists()
    folder.mkdir(exist_ok=True)
    journal = open(folder / "journal", "a+b")  # noqa: SIM115  its lock lives as long as the run
    _lock(journal, folder)
    if fresh:
        journal.truncate(0)
        (folder / "output").unlink(missing_ok=True)
        with open(folder / "identity.part", "w", encoding="utf-8") as new:
            json.dump(identity, new, indent=1)
            new.flush()
            os.fsync(new.fileno())
        os.replace(folder / "identity.part", folder / "identity.json")
        writing.sync(folder)
        writing.sync(folder.parent)
    return journal


def left_over(path: str) -> None:
    """Say that an earlier run's work is there, where it is not asked for."""
    folder = Path(os.path.realpath(path) + ".resume")
    if (folder / "journal").exists():
        say(f"warning: {folder} is there from a run that was cut off; --resume goes on with it, this run does not use it")


def digest(path: str) -> str:
    """sha256 of a file; of a folder, of the files in it that make a model."""
    with writing.naming(path):
        if os.path.isfile(path):
            return _sha256(Path(path))
        total = hashlib.sha256()
        for file in sorted(Path(path).rglob("*")):
            inside = file.relative_to(path)
            if file.suffix in MODEL_FILES and file.is_file() and not any(part.startswith(".") for part in inside.parts):
                total.update(f"{inside.as_posix()}\0{_sha256(file)}\n".encode())
        return total.hexdigest()


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


def _line(records: int, size: int, crc: int, end: str = "") -> bytes:
    text = f"{records} {size} {crc:08x}{end}"
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _read(journal: IO[bytes]) -> tuple[tuple[int, int, int] | None, bool]:
    """The last whole line, and whether it is the end; what is behind it is cut away."""
    journal.seek(0)
    last, ended, place = None, False, 0
    for line in journal:
        text, _, check = line.decode("ascii", "replace").rpartition(" ")
        if check != f"{zlib.crc32(text.encode()):08x}\n":
            break
        count, size, crc, *more = text.split(" ")
        last, ended = (int(count), int(size), int(crc, 16)), bool(more)
        place += len(line)
    journal.truncate(place)
    journal.seek(0, os.SEEK_END)
    return last, ended


def _cut(file: IO[bytes], last: tuple[int, int, int] | None, folder: Path) -> None:
    """The output, as long as the journal says; what stands there must be what was written."""
    _, size, crc = last or (0, 0, 0)
    file.seek(0)
    found, left = 0, size
    while left and (piece := file.read(min(left, 1 << 20))):
        found, left = zlib.crc32(piece, found), left - len(piece)
    if left or found != crc:
        raise InputError(f"{folder}: its output is not what its journal says; remove the folder to begin anew")
    file.truncate(size)
    file.seek(0, os.SEEK_END)


def _same(identity: Mapping[str, str], folder: Path) -> None:
    try:
        before = json.loads((folder / "identity.json").read_text("utf-8"))
    except ValueError:
        before = {}
    other = [name for name in {**identity, **before} if identity.get(name) != before.get(name)]
    if other:
        now = "; ".join(f"{name}: {_short(before.get(name))} then, {_short(identity.get(name))} now" for name in other)
        raise InputError(
            f"--resume: {folder} is of another run: {now}; give what it was begun with, or remove it to begin anew"
        )


def _short(value: object) -> str:
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _lock(journal: IO[bytes], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks here
        return
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"--resume: another process works in {folder}") from None
