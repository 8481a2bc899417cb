"""What the commands print on a terminal: every number whole, no line wider than the screen, whatever its width."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import sys
import termios
import threading
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

import rerank_kernels as rk
from commands import write
from rerank_kernels import bench, cli, tables, verify
from rerank_kernels.cli import models

WIDTHS = (40, 80, 140)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HITS = [
    rk.Ranked(2, "東京は日本の首都です。" * 9, 0.3863070011138916, 0.5953885316848755, 0.40461146831512451),
    rk.Ranked(0, "Reads rows from a CSV file. " * 9, -11.234567642211914, 1.3204999637673609e-05, 0.99998679500036233),
    rk.Ranked(1, "x" * 300, -0.019087865948677063, 0.49522817134857178, 0.50477182865142822),
]


def printed(monkeypatch, columns: int, *argv: object) -> list[str]:
    """The lines that a pseudo-terminal of so many columns gets, without colours."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    pieces: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                return
            if not piece:
                return
            pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as screen, monkeypatch.context() as patched:
        patched.delenv("COLUMNS", raising=False)
        patched.setattr(sys, "stdout", screen)
        assert cli.main([str(a) for a in argv]) == 0
    reader.join(10)
    os.close(ours)
    lines = ESCAPE.sub("", b"".join(pieces).decode()).splitlines()
    assert [line for line in lines if cell_len(line) > columns] == []
    return lines


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(models, "reranker", lambda args: SimpleNamespace(rank=lambda *a: HITS))


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("ids", [False, True])
def test_rank(monkeypatch, tmp_path, model, columns, ids) -> None:
    documents = ({"document": "d", **({"id": f"id-{i}"} if ids else {})} for i in range(3))
    path = write(tmp_path / "docs.jsonl", *map(json.dumps, documents))
    said = "\n".join(printed(monkeypatch, columns, "rank", "m", "--query", "q", path))
    assert "logit" in said and "score" in said and "rank" in said and "index" in said and "0…" not in said
    for place, hit in enumerate(HITS, 1):
        assert str(hit.logit) in said and str(hit.score) in said, "a number is cut"
        assert re.search(rf"(rank |│ +){place} .*?{hit.index}\b", said)
        assert f"id-{hit.index}" in said if ids else "id" not in said
    assert "Reads" in said and "東京" in said


def report() -> verify.VerifyReport:
    names = [("batch-invariant", "batch", "sizes 1, 2, 7, 32 and 64, each text in each of them")]
    names += [("padding-invariant", "padding", "left, right, both"), ("run-invariant", "process", "another process")]
    results = [
        verify.Result(promise, check, varied, 1234567 + i, 1234567 + i, 0.00012 * i, i, 98765 + i)
        for i, (promise, check, varied) in enumerate(names)
    ]
    return verify.VerifyReport(results, [], {}, scorer="x", kind="cross-encoder", rows=8, lengths=(1, 2))


@pytest.mark.parametrize("columns", WIDTHS)
def test_verify(monkeypatch, columns) -> None:
    found = report()
    for result in found.results:
        result.promised = False
    monkeypatch.setattr(verify, "verify", lambda *a, **k: found)
    said = "\n".join(printed(monkeypatch, columns, "verify", "shape:tiny"))
    for number in ("1,234,567/1,234,567", "1,234,569/1,234,569", "0.00024", "2/98,767"):
        assert number in said, "a number is cut"
    for word in ("padding", "process", "batch-inva", "rank"):
        assert word in said


@pytest.mark.parametrize("columns", WIDTHS)
def test_bench(monkeypatch, columns) -> None:
    import torch

    def timed(seconds: float) -> bench.Timed:
        return bench.Timed([seconds] * 3, [seconds / 7] * 3, torch.zeros(64, 1))

    times = {way: {"stock": timed(1.2345), "patched": timed(0.54321)} for way in bench.WAYS}
    facts = {"model": "BertModel", "device": "cpu, 2 threads", "batches": "of 32"}
    monkeypatch.setattr(bench, "bench", lambda *a, **k: bench.BenchReport(64, 12345, facts, times))
    said = "\n".join(printed(monkeypatch, columns, "bench", "shape:tiny"))
    for number in ("51.84", "117.8", "2.27", "176", "77.6"):
        assert said.count(number) >= 3, "a number is cut"
    assert "batches" in said and "one by one" in said.replace("\n", " ")


@pytest.mark.parametrize("columns", WIDTHS)
def test_info(monkeypatch, columns) -> None:
    said = "\n".join(printed(monkeypatch, columns, "info"))
    for word in ("layer_norm", "sparse_ffn", rk.__version__, "yes"):
        assert word in said
    said = "\n".join(printed(monkeypatch, columns, "info", "--plan", "--arch", 90, "--linear", 768, 3072))
    squeezed = re.sub(r"[^0-9a-z_.]", "", said)
    assert "sm_90" in said and "3072" in said and "wgmma" in squeezed


@pytest.mark.parametrize("screen", range(1, 160))
def test_any_table_fits_any_screen(screen) -> None:
    """Beyond 30 columns, where a number and its name have room, whatever the cells hold."""
    from rich.console import Console

    numbers = ("0", "-0.019087865948677063", "1,234,567/1,234,567")
    table = tables.Table(
        [
            tables.Column("some text"),
            *(tables.Column(n, number=True) for n in ("a", "b c", "d")),
            tables.Column("t", ellipsis=True),
        ],
        title="a title of several words",
    )
    for text in ("", "a word", "東京は日本の首都です。", "w" * 90, "[red]no markup[/red]"):
        table.add_row(text, *numbers, text)
    console = Console(width=screen, color_system=None)
    with console.capture() as capture:
        console.print(table)
    said = capture.get()
    assert all(cell_len(line) <= max(screen, 2) for line in said.splitlines())
    if screen >= 25:
        assert all(said.count(number) >= 5 for number in numbers[1:])
