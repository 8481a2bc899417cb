"""The triton backend against the cpu backend, bit for bit: Triton's own PTX for sm_80 and sm_90 in the simulator (ptxsim/).

All cases in several orders of blocks and threads with race and bounds checks on, every tile, real shapes, a whole model; what
the PTX may not hold; and mutants. The promises are tested where every backend's are, in test_<family>.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import cases
import contract
import invariants
import models
import rerank_kernels as rk
import tensor
from cases import Case, numbers, offsets
from conftest import ran
from invariants import all_same, same
from prefill import keys_in_a_cache, steps_against_prefill
from ptxsim.open_bits import open_bits
from rerank_kernels.backend import registry
from simulated import triton as simulated
from simulated.triton import Edit, simulated_triton

CASES = cases.CASES
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _triton() -> None:
    ran("triton")


def of_cpu(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    with registry.use("cpu"):
        return case.call(case.make_rows(dtype), case.make_shared(dtype))


# Triton compiles a kernel anew for every mix of dtypes and every architecture: minutes in all. `make test` takes float32.
in_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (torch.float16, torch.bfloat16))]
)
WAYS = (
    dict(arch=80, sched=1, race=True, lazy_async=True),
    dict(arch=90, sched=2, seed=7, race=True),
)


def test_same_bits_as_the_cpu(case: Case) -> None:
    """Blocks and threads backwards, copies at the last moment."""
    agree(case, torch.float32, WAYS[:1])


@pytest.mark.exhaustive
def test_same_bits_in_every_dtype_and_on_both_architectures(case: Case, dtype: torch.dtype) -> None:
    agree(case, dtype, WAYS)


def agree(case: Case, dtype: torch.dtype, ways: tuple[dict[str, Any], ...]) -> None:
    rows, shared, want = case.make_rows(dtype), case.make_shared(dtype), of_cpu(case, dtype)
    for how in ways:
        with simulated_triton(**how):
            all_same(case.call(rows, shared), want, f"{case}, triton {how} against cpu")


def both(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    with registry.use("cpu"):
        want = call()
    with simulated_triton():
        return call(), want


# ---- shapes, mixes, addresses


def tiles() -> list[int]:
    from rerank_kernels.backend.triton import linear

    return list(range(len(linear.TILES)))


@in_dtypes
def test_every_tile_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from rerank_kernels.backend.triton import linear

    for case in CASES:
        if case.op in ("linear", "score_head"):
            rows, shared, want = case.make_rows(dtype), case.make_shared(dtype), of_cpu(case, dtype)
            for tile in tiles():
                monkeypatch.setattr(linear, "force", tile)
                with simulated_triton(race=True, lazy_async=True):
                    all_same(case.call(rows, shared), want, f"{case}, tile {tile}")


@pytest.mark.parametrize("m", [1, pytest.param(5, marks=pytest.mark.exhaustive), 40])
@pytest.mark.parametrize(("k", "n"), [(768, 768), (768, 3072), (3072, 768), (1024, 1)])
def test_real_linear(m: int, k: int, n: int) -> None:
    x, w, b = numbers("x", (m, k), torch.float32), numbers("w", (n, k), torch.float32), numbers("b", (n,), torch.float32)
    same(*both(lambda: rk.linear(x, w, b, activation="gelu")), f"{m}x{k}x{n}")


@pytest.mark.parametrize("lengths", [(128,), (33, 1, 77), (200, 5), (1,) * 70])
def test_real_attention(lengths: tuple[int, ...]) -> None:
    q, k, v = (numbers(n, (sum(lengths), 12, 64), torch.float32) for n in "qkv")
    same(*both(lambda: rk.attention(q, k, v, cu_seqlens=offsets(lengths))), f"12 heads of 64, lengths {lengths}")


def test_decode_and_chunks_have_the_bits_of_the_prefill() -> None:
    with simulated_triton():
        steps_against_prefill()
        keys_in_a_cache(torch.float32)
    for model in (2, 3):
        with tensor.simulated("triton", model):
            steps_against_prefill(16, torch.float16, mode="tensor")
            keys_in_a_cache(torch.float16, mode="tensor")


@in_dtypes
def test_element_functions_over_all_exponents(dtype: torch.dtype) -> None:
    x = cases.every_exponent(dtype)
    for kind in cases.ACTIVATIONS:
        for arch in (80, 90):
            with registry.use("cpu"):
                want = rk.activation(x, kind)
            with simulated_triton(arch=arch):
                same(rk.activation(x, kind), want, f"{kind}, sm_{arch}")
    fall = torch.stack([x, torch.full_like(x, 3.0), -x], 1)
    same(*both(lambda: rk.softmax(fall)), "exp inside softmax")


@in_dtypes
@pytest.mark.parametrize("rows", [1, 7])
def test_few_rows_skip(rows: int, dtype: torch.dtype) -> None:
    for case in cases.of("sparse_ffn"):
        x, w = case.make_rows(dtype, rows), case.make_shared(dtype)
        before = len(simulated.used)
        same(*both(lambda case=case, x=x, w=w: case.call(x, w)[0]), f"{case}, {rows} rows")
        assert "active_kernel" in {program.kernel.name for program in simulated.used[before:]}


@pytest.mark.parametrize("rows", [2, 9])
def test_candidates(rows: int) -> None:
    """Few rows skip, many do not."""
    x, candidates = numbers("x", (rows, 33), torch.float32), numbers("c", (rows, 600), torch.float32) > 0.4
    gate, up, down = (numbers(n, s, torch.float32, 2.0**-3) for n, s in (("g", (600, 33)), ("u", (600, 33)), ("d", (20, 600))))
    for options in ({}, {"threshold": 0.25, "activation": "relu2", "up_activation": "relu"}):
        call = partial(rk.sparse_ffn, x, up, down, gate_weight=gate, candidates=candidates, **options)
        same(*both(call), f"{rows} rows, {options}")


@in_dtypes
def test_attention_of_a_fused_projection(dtype: torch.dtype) -> None:
    """q, k, v as slices of one tensor, more than 512 features, windows."""
    q, k, v = numbers("qkv", (50, 3, 2, 530), dtype).unbind(1)
    for options in ({}, {"window": (9, 2)}):
        same(*both(lambda o=options: rk.attention(q, k, v, cu_seqlens=offsets((40, 10)), **o)), f"fused, {options}")


@pytest.mark.exhaustive
def test_mixed_dtypes() -> None:
    for a in cases.DTYPES:
        for b in cases.DTYPES:
            x, w, r = numbers("x", (5, 70), a), numbers("w", (9, 70), b), numbers("r", (5, 9), b)
            same(*both(lambda x=x, w=w, r=r, b=b: rk.linear(x, w, w[:, 0], residual=r, out_dtype=b)), f"linear {a} {b}")
            g, s = numbers("g", (70,), b), numbers("s", (5, 70), b)
            same(*both(lambda x=x, g=g, s=s: rk.layer_norm(x, g, g, residual=s)), f"layer_norm {a} {b}")


@in_dtypes
def test_weights_at_an_odd_address(dtype: torch.dtype) -> None:
    x, flat = numbers("x", (6, 64), dtype), numbers("w", (1 + 48 * 64,), dtype)
    same(*both(lambda: rk.linear(x, flat[1:].view(48, 64))), "weight one element off")


# ---- mode tensor


def ways(case: Case, arch: int = 80) -> int:
    from rerank_kernels.backend.triton import attention, linear

    return len(attention.tensor_tiles(case.rows["q"][1], arch) if case.op == "attention" else linear.tensor_tiles(arch))


def forced(monkeypatch: pytest.MonkeyPatch, case: Case, way: int) -> None:
    from rerank_kernels.backend.triton import attention, linear

    monkeypatch.setattr(attention if case.op == "attention" else linear, "force", way)


# Triton compiles anew for every tile, dtype, window and address: `make test` takes these cases in float16
OF_EACH_KIND = ("linear-768x96-gelu-residual", "attention-D32-H4of1-T70-window=(7,3)")
in_halves = pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)])
tensor_cases = pytest.mark.parametrize(
    "tensor_case",
    [
        pytest.param(c, marks=[pytest.mark.exhaustive] * (str(c).removesuffix("-tensor") not in OF_EACH_KIND))
        for c in tensor.CASES
    ],
    ids=str,
)


@pytest.mark.parametrize("label", OF_EACH_KIND)
def test_the_promises_in_short(label: str) -> None:
    """test_tensor.py has them in full."""
    case = cases.in_tensor_mode(cases.get(label))
    with tensor.simulated("triton", 2, race=True):
        invariants.right(case, torch.float16)
    with tensor.simulated("triton", 2):
        invariants.batch_invariant(case, torch.float16)
        invariants.padding_invariant(case, torch.float16)


@in_halves
@tensor_cases
def test_every_tensor_tile_gives_the_same_bits(tensor_case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, want = tensor_case, {}
    rows, shared = case.make_rows(dtype), case.make_shared(dtype)
    for way in range(ways(case)):
        forced(monkeypatch, case, way)
        for model in tensor.MODELS:
            with tensor.simulated("triton", model, race=model == 0):
                got = case.call(rows, shared)
            all_same(got, want.setdefault(model, got), f"{case}, tile {way}, {tensor.MODELS[model]}")
    assert want


@in_halves
@pytest.mark.parametrize(("m", "k", "n"), [(5, 513, 17), (1, 70, 3), (3, 1100, 5)])
def test_the_tensor_chain_is_one(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    """Where an instruction adds by one fma after the other, so does the whole chain over K, with no second accumulator."""
    x, w = numbers("x", (m, k), dtype), numbers("w", (n, k), dtype)
    with tensor.simulated("triton"):
        got = rk.linear(x, w, out_dtype=torch.float32, mode="tensor")
    same(got, contract.dot(x, w, chunk=k), f"{m}x{k}x{n}")


def one_kind(case: Case, dtype: torch.dtype) -> None:
    """On Hopper wgmma over 64 rows and 16 k's, elsewhere mma.sync over 16 rows and 16 k's. How many columns one has is left to
    the tile: they are products of their own."""
    before, kernels = len(simulated.used), 0
    case.call(case.make_rows(dtype), case.make_shared(dtype))
    for program in simulated.used[before:]:
        if program.name.endswith("_tensor_kernel"):
            target = re.search(r"^\.target sm_(\d+)", program.ptx, re.MULTILINE)
            assert target is not None
            want = r"wgmma\.mma_async m64n\d+k16" if target[1] == "90" else r"mma\.sync m16n8k16"
            kinds = re.findall(r"\b(mma|wgmma|tcgen05)\.(\w+)\S*?\.(m\d+n\d+k\d+)\b", program.ptx)
            found = {f"{root}.{op} {shape}" for root, op, shape in kinds}
            assert found and all(re.fullmatch(want, f) for f in found), f"{case}: values differ from tile to tile: {found}"
            kernels += 1
    assert kernels


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.exhaustive) for a in (80, 120))])
@in_halves
@tensor_cases
def test_all_tiles_have_one_matrix_instruction(
    tensor_case: Case, arch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in range(ways(tensor_case, arch)):
        forced(monkeypatch, tensor_case, way)
        with simulated_triton(arch=arch, starts=False):
            one_kind(tensor_case, dtype)


def test_tensor_tiles_fit() -> None:
    """Hopper: 64 rows and four warps, or multiples, or Triton takes mma.sync. Every tile is chosen by some M and N."""
    from rerank_kernels.backend.triton import attention, linear

    for arch in (80, 86, 89, 90, 120):
        every = [*linear.tensor_tiles(arch), *(t for d in (16, 64, 128, 256) for t in attention.tensor_tiles(d, arch))]
        if arch == 90:
            assert all(t.rows % 64 == 0 and t.warps in (4, 8) for t in every)
        taken = {linear.choose_tensor(1, m, n, arch) for m in (1, 40, 300, 4096) for n in (96, 768, 3072, 8192)}
        assert taken == set(linear.tensor_tiles(arch))


def test_a_gpu_that_nobody_looked_at_has_no_mode_tensor() -> None:
    with (
        simulated_triton(arch=100, starts=False),
        pytest.raises(registry.BackendError, match=r"no mode 'tensor' for compute capability 10\.0.*backend 'cuda'"),
    ):
        rk.linear(torch.zeros(2, 16).half(), torch.zeros(2, 16).half(), mode="tensor")


@pytest.mark.parametrize("m", [1, 33])
def test_bmm_is_linear_of_each_pair(m: int) -> None:
    from rerank_kernels.backend.triton import linear

    with simulated_triton(race=True):
        for dtype, product, alone in (
            (torch.float32, linear.bmm, linear.linear),
            (torch.float16, linear.bmm_tensor, linear.linear_tensor),
        ):
            a, b = numbers("a", (3, m, 40), dtype), numbers("b", (3, 24, 40), dtype)
            want = torch.stack([alone(x, y, None, None, None, torch.float32) for x, y in zip(a, b, strict=True)])
            same(product(a, b, torch.float32), want, f"bmm of {m} rows, {dtype}")


def test_who_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton compiles for other GPUs nobody has looked at; old ones lack the instructions."""
    from rerank_kernels.backend import triton

    def missing() -> str | None:
        triton.missing.cache_clear()
        return triton.missing()

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (8, 0))[device])
    assert missing() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert missing() == "the kernels need compute capability 8.0, this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing() == "no GPU: torch.cuda.is_available() is False"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    said = missing()
    assert said is not None and "ROCm" in said and "AMD GPUs are not served" in said
    triton.missing.cache_clear()


# ---- what is compiled


def test_rows_are_not_compiled_in() -> None:
    """A number of rows is neither a constant nor a reason to compile again."""
    with simulated_triton():
        for call in (
            lambda m: rk.softmax(torch.zeros(m, 24)),
            lambda m: rk.layer_norm(torch.zeros(m, 24), torch.ones(24)),
            lambda m: rk.linear(torch.zeros(m, 24), torch.zeros(32, 24)),
        ):
            call(17)
            before = len(simulated.programs())
            for m in (5, 16, 32, 37):
                call(m)
            assert len(simulated.programs()) == before
        rk.softmax(torch.zeros(1, 24))
        assert len(simulated.programs()) == before


@in_dtypes
@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.exhaustive)])
def test_no_instruction_leaves_a_bit_open(arch: int, dtype: torch.dtype) -> None:
    """In portable. What a matrix instruction leaves open is looked at in test_all_tiles_have_one_matrix_instruction."""
    with simulated_triton(arch=arch):
        for case in CASES:
            widest = max(n for s in (*case.shared.values(), *case.rows.values()) for n in s)
            if widest <= (32 if case.op == "attention" else 600) and case.total < 200:
                case.call(case.make_rows(dtype), case.make_shared(dtype))
                if not case.lengths:
                    case.call(case.make_rows(dtype, 1), case.make_shared(dtype))
    seen = set()
    for key, program in simulated.programs().items():
        if key[1] == arch and not key[0].__module__.startswith("mutant") and not program.name.endswith("_tensor_kernel"):
            seen.add(program.kernel.name)
            assert open_bits(program.ptx, program.kernel.name) == {}, f"{program.kernel.name} for sm_{arch}"
            assert ".ftz" not in program.ptx
    kernels = {
        m
        for p in (ROOT / "rerank_kernels" / "backend" / "triton").glob("*.py")
        for m in re.findall(r"def (\w+_kernel)\(", p.read_text())
    }
    assert seen == {name for name in kernels if not name.endswith("_tensor_kernel")}


def test_constants_are_those_of_numerics_h() -> None:
    number = re.compile(r"-?0x[01]\.[0-9a-f]+p[+-]\d+")
    h, py = ((ROOT / p).read_text() for p in ("csrc/numerics.h", "rerank_kernels/backend/triton/numerics.py"))
    ours = {float.fromhex(n) for n in number.findall(py)}
    assert {float.fromhex(n) for n in number.findall(h)} - {0.5} == ours


def test_the_kernels_did_run() -> None:
    """That the comparisons above are not one of the cpu with itself."""
    before = len(simulated.used)
    with simulated_triton():
        rk.softmax(torch.zeros(3, 5))
    assert [program.kernel.name for program in simulated.used[before:]] == ["softmax_kernel"]


# ---- end to end


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_whole_model(family: str) -> None:
    model = models.tiny(family)
    batch = models.padded(models.rows((70, 3, 11, 17)), model.config.pad_token_id)
    rk.patch(model)
    with torch.inference_mode():
        got, want = both(lambda: model(**batch).logits)
    same(got, want, "logits, triton against cpu")
    assert len(set(want.flatten().tolist())) == 4


# ---- mutants: what would break a promise, and what sees it


def bits(case: Case, dtype: torch.dtype) -> None:
    all_same(case.call(case.make_rows(dtype), case.make_shared(dtype)), of_cpu(case, dtype), f"{case}, triton against cpu")


def no_open_bits(case: Case, dtype: torch.dtype) -> None:
    """On the text: the simulator's own division is exact, whatever the PTX asks for."""
    before = len(simulated.used)
    case.call(case.make_rows(dtype), case.make_shared(dtype))
    for program in simulated.used[before:]:
        assert open_bits(program.ptx, program.kernel.name) == {}, f"{program.kernel.name}: values differ from GPU to GPU"


CAUSAL = "attention-D64-H4of2-T70-causal=True"
MUTANTS: dict[str, tuple[Edit, str, Callable[[Case, torch.dtype], None]]] = {
    "TF32 allowed": (
        Edit("linear.py", 'input_precision="ieee"', 'input_precision="tf32"'),
        "linear-513x17-gelu",
        bits,
    ),
    "Triton's own precision": (
        Edit("linear.py", ', input_precision="ieee"', ""),
        "linear-768x96-gelu-residual",
        bits,
    ),
    "products and sums may fuse": (
        Edit("launch.py", '"enable_fp_fusion": False', '"enable_fp_fusion": True'),
        "attention-D8-H2of2-T70",
        bits,
    ),
    "Triton's exp": (
        Edit("softmax.py", "exp_of_negative(v - top)", "tl.exp(v - top)"),
        "softmax-100",
        bits,
    ),
    "Triton's division": (
        Edit("softmax.py", "tl.div_rn(e, tl.broadcast_to(total, (ROWS, LANES)))", "(e / total)"),
        "softmax-100",
        no_open_bits,
    ),
    "neighbours fold first": (
        Edit("numerics.py", "(ROWS, 2, HALF)), (0, 2, 1)", "(ROWS, HALF, 2)), (0, 1, 2)"),
        "layer_norm-768",
        bits,
    ),
    "no chunks": (
        Edit("linear.py", "CHUNK):", "CHUNK * 4):"),
        "linear-1536x24-float32",
        bits,
    ),
    "K compiled in": (
        Edit("linear.py", "K: tl.int32", "K"),
        "linear-1x1",
        bits,
    ),
    "K is split by M": (
        Edit("linear.py", "range(0, K, CHUNK)", "range(0, K, CHUNK if BM > 1 else CHUNK // 2)"),
        "linear-768x96-gelu-residual",
        invariants.batch_invariant,
    ),
    "a hidden key is multiplied by zero": (
        Edit("attention.py", "axis=1), axis=0) != 0:", "axis=1), axis=0) > 1:"),
        CAUSAL,
        invariants.hidden_keys,
    ),
    "a mask off by one": (
        Edit("attention.py", "(j - place <= right)", "(j - place < right + 2)"),
        CAUSAL,
        bits,
    ),
    "queries are the first ones of their keys, not the last": (
        Edit("attention.py", "place = i + (length - rows)", "place = i"),
        "attention-D16-H4of2-T1of70-causal=True",
        bits,
    ),
    "a column beyond the last": (
        Edit("linear.py", "there = (m < M) & (n < N)", "there = (m < M) & (n <= N)"),
        "linear-513x17-gelu",
        bits,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    edit, case, check = MUTANTS[name]
    with simulated_triton(race=True):
        check(cases.get(case), torch.float32)
    with (
        simulated_triton(race=True, edit=edit),
        pytest.raises((AssertionError, RuntimeError), match=r"values differ|outside|bounds"),
    ):
        check(cases.get(case), torch.float32)


def one_chain(case: Case, dtype: torch.dtype) -> None:
    x, w = case.make_rows(dtype)["x"], case.make_shared(dtype)["weight"]
    got = rk.linear(x, w, out_dtype=torch.float32, mode="tensor")
    same(got, contract.dot(x, w, chunk=x.shape[1]), f"{case}, the chain")


# Where they are run, and what sees them; the first is not seen by any number of one GPU's, but in the text.
WINDOW = "attention-D32-H4of1-T70-window=(7,3)"
HOPPER: dict[str, Any] = {"arch": 90, "starts": False}
TENSOR_MUTANTS: dict[str, tuple[Edit, str, dict[str, Any], Callable[[Case, torch.dtype], None]]] = {
    "few rows leave wgmma for mma.sync": (
        Edit("linear.py", "LinearTensorTile(64, 32, 4, 6)", "LinearTensorTile(16, 32, 4, 6)"),
        "linear-512x16",
        HOPPER,
        one_kind,
    ),
    "every step has an accumulator of its own": (  # the halves keep Triton from making one chain of it
        Edit("linear.py", "tl.dot(a, b, total)", "(total * 0.5 + tl.dot(a, b) * 0.5) * 2.0"),
        "linear-512x16",
        {},
        one_chain,
    ),
    "the accumulator is half precision": (
        Edit("linear.py", "tl.dot(a, b, total)", "tl.dot(a, b, total.to(tl.float16), out_dtype=tl.float16).to(tl.float32)"),
        "linear-768x96-gelu-residual",
        {"mma": 2},
        invariants.right,
    ),
    "a sequence alone goes over its keys backwards": (
        Edit(
            "attention.py",
            "for key in tl.range(whole, whole_end, KEYS):",
            "for at in tl.range(whole, whole_end, KEYS):\n        key = tl.where(B == 1, whole_end - KEYS - at + whole, at)",
        ),
        "attention-D16-H2of1-T600-causal=True",
        {"mma": 2},
        invariants.batch_invariant,
    ),
    "values beyond the sequence are read": (
        Edit("attention.py", "value = tl.load(at, mask=(j < length)[:, None], other=0.0)", "value = tl.load(at)"),
        WINDOW,
        {"mma": 2},
        invariants.batch_invariant,
    ),
    "a mask off by one": (
        Edit("attention.py", "place + right, length - 1) if", "place + right + 1, length - 1) if"),
        WINDOW,
        {"mma": 2},
        invariants.right,
    ),
}


@pytest.mark.parametrize("name", TENSOR_MUTANTS)
def test_tensor_mutant_is_caught(name: str) -> None:
    edit, label, how, check = TENSOR_MUTANTS[name]
    case = cases.in_tensor_mode(cases.get(label))
    with simulated_triton(**how):
        check(case, torch.float16)
    with (
        simulated_triton(edit=edit, **how),
        pytest.raises((AssertionError, RuntimeError), match=r"values differ|beyond the bound|outside|bounds"),
    ):
        check(case, torch.float16)
