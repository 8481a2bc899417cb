"""scaled_dot_product_attention in a scope: any mask, keys that are hidden are skipped, and padding is in no bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rerank_kernels as rk
from rerank_kernels.scoped import attention as routes
from scoped_cases import NEEDS

pytestmark = NEEDS
LENGTHS = (70, 3, 131)
LONGEST, H, D = 131, 4, 16
FORMS = ("bool", "-inf", "least")


def heads(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one(n: int, seed: int, dtype: torch.dtype, kv: int = H) -> tuple[Tensor, Tensor, Tensor]:
    return heads(1, H, n, D, seed=seed, dtype=dtype), *(heads(1, kv, n, D, seed=seed + i, dtype=dtype) for i in (10, 20))


def padded(parts: list[Tensor], left: bool) -> Tensor:
    """NaN where no token is."""
    out = parts[0].new_full((len(parts), parts[0].shape[1], LONGEST, D), math.nan)
    for row, part in zip(out, parts, strict=True):
        row[:, slice(LONGEST - part.shape[2], None) if left else slice(part.shape[2])] = part[0]
    return out


def tokens(left: bool) -> Tensor:
    places = torch.arange(LONGEST)
    lengths = torch.tensor(LENGTHS)[:, None]
    return places >= LONGEST - lengths if left else places < lengths


def written(visible: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    if form == "bool":
        return visible
    hidden = -math.inf if form == "-inf" else torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: object) -> Tensor:
    with torch.no_grad(), rk.invariant():
        return F.scaled_dot_product_attention(q, k, v, mask, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_has_the_bits_that_it_has_alone(form: str, left: bool, dtype: torch.dtype) -> None:
    hold(form, left, dtype)


def hold(form: str, left: bool, dtype: torch.dtype) -> None:
    for causal in (False, True):
        parts = [one(n, i, dtype) for i, n in enumerate(LENGTHS)]
        q, k, v = (padded([p[i] for p in parts], left) for i in range(3))
        keys = tokens(left)[:, None, None]
        visible = keys & torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril() if causal else keys
        for spread in (visible, visible.expand(-1, H, LONGEST, -1).contiguous()):
            y = attend(q, k, v, written(spread, form, dtype))
            for i, (n, part) in enumerate(zip(LENGTHS, parts, strict=True)):
                own = y[i, :, slice(LONGEST - n, None) if left else slice(n)]
                assert torch.equal(own, attend(*part, is_causal=causal)[0]), (causal, tuple(spread.shape), n)


def test_the_bits_are_those_of_our_attention() -> None:
    q, k, v = one(70, 0, torch.float32)
    ours = rk.attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert torch.equal(attend(q, k, v), ours)
    assert torch.equal(attend(q[0], k[0], v[0]), ours[0])
    assert torch.equal(attend(q, k, v, torch.ones(70, 70, dtype=torch.bool)), ours)


def test_every_way_of_saying_the_same_spans_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (heads(2, H, 100, D, seed=i) for i in range(3))
    visible = torch.ones(2, 1, 100, 100, dtype=torch.bool).tril()
    visible[1, :, :, :30] = False
    fast = attend(q, k, v, visible)
    monkeypatch.setattr(routes, "_causal", lambda *_: None)  # a sequence for each query
    assert torch.equal(attend(q, k, v, visible), fast)


def test_near_float64_in_every_form() -> None:
    q, k, v = (heads(2, H, 50, D, seed=i) for i in range(3))
    bias = heads(1, H, 50, 50, seed=4)
    gaps = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(1)) > 0.4
    window = torch.ones(50, 50, dtype=torch.bool).tril(3).triu(-7)
    wide = heads(2, H, 50, D + 3, seed=9)
    for name, (queries, values, mask, how) in {
        "gaps": (q, v, gaps, {}),
        "bias": (q, v, bias, {}),
        "bias and gaps": (q, v, bias.masked_fill(~gaps, -math.inf), {}),
        "window": (q, v, window, {"scale": 0.3}),
        "fewer queries, causal": (q[:, :, :20], v, None, {"is_causal": True}),
        "fewer queries": (q[:, :, :20], v, None, {}),
        "values of another width": (q, wide, window, {}),
        "all at the least number": (q, v, torch.full((50, 50), torch.finfo(torch.float32).min), {}),
    }.items():
        y = attend(queries, k, values, mask, **how)
        cast = mask if mask is None or mask.dtype == torch.bool else mask.double()
        if name.startswith("all at"):
            truth = v.double().mean(2, keepdim=True).expand(-1, -1, 50, -1)
        else:
            truth = F.scaled_dot_product_attention(queries.double(), k.double(), values.double(), cast, **how)  # type: ignore[arg-type]
        assert (y - truth).abs().max() < 3e-6, name


def test_grouped_heads() -> None:
    q, k, v = one(40, 0, torch.float32, kv=2)
    y = attend(q, k, v, enable_gqa=True)
    assert torch.equal(y, attend(q, *(t.repeat_interleave(2, 1) for t in (k, v))))
    gaps = torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) > 0.4
    assert torch.equal(attend(q, k, v, gaps, enable_gqa=True), attend(q, *(t.repeat_interleave(2, 1) for t in (k, v)), gaps))


def test_numbers_added_are_independent_of_batch_and_padding() -> None:
    parts = [one(n, i, torch.float32) for i, n in enumerate(LENGTHS)]
    for left in (False, True):
        q, k, v = (padded([p[i] for p in parts], left) for i in range(3))
        biases = [heads(1, H, n, n, seed=30 + n) for n in LENGTHS]
        mask = torch.full((3, H, LONGEST, LONGEST), -math.inf)
        for row, bias, n in zip(mask, biases, LENGTHS, strict=True):
            own = slice(LONGEST - n, None) if left else slice(n)
            row[:, own, own] = bias[0]
        y = attend(q, k, v, mask)
        for i, (n, part, bias) in enumerate(zip(LENGTHS, parts, biases, strict=True)):
            own = slice(LONGEST - n, None) if left else slice(n)
            assert torch.equal(y[i, :, own], attend(*part, bias)[0]), (left, n)


def test_keys_count_from_the_first_that_is_seen() -> None:
    """400 keys are one chunk; behind 300 others they would be two."""
    q, k, v = (heads(1, 2, n, D, seed=n) for n in (3, 400, 401))
    v, bias = v[:, :, :400], heads(3, 400, seed=7)
    alone = attend(q, k, v, bias)
    before = heads(1, 2, 300, D, seed=9)
    mask = torch.cat([torch.full((3, 300), -math.inf), bias], 1)
    assert torch.equal(attend(q, torch.cat([before, k], 2), torch.cat([before, v], 2), mask), alone)


def test_a_query_that_sees_nothing_gives_zero_and_infinities_reach_whoever_sees_them() -> None:
    q, k, v = one(6, 0, torch.float32)
    v[0, :, 4] = math.inf
    visible = torch.ones(6, 6, dtype=torch.bool)
    visible[0] = False
    visible[1, 4] = False
    for mask in (visible, visible & (torch.arange(6) != 2)):  # a span; a gap
        y = attend(q, k, v, mask)
        assert (y[0, :, 0] == 0).all() and y[0, :, 1].isfinite().all() and (y[0, :, 2:] == math.inf).all()
