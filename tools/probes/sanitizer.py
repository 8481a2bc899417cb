"""Do compute-sanitizer's memcheck and synccheck find nothing in any way of any launcher, on small shapes?

The simulator judges the same kernels, but not the instructions that a chip really runs. One line of JSON: per tool what it
said, and how many calls ran.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 60
DEVICE = "cuda"  # tests have another
TOOLS = ("memcheck", "synccheck")
FOUND = 9  # the exit status of a tool that found something
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))


def program() -> str | None:
    from tools import toolkit

    kit = toolkit.find()
    beside = kit.tool("compute-sanitizer") if kit else None
    return str(beside) if beside else shutil.which("compute-sanitizer")


def calls() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(op, mode, a call of it): odd sizes, and sizes that tensor cores like."""
    import torch

    import rerank_kernels as rk

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).half()

    ends = torch.tensor([0, 5, 5, 70, 211], dtype=torch.int32, device=DEVICE)
    for mode in ("portable", "tensor"):
        for m, n, k in ((65, 72, 40), (3, 17, 13)):
            given = rows(m, k), rows(n, k), rows(n)
            more = {"activation": "gelu", "residual": rows(m, n), "mode": mode}
            yield "linear", mode, lambda given=given, more=more: rk.linear(*given, **more)  # type: ignore[misc]
        for d in (64, 40, 128):
            q = rows(211, 3, d)
            yield "attention", mode, lambda q=q, mode=mode: rk.attention(q, q, q, cu_seqlens=ends, mode=mode)  # type: ignore[misc]
    x, w = rows(33, 200), rows(200)
    yield "layer_norm", "portable", lambda: rk.layer_norm(x, w, w)
    yield "softmax", "portable", lambda: rk.softmax(x)
    yield "normalize", "portable", lambda: rk.normalize(x)


def tiny() -> None:
    """What runs inside of a tool: each call by each way of each launcher that may serve it."""
    import torch

    import rerank_kernels as rk
    from tools.gpu_report.work import launchers

    ran = 0
    with torch.no_grad(), rk.use("cuda"):
        for op, mode, call in calls():
            for name, ways in launchers.of(op, mode, launchers.listed(), torch.cuda.get_device_capability()).items():
                for way in range(ways):
                    with launchers.forced(name, way):
                        call()
                    ran += 1
        torch.cuda.synchronize()
    sys.stdout.write(f"{ran} calls\n")


def looked_at(sanitizer: str, tool: str, seconds: float) -> dict[str, Any]:
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        "--print-limit",
        "5",
        sys.executable,
        __file__,
        "tiny",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"note": f"it did not end within {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    said = {"calls": next((line for line in lines if line.endswith(" calls")), None), "status": done.returncode}
    return {**said, "said": lines[-1:] if done.returncode == 0 else lines[:12] + done.stderr.splitlines()[-3:]}


def main() -> None:
    found: dict[str, Any] = {"note": "no compute-sanitizer here: it comes with the CUDA toolkit"}
    if sanitizer := program():
        found = {}
        for i, tool in enumerate(TOOLS):
            left = float(os.environ.get("GPU_REPORT_UNTIL", time.time() + SECONDS)) - 2.0 - time.time()
            found[tool] = looked_at(sanitizer, tool, left / (len(TOOLS) - i)) if left > 5 else {"note": "no time was left"}
        bad = [tool for tool, one in found.items() if one.get("status")]
        found |= {"wrong": f"{', '.join(bad)} ended with an error"} if bad else {}
    print(json.dumps(found))


if __name__ == "__main__":
    tiny() if sys.argv[1:] == ["tiny"] else main()
