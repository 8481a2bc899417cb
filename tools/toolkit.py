"""Where the CUDA toolkit is, and which flags and architectures the kernels are built with: for setup.py and for the tests.

`nvcc` on PATH may be a script that calls the real one, and a toolkit may come from pip's wheels; both are looked through.
Needs nothing but the standard library.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# The numeric contract's flags (NUMERICS.md, "Flags"): an fma is where the source says fmadd, nowhere else.
NUMERIC_FLAGS = ["--fmad=false"]
FLAGS = ["-std=c++20", "-O3", *NUMERIC_FLAGS]

# A100; A10, RTX 3090; L4, RTX 4090; H100; B200; RTX 5090. cp.async sets the lower end.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")

# The rooms of csrc/cuda that hold kernels, and what each is compiled for: None, all that is asked for; or these alone, where
# they are asked for ("90a" with sm_90). How much shared memory a block may have there says its room.cuh.
ROOMS: dict[str, tuple[str, ...] | None] = {"portable": None, "sm80": None, "sm90": ("90a",)}

SECONDS = 134  # of one core for one architecture: nvcc 13.0 on an AMD EPYC (Zen 3) that had other work too

# A toolkit from pip, 270 MB: all of one minor version ("==13.0.*").
DISASSEMBLER = "nvidia-cuda-nvdisasm>=13.0,<14"
WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")


class Toolkit:
    def __init__(self, nvcc: Path, home: Path, release: str) -> None:
        self.path = nvcc  # the compiler itself, no wrapper
        self.home = home  # the folder that holds include/ and lib64/ or lib/
        self.release = release  # "13.0.88"
        self.version = tuple(int(n) for n in release.split(".")[:2])

    @functools.cached_property
    def known(self) -> tuple[str, ...]:
        """The architectures that this nvcc compiles for: ("75", "80", ...)."""
        said = subprocess.run([self.path, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        return tuple(re.findall(r"compute_(\d+)\b", said))

    @property
    def libraries(self) -> Path:
        """The folder of libcudart; a toolkit from pip's wheels has only lib/."""
        both = (self.home / "lib64", self.home / "lib", self.home / "targets" / "x86_64-linux" / "lib")
        return next((d for d in both if any(d.glob("libcudart*"))), both[0])

    def tool(self, name: str) -> Path | None:
        """A program that comes with some toolkits only (cuobjdump, nvdisasm): from here, PATH, pip's wheels or Triton's."""
        places = [self.home / "bin" / name]
        places += [Path(found)] if (found := shutil.which(name)) else []
        places += [home / "bin" / name for home in _wheels()]
        places += [folder / "backends" / "nvidia" / "bin" / name for folder in _installed("triton")]
        return next((p for p in places if os.access(p, os.X_OK)), None)


def find(major: int | None = None) -> Toolkit | None:
    """The toolkit of CUDA_HOME, if it is set; else of `nvcc` on PATH, /usr/local/cuda, or pip's wheels, the first of version
    `major` before the others. None if there is none.
    """
    every = [found for nvcc in _candidates() if (found := _ask(nvcc)) is not None]
    fitting = [kit for kit in every if major in (None, kit.version[0])]
    return next(iter(fitting or every), None)


def _candidates() -> list[Path]:
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return [Path(home) / "bin" / "nvcc"]
    on_path = [Path(found)] if (found := shutil.which("nvcc")) else []
    return [*on_path, Path("/usr/local/cuda/bin/nvcc"), *(home / "bin" / "nvcc" for home in _wheels())]


def _installed(package: str) -> list[Path]:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(p) for p in spec.submodule_search_locations or []] if spec else []


def _wheels() -> list[Path]:
    """site-packages/nvidia/cu13 and the like, the newest first."""
    return sorted((h for folder in _installed("nvidia") for h in folder.glob("cu[0-9]*")), reverse=True)


def _ask(nvcc: Path) -> Toolkit | None:
    """The toolkit behind this nvcc, by what the compiler itself says; None if it does not run."""
    if not os.access(nvcc, os.X_OK):
        return None
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
        # prints the commands that it would run, and before them the folders it works with; the file need not exist
        dry = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release [\d.]+, V([\d.]+)", version.stdout)
    folders = dict(re.findall(r"^#\$ (_HERE_|TOP)=(.*)$", dry.stderr + dry.stdout, re.MULTILINE))
    if release is None:
        return None
    real = Path(folders["_HERE_"]) / "nvcc" if "_HERE_" in folders else nvcc.resolve()
    home = Path(folders["TOP"]).resolve() if "TOP" in folders else real.parent.parent
    return Toolkit(nvcc=real, home=home, release=release[1])


def gencode(listed: str | None, kit: Toolkit, seen: Sequence[str] = ()) -> tuple[list[str], str]:
    """nvcc's flags for the architectures of TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), without one for the GPUs that are `seen`
    (["90"]), else for all of ours; and what is to be said about them. ValueError says what is wrong with a list.
    """
    release = ".".join(map(str, kit.version))
    here = [a for a in seen if int(a) >= int(ARCHITECTURES[0])]
    if not (listed or "").strip() and here and all(a in kit.known for a in here):
        return [*(_for(a) for a in here), _for(here[-1], "compute")], f"sm_{', sm_'.join(here)} of this machine and its PTX"
    if not (listed or "").strip():
        ours = [a for a in ARCHITECTURES if a in kit.known]
        if not ours:
            raise ValueError(f"CUDA {release} compiles for none of sm_{', sm_'.join(ARCHITECTURES)}")
        lost = [a for a in ARCHITECTURES if a not in kit.known]
        said = f"sm_{', sm_'.join(ours)} and PTX of the last"
        if lost:
            said += f"; not sm_{', sm_'.join(lost)}, which CUDA {release} does not know"
        return [*(_for(a) for a in ours), _for(ours[-1], "compute")], said
    flags = []
    for item in re.split(r"[;,\s]+", (listed or "").strip(" ;,")):
        fits = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if fits is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={listed!r}: {item!r} is not understood; write for instance '8.0;9.0+PTX'")
        number, arch = fits[1] + fits[2], "".join(fits.group(1, 2, 3))
        if int(number) < int(ARCHITECTURES[0]):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={listed!r}: the kernels need compute capability 8.0 or newer, not {item}")
        if number not in kit.known:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={listed!r}: CUDA {release} at {kit.home} does not know {item}")
        flags.append(_for(arch))
        if fits[4]:
            flags.append(_for(arch, "compute"))
    return list(dict.fromkeys(flags)), f"TORCH_CUDA_ARCH_LIST={listed}"


def of_room(room: str, flags: Sequence[str]) -> list[str]:
    """Of gencode's flags what a room is compiled with; none: it is left out. A folder that is no room of kernels takes all."""
    only = ROOMS.get(room)
    if only is None:
        return list(flags)
    asked = set(re.findall(r"code=sm_(\d+)", " ".join(flags)))
    return [_for(arch) for arch in only if arch.rstrip("af") in asked]


def minutes(flags: Sequence[str]) -> int:
    """About how long nvcc takes: SECONDS of one core for each architecture, on what cores there are."""
    return max(1, round(SECONDS * len(flags) / (os.cpu_count() or 1) / 60))


def _for(arch: str, code: str = "sm") -> str:
    return f"-gencode=arch=compute_{arch},code={code}_{arch}"


def lacking() -> list[str]:
    """What pip must install for the tests: nvcc and its parts if no toolkit is there, a disassembler if none is."""
    kit = find()
    wanted = [] if kit else [f"{name}==13.0.*" for name in WHEELS]
    if kit is None or kit.tool("nvdisasm") is None:
        wanted.append(DISASSEMBLER)
    return wanted


if __name__ == "__main__":
    if sys.argv[1:] == ["--lacking"]:
        print(*lacking())
    else:
        found = find()
        print(f"{found.path}: CUDA {found.release}" if found else "no nvcc")
