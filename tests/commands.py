"""What the tests of the command share: files, runs in this process, and a process whose model is a stub, for what is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import rerank_kernels as rk
from rerank_kernels import cli

# The command without torch: an empty package stands for rerank_kernels, a formula for the model. Its log holds the id of each
# pair that was scored, written before the score is known, as a real model has worked by then.
STUB = f"""
import os, sys, time, types, zlib
package = types.ModuleType("rerank_kernels")
package.__path__, package.__version__, package.NUMERICS_VERSION = {list(rk.__path__)!r}, "0", 0
sys.modules["rerank_kernels"] = package
from rerank_kernels import cli
from rerank_kernels.cli import models, score

class Stub:
    def score(self, pairs, **options):
        if LOG:
            with open(LOG, "ab", buffering=0) as log:
                log.write("".join(query + "\\n" for query, _ in pairs).encode())
        time.sleep(PAUSE)
        number = [zlib.crc32((q + "\\0" + d).encode()) / 2**20 for q, d in pairs]
        return number, number, number

LOG, PAUSE, score.WINDOW = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
models.reranker = lambda args: Stub()
score._identity = lambda args, reranker, source, to: {{
    "input": score.resume.digest(args.pairs), "prefix": args.prefix, "formats": f"{{source}} to {{to}}"
}}
sys.argv[1:4] = []
sys.exit(cli.main())
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}


def stub(*argv: object, log: object = "", pause: float = 0.0, window: int = 256) -> list[str]:
    """The command line of a process with the stub."""
    return [sys.executable, "-c", STUB, str(log), str(pause), str(window), *map(str, argv)]


def stubbed(*argv: object, **options) -> subprocess.CompletedProcess:
    own = {name: options.pop(name) for name in ("log", "pause", "window") if name in options}
    return subprocess.run(stub(*argv, **own), env=environment(), capture_output=True, **options)


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def write_pairs(path: Path, count: int) -> Path:
    """JSON Lines whose queries are their numbers."""
    return write(path, *(json.dumps({"query": str(i), "document": f"text {i}, ü" * (i % 7), "n": i}) for i in range(count)))


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def bad(capsys, *argv: object) -> str:
    """What the command says of bad input: one line, exit code 2, nothing on stdout."""
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == ""
    assert err.startswith("rerank-kernels: ") and err.count("\n") == 1, err
    return err.removeprefix("rerank-kernels: ").rstrip("\n")
