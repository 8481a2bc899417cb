"""bench --against: a kernel that got slower shows up, one that did not does not, and so do other bits."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import rerank_kernels as rk
from bench import run
from bench.harness import against
from bench.harness.turns import Missing, Pace

NOISE = [0.0, 0.09, -0.08, 0.03, -0.02, 0.07, -0.09, 0.01, -0.05, 0.06, -0.03, 0.02, -0.07, 0.05, 0.08]


class Fake:
    """A revision whose every call takes so many seconds, give or take a tenth: the machine is a shared one."""

    tree = Path("tree")

    def __init__(self, noise: int, **seconds: float) -> None:
        self.name, self.all, self.noise = f"{noise}", seconds, noise

    def ask(self, function: Any, case: str, who: str, tree: str) -> str:
        if case not in self.all:
            raise Missing("failed: ValueError: no such op")
        self.seconds = self.all[case]
        return self.name if case == "changed" else "same"

    def turn(self, calls: int) -> float:
        self.noise += 1
        return self.seconds * (1.0 + NOISE[self.noise * 7 % len(NOISE)])


def compared(this: Fake, other: Fake) -> dict[str, dict[str, Any]]:
    sides = {"this": lambda: this, "REV": lambda: other}
    return {r["case"]: r for r in against.compare([(case, "") for case in this.all], sides, Pace(0.1, 15, 2.0))}


def test_a_slowed_kernel_shows_up(capsys: pytest.CaptureFixture[str]) -> None:
    this = Fake(0, same=1e-3, slowed=1.3e-3, faster=0.8e-3, long=3.9, new=1e-3, changed=1e-3)
    other = Fake(4, same=1e-3, slowed=1.0e-3, faster=1.0e-3, long=3.0, changed=1e-3)
    found = compared(this, other)
    verdicts = {case: r["verdict"] for case, r in found.items()}
    assert verdicts == {
        "same": "",
        "slowed": "SLOWER",
        "faster": "faster",
        "long": "SLOWER",
        "new": "not compared",
        "changed": "",
    }
    assert found["slowed"]["ratio"] == pytest.approx(1.3, abs=0.1) and found["long"]["rounds"] == 3
    assert found["same"]["same_bits"] and not found["changed"]["same_bits"]
    against.show(Console(width=150), "REV", list(found.values()))
    printed = capsys.readouterr().out
    assert "slower than REV: 2 of 6: slowed, long" in printed and "other bits" in printed and "no such op" in printed


def test_they_take_turns() -> None:
    log: list[str] = []

    class Side(Fake):
        def turn(self, calls: int) -> float:
            log.append(self.name)
            return 1e-3

    compared(Side(1, a=1e-3), Side(2, a=1e-3))
    assert ("1221" * len(log)).startswith("".join(log)[4:]) and len(log) >= 34  # after two to see how long a call is


def test_a_busy_moment_is_no_verdict() -> None:
    class Once(Fake):
        made = 0

        def ask(self, *question: Any) -> str:
            self.made += 1
            return super().ask(*question)

        def turn(self, calls: int) -> float:
            return super().turn(calls) * (2.0 if self.made == 1 else 1.0)

    found = compared(Once(0, a=1e-3), Fake(4, a=1e-3))["a"]
    assert found["verdict"] == "" and found["first"]["verdict"] == "SLOWER"


@pytest.mark.parametrize(
    ("this", "other", "word"),
    [
        ([1.06] * 10, [1.0] * 10, "SLOWER"),
        ([1.04] * 10, [1.0] * 10, ""),  # less than the machine's own whims
        ([1.2] * 7 + [0.9] * 3, [1.0] * 10, ""),  # the rounds do not agree
        ([0.9] * 10, [1.0] * 10, "faster"),
        ([2.0] * 5 + [1.0] * 5, [1.0] * 10, ""),
    ],
)
def test_verdict(this: list[float], other: list[float], word: str) -> None:
    assert against.verdict(this, other)["verdict"] == word


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A revision and the tree after it, which has another kernel source."""
    root = tmp_path / "root"
    for name, words in (
        ("setup.py", "raise SystemExit('no compiler')"),
        ("csrc/a.cpp", "1"),
        ("rerank_kernels/__init__.py", ""),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(words)
    commit(root, ["init", "-q"])
    return root


def commit(root: Path, *before: list[str]) -> None:
    for words in (*before, ["add", "-A"], ["commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_library_is_built_only_if_its_sources_differ(repository: Path, tmp_path: Path) -> None:
    console, there = Console(), tmp_path / "there"
    there.mkdir()
    (repository / "rerank_kernels" / "__init__.py").write_text("changed = True")
    against.checked_out("HEAD", there, console, repository)
    assert (there / "rerank_kernels" / "__init__.py").read_text() == ""
    ours = {p.name for p in Path(rk.__file__).parent.glob("*.so")}
    assert {p.name for p in (there / "rerank_kernels").glob("*.so")} == ours

    (repository / "csrc" / "a.cpp").write_text("2")
    with pytest.raises(SystemExit, match=r"(?s)does not build.*no compiler"):
        against.checked_out("HEAD", there, console, repository)
    with pytest.raises(SystemExit, match="--against nothing"):
        against.checked_out("nothing", there, console, repository)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
@pytest.mark.parametrize("file", ["a.cpp", "new.cpp"])
def test_pip_builds_what_has_other_sources(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(against, "BUILT", tmp_path / "built")
    setup = "from setuptools import setup\nsetup(name='it', version='1', packages=['rerank_kernels'])\n"
    (repository / "setup.py").write_text(setup)
    commit(repository)
    (repository / "csrc" / file).write_text("2")  # changed, or not known to git
    (repository / "rerank_kernels" / "__init__.py").write_text("changed = True")
    against.checked_out("HEAD", there := tmp_path / "there", Console(), repository)
    assert (there / "rerank_kernels" / "__init__.py").read_text() == ""
    assert not list((there / "rerank_kernels").glob("*.so")), "this tree's library"


@pytest.mark.exhaustive
def test_a_slowed_kernel_shows_up_between_two_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This tree beside a copy whose layer_norm runs twice: REV is the copy, so this tree is faster; then the other way."""
    slowed = tmp_path / "tree"
    shutil.copytree(Path(rk.__file__).parent, slowed / "rerank_kernels")
    family = slowed / "rerank_kernels" / "ops" / "norm.py"
    twice = "\n\n_once = layer_norm\n\n\ndef layer_norm(*a, **k):\n    _once(*a, **k)\n    return _once(*a, **k)\n"
    family.write_text(family.read_text() + twice)
    args = argparse.Namespace(
        threads=1, device="cpu", quick=True, only=["layer_norm", "softmax 6144"], against="REV", strict=True
    )
    trees = [against.ROOT, slowed]
    monkeypatch.setattr(
        against, "checked_out", lambda rev, folder, console: shutil.copytree(trees[1], folder, dirs_exist_ok=True)
    )
    for word in ("faster", "SLOWER"):
        records = against.measured(args, Console())
        verdicts = {r["case"]: r["verdict"] for r in records}
        assert verdicts["layer_norm + residual 2048x768"] == word
        assert all(r["same_bits"] for r in records)
        trees.reverse()
        monkeypatch.setattr(against, "ROOT", trees[0])


def test_run_hands_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(against, "measured", lambda args, console: [{"case": args.against, "verdict": "SLOWER", "ratio": 2.0}])
    out = tmp_path / "a.json"
    assert run.main(["--against", "HEAD~3", "--quick", "--json", str(out)]) == 0
    assert run.main(["--against", "HEAD~3", "--quick", "--strict", "--json", str(out)]) == 1
    assert '"case": "HEAD~3"' in out.read_text()
