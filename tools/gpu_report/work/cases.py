"""How a step says what it finds: a line of JSON at a time, so that nothing is lost, in cases that are begun and finished."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def say(**record: Any) -> None:
    print(json.dumps(record), flush=True)


def until() -> float:
    return float(os.environ.get("GPU_REPORT_UNTIL", "inf"))


def folder() -> Path:
    """Where the other steps' files are."""
    return Path(os.environ.get("GPU_REPORT_FOLDER", "."))


def cases(names: Sequence[str]) -> Iterator[str]:
    """Those of the names that no process before this one finished, while there is time; then which are left."""
    from tools.gpu_report.runner import read

    done = set(read(Path(os.environ["GPU_REPORT_FILE"])).finished) if "GPU_REPORT_FILE" in os.environ else set()
    waiting = [name for name in names if name not in done]
    longest = 0.0
    for i, name in enumerate(waiting):
        started = time.time()
        if started + 0.5 * longest > until():  # what would be broken off is not begun
            say(left=waiting[i:])
            return
        say(begins=name)
        yield name
        say(finished=name)
        longest = max(longest, time.time() - started)
