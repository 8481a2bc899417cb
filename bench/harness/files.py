"""What a run says about itself: the machine's facts, the revision, and the file, which is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import rerank_kernels as rk
from bench import ROOT
from rerank_kernels.backend import registry

SMI = "name driver_version clocks.sm clocks.mem clocks.max.sm power.draw power.limit temperature.gpu"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str = "cpu") -> dict[str, Any]:
    import transformers

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        info = pathlib.Path("/proc/cpuinfo").read_text()
        cpu = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), cpu)
    facts = {
        "cpu": cpu,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "transformers": transformers.__version__,
        "rerank_kernels": rk.__version__,
        "numerics version": rk.NUMERICS_VERSION,
        **revision(),
    }
    if device == "cuda":
        return facts | gpu()
    active = registry.active("cpu")
    isa = torch.ops.rerank_kernels.force_isa("") if active.name == "cpu" else "PyTorch's"
    rivals = {name: (_version(name) or "not installed").partition("-")[0] for name in ("onnxruntime", "openvino")}
    return facts | {"backend": active.name, "isa": isa, "mkl": _mkl(), **rivals, "gpu": "not measured"}


def _mkl() -> str | None:
    match = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
    return match[1] if match else None


def gpu() -> dict[str, Any]:
    """As read, nothing set: clocks and power are what they are at this moment."""
    if not torch.cuda.is_available():
        return {"gpu": "not measured"}
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "gpu": properties.name,
        "sm": f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} multiprocessors",
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "L2 MiB": properties.L2_cache_size // 2**20,
        "torch's cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _said(["nvcc", "--version"], r"release [\d.]+, V([\d.]+)"),
        "backends": {n: b for n in ("cuda", "triton") if (b := registry.missing(n) or "available")},
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI.split())}", "--format=csv,noheader"]
    if (values := _said(query, r"(.*)")) is not None:
        facts |= {f"smi {k}": v.strip() for k, v in zip(SMI.split(), values.split(","), strict=False)}
    return facts


def revision(root: pathlib.Path = ROOT) -> dict[str, Any]:
    """git's word where there is git, and a hash of the sources, which a copy without git has too."""
    sources = hashlib.sha256()
    for path in sorted(p for folder in ("csrc", "rerank_kernels") for p in (root / folder).rglob("*")):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            sources.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    git = _said(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"], r"(\S+)")
    return {"revision": git or "no git here", "sources": sources.hexdigest()[:16]}


def _version(name: str) -> str | None:
    with contextlib.suppress(Exception):
        return str(__import__(name).__version__)
    return None


def _said(command: Sequence[str], pattern: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    match = re.search(pattern, done.stdout) if done.returncode == 0 else None
    return match.group(1) if match else None


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Beside it, then renamed: the file is there whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
