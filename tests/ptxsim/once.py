"""What is expensive to make is made once, also when several processes of one test run want it at the same time."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Inside, nobody else makes `target`: other processes and threads wait here, and should look then whether it is there.

    Whoever makes it writes under another name and moves it into place when it is whole (os.replace).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the open file, so it holds between threads too; the kernel lifts it on exit
        yield
