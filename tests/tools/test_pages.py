"""tools/pages.py: the one program that puts into a page what another made. And every page of ours is as it can be read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from tools import pages  # noqa: E402

PAGE = "a\n<!-- w:one -->\nold\n<!-- /w -->\nb <!-- v:one -->\n<!-- w:two -->\n<!-- /w -->\n"


def test_what_is_between_the_markers_and_nothing_else() -> None:
    new, changed = pages.replaced(PAGE, "w", {"one": "1\n\\1\n", "two": None})
    assert (new, changed) == (PAGE.replace("old", "1\n\\1"), ["one"])
    new, changed = pages.replaced(PAGE, "w", {"one": "1\n", "two": "2\n", "three": "on another page\n"})
    assert (new, changed) == (PAGE.replace("old", "1").replace("two -->\n", "two -->\n2\n"), ["one", "two"])
    assert pages.replaced(new, "w", {"one": "1\n", "two": "2\n"}) == (new, [])
    assert [(b.name, b.text, b.line) for b in pages.blocks(PAGE, "w")] == [("one", "old\n", 2), ("two", "", 6)]


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("<!-- w:one -->\n", "line 1: .*no end"),
        ("a\n<!-- /w -->\n", "line 2: .*no beginning"),
        ("<!-- w:one -->\n<!-- w:two -->\n<!-- /w -->\n", "line 2: .*no beginning or no end"),
        ("<!-- w:one --> words\n<!-- /w -->\n", "line 1: .*no line of its own"),
        ("<!-- w:one -->\nwords <!-- /w -->\n", "line 2: .*no line of its own"),
        ("<!-- w:three -->\n<!-- /w -->\n", "line 1: there is no w:three; there are one, two"),
        ("<!-- v:one -->\n<!-- /v -->\n", "there is no <!-- w:NAME -->; NAME is one of one, two"),
    ],
)
def test_other_markers_are_refused_and_the_file_is_as_it_was(page: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(pages.Wrong, match=f"page.md: {says}"):
        pages.write(path, "w", {"one": "1\n", "two": "2\n"})
    assert path.read_text() == page


def test_stale_says_what_write_would_change(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    contents = {"one": "1\n", "two": ""}
    assert pages.stale(path, "w", contents) == ["one"] and path.read_text() == PAGE
    assert pages.write(path, "w", contents) == ["one"] and pages.text(path, "w", "one") == "1\n"
    assert pages.stale(path, "w", contents) == pages.write(path, "w", contents) == []
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize("name", ["README.md", "NUMERICS.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_markers_of_our_pages(name: str) -> None:
    """Each has its partner, and is one that a program of ours writes."""
    page = (ROOT / name).read_text(encoding="utf-8")
    writers = {m[1] for m in re.finditer(r"<!-- /?([\w-]+)[: ]", page)}
    known = {"any_model", "bench", "gpu-report", "installs", "promises", "readme", "stacks", "witness", "witness-triton"}
    assert writers <= known
    for writer in writers:
        assert pages.blocks(page, writer) or writer == "readme"
