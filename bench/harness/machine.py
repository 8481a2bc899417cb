"""What a run says about itself: the machine's facts, and the revision."""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import torch

from bench import ROOT
from bench.harness.turns import settled
from rerank_kernels.backend import registry
from rerank_kernels.verify.report import environment
from tools.gpu_report import machine as gpu_report

SMI = "name driver_version clocks.sm clocks.mem clocks.max.sm power.draw power.limit temperature.gpu"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(device: str = "cpu") -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        info = pathlib.Path("/proc/cpuinfo").read_text()
        cpu = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), cpu)
    revision = _said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]) or "no git here"
    of_sources = {"revision": revision, "sources": gpu_report.revision()}
    found = {"cpu": cpu, "cores": cores(), "load": round(os.getloadavg()[0], 2), **environment(), **of_sources}
    if device == "cuda":
        return found | _gpu()
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
    engines = {name: (version(name) or "not installed").partition("-")[0] for name in ("onnxruntime", "openvino")}
    return found | {"mkl": mkl and mkl[1], **engines, "gpu": "not measured"}


def _gpu() -> dict[str, Any]:
    """After half a second of work, so that the clocks that are read are those of a GPU at work; nothing is set."""
    if not torch.cuda.is_available():
        return {"gpu": "not measured"}
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        for _ in range(20):
            x @ x
        settled()
    values = _said(["nvidia-smi", f"--query-gpu={','.join(SMI.split())}", "--format=csv,noheader"]) or ""
    asked = gpu_report.facts(os.environ)
    names = ("gpu", "capability", "multiprocessors", "memory GiB", "L2 MiB", "cuda", "triton", "nvcc")
    return {
        **{name: asked.get(name) for name in names},
        "backends": {n: registry.missing(n) or "available" for n in ("cuda", "triton")},
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        **{f"smi {k}": v.strip() for k, v in zip(SMI.split(), values.split(","), strict=False)},
    }


def version(name: str) -> str | None:
    with contextlib.suppress(Exception):
        return str(__import__(name).__version__)
    return None


def _said(command: Sequence[str]) -> str | None:
    """The first line."""
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None
    return None
