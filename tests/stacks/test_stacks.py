"""stacks/compare.py must see one other bit, a missing system, other tokens. The systems' own tests are in stacks/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "stacks"))
import compare  # noqa: E402

REFERENCE = {name: [1, 2, 3] for names in (compare.CASES, *compare.OTHER_CASES.values()) for name in names}


def results() -> dict[str, Any]:
    found: dict[str, Any] = {name: {} for name in compare.TESTS}
    for row in compare.ROWS:
        cases = compare.OTHER_CASES.get(row.system, compare.CASES)
        found[row.stack][f"ours {row.system}"] = {name: list(REFERENCE[name]) for name in cases}
        if row.system not in compare.OTHER_CASES:
            found[row.stack][f"tokens {row.system}"] = {name: name.split(" ")[0] for name in cases}
    return found


def test_equal_bits_are_equal() -> None:
    assert list(compare.differences(results(), REFERENCE)) == []


@pytest.mark.parametrize("row", compare.ROWS, ids=lambda row: f"{row.stack} {row.system}")
def test_one_bit_of_one_system(row: compare.Row) -> None:
    found = results()
    bits = next(iter(found[row.stack][f"ours {row.system}"].values()))
    bits[1] ^= 1
    (said,) = compare.differences(found, REFERENCE)
    assert row.stack in said and row.system in said and "1 of" in said


@pytest.mark.parametrize("row", compare.ROWS, ids=lambda row: f"{row.stack} {row.system}")
def test_a_case_that_did_not_run(row: compare.Row) -> None:
    found = results()
    found[row.stack][f"ours {row.system}"].popitem()
    (said,) = compare.differences(found, REFERENCE)
    assert row.system in said


def test_other_tokens() -> None:
    found = results()
    found["flag"]["tokens FlagReranker"]["minilm float32"] = "others"
    (said,) = compare.differences(found, REFERENCE)
    assert "tokens" in said


def test_a_stack_that_did_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compare, "KEPT", tmp_path)
    assert compare.main(["flag"]) == 1
    assert "flag.json" in capsys.readouterr().out


def test_every_stack_has_its_pins_and_its_tests() -> None:
    pins = {path.stem for path in (ROOT / "stacks" / "pins").glob("*.txt")} - {"tests"}
    assert pins == set(compare.TESTS) == {row.stack for row in compare.ROWS}
    assert [file for file in compare.TESTS.values() if not (ROOT / "stacks" / file).is_file()] == []
