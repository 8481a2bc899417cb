"""Attention of mode "tensor" on CUDA, in the simulator: every way of its launcher gives the same bits, under each model of a
tensor core; what a row may not see does not reach it; rows of any alignment.

The promises are in test_tensor.py, the mutants in test_tensor_mutants_attention.py.
"""

from __future__ import annotations

import functools
import re

import pytest
import torch

import cases
import invariants
import rerank_kernels as rk
from cases import Case, numbers, offsets
from conftest import ran
from invariants import all_same, same
from prefill import keys_in_a_cache, steps_against_prefill
from tensor import HALVES, MODELS

simulated = pytest.importorskip("simulated.cuda")
NAN = float("nan")
LAUNCHER = "attention_tensor"


@pytest.fixture(autouse=True)
def _cuda() -> None:
    ran("cuda")


@functools.cache
def ways() -> int:
    return simulated.launchers()[LAUNCHER]


LENGTHS = (0, 1, 63, 64, 65, 0, 130)
CASES = [
    cases.in_tensor_mode(cases._attention(d, heads, LENGTHS, **options))
    for d, heads, options in (
        (64, (4, 2), {}),
        (64, (4, 1), dict(causal=True)),
        (8, (5, 5), dict(window=(70, 3))),
        (40, (2, 2), dict(window=(-1, 20), scale=0.5)),
        (80, (2, 1), dict(causal=True, window=(33, -1))),
        (96, (1, 1), {}),
        (128, (2, 1), dict(window=(64, 64))),
        (64, (2, 2), dict(window=(20, 20), softcap=1.5)),
        (200, (2, 1), dict(causal=True, softcap=3.0)),
        (192, (1, 1), dict(causal=True)),
        (256, (6, 3), dict(causal=True)),
    )
]


@pytest.mark.parametrize("half", HALVES, ids=lambda d: str(d)[6:])
def test_every_way_gives_the_same_bits(half: torch.dtype, case: Case) -> None:
    """Blocks of 8, 4, 2 warps, with one key head or several: all against the launcher's own choice, and that against truth."""
    rows = case.make_rows(half)
    with simulated.simulated(mma=2):
        invariants.right(case, half)
    for model in MODELS if half == torch.float16 else (2,):
        with simulated.simulated(mma=model):
            want = case.call(rows, {})
        for way in range(ways()):
            how = dict(race=True, lazy_async=True, sched=way % 3) if model == 2 else {}
            with simulated.simulated(mma=model, **how), simulated.forced(LAUNCHER, way):
                all_same(case.call(rows, {}), want, f"{case}, way {way}, tensor core {MODELS[model]}")


@pytest.mark.parametrize("half", HALVES, ids=lambda d: str(d)[6:])
def test_sequences_beside_it_may_hold_anything(half: torch.dtype) -> None:
    """Behind a sequence's end stand its neighbour's tokens, all NaN: a tile of keys that reaches over it must not read them."""
    for n in (1, 15, 16, 40, 63, 64, 65, 130):
        q, k, v = (numbers(f"{name} {n}", (n, 2, 64), half) for name in "qkv")
        around = torch.full((70, 2, 64), NAN, dtype=half)
        packed = [torch.cat([around, t, around]) for t in (q, k, v)]
        for way in range(ways()):
            with simulated.simulated(race=True, lazy_async=True), simulated.forced(LAUNCHER, way):
                want = rk.attention(q, k, v, cu_seqlens=offsets((n,)), mode="tensor")
                got = rk.attention(*packed, cu_seqlens=offsets((70, n, 70)), mode="tensor")
            assert want.isfinite().all()
            same(got[70 : 70 + n], want, f"length {n} between sequences of NaN, way {way}")
            assert got[:70].isnan().all() and got[70 + n :].isnan().all()


def test_what_a_row_sees_reaches_it_and_nothing_else() -> None:
    """NaN in a key reaches every row that sees it, and no other; an infinite value outside of the window's 16 x 16 does not."""
    n, token, window = 200, 100, (20, 9)
    q, k, v = (numbers(name, (n, 2, 64), torch.float16) for name in "qkv")
    i = torch.arange(n)
    sees = (token >= i - window[0]) & (token <= i + window[1])
    for way in range(ways()):
        with simulated.simulated(), simulated.forced(LAUNCHER, way):
            call = functools.partial(rk.attention, cu_seqlens=offsets((n,)), window=window, mode="tensor")
            clean = call(q, k, v)
            for bad in (NAN, float("inf")):
                w = k.clone()
                w[token, 0] = bad
                got = call(q, w, v)
                assert bad == bad or got[sees, 0].isnan().all()
                same(got[~sees, 0], clean[~sees, 0], f"{bad} in a key, rows that do not see it, way {way}")
                same(got[:, 1], clean[:, 1], f"{bad} in a key, the other head, way {way}")
                w = v.clone()
                w[token, 1, 5] = bad
                got = call(q, k, w)
                assert not got[sees, 1, 5].isfinite().any()
                # keys 96 to 111 are seen by rows 87 to 131, which lie in the sixteens from 80 to 143
                far = (i < 80) | (i >= 144)
                same(got[:, 1][far], clean[:, 1][far], f"{bad} in a value, way {way}")
                rest = torch.arange(64) != 5
                same(got[:, 1][:, rest], clean[:, 1][:, rest], f"{bad} in a value, other features, way {way}")
            y = call(q * NAN, k, v)
            assert y.isnan().all()


@pytest.mark.parametrize("d", [16, 96, 200])
def test_decode_and_chunks_have_the_bits_of_the_prefill(d: int) -> None:
    for way, model in [*((way, 2) for way in range(ways())), (-1, 3)]:
        with simulated.simulated(mma=model), simulated.forced(LAUNCHER, way):
            steps_against_prefill(d, torch.float16, mode="tensor")


def test_keys_that_lie_anywhere() -> None:
    for way in range(ways()):
        with simulated.simulated(), simulated.forced(LAUNCHER, way):
            keys_in_a_cache(torch.bfloat16, mode="tensor")


@pytest.mark.parametrize("d", [7, 40, 64, 256])
def test_any_stride_and_address(d: int) -> None:
    """Slices of a fused QKV, heads first in memory, rows at odd addresses: by halves instead of 16 bytes, the same bits."""
    n = 70
    fused = numbers("qkv", (n, 3, 4, d), torch.float16)
    q, k, v = fused.unbind(1)
    k, v = k[:, ::2], v[:, ::2]
    cu = offsets((n - 5, 5))
    with simulated.simulated(race=True, lazy_async=True):
        want = rk.attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens=cu, mode="tensor")
        same(rk.attention(q, k, v, cu_seqlens=cu, mode="tensor"), want, "slices of a fused projection")
        first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
        same(rk.attention(*first, cu_seqlens=cu, mode="tensor"), want, "heads first in memory")
        plain = [t.contiguous() for t in (q, k, v)]
        odd = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in plain]
        same(rk.attention(*odd, cu_seqlens=cu, mode="tensor"), want, "rows at an odd address")


def test_scores_of_any_size() -> None:
    """exp where its result is no normal number, where rows of a warp differ, and where a score is infinite."""
    n = 100
    q, k, v = (numbers(name, (n, 1, 32), torch.bfloat16) for name in "qkv")
    q = q * torch.logspace(-3, 3, n).to(torch.bfloat16)[:, None, None]
    with simulated.simulated():
        y = rk.attention(q, k, v, cu_seqlens=offsets((n,)), mode="tensor").double()
        huge = rk.attention(q * 1e30, k * 1e30, v, cu_seqlens=offsets((n,)), mode="tensor")
    truth = cases.TRUTHS["attention"](q.double(), k.double(), v.double(), cu_seqlens=offsets((n,)))
    assert float((y - truth).abs().max()) < 0.02 * float(v.abs().max())
    assert huge.isnan().all()  # as the formula has it: +inf - +inf


def test_many_short_sequences() -> None:
    """More sequences than find_work reads at once, and the way with several key heads, by the launcher's own choice."""
    lengths = tuple((7 * i) % 9 for i in range(600))
    q, k, v = (numbers(name, (sum(lengths), 3, 32), torch.float16) for name in "qkv")
    with simulated.simulated():
        y = rk.attention(q, k, v, cu_seqlens=offsets(lengths), mode="tensor")
        ends = offsets(lengths).tolist()
        for b in (1, 2, 255, 256, 257, 511, 599):
            part = slice(ends[b], ends[b + 1])
            alone = rk.attention(q[part], k[part], v[part], cu_seqlens=offsets((lengths[b],)), mode="tensor")
            same(y[part], alone, f"sequence {b} of {len(lengths)}")


def test_wrong_offsets_stay_inside() -> None:
    """Values that only the device knows: clamped, so that nothing is read or written outside."""
    q, fine = numbers("q", (20, 2, 16), torch.float16), offsets((20,))
    for pair in ((0, 50), (-7, 20), (15, 3), (0, 2**31 - 1), (-(2**31), 20)):
        wrong = torch.tensor(pair, dtype=torch.int32)
        for cu, cu_k in ((wrong, None), (wrong, fine), (fine, wrong)):
            with simulated.simulated():
                torch.ops.rerank_kernels.attention_tensor(q, q, q, cu, cu_k, -1, 3, 0.25)
                torch.ops.rerank_kernels.attention(q, q, q, cu, cu_k, -1, 3, 0.25)


def test_heads_that_are_too_wide() -> None:
    q = torch.zeros(3, 1, 320, dtype=torch.float16)
    said = re.escape("attention: D must be at most 256 in mode 'tensor', got 320; take mode='portable'")
    with pytest.raises(ValueError, match=said):
        rk.attention(q, q, q, cu_seqlens=offsets((3,)), mode="tensor")
