"""What programs write into pages: a block is what stands between `<!-- WRITER:NAME -->` and `<!-- /WRITER -->`.

Each marker has a line of its own. A program is one WRITER. It makes a text for each of its NAMEs; `write` puts them in, and
`stale` says which blocks are not as made, for the checks that a page is up to date. What is outside the markers stays.
Needs nothing but Python's library.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Contents = Mapping[str, str | None]  # NAME -> its text, in whole lines; None: that block stays as it is


class Wrong(Exception):
    """The page has other markers than it should."""


class Block(NamedTuple):
    name: str
    text: str
    line: int  # of its first marker in the page, from 1
    begin: int  # page[begin:end] is the text
    end: int


def blocks(page: str, writer: str) -> list[Block]:
    """The writer's blocks, in their order."""
    found: list[Block] = []
    opened: tuple[str, int, int] | None = None
    at = 0
    for number, line in enumerate(page.splitlines(keepends=True), 1):
        begins = re.fullmatch(rf"<!-- {writer}:([\w-]+) -->\n?", line)
        ends = line.rstrip("\n") == f"<!-- /{writer} -->"
        if begins and opened is None:
            opened = (begins[1], number, at + len(line))
        elif ends and opened is not None:
            name, first, begin = opened
            found.append(Block(name, page[begin:at], first, begin, at))
            opened = None
        elif begins or ends or re.search(rf"<!-- (/{writer}(?![\w-])|{writer}:\S)", line):
            raise Wrong(f"line {number}: {line.strip()!r} has no beginning or no end, or no line of its own")
        at += len(line)
    if opened is not None:
        raise Wrong(f"line {opened[1]}: <!-- {writer}:{opened[0]} --> has no beginning or no end, or no line of its own")
    return found


def replaced(page: str, writer: str, contents: Contents) -> tuple[str, list[str]]:
    """The page with what the writer made, and the names of the blocks that were not so."""
    found = blocks(page, writer)
    if not found:
        raise Wrong(f"there is no <!-- {writer}:NAME -->; NAME is one of {', '.join(contents)}")
    changed = []
    for block in reversed(found):
        if block.name not in contents:
            raise Wrong(f"line {block.line}: there is no {writer}:{block.name}; there are {', '.join(contents)}")
        made = contents[block.name]
        if made is not None and made != block.text:
            page = page[: block.begin] + made + page[block.end :]
            changed.append(block.name)
    return page, changed[::-1]


def stale(path: Path, writer: str, contents: Contents) -> list[str]:
    """The names of the page's blocks that `write` would change."""
    return _replaced(path, writer, contents)[1]


def write(path: Path, writer: str, contents: Contents) -> list[str]:
    """Puts the texts into the page in one step, and says which blocks changed."""
    page, changed = _replaced(path, writer, contents)
    if changed:
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(page, encoding="utf-8")
        beside.chmod(path.stat().st_mode)
        os.replace(beside, path)
    return changed


def _replaced(path: Path, writer: str, contents: Contents) -> tuple[str, list[str]]:
    try:
        return replaced(path.read_text(encoding="utf-8"), writer, contents)
    except Wrong as error:
        raise Wrong(f"{path.name}: {error}") from None


def text(path: Path, writer: str, name: str) -> str:
    """What the page holds now of one block."""
    return next(b.text for b in blocks(path.read_text(encoding="utf-8"), writer) if b.name == name)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is words and whose others are numbers."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
