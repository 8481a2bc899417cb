"""Fixtures: every op test runs on every registered backend and dtype, and the run ends by saying which backends those were.

The cuda and triton backends run in the simulator (tests/ptxsim): their own launchers and kernels, on CPU tensors; `-m gpu` runs
cuda on a GPU (test_gpu.py). RERANK_KERNELS_REQUIRE=cpu,cuda makes a missing backend a failure instead of a skip, for machines
such as CI's where it is known to be there. The tests may be shared out over processes (`pytest -n`, as `make test` does): then
the first one only collects what the others counted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Thousands of tiny kernels: on a busy machine threads that spin at each one's end make the run ten times as long. It has to be
# said before torch is imported, and changes no result.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One of several processes leaves the other cores to the others. Two threads, not one: else nothing would be split but in the
# tests that set a number themselves.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

# For tools/ and bench/. At the end, so that an installed rerank_kernels comes before the checkout's.
sys.path.append(str(Path(__file__).parent.parent))

import browser
from cases import DTYPES
from invariants import force_isa
from rerank_kernels.backend import registry
from simulated import served

os.environ.pop("COLUMNS", None)  # pytest-xdist's word, which the commands would take for the user's
# A shell that starts the tests in the background, or nohup, has them ignore these, and the commands that tests interrupt too.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

# New tensors hold NaN, in the C++ library too: a place of an output that nobody writes shows. test_mutants.py holds this.
torch.use_deterministic_algorithms(True, warn_only=True)

ISAS = ("avx512", "avx2", "scalar")
REQUIRE = "RERANK_KERNELS_REQUIRE"
TOOLS = {"chromium": browser.missing}  # what tests need besides backends -> why it is not there, or None
_ran: Counter[str] = Counter()
_isas: Counter[str] = Counter()
on_gpu: list[str] = []  # the GPU's name, once a test that ran on it (test_gpu.py)
facts: list[str] = []  # about that GPU, which no test holds it to (test_gpu_tensor.py)
_threads: list[int] = []  # PyTorch's, one entry per process of a run in several


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also what takes many minutes (make test-all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--exhaustive"):
        left_out = [i for i in items if i.get_closest_marker("exhaustive")]
        items[:] = [i for i in items if not i.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: run by make test-all only")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU and a CUDA build of torch")
    config.addinivalue_line("markers", "promise(name): run only on backends that make this promise")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "CASES"):
        metafunc.parametrize("case", metafunc.module.CASES, ids=str)
    if "backend" in metafunc.fixturenames:
        marks = [m.args[0] for m in metafunc.definition.iter_markers("promise")]
        slow = {"triton": pytest.mark.exhaustive}  # its compiler; test_triton.py has the short form
        names = [
            pytest.param(b.name, marks=slow.get(b.name, ()))
            for b in registry.BACKENDS.values()
            if set(marks) <= set(b.promises["portable"])
        ]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[registry.Backend]:
    """Every op inside the test is served by this backend."""
    require(request.param)
    _ran[request.param] += 1
    if request.param in served.SIMULATED:
        with served.simulator(request.param)():
            yield registry.BACKENDS[request.param]
        return
    with registry.use(request.param):
        yield registry.BACKENDS[request.param]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[i for i in ISAS if i != "scalar"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set of the cpu backend; the test itself switches to it with `force_isa` and compares with scalar."""
    require("cpu")
    try:
        force_isa(request.param)
    except RuntimeError as error:
        pytest.skip(f"cpu backend, {request.param}: {error}")
    _isas[request.param] += 1
    _isas["scalar"] += 1
    with registry.use("cpu"):
        yield request.param
    force_isa("auto")


def require(name: str) -> None:
    """Skip without the backend or tool `name`, fail if it was said to be there."""
    reason = missing(name)
    if reason is None:
        return
    kind = "tool" if name in TOOLS else "backend"
    if name in required():
        pytest.fail(f"{kind} {name!r} is required by {REQUIRE} and not available: {reason}")
    pytest.skip(f"{kind} {name!r} is not available: {reason}")


def ran(name: str) -> None:
    """`require`, and a count for the end of the run, for tests that pick their backend themselves."""
    require(name)
    _ran[name] += 1


def missing(name: str) -> str | None:
    """Why the tests cannot run a backend here: a GPU is not needed for cuda and triton, but nvcc or Triton is. Or a tool."""
    if name in TOOLS:
        return TOOLS[name]()
    if name not in served.SIMULATED:
        return registry.missing(name)
    return registry.missing("cpu") or served.missing(name)


def required() -> set[str]:
    return {n.strip() for n in os.environ.get(REQUIRE, "").split(",") if n.strip()}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # one of several processes: tells the first one, which ends the run
        counted = {"ran": dict(_ran), "isas": dict(_isas), "on_gpu": on_gpu, "facts": facts, "threads": torch.get_num_threads()}
        session.config.workeroutput["rerank_kernels"] = counted  # type: ignore[attr-defined]
        return
    if (
        lost := sorted(n for n in required() if n not in (*registry.BACKENDS, *TOOLS) or missing(n))
    ) and session.exitstatus == 0:
        session.exitstatus = 1
        print(f"\n{REQUIRE} names {', '.join(lost)}, which is not available")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the first process, for each of the others; one that crashed has counted nothing, and fails the run anyway."""
    if counted := getattr(node, "workeroutput", {}).get("rerank_kernels"):
        _ran.update(counted["ran"])
        _isas.update(counted["isas"])
        on_gpu.extend(counted["on_gpu"])
        facts.extend(counted["facts"])
        _threads.append(counted["threads"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("backends")
    threads = f"{len(_threads)} processes of {_threads[0]}" if _threads else str(torch.get_num_threads())
    if on_gpu:
        terminalreporter.line(f"cuda: on hardware, {on_gpu[0]}, torch {torch.__version__}, {len(on_gpu)} tests")
    for fact in facts:
        terminalreporter.line(fact)
    for b in registry.BACKENDS.values():
        reason = missing(b.name)
        if reason is not None:
            terminalreporter.line(f"{b.name}: did not run: {reason}")
            continue
        how = "on hardware"
        if b.name in served.SIMULATED:
            how = f"simulated: {served.SIMULATED[b.name][1]} on the CPU, no GPU"
        if b.name == "cpu":
            how = f"on hardware, {force_isa('auto')}"
            if _isas:
                how += "; bit for bit against scalar: " + ", ".join(i for i in ISAS if i != "scalar" and _isas[i])
        terminalreporter.line(f"{b.name}: {how}, torch {torch.__version__}, {threads} threads, {_ran[b.name]} tests")
    for tool, why_not in TOOLS.items():
        reason = why_not()
        terminalreporter.line(f"{tool}: {'did not run: ' + reason if reason else f'{_ran[tool]} tests'}")
