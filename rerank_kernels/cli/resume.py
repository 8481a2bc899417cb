"""--resume: the work so far lies beside the output, in OUTPUT.resume/, and the same command line goes on from there.

    output     the output so far
    journal    first a line with what the work depends on: input, model, options, numerics; another run of these is refused by
               name. Then a line for each window that is whole in the output: records, bytes, crc32 of these bytes. Each line
               ends in a crc32 of itself

Bytes are on the disk before the line that counts them. What lies behind the last whole line, after a kill or a loss of power,
is cut away. The window that it belonged to is computed again, and no other. At the end `output` is renamed into its place and
the folder removed.
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
            self.journal.write(_line(f"{records} {self.bytes} {self.crc:08x}{end}"))
            self.journal.flush()
            os.fsync(self.journal.fileno())
        self.records, self.begun = records, True


@contextlib.contextmanager
def resumed(path: str, identity: Mapping[str, str]) -> Iterator[Resumed | None]:
    """The output of an interrupted run, or a new one; None if it is whole and must only be put in its place."""
    place = writing.real(path)
    if place.exists() and not place.is_file():
        raise InputError(f"--resume: {path} is not a file and cannot be resumed")
    folder = place.with_name(place.name + ".resume")
    with contextlib.ExitStack() as stack:
        with writing.naming(path):
            writing.may_write(place)
            folder.mkdir(exist_ok=True)
            journal = stack.enter_context(open(folder / "journal", "a+b"))
            _lock(journal, folder)
            last, ended = _read(journal, identity, folder)
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
        interrupt.over()
        with writing.naming(path):
            if (folder / "output").exists():
                os.chmod(folder / "output", writing.mode_of(place))
                os.replace(folder / "output", place)
                writing.sync(folder)
                writing.sync(place.parent)
            (folder / "journal").unlink()  # until now the next run knows that there is nothing left to do
            folder.rmdir()


def left_over(path: str) -> None:
    """Say that an earlier run's work is there, where it is not asked for."""
    folder = Path(os.path.realpath(path) + ".resume")
    if (folder / "journal").exists():
        say(f"warning: {folder} is there from an interrupted run; --resume continues it, this run does not use it")


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


def _line(text: str) -> bytes:
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _read(journal: IO[bytes], identity: Mapping[str, str], folder: Path) -> tuple[tuple[int, int, int] | None, bool]:
    """The last whole line, and whether it is the end; what is behind it is cut away. A new journal gets its first line."""
    journal.seek(0)
    lines: list[str] = []
    place = 0
    for line in journal:
        text = line.decode("utf-8", "replace").rpartition(" ")[0]
        if _line(text) != line:
            break
        lines.append(text)
        place += len(line)
    journal.truncate(place)
    journal.seek(0, os.SEEK_END)
    if lines:
        _same(identity, json.loads(lines[0]), folder)
    else:
        (folder / "output").unlink(missing_ok=True)
        journal.write(_line(json.dumps(identity)))
        journal.flush()
        os.fsync(journal.fileno())
        writing.sync(folder)
        writing.sync(folder.parent)
    if len(lines) < 2:
        return None, False
    count, size, crc, *more = lines[-1].split(" ")
    return (int(count), int(size), int(crc, 16)), bool(more)


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


def _same(identity: Mapping[str, str], before: Mapping[str, str], folder: Path) -> None:
    other = [name for name in {**identity, **before} if identity.get(name) != before.get(name)]
    if other:
        now = "; ".join(f"{name}: {_short(before.get(name))} then, {_short(identity.get(name))} now" for name in other)
        raise InputError(
            f"--resume: {folder} is of another run: {now}; start it with the same again, or remove the folder to begin anew"
        )


def _short(value: object) -> str:
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _lock(journal: IO[bytes], folder: Path) -> None:
    try:
        writing.lock(journal.fileno())
    except ImportError:  # no such locks here
        return
    except BlockingIOError:
        raise InputError(f"--resume: another process works in {folder}") from None
