"""nvcc for the tests: finds it (tools/toolkit.py), compiles a file for one architecture, and keeps what it compiled.

    kit = toolkit.find()                    # None: no nvcc here
    kit.version                             # (13, 0)
    kit.ptx(source, "80").read_text()       # paths of files in build/cuda, which are not to be changed
    kit.cubin(source, "120")
    kit.object(source, out)                 # host code and, for sm_80, device code: an object file for g++ to link

What was compiled is found again by a hash of the source, of every header that kernels see, of the flags and of nvcc's version.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ptxsim.once import alone

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "cuda"

_spec = importlib.util.spec_from_file_location("rerank_kernels_toolkit", ROOT / "tools" / "toolkit.py")
assert _spec is not None and _spec.loader is not None
found = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(found)

FLAGS: list[str] = found.FLAGS
ARCHITECTURES: tuple[str, ...] = found.ARCHITECTURES


class Toolkit(found.Toolkit):  # type: ignore[name-defined,misc]
    def ptx(self, source: str | Path, arch: str = "80", flags: Sequence[str] = ()) -> Path:
        return self._compiled(Path(source), _to_ptx(arch, flags), ".ptx")

    def cubin(self, source: str | Path, arch: str = "80", flags: Sequence[str] = ()) -> Path:
        return self._compiled(Path(source), ["-cubin", f"-arch=sm_{arch}", *flags], ".cubin")

    def assemble(self, ptx: str, arch: str) -> tuple[Path, str]:
        """PTX to a cubin, as nvcc has it done, and what ptxas -v says: registers, stack, spills, shared memory."""
        command = [self.path.parent / "ptxas", "-m64", "-v", f"-arch=sm_{arch}"]
        made, said = self._kept(self._place("ptxas", command, ptx.encode(), ".cubin"), command, ("in.ptx", ptx.encode()))
        return made, said.read_text()

    def disassemble(self, cubin: Path) -> str:
        """The machine code as text, without the addresses of other sections."""
        program = self.tool("nvdisasm")
        if program is None:
            raise RuntimeError("no nvdisasm: install a full CUDA toolkit, or pip's nvidia-cuda-nvdisasm")
        return subprocess.run([program, "-c", cubin], capture_output=True, text=True, check=True).stdout

    def object(self, source: str | Path, out: str | Path, arch: str = "80", flags: Sequence[str] = ()) -> Path:
        host = ["-Xcompiler=-fPIC", "-Xcompiler=-ffp-contract=off"]
        # PTX only: no time goes into ptxas, whose work nobody here can run. The PTX on the way is what `ptx` would make.
        code = f"-gencode=arch=compute_{arch},code=compute_{arch}"
        ptx = self._named(Path(source), self._command(Path(source), _to_ptx(arch, flags)), ".ptx")
        made = self._compiled(Path(source), ["-c", code, *host, *flags], ".o", ptx)
        shutil.copyfile(made, out)
        return Path(out)

    def _compiled(self, source: Path, what: list[str], suffix: str, ptx: Path | None = None) -> Path:
        command = self._command(source, what)
        return self._kept(self._named(source, command, suffix), command, ptx=ptx)[0]

    def _command(self, source: Path, what: list[str]) -> list[str | Path]:
        return [self.path, *FLAGS, *what, f"-I{ROOT / 'csrc' / 'cuda'}", source.resolve()]

    def _named(self, source: Path, command: list[str | Path], suffix: str) -> Path:
        depends = [source.read_bytes(), *(part for name, content in _headers(source) for part in (name.encode(), content))]
        return self._place(source.stem, command, b"\0".join(depends), suffix)

    def _place(self, stem: str, command: list[str | Path], depends: bytes, suffix: str) -> Path:
        key = hashlib.sha256("\0".join([self.release, *map(str, command)]).encode() + b"\0" + depends).hexdigest()
        return CACHE / f"{stem}-{key[:20]}{suffix}"

    def _kept(
        self, made: Path, command: list[str | Path], given: tuple[str, bytes] | None = None, ptx: Path | None = None
    ) -> tuple[Path, Path]:
        """What `command -o` makes and what it says, from the cache if they are there. `given`: its input, if that is no file
        yet; `ptx`: where the PTX of an object's device code is kept besides.
        """
        said = made.with_name(made.name + ".log")
        with alone(made):
            if not (made.exists() and said.exists()):
                self._make(made, said, command, given, ptx)
        return made, said

    def _make(
        self, made: Path, said: Path, command: list[str | Path], given: tuple[str, bytes] | None, ptx: Path | None
    ) -> None:
        # Under names of its own until it is whole: a run that is broken off leaves nothing half made.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            new, log = Path(scratch) / made.name, Path(scratch) / said.name
            if given:
                (Path(scratch) / given[0]).write_bytes(given[1])
                command = [*command, Path(scratch) / given[0]]
            if ptx:
                command = [*command, "--keep", f"--keep-dir={scratch}"]
            run = subprocess.run([*command, "-o", new], capture_output=True, text=True)
            if run.returncode != 0:
                raise RuntimeError(f"{' '.join(map(str, command))}\nfailed ({run.returncode}):\n{run.stdout}{run.stderr}")
            log.write_text(run.stdout + run.stderr)
            if ptx:
                shutil.copyfile(log, Path(scratch) / "ptx.log")
                os.replace(Path(scratch) / "ptx.log", ptx.with_name(ptx.name + ".log"))
                (kept,) = Path(scratch).glob("*.ptx")
                os.replace(kept, ptx)
            os.replace(log, said)
            os.replace(new, made)


@functools.cache
def find() -> Toolkit | None:
    kit = found.find()
    return None if kit is None else Toolkit(kit.path, kit.home, kit.release)


def _to_ptx(arch: str, flags: Sequence[str]) -> list[str]:
    return ["-ptx", f"-arch=compute_{arch}", *flags]


def _headers(source: Path) -> list[tuple[str, bytes]]:
    folders = {ROOT / "csrc" / "cuda", source.resolve().parent}
    paths = {p for folder in folders for p in folder.rglob("*") if p.suffix in (".h", ".cuh")}
    paths |= set((ROOT / "csrc").glob("*.h"))
    return [(str(p), p.read_bytes()) for p in sorted(paths)]
