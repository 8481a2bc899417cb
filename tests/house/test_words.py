"""One name per concept: the expressions that CONTRIBUTING.md lists as wrong stand nowhere in the tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_house import ROOT, files

PAGE = ROOT / "CONTRIBUTING.md"
LIST = re.compile(r"<!-- words -->\n```\n(.*?)```\n<!-- /words -->", re.DOTALL)
ENTRY = re.compile(r"(?P<wrong>.+?) +-> +(?P<right>.+?)(?: +in (?P<folder>[\w./]+))?")


class Entry(NamedTuple):
    wrong: re.Pattern[str]
    right: str
    folder: str  # the only one where it is wrong; "": everywhere


def entries() -> list[Entry]:
    listed = LIST.search(PAGE.read_text())
    assert listed is not None, "CONTRIBUTING.md has no list between <!-- words --> and <!-- /words -->"
    found = [ENTRY.fullmatch(line) for line in listed[1].splitlines()]
    assert found and all(found), "each line is EXPRESSION -> WORD, or EXPRESSION -> WORD in FOLDER"
    return [Entry(re.compile(m["wrong"]), m["right"], m["folder"] or "") for m in found if m]


def wrong_words(name: str, text: str, listed: Iterable[Entry]) -> Iterator[str]:
    here = [e for e in listed if name.startswith(e.folder)]
    for number, line in enumerate(text.splitlines(), 1):
        for entry in here:
            if found := entry.wrong.search(line):
                yield f"{name}:{number}: {found[0]!r}: say {entry.right}"


def text_of(path: Path) -> str:
    """The file without the list itself; "" for pictures, the licence's text and this file."""
    if path.suffix in (".svg", ".png") or path.name == "LICENSE" or path == Path(__file__):
        return ""
    text = path.read_text()
    return LIST.sub(lambda m: "\n" * m[0].count("\n"), text) if path == PAGE else text


def test_no_wrong_word_in_the_tree() -> None:
    listed = entries()
    assert [w for path in files() for w in wrong_words(str(path.relative_to(ROOT)), text_of(path), listed)] == []


@pytest.mark.parametrize(
    ("name", "text", "caught"),
    [
        ("tests/test_x.py", 'class T:\n    @pytest.mark.promise("portable")\n', 1),
        ("docs/X.md", "It promises *portable*, on all machines.", 1),
        ("docs/X.md", "In mode portable the kernels of `portable` are slow.", 0),
        ("docs/X.md", "Which bits hang on the batch, once a day.", 1),
        ("rerank_kernels/bench/x.py", "class Report:", 1),
        ("rerank_kernels/patching/report.py", "class Report:", 0),
        ("a.py", "haystack_integrations", 0),
        ("a.py", "one score a pair, 5 pairs a second", 2),
    ],
)
def test_the_search_finds_a_wrong_word(name: str, text: str, caught: int) -> None:
    assert len(list(wrong_words(name, text, entries()))) == caught


def test_every_expression_can_match_and_none_is_its_own_remedy() -> None:
    """A right word that its own entry calls wrong could never be written."""
    assert [e for e in entries() if e.wrong.search(e.right)] == []
