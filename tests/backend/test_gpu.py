"""The cuda and triton backends on a real GPU: `make gpu`, or `pytest -m gpu`.

The cases are those of every other test; what is compared with is the cpu backend, bit for bit. What a simulator has not:
real sizes, streams, graphs, a second process, and compute-sanitizer where it is installed.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import conftest
import gpu
import models
import rerank_kernels as rk
from cases import Case
from gpu import on
from invariants import all_same, same
from rerank_kernels.backend import registry
from rerank_kernels.backend.registry import OPS
from rerank_kernels.graphs import buckets
from rerank_kernels.models.registry import packed_answers
from rerank_kernels.models.replay import said

pytestmark = pytest.mark.gpu
FAMILIES = sorted(set(OPS.values()))
SERVED_BY = ("cuda", "triton")


def missing() -> str | None:
    """Why this file cannot run here."""
    reason = registry.missing("cuda")
    return f"cuda backend: {reason}" if reason else None


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if reason := missing():
        pytest.skip(reason)
    conftest.on_gpu.append(torch.cuda.get_device_name())


def of_cpu(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    with registry.use("cpu"):
        return on("cpu", case, dtype)


@pytest.mark.parametrize("served_by", SERVED_BY)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_the_cpu(served_by: str, family: str, dtype: torch.dtype) -> None:
    for case in cases.of(family):
        want = of_cpu(case, dtype)
        with registry.use(served_by):
            all_same(on("cuda", case, dtype), want, f"{case}, {served_by} on a GPU against the CPU")


def test_few_rows(dtype: torch.dtype) -> None:
    """Other launch shapes, and sparse_ffn's sparse way: the cases above have rows enough for the dense one."""
    for case in cases.CASES:
        if not case.lengths:
            rows, shared = {n: t[:3] for n, t in case.make_rows(dtype).items()}, case.make_shared(dtype)
            with registry.use("cpu"):
                want = case.call(rows, shared)
            got = case.call({n: t.cuda() for n, t in rows.items()}, {n: t.cuda() for n, t in shared.items()})
            all_same(tuple(t.cpu() for t in got), want, f"{case}, 3 rows, a GPU against the CPU")


@pytest.mark.parametrize("served_by", SERVED_BY)
def test_real_sizes(served_by: str, dtype: torch.dtype) -> None:
    """Grids of many waves, which a simulator is too slow for."""
    rows, heads, lengths = 2000, 12, (512, 300, 1, 77, 512, 16, 400, 182)

    def results(device: str) -> list[torch.Tensor]:
        x, *more = (cases.numbers(f"real {n}", (rows, n), dtype).to(device) for n in (768, 3072))
        up, down = (cases.numbers(f"real {n} {k}", (n, k), dtype, 2.0**-5).to(device) for n, k in ((3072, 768), (768, 3072)))
        one = cases.numbers("real one", (768,), dtype).to(device)
        qkv = cases.numbers("real qkv", (rows, 3, heads, 64), dtype).to(device)
        offsets = cases.offsets(lengths).to(device)
        out = [
            rk.linear(x, up, activation="gelu"),
            rk.linear(more[0], down, one, residual=x),
            rk.layer_norm(x, one, one, residual=x),
            rk.softmax(more[0]),
            rk.attention(*qkv.unbind(1), cu_seqlens=offsets),
            rk.attention(*qkv.unbind(1), cu_seqlens=offsets, causal=True),
            rk.pool(x, "mean", cu_seqlens=offsets),
        ]
        return [t.cpu() for t in out]

    with registry.use("cpu"):
        want = results("cpu")
    with registry.use(served_by):
        all_same(tuple(results("cuda")), tuple(want), f"real sizes, {served_by} on a GPU against the CPU")


def test_two_threads_with_rows_of_different_length() -> None:
    """They ask for different amounts of shared memory for the same kernel."""
    wide, wider = (cases.numbers(f"{d}", (5, d), torch.float32) for d in (14000, 24000))
    with registry.use("cpu"):
        want = [rk.softmax(x) for x in (wide, wider)]
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda i: (i % 2, rk.softmax((wide, wider)[i % 2].cuda()).cpu()), range(200)):
            same(got[1], want[got[0]], "softmax, two threads")


@pytest.mark.parametrize("family", FAMILIES)
def test_on_another_stream(family: str) -> None:
    stream = torch.cuda.Stream()
    for case in cases.of(family):
        rows = {n: t.cuda() for n, t in case.make_rows(torch.float32).items()}
        shared = {n: t.cuda() for n, t in case.make_shared(torch.float32).items()}
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = case.call(rows, shared)
        stream.synchronize()
        all_same(tuple(t.cpu() for t in out), of_cpu(case, torch.float32), f"{case}, on a stream of its own")


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_graph(family: str) -> None:
    """Captured once, replayed on other inputs: nothing inside allocates from the driver, waits, or remembers a value."""
    for case in cases.of(family):
        rows = {n: t.cuda() for n, t in case.make_rows(torch.float32).items()}
        shared = {n: t.cuda() for n, t in case.make_shared(torch.float32).items()}
        lengths = {n: t.cuda() for n, t in case.sequences().items()}

        def call(case: Case = case, arguments: dict[str, object] = {**rows, **shared, **case.options, **lengths}) -> object:  # noqa: B006
            return cases.FUNCTIONS[case.op](**arguments)

        call()  # weights are laid out at the first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for t in rows.values():
            t.neg_()
        graph.replay()
        torch.cuda.synchronize()
        got = (captured,) if isinstance(captured, torch.Tensor) else tuple(captured)  # type: ignore[arg-type]
        with registry.use("cpu"):
            want = case.call({n: t.cpu() for n, t in rows.items()}, {n: t.cpu() for n, t in shared.items()})
        all_same(tuple(t.cpu() for t in got), want, f"{case}, replayed")


def replays(model: Any) -> int:
    told = said(model.forward)
    assert "refused" not in told and "no memory" not in told, told
    return int(model.forward.graphs.replays)


@pytest.mark.parametrize("mode", ["portable", "tensor"])
@pytest.mark.parametrize("served_by", SERVED_BY)
def test_graphs_at_the_edges_of_buckets(served_by: str, mode: str) -> None:
    """A captured forward has the bits of one that was not, whatever an earlier call left in the memory that graphs share."""
    model = models.tiny("xlm-roberta", torch.float16, max_position_embeddings=600).cuda()
    other = copy.deepcopy(model)
    rk.patch(model, mode=mode, backend=served_by)
    rk.patch(other, mode=mode, backend=served_by, graphs=False)
    edges = [n for edge in buckets.TOKENS[:8] for n in (edge - 1, edge, edge + 1)]
    calls = [[n // k + (i < n % k) for i in range(k)] for n in edges for k in (-(-n // 590), 7, 8, 9, 33)]
    calls += [[0, 5], [5, 0, 9], [512] * 16, [512] * 17]
    large = {n: t.cuda() for n, t in models.padded(models.rows((500,) * 16, 9), 1).items()}
    with torch.inference_mode():
        model(**large)
        for i, lengths in enumerate(calls):
            model(**large)
            batch = {n: t.cuda() for n, t in models.padded(models.rows(lengths, i), 1, left=i % 2 == 1).items()}
            same(
                model(**batch).logits.cpu(),
                other(**batch).logits.cpu(),
                f"logits of {len(lengths)} sequences, {served_by}, {mode}",
            )
    assert replays(model) == 2 * len(calls) - 1  # all but 17 sequences of 512


@pytest.mark.parametrize("served_by", SERVED_BY)
def test_graphs_in_two_threads_on_two_streams(served_by: str) -> None:
    model = models.tiny("bert").cuda()
    other = copy.deepcopy(model)
    rk.patch(model, backend=served_by)
    rk.patch(other, backend=served_by, graphs=False)
    batches = [{n: t.cuda() for n, t in models.padded(models.rows((i % 50 + 1, i % 90 + 1), i), 0).items()} for i in range(200)]
    want = [other(**b).logits.cpu() for b in batches]
    model(**batches[0])
    torch.cuda.synchronize()

    def run(half: int) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [model(**b).logits.cpu() for b in batches[half::2]]

    with ThreadPoolExecutor(2) as pool:
        for half, found in enumerate(pool.map(run, range(2))):
            for got, right in zip(found, want[half::2], strict=True):
                same(got, right, "logits in two threads, on two streams")
    assert replays(model) == len(batches)


def test_graphs_of_a_model_that_moves() -> None:
    model = models.tiny("bert").cuda()
    rk.patch(model)
    ids = models.padded(models.rows((20, 3)), 0)
    for change in (lambda m: m, lambda m: m.half(), lambda m: m.cpu().cuda(), lambda m: m.float()):
        change(model)
        other = copy.deepcopy(model).cpu()
        batch = {n: t.cuda() for n, t in ids.items()}
        for _ in range(3):
            same(model(**batch).logits.cpu(), other(**ids).logits, "logits after a move")
    assert replays(model) >= 4


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_graphs_of_decoders(kind: str) -> None:
    model = models.decoder(kind).cuda()
    other = copy.deepcopy(model)
    rk.patch(model)
    rk.patch(other, graphs=False)
    for lengths in ((9,), (64,), (30, 1, 40), (100, 100)):
        ids, cu = torch.cat(models.rows(lengths)), torch.tensor([0, *lengths]).cumsum(0).int()
        for _ in range(2):
            found, want = (packed_answers(m, ids.cuda(), cu.cuda(), 7, 11).logit.cpu() for m in (model, other))
            same(found, want, f"log-odds of {kind}, {lengths}")
    assert replays(model) == 7


def test_in_two_processes() -> None:
    hashes = set()
    for _ in range(2):
        done = process(sys.executable, gpu.__file__, "hash")
        assert done.returncode == 0, done.stderr[-2000:]
        hashes.add(done.stdout)
    assert len(hashes) == 1


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One that imports the very package that this one did, be it installed or not."""
    path = os.pathsep.join(p for p in (str(Path(rk.__file__).parent.parent), os.environ.get("PYTHONPATH", "")) if p)
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment})


def test_every_way_of_every_launcher() -> None:
    for entry in torch.ops.rerank_kernels.launchers().split(", "):
        kernel, count = entry.split()
        for way in range(int(count)):
            torch.ops.rerank_kernels.force_launch(kernel, way)
            try:
                for case in cases.CASES:
                    all_same(on("cuda", case, torch.float32), of_cpu(case, torch.float32), f"{case}, {kernel} way {way}")
            finally:
                torch.ops.rerank_kernels.force_launch(kernel, -1)


@pytest.mark.parametrize("served_by", SERVED_BY)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_patched_model(served_by: str, family: str) -> None:
    model = models.tiny(family)
    batch = models.padded(models.rows((20, 3, 11, 17)), model.config.pad_token_id)
    rk.patch(model)
    with torch.inference_mode():
        with registry.use("cpu"):
            want = model(**batch).logits
        model.cuda()
        with registry.use(served_by):
            same(model(**{n: t.cuda() for n, t in batch.items()}).logits.cpu(), want, "logits on a GPU against the CPU")


def test_embeddings_and_their_scores(tmp_path: Path) -> None:
    """What PyTorch itself computes between our ops on a GPU: single sums, products, roots and quotients."""
    folder, tokenizer = tmp_path, models.tokenizer("bert")
    models.tiny("bert", head=False, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = [*models.CORPUS, "x"]
    pairs = [(text, texts[0]) for text in texts]
    with registry.use("cpu"):
        reranker = rk.Reranker(folder)
        want = torch.from_numpy(reranker.encode(texts)), torch.from_numpy(reranker.score(pairs).logit)
    reranker = rk.Reranker(folder, device="cuda")
    same(torch.from_numpy(reranker.encode(texts)), want[0], "embeddings")
    same(torch.from_numpy(reranker.score(pairs).logit), want[1], "scores")


@pytest.mark.exhaustive
def test_compute_sanitizer() -> None:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on PATH")
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = (tool, "--tool", check, "--error-exitcode", "9", sys.executable, gpu.__file__, "hash", "float32")
        done = process(*command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        assert done.returncode == 0, f"{check}: {done.stdout[-3000:]}{done.stderr[-1000:]}"
