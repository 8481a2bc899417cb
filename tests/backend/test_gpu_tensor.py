"""Mode tensor on a real GPU, backends cuda and triton: `make gpu`, or `pytest -m gpu tests/backend/test_gpu_tensor.py`.

There is no CPU to compare with bit for bit: results are held to float64 within the bound of cases.py, and to themselves for the
promises. What a simulator has not: real sizes, other work beside, streams, graphs, a second process. The last tests promise
nothing; they note what this chip's matrix instructions do (RERANK_KERNELS_MMA_FILE=x.pt keeps operands and results in x-cuda.pt
and x-triton.pt).
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import conftest
import gpu
import invariants
import rerank_kernels as rk
import tensor
from cases import Case, Tensors, numbers
from gpu import OnGpu, moved
from invariants import all_same, same
from rerank_kernels.backend import registry
from rerank_kernels.backend.native import hopper

pytestmark = pytest.mark.gpu
MMA_FILE = "RERANK_KERNELS_MMA_FILE"


def missing() -> str | None:
    """Why this file cannot run here."""
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "mode tensor needs compute capability 8.0"
    return None


@pytest.fixture(params=tensor.BACKENDS)
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ops on CUDA tensors are served by this backend."""
    if reason := missing() or registry.missing(request.param):
        pytest.skip(f"{request.param} backend: {reason}")
    conftest.on_gpu.append(torch.cuda.get_device_name())
    with registry.use(request.param):
        yield request.param


@pytest.fixture(params=tensor.HALVES, ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def case_of(op: str, label: str, rows: dict[str, tuple[int, ...]], **more: Any) -> OnGpu:
    options = {**more.pop("options", {}), "mode": "tensor"}
    return OnGpu(op, label, rows, options=options, **more)


CASES = gpu.TENSOR_CASES


class TestTensorOnAGpu:
    """A mirror of TestTensor (test_tensor.py). Thread-invariant is here: in company, on other streams, in graphs, below."""

    def test_right(self, served: str, case: OnGpu, dtype: torch.dtype) -> None:
        invariants.right(case, dtype)

    def test_repeatable(self, served: str, case: OnGpu, dtype: torch.dtype) -> None:
        invariants.repeatable(case, dtype)

    def test_batch_invariant(self, served: str, case: OnGpu, dtype: torch.dtype) -> None:
        invariants.batch_invariant(case, dtype)

    def test_padding_invariant(self, served: str, case: OnGpu, dtype: torch.dtype) -> None:
        invariants.padding_invariant(case, dtype)


# ---- real sizes


def _linear(k: int, n: int, m: int, activation: str | None = None) -> OnGpu:
    shared = {"weight": (n, k), "bias": (n,)}
    options = {"activation": activation} if activation else {}
    return case_of("linear", f"{m}x{k}x{n}", {"x": (k,)}, shared=shared, options=options, count=m)


def _attention(d: int, lengths: tuple[int, ...], heads: int = 16, keys: int = 16, **options: Any) -> OnGpu:
    label = f"D{d}-H{heads}of{keys}-T{max(lengths)}{'-' + '-'.join(options) if options else ''}"
    rows = {"q": (heads, d), "k": (keys, d), "v": (keys, d)}
    return case_of("attention", label, rows, lengths=lengths, options=options)


REAL = [
    _linear(768, 768, 4096),
    _linear(768, 3072, 4096, "gelu"),
    _linear(3072, 768, 4096),
    _linear(1024, 4096, 1000, "gelu_tanh"),
    _linear(4096, 1024, 333),
    _attention(64, (2048, 1, 517, 128)),
    _attention(128, (2048, 64, 65, 300)),
    _attention(64, (1500, 333), keys=4, causal=True),
    _attention(128, (1030, 700), keys=8, window=(200, 60)),
    _attention(64, (128,) * 40),
    case_of("sparse_ffn", "1024x4096x1024", {"x": (1024,)}, shared={"up_weight": (4096, 1024), "down_weight": (1024, 4096)}),
]


@pytest.mark.parametrize("real", REAL, ids=str)
def test_real_sizes(served: str, real: OnGpu, dtype: torch.dtype) -> None:
    """Every row's bits are those that it has in a smaller call; right in some rows, since float64 of all would take minutes."""
    rows, shared = real.make_rows(dtype), real.make_shared(dtype)
    full = real.call(rows, shared)
    if real.lengths:
        ends = torch.tensor(real.lengths).cumsum(0).tolist()
        for b, (n, end) in list(enumerate(zip(real.lengths, ends, strict=True)))[:4]:
            part = {name: t[end - n : end] for name, t in rows.items()}
            all_same(real.call(part, shared, (n,)), full, f"{real}, sequence {b} alone", slice(end - n, end))
        last = slice(real.total - real.lengths[-1], real.total)
        within(alone(real), {name: t[last] for name, t in rows.items()}, shared, full[0][last])
        return
    m = real.count
    for count in (n for n in (1, 2, 7, 16, 33, 64, 100, 129, 256, m // 2) if n < m):
        for some in (slice(0, count), slice(m - count, m)):
            part = {name: t[some] for name, t in rows.items()}
            all_same(real.call(part, shared), full, f"{real}, rows {some.start} to {some.stop} alone", some)
    few = torch.arange(0, m, max(m // 24, 1))
    within(real, {name: t[few] for name, t in rows.items()}, shared, full[0][few])


def alone(case: OnGpu) -> OnGpu:
    """With the last of its sequences only."""
    return dataclasses.replace(case, lengths=case.lengths[-1:])


def within(case: Case, rows: Tensors, shared: Tensors, got: Tensor) -> None:
    (near,) = case.near(rows, shared, (got,))
    error = (got.double() - near.value).abs()
    bad = ~(error <= near.slack)
    worst = float((error / near.slack).max())
    assert not bad.any(), f"{case}: {int(bad.sum())} of {bad.numel()} values beyond the bound, up to {worst:.1f} times"


# ---- every way of every launcher, every tile


# whose choice it is: bmm and the product that decides in sparse_ffn are linear's
LAUNCHER = {"linear": "linear_tensor", "bmm": "linear_tensor", "sparse_ffn": "linear_tensor", "attention": "attention_tensor"}
HOPPER = {
    "linear_tensor": "linear_hopper_tensor",
    "attention_tensor": "attention_hopper_tensor",
}  # who serves in its place on compute capability 9.0; see csrc/cuda/kernels.h


def launchers() -> dict[str, int]:
    """The CUDA launchers with several ways, and how many."""
    return {name: int(count) for name, count in (entry.split() for entry in torch.ops.rerank_kernels.launchers().split(", "))}


def ways_here(op: str) -> list[tuple[str, int]]:
    """Every way of every CUDA launcher that can serve the op on this GPU."""
    name = LAUNCHER[op]
    names = [name, HOPPER[name]] if name in HOPPER and torch.cuda.get_device_capability() == (9, 0) else [name]
    return [(n, way) for n in names for way in range(launchers()[n])]


def of_triton(op: str) -> Any:
    """The module that starts the kernel of `op`."""
    return importlib.import_module("rerank_kernels.backend.triton." + LAUNCHER[op].removesuffix("_tensor"))


def ways(served: str, case: Case) -> int:
    if served == "cuda":
        return len(ways_here(case.op))
    arch = int("{}{}".format(*torch.cuda.get_device_capability()))
    shape = (case.rows["q"][1],) if case.op == "attention" else ()
    return len(of_triton(case.op).tensor_tiles(*shape, arch))


@contextmanager
def forced(served: str, op: str, way: int) -> Iterator[None]:
    """Inside, the launcher takes this way, or Triton's kernel this tile, for every call."""
    module = of_triton(op) if served == "triton" else None
    if module:
        module.force = way
    else:
        name, way = ways_here(op)[way]
        torch.ops.rerank_kernels.force_launch(name, way)
    try:
        yield
    finally:
        if module:
            module.force = None
        else:
            torch.ops.rerank_kernels.force_launch(name, -1)


def test_the_kernels_for_hopper_pass_their_trial(served: str, monkeypatch: Any) -> None:
    if served != "cuda" or torch.cuda.get_device_capability() != hopper.CAPABILITY:
        pytest.skip("of csrc/cuda/sm90")
    monkeypatch.delenv(hopper.SETTING, raising=False)
    device = torch.empty(0, device="cuda").device
    for launcher, op in hopper.OPS.items():
        monkeypatch.setattr(hopper, "_here", {})
        began = time.perf_counter()
        hopper.before_a_call(launcher, device)
        conftest.facts.append(f"the trial of Hopper's {op} took {time.perf_counter() - began:.2f} s")
        assert hopper.of(launcher, device).verdict == hopper.EQUAL


def test_the_launchers_with_several_ways_are_known(served: str) -> None:
    if served == "cuda":
        assert {name for name in launchers() if name.endswith("_tensor")} == {*LAUNCHER.values(), *HOPPER.values()}


@pytest.mark.parametrize("any_case", [*CASES, *REAL], ids=str)
def test_every_way_gives_the_same_bits(served: str, any_case: OnGpu, dtype: torch.dtype) -> None:
    rows, shared = any_case.make_rows(dtype), any_case.make_shared(dtype)
    want = any_case.call(rows, shared)
    few = {n: t[:3] for n, t in rows.items()}
    for way in range(ways(served, any_case)):
        with forced(served, any_case.op, way):
            all_same(any_case.call(rows, shared), want, f"{any_case}, {served} way {way}")
            if not any_case.lengths:
                all_same(any_case.call(few, shared), want, f"{any_case}, {served} way {way}, 3 rows", slice(0, 3))


# ---- in company: another stream keeps the chip busy, blocks start in other orders


BUSY = [_linear(768, 3072, 500, "gelu"), _linear(768, 768, 5), _attention(64, (300, 17, 512)), _attention(128, (400,), keys=4)]


@pytest.mark.parametrize("busy", BUSY, ids=str)
def test_200_repeats_beside_other_work(served: str, busy: OnGpu, dtype: torch.dtype) -> None:
    call, _, _ = on_device(busy, dtype)
    want = call()
    torch.cuda.synchronize()
    stream, noise = torch.cuda.Stream(), torch.randn(1536, 1536, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(200):
        with torch.cuda.stream(stream):
            for _ in range(turn % 4):
                noise = torch.tanh(noise @ noise)
        wrong += (call().view(torch.int16) != want.view(torch.int16)).sum()
    torch.cuda.synchronize()
    assert int(wrong) == 0, f"{busy}: {int(wrong)} values differ in 200 turns beside other work"


def on_device(case: Case, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Tensors, Tensors]:
    """The call on tensors that stay on the GPU, offsets included, and those tensors."""
    rows, shared = ({n: moved(t) for n, t in some.items()} for some in (case.make_rows(dtype), case.make_shared(dtype)))
    lengths = {n: t.cuda() for n, t in case.sequences().items()}
    return lambda: cases.FUNCTIONS[case.op](**rows, **shared, **case.options, **lengths), rows, shared


def test_on_another_stream(served: str, case: OnGpu, dtype: torch.dtype) -> None:
    want = case.call(case.make_rows(dtype), case.make_shared(dtype))
    call, _, _ = on_device(case, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = call()
    stream.synchronize()
    same(out.cpu(), want[0], f"{case}, on a stream of its own")


def test_in_a_graph(served: str, case: OnGpu, dtype: torch.dtype) -> None:
    """Captured once, replayed on other inputs: nothing inside allocates from the driver, waits, or remembers a value."""
    call, rows, shared = on_device(case, dtype)
    call()  # Triton compiles, weights are laid out
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for t in rows.values():
        t.neg_()
    graph.replay()
    torch.cuda.synchronize()
    want = case.call({n: t.cpu() for n, t in rows.items()}, {n: t.cpu() for n, t in shared.items()})
    same(captured.cpu(), want[0], f"{case}, replayed")


def test_in_two_processes(served: str) -> None:
    command = [sys.executable, gpu.__file__, "hash-tensor", served]
    there = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    hashes = [subprocess.run(command, env=there, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert hashes[0] == hashes[1] and hashes[0].count("\n") == len(CASES)


def test_cuda_and_triton_give_the_same_bits(case: OnGpu, dtype: torch.dtype) -> None:
    """On one arithmetic class: mma.sync on one side, wgmma on the other where it is a Hopper."""
    if reason := missing() or registry.missing("cuda") or registry.missing("triton"):
        pytest.skip(reason)
    rows, shared, out = case.make_rows(dtype), case.make_shared(dtype), []
    for name in ("cuda", "triton"):
        with registry.use(name):
            out.append(case.call(rows, shared))
    all_same(out[1], out[0], f"{case}, triton against cuda")


# ---- facts about this chip, which nothing rests on


def noted(text: str) -> None:
    conftest.facts.append(f"{torch.cuda.get_device_name()}: {text}")


def test_do_cuda_and_triton_agree(dtype: torch.dtype) -> None:
    """mma.sync on one side; wgmma on the other where it is a Hopper."""
    if reason := missing() or registry.missing("cuda") or registry.missing("triton"):
        pytest.skip(reason)
    for k in (16, 32, 64, 768, 3072):
        x, w = numbers("x", (256, k), dtype).cuda(), numbers("w", (256, k), dtype, 2.0**-4).cuda()
        got = []
        for name in ("cuda", "triton"):
            with registry.use(name):
                got.append(rk.linear(x, w, out_dtype=torch.float32, mode="tensor").cpu())
        differ = int((got[0].view(torch.int32) != got[1].view(torch.int32)).sum())
        noted(f"linear K={k} {dtype}: cuda and triton differ in {differ} of {got[0].numel()} sums")


def test_what_an_mma_gives(served: str) -> None:
    """Operands and sums of K = 16 (one instruction), 64 and 768, for `python tests/gpu.py compare FILE` where the
    simulator is: which of its models adds as this chip does."""
    kept: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "products": []}
    for dtype in tensor.HALVES:
        for k in (16, 64, 768):
            x, w = numbers("mma x", (64, k), dtype), numbers("mma w", (64, k), dtype)
            w[1::4] *= 2.0**-9  # beside terms of like size also terms that lie far below the sum
            x[2::4, ::2] *= 2.0**-7
            y = rk.linear(x.cuda(), w.cuda(), out_dtype=torch.float32, mode="tensor").cpu()
            kept["products"].append({"dtype": dtype, "k": k, "x": x, "w": w, "y": y})
            exact = x.double() @ w.double().t()
            ulps = ((y.double() - exact).abs() / (exact.abs() * 2.0**-24)).median()
            low = int((y.double().abs() < exact.abs()).sum())
            noted(f"{served} {dtype} K={k}: median error {float(ulps):.2f} half ulps, {low} of {y.numel()} too small")
    if path := os.environ.get(MMA_FILE):
        torch.save(kept, path.removesuffix(".pt") + f"-{served}.pt")
