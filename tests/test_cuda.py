"""The CUDA backend against the cpu backend, bit for bit, in the simulator (ptxsim/): all cases in several orders of blocks and
threads with race and bounds checks on, real shapes, every way of every launcher, a whole encoder layer, a whole model.

The promises are tested where every backend's are, in test_<family>.py; what must be caught here is in test_cuda_mutants.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cases
import models
import rerank_kernels as rk
from cases import Case, numbers, offsets
from conftest import ran
from invariants import all_same, same
from rerank_kernels import backend as registry

simulated = pytest.importorskip("ptxsim.simulated")
CASES = cases.CASES
SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").rglob("*.cu"))


@pytest.fixture(autouse=True)
def _cuda() -> None:
    ran("cuda")


def of_cpu(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    with registry.use("cpu"):
        return case.call(case.make_rows(dtype), case.make_shared(dtype))


SCHEDULES = (
    dict(sched=1, race=True, lazy_async=True),
    dict(sched=2, seed=7, race=True),
)


def test_same_bits_as_the_cpu(case: Case, dtype: torch.dtype) -> None:
    """Blocks and threads backwards and at random; copies at once and at the last moment; races and bounds looked for."""
    shared, every = case.make_shared(dtype), case.make_rows(dtype)
    # few rows are another matter: other launch shapes, and sparse_ffn's sparse way
    for rows in (every,) if case.lengths else (every, {n: t[:3] for n, t in every.items()}):
        with registry.use("cpu"):
            want = case.call(rows, shared)
        for how in SCHEDULES:
            before = len(simulated.launched)
            with simulated.simulated(**how):
                all_same(case.call(rows, shared), want, f"{case}, cuda {how} against cpu")
            assert len(simulated.launched) > before, "no kernel ran: the cpu backend was compared with itself"


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["90", "120"])
def test_same_bits_on_other_architectures(arch: str, case: Case, dtype: torch.dtype) -> None:
    """nvcc's PTX for Hopper and for consumer Blackwell."""
    rows, shared, want = case.make_rows(dtype), case.make_shared(dtype), of_cpu(case, dtype)
    with simulated.simulated(arch=arch):
        all_same(case.call(rows, shared), want, f"{case}, cuda compute_{arch} against cpu")


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(5))
def test_same_bits_in_other_orders(seed: int, case: Case, dtype: torch.dtype) -> None:
    rows, shared, want = case.make_rows(dtype), case.make_shared(dtype), of_cpu(case, dtype)
    with simulated.simulated(sched=2, seed=100 + seed, lazy_async=bool(seed % 2)):
        all_same(case.call(rows, shared), want, f"{case}, random order {seed} against cpu")


# ---- real shapes: one layer's matrices and heads of bge-reranker-base, and of ReluLLaMA cut to a few neurons


def both(call) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    with registry.use("cpu"):
        want = call()
    with simulated.simulated():
        return call(), want


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize(("k", "n"), [(768, 768), (768, 3072), (3072, 768), (1024, 1)])
def test_real_linear(m: int, k: int, n: int) -> None:
    x, w, b = numbers("x", (m, k), torch.float32), numbers("w", (n, k), torch.float32), numbers("b", (n,), torch.float32)
    same(*both(lambda: rk.linear(x, w, b, activation="gelu")), f"{m}x{k}x{n}")


@pytest.mark.parametrize("lengths", [(128,), (33, 1, 77), (200, 5)])
def test_real_attention(lengths: tuple[int, ...]) -> None:
    q, k, v = (numbers(n, (sum(lengths), 12, 64), torch.float32) for n in "qkv")
    same(*both(lambda: rk.attention(q, k, v, cu_seqlens=offsets(lengths))), f"12 heads of 64, lengths {lengths}")


def test_real_sparse_ffn(dtype: torch.dtype) -> None:
    x = numbers("x", (1, 4096), dtype)
    gate, up, down = (numbers(n, s, dtype, 2.0**-6) for n, s in (("g", (700, 4096)), ("u", (700, 4096)), ("d", (4096, 700))))
    same(*both(lambda: rk.sparse_ffn(x, up, down, gate_weight=gate)), "one token")


# ---- every way of every launcher


MADE_OF = {"score_head": "linear"}  # ops whose launcher is another's
LAUNCHERS = sorted({n for p in SOURCES for n in re.findall(r'Choice \w+[{(]"(\w+)"', p.read_text())})


def test_the_launchers_with_several_ways_are_known() -> None:
    assert sorted(simulated.launchers()) == LAUNCHERS


@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_every_way_of_a_launcher_gives_the_same_bits(kernel: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if MADE_OF.get(case.op, case.op) == kernel:
            rows, shared, want = case.make_rows(dtype), case.make_shared(dtype), of_cpu(case, dtype)
            for way in range(simulated.launchers()[kernel]):
                with simulated.simulated(race=True, lazy_async=True), simulated.forced(kernel, way):
                    all_same(case.call(rows, shared), want, f"{case}, {kernel} way {way}")


# ---- end to end


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_whole_model(family: str) -> None:
    """Text ids in, logits out: every kernel of a patched model, in one batch with padding."""
    model = models.tiny(family)
    batch = models.padded(models.rows((70, 3, 11, 17)), model.config.pad_token_id)
    rk.patch(model)
    with torch.inference_mode():
        got, want = both(lambda: model(**batch).logits)
    same(got, want, "logits, cuda against cpu")
    assert len(set(want.flatten().tolist())) == 4


@pytest.mark.parametrize("lengths", [(14, 6), pytest.param((200, 130, 3), marks=pytest.mark.exhaustive)])
def test_a_layer_of_bge_reranker_base(lengths: tuple[int, ...]) -> None:
    """768 wide, 12 heads, 3072 between: real sizes, short sequences."""
    model = models.tiny(
        "xlm-roberta",
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=3072,
        num_hidden_layers=1,
        max_position_embeddings=514,
    )
    batch = models.padded(models.rows(lengths), model.config.pad_token_id)
    rk.patch(model)
    with torch.inference_mode():
        same(*both(lambda: model(**batch).logits), "logits, cuda against cpu")


def test_the_kernels_did_run() -> None:
    """That the comparison above is not one of the cpu with itself."""
    before = len(simulated.launched)
    with simulated.simulated():
        rk.softmax(torch.zeros(3, 5))
    assert [name for name, *_ in simulated.launched[before:] if "softmax" in name]
