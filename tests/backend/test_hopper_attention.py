"""Attention of mode tensor on a Hopper, in the simulator: csrc/cuda/sm90/attention.cu, whose every way gives the bits of
csrc/cuda/sm80/attention.cu, as nvcc compiled both, and those of contract.py.

Tensor cores add as an H100's (model 2), and as such that add backwards (model 3). The mutants stand at the end: each line
broken there must be caught by what is named beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import contract
import hopper
import tensor
from cases import numbers, offsets
from conftest import ran, require
from hopper import HALF, Check, Edit, Mutant, kernels, odd, on_hopper, simulated
from invariants import same
from prefill import keys_in_a_cache, steps_against_prefill
from ptxsim.program import Kernel
from rerank_kernels.backend import library
from rerank_kernels.backend.plan import cuda_attention
from rerank_kernels.ops.attention import attention

LAUNCHER = "attention_hopper_tensor"
NAN, INF = float("nan"), float("inf")
WAYS = range(2)  # 0: three warpgroups of 64 rows (two for heads of 128) and one that fetches; 1: one, which fetches for itself
every_way = functools.partial(hopper.every_way, launcher=LAUNCHER, ways=WAYS, kernel="attention_wgmma")


@pytest.fixture(autouse=True)
def _cuda() -> None:
    ran("cuda")


def packed(lengths: tuple[int, ...], heads: tuple[int, int], d: int, dtype: torch.dtype = HALF) -> dict[str, Tensor]:
    total, (h, h_kv) = sum(lengths), heads
    sizes = {"q": (total, h, d), "k": (total, h_kv, d), "v": (total, h_kv, d)}
    return {**{name: numbers(name, size, dtype) for name, size in sizes.items()}, "cu_seqlens": offsets(lengths)}


def test_the_ways_are_known() -> None:
    assert simulated.launchers()[LAUNCHER] == len(WAYS)


# Edges of tiles, of warps, of warpgroups and of blocks; no keys at all; windows whose rows see no key of a tile; scores that
# are scaled before they are compared, and such as are capped.
SHAPES: list[tuple[tuple[int, ...], tuple[int, int], int, dict[str, Any]]] = [
    ((0, 1, 63, 64, 65, 0, 130), (4, 2), 64, {}),
    ((1, 129, 40), (3, 1), 64, {"causal": True}),
    ((200, 300), (2, 2), 64, {"window": (70, 3)}),
    ((90, 150), (1, 1), 64, {"window": (20, 20), "softcap": 1.5}),
    ((33, 260), (2, 1), 128, {}),
    ((150, 129), (1, 1), 128, {"window": (64, 64)}),
    ((17, 140), (2, 2), 128, {"causal": True, "scale": -0.3}),
]


@pytest.mark.parametrize("dtype", tensor.HALVES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("lengths", "heads", "d", "options"), SHAPES, ids=lambda v: str(v) if isinstance(v, int) else "")
def test_every_way_gives_the_bits_of_mma_sync(
    lengths: tuple[int, ...], heads: tuple[int, int], d: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    rows = packed(lengths, heads, d, dtype)
    for model in (tensor.H100, 3) if dtype == HALF else (tensor.H100,):
        every_way(lambda: attention(**rows, mode="tensor", **options), f"{lengths}, {heads}, {options}", model)


def test_round_the_stages() -> None:
    """Five tiles: each stage is filled three times."""
    for d in (64, 128):
        rows = packed((600, 130), (1, 1), d)
        every_way(lambda rows=rows: attention(**rows, mode="tensor"), f"five tiles, heads of {d}")


@pytest.mark.parametrize("sched", [1, 2])
def test_whatever_the_order_of_the_warps(sched: int) -> None:
    rows = packed((300, 130), (2, 1), 64)
    for seed in range(2):
        every_way(lambda: attention(**rows, mode="tensor"), f"sched {sched}, seed {seed}", sched=sched, seed=seed)


@pytest.mark.parametrize("d", [64, 128])
def test_the_bits_are_those_of_the_contract(d: int) -> None:
    rows, scale = packed((140,), (1, 1), d), d**-0.5
    c, least = weighing(scale)
    want = contract.attention_tensor(*(rows[name][:, 0] for name in "qkv"), scale, (c, least, False), left=60)
    for way in WAYS:
        with on_hopper(), simulated.forced(LAUNCHER, way):
            same(attention(**rows, window=(60, -1), mode="tensor")[:, 0], want, f"heads of {d}, way {way}")


def weighing(scale: float) -> tuple[float, float]:
    """c and least, as NUMERICS.md has them."""
    c = float(torch.tensor(float(torch.tensor(scale)) * 1.4426950408889634, dtype=torch.float64).float())
    least = torch.tensor(-127.0 / c)
    while float(least.double()) * c < -127.0:
        least = torch.nextafter(least, torch.tensor(0.0))
    while float(torch.nextafter(least, torch.tensor(-INF)).double()) * c >= -127.0:
        least = torch.nextafter(least, torch.tensor(-INF))
    return c, float(least)


# ---- what is not finite


@pytest.mark.parametrize("d", [64, 128])
def test_sequences_beside_it_may_hold_anything(d: int) -> None:
    """TMA reads whole tiles, and behind a sequence stand its neighbour's tokens, all NaN or all infinite."""
    for n, bad in ((1, NAN), (16, INF), (63, NAN), (127, NAN), (128, -INF), (129, NAN), (250, INF)):
        alone = packed((n,), (2, 2), d)
        around = torch.full((70, 2, d), bad, dtype=HALF)
        beside = {name: torch.cat([around, alone[name], around]) for name in "qkv"}
        for way in WAYS:
            with on_hopper(), simulated.forced(LAUNCHER, way):
                want = attention(**alone, mode="tensor")
                got = attention(**beside, cu_seqlens=offsets((70, n, 70)), mode="tensor")
            assert want.isfinite().all()
            same(got[70 : 70 + n], want, f"length {n} between sequences of {bad}, way {way}")
            assert got[:70].isnan().all() and got[70 + n :].isnan().all()


def test_what_a_row_sees_reaches_it_and_nothing_else() -> None:
    """NaN in a key reaches every row that sees it, and no other; a value that is not finite may reach the 64 rows of a
    warpgroup of which one sees one of the value's 128 keys."""
    n, token, window = 400, 140, (20, 9)
    rows, i = packed((n,), (2, 2), 64), torch.arange(n)
    sees = (token >= i - window[0]) & (token <= i + window[1])
    for way in WAYS:
        with on_hopper(race=False), simulated.forced(LAUNCHER, way):
            clean = attention(**rows, window=window, mode="tensor")
            for bad in (NAN, INF):
                k = rows["k"].clone()
                k[token, 0] = bad
                got = attention(**{**rows, "k": k}, window=window, mode="tensor")
                assert bad == bad or got[sees, 0].isnan().all()
                same(got[~sees, 0], clean[~sees, 0], f"{bad} in a key, rows that do not see it, way {way}")
                same(got[:, 1], clean[:, 1], f"{bad} in a key, the other head, way {way}")
                v = rows["v"].clone()
                v[token, 1, 5] = bad
                got = attention(**{**rows, "v": v}, window=window, mode="tensor")
                assert not got[sees, 1, 5].isfinite().any()
                # keys 128 to 255 are seen by rows 119 to 275, which lie in the sixty-fours from 64 to 319
                far = (i < 64) | (i >= 320)
                same(got[:, 1][far], clean[:, 1][far], f"{bad} in a value, way {way}")
                rest = torch.arange(64) != 5
                same(got[:, 1][:, rest], clean[:, 1][:, rest], f"{bad} in a value, other features, way {way}")
            assert attention(**{**rows, "q": rows["q"] * NAN}, mode="tensor").isnan().all()


def test_quotients_of_any_size() -> None:
    """Sums that are zero, subnormal or infinite, where a corrected product is no quotient; and scores that are so."""
    rows = packed((70,), (2, 2), 64, torch.bfloat16)
    for what, factor in (("zeros", 0.0), ("tiny", 2.0**-130), ("small", 2.0**-66), ("large", 2.0**70), ("huge", 2.0**127)):
        v = rows["v"].clone()
        v[:, 1] *= factor
        v[:, 0, ::2] *= factor
        every_way(lambda v=v: attention(**{**rows, "v": v}, mode="tensor"), f"values that are {what}")
    wild = {name: rows[name] * 1e30 for name in "qk"}
    every_way(lambda: attention(**{**rows, **wild}, mode="tensor"), "scores beyond the largest float32")
    assert every_way(lambda: attention(**{**rows, "q": rows["q"] * INF}, mode="tensor"), "infinite scores").isnan().all()


# ---- keys of other lengths, strides


@pytest.mark.parametrize("d", [64, 128])
def test_decode_and_chunks_have_the_bits_of_the_prefill(d: int) -> None:
    for way in WAYS:
        with on_hopper(), simulated.forced(LAUNCHER, way):
            kernels()
            steps_against_prefill(d, HALF, mode="tensor")
        assert all("attention_wgmma" in name for name in kernels())


def test_keys_that_lie_anywhere() -> None:
    """In a cache the tokens of a head lie side by side: TMA's map has the heads last."""
    for way in WAYS:
        with on_hopper(), simulated.forced(LAUNCHER, way):
            kernels()
            keys_in_a_cache(torch.bfloat16, d=64, mode="tensor")
        assert all("attention_wgmma" in name for name in kernels())


def test_what_tma_cannot_take_is_the_other_rooms_with_the_same_bits() -> None:
    n, cu = 70, offsets((65, 5))
    q, k, v = numbers("qkv", (n, 3, 4, 64), HALF).unbind(1)
    k, v = k[:, ::2], v[:, ::2]
    plain = q.contiguous(), k.contiguous(), v.contiguous()
    with tensor.simulated("cuda", tensor.H100):
        want = attention(*plain, cu_seqlens=cu, mode="tensor")
    first = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in plain)
    apart = plain[1].new_zeros(n, 2, 72)[..., :64].copy_(plain[1])  # a token's heads 144 bytes apart, the tokens 288
    uneven = plain[1].new_zeros(n, 200)[:, :144].unflatten(1, (2, 72))[..., :64].copy_(plain[1])  # 144 and 400
    for what, gpu, operands, taken in (
        ("fits", simulated.HOPPER, plain, True),
        ("slices of a fused projection", simulated.HOPPER, (q, k, v), True),
        ("heads first in memory", simulated.HOPPER, first, True),
        ("heads with a gap", simulated.HOPPER, (plain[0], apart, plain[2]), True),
        ("strides without a common measure", simulated.HOPPER, (plain[0], uneven, plain[2]), False),
        ("q at an odd address", simulated.HOPPER, (odd(plain[0]), *plain[1:]), False),
        ("k at an odd address", simulated.HOPPER, (plain[0], odd(plain[1]), plain[2]), False),
        ("v at an odd address", simulated.HOPPER, (*plain[:2], odd(plain[2])), False),
        ("an older GPU", simulated.AMPERE, plain, False),
        ("a newer GPU", simulated.Gpu(100, 148), plain, False),
        ("a driver that refuses the map", simulated.HOPPER._replace(maps=0), plain, False),
    ):
        kernels()
        with on_hopper(gpu=gpu):
            same(attention(*operands, cu_seqlens=cu, mode="tensor"), want, what)
        (name,) = kernels()
        assert ("attention_wgmma" in name) == taken, f"{what}: {name}"


def test_other_heads_and_calls_without_keys_are_the_other_rooms() -> None:
    for d in (32, 96, 192):
        rows = packed((20,), (1, 1), d)
        with tensor.simulated("cuda", tensor.H100):
            want = attention(**rows, mode="tensor")
        kernels()
        with on_hopper():
            same(attention(**rows, mode="tensor"), want, f"heads of {d}")
        assert all("attention_tensor_rows" in name for name in kernels())
    rows = packed((20,), (1, 1), 64)
    none = {name: rows[name][:0] for name in "kv"}
    with on_hopper():
        y = attention(**{**rows, **none}, cu_seqlens_k=offsets((0,)), mode="tensor")
        assert attention(**{n: t[:0] if n in "qkv" else t * 0 for n, t in rows.items()}, mode="tensor").shape == (0, 1, 64)
    assert not y.any() and not torch.signbit(y).any()


def test_a_way_of_the_other_room_forces_that_room() -> None:
    rows = packed((20,), (1, 1), 64)
    with on_hopper(), simulated.forced("attention_tensor", 2):
        kernels()
        attention(**rows, mode="tensor")
    assert all("attention_tensor_rows" in name for name in kernels())


def test_wrong_offsets_stay_inside() -> None:
    q, fine = numbers("q", (20, 2, 64), HALF), offsets((20,))
    for pair in ((0, 50), (-7, 20), (15, 3), (0, 2**31 - 1), (-(2**31), 20)):
        wrong = torch.tensor(pair, dtype=torch.int32)
        for cu, cu_k in ((wrong, None), (wrong, fine), (fine, wrong)):
            for way in WAYS:
                with on_hopper(), simulated.forced(LAUNCHER, way):
                    torch.ops.rerank_kernels.attention_tensor(q, q, q, cu, cu_k, -1, 3, 0.25)


def test_small_blocks_for_short_sequences_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "launch", lambda *_, **__: None)
    for lengths, heads, threads in (((128,) * 30, 4, 128), ((512,), 1, 128), ((512,) * 9, 16, 512)):
        rows = packed(lengths, (heads, heads), 64)
        simulated.launched.clear()
        with on_hopper():
            attention(**rows, mode="tensor")
        ((_, _, block, _),) = simulated.launched
        assert block[0] == threads, f"{lengths} with {heads} heads"


@pytest.mark.parametrize("d", [64, 128])
def test_the_plan_says_what_is_launched(d: int) -> None:
    require("cuda")
    rows, made = packed((20,), (1, 1), d), []
    for way in WAYS:
        simulated.launched.clear()
        with on_hopper(), simulated.forced(LAUNCHER, way):
            attention(**rows, mode="tensor")
        ((_, _, block, shared),) = simulated.launched
        made.append((block[0], shared))
    instruction, count, tiles = cuda_attention(90, d)
    assert (instruction, count) == ("wgmma m64nNk16", d // 16) and cuda_attention(90, d - 1)[0].startswith("mma.sync")
    assert made == [(t.threads, t.shared) for t in tiles] and all(t.columns == 128 for t in tiles)
    assert library.launch_tables()["sm90"]["attention"].keys() == {"64", "128"}


# ---- mutants


def run(rows: dict[str, Tensor], ways: Any = WAYS, **options: Any) -> Check:
    return hopper.ways_hold(lambda: attention(**rows, mode="tensor", **options), LAUNCHER, ways)


def with_infinite_values() -> dict[str, Tensor]:
    rows = packed((40,), (1, 1), 64)
    return {**rows, "v": torch.full_like(rows["v"], INF)}


def with_an_infinite_key() -> dict[str, Tensor]:
    """In the second tile, so that sums are there to be faded."""
    rows = packed((200,), (1, 1), 64)
    rows["k"][150] = 0.0
    rows["k"][150, 0, 0] = INF
    return rows


def beside_nan() -> dict[str, Tensor]:
    rows = packed((100, 60), (1, 1), 64)
    return {**rows, "v": torch.cat([rows["v"][:100], rows["v"][100:] * NAN])}


FILE = "sm90/attention.cu"
LINE = "\n" + " " * 16
DIFFER, STANDS, UNDER_WAY = "values differ", "deadlock|endless", "race|changed|in flight|under way"
LONG, TOGETHER, ALONE = (run(packed((450,), (1, 1), 64), ways) for ways in (WAYS, (0,), (1,)))
MASKED = run(packed((70, 150), (1, 1), 64), causal=True)
BESIDE_NAN = run(beside_nan())
MUTANTS = [
    Mutant(
        "nobody waits for the keys",
        Edit(
            FILE,
            "k_full[stage].wait(turn);\n                scores(stage);\n                products",
            "scores(stage);\n                products",
        ),
        f"{UNDER_WAY}|{DIFFER}",
        TOGETHER,
    ),
    Mutant(
        "nobody waits for the values",
        Edit(FILE, "v_full[stage].wait(turn);\n            if (tile + 1 == end", "if (tile + 1 == end"),
        f"{UNDER_WAY}|{DIFFER}",
        ALONE,
    ),
    Mutant(
        "the producer waits for the wrong parity",
        Edit(FILE, "k_empty[stage].wait(turn ^ 1);", "k_empty[stage].wait(turn);"),
        STANDS,
        TOGETHER,
    ),
    Mutant(
        "the producer does not wait for an empty stage",
        Edit(FILE, "v_empty[stage].wait(turn ^ 1);", ""),
        f"{UNDER_WAY}|{DIFFER}|overflow|expect",
        TOGETHER,
    ),
    Mutant(
        "a stage of values is given back while its products are under way",
        Edit(
            FILE,
            f"wait_for_wgmma<0>();{LINE}hold(acc);{LINE}hold(l);{LINE}arrive(v_empty[before]);",
            f"arrive(v_empty[before]);{LINE}wait_for_wgmma<0>();{LINE}hold(acc);{LINE}hold(l);",
        ),
        UNDER_WAY,
        TOGETHER,
    ),
    Mutant(
        "one warp speaks for a warpgroup where four are counted",
        Edit(FILE, "if (lane == 0) barrier.arrive();", "if (threadIdx.x % 128 == 0) barrier.arrive();"),
        STANDS,
        TOGETHER,
    ),
    Mutant(
        "fewer bytes are expected than come",
        Edit(FILE, "full.expect(B::BYTES);", "full.expect(B::BYTES - 128);"),
        f"{UNDER_WAY}|bytes|{STANDS}|{DIFFER}",
        LONG,
    ),
    Mutant(
        "a group does not wait for the tiles that it passes over",
        Edit(
            FILE,
            "k_full[stage_of(tile)].wait(turn_of(tile));\n        arrive(k_empty[stage_of(tile)]);\n"
            "        v_full[stage_of(tile)].wait(turn_of(tile));\n",
            "arrive(k_empty[stage_of(tile)]);\n",
        ),
        f"{UNDER_WAY}|{STANDS}|{DIFFER}|arrivals",
        TOGETHER,
    ),
    Mutant(
        "values behind the sequence stay as they are",
        Edit(FILE, "store_sixteen(last + p * B::PANEL_BYTES + at, 0);", ";"),
        DIFFER,
        BESIDE_NAN,
    ),
    Mutant(
        "zeros are stored and wgmma reads without a fence",
        Edit(FILE, "at, 0);\n        stores_before_async();", "at, 0);"),
        "fence|proxy",
        BESIDE_NAN,
    ),
    Mutant(
        "Q is stored and wgmma reads without a fence",
        Edit(FILE, "wait_for_copies<0>();\n        stores_before_async();", "wait_for_copies<0>();"),
        "fence|proxy",
        ALONE,
    ),
    Mutant("the ones are another dtype's", Edit(FILE, "TWO_ONES = 0x3c003c00u", "TWO_ONES = 0x3f803f80u"), DIFFER, LONG),
    Mutant(
        "half of the ones are missing",
        Edit(FILE, "64) * 16, TWO_ONES<T>", "64) * 16, threadIdx.x % 2 ? 0 : TWO_ONES<T>"),
        DIFFER,
        LONG,
    ),
    Mutant(
        "the steps of a product backwards",
        Edit(
            FILE,
            "for (int g = 0; g < STEPS; ++g) {\n            Columns<WIDTH>",
            "for (int g = STEPS - 1; g >= 0; --g) {\n            Columns<WIDTH>",
        ),
        DIFFER,
        LONG,
    ),
    Mutant("sums are not faded", Edit(FILE, "l[j] = l[j] * faded[j / 2];", "l[j] = l[j];"), DIFFER, LONG),
    Mutant(
        "a row sees one key more",
        Edit(FILE, "j % 2) < seen[j / 2 % 2]", "j % 2) <= seen[j / 2 % 2]"),
        DIFFER,
        MASKED,
    ),
    Mutant(
        "the last keys that a warp sees are passed over",
        Edit(FILE, "up_to((warp_last.to - key + STEP - 1) / STEP)", "up_to((warp_last.to - key) / STEP)"),
        DIFFER,
        MASKED,
    ),
    Mutant(
        "whatever the size, a quotient is a corrected product",
        Edit(FILE, "least >= SMALLEST && most <= LARGEST", "true"),
        DIFFER,
        run(with_infinite_values()),
    ),
    Mutant(
        "a row whose scores were infinite counts as any other",
        Edit(FILE, "whole = lost ? ", "whole = false ? "),
        DIFFER,
        run(with_an_infinite_key()),
    ),
    Mutant(
        "values of the second panel are read from the first's neighbour",
        Edit(FILE, "by_columns(v_at + stage * B::BYTES, B::PANEL_BYTES)", "by_columns(v_at + stage * B::BYTES, 1024)"),
        DIFFER,
        run(packed((140,), (1, 1), 128)),
        wide=True,
    ),
]


@pytest.fixture(scope="module")
def compiled() -> None:
    hopper.compile_all(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant, compiled: None) -> None:
    hopper.is_caught(mutant)
