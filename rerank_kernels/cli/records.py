"""A record: the texts that are scored, and all its fields as they came. What is only kept is never parsed and written again.

A JSON object stays its own text, to which members are added; a CSV row stays its cells; a Parquet row stays in Arrow.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Protocol

from rerank_kernels.cli.errors import InputError

KINDS = {"Object": "an object", "list": "an array", "str": "a string", "NoneType": "null", "bool": "true or false"}
KINDS |= {"dict": "an object", "bytes": "bytes", "Number": "a number", "int": "a number", "float": "a number"}
_SPACE = re.compile(r"[ \t\r\n]*")
_LINES = re.compile(r"[\r\n]+[ \t\r\n]*")


class Number(str):
    """A JSON number as it is written: 1e400 is no infinity, 0.1000000000000000055 keeps its digits."""


class Object(list[Any]):
    """The members of a JSON object, (name, value) each, in order, repeated ones too."""


DECODER = json.JSONDecoder(object_pairs_hook=Object, parse_int=Number, parse_float=Number, parse_constant=Number)


class Fields(Protocol):
    """What a record holds, in the form it came in."""

    @property
    def names(self) -> Sequence[str]: ...

    def json(self) -> str:
        """One JSON object, on one line. ValueError if JSON cannot hold it."""

    def cells(self) -> dict[str, str]:
        """The text of each field. ValueError if cells cannot hold it."""


@dataclass(slots=True)
class Record:
    """where: file and line, row or item, for messages; index: that place from 0."""

    where: str
    index: int
    query: str
    document: str
    fields: Any  # Fields; Any, for a Parquet row is asked for more


@dataclass(slots=True)
class Json:
    """A JSON object as text."""

    text: str
    names: Sequence[str]

    def json(self) -> str:
        # a new line is never inside a JSON string
        return _LINES.sub(" ", self.text)

    def members(self) -> Iterator[tuple[str, str]]:
        """(name, JSON text of the value) of every member; the text is known to be a JSON object."""
        text = self.text
        place = _after_space(text, 1)
        while text[place] != "}":
            name, place = scanstring(text, place + 1, True)
            start = _after_space(text, _after_space(text, place) + 1)
            _, end = DECODER.raw_decode(text, start)
            yield name, text[start:end]
            place = _after_space(text, end)
            if text[place] == ",":
                place = _after_space(text, place + 1)

    def cells(self) -> dict[str, str]:
        if len(set(self.names)) < len(self.names):
            raise ValueError("a name is there twice")
        return {name: _cell(raw) for name, raw in self.members()}


@dataclass(slots=True)
class Cells:
    """A row of text cells under their header."""

    names: Sequence[str]
    row: list[str]

    def json(self) -> str:
        return json.dumps(dict(zip(self.names, self.row, strict=True)), ensure_ascii=False)

    def cells(self) -> dict[str, str]:
        return dict(zip(self.names, self.row, strict=True))


@dataclass(slots=True)
class Arrow:
    """Row `row` of an Arrow record batch."""

    names: Sequence[str]
    batch: Any
    row: int

    def _values(self) -> dict[str, Any]:
        return {name: _plain(name, self.batch.column(i)[self.row].as_py()) for i, name in enumerate(self.names)}

    def json(self) -> str:
        return json.dumps(self._values(), ensure_ascii=False, allow_nan=False)

    def cells(self) -> dict[str, str]:
        return {
            name: value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
            for name, value in self._values().items()
        }


def loads(text: str) -> Any:
    """json.loads, with Object and Number; ValueError says what is wrong."""
    try:
        value, end = DECODER.raw_decode(text, _after_space(text, 0))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _after_space(text, end) != len(text):
        raise ValueError(f"there is more after the end of {kind(value)}, at character {_after_space(text, end) + 1}")
    return value


def spliced(text: str, first: Iterable[tuple[str, str]], last: Iterable[tuple[str, str]]) -> str:
    """The JSON object `text` with more members, (name, JSON text of the value), before and after its own."""
    inner = text[1:-1].strip()
    parts = [*_members(first), *([inner] if inner else []), *_members(last)]
    return "{" + ", ".join(parts) + "}"


def _members(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{json.dumps(name, ensure_ascii=False)}: {value}" for name, value in pairs]


def number(value: Any) -> str:
    """A float32 as Python prints float(value); JSON has no NaN and no infinity, which are null."""
    value = float(value)
    return repr(value) if math.isfinite(value) else "null"


def kind(value: object) -> str:
    return KINDS.get(type(value).__name__, type(value).__name__)


def half_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def text_of(fields: Iterable[tuple[str, Any]], wanted: Sequence[str], added: Sequence[str], where: str) -> list[str]:
    """The texts of the wanted fields, or what is wrong with them; none of the fields may have the name of one that is added."""
    found: dict[str, Any] = {}
    for name, value in fields:
        if name in wanted:
            if name in found:
                raise InputError(f'{where}: "{name}" is there twice')
            found[name] = value
        elif name in added:
            raise InputError(f"{where}: {json.dumps(name)} is there already and would be lost; give another --prefix")
    for name in wanted:
        if name not in found:
            raise InputError(f'{where}: "{name}" is missing')
        if type(found[name]) is not str:
            raise InputError(f'{where}: "{name}" must be a string, got {kind(found[name])}')
        if half_surrogate(found[name]):
            raise InputError(f'{where}: "{name}" is not valid Unicode: it holds half of a surrogate pair')
    return [found[name] for name in wanted]


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _cell(raw: str) -> str:
    """A JSON value as a cell: a string without its quotes, nothing for null, else as it is written."""
    if raw.startswith('"'):
        return str(json.loads(raw))
    return "" if raw == "null" else raw


def _plain(name: str, value: Any) -> Any:
    """What JSON can hold of an Arrow value; dates as ISO 8601, decimals as text."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'"{name}" holds {value}, which JSON does not have; write Parquet')
    if isinstance(value, dict):
        return {key: _plain(name, one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, one) for one in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ValueError(f'"{name}" holds {kind(value)}, which JSON does not have; write Parquet')
