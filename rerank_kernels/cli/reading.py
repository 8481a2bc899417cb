"""What the commands read: a file or stdin of a known format, as records, in memory that does not grow with their number."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rerank_kernels.cli import formats, records
from rerank_kernels.cli.errors import InputError
from rerank_kernels.cli.formats import Format
from rerank_kernels.cli.records import Arrow, Cells, Json, Object, Record

PIECE = 1 << 20  # bytes of a JSON array at a time
INSTALL = "pip install 'rerank-kernels[tables]'"


@dataclass
class Source:
    """Records of `path`, "-" for stdin: the fields `wanted` are texts, and no field has a name of `added`."""

    path: str
    format: Format
    wanted: Sequence[str]
    added: Sequence[str] = ()
    spool: IO[bytes] | None = None

    def __post_init__(self) -> None:
        self.name = "<stdin>" if self.path == "-" else self.path
        self.twice = self.path != "-" and os.path.isfile(self.path)  # may be read again, from the start
        if self.format.kind == "parquet" and not self.twice:
            self.keep()

    def keep(self) -> None:
        """Copies what can be read only once into a temporary file."""
        if not self.twice:
            with self._opened() as file, self._named():
                self.spool = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the source
                shutil.copyfileobj(file, self.spool)
            self.twice = True

    def __iter__(self) -> Iterator[Record]:
        read = {"jsonl": self._jsonl, "json": self._json, "parquet": self._parquet, "text": self._text}
        with self._opened() as raw, self._named():
            file: Any = gzip.GzipFile(fileobj=raw) if self.format.gz else raw
            yield from read.get(self.format.kind, self._csv)(file)

    def schema(self) -> Any:
        """The columns of a Parquet file."""
        _, pq = arrow(self.name)
        with self._opened() as file:
            return pq.ParquetFile(file).schema_arrow

    @contextlib.contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        with self._named():
            if self.spool is not None:
                self.spool.seek(0)
                yield self.spool
            elif self.path == "-":
                if sys.stdin is None:
                    raise InputError(f"{self.name}: is closed")
                yield sys.stdin.buffer
            else:
                with open(self.path, "rb") as file:
                    yield file

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            what = (
                "it ends early" if isinstance(error, EOFError) else "it is damaged" if isinstance(error, zlib.error) else error
            )
            raise InputError(f"{self.name}: not a whole gzip file: {what}") from None
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror or error}") from None

    def _lines(self, file: Any) -> Iterator[tuple[int, str]]:
        """(number from 1, line with its end); a byte order mark is no part of the first line."""
        number = 0
        try:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(f"{self.name}:{number}: not UTF-8: {error.reason} at byte {error.start}") from None
        except (EOFError, zlib.error):
            raise InputError(f"{self.name}:{number + 1}: the gzip data ends early or is damaged in this line") from None

    def _record(self, where: str, index: int, pairs: Any, fields: Any) -> Record:
        texts = dict(zip(self.wanted, records.text_of(pairs, self.wanted, self.added, where), strict=True))
        return Record(where, index, texts.get("query", ""), texts["document"], fields)

    def _object(self, where: str, index: int, text: str, value: Any) -> Record:
        if not isinstance(value, Object):
            wanted = " and ".join(f'"{name}"' for name in self.wanted)
            raise InputError(f"{where}: must be an object with {wanted}, got {records.kind(value)}")
        return self._record(where, index, value, Json(text, tuple(name for name, _ in value)))

    def _text(self, file: Any) -> Iterator[Record]:
        for number, line in self._lines(file):
            if line := line.strip():
                text = json.dumps({"document": line}, ensure_ascii=False)
                yield Record(f"{self.name}:{number}", number - 1, "", line, Json(text, ("document",)))

    def _jsonl(self, file: Any) -> Iterator[Record]:
        for number, line in self._lines(file):
            if line := line.strip():
                where = f"{self.name}:{number}"
                try:
                    value = records.loads(line)
                except ValueError as error:
                    raise InputError(f"{where}: not JSON: {error}") from None
                if isinstance(value, list) and not isinstance(value, Object) and value and isinstance(value[0], Object):
                    raise InputError(f"{where}: got a JSON array of objects, wanted one object per line; give the format json")
                yield self._object(where, number - 1, line, value)

    def _json(self, file: Any) -> Iterator[Record]:
        """One array of objects; or one object per line, since many a file called .json holds that."""
        start = b""
        while (piece := file.read(1)).isspace() or (piece in (b"\xef", b"\xbb", b"\xbf") and piece):
            start += piece
        start += piece
        joined = _Joined(start, file)
        if piece == b"[":
            yield from self._array(joined)
        else:
            yield from self._jsonl(joined)

    def _array(self, file: Any) -> Iterator[Record]:
        decode = codecs.getincrementaldecoder("utf-8-sig")()
        text, place, number, ended = "", 0, 0, False

        def more() -> bool:
            nonlocal text, place, ended
            if ended:
                return False
            read = file.read(max(PIECE, len(text) - place))  # what does not fit is read in pieces that double
            ended = not read
            try:
                text, place = text[place:] + decode.decode(read, ended), 0
            except UnicodeDecodeError as error:
                raise InputError(f"{self.name}: after item {number}: not UTF-8: {error.reason}") from None
            return True

        def skip() -> str:
            """The next letter that is no space; "" at the end."""
            nonlocal place
            while (place := records._after_space(text, place)) == len(text):
                if not more():
                    return ""
            return text[place]

        skip()
        place += 1
        while True:
            letter = skip()
            where = f"{self.name}:item {number + 1}"
            if letter == "]":
                place += 1
                break
            if number:
                if letter != ",":
                    raise InputError(f"{where}: not JSON: wanted , or ] after item {number}, {_got(letter)}")
                place += 1
                letter = skip()
            if not letter:
                raise InputError(f"{where}: not JSON: the array ends early")
            while True:
                try:
                    value, end = records.DECODER.raw_decode(text, place)
                    if not isinstance(value, str) or end < len(text) or not more():  # a number may go on
                        break
                except RecursionError:
                    raise InputError(f"{where}: not JSON: it is nested too deeply") from None
                except json.JSONDecodeError as error:
                    whole = error.msg.startswith("Unterminated") or error.pos >= len(text) - 12
                    if not whole or not more():
                        raise InputError(f"{where}: not JSON: {error.msg}") from None
            yield self._object(where, number, text[place:end], value)
            place, number = end, number + 1
        if skip():
            raise InputError(f"{self.name}: not JSON: there is more after the array's end")

    def _csv(self, file: Any) -> Iterator[Record]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        line = 0

        def lines() -> Iterator[str]:
            nonlocal line
            for line, text in self._lines(file):
                if "\0" in text:
                    raise InputError(f"{self.name}:{line}: holds a NUL character, which no {self.format.kind.upper()} has")
                yield text

        rows = csv.reader(lines(), strict=True, delimiter="\t" if self.format.kind == "tsv" else ",")
        header: list[str] = []
        index = 0
        while True:
            begun = line + 1
            where = f"{self.name}:{begun}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise InputError(f"{where}: not {self.format.kind.upper()}: {error}") from None
            if row is None:
                return
            if not row:
                continue
            if not header:
                header = row
                twice = sorted({name for name in header if header.count(name) > 1})
                if twice:
                    raise InputError(f"{where}: the header names {', '.join(map(repr, twice))} twice")
                missing = [f'"{name}"' for name in self.wanted if name not in header]
                if missing:
                    raise InputError(
                        f"{where}: the first line must name the columns; {' and '.join(missing)} is missing, there are "
                        + ", ".join(map(repr, header))
                    )
                continue
            if len(row) != len(header):
                raise InputError(f"{where}: has {len(row)} fields, the header has {len(header)}")
            yield self._record(where, index, zip(header, row, strict=True), Cells(header, row))
            index += 1

    def _parquet(self, file: Any) -> Iterator[Record]:
        pa, pq = arrow(self.name)
        try:
            found = pq.ParquetFile(file)
            names = found.schema_arrow.names
            if len(set(names)) < len(names):
                raise InputError(f"{self.name}: a column's name is there twice")
            for name in self.wanted:
                if name not in names:
                    raise InputError(f'{self.name}: the column "{name}" is missing; there are {", ".join(map(repr, names))}')
                of = found.schema_arrow.field(name).type
                of = of.value_type if pa.types.is_dictionary(of) else of
                if not (pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_string_view(of)):
                    raise InputError(f'{self.name}: the column "{name}" must be text, got {of}')
            index = 0
            for batch in found.iter_batches(batch_size=1024):
                columns = {name: batch.column(name).to_pylist() for name in self.wanted}
                for row in range(batch.num_rows):
                    pairs = [(name, columns[name][row] if name in columns else None) for name in names]
                    yield self._record(f"{self.name}:row {index + 1}", index, pairs, Arrow(names, batch, row))
                    index += 1
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{self.name}: not Parquet that can be read: {str(error).splitlines()[0]}") from None


class _Joined:
    """Bytes that were read already, and the file that they came from."""

    def __init__(self, start: bytes, file: Any) -> None:
        self.start, self.file = start, file

    def read(self, size: int) -> bytes:
        start, self.start = self.start, b""
        return start + self.file.read(size)

    def __iter__(self) -> Iterator[bytes]:
        start, self.start = self.start, b""
        *whole, last = start.split(b"\n")  # the spaces before the first line may hold lines
        yield from (line + b"\n" for line in whole)
        for line in self.file:
            yield last + line
            last = b""
        if last:
            yield last


def arrow(name: str) -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet), or how to have them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{name}: Parquet needs pyarrow, which cannot be imported ({error}); run: {INSTALL}") from None
    return pyarrow, pyarrow.parquet


def source(path: str, said: str | None, wanted: Sequence[str], added: Sequence[str] = (), other: str | None = None) -> Source:
    return Source(path, formats.of(path, said, "--format", other), wanted, added)


def pairs(path: str) -> list[tuple[str, str]]:
    """The (query, document) of every record."""
    return [(r.query, r.document) for r in source(path, None, ("query", "document"))]


def looks_like_a_record(line: str) -> bool:
    try:
        value = records.loads(line)
    except ValueError:
        return False
    return isinstance(value, Object) and any(name == "document" for name, _ in value)


def _got(letter: str) -> str:
    return f"got {letter!r}" if letter else "but the file ends"
