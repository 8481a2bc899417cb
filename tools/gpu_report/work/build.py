"""The library for the one GPU that is here, from a copy of the sources, into DIR/build/lib: the checkout stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from tools.gpu_report.machine import ROOT, SOURCES
from tools.gpu_report.work.cases import folder, say


def main() -> None:
    import torch

    source, built = folder() / "build" / "source", folder() / "build" / "lib"
    for name in (*SOURCES, "README.md", "LICENSE"):
        target = source / name
        if (ROOT / name).is_dir():
            left_out = shutil.ignore_patterns("*.so", "__pycache__", "_no*.txt")
            shutil.copytree(ROOT / name, target, ignore=left_out, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    needed = {"RERANK_KERNELS_BUILD_CPU": "1", "RERANK_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    started = time.time()
    ahead = subprocess.Popen([sys.executable, str(ROOT / "tools" / "probes" / "_cubin.py"), capability], stdout=sys.stderr)
    command = [sys.executable, "setup.py", "build", "--build-lib", str(built), "--build-temp", str(folder() / "build" / "temp")]
    done = subprocess.run(command, cwd=source, env={**os.environ, **needed, "PYTHONPATH": ""}, stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"setup.py ended with {done.returncode}; its words are above")
    asked = "from rerank_kernels.backend.registry import missing; print(*(missing(b) or 'built' for b in ('cpu', 'cuda')))"
    there = subprocess.run([sys.executable, "-c", asked], cwd=folder(), capture_output=True, text=True)
    say(case="build", seconds=round(time.time() - started, 1), capability=capability, found=there.stdout.strip())
    if status := ahead.wait():
        say(
            case="kernels of probes",
            note=f"they do not compile here: _cubin.py ended with {status}; its words are in build.log",
        )
    if not there.stdout.startswith("built built"):
        sys.exit(f"built, but not to be used: {there.stdout}{there.stderr[-500:]}")
