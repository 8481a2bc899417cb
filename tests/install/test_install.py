"""From `import rerank_kernels` to the first op: what loads when, which library serves, and what is said where none does.

A library that does not fit is a real one, built here: all ops of csrc/schema.cpp under its own macros, kernels that do nothing.
Each case is a process of its own, since a library stays in the process that loaded it.
"""

from __future__ import annotations

import ast
import os
import pathlib
import pickle
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import cpp_extension

import rerank_kernels as rk
from conftest import require

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "rerank_kernels"


def run(*command: str | pathlib.Path, path: pathlib.Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in an empty folder, that imports rerank_kernels from `path`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RERANK_KERNELS", "PYTHONWARNINGS"))}
    env |= {"PYTHONPATH": str(path or ROOT), **environment}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd="/", timeout=300)


def python(program: str, path: pathlib.Path | None = None, **environment: str) -> str:
    done = run(sys.executable, "-c", program, path=path, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- what an import loads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["rank", "--help"]], ids=" ".join)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    """In 0.2 s of a core: processor time, since others may be on the machine; the least of several runs."""
    program = f"""
import sys
from rerank_kernels.cli import main
try:
    main({arguments})
except SystemExit as done:
    assert not done.code
heavy = {{"torch", "transformers", "numpy", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    python(program)

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(sys.executable, "-m", "rerank_kernels", *arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    least = min(seconds() for _ in range(5))
    assert least < 0.2, f"{least:.3f} s"


def test_public_names_are_said_alike_to_python_and_to_type_checkers() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    said = {
        name: home
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        for home in [(node.module or "").removeprefix("rerank_kernels.")]
        for name in ([op for op in rk.OPS if f"ops.{rk.OPS[op]}" == home] if alias.name == "*" else [alias.name])
    }
    assert said == rk._HOME and all(callable(getattr(rk, op)) for op in rk.OPS)
    assert sorted(rk.__all__) == sorted([*said, "NUMERICS_VERSION"]) and set(rk.__all__) <= set(dir(rk))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rerank_kernels' has no attribute 'reranker_'"):
        rk.reranker_  # noqa: B018
    assert getattr(rk, "nothing", None) is None
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from rerank_kernels import nothing")


def test_star_pickles_and_threads() -> None:
    names: dict[str, object] = {}
    exec("from rerank_kernels import *", names)
    assert set(rk.__all__) <= set(names) and names["patch"] is rk.patch
    assert pickle.loads(pickle.dumps(rk.linear)) is rk.linear and pickle.loads(pickle.dumps(rk.Reranker)) is rk.Reranker
    program = """
import threading, rerank_kernels as rk
seen, start = [], threading.Barrier(8)
def first():
    start.wait()
    seen.append((rk.patch, rk.Reranker, rk.linear))
threads = [threading.Thread(target=first) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(seen), len(set(seen)))
"""
    assert python(program) == "8 1"


# ---- a library that does not fit ------------------------------------------------------------------------------------------

SCHEMA = (ROOT / "csrc" / "schema.cpp").read_text()
SIGNATURES = [  # of what computes nothing, and beside its CPU kernel of each op
    text
    for source in (SCHEMA, *(path.read_text() for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))))
    for text in re.findall(r'm\.(?:def|op)\("([^"]+)"', source)
]
LEFT_OUT = """
#include <cstdlib>
#include <cstring>

#include "library.h"

static bool is(const char* variable, const char* name) {
    const char* value = std::getenv(variable);
    return value != nullptr && std::strcmp(value, name) == 0;
}
static int64_t version() { return std::atoi(std::getenv("TINY_VERSION")); }
static void nothing(StableIValue*, uint64_t, uint64_t) {}
RK_TORCH_LIBRARY_IMPL(CPU, m) {
    for (const char* name : {NAMES})
        if (!is("TINY_WITHOUT", name) && !is("TINY_HOLLOW", name)) m.impl(name, &nothing);
}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A package with our Python files and a library that lacks what the environment says: TINY_WITHOUT, an op; TINY_HOLLOW, its
    kernel; TINY_VERSION is its numerics version."""
    require("cpu")
    folder = tmp_path_factory.mktemp("tiny")
    listed = "".join(f'    m.def("{text}");\n' for text in SIGNATURES)
    schema = SCHEMA[: SCHEMA.index("RK_TORCH_LIBRARY(m) {")] + f"RK_TORCH_LIBRARY(m) {{\n{listed}}}\n"
    schema = re.sub(r'm\.def\("(\w+)', r'if (!is("TINY_WITHOUT", "\1")) m.def("\1', schema)
    names = [s.partition("(")[0] for s in SIGNATURES]
    quoted = ", ".join(f'"{n}"' for n in names if n not in ("numerics_version", "loaded_from"))
    kernels = LEFT_OUT.replace("NAMES", quoted)
    version = 'm.impl("numerics_version", TORCH_BOX(&version));'
    (folder / "schema.cpp").write_text(schema.replace("namespace rk {", kernels.partition("RK_TORCH")[0] + "namespace rk {", 1))
    (folder / "kernels.cpp").write_text(
        kernels + f"namespace all {{ RK_TORCH_LIBRARY_IMPL(CompositeExplicitAutograd, m) {{ {version} }} }}\n"
    )
    lib = pathlib.Path(torch.__file__).parent / "lib"
    include = [f"-I{p}" for p in (ROOT / "csrc", *cpp_extension.include_paths())]
    flags = ["-O0", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    link = [f"-L{lib}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"]

    def build(name: str, *more: str) -> pathlib.Path:
        package = folder / name / "rerank_kernels"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"))
        sources = [folder / "schema.cpp", folder / "kernels.cpp"]
        command = ["c++", *flags, *more, *include, *sources, *link, "-o", package / "_C.abi3.so"]
        subprocess.run([str(c) for c in command], check=True)
        return folder / name

    return {"whole": build("whole"), "elsewhere": build("elsewhere", "-DRK_LIBRARY=RK_LIBRARY_")}


ASK = "import rerank_kernels.backend.library as n; print(n.missing())"
NOW = str(rk.NUMERICS_VERSION)


def test_a_library_that_fits_is_taken(tiny: dict[str, pathlib.Path]) -> None:
    assert python(ASK, tiny["whole"], TINY_VERSION=NOW) == "None"


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ({"TINY_WITHOUT": "bmm"}, "it has no bmm"),
        ({"TINY_HOLLOW": "transpose_weight"}, "it has no transpose_weight"),
        ({"TINY_WITHOUT": "bmm_tensor"}, "it has no bmm_tensor"),
        ({"TINY_WITHOUT": "numerics_version"}, f"it does not say its numerics version, and the package has {NOW}"),
        ({"TINY_VERSION": "0"}, f"it was compiled for numerics version 0, and the package has {NOW}"),
    ],
    ids=str,
)
def test_a_library_that_does_not_fit_is_refused_by_name(
    tiny: dict[str, pathlib.Path], lacks: dict[str, str], said: str
) -> None:
    found = python(ASK, tiny["whole"], **{"TINY_VERSION": NOW, **lacks})
    assert said in found and str(tiny["whole"]) in found and "pip install --no-build-isolation" in found


def test_ops_under_another_name_are_no_ops(tiny: dict[str, pathlib.Path]) -> None:
    """What PyTorch 2.10's own macro made of RK_LIBRARY."""
    found = python(ASK, tiny["elsewhere"], TINY_VERSION=NOW)
    assert all(name in found for name in ("it has no", "attention", "linear", "sparse_ffn", "softmax"))


def test_a_second_copy_is_an_error_that_names_both(tiny: dict[str, pathlib.Path]) -> None:
    """Its package imported in place of the first one's, or its library loaded by hand: the first goes on with the same bits."""
    program = f"""
import sys, torch, rerank_kernels as rk
x, w = torch.randn(5, 64), torch.randn(8, 64)
y = rk.linear(x, w)
first, = [p for p in torch.ops.loaded_libraries if "rerank_kernels" in p]
torch.ops.load_library({str(tiny["whole"] / "rerank_kernels" / "_C.abi3.so")!r})
assert torch.equal(rk.linear(x, w), y)
for name in [n for n in sys.modules if n.partition(".")[0] == "rerank_kernels"]:
    del sys.modules[name]
sys.path.insert(0, {str(tiny["whole"])!r})
import rerank_kernels as second
assert second is not rk
for call in (lambda: second.linear(x, w), lambda: second.use("cpu").__enter__()):
    try:
        call()
    except second.BackendError as error:
        assert first in str(error) and {str(tiny["whole"])!r} in str(error), error
    else:
        raise AssertionError("no error")
assert "two copies" in second.backends()["linear"]["cpu"]
assert torch.equal(rk.linear(x, w), y)
"""
    require("cpu")
    done = run(sys.executable, "-c", program, TINY_VERSION=NOW)
    assert done.returncode == 0, done.stderr
    assert f"{tiny['whole']}/rerank_kernels/_C.abi3.so is a second copy of the C++ library" in done.stderr


def test_every_op_that_is_called_is_in_the_schema() -> None:

    from rerank_kernels.backend import library

    names = {s.partition("(")[0] for s in SIGNATURES}
    called = set(library.called())
    assert called <= names
    assert names - called == {"force_isa", "numerics_version", "build_info", "loaded_from"}, "what no file of native/ calls"


# ---- no library -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with our Python files alone, as a build without a compiler leaves them."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, folder / "rerank_kernels", ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__"))
    (folder / "rerank_kernels" / "_not_built.txt").write_text("no C++ compiler on PATH (install g++ 11 or newer)\n")
    return folder


OPS = """
import threading, warnings, torch, rerank_kernels as rk
x, w = torch.randn(5, 64), torch.randn(8, 64)
def ops():
    rk.linear(x, w)
    rk.softmax(x)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    threads = [threading.Thread(target=ops) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    ops()
caught = [c for c in caught if c.category is rk.FallbackWarning]
"""


def test_the_fallback_says_so_once_with_the_reason_and_the_command(bare: pathlib.Path) -> None:
    program = OPS + "print(len(caught), caught[0].message, caught[0].filename)"
    said = python(program, bare)
    assert said.startswith("1 rerank_kernels: pytorch serves in place of cpu") and said.endswith(" <string>")
    assert "was not built: no C++ compiler on PATH (install g++ 11 or newer); run: " in said
    assert "-m pip install --no-build-isolation --no-deps " in said


def test_who_asked_for_pytorch_is_not_warned(bare: pathlib.Path) -> None:
    assert python(OPS + "print(len(caught))", bare, RERANK_KERNELS_BACKEND="pytorch") == "0"
    inside = OPS.replace("    rk.linear(x, w)\n    rk.softmax(x)", "    with rk.use('pytorch'): rk.linear(x, w)")
    assert python(inside + "print(len(caught))", bare) == "0"
    require("cpu")
    assert python(OPS + "print(len(caught))", ROOT) == "0", "the library serves"


def test_a_filter_that_makes_it_an_error_stops_every_op(bare: pathlib.Path) -> None:
    program = """
import warnings, torch, rerank_kernels as rk
warnings.simplefilter("error", rk.FallbackWarning)
for op in (rk.softmax, rk.softmax, rk.sigmoid):
    try:
        op(torch.zeros(2, 2))
    except rk.FallbackWarning as error:
        print(error)
"""
    assert python(program, bare).count("no C++ compiler") == 3


def test_a_checkout_that_hides_an_install_says_which(bare: pathlib.Path, tmp_path: pathlib.Path) -> None:
    checkout, site = tmp_path / "check out", tmp_path / "site"
    shutil.copytree(bare / "rerank_kernels", checkout / "rerank_kernels")
    (checkout / "rerank_kernels" / "_not_built.txt").unlink()
    (checkout / "setup.py").touch()
    ask = lambda: python("import rerank_kernels.backend.library as n; print(n.missing())", pathlib.Path(f"{checkout}:{site}"))  # noqa: E731
    assert f"never installed; run: {sys.executable} -m pip install --no-build-isolation --no-deps -e '{checkout}'" in ask()
    (site / "rerank_kernels").mkdir(parents=True)
    (site / "rerank_kernels" / "_C.abi3.so").touch()
    (site / "rerank_kernels-0.1.0.dist-info").mkdir()
    (site / "rerank_kernels-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: rerank-kernels\n")
    assert f"runs inside the checkout {checkout}, which hides the install in {site / 'rerank_kernels'}" in ask()


def test_the_command_names_the_folder_that_pip_installed_from(bare: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(bare, tmp_path / "site")
    sources, info = tmp_path / "the sources", tmp_path / "site" / "rerank_kernels-0.1.0.dist-info"
    sources.mkdir()
    info.mkdir()
    (sources / "setup.py").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rerank-kernels\n")
    (info / "direct_url.json").write_text('{"url": "' + sources.as_uri() + '", "dir_info": {}}')
    found = python("import rerank_kernels.backend.library as n; print(n.build_command())", tmp_path / "site")
    assert found.endswith(f"--no-build-isolation --no-deps '{sources}'")


def test_the_messages_of_the_page_are_the_messages_of_the_program() -> None:
    """docs/INSTALL.md, first column: what stands between the dots is in a source file; so is each variable."""
    page = (ROOT / "docs" / "INSTALL.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    names = (
        "setup.py",
        "tools/toolkit.py",
        "csrc/schema.cpp",
        "rerank_kernels/backend/registry.py",
        "rerank_kernels/backend/library.py",
        "rerank_kernels/backend/native/proven.py",
        "rerank_kernels/backend/native/hopper.py",
    )
    sources = "".join((ROOT / name).read_text() for name in names)
    plain = re.sub(r'"\s*\n\s*f?"', "", sources)
    elsewhere = {"No module named 'setuptools'", "Cannot import 'setuptools.build_meta'", "MAX_JOBS"}  # pip's and torch's own
    words = {part.strip(" :,") for row in rows for quoted in re.findall(r"`(.+?)`", row) for part in quoted.split("…")}
    words -= {"", *elsewhere}
    assert len(words) > 30
    assert sorted(w for w in words if w not in plain) == []
