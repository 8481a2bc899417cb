"""The house rules that a machine can hold: what lies where, which words no kernel may hold, and that the pages stay true."""

from __future__ import annotations

import ast
import functools
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import rerank_kernels as rk
from conftest import require
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import PROMISES
from rerank_kernels.backend.registry import BACKENDS, OPS
from tools import pages, promises

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(set(OPS.values()))
TESTS = sorted(str(p.relative_to(ROOT / "tests")) for p in (ROOT / "tests").rglob("test_*.py"))
BESIDE = {"house", "install", "stacks", "tools", "ptxsim/tests"}  # folders of tests of what the package does not hold
PAGES = (
    "README.md",
    "NUMERICS.md",
    "CONTRIBUTING.md",
    "docs/GPU.md",
    "docs/INVARIANT.md",
    "docs/SPEED.md",
    "docs/SYSTEMS.md",
    "docs/USE.md",
    "docs/INSTALL.md",
    "docs/COMMAND_LINE.md",
    "SECURITY.md",
)


@functools.cache
def files() -> tuple[Path, ...]:
    """What is or could be committed; without git, whatever is no build product."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return tuple(p for name in listed.stdout.split("\0") if name and (p := ROOT / name).is_file())
    left_out = {".git", ".venv", ".stacks", "build", "dist", "out"}
    left_out |= {"__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
    found = []
    for folder, below, names in os.walk(ROOT):
        below[:] = [d for d in below if d not in left_out and not d.endswith(".egg-info")]
        found += [Path(folder) / n for n in names if not n.endswith((".so", ".pyc"))]
    return tuple(found)


def text(name: str) -> str:
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text()


# ---- what lies where -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_family_has_its_file_in_every_room(family: str) -> None:
    rooms = [f"rerank_kernels/ops/{family}.py", f"csrc/cpu/{family}.cpp", f"tests/ops/test_{family}.py"]
    rooms += [f"csrc/cuda/portable/{family}.cu", f"csrc/cuda/torch/{family}.cpp"]
    rooms += [f"{b.package.replace('.', '/')}/{family}.py" for b in BACKENDS.values() if b.name not in ("cpu", "cuda")]
    assert [r for r in rooms if not (ROOT / r).is_file()] == []


@pytest.mark.parametrize("served_by", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_op_is_where_the_registry_says(op: str, served_by: str) -> None:
    if served_by == "triton":
        pytest.importorskip("triton")
    if served_by in ("cpu", "cuda"):
        require(served_by)  # the library's own op may serve it, with nothing in between
    assert callable(registry._load(served_by, op))
    ours = importlib.import_module(f"rerank_kernels.ops.{OPS[op]}")
    assert getattr(rk, op) is getattr(ours, op), f"{op} is not the public function of ops/{OPS[op]}.py"
    assert callable(getattr(ours, f"{op}_truth")), f"ops/{OPS[op]}.py has no float64 truth of {op}"


def without_a_room(tests: Iterable[str], rooms: set[str]) -> list[str]:
    """Those outside of every room, and those whose name stands twice: the name is all that pytest knows of a file."""
    tests = list(tests)
    names = Counter(Path(p).name for p in tests)
    return [p for p in tests if p.rpartition("/")[0] not in rooms or names[Path(p).name] > 1]


def test_every_test_has_a_room() -> None:
    """The package's rooms, and folders for what the repository has besides."""
    rooms = {p.parent.name for p in (ROOT / "rerank_kernels").glob("*/__init__.py")} | BESIDE
    assert without_a_room(TESTS, rooms) == []
    lost = ["test_a.py", "ops/test_b.py", "models/test_b.py"]
    assert without_a_room([*lost, "ops/test_c.py"], {"ops", "models"}) == lost, "the control"


def strangers(folder: Path) -> list[tuple[str, str]]:
    """(file, module) of what the files of a folder import besides NumPy, pytest, the standard library and one another."""
    there = {p.relative_to(folder): ast.parse(p.read_text()) for p in folder.rglob("*.py")}
    known = {"numpy", "pytest", "ptxsim", *sys.stdlib_module_names}
    named = {(str(path), name) for path, tree in there.items() for node in ast.walk(tree) for name in _absolute(node)}
    return sorted((path, name) for path, name in named if name.split(".")[0] not in known)


def test_the_simulator_stands_alone(tmp_path: Path) -> None:
    """What it says of a kernel cannot depend on the code that it judges."""
    assert strangers(ROOT / "tests" / "ptxsim") == []
    (tmp_path / "a.py").write_text("import numpy\ndef f():\n    from rerank_kernels.ops import norm\n    import torch as t")
    assert strangers(tmp_path) == [("a.py", "rerank_kernels.ops"), ("a.py", "torch")], "the control"


def _absolute(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


# From the bottom up. A room imports its own files, and rooms further down; what stands in line with it, it does not.
ROOMS = (
    ("version", "names", "errors", "check", "ranking", "printable"),
    ("tables",),
    ("backend",),
    ("ops",),
    ("graphs",),
    ("models", "scoped"),
    ("patching",),
    ("scoring",),
    ("verify", "bench", "order"),
    ("page",),
    ("cli",),
)
HEIGHT = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}


def imports(folder: Path) -> dict[str, set[str]]:
    """File -> the files of the package that it imports, at its top, inside a function, or for a type checker alone."""
    there = {
        ".".join(p.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in folder.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, path in there.items():
        asked = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                asked |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                asked |= {inner if (inner := f"{node.module}.{a.name}") in there else node.module for a in node.names}
        found[name] = {a for a in asked if a in there and a != name}
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    room = {name: name.split(".")[1] for name in graph if "." in name}
    free = ("rerank_kernels", "rerank_kernels.__main__")  # the door: what a user imports is in every room
    return [
        f"{name} imports {other}"
        for name, others in graph.items()
        if name not in free
        for other in others
        if other in free or (room[name] != room[other] and HEIGHT[room[other]] >= HEIGHT[room[name]])
    ]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of files that reach one another."""
    reach = {name: set(others) for name, others in graph.items()}
    for middle in graph:
        for name in graph:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    return sorted({tuple(sorted(o for o in reach[name] if name in reach[o])) for name in graph if name in reach[name]})  # type: ignore[arg-type]


def test_imports_run_downward() -> None:
    graph = imports(ROOT / "rerank_kernels")
    assert {name.split(".")[1] for name in graph if "." in name} == {*HEIGHT, "__main__"}
    assert upward(graph) == [] and circles({n: o for n, o in graph.items() if n != "rerank_kernels"}) == []


def test_an_import_that_runs_upward_is_found(tmp_path: Path) -> None:
    files = {"__init__": "", "ops/__init__": "", "ops/a": "", "models/__init__": "", "models/b": "", "models/c": ""}
    files["ops/a"] = "def f():\n    from rerank_kernels.models import b"
    files["models/b"] = "import rerank_kernels.models.c"
    files["models/c"] = "from rerank_kernels.models import b\nfrom rerank_kernels.ops.a import f"
    for name, source in files.items():
        (path := tmp_path / "rerank_kernels" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    graph = imports(tmp_path / "rerank_kernels")
    assert upward(graph) == ["rerank_kernels.ops.a imports rerank_kernels.models.b"]
    assert circles(graph) == [tuple(f"rerank_kernels.{n}" for n in ("models.b", "models.c", "ops.a"))]


def test_every_package_is_installed() -> None:
    there = {str(p.parent.relative_to(ROOT)).replace(os.sep, ".") for p in (ROOT / "rerank_kernels").rglob("__init__.py")}
    listed = re.search(r"^packages = (\[[^]]*\])$", text("pyproject.toml"), re.MULTILINE)
    assert listed is not None
    assert set(ast.literal_eval(listed[1])) == there, "[tool.setuptools] packages in pyproject.toml"


def test_public_names_are_all_there() -> None:
    assert not set(rk.__all__) & set(HEIGHT), "a public name that a room would hide once it is imported"
    assert sorted(rk.__all__) == sorted(set(rk.__all__))
    assert [n for n in rk.__all__ if not hasattr(rk, n)] == []


def test_commands_are_what_the_pages_say() -> None:
    makefile, ci = text("Makefile"), text(".ci/run")
    for target in ("demo", "test", "sanitize", "bench", "stacks", "lint", "verify"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"Makefile has no target {target}"
    for target in ("demo", "test", "bench", "stacks"):
        assert f"make {target}" in text("README.md"), f"README.md does not say make {target}"
    for target in ("lint", "test", "sanitize", "readme", "stacks"):
        assert re.search(rf"\bmake {target}$", ci, re.MULTILINE), f".ci/run does not call make {target}"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# ---- the pages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_numerics_has_the_op(op: str) -> None:
    assert re.search(rf"\b{op}\b", text("NUMERICS.md")), f"NUMERICS.md does not speak of {op}"


def test_numerics_has_every_promise_and_backend() -> None:
    page = text("NUMERICS.md")
    promises = {promise for b in BACKENDS.values() for promised in b.promises.values() for promise in promised}
    assert [word for word in (*promises, *BACKENDS) if word not in page] == []


def test_every_promise_names_its_test_and_its_ring() -> None:
    """The table op x mode x backend x promise is what tools/promises.py makes of the registry, and its tests exist."""
    assert pages.stale(promises.PAGE, "promises", promises.written()) == [], "run: python tools/promises.py --write"
    promised = {(b.name, mode, p) for b in BACKENDS.values() for mode, names in b.promises.items() for p in names}
    held = {
        (backend, mode, promise)
        for op, mode, backend in promises.rows()
        for promise in PROMISES
        if promises.tests_of(op, mode, backend, promise)
    }
    assert held == promised
    cells = [
        cell for op, mode, backend in promises.rows() for p in PROMISES for cell in promises.tests_of(op, mode, backend, p)
    ]
    assert [test for _, test in cells if _lost(test)] == []


def _lost(test: str) -> bool:
    """Whether room/test_file.py::name, or ::Class::name, is not there; without its room it is looked for in all of them."""
    file, *path = test.split("::")
    if (ROOT / "stacks" / file).is_file():  # imports what only its own environment has
        return not all(re.search(rf"^\s*(?:def|class) {name}\b", text(f"stacks/{file}"), re.MULTILINE) for name in path)
    found = next((p for p in TESTS if f"/{p}".endswith(f"/{file}")), None)
    if found is None:
        return True
    sys.path.append(str((ROOT / "tests" / found).parent))  # as pytest has it, once it has collected the file
    try:
        thing: object = importlib.import_module(Path(found).stem)
    finally:
        sys.path.pop()
    for name in path:
        thing = getattr(thing, name, None)
    return thing is None


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page: str) -> None:
    """`test_file.py::test_name`, `test_file.py::TestClass::test_name` and plain `test_file.py`."""
    named = set(re.findall(r"\b((?:(?<=tests/)(?:\w+/)+)?test_\w+)\.py((?:::\w+)*)", text(page)))
    assert named or page != "NUMERICS.md", "NUMERICS.md names no test"
    assert [f"{module}.py{path}" for module, path in sorted(named) if _lost(f"{module}.py{path}")] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    words = re.findall(r"`((?:\.ci|bench|csrc|python|rerank_kernels|stacks|tests|tools)/[\w./]+)`", text(page))
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page)) if "://" not in link]
    lost = [name for name in words if not (ROOT / name).exists()]
    lost += [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert [n for n in lost if not n.startswith("bench/out/")] == []


# ---- words -----------------------------------------------------------------------------------------------------------------

# An approximate instruction, a sum whose order is not ours, a choice by trial: each breaks a promise without a failing test.
FORBIDDEN = {
    r"rsqrt": "1 / sqrt has two correctly rounded steps",
    r"rcp14|rcpps|_mm\w*_rcp": "division is IEEE",
    r"atomicAdd|atomic_add|\bred\.": "atomics add in no order",
    r"-ffast-math|-Ofast|--use_fast_math|-funsafe-math|-march=native": "flags are part of the contract",
    r"_mm\w*_reduce_(add|mul)|\btl\.sum\b|reduction\s*\(": "the order of a sum is written out",
    r"\btl\.reduce\b(?!\(\w+, \d, larger\))": "the order of a sum is written out",
    r"autotune": "no choice by trial may pick arithmetic",
    r"allow_tf32\s*=\s*True|set_float32_matmul_precision": "float32 means float32",
    r"set_flush_denormal|_MM_SET_FLUSH_ZERO_MODE|_MM_SET_DENORMALS": "subnormals are kept",
    r"\bstd::(exp|tanh|erf|erfc|log|pow)f?\b": "the C library's functions differ from machine to machine; numerics.h has ours",
}
KERNELS = ("csrc", "rerank_kernels/backend")


def code_only(path: Path) -> str:
    """The file without comments, and without docstrings, on the same lines."""
    source = path.read_text()
    if path.suffix != ".py":
        blank = lambda m: "\n" * m[0].count("\n") if m[0].startswith("/") else m[0]  # noqa: E731
        return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, source, flags=re.DOTALL)
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for i in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[i] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)


def violations(path: Path) -> Iterator[str]:
    for number, line in enumerate(code_only(path).splitlines(), 1):
        for word, why in FORBIDDEN.items():
            if re.search(word, line):
                yield f"{path.name}:{number}: {line.strip()}: {why}"


def kernel_files() -> list[Path]:
    suffixes = (".cpp", ".h", ".cu", ".cuh", ".py")
    inside = [p for p in files() if p.suffix in suffixes and str(p.relative_to(ROOT)).startswith(KERNELS)]
    return [*inside, ROOT / "setup.py"]


def test_no_forbidden_word_in_a_kernel() -> None:
    assert len(kernel_files()) > 3 * len(FAMILIES)
    assert [v for p in kernel_files() for v in violations(p)] == []


@pytest.mark.parametrize(
    ("name", "source", "caught"),
    [
        ("a.cpp", "float y = _mm512_rsqrt14_ps(x);", True),
        ("a.cpp", "// never rsqrt\nfloat y = 1 / sqrt(x);  /* nor\n rsqrt */", False),
        ("a.cu", 'const char* s = "//"; atomicAdd(p, x);', True),
        ("a.py", "flags = ['-O3', '-ffast-math']", True),
        ("a.py", '"""no -ffast-math"""\nflags = ["-fno-fast-math"]  # no -ffast-math', False),
        ("a.py", "@triton.autotune(configs)\ndef kernel(): ...", True),
        ("a.py", "s = tl.sum(x)", True),
    ],
)
def test_the_search_for_forbidden_words_finds_them(tmp_path: Path, name: str, source: str, caught: bool) -> None:
    path = tmp_path / name
    path.write_text(source)
    assert bool(list(violations(path))) == caught


def not_public(source: str) -> Iterator[str]:
    """What a program takes from rerank_kernels that is not in its __all__."""
    tree = ast.parse(source)
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name == "rerank_kernels":
                    aliases.add(a.asname or a.name)
                elif a.name.startswith("rerank_kernels."):
                    yield a.name
        elif isinstance(node, ast.ImportFrom) and node.module == "rerank_kernels":
            yield from (a.name for a in node.names if a.name not in rk.__all__)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rerank_kernels."):
            yield node.module or ""
    for node in ast.walk(tree):
        used = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
        if used and node.attr not in (*rk.__all__, "__version__"):
            yield f"{node.value.id}.{node.attr}"


def test_programs_use_public_names_only() -> None:
    programs = sorted((ROOT / "python").glob("*.py"))
    assert {p.name for p in programs} >= {"rerank.py", "prove.py"}
    assert [f"{p.name}: {n}" for p in programs for n in not_public(p.read_text())] == []


def test_private_names_are_found() -> None:
    source = (
        "import rerank_kernels as rk\nimport rerank_kernels.cli\nfrom rerank_kernels import page, linear\nrk.linear(rk.page)"
    )
    assert sorted(not_public(source)) == ["page", "rerank_kernels.cli", "rk.page"]


def test_no_path_of_one_machine_in_any_file() -> None:
    machine = re.compile(r"(?<![\w./~-])/(?:home|root|Users|work|opt|mnt|srv)/[\w.]")
    found = []
    for path in files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if machine.search(line)
        ]
    assert found == []


def test_no_registry_is_named() -> None:
    """Where packages come from is the user's setting, pip's or TORCH's."""
    build = {name: text(name) for name in ("Makefile", ".ci/run", "setup.py", "pyproject.toml")}
    assert [name for name, content in build.items() if re.search(r"https?://|--(extra-)?index-url\s+\w", content)] == []


def test_digits_of_the_command_are_those_of_the_readme() -> None:
    """README's are made by a run, and held by `make readme`; docs/COMMAND_LINE.md ranks the same documents."""
    made = {float(number) for number in re.findall(r"\b0\.\d{16,18}\b", text("README.md"))}
    shown = {float(number) for number in re.findall(r"\b0\.\d{16,18}\b", text("docs/COMMAND_LINE.md"))}
    assert len(made) == 3 and shown <= made | {float(np.float32(1) - np.float32(number)) for number in made}
