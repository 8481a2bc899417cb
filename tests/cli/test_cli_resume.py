"""score --resume: whatever ends the process, the same command goes on, and the file has the bytes of an uninterrupted run.

The processes here have a stub for a model, so that many of them can be killed at many moments.
"""

from __future__ import annotations

import gzip
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from commands import environment, stub, stubbed, write, write_pairs

COUNT, WINDOW = 400, 16
CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", COUNT)


def whole(pairs: Path, out: Path) -> bytes:
    assert stubbed("score", "model", pairs, "-o", out, window=WINDOW).returncode == 0
    return out.read_bytes()


def scored(log: Path) -> Counter[str]:
    return Counter(log.read_text().split()) if log.exists() else Counter()


def interrupted_until_done(argv: list[str], out: Path, log: Path, signals: tuple[int, ...], seed: int) -> int:
    """Starts the command again and again, each time with a signal somewhere in its work, until it is done; how often it was."""
    draw = random.Random(seed)
    for runs in range(1, 200):
        before = sum(scored(log).values())
        process = subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE)
        # from the first score on: a process that is ended before it does anything proves little
        while process.poll() is None and sum(scored(log).values()) == before:
            time.sleep(0.002)
        try:
            process.wait(draw.uniform(0.0, 0.15))
        except subprocess.TimeoutExpired:
            process.send_signal(draw.choice(signals))
        _, err = process.communicate(timeout=60)
        if process.returncode == 0 or (out.exists() and not out.with_name(out.name + ".resume").exists()):
            return runs  # or killed when all was done
        assert process.returncode in (130, -signal.SIGKILL), err
        assert b"Traceback" not in err
    raise AssertionError("it is never done")


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.json", "out.jsonl.gz"])  # tsv is csv but for a letter
def test_a_kill_loses_no_pair_and_writes_none_twice(pairs, tmp_path, name) -> None:
    want = whole(pairs, tmp_path / name)
    out, log = tmp_path / "resumed" / name, tmp_path / "log"
    out.parent.mkdir()
    argv = stub("score", "model", pairs, "-o", out, "--resume", log=log, pause=0.02, window=WINDOW)
    runs = interrupted_until_done(argv, out, log, (signal.SIGKILL, *CAUGHT), seed=sum(name.encode()))
    assert runs > 2 and out.read_bytes() == want
    assert [p.name for p in out.parent.iterdir()] == [name]
    counts = scored(log)
    assert len(counts) == COUNT and sum(counts.values()) <= COUNT + WINDOW * (runs - 1), "more than the window in work"


def test_a_signal_that_can_be_caught_scores_no_pair_twice(pairs, tmp_path) -> None:
    want = whole(pairs, tmp_path / "want.jsonl")
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    argv = stub("score", "model", pairs, "-o", out, "--resume", log=log, pause=0.02, window=WINDOW)
    assert interrupted_until_done(argv, out, log, CAUGHT, seed=7) > 2
    assert out.read_bytes() == want and set(scored(log).values()) == {1} and len(scored(log)) == COUNT


def cut_off(pairs: Path, out: Path, log: Path) -> Path:
    """The folder of a run that was killed in its work."""
    argv = stub("score", "model", pairs, "-o", out, "--resume", log=log, pause=0.02, window=WINDOW)
    process = subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL)
    while sum(scored(log).values()) < 5 * WINDOW:
        time.sleep(0.002)
    process.kill()
    process.wait()
    return out.with_name(out.name + ".resume")


def resume(pairs: Path, out: Path, *more: object, **options) -> subprocess.CompletedProcess:
    return stubbed("score", "model", pairs, "-o", out, "--resume", *more, window=WINDOW, **options)


def test_a_loss_of_power(pairs, tmp_path) -> None:
    """Any tail of the output and of the journal may be gone or be noise, as long as what was synced is there."""
    want = whole(pairs, tmp_path / "want.jsonl")
    out = tmp_path / "out.jsonl"
    folder = cut_off(pairs, out, tmp_path / "log")
    journal, output = (folder / "journal").read_bytes(), (folder / "output").read_bytes()
    lines = journal.splitlines(keepends=True)
    tails = [b"", b"\0" * 40, b"9999 1 00", lines[-1][:-3], lines[-1].replace(b" ", b" 1", 1)]
    for tail in tails:
        for keep in (len(lines), len(lines) - 2, 1, 0):
            (folder / "journal").write_bytes(b"".join(lines[:keep]) + tail)
            (folder / "output").write_bytes(output + b"\0" * 999)
            assert resume(pairs, out).returncode == 0 and out.read_bytes() == want, (tail, keep)
            assert not folder.exists()
            folder.mkdir()


def test_an_end_between_the_last_steps(pairs, tmp_path) -> None:
    """Before the rename the next run only renames; after it, it only tidies up."""
    want = whole(pairs, tmp_path / "want.json")
    out = tmp_path / "out.json"
    hurt = "import os\nreal = os.{0}\ndef {0}(*a, **k):\n    {1}\n    os._exit(9)\nos.{0} = {0}\n"
    for name, line in (("replace", "pass"), ("unlink", "'journal' in str(a[0]) or real(*a, **k)")):
        log = tmp_path / name
        argv = stub("score", "model", pairs, "-o", out, "--resume", log=log, window=WINDOW)
        argv[2] = hurt.format(name, line) + argv[2]
        assert subprocess.run(argv, env=environment()).returncode == 9
        assert resume(pairs, out, log=log).returncode == 0
        assert out.read_bytes() == want and not out.with_name("out.json.resume").exists()
        assert set(scored(log).values()) == {1}
        out.unlink()


def test_another_run_is_refused_by_name(pairs, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    folder = cut_off(pairs, out, tmp_path / "log")
    held = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = write(tmp_path / "other.jsonl", *pairs.read_bytes().splitlines()[:-1])
    for argv, named in (((other, out), "input: "), ((pairs, out, "--prefix", "p_"), "prefix:  then, p_ now")):
        ran = resume(*argv)
        said = ran.stderr.decode()
        assert ran.returncode == 2 and said.count("\n") == 1 and "is of another run: " in said and named in said
        assert "remove the folder to begin anew" in said
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == held
    output = folder / "output"
    output.write_bytes(output.read_bytes().replace(b"text", b"test", 1))
    ran = resume(pairs, out)
    assert ran.returncode == 2 and b"its output is not what its journal says; remove the folder" in ran.stderr
    assert not out.exists()
    shutil.rmtree(folder)
    assert resume(pairs, out).returncode == 0


def test_what_cannot_be_resumed_is_refused(pairs, tmp_path) -> None:
    for source, output, said in (
        ("-", tmp_path / "out.jsonl", b"not stdin or stdout"),
        (pairs, "-", b"not stdin or stdout"),
        (pairs, pairs, b"is PAIRS itself"),
        (pairs, os.devnull, b"is not a file"),
    ):
        ran = resume(source, output, stdin=subprocess.DEVNULL)
        assert ran.returncode == 2 and said in ran.stderr and ran.stderr.count(b"\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == []


def test_two_at_once(pairs, tmp_path) -> None:
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    argv = stub("score", "model", pairs, "-o", out, "--resume", log=log, pause=0.05, window=WINDOW)
    first = subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL)
    while not scored(log):
        time.sleep(0.002)
    ran = resume(pairs, out)
    assert ran.returncode == 2 and b"another process works in" in ran.stderr
    assert first.wait() == 0 and len(out.read_bytes().splitlines()) == COUNT


def test_a_run_without_it_says_that_the_work_is_there(pairs, tmp_path) -> None:
    out = tmp_path / "out.jsonl.gz"
    folder = cut_off(pairs, out, tmp_path / "log")
    ran = stubbed("score", "model", pairs, "-o", out, window=WINDOW)
    assert ran.returncode == 0 and b"is there from an interrupted run" in ran.stderr and folder.exists()
    assert len(gzip.decompress(out.read_bytes()).splitlines()) == COUNT


@pytest.mark.parametrize("number", CAUGHT)
def test_without_it_no_signal_leaves_anything(pairs, tmp_path, number) -> None:
    out, log = write(tmp_path / "out.jsonl", "old"), tmp_path / "log"
    for wait in (0.0, 0.03, 0.08):
        argv = stub("score", "model", pairs, "-o", out, log=log, pause=0.02, window=WINDOW)
        process = subprocess.Popen(argv, env=environment(), stderr=subprocess.PIPE)
        before = sum(scored(log).values())
        while process.poll() is None and sum(scored(log).values()) == before:
            time.sleep(0.002)
        time.sleep(wait)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (130, b"rerank-kernels: interrupted\n")
        assert out.read_bytes() == b"old\n" and sorted(p.name for p in tmp_path.iterdir()) == ["log", "out.jsonl"]


def test_nohup_is_heard(pairs, tmp_path) -> None:
    argv = stub("score", "model", pairs, "-o", tmp_path / "out.jsonl", log=tmp_path / "log", pause=0.01, window=WINDOW)
    ignored = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = subprocess.Popen(argv, env=environment(), preexec_fn=ignored)
    while not scored(tmp_path / "log"):
        time.sleep(0.002)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
