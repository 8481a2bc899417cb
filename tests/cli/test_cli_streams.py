"""What the command sends out: nothing steers a terminal, JSON is JSON, and a file is written where open() would write it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
import rerank_kernels as rk
from commands import bad, environment, run, stub, stubbed, write, write_pairs
from rerank_kernels import cli, printable
from rerank_kernels.cli import terminal, writing
from rerank_kernels.tables import Column, Table

CLEAR, CSI, RIGHT_TO_LEFT = "\x1b[2J", "\x9b31m", "\u202e"
HOSTILE = f"a{CLEAR}b{CSI}c{RIGHT_TO_LEFT}d\x07\x7f\u2028\u200f\u2066"
STEERS = [
    *map(chr, (*range(9), *range(11, 32), *range(127, 160))),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return models.save_cross_encoder(tmp_path_factory.mktemp("model"))


def steers(text: str) -> list[str]:
    return [letter for letter in text if letter in STEERS]


def test_what_is_printable() -> None:
    for letter in STEERS:
        assert printable.printable(f"a{letter}b") == "a\ufffdb", hex(ord(letter))
        assert json.loads(printable.escaped(json.dumps(f"a{letter}b", ensure_ascii=False))) == f"a{letter}b"
        assert not steers(printable.escaped(json.dumps(f"a{letter}b", ensure_ascii=False)))
    assert printable.printable("a\tb\nÜ 東京 😀 e\u0301") == "a\tb\nÜ 東京 😀 e\u0301"


@pytest.mark.parametrize("what", ["a name of a file", "a value of a folder", "an argument", "a warning", "a log", "our fault"])
def test_nothing_steers_the_terminal_on_stderr(folder, capsys, tmp_path, monkeypatch, what: str) -> None:
    docs = write(tmp_path / "docs.txt", "text")
    given: list[Any] = ["rank", folder, "--query", "q", docs]
    name = HOSTILE.replace("\u2028", "")
    if what == "a name of a file":
        given[-1] = tmp_path / name
    elif what == "a value of a folder":
        hostile = tmp_path / name
        shutil.copytree(folder, hostile)
        own = json.loads((hostile / "config.json").read_text())
        (hostile / "config.json").write_text(json.dumps({**own, "model_type": HOSTILE}))
        given[1] = hostile
    elif what == "an argument":
        given += ["--top-k", HOSTILE]
    else:

        def hostile_score(self: Any, query: str, documents: Any, top_k: Any = None) -> Any:
            if what == "our fault":
                raise RuntimeError(HOSTILE)
            if what == "a log":
                handler = logging.StreamHandler()
                logging.getLogger("hostile").addHandler(handler)
                logging.getLogger("hostile").error(HOSTILE)
            else:
                warnings.warn(HOSTILE, stacklevel=1)
            return []

        monkeypatch.setattr(rk.Reranker, "rank", hostile_score)
        if what == "a warning":  # pytest's own would not print it
            monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message, file=sys.stderr))
    with contextlib.suppress(SystemExit):  # argparse's
        cli.main([str(a) for a in given])
    err = capsys.readouterr().err
    assert not steers(err), ascii(err)
    assert "a\ufffd[2Jb" in err or "a\\x1b[2Jb" in err, ascii(err)


def test_the_test_would_see_it(folder, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(terminal, "printable", lambda text: text)
    monkeypatch.setattr("rerank_kernels.cli.errors.printable", lambda text: text)
    with pytest.raises(AssertionError):
        test_nothing_steers_the_terminal_on_stderr(folder, capsys, tmp_path, monkeypatch, "a name of a file")


def test_a_server_colours_its_own_lines(capsys, monkeypatch) -> None:
    from rerank_kernels.patching.systems import infinity_server

    monkeypatch.setattr(infinity_server, "serve", lambda *_: print("\x1b[1mready\x1b[0m", file=sys.stderr) or 0)
    assert run(capsys, "infinity-server", "--", "v2")[::2] == (0, "\x1b[1mready\x1b[0m\n")
    assert not isinstance(sys.stderr, terminal.Printable)


def test_json_escapes_what_would_steer(folder, capsys, tmp_path) -> None:
    """The values stay what they were, on stdout and in a file."""
    record = {"query": HOSTILE, "document": "d", HOSTILE: [HOSTILE, {"x": "é 東京"}]}
    pairs = write(tmp_path / "pairs.jsonl", json.dumps(record, ensure_ascii=False))
    for out in ("-", tmp_path / "out.jsonl", tmp_path / "out.json"):
        code, printed, err = run(capsys, "score", folder, pairs, "-o", out)
        text = printed if out == "-" else out.read_text("utf-8")
        found = json.loads(text)
        found = found[0] if isinstance(found, list) else found
        assert code == 0 and not err and not steers(text) and {n: found[n] for n in record} == record and "é 東京" in text
    docs = write(tmp_path / "docs.jsonl", json.dumps({"document": HOSTILE, "id": HOSTILE}, ensure_ascii=False))
    code, text, _ = run(capsys, "rank", folder, "--query", "q", docs, "--json")
    assert code == 0 and not steers(text) and json.loads(text)["document"] == HOSTILE
    _, text, _ = run(capsys, "rank", folder, "--query", "q", docs)
    assert not steers(text)


def test_tables_hold_nothing_that_steers() -> None:
    from rich.console import Console

    out = io.StringIO()
    table = Table([Column("a"), Column("b", number=True)], title="t")
    table.add_row(HOSTILE, HOSTILE)
    Console(file=out, width=100).print(table)
    assert not steers(out.getvalue())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_table_of_text_on_a_terminal(tmp_path) -> None:
    """CSV has no escapes: a terminal gets U+FFFD, a file or a pipe the letters themselves. Bytes are refused."""
    pairs = write(tmp_path / "pairs.csv", "query,document", f"{HOSTILE.replace(chr(0x2028), '')},d")
    command = stub("score", "model", pairs, "--output-format")

    def shown(form: str) -> tuple[int, str, str]:
        reader, writer = pty.openpty()
        ran = subprocess.run([*command, form], stdout=writer, stderr=subprocess.PIPE, env=environment())
        os.close(writer)
        text = b""
        try:
            while piece := os.read(reader, 4096):
                text += piece
        except OSError:  # the end of a terminal
            pass
        os.close(reader)
        return ran.returncode, text.decode(), ran.stderr.decode()

    code, text, err = shown("csv")
    assert code == 0 and "a\ufffd[2Jb" in text and not steers(text.replace("\r", "")), (err, ascii(text))
    assert "a\x1b[2Jb" in subprocess.run([*command, "csv"], capture_output=True, env=environment()).stdout.decode()
    for form in ("csv.gz", "parquet"):
        code, text, err = shown(form)
        assert code == 2 and not text and f"<stdout>: is a terminal, and {form} is no text; give -o FILE" in err


# ---- logits that are not finite ----------------------------------------------------------------------------------------------


def test_logits_that_are_not_finite(folder, capsys, tmp_path, monkeypatch) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 5)
    logit = np.array([1.0, np.nan, -np.inf, np.inf, 2.0], np.float32)
    monkeypatch.setattr(rk.Reranker, "score", lambda self, pairs, **_: rk.Scores(logit, logit, logit))
    said = "rerank-kernels: warning: 3 of 5 logits are not finite; they are null, or empty in a table\n"
    code, out, err = run(capsys, "score", folder, pairs)
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in out.splitlines()]
    assert (code, err) == (0, said) and [r["logit"] for r in strict] == [1.0, None, None, None, 2.0]
    code, out, err = run(capsys, "score", folder, pairs, "--output-format", "csv")
    assert (code, err) == (0, said) and out.splitlines()[2].endswith(",,,")
    docs = write(tmp_path / "docs.txt", *"abcde")
    code, out, err = run(capsys, "rank", folder, "--query", "q", docs, "--json")
    assert (code, err) == (0, said) and [json.loads(line)["logit"] for line in out.splitlines()] == [None, 2.0, 1.0, None, None]
    assert run(capsys, "rank", folder, "--query", "q", docs)[::2] == (0, said)
    with pytest.raises(SystemExit):
        cli.main(["score", "--help"])
    assert "0 done, also where logits are not finite, which a warning counts;" in " ".join(capsys.readouterr().out.split())


def test_a_document_of_ours_is_json() -> None:
    found = {"a": float("nan"), "b": [1.5, float("inf"), (HOSTILE,)], "c": {"d": -float("inf"), "e": True, "f": None}}
    text = writing.document(found)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "a": None,
        "b": [1.5, None, [HOSTILE]],
        "c": {"d": None, "e": True, "f": None},
    }
    assert not steers(text)


# ---- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--resume",)])
def test_an_output_that_may_not_be_written(capsys, folder, tmp_path, monkeypatch, options) -> None:
    """As open() says it: a file that is read-only is not replaced, though its folder may be written."""
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 2), write(tmp_path / "out.jsonl", "old")
    out.chmod(0o444)
    if os.access(out, os.W_OK):  # root may write everything: what open() would say to others
        usual = open

        def refusing(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if os.fspath(file) == os.fspath(out) and set(mode) & set("wa+"):
                raise PermissionError(13, "Permission denied", str(file))
            return usual(file, mode, *args, **kwargs)

        monkeypatch.setattr("builtins.open", refusing)
    assert bad(capsys, "score", folder, pairs, "-o", out, *options).startswith(f"{out}: Permission denied")
    assert out.read_bytes() == b"old\n" and sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "pairs.jsonl"]


def test_what_a_killed_process_left_is_removed(tmp_path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.jsonl", 400), tmp_path / "o[u]t.jsonl"
    running = subprocess.Popen(stub("score", "m", pairs, "-o", out, pause=20), env=environment(), stderr=subprocess.PIPE)

    def parts() -> list[Path]:
        return [p for p in tmp_path.iterdir() if p.name.endswith(".part")]

    deadline = time.monotonic() + 60
    while not parts():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.05)
    other = write(tmp_path / ".other.abc.part", "of another output")
    assert stubbed("score", "m", pairs, "-o", out).returncode == 0
    assert len(parts()) == 2, "the first process lives, and keeps its file"
    running.send_signal(signal.SIGABRT)
    running.communicate()
    assert len(parts()) == 2
    assert stubbed("score", "m", pairs, "-o", out).returncode == 0
    assert parts() == [other]
