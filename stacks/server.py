"""An Infinity server in a process of its own, stock or ours, and clients for it: the standard library's HTTP, a thread each."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

START = 120.0  # seconds until a server that says nothing is given up
HOST = "127.0.0.1"


class Asked(NamedTuple):
    """One request of /rerank. pairs: which of the 200 its documents are."""

    query: str
    documents: tuple[str, ...]
    pairs: tuple[int, ...]
    raw: bool


class Answer(NamedTuple):
    status: int
    body: Any  # of JSON, else text


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=START)

    def ask(
        self, body: bytes, path: str = "/rerank", method: str = "POST", kept: http.client.HTTPConnection | None = None
    ) -> Answer:
        """With a connection that is kept open if one is given."""
        connection = kept or self.connect()
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            return answer_of(connection.getresponse())
        finally:
            if kept is None:
                connection.close()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


def answer_of(response: http.client.HTTPResponse) -> Answer:
    text = response.read().decode()
    try:
        return Answer(response.status, json.loads(text))
    except ValueError:
        return Answer(response.status, text)


def body_of(asked: Asked, model: str) -> bytes:
    return json.dumps({"model": model, "query": asked.query, "documents": asked.documents, "raw_scores": asked.raw}).encode()


def command(patched: bool, *arguments: str) -> list[str]:
    """Ours is the console script of the package; Infinity's own is beside it."""
    scripts = Path(sys.executable).parent
    start = [scripts / "rerank-kernels", "infinity-server", "--"] if patched else [scripts / "infinity_emb"]
    return [str(part) for part in start] + ["v2", *arguments]


@contextlib.contextmanager
def serving(patched: bool, models: dict[str, str]) -> Iterator[Server]:
    """A server of `models`, served name -> folder, once it is healthy; killed at the end if it is still there."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    arguments = ["--host", HOST, "--port", str(port), "--log-level", "info"]
    arguments += ["--engine", "torch", "--device", "cpu", "--no-bettertransformer", "--no-model-warmup"]
    for name, folder in models.items():
        arguments += ["--model-id", folder, "--served-model-name", name]
    kept = Path(tempfile.mkdtemp(prefix="stacks-"))
    with open(kept / "log", "wb") as log:
        process = subprocess.Popen(command(patched, *arguments), stdout=log, stderr=subprocess.STDOUT)
    server = Server(process, port, kept / "log")
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        shutil.rmtree(kept)


def _wait(server: Server) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until and server.process.poll() is None:
        with contextlib.suppress(OSError):
            if server.ask(b"", "/health", "GET").status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-4000:]}")


def clients(server: Server, model: str, work: Sequence[Asked], count: int) -> list[tuple[Asked, Answer]]:
    """All of `work`, in a random order, by `count` clients at once, each with a connection that it keeps."""
    left: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    for asked in random.Random(count).sample(list(work), len(work)):
        left.put(asked)
    done: list[tuple[Asked, Answer]] = []
    failed: list[BaseException] = []

    def client() -> None:
        connection = server.connect()
        try:
            with contextlib.suppress(queue.Empty):
                while not failed:
                    asked = left.get_nowait()
                    done.append((asked, server.ask(body_of(asked, model), kept=connection)))
        except BaseException as error:
            failed.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return done


def terminated_under_load(server: Server, model: str, work: Sequence[Asked]) -> tuple[list[Answer | OSError], int, int]:
    """Every request sent at once, SIGTERM when the first answer is there; their answers, how many were still open, exit code.

    All of them are the server's by then: the first answer takes it much longer than to read what has come in.
    """
    found: list[Answer | OSError | None] = [None] * len(work)
    sent = threading.Barrier(len(work) + 1, timeout=START)
    first = threading.Event()

    def client(i: int) -> None:
        connection = server.connect()
        try:
            connection.request("POST", "/rerank", body_of(work[i], model), {"Content-Type": "application/json"})
            sent.wait()
            found[i] = answer_of(connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            found[i] = OSError(f"{type(error).__name__}: {error}")
        finally:
            first.set()
            connection.close()

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    sent.wait()
    first.wait(START)
    still_open = sum(answer is None for answer in found)
    server.terminate()
    for thread in threads:
        thread.join()
    code = server.process.wait(START)
    return [answer for answer in found if answer is not None], still_open, code
