"""How records are written in each format: bytes for the beginning, for a window of records with their numbers, for the end.

Bytes depend on the records alone, never on how long a run took or where it was taken up again.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rerank_kernels.cli import reading, records
from rerank_kernels.cli.errors import InputError
from rerank_kernels.cli.formats import Format
from rerank_kernels.cli.reading import Source
from rerank_kernels.cli.records import Arrow, Cells, Json, Record
from rerank_kernels.printable import escaped

ROW_GROUP = 1 << 16  # rows of Parquet in a group, which is held in memory
GROUP_BYTES = 1 << 26
INTEGERS = {"integer", "long"}  # a long one is no whole float64
NUMBERS = {"integer", "number"}

Row = tuple[Record, Sequence[float]]


class Lines:
    """JSON Lines: a record's own text with more members."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def check(self, record: Record) -> None:
        """InputError for a record that this format cannot hold."""
        if isinstance(record.fields, Arrow):
            self._text(record)

    def _text(self, record: Record) -> str:
        try:
            return str(record.fields.json())
        except ValueError as error:
            raise InputError(f"{record.where}: {error}") from None

    def line(self, row: Row) -> str:
        numbers = zip(self.names, map(records.number, row[1]), strict=True)
        return escaped(records.spliced(self._text(row[0]), (), numbers))

    def begin(self) -> bytes:
        return b""

    def window(self, first: int, rows: Sequence[Row]) -> bytes:
        """rows: the records from number `first` on."""
        return "".join(self.line(row) + "\n" for row in rows).encode()

    def end(self, count: int) -> bytes:
        return b""


class Array(Lines):
    """One JSON array, one object per line."""

    def begin(self) -> bytes:
        return b"["

    def window(self, first: int, rows: Sequence[Row]) -> bytes:
        return "".join((",\n" if first + i else "\n") + self.line(row) for i, row in enumerate(rows)).encode()

    def end(self, count: int) -> bytes:
        return b"\n]\n" if count else b"]\n"


class Table(Lines):
    """CSV or TSV: the columns of all records, in the order in which they first come, and the numbers."""

    def __init__(self, names: Sequence[str], delimiter: str) -> None:
        super().__init__(names)
        self.delimiter = delimiter
        self.columns: dict[str, None] = {"query": None, "document": None}
        self.seen = False

    def check(self, record: Record) -> None:
        if not self.seen:
            self.columns, self.seen = {}, True
        self.columns |= dict.fromkeys(record.fields.names)
        for name, cell in self._cells(record).items():
            if "\0" in cell or records.half_surrogate(cell):
                what = "a NUL character" if "\0" in cell else "half of a surrogate pair"
                raise InputError(f'{record.where}: "{name}" holds {what}, which a table of text cannot; write JSON Lines')

    def _cells(self, record: Record) -> dict[str, str]:
        try:
            return dict(record.fields.cells())
        except ValueError as error:
            raise InputError(f"{record.where}: {error}") from None

    def _rows(self, rows: Iterable[Sequence[str]]) -> bytes:
        out = io.StringIO()
        csv.writer(out, delimiter=self.delimiter, lineterminator="\n").writerows(rows)
        return out.getvalue().encode()

    def begin(self) -> bytes:
        return self._rows([[*self.columns, *self.names]])

    def window(self, first: int, rows: Sequence[Row]) -> bytes:
        made = []
        for record, numbers in rows:
            cells = self._cells(record)
            made.append([*(cells.get(name, "") for name in self.columns), *map(_decimal, numbers)])
        return self._rows(made)


class Parquet(Lines):
    """Row groups. A Parquet source keeps its columns and their types. Of other sources a column is text, integer, number or
    truth if all its values are, else the JSON text of its values. The numbers are float32."""

    def __init__(self, names: Sequence[str], source: Source, name: str) -> None:
        super().__init__(names)
        self.pa, self.pq = reading.arrow(name)
        self.source = source
        self.kinds: dict[str, set[str]] = {}
        self.out = _Drain()
        self.held: list[Row] = []
        self.size = 0

    def check(self, record: Record) -> None:
        if isinstance(record.fields, Json):
            if len(set(record.fields.names)) < len(record.fields.names):
                raise InputError(f"{record.where}: a name is there twice")
            for name, raw in record.fields.members():
                self.kinds.setdefault(name, set()).add(_kind(raw))
        else:
            self.kinds = self.kinds or {name: {"text"} for name in record.fields.names}

    def begin(self) -> bytes:
        pa = self.pa
        if self.source.format.kind == "parquet":
            fields = list(self.source.schema())
        else:
            fields = [pa.field(name, self._type(name)) for name in self.kinds or ("query", "document")]
        self.schema = pa.schema([*fields, *(pa.field(name, pa.float32()) for name in self.names)])
        self.writer = self.pq.ParquetWriter(pa.PythonFile(self.out, mode="w"), self.schema)
        return self.out.taken()

    def _type(self, name: str) -> Any:
        kinds = self.kinds.get(name, set()) - {"null"}
        for of, type_ in ((INTEGERS, self.pa.int64()), (NUMBERS, self.pa.float64()), ({"truth"}, self.pa.bool_())):
            if kinds and kinds <= of:
                return type_
        return self.pa.string()

    def window(self, first: int, rows: Sequence[Row]) -> bytes:
        self.held += rows
        self.size += sum(len(record.document) + len(record.query) for record, _ in rows)
        if len(self.held) >= ROW_GROUP or self.size >= GROUP_BYTES:
            self._group()
        return self.out.taken()

    def end(self, count: int) -> bytes:
        self._group()
        self.writer.close()
        return self.out.taken()

    def _group(self) -> None:
        pa = self.pa
        if not self.held:
            return
        numbers = [pa.array([row[1][i] for row in self.held], pa.float32()) for i in range(len(self.names))]
        kept = len(self.schema) - len(self.names)
        if self.source.format.kind == "parquet":
            table = pa.Table.from_batches(_slices([record.fields for record, _ in self.held]))
            columns = [table.column(i) for i in range(kept)]
        else:
            found = [self._values(record) for record, _ in self.held]
            columns = [pa.array([one.get(field.name) for one in found], field.type) for field in list(self.schema)[:kept]]
        self.writer.write_table(pa.Table.from_arrays([*columns, *numbers], schema=self.schema))
        self.held, self.size = [], 0

    def _values(self, record: Record) -> dict[str, Any]:
        if isinstance(record.fields, Cells):
            return dict(record.fields.cells())
        return {name: self._value(name, raw) for name, raw in record.fields.members()}

    def _value(self, name: str, raw: str) -> Any:
        if raw == "null":
            return None
        kinds = self.kinds[name] - {"null"}
        if kinds == {"text"}:
            return json.loads(raw)
        if kinds <= INTEGERS | NUMBERS:
            return int(raw) if kinds <= INTEGERS else float(raw) if kinds <= NUMBERS else raw
        return raw == "true" if kinds == {"truth"} else raw


class _Drain(io.RawIOBase):
    """What a library writes, to be taken piece by piece; its places count from the beginning of all."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        self.size += len(self.parts[-1])
        return len(self.parts[-1])

    def tell(self) -> int:
        return self.size

    def taken(self) -> bytes:
        parts, self.parts = self.parts, []
        return b"".join(parts)


def encoder(to: Format, names: Sequence[str], source: Source, name: str) -> Lines:
    if to.kind == "parquet":
        return Parquet(names, source, name)
    if to.kind in ("csv", "tsv"):
        return Table(names, "\t" if to.kind == "tsv" else ",")
    return Array(names) if to.kind == "json" else Lines(names)


def compressed(data: bytes, to: Format) -> bytes:
    """A gzip member for each piece of bytes: a file of several members is one gzip file, and can be cut between them."""
    return gzip.compress(data, mtime=0) if to.gz and data else data


def _decimal(number: float) -> str:
    text = records.number(number)
    return "" if text == "null" else text


def _kind(raw: str) -> str:
    """What Parquet can make of a JSON value; a number that it cannot hold is kept as its JSON text."""
    if raw.startswith('"'):
        return "text" if not records.half_surrogate(json.loads(raw)) else "other"
    if raw in ("true", "false", "null"):
        return "null" if raw == "null" else "truth"
    if raw.lstrip("-").isdigit():
        return "integer" if len(raw) < 16 else "long" if len(raw) < 19 else "other"
    if raw[0] in "-0123456789" and abs(float(raw)) < float("inf"):
        return "number"
    return "other"


def _slices(fields: Sequence[Arrow]) -> list[Any]:
    """The rows as slices of their batches, in order."""
    found: list[Any] = []
    start = 0
    for i, one in enumerate(fields):
        last = i + 1 == len(fields)
        if last or fields[i + 1].batch is not one.batch or fields[i + 1].row != one.row + 1:
            found.append(one.batch.slice(fields[start].row, i + 1 - start))
            start = i + 1
    return found
