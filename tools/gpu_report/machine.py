"""What this machine has, asked of a process that may fail; what is missing, and what would work; the key of a run."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools import toolkit
from tools.gpu_report.steps import ROOT

Facts = dict[str, Any]
SOURCES = ("rerank_kernels", "csrc", "setup.py", "pyproject.toml", "tools/toolkit.py")  # what the library is made of
PROGRAMS = ("tests", "bench", "tools")  # and what asks it
MODULES = ("numpy", "transformers", "rich", "jinja2", "pytest", "setuptools")
OLDEST = (8, 0)
KEY = ("revision", "gpu", "capability", "driver", "torch", "cuda", "triton", "transformers", "python")

# In a process of its own: no context of the GPU is held while steps are timed.
ASK = """
import importlib.metadata, importlib.util, json, sys
facts = {"missing": [m for m in sys.argv[1:] if importlib.util.find_spec(m) is None]}
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
for name in ("triton", "transformers", "setuptools"): facts[name] = version(name)
try:
    import torch
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    if facts["gpus"]:
        p = torch.cuda.get_device_properties(0)
        facts |= {"gpu": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        facts |= {"memory GiB": round(p.total_memory / 2**30, 1), "L2 MiB": p.L2_cache_size // 2**20}
except Exception as error:
    facts["no torch"] = f"{type(error).__name__}: {error}"[:300]
print(json.dumps(facts))
"""


def facts(environment: Mapping[str, str]) -> Facts:
    asked = subprocess.run([sys.executable, "-c", ASK, *MODULES], capture_output=True, text=True, env=dict(environment))
    try:
        found: Facts = json.loads(asked.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"missing": [], "no torch": f"python said: {asked.stderr[-300:]}"}
    kit = toolkit.find(int(found["cuda"].split(".")[0]) if found.get("cuda") else None)
    found |= {
        "nvcc": kit.release if kit else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "ncu": shutil.which("ncu"),
        "ninja": shutil.which("ninja") is not None,
        "compiler": next((c for c in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if c and shutil.which(c)), None),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "revision": revision(),
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
    }
    return found


def lacks(found: Facts, build: bool = True) -> list[str]:
    """What is in the way of a run, each with what would work."""
    this = sys.executable
    said = []
    if "no torch" in found:
        said.append(f"PyTorch: {this} cannot import it ({found['no torch']}); run this with a python that has a CUDA build")
    elif found.get("cuda") is None:
        said.append(
            f"a GPU build of PyTorch: torch {found['torch']} is a build without CUDA; run this with a python that has one "
            "(PYTHON=... for make), or install it: pip install torch"
        )
    elif not found.get("gpus"):
        said.append(
            f"an NVIDIA GPU: torch {found['torch']} finds none (driver: {found.get('driver') or 'nvidia-smi says nothing'}); "
            "on a machine that has one, nvidia-smi lists it, and CUDA_VISIBLE_DEVICES must not hide it"
        )
    elif tuple(map(int, found["capability"].split("."))) < OLDEST:
        said.append(
            f"a GPU of compute capability 8.0 or newer: {found['gpu']} has {found['capability']}; an A100 or L4 would do"
        )
    if absent := [m for m in found.get("missing", []) if build or m != "setuptools"]:
        said.append(f"Python packages: {', '.join(absent)}; with a network: {this} -m pip install {' '.join(absent)}")
    if build and found.get("cuda") and found.get("nvcc") is None:
        said.append(
            f"nvcc, of CUDA {found['cuda'].split('.')[0]}: none in CUDA_HOME, on PATH, in /usr/local/cuda or from pip; with a "
            f"network: {this} -m pip install {' '.join(toolkit.WHEELS)}; or --no-build, if the library is installed"
        )
    if build and found.get("compiler") is None:
        said.append("a C++ compiler: none on PATH (CXX names one); or --no-build, if the library is installed")
    return said


def key(found: Facts) -> Facts:
    """What a step's result depends on: with another of these it is run again."""
    return {name: found.get(name) for name in KEY}


def revision() -> str:
    """Of the files as they are, with or without git."""
    listed = hashlib.sha256()
    for name in (*SOURCES, *PROGRAMS):
        root = ROOT / name
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if (
                path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".toml", ".json")
                and path.is_file()
                and "out" not in path.parts
            ):
                listed.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return listed.hexdigest()[:12]


def installed() -> list[str]:
    """Where this python finds the package without the checkout's help."""
    ask = "import importlib.util as u; s = u.find_spec('rerank_kernels'); print(s.origin if s else '')"
    origin = _said(sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", ask)
    return [str(Path(origin).parent.parent)] if origin else []


def environment(folder: Path, build: bool) -> dict[str, str]:
    """Of every step: one GPU, this library before any other, nothing fetched."""
    library = [str(folder / "build" / "lib")] if build else installed()
    paths = [*library, str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **quiet, "CUDA_VISIBLE_DEVICES": first, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().split("\n")[0] or None if done.returncode == 0 else None
