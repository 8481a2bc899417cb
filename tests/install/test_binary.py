"""The library as a file: no path of the machine that built it, symbols bound when it is loaded, no table of names."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import require

ROOT = Path(__file__).parents[2]
DYNAMIC, SYMBOLS = 6, 2  # kinds of sections
FLAGS, FLAGS_1, BIND_NOW, NOW = 30, 0x6FFFFFFB, 8, 1


def sections(elf: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of each section of a 64-bit ELF file."""
    assert elf[:5] == b"\x7fELF\x02"
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, _ = struct.unpack_from("<HHH", elf, 0x3A)
    for i in range(count):
        _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", elf, table + i * size)
        yield kind, elf[offset : offset + length] if kind in (DYNAMIC, SYMBOLS) else b""


def faults(path: Path, places: list[str]) -> list[str]:
    elf = path.read_bytes()
    found = [f"holds the path {place}" for place in places if place.encode() in elf]
    found += [f"holds the path {m[0].decode()}" for m in re.finditer(rb"(?<![\w.])/[\w./-]+\.(?:cpp|cu|h|cuh)\b", elf)]
    bound = False
    for kind, content in sections(elf):
        if kind == SYMBOLS:
            found.append("is not stripped")
        if kind == DYNAMIC:
            entries = dict(struct.iter_unpack("<qq", content))
            bound = bool(entries.get(FLAGS, 0) & BIND_NOW or entries.get(FLAGS_1, 0) & NOW)
    return found if bound else [*found, "binds symbols as they are called"]


def test_the_library_holds_no_path_and_binds_at_once() -> None:
    require("cpu")
    libraries = [p for stem in ("_C", "_cuda", "_host") for p in (ROOT / "rerank_kernels").glob(f"{stem}.*so")]
    assert libraries, "no library in the checkout"
    assert {p.name: found for p in libraries if (found := faults(p, [str(ROOT), os.path.realpath(ROOT)]))} == {}


def test_a_library_built_without_care_is_found(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++, no clang++")
    (tmp_path / "a.cpp").write_text('extern "C" const char* where() { return __FILE__; }\nint left;\n')
    made = tmp_path / "a.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-z,lazy", str(tmp_path / "a.cpp"), "-o", str(made)], check=True)
    said = faults(made, [str(tmp_path)])
    assert {"is not stripped", "binds symbols as they are called", f"holds the path {tmp_path}"} <= set(said)
    assert f"holds the path {tmp_path / 'a.cpp'}" in said
