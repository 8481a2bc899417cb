"""The table op x mode x backend x promise of NUMERICS.md: which test holds a cell, and on which ring it stands.

    python tools/promises.py --write      # in the venv; test_house.py fails while the page says something else

Rings: `hardware` (the kernel ran on the processor that it is for), `simulated` (the compiler's PTX ran on a CPU, started by
the real launchers). The cells of a GPU say both: CI runs the simulated test, and the other was run by hand, with `make gpu`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rerank_kernels.backend.modes import MODES, PROMISES
from rerank_kernels.backend.registry import BACKENDS, OPS

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from tools import pages  # noqa: E402

PAGE = ROOT / "NUMERICS.md"
# backend -> the file that holds "machine-invariant", where it is not the family's own
EQUAL = {"cuda": "backend/test_cuda.py", "triton": "backend/test_triton.py"}


def tests_of(op: str, mode: str, backend: str, promise: str) -> list[tuple[str, str]]:
    """(ring, test below tests/) of a cell; empty: not promised."""
    b = BACKENDS[backend]
    if promise not in b.promises.get(mode, ()):
        return []
    name = f"test_{promise.replace('-', '_')}"
    if mode == "tensor":
        simulated = ("simulated", f"backend/test_tensor.py::TestTensor::{name}")
        if promise != "thread-invariant":
            return [simulated, ("hardware", f"backend/test_gpu_tensor.py::TestTensorOnAGpu::{name}")]
        busy = [("hardware", "backend/test_gpu_tensor.py::test_200_repeats_beside_other_work")]
        return [simulated, *(busy if op in ("linear", "attention") else [])]
    family = OPS[op]
    of_the_family = f"ops/test_{family}.py::Test{family.title().replace('_', '')}::{name}"
    if backend not in EQUAL:
        return [("hardware", of_the_family)]
    equal = "test_same_bits_as_the_cpu"  # on a GPU the other promises follow from it, for the cpu's are held on hardware
    simulated = f"{EQUAL[backend]}::{equal}" if promise == "machine-invariant" else of_the_family
    return [("simulated", simulated), ("hardware", f"backend/test_gpu.py::{equal}")]


def rows() -> list[tuple[str, str, str]]:
    """(op, mode, backend) of every row: both modes for the ops that tensor cores change."""
    return [
        (op, mode.name, backend)
        for op in OPS
        for mode in MODES.values()
        if not mode.ops or op in mode.ops
        for backend in BACKENDS
        if mode.name in BACKENDS[backend].promises
    ]


def table() -> str:
    """A cell names its test within the file, or the file and class, that stands in the row's third column."""
    lines = ["| op | mode | backend | tests in | " + " | ".join(PROMISES) + " |", "|---" * (4 + len(PROMISES)) + "|"]
    for op, mode, backend in rows():
        cells = {promise: tests_of(op, mode, backend, promise) for promise in PROMISES}
        homes = {ring: test.rsplit("::", 1)[0] for tests in reversed(cells.values()) for ring, test in tests}
        shown = []
        for tests in cells.values():
            words = [f"{ring} `{_within(test, homes[ring])}`" for ring, test in tests]
            shown.append("<br>".join(words) or "not promised")
        where = "<br>".join(f"{ring} `tests/{home}`" for ring, home in homes.items())
        lines.append(
            f"| {op} | {mode if any(op in m.ops for m in MODES.values()) else 'both'} | {backend} | {where} | "
            + " | ".join(shown)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _within(test: str, home: str) -> str:
    return test.removeprefix(f"{home}::")


def written() -> pages.Contents:
    return {"table": table()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into NUMERICS.md")
    if not parser.parse_args().write:
        sys.exit("nothing to do without --write")
    pages.write(PAGE, "promises", written())
