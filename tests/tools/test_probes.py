"""tools/probes without a GPU: their kernels are compiled, looked at and run in the simulator; the rest runs with stand-ins.

What they find is a GPU's to say. That a probe does not fail for want of a name, and that it sees what differs, is said here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import rerank_kernels as rk
import toolkit
from bench.cases import shapes
from ptxsim.program import Module
from recorder import recording
from rerank_kernels.graphs import buckets, captured
from simulated import served
from tools.gpu_report.steps import PROBES

ROOT = Path(__file__).parents[2]
HOPPER = (9, 0)

pytestmark = pytest.mark.skipif(toolkit.find() is None, reason="no nvcc")


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(str(PROBES))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)

    def imported(name: str) -> Any:
        found = importlib.import_module(name)
        if hasattr(found, "DEVICE"):
            monkeypatch.setattr(found, "DEVICE", "cpu")
        return found

    return imported


def printed(capsys: Any) -> dict[str, Any]:
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)  # type: ignore[no-any-return]


# ---- kernels, compiled ahead


def test_kernels_are_compiled_ahead_and_once(probe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cubin, wgmma = probe("_cubin"), probe("_wgmma")
    monkeypatch.setattr(cubin, "SOURCES", {"sums": ("90a", lambda: wgmma.sums((8,)))})
    monkeypatch.setenv("GPU_REPORT_FOLDER", str(tmp_path))
    monkeypatch.setattr(cubin, "AHEAD", tmp_path / "ahead")
    assert cubin.main("8.0") == 0 and not (tmp_path / "build").exists(), "nothing there is for an A100"
    assert cubin.main("9.0") == 0
    (made,) = (tmp_path / "build" / "probes").glob("*.cubin")
    monkeypatch.setattr(cubin.toolkit, "find", lambda: None)
    assert cubin.compiled("sums") == made, "what is there needs no nvcc"
    monkeypatch.setitem(cubin.SOURCES, "sums", ("90a", lambda: "another source"))
    with pytest.raises(cubin.Unfit, match=r"was not built ahead: python tools/probes/_cubin\.py does it"):
        cubin.compiled("sums")
    assert cubin.main() == 1


def test_a_source_that_does_not_compile_says_so(probe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cubin = probe("_cubin")
    monkeypatch.setenv("GPU_REPORT_FOLDER", str(tmp_path))
    monkeypatch.setitem(cubin.SOURCES, "sums", ("90a", lambda: "nonsense"))
    with pytest.raises(cubin.Unfit, match=r"does not compile sums for sm_90a: .*nonsense"):
        cubin.compiled("sums")
    assert list((tmp_path / "build" / "probes").glob("*.cubin")) == []


def test_the_machine_code_has_the_instructions_that_are_asked(probe: Any) -> None:
    """Of every width; and no fence that ptxas adds to keep them apart."""
    cubin, wgmma = probe("_cubin"), probe("_wgmma")
    kit = toolkit.find()
    assert kit is not None
    if kit.tool("nvdisasm") is None:
        pytest.skip("no nvdisasm")
    code = kit.disassemble(cubin.compiled("sums"))
    assert {int(n) for n in re.findall(r"HGMMA\.64x(\d+)x16\.F32", code)} == set(wgmma.COLUMNS)
    assert "HMMA.16816.F32 " in code and "HMMA.16816.F32.BF16" in code
    rates = kit.disassemble(cubin.compiled("rates"))
    kinds = {"f16": "HGMMA.64x256x16.F32", "tf32": "HGMMA.64x256x8.F32.TF32", "s8": "IGMMA.64x256x32"}
    assert kinds.keys() == wgmma.RATED.keys()
    assert all(rates.count(instruction) >= 4 for instruction in kinds.values())


def test_a_gpu_that_does_not_fit_gets_one_line(probe: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    arithmetic = probe("arithmetic")
    probe("_cubin").says_why(arithmetic.main)
    assert printed(capsys) == {"note": "it asks a GPU of compute capability 9.0; this one has 8.0"}
    assert probe("rates").wgmma() == {"note": "it asks a GPU of compute capability 9.0; this one has 8.0"}


# ---- the driver, whose launches go to the simulator


class Driver:
    """What is asked of libcuda.so.1. Kernels run in the simulator, on CPU tensors."""

    def __init__(self, ptx: Path) -> None:
        self.program, self.launched = Module(ptx.read_text()), list[str]()

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:
        return 0 if image.startswith(b"\x7fELF") else 200

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:
        if name.decode() not in self.program.kernels:
            return 500
        self.launched.append(name.decode())
        function._obj.value = len(self.launched)
        return 0

    def cuLaunchKernel(self, function: Any, *how: Any) -> int:
        gx, gy, gz, bx, by, bz, shared, _, pointers, _ = how
        kernel = self.program.kernel(self.launched[function.value - 1])
        params, memory = bytearray(max(p.offset + p.size for p in kernel.params)), []
        for p, at in zip(kernel.params, pointers, strict=True):
            params[p.offset : p.offset + p.size] = held = ctypes.string_at(at, p.size)
            address = int.from_bytes(held, "little")
            if p.size == 8 and address:
                memory.append((address, self.sizes[address], True, "a tensor"))
        kernel.launch((gx, gy, gz), (bx, by, bz), bytes(params), shared, memory, mma=2)
        return 0

    sizes: dict[int, int]


@pytest.fixture
def simulator(probe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    cubin, wgmma = probe("_cubin"), probe("_wgmma")
    monkeypatch.setattr(wgmma, "COLUMNS", (8, 64))
    monkeypatch.setattr(cubin, "SOURCES", {"sums": ("90a", lambda: wgmma.sums((8, 64)))})
    kit = toolkit.find()
    assert kit is not None
    source = tmp_path / "sums.cu"
    source.write_text(wgmma.sums((8, 64)))
    driver = Driver(kit.ptx(source, "90a"))
    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if str(name).startswith("libcuda.so") else real(name))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    driver.sizes = {}
    into = cubin.Kernel.__call__

    def remembering(self: Any, grid: Any, threads: int, *arguments: Any) -> None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        driver.sizes = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        into(self, grid, threads, *arguments)

    monkeypatch.setattr(cubin.Kernel, "__call__", remembering)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **how: zeros(*shape))  # torch's context
    yield driver


def on_the_cpu(kind: str, rows: int, k: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        x = torch.where(x < 0.8, torch.copysign(torch.zeros_like(x), x), x)
    return x.to(dtype)


def asked(probe: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    arithmetic: ModuleType = probe("arithmetic")
    monkeypatch.setattr(arithmetic, "COLUMNS", (8, 64))
    monkeypatch.setattr(arithmetic, "KINDS", ("normal", "zeros"))
    monkeypatch.setattr(arithmetic, "SIZES", ((16, 64, False), (16, 64, True), (48, 64, False)))
    monkeypatch.setattr(arithmetic, "WIDE", 64)
    monkeypatch.setattr(arithmetic, "operands", on_the_cpu)
    return arithmetic


def test_the_sums_of_every_instruction_are_compared(probe: Any, simulator: Driver, monkeypatch: Any, capsys: Any) -> None:
    """In the simulator they are one arithmetic; scale-d = 0 begins at -0 there, so that it is seen to."""
    asked(probe, monkeypatch).main()
    found = printed(capsys)
    kinds = {"wgmma n8", "wgmma n8, a in registers", "wgmma n64", "wgmma n64, a in registers", "wgmma n64, a and b exchanged"}
    assert set(found["instructions"]) == {*kinds, "wgmma n64, scale-d = 0"}
    assert all(found["instructions"][name][1] == 0 and found["instructions"][name][0] == 12 * 64 * 64 for name in kinds)
    assert {row[4] for row in found["rows"]} <= {"wgmma n64, scale-d = 0"}
    assert all(row[6] == row[7] for row in found["rows"]), "of a zero only the sign"


def test_the_arithmetic_is_held_to_what_mma_sync_gives(probe: Any, simulator: Driver, monkeypatch: Any, capsys: Any) -> None:
    """The control: one instruction takes its second operand from another place."""
    arithmetic = asked(probe, monkeypatch)
    plain = arithmetic.sums
    wrong = lambda kernels, name, a, b, *more: plain(kernels, name, a, b.roll(1, 1) if name.endswith("_8") else b, *more)  # noqa: E731
    monkeypatch.setattr(arithmetic, "sums", wrong)
    arithmetic.main()
    found = printed(capsys)
    assert found["instructions"]["wgmma n8"][1] > 1000 and found["instructions"]["wgmma n64"][1] == 0
    assert any(row[4] == "wgmma n8" and row[8] is not None for row in found["rows"])


def test_a_zero_factor_has_no_exponent(probe: Any, simulator: Driver, monkeypatch: Any) -> None:
    """The control: beside a factor that is small and not zero, a large one counts."""
    arithmetic = asked(probe, monkeypatch)
    kernels = probe("_cubin").load("sums")
    for dtype, half in arithmetic.DTYPES.items():
        assert arithmetic.beside_zeros(kernels, half, dtype, rows=64) == {"mma.sync": 0, "wgmma n64": 0}
        wrong = arithmetic.beside_zeros(kernels, half, dtype, rows=64, zero=2.0**-24)
        assert min(wrong.values()) > 1000


def test_a_driver_that_says_no_is_an_error(probe: Any, simulator: Driver, monkeypatch: Any) -> None:
    kernels = probe("_cubin").load("sums")
    with pytest.raises(RuntimeError, match="cuModuleGetFunction gives status 500"):
        kernels["sums_f16_9"]


# ---- the others


def test_differences_take_two_bits(probe: Any) -> None:
    pytest.importorskip("triton")
    off = torch.tensor([0, 1, -1, 2, -2, 0, 0, 1], dtype=torch.int32)
    assert probe("mufu").packed(off).tolist() == [0 | 1 << 2 | 2 << 4 | 3 << 6, 3 | 1 << 6]


class Event:
    """Of a clock that calls put forward."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_a_calls_time_is_the_median_of_the_turns(probe: Any, monkeypatch: Any) -> None:
    """Two calls ahead and three turns of two; the control: with one call ahead the turns have other medians."""
    monkeypatch.setattr(torch.cuda, "Event", Event)

    def found(before: int) -> float:
        took = iter([100.0, 50.0, 1.0, 2.0, 30.0, 40.0, 3.0, 4.0])
        monkeypatch.setattr(Event, "clock", 0.0)
        return probe("_times").milliseconds(lambda: setattr(Event, "clock", Event.clock + next(took)), 2, 3, before)

    assert (found(before=2), found(before=1)) == (3.5, 21.5)


def test_rates_are_of_libraries_wgmma_and_ours(probe: Any, monkeypatch: Any, capsys: Any) -> None:
    rates = probe("rates")
    for name, value in (("M", 32), ("K", 64), ("N", 32)):
        monkeypatch.setattr(rates, name, value)
    started: list[str] = []
    names = lambda name: {f"rate_{kind}": lambda *a, kind=kind: started.append(kind) for kind in rates.RATED}  # noqa: E731
    monkeypatch.setattr(rates, "seconds", lambda call, calls: (call(), 1e-9)[1])
    monkeypatch.setattr(rates._cubin, "load", names)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    with served.simulator("cuda")():
        from tools.gpu_report.work import launchers

        monkeypatch.setattr(launchers, "listed", lambda: {"linear": 2})
        monkeypatch.setattr(launchers, "forced", lambda name, way: contextlib.nullcontext())
        rates.main()
    found = printed(capsys)["TFLOP/s"]
    assert found["libraries"]["float32"] > 0 and set(found["ours, portable float32"]) == {"its choice", "way 0", "way 1"}
    assert started == list(rates.RATED)
    assert found["wgmma alone"]["float32 as two halves"] == round(found["wgmma alone"]["f16"] / 3, 1)


def test_a_sanitizers_finding_is_wrong(probe: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    sanitizer = probe("sanitizer")
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "12 calls"\necho "$2: it ran"\n[ "$2" = synccheck ] && exit 9 || exit 0\n')
    program.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda: str(program))
    sanitizer.main()
    found = printed(capsys)
    assert found["wrong"] == "synccheck ended with an error"
    assert found["memcheck"] == {"calls": "12 calls", "status": 0, "said": ["memcheck: it ran"]}
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    sanitizer.main()
    assert "no compute-sanitizer here" in printed(capsys)["note"]


def test_the_calls_of_a_sanitizer_are_calls(probe: Any, monkeypatch: Any) -> None:
    ran = []
    with served.simulator("cuda")(mma=2), torch.no_grad():
        for op, mode, call in probe("sanitizer").calls():
            ran.append((op, mode))
            if ran.count((op, mode)) == 1:
                call()
    assert {("linear", "tensor"), ("attention", "portable"), ("layer_norm", "portable")} <= set(ran)


def test_cublaslt_is_tried_timed_and_compared_with_torch(probe: Any, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """With the stand-in of the trial's own tests."""
    from rerank_kernels.backend.native import cublaslt as binding
    from rerank_kernels.backend.native import proven

    lt, made = probe("cublaslt"), tmp_path / "libcublasLt.so"
    source = ROOT / "tests" / "simulated" / "lt.cpp"
    subprocess.run(["c++", "-std=c++20", "-O2", "-fPIC", "-shared", "-o", made, source], check=True)
    library = binding.CublasLt(str(made))
    monkeypatch.setattr(binding, "loaded", lambda: library)
    here = {"_here": {}, "DEVICES": ("cpu",), "stream": lambda device: 0, "capturing": lambda device: False}
    for name, value in here.items():
        monkeypatch.setattr(proven, name, value)
    for name, value in (("SHAPES", ((16, 32),)), ("CLASSES", (64,)), ("ROWS", (40, 1))):
        monkeypatch.setattr(lt, name, value)
    monkeypatch.setattr(lt, "milliseconds", lambda call: (call(), 0.25)[1])
    monkeypatch.setattr(lt, "started", lambda call: (call(), "a_kernel"))
    with served.simulator("cuda")(mma=2), torch.no_grad():
        lt.main()
    found = printed(capsys)
    assert found["counts"] == {"trials": 6, "of": 6, "equal": 6} and found["cublasLt"] == 130100
    assert found["trials"][0][:7] == ["float16", 16, 32, "product", 64, True, "equal"] and found["trials"][0][8:] == [
        0.25,
        0.25,
    ]
    assert len(found["torch"]) == 8 and found["torch"][0][5] == "a_kernel"
    assert len(found["heads"]["trials"]) == len(found["trials"][0]) and len(found["heads"]["torch"]) == len(found["torch"][0])


def test_what_a_capture_costs_is_of_each_bucket(probe: Any, monkeypatch: Any, capsys: Any) -> None:
    graphs, patch = probe("graphs"), rk.patch
    monkeypatch.setattr(rk, "patch", lambda model, mode, **how: patch(model, **how))  # mode tensor needs a GPU
    tiny = shapes.Shape("XLMRoberta", 1, 32, 64, 2, 3000, 64)
    monkeypatch.setattr(shapes, "RERANKERS", {"BAAI/bge-reranker-base": tiny})
    monkeypatch.setattr(shapes, "MIXED_LENGTHS", (5, 9))
    monkeypatch.setattr(graphs, "LENGTHS", {"1x16": (16,), "3x16": (16,) * 3, "again": (15,)})
    monkeypatch.setattr(graphs, "kernels", lambda call: call() and 0.0)
    for module in (buckets, captured):
        monkeypatch.setattr(module, "TOKENS", (64, 128))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with recording(monkeypatch) as device, torch.no_grad():
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: sum(len(d.captures) for d in device.made) << 20)
        graphs.main()
    found = printed(capsys)
    assert [row[1] for row in found["rows"]] == [True] * 4, "equal bits"
    assert [row[-1] for row in found["rows"]] == [2, 1, 0, 0], "captures: the largest and its own; its own; none; none"


def test_probes_are_started_as_programs(tmp_path: Path) -> None:
    """As gpu-report does: from any folder, by path, without its own folder among Python's."""
    done = subprocess.run([sys.executable, str(PROBES / "_cubin.py"), "1.0"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
