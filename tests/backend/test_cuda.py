"""The CUDA backend against the cpu backend, bit for bit, in the simulator (ptxsim/): all cases in several orders of blocks and
threads with race and bounds checks on, real shapes, every way of every launcher, a whole encoder layer, a whole model.

In mode tensor no other backend has the same bits: there the ways are compared with each other, and linear and bmm with the
order that NUMERICS.md writes out.

The promises are tested where every backend's are, in test_<family>.py and test_tensor.py; what must be caught here is in
test_cuda_mutants.py and test_tensor_mutants.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cases
import contract
import models
import rerank_kernels as rk
import tensor
from cases import Case, numbers, offsets
from conftest import ran
from invariants import all_same, same
from rerank_kernels.backend import registry
from rerank_kernels.backend.native import linear as native

simulated = pytest.importorskip("simulated.cuda")
CASES = cases.CASES
SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").rglob("*.cu"))


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
    """Blocks and threads backwards, copies at the last moment, races and bounds looked for.

    Other orders of all rows are test_thread_invariant's, of the same cases in test_<family>.py. Few rows are another matter,
    with other launch shapes and sparse_ffn's sparse way: they get both schedules here.
    """
    shared, every = case.make_shared(dtype), case.make_rows(dtype)
    few = [] if case.lengths else [({n: t[:3] for n, t in every.items()}, SCHEDULES)]
    for rows, schedules in [(every, SCHEDULES[:1]), *few]:
        with registry.use("cpu"):
            want = case.call(rows, shared)
        for how in schedules:
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


@pytest.mark.parametrize(
    ("m", "k", "n"), [(128, 1040, 256), (130, 513, 129), (257, 40, 140), (1, 5, 3), (33, 1030, 7), (5, 16, 128)]
)
def test_large_tiles_at_their_edges(m: int, k: int, n: int) -> None:
    """The 128 x 128 tile, whole and split: several of them, rows, columns and k that end inside, every mix of dtypes, and
    operands that begin one element off, between NaNs."""

    def within(t: torch.Tensor) -> torch.Tensor:
        around = torch.cat([t.new_full((1,), torch.nan), t.flatten(), t.new_full((1000,), torch.nan)])
        return around[1 : 1 + t.numel()].view(t.shape)

    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for of_x, of_w in ((f32, f32), (f16, f16), (bf16, f32), (f32, f16)):
        x, w, b = numbers("x", (m, k), of_x), numbers("w", (n, k), of_w), numbers("b", (n,), f32)
        for args in ((x, w, b), (within(x), within(w), within(b))):
            with registry.use("cpu"):
                want = rk.linear(*args, activation="silu", out_dtype=f32)
            for way in (0, 1):
                with simulated.simulated(race=True, sched=1 + way, seed=3), simulated.forced("linear", way):
                    got = rk.linear(*args, activation="silu", out_dtype=f32)
                same(got, want, f"{m}x{k}x{n}, {of_x} and {of_w}, way {way}")


def test_element_functions_over_all_exponents() -> None:
    x = cases.every_exponent(torch.float32)
    for kind in cases.ACTIVATIONS:
        same(*both(lambda kind=kind: rk.activation(x, kind)), kind)
    same(*both(lambda: rk.softmax(torch.stack([x, torch.full_like(x, 3.0), -x], 1))), "exp inside softmax")


@pytest.mark.parametrize("lengths", [(128,), (33, 1, 77), (200, 5)])
def test_real_attention(lengths: tuple[int, ...]) -> None:
    q, k, v = (numbers(n, (sum(lengths), 12, 64), torch.float32) for n in "qkv")
    same(*both(lambda: rk.attention(q, k, v, cu_seqlens=offsets(lengths))), f"12 heads of 64, lengths {lengths}")


def test_real_sparse_ffn(dtype: torch.dtype) -> None:
    x = numbers("x", (1, 4096), dtype)
    gate, up, down = (numbers(n, s, dtype, 2.0**-6) for n, s in (("g", (700, 4096)), ("u", (700, 4096)), ("d", (4096, 700))))
    same(*both(lambda: rk.sparse_ffn(x, up, down, gate_weight=gate)), "one token")


# ---- every way of every launcher


MADE_OF = {"score_head": "linear", "bmm": "linear"}  # ops whose launcher is another's
MADE_OF_TENSOR = {"bmm": "linear", "sparse_ffn": "linear"}
ALL_LAUNCHERS = sorted({n for p in SOURCES for n in re.findall(r'Choice \w+[{(]"(\w+)"', p.read_text())})
LAUNCHERS = [n for n in ALL_LAUNCHERS if not n.endswith("_tensor")]


def test_the_launchers_with_several_ways_are_known() -> None:
    assert sorted(simulated.launchers()) == ALL_LAUNCHERS


@pytest.mark.parametrize(  # float16 and bfloat16 differ in two conversions, which the cases above hold
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)],
    ids=lambda d: str(d)[6:],
)
@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_every_way_of_a_launcher_gives_the_same_bits(kernel: str, dtype: torch.dtype) -> None:
    for case in CASES:
        if MADE_OF.get(case.op, case.op) == kernel:
            rows, shared, want = case.make_rows(dtype), case.make_shared(dtype), of_cpu(case, dtype)
            for way in range(simulated.launchers()[kernel]):
                with simulated.simulated(race=True, lazy_async=True), simulated.forced(kernel, way):
                    all_same(case.call(rows, shared), want, f"{case}, {kernel} way {way}")


@pytest.mark.parametrize(
    "half", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=["f16", "bf16"]
)
@pytest.mark.parametrize(
    "kernel",  # attention's ways, in fewer cases and more models, are in test_tensor_attention.py
    [
        pytest.param(kernel, marks=[pytest.mark.exhaustive] * (kernel == "attention_tensor"))
        for kernel in sorted(set(ALL_LAUNCHERS) - set(LAUNCHERS))
        if "_hopper_" not in kernel  # test_hopper_*.py
    ],
)
def test_every_way_of_a_tensor_launcher_gives_the_same_bits(kernel: str, half: torch.dtype) -> None:
    """The ways issue the same matrix instructions for an output: shown with tensor cores that cut off what they add, and with
    such as add backwards."""
    for case in tensor.CASES:
        if f"{MADE_OF_TENSOR.get(case.op, case.op)}_tensor" == kernel:
            rows, shared = case.make_rows(half), case.make_shared(half)
            for model, how in ((2, dict(race=True, sched=2)), (3, dict(sched=1))):
                with tensor.simulated("cuda", model):
                    want = case.call(rows, shared)
                for way in range(simulated.launchers()[kernel]):
                    with tensor.simulated("cuda", model, **how), simulated.forced(kernel, way):
                        all_same(case.call(rows, shared), want, f"{case}, {kernel} way {way}, tensor cores: {model}")


# ---- mode tensor: the order, as NUMERICS.md writes it out


def in_sixteens(x: torch.Tensor) -> torch.Tensor:
    """Every 16 k turned round, the last 16 after they were filled up with zeros: an ascending chain over that is what a matrix
    instruction of 16 k gives that adds its products backwards, and no instruction of another width."""
    filled = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16))
    return filled.view(len(x), -1, 16).flip(-1).view(len(x), -1)


def chain(x: torch.Tensor, w: torch.Tensor, model: int) -> torch.Tensor:
    a, b = (in_sixteens(x), in_sixteens(w)) if model == 3 else (x, w)
    return contract.dot(a, b, chunk=a.shape[-1])


@pytest.mark.parametrize("model", [0, 3])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 768, 768), (5, 3072, 96), (40, 768, 100), (150, 64, 300), (17, 1, 9), (9, 15, 1), (33, 530, 65)]
)
def test_tensor_linear_is_one_chain_of_sixteens(m: int, k: int, n: int, model: int) -> None:
    for half in tensor.HALVES:
        x, w = numbers("x", (m, k), half), numbers("w", (n, k), half)
        want = chain(x, w, model)
        with tensor.simulated("cuda", model):
            same(rk.linear(x, w, out_dtype=torch.float32, mode="tensor"), want, f"{m}x{k}x{n}, {half}, tensor cores: {model}")


@pytest.mark.parametrize("way", range(6))
@pytest.mark.parametrize(("k", "n"), [(96, 48), (70, 33), (200, 64)])
def test_tensor_linear_at_odd_addresses_between_nans(k: int, n: int, way: int) -> None:
    """Operands that begin 2 bytes off any boundary, and NaN right before and after each of them."""

    def within(t: torch.Tensor) -> torch.Tensor:
        around = torch.cat([t.new_full((1,), torch.nan), t.flatten(), t.new_full((1000,), torch.nan)])
        return around[1 : 1 + t.numel()].view(t.shape)

    x, w, b, r = (numbers(name, s, torch.bfloat16) for name, s in (("x", (21, k)), ("w", (n, k)), ("b", (n,)), ("r", (21, n))))
    with tensor.simulated("cuda", 2, race=True), simulated.forced("linear_tensor", way):
        want = rk.linear(x, w, b, activation="silu", residual=r, mode="tensor")
        same(rk.linear(within(x), within(w), within(b), activation="silu", residual=within(r), mode="tensor"), want, "all")
        for i in range(4):
            one = [within(t) if i == j else t for j, t in enumerate((x, w, b, r))]
            same(rk.linear(one[0], one[1], one[2], activation="silu", residual=one[3], mode="tensor"), want, f"argument {i}")


@pytest.mark.parametrize(
    ("batch", "m", "k", "n"), [(3, 5, 40, 7), (2, 40, 600, 33), (5, 1, 64, 64), (0, 4, 8, 8), (2, 0, 8, 8)]
)
def test_bmm_is_linear_entry_by_entry(batch: int, m: int, k: int, n: int) -> None:
    """In both modes, with every way forced."""
    for kernel, half in (("linear", torch.float32), ("linear", torch.float16), ("linear_tensor", torch.bfloat16)):
        a, b = numbers("a", (batch, m, k), half), numbers("b", (batch, n, k), half)
        ops = torch.ops.rerank_kernels
        serve, single = (ops.bmm, native.linear) if kernel == "linear" else (ops.bmm_tensor, native.linear_tensor)
        for way in range(-1, simulated.launchers()[kernel]):
            with tensor.simulated("cuda", 3, race=True), simulated.forced(kernel, way):
                got = serve(a, b, torch.float32)
                assert got.shape == (batch, m, n)
                for i in range(batch):
                    same(got[i], single(a[i], b[i], None, None, None, torch.float32), f"{kernel} way {way}, entry {i}")


@pytest.mark.parametrize("half", tensor.HALVES, ids=lambda d: str(d)[6:])
def test_tensor_sparse_ffn_of_few_rows_and_of_many(half: torch.dtype) -> None:
    """Few rows skip what is inactive, many do not. Terms that cancel leave nothing in the first product but what was lost in
    rounding: another order of its sum is not another last bit but other neurons.
    """
    u, v, turned = numbers("u", (20, 100), half), numbers("v", (70, 100), half), torch.arange(100) * 37 % 100
    x, w = torch.cat([u, u[:, turned]], 1), torch.cat([v, -v[:, turned]], 1)
    other, down = numbers("o", w.shape, half), numbers("d", (9, 70), half, 2.0**10)
    for gate in (None, w):
        up = w if gate is None else other
        with tensor.simulated("cuda", 2):
            many = rk.sparse_ffn(x, up, down, gate_weight=gate, mode="tensor")
            assert many.count_nonzero() > many.numel() / 2
            for start, stop in ((0, 1), (1, 3), (13, 20)):
                few = rk.sparse_ffn(x[start:stop], up, down, gate_weight=gate, mode="tensor")
                same(few, many[start:stop], f"rows {start}:{stop}, {'no gate' if gate is None else 'gate'}")


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


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "phi3", "gemma2", "gemma3"])
def test_a_whole_decoder(kind: str) -> None:
    """A prompt and one token more from the cache; rotary of all features and of some, windows, gated feed-forward layers, one
    matrix for several, offset norms, norms behind branches, a cap."""
    model, ids = models.decoder(kind), torch.stack(models.rows((40, 40)))
    rk.patch(model)

    def call() -> torch.Tensor:
        out = model(input_ids=ids[:, :39])
        (cache,) = (value for name, value in out.items() if name != "logits")  # its name differs between versions
        return torch.cat([out.logits, model(input_ids=ids[:, 39:], past_key_values=cache).logits], 1)

    with torch.inference_mode():
        same(*both(call), "logits, cuda against cpu")


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
