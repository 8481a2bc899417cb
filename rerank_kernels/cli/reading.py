"""What the commands read."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from rerank_kernels.cli.errors import InputError

JSON_LINES = (".jsonl", ".ndjson", ".json")


def lines(path: str) -> Iterator[tuple[str, str]]:
    """("file:number", line) of every line that is not blank."""
    name = "<stdin>" if path == "-" else path
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    # a byte order mark is no part of the first line
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise InputError(f"{name}:{number}: not UTF-8: {error.reason} at byte {error.start}") from None
                if line:
                    yield f"{name}:{number}", line
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def records(path: str, fields: tuple[str, ...], added: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines; every one has `fields`, as text, and none of the names that will be `added`."""
    for where, line in lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f'{where}: must be an object with "{fields[-1]}", got {kind(record)}')
        for name in fields:
            if name not in record:
                raise InputError(f'{where}: "{name}" is missing')
            if not isinstance(record[name], str):
                raise InputError(f'{where}: "{name}" must be a string, got {kind(record[name])}')
            if half_surrogate(record[name]):
                raise InputError(f'{where}: "{name}" is not valid Unicode: it holds half of a surrogate pair')
        for name in added:
            if name in record:
                raise InputError(f"{where}: {json.dumps(name)} is there already and would be lost; give another --prefix")
        yield record


def half_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def looks_like_a_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "document" in record


def kind(value: object) -> str:
    names = {"dict": "an object", "list": "an array", "str": "a string", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")
