"""CUDA kernels of probes: compiled ahead, so that no minute of a GPU goes into nvcc, and started through the driver.

    python tools/probes/_cubin.py             # compiles them into build/probes; needs no GPU. 9.0: those of this capability
    kernels = load("sums")                    # on a GPU; Unfit says why not
    kernels["sums_f16_64"]((x, y), 128, a, b, c, d, 768, 4096, 0)

gpu-report compiles them in its step `build`, into its own folder. A file has its source's hash in its name, so what is old is
not taken. What is not there is compiled, if there is nvcc.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path += [p for p in (str(Path(__file__).resolve().parent), str(ROOT)) if p not in sys.path]

import _wgmma  # noqa: E402

from tools import toolkit  # noqa: E402

AHEAD = ROOT / "build" / "probes"
SOURCES: Mapping[str, tuple[str, Callable[[], str]]] = {"sums": ("90a", _wgmma.sums), "rates": ("90a", _wgmma.rates)}


class Unfit(Exception):
    """This GPU, or this machine, cannot answer; the message is the answer."""


def says_why(main: Callable[[], None]) -> None:
    """main(); a machine that cannot answer says so in the probe's line."""
    try:
        main()
    except Unfit as error:
        sys.stdout.write(json.dumps({"note": str(error)}) + "\n")


def named(name: str, text: str, arch: str) -> str:
    return f"{name}-{arch}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cubin"


def folders() -> list[Path]:
    """Where they may be; what is compiled comes into the first."""
    report = os.environ.get("GPU_REPORT_FOLDER")
    return [Path(report) / "build" / "probes", AHEAD] if report else [AHEAD]


def compiled(name: str) -> Path:
    """The cubin of one of SOURCES, compiled unless it is there."""
    arch, source = SOURCES[name]
    text = source()
    file = named(name, text, arch)
    for folder in folders():
        if (folder / file).exists():
            return folder / file
    kit = toolkit.find()
    if kit is None:
        raise Unfit(f"no nvcc here, and {file} was not built ahead: python tools/probes/_cubin.py does it")
    made = folders()[0] / file
    made.parent.mkdir(parents=True, exist_ok=True)
    written = made.with_suffix(".cu")
    written.write_text(text)
    beside = made.with_name(f".{made.name}.{os.getpid()}")
    command = [kit.path, *toolkit.FLAGS, "-cubin", f"-arch=sm_{arch}", written, "-o", beside]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unfit(f"nvcc {kit.release} does not compile {name} for sm_{arch}: {' '.join(done.stderr.split())[:300]}")
    os.replace(beside, made)
    return made


def load(name: str) -> Mapping[str, Kernel]:
    import torch

    arch = SOURCES[name][0]
    major, minor = torch.cuda.get_device_capability()
    if f"{major}{minor}" != arch.rstrip("a"):
        raise Unfit(f"it asks a GPU of compute capability {arch[0]}.{arch[1:].rstrip('a')}; this one has {major}.{minor}")
    torch.zeros(1, device="cuda")  # torch's context is the current one
    return Kernels(compiled(name))


class Kernels(dict[str, Any]):
    """name -> kernel, looked up when it is asked for."""

    def __init__(self, cubin: Path) -> None:
        super().__init__()
        self.driver, self.module = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
        self.ask("cuModuleLoadData", ctypes.byref(self.module), cubin.read_bytes())

    def ask(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.driver, name)(*arguments):
            raise RuntimeError(f"{name} gives status {status}")

    def __missing__(self, name: str) -> Kernel:
        function = ctypes.c_void_p()
        self.ask("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())
        self[name] = Kernel(self, function)
        return self[name]


class Kernel:
    def __init__(self, of: Kernels, function: ctypes.c_void_p) -> None:
        self.of, self.function = of, function

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        """Tensors are passed as their addresses, None as null, numbers as int."""
        import torch

        addresses = (a if a is None or isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments)
        held = [ctypes.c_int(a) if isinstance(a, int) else a or ctypes.c_void_p(0) for a in addresses]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.pointer(h), ctypes.c_void_p) for h in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.of.ask("cuLaunchKernel", self.function, grid[0], grid[1], 1, threads, 1, 1, 0, stream, pointers, None)


def main(*capabilities: str) -> int:
    """Compiles what fits one of the capabilities ("9.0"), or all."""
    status = 0
    for name, (arch, _) in SOURCES.items():
        if capabilities and f"{arch[0]}.{arch[1:].rstrip('a')}" not in capabilities:
            continue
        try:
            said: object = compiled(name)
        except Unfit as error:
            said, status = error, 1
        sys.stdout.write(f"{said}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
