"""setup.py and tools/toolkit.py: what is built, with which flags, and what is said where something cannot be.

setup.py runs here on a copy of the sources, with setuptools.setup replaced: nothing is compiled but the CUDA library's torch
side, once, against the torch that is installed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

import toolkit

ROOT = Path(__file__).parents[2]
NEWEST = types.SimpleNamespace(version=(13, 0), home=Path("/cuda"), known=("75", "80", "86", "89", "90", "100", "120"))
OLD = types.SimpleNamespace(version=(12, 4), home=Path("/cuda"), known=("75", "80", "86", "89", "90"))


# ---- architectures


def codes(flags: list[str]) -> list[str]:
    return [f.rpartition("code=")[2] for f in flags]


def test_our_architectures_and_ptx_of_the_last() -> None:
    flags, _ = toolkit.found.gencode(None, NEWEST)
    assert codes(flags) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert flags[0] == "-gencode=arch=compute_80,code=sm_80"


def test_what_an_old_toolkit_does_not_know_is_left_out_and_said() -> None:
    flags, said = toolkit.found.gencode("", OLD)
    assert codes(flags) == ["sm_80", "sm_86", "sm_89", "sm_90", "compute_90"]
    assert "not sm_100, sm_120, which CUDA 12.4 does not know" in said


def test_gpus_that_are_here_are_enough_and_a_list_comes_first() -> None:
    assert codes(toolkit.found.gencode(None, NEWEST, ["86", "90"])[0]) == ["sm_86", "sm_90", "compute_90"]
    assert codes(toolkit.found.gencode("8.0", NEWEST, ["90"])[0]) == ["sm_80"]
    ours = toolkit.found.gencode(None, OLD)
    assert toolkit.found.gencode(None, OLD, ["120"]) == ours, "the PTX of the last is for what the toolkit does not know"
    assert toolkit.found.gencode(None, OLD, ["75"]) == ours, "no GPU that the kernels could use"


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [
        ("8.0", ["sm_80"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("8.0 8.6,12.0", ["sm_80", "sm_86", "sm_120"]),
        ("9.0a", ["sm_90a"]),
        ("10.0f+PTX; 8.0;8.0", ["sm_100f", "compute_100f", "sm_80"]),
    ],
)
def test_torch_cuda_arch_list(listed: str, wanted: list[str]) -> None:
    assert codes(toolkit.found.gencode(listed, NEWEST)[0]) == wanted


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ("7.5;8.0", "compute capability 8.0 or newer, not 7.5"),
        ("7.0+PTX", "compute capability 8.0 or newer, not 7.0"),
        ("Hopper", "'Hopper' is not understood; write for instance '8.0;9.0+PTX'"),
        ("80", "'80' is not understood"),
        ("12.0", "CUDA 12.4 at /cuda does not know 12.0"),
    ],
)
def test_a_wrong_torch_cuda_arch_list_is_refused(listed: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        toolkit.found.gencode(listed, OLD)
    assert said in str(error.value)


# ---- finding the toolkit


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def kit() -> toolkit.Toolkit:
    found = toolkit.find()
    if found is None:
        pytest.skip("no nvcc")
    return found


def test_the_toolkit_behind_a_wrapper_is_found(kit: toolkit.Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin" / "nvcc", f'exec "{kit.path}" "$@"')
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    found = toolkit.found.find()
    assert (found.home, found.release) == (kit.home, kit.release)
    assert (found.home / "include" / "cuda_runtime.h").exists() and list(found.libraries.glob("libcudart*"))


def test_cuda_home_comes_first_and_alone(kit: toolkit.Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.found.find() is None
    script(tmp_path / "bin" / "nvcc", "exit 1")
    assert toolkit.found.find() is None
    monkeypatch.setenv("CUDA_HOME", str(kit.home))
    assert toolkit.found.find().home == kit.home


def test_the_toolkit_of_the_wanted_version_comes_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kits = {Path(f"/{n}"): types.SimpleNamespace(version=(n, 1)) for n in (12, 13)}
    monkeypatch.setitem(toolkit.found.find.__globals__, "_candidates", lambda: list(kits))
    monkeypatch.setitem(toolkit.found.find.__globals__, "_ask", kits.get)
    assert [toolkit.found.find(major).version[0] for major in (None, 12, 13, 14)] == [12, 12, 13, 12]


# ---- setup.py


class Outcome:
    def __init__(self, folder: Path, extensions: dict[str, Any], refused: str) -> None:
        self.extensions, self.refused = extensions, refused
        said = folder / "rerank_kernels" / "_no_cuda.txt"
        self.reason = said.read_text() if said.exists() else ""
        said = folder / "rerank_kernels" / "_not_built.txt"
        self.no_library = said.read_text() if said.exists() else ""


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Runs setup.py up to setup(), as if torch were built for CUDA `cuda`."""

    def run(cuda: str | None, **environment: str) -> Outcome:
        shutil.copy(ROOT / "setup.py", tmp_path)
        (tmp_path / "tools").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tools" / "toolkit.py", tmp_path / "tools")
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "rerank_kernels").mkdir(exist_ok=True)
        for name in ("RERANK_KERNELS_BUILD_CPU", "RERANK_KERNELS_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CXX"):
            monkeypatch.setenv(name, "")  # what setup.py settles is undone after the test
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        given: dict[str, Any] = {}
        monkeypatch.setenv("TORCH_NO_COMPILER_WRAPPER", "")
        monkeypatch.setattr("setuptools.setup", lambda **options: given.update(options))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
        monkeypatch.chdir(tmp_path)
        refused = ""
        try:
            runpy.run_path(str(tmp_path / "setup.py"))
        except SystemExit as error:
            refused = str(error)
        return Outcome(tmp_path, {e.name: e for e in given.get("ext_modules", [])}, refused)

    return run


def test_a_torch_without_cuda_leaves_the_cuda_library_out(configure) -> None:  # type: ignore[no-untyped-def]
    outcome = configure(None)
    assert "rerank_kernels._C" in outcome.extensions and "rerank_kernels._cuda" not in outcome.extensions
    assert "is a build without CUDA" in outcome.reason and not outcome.refused


@pytest.mark.parametrize(
    ("cuda", "environment", "said"),
    [
        (None, {}, "is a build without CUDA"),
        ("13.0", {"CUDA_HOME": "/nowhere"}, "no CUDA toolkit: CUDA_HOME=/nowhere holds no bin/nvcc that runs"),
        ("13.0", {"CUDA_HOME": "/nowhere"}, "pip install 'nvidia-cuda-nvcc==13.0.*'"),
        (None, {"RERANK_KERNELS_BUILD_CPU": "0"}, "it needs the C++ library: RERANK_KERNELS_BUILD_CPU=0"),
    ],
)
def test_what_cannot_be_built_is_said_and_if_required_refused(configure, cuda, environment, said) -> None:  # type: ignore[no-untyped-def]
    outcome = configure(cuda, **environment)
    assert said in outcome.reason and not outcome.refused
    outcome = configure(cuda, **environment, RERANK_KERNELS_BUILD_CUDA="1")
    assert said in outcome.refused and "RERANK_KERNELS_BUILD_CUDA=1" in outcome.refused


def test_a_toolkit_of_another_major_version_is_refused_with_both_versions(configure, kit: toolkit.Toolkit) -> None:  # type: ignore[no-untyped-def]
    ours, other = ".".join(map(str, kit.version)), f"{kit.version[0] - 1}.4"
    outcome = configure(other, CUDA_HOME=str(kit.home))
    assert f"toolkit at {kit.home} is {ours}, and torch {torch.__version__} is built for {other}" in outcome.reason
    assert f"install a toolkit {kit.version[0] - 1}.x" in outcome.reason
    assert "rerank_kernels._cuda" not in outcome.extensions


def test_zero_is_zero_and_nonsense_is_refused(configure) -> None:  # type: ignore[no-untyped-def]
    assert configure("13.0", RERANK_KERNELS_BUILD_CUDA="0").reason == "RERANK_KERNELS_BUILD_CUDA=0\n"
    assert "must be auto, 0 or 1, got 'yes'" in configure(None, RERANK_KERNELS_BUILD_CUDA="yes").refused


def test_before_cuda_is_built_it_is_said_how_long(configure, kit: toolkit.Toolkit, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    monkeypatched = {"CUDA_HOME": str(kit.home), "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    configure(".".join(map(str, kit.version)), **monkeypatched)
    said = capfd.readouterr().err
    assert re.search(
        r"building CUDA for 2 architectures, about \d+ minutes of this .* cores; RERANK_KERNELS_BUILD_CUDA=0 leaves it out",
        said,
    ), said


COMPILER = shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("named", ["{env} {c}", "{c} -DWANTED=1", "'{odd}'", "{odd}", "{env} '{odd}' -DWANTED=1"])
def test_cxx_may_be_more_than_a_word(configure, tmp_path: Path, named: str) -> None:  # type: ignore[no-untyped-def]
    """PyTorch 2.10 pastes it into a shell command, PyTorch 2.13 quotes it as one word and puts ccache in front."""
    odd = script(tmp_path / "a folder" / "c++", f'exec {COMPILER} "$@"')
    outcome = configure(None, CXX=named.format(env=shutil.which("env"), c=COMPILER, odd=odd))
    assert not outcome.no_library and "rerank_kernels._C" in outcome.extensions
    settled = os.environ["CXX"]
    assert " " not in settled and shutil.which(settled) == settled and os.environ["TORCH_NO_COMPILER_WRAPPER"] == "1"
    given = [settled, "-dM", "-E", "-x", "c++", "/dev/null"]
    defined = subprocess.run(given, capture_output=True, text=True, check=True).stdout
    assert ("WANTED 1" in defined) == ("WANTED" in named) and "__cplusplus" in defined


def test_a_compiler_that_is_missing_or_too_old_is_named(configure, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "CXX=g++-99 is not there (install g++ 11 or newer" in configure(None, CXX="g++-99").no_library
    old = script(tmp_path / "old", 'echo "cc1plus: error: unrecognized command-line option -std=c++20" >&2; exit 1')
    found = configure(None, CXX=str(old))
    assert f"the compiler {old} (it does not say which version) does not compile our C++20: cc1plus: error:" in found.no_library
    assert found.extensions == {} and "g++ 11 or newer" in found.no_library


def test_a_flag_of_the_contract_that_a_compiler_ignores_is_no_build(configure, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """clang only warns of some flags that it does not take."""
    deaf = script(tmp_path / "deaf", 'case "$*" in *-Werror*) echo "error: -ffp-contract=off is ignored" >&2; exit 1;; esac')
    assert "-ffp-contract=off is ignored" in configure(None, CXX=str(deaf)).no_library


def test_a_torch_that_does_not_import_is_quoted(configure, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    assert "torch does not import: ModuleNotFoundError: import of torch.utils.cpp_ext" in configure(None).no_library
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "torch is not visible to the build: pip builds in an environment of its own" in configure(None).no_library
    monkeypatch.undo()


def test_an_old_torch_is_refused_by_its_version(configure, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert configure(None).no_library == "torch 2.9.1+cpu is older than 2.10\n"


def test_an_old_setuptools_is_told_the_version_and_the_command(configure, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("setuptools.__version__", "76.1.0")
    said = configure(None).refused
    assert "setuptools 76.1.0 is too old, 77 is needed; run: " in said and said.endswith("-m pip install 'setuptools>=77'")


# ---- a build, and what it leaves; of a library without kernels, which takes seconds


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The sources with one file in place of the CPU's kernels."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    sources = tmp_path / "sources"
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "cuda", "_*.txt")
    for folder in ("csrc", "rerank_kernels"):
        shutil.copytree(ROOT / folder, sources / folder, ignore=left_out)
    (sources / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "toolkit.py", sources / "tools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for kernel in (sources / "csrc" / "cpu").glob("*.cpp"):
        kernel.unlink()
    return sources


def build(sources: Path, *command: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RERANK_KERNELS")}
    done = subprocess.run(
        [sys.executable, *command], cwd=sources, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def wheel_of(sources: Path) -> zipfile.ZipFile:
    build(sources, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", ".")
    (made,) = (sources / "out").glob("*.whl")
    return zipfile.ZipFile(made)


def test_the_wheel_has_its_tag_and_nothing_of_an_earlier_build(small: Path) -> None:
    left = small / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "rerank_kernels"
    left.mkdir(parents=True)
    for stale in ("_not_built.txt", "_cuda.abi3.so", "gone.py"):
        (left / stale).touch()
    wheel = wheel_of(small)
    assert re.fullmatch(r"rerank_kernels-[\d.]+-cp310-abi3-linux_\w+\.whl", Path(str(wheel.filename)).name)
    names = wheel.namelist()
    beside = {n for n in names if not n.endswith(".py") and ".dist-info/" not in n}
    assert beside == {
        f"rerank_kernels/{name}" for name in ("_C.abi3.so", "_no_cuda.txt", "page/page.css", "page/page.html", "py.typed")
    }
    there = {str(p.relative_to(small)) for p in (small / "rerank_kernels").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == there
    said = wheel.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    for line in (
        "Requires-Python: >=3.10",
        "License-Expression: Apache-2.0",
        "License-File: LICENSE",
        "Keywords: ",
        "Classifier: ",
    ):
        assert line in said, line


def test_a_library_that_does_not_compile_is_quoted_and_the_wheel_is_pure(small: Path) -> None:
    (small / "csrc" / "cpu" / "broken.cpp").write_text("#error broken on purpose\n")
    wheel = wheel_of(small)
    assert Path(str(wheel.filename)).name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in wheel.read(next(n for n in wheel.namelist() if n.endswith("/WHEEL"))).decode()
    why = wheel.read("rerank_kernels/_not_built.txt").decode()
    assert re.match(r"it did not compile: .*broken\.cpp:1:2: error: #error broken on purpose \(pip install -v", why), why
    assert not [n for n in wheel.namelist() if n.endswith(".so")]


def test_the_host_module_does_not_cost_the_library(small: Path) -> None:
    """Its compiler may lack Python.h, or pybind11."""
    pytest.importorskip("pybind11")
    (small / "csrc" / "host.cpp").write_text("#include <no/Python.h>\n")
    said = build(small, "setup.py", "build_ext", "--inplace")
    assert re.search(r"leaving out rerank_kernels._host, which only tests use: it did not compile: .*no/Python.h", said), said
    assert sorted(p.name for p in (small / "rerank_kernels").glob("*.so")) == ["_C.abi3.so"]
    assert not (small / "rerank_kernels" / "_not_built.txt").exists()


def test_the_cuda_library_is_built_with_the_contracts_flags(configure, kit: toolkit.Toolkit) -> None:  # type: ignore[no-untyped-def]
    version = ".".join(map(str, kit.version))
    outcome = configure(version, CUDA_HOME=str(kit.home), TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert not outcome.refused and not outcome.reason
    cuda = outcome.extensions["rerank_kernels._cuda"]
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").rglob("*.c*") if p.suffix in (".cpp", ".cu")}
    assert set(cuda.sources) == there
    nvcc, cxx = cuda.extra_compile_args["nvcc"], cuda.extra_compile_args["cxx"]
    assert (
        "--fmad=false" in nvcc
        and "-ffp-contract=off" in cxx
        and not any("fast" in f and "no-fast" not in f for f in [*nvcc, *cxx])
    )
    assert codes([f for f in nvcc if "gencode" in f]) == ["sm_80", "sm_90", "compute_90"]
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in cxx and cuda.py_limited_api
    assert str(kit.home) == torch.utils.cpp_extension.CUDA_HOME
    assert set(cuda.libraries) >= {"torch_cuda"} and any("cudart" in name for name in cuda.libraries)


def test_a_room_is_compiled_for_its_own_architectures(configure, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    configure(None)
    calls: list[tuple[list[str], list[str]]] = []

    def compile_all(sources: list[str], output_dir: str, extra_postargs: dict[str, list[str]]) -> list[str]:
        assert output_dir == "build" and extra_postargs["cxx"] == ["-O3"] and extra_postargs["nvcc"][0] == "-O1"
        calls.append((sources, codes(extra_postargs["nvcc"][1:])))
        return [s + ".o" for s in sources]

    sources = [f"csrc/cuda/{s}" for s in ("portable/norm.cu", "sm80/linear.cu", "sm90/linear.cu", "torch/norm.cpp")]
    compiled = runpy.run_path("setup.py")["room_by_room"](compile_all, toolkit.found.of_room)

    def run(listed: str) -> list[str]:
        gencode, _ = toolkit.found.gencode(listed, NEWEST)
        calls.clear()
        given: list[str] = compiled(sources, output_dir="build", extra_postargs={"cxx": ["-O3"], "nvcc": ["-O1", *gencode]})
        return given

    own = toolkit.found.ROOMS["sm90"]
    monkeypatch.setitem(toolkit.found.ROOMS, "sm90", None)
    assert run("8.0;9.0+PTX") == [s + ".o" for s in sources]
    assert calls == [(sources, ["sm_80", "sm_90", "compute_90"])]
    monkeypatch.setitem(toolkit.found.ROOMS, "sm90", own)
    every = [*sources[:2], sources[3]]
    assert run("8.0;9.0+PTX") == [s + ".o" for s in (*every, sources[2])]
    assert calls == [(every, ["sm_80", "sm_90", "compute_90"]), (sources[2:3], ["sm_90a"])]
    assert run("8.0") == [s + ".o" for s in every] and calls == [(every, ["sm_80"])], "a room without its architecture"


def test_every_folder_of_kernels_is_a_room() -> None:
    there = {p.parent.name for p in (ROOT / "csrc" / "cuda").rglob("*.cu")}
    assert there == set(toolkit.found.ROOMS)


def test_the_torch_side_compiles_against_this_torch() -> None:
    """As setup.py would compile it, without a CUDA build of torch: the stable ABI's headers are the same."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    include = [f"-I{p}" for p in torch.utils.cpp_extension.include_paths()]
    flags = [
        "-fsyntax-only",
        "-std=c++20",
        "-Wall",
        "-fvisibility=hidden",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]

    def compile_one(source: Path) -> str:
        done = subprocess.run([compiler, *flags, *include, str(source)], capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(2) as pool:
        assert [s for s in pool.map(compile_one, sorted((ROOT / "csrc" / "cuda" / "torch").glob("*.cpp"))) if s] == []


# ---- nvcc from pip, for machines without a toolkit


def test_the_extra_is_what_the_tests_ask_for() -> None:
    """pyproject.toml's extra and tools/toolkit.py's list, which `make test` installs from."""
    block = re.search(r"^nvcc = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    wanted = [*(f"{name}==13.0.*" for name in toolkit.found.WHEELS), toolkit.found.DISASSEMBLER]
    assert re.findall(r'"(.+?)"', block[1]) == wanted
