"""The command as a process: what it says when it is interrupted at any moment, and the memory that it takes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import environment, stub, write, write_pairs
from models import save_cross_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("model"))


# says when our main is about to run: before that it is Python that starts, and what it says of an interrupt is its own
STARTED = "import os, sys; from rerank_kernels.cli import main; os.write(1, b'.'); sys.exit(main())"


def test_an_interrupt_in_the_first_seconds_is_one_line(folder, tmp_path) -> None:
    """While torch, transformers and the model are loaded."""
    pairs = write(tmp_path / "pairs.jsonl", json.dumps({"query": "a", "document": "b"}))
    argv = [sys.executable, "-c", STARTED, "score", str(folder), str(pairs), "-o", str(tmp_path / "out.jsonl")]
    found = []
    for wait in (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.2, 3.0):
        process = subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.read(1) == b"."
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done
            assert err == b""
            (tmp_path / "out.jsonl").unlink()
        else:
            assert (process.returncode, err) == (130, b"rerank-kernels: interrupted\n"), wait
            found.append(wait)
        assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"], wait
    assert len(found) >= 5


def peak(*argv: object) -> int:
    """Peak memory of the process in KB, its exit code 0."""
    program = (
        "import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:]); _, status, used = os.wait4(p.pid, 0); "
        "print(used.ru_maxrss); sys.exit(status != 0)"
    )
    ran = subprocess.run([sys.executable, "-c", program, *argv], env=environment(), capture_output=True, check=True)
    return int(ran.stdout)


@pytest.mark.parametrize(("name", "to"), [("jsonl", "jsonl"), ("json", "json.gz"), ("jsonl", "csv"), ("parquet", "parquet")])
def test_memory_does_not_grow_with_the_file(tmp_path, name, to) -> None:
    """Six times the pairs take the same memory, or a row group more."""
    found = []
    for count in (10_000, 60_000):
        lines = write_pairs(tmp_path / "p.jsonl", count)
        source = tmp_path / f"p.{name}"
        if name == "json":
            source.write_bytes(b"[" + b",".join(lines.read_bytes().splitlines()) + b"]")
        if name == "parquet":
            pq = pytest.importorskip("pyarrow.parquet")
            pq.write_table(__import__("pyarrow.json", fromlist=["read_json"]).read_json(lines), source, row_group_size=5_000)
        found.append(peak(*stub("score", "m", source, "-o", tmp_path / f"o.{to}")))
    few, many = found
    assert many < few + (64_000 if to == "parquet" else 6_000), found
