"""attention: packed and padded, bidirectional, causal, windows, grouped heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases
import contract
import invariants
from cases import Case, numbers, offsets
from invariants import same
from prefill import keys_in_a_cache, qkv, steps_against_prefill
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.sequences import Spans

CASES = cases.of("attention")
NAN, INF = float("nan"), float("inf")


class TestAttention(invariants.Promises):
    @pytest.mark.promise("padding-invariant")
    def test_hidden_keys(self, backend: Backend, case: Case, dtype: torch.dtype) -> None:
        if case.options.get("causal") or "window" in case.options:
            invariants.hidden_keys(case, dtype)


@pytest.mark.promise("machine-invariant")
@pytest.mark.parametrize(
    ("length", "right", "softcap"),
    [*((n, right, None) for n, right in ((1, -1), (63, -1), (64, -1), (65, 0), (150, -1), (150, 0), (530, -1))), (150, 0, 0.7)],
)
def test_order_of_the_sums(backend: Backend, length: int, right: int, softcap: float | None, dtype: torch.dtype) -> None:
    """Scale, cap, maximum; lane j mod 32 below the fraction bar, chunks of 64 keys above it; a hidden key is a zero."""
    host = pytest.importorskip("rerank_kernels._host")
    q, k, v = (t[:, 0] for t in qkv(length, 1, 1, 40, dtype))
    s = contract.dot(q, k) * torch.tensor(0.3)
    if softcap is not None:
        t = host.elementwise("tanh", (s.numpy() / np.float32(softcap)).flatten(), "scalar").reshape(s.shape)
        s = torch.from_numpy(t * np.float32(softcap))
    hidden = torch.arange(length)[None] > torch.arange(length)[:, None] + right if right >= 0 else s != s
    s = s.masked_fill(hidden, -INF)
    e = torch.from_numpy(host.elementwise("exp", (s - s.amax(1, keepdim=True)).flatten().numpy(), "scalar")).view(s.shape)
    want = contract.dot(e, v.t(), chunk=64) / contract.row_sum(e)[:, None]
    options = dict(window=(-1, right), scale=0.3, softcap=softcap)
    got = attention(q[:, None], k[:, None], v[:, None], cu_seqlens=offsets((length,)), **options)
    same(got[:, 0], want.to(dtype), f"T = {length}, kernel against the contract in NumPy")
    few = (length + 2) // 3
    own = dict(cu_seqlens=offsets((few,)), cu_seqlens_k=offsets((length,)))
    got = attention(q[-few:, None], k[:, None], v[:, None], **own, **options)
    same(got[:, 0], want[-few:].to(dtype), f"the last {few} queries of T = {length} against the contract in NumPy")


def test_grouped_heads_are_repeated_heads(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = qkv(20, 6, 2, dtype=dtype)
    cu = offsets((13, 7))
    k6, v6 = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    same(attention(q, k, v, cu_seqlens=cu), attention(q, k6, v6, cu_seqlens=cu), "head h reads h // group")


def test_equivalent_masks(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = qkv(30, dtype=dtype)
    cu = offsets((30,))
    causal = attention(q, k, v, cu_seqlens=cu, causal=True)
    same(attention(q, k, v, cu_seqlens=cu, window=(-1, 0)), causal, "causal is window (-1, 0)")
    same(attention(q, k, v, cu_seqlens=cu, window=(40, 9), causal=True), causal, "causal overrules the right window")
    full = attention(q, k, v, cu_seqlens=cu)
    same(attention(q, k, v, cu_seqlens=cu, window=(29, 29)), full, "a window as wide as the sequence")
    same(attention(q, k, v, cu_seqlens=cu, window=(0, 0)), v, "a row that sees itself only is its v")
    same(causal[-1], full[-1], "the last causal row sees everything")
    same(causal[0], v[0], "the first causal row sees itself")


@pytest.mark.promise("machine-invariant")
def test_decode_and_chunks_have_the_bits_of_the_prefill(backend: Backend, dtype: torch.dtype) -> None:
    steps_against_prefill(16, dtype)


def test_decode_and_chunks_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for name in ("scalar", isa):
        invariants.force_isa(name)
        steps_against_prefill(72, dtype)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2), (15, 1), (30, 2)])
def test_one_query_alone_has_the_bits_of_its_row(isa: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """A sequence of one query goes another way on a CPU: any number of heads beside it, with a window, a cap, NaN where it does
    not look."""
    for d, length in ((1, 1), (33, 31), (40, 64), (72, 65), (128, 200)):
        q, k, v = qkv(length, *heads, d, dtype)
        for options in ({}, dict(window=(20, 0)), dict(window=(70, 5), softcap=1.5), dict(window=(0, 0))):
            for name in ("scalar", isa):
                invariants.force_isa(name)
                want = attention(q, k, v, cu_seqlens=offsets((length,)), causal=True, **options)[-1:]
                seen = options.get("window", (length, 0))[0] + 1
                junk = [t.clone() for t in (k, v)]
                for t in junk:
                    t[: max(0, length - seen)] = NAN
                own = dict(cu_seqlens=offsets((1,)), cu_seqlens_k=offsets((length,)))
                got = attention(q[-1:], *junk, **own, causal=True, **options)
                same(got, want, f"T = {length}, D = {d}, {options}, {name}")


def test_keys_that_lie_anywhere(backend: Backend, dtype: torch.dtype) -> None:
    keys_in_a_cache(dtype)


def test_errors_about_keys_that_lie_anywhere(backend: Backend) -> None:
    q, places = torch.zeros(6, 4, 8), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be of 6 places, got Spans of 7"):
        attention(q, q, q, cu_seqlens=offsets((2, 4)), cu_seqlens_k=Spans(places, 7))
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be \[2, 1\], got \[2, 2\]"):
        attention(q, q, q, cu_seqlens=offsets((6,)), cu_seqlens_k=Spans(places, 6))


def test_what_sees_no_key_is_zero(backend: Backend, dtype: torch.dtype) -> None:
    """As in FlashAttention. Before the first key under a causal mask, or no keys at all; whatever q, k and v hold."""
    q, k, v = qkv(12, 4, 2, dtype=dtype)
    own = dict(cu_seqlens=offsets((5, 4, 3)), cu_seqlens_k=offsets((2, 0, 10)))
    for junk in (0.0, NAN, INF):
        y = attention(q, k, v, **own, causal=True)
        blind = torch.zeros(12, dtype=torch.bool)
        blind[[0, 1, 2, 5, 6, 7, 8]] = True
        same(y[blind], torch.zeros_like(y[blind]), f"rows that see nothing, beside {junk}")
        q[blind] = junk
        assert junk != 0.0 or bool((y[~blind] != 0).all())
        k[:2], v[:2] = junk, junk
    assert not attention(q, k[:0], v[:0], cu_seqlens=offsets((12,)), cu_seqlens_k=offsets((0,))).any()
    full = attention(*qkv(12, 4, 2, dtype=dtype), **own)
    assert bool((full[:5] != 0).all()) and not full[5:9].any()


def test_keys_of_their_own_in_padded_form(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = (t.view(2, -1, *t.shape[1:]) for t in (qkv(6, dtype=dtype)[0], *qkv(14, dtype=dtype)[1:]))
    both = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    want = attention(*both, cu_seqlens=offsets((3, 3)), cu_seqlens_k=offsets((7, 7)), causal=True).view(q.shape)
    same(attention(q, k, v, causal=True), want, "no mask")
    ones = torch.ones(2, 7, dtype=torch.bool)
    same(attention(q, k, v, mask_k=ones, causal=True), want, "a mask of the keys, of ones")
    ones[1, 5:] = False
    less = attention(q[1:], k[1:, :5], v[1:, :5], causal=True)
    got = attention(q, k, v, mask_k=ones, causal=True)
    same(got[0], want[0], "a whole one beside a padded one")
    same(got[1], less[0], "two padded keys")


@pytest.mark.parametrize("length", [2, 17, 64, 65, 129, 513, 600])
def test_causal_prefix(backend: Backend, length: int) -> None:
    """The prefix of a sequence gives the same causal rows only on backends that promise one order for every length."""
    q, k, v = qkv(length, 1, 1)
    full = attention(q, k, v, cu_seqlens=offsets((length,)), causal=True)
    half = (length + 1) // 2
    part = attention(q[:half], k[:half], v[:half], cu_seqlens=offsets((half,)), causal=True)
    if "machine-invariant" in backend.promises["portable"]:
        same(part, full[:half], "a causal prefix")
    else:
        assert torch.allclose(part, full[:half], rtol=1e-5, atol=1e-6)


def test_single_token_is_its_value(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = qkv(4, dtype=dtype)
    same(attention(q, k, v, cu_seqlens=offsets((1, 1, 1, 1))), v, "sequences of one token")


def test_fused_qkv_slices(backend: Backend, dtype: torch.dtype) -> None:
    """Slices of one projection, as models hand them over: any stride between tokens and heads."""
    fused = numbers("qkv", (25, 3, 2, 24), dtype)
    q, k, v = fused.unbind(1)
    cu = offsets((11, 14))
    want = attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens=cu)
    same(attention(q, k, v, cu_seqlens=cu), want, "strided tokens")
    head_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    same(attention(*head_first, cu_seqlens=cu), want, "heads first in memory")
    feature_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    same(attention(*feature_first, cu_seqlens=cu), want, "features not side by side")


def test_no_mask_is_all_ones(backend: Backend, dtype: torch.dtype) -> None:
    q, k, v = (t.view(3, 7, 2, 16) for t in qkv(21, dtype=dtype))
    want = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens=offsets((7, 7, 7))).view(3, 7, 2, 16)
    same(attention(q, k, v), want, "no mask")
    same(attention(q, k, v, mask=torch.ones(3, 7, dtype=torch.bool)), want, "a mask of ones")


def test_all_padding(backend: Backend, dtype: torch.dtype) -> None:
    q = torch.full((2, 5, 1, 8), NAN, dtype=dtype)
    assert not attention(q, q, q, mask=torch.zeros(2, 5, dtype=torch.bool)).any()


def test_int64_offsets(backend: Backend) -> None:
    q, k, v = qkv(12)
    same(attention(q, k, v, cu_seqlens=offsets((5, 7)).long()), attention(q, k, v, cu_seqlens=offsets((5, 7))), "int64")


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    q, k, v = qkv(40)
    y = attention(q, k, v, cu_seqlens=offsets((40,)), scale=1e4)
    assert y.isfinite().all()


def under_scales(sign: float) -> list[torch.Tensor]:
    """-s * (q k) and s * (-q k) are the same numbers to the bit; the maximum may not be taken before a negative scale."""
    q, k, v = qkv(104)
    cu = offsets((70, 33, 1))
    return [
        attention(q * sign, k, v, cu_seqlens=cu, scale=scale * sign, window=window)
        for scale in (0.5, 0.3)
        for window in ((-1, -1), (7, 3), (-1, 0))
    ]


def test_negative_scale(backend: Backend) -> None:
    for got, want in zip(under_scales(-1.0), under_scales(1.0), strict=True):
        same(got, want, "-q and a negative scale against both positive")


def test_negative_scale_on_every_instruction_set(isa: str) -> None:
    invariants.force_isa("scalar")
    wanted = under_scales(1.0)
    for name in ("scalar", isa):
        invariants.force_isa(name)
        for got, want in zip(under_scales(-1.0), wanted, strict=True):
            same(got, want, f"-q and a negative scale, {name}, against both positive, scalar")


def test_softcap_of_scores_that_overflow(backend: Backend) -> None:
    """A score of +-inf is +-softcap, and still its key's; one that is hidden is none. A NaN stays a NaN."""
    q, k, v = qkv(5)
    q = q.abs() + 2
    k[1], k[3] = 2e38, -2e38
    y = attention(q, k, v, cu_seqlens=offsets((5,)), causal=True, scale=1.0, softcap=1.0)
    near = attention(q, k.clamp(-99, 99), v, cu_seqlens=offsets((5,)), causal=True, scale=1.0, softcap=1.0)
    assert y.isfinite().all() and torch.allclose(y, near, rtol=1e-5, atol=1e-6)
    same(y[0], v[0], "the first causal row sees itself")
    k[2] = NAN
    y = attention(q, k, v, cu_seqlens=offsets((5,)), causal=True, softcap=1.0)
    assert y[2:].isnan().all() and y[:2].isfinite().all()


def test_visible_nan_and_inf_reach_their_rows(backend: Backend) -> None:
    """What a row does see must not be swept under the carpet."""
    q, k, v = qkv(10)
    cu = offsets((10,))
    clean = attention(q, k, v, cu_seqlens=cu, causal=True)
    for bad, test in ((NAN, torch.isnan), (INF, torch.isinf)):
        w = v.clone()
        w[6, 1, 3] = bad
        y = attention(q, k, w, cu_seqlens=cu, causal=True)
        hit = torch.zeros(y.shape, dtype=torch.bool)
        hit[6:, 1, 3] = True
        assert bool(test(y[hit]).all())
        same(y[~hit], clean[~hit], f"{bad} in one value touches one feature of later rows")
    k = k.clone()
    k[6] = NAN
    y = attention(q, k, v, cu_seqlens=cu, causal=True)
    assert bool(y[6:].isnan().all())
    same(y[:6], clean[:6], "rows before the NaN key")


def test_a_mask_on_another_device(backend: Backend) -> None:
    q = torch.zeros(2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"attention: mask must be on cpu like q, got a tensor on meta; move it with"):
        attention(q, q, q, mask=torch.ones(2, 3, device="meta"))


def test_errors(backend: Backend) -> None:
    q = torch.zeros(6, 4, 8)
    cu = offsets((6,))
    with pytest.raises(ValueError, match="attention: cu_seqlens and mask exclude each other"):
        attention(q, q, q, cu_seqlens=cu, mask=torch.ones(1, 6))
    with pytest.raises(ValueError, match=r"attention: q must be \[B, T, H, D\] without cu_seqlens, got \[6, 4, 8\]"):
        attention(q, q, q)
    with pytest.raises(ValueError, match=r"attention: H must be a multiple of H_kv = 3"):
        attention(q, q[:, :3], q[:, :3], cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"attention: v must be \[6, 4, 8\] like k, got \[6, 2, 8\]"):
        attention(q, q, q[:, :2], cu_seqlens=cu)
    with pytest.raises(TypeError, match=r"attention: k must be torch.float32 like q, got torch.float16"):
        attention(q, q.half(), q.half(), cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"attention: cu_seqlens must be ascending from 0 to 6, the number of tokens, got"):
        attention(q, q, q, cu_seqlens=offsets((5,)))
    with pytest.raises(ValueError, match=r"attention: cu_seqlens must be a 1-D int32 tensor .* got torch.float32 \[2\]"):
        attention(q, q, q, cu_seqlens=cu.float())
    with pytest.raises(ValueError, match=r"attention: window must be \(left, right\) with -1 for no limit, got \(-2, 0\)"):
        attention(q, q, q, cu_seqlens=cu, window=(-2, 0))
    with pytest.raises(ValueError, match=r"attention: scale must be finite and not 0 as a float32, got nan"):
        attention(q, q, q, cu_seqlens=cu, scale=NAN)
    for cap in (0.0, -30.0, NAN, INF, 1e-50):
        with pytest.raises(
            ValueError, match=rf"softcap must be finite and > 0 as a float32, got {cap}; leave it out, or give None"
        ):
            attention(q, q, q, cu_seqlens=cu, softcap=cap)
    assert attention(q, q, q, cu_seqlens=cu, softcap=None).isfinite().all()
    with pytest.raises(ValueError, match=r"attention: k must be \[6, H_kv, 8\], got \[5, 4, 8\]"):
        attention(q, q[:5], q[:5], cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"attention: cu_seqlens_k must be ascending from 0 to 5, the number of tokens, got"):
        attention(q, q[:5], q[:5], cu_seqlens=cu, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match=r"attention: cu_seqlens_k must be \[2\] like cu_seqlens, got \[3\]"):
        attention(q, q[:5], q[:5], cu_seqlens=cu, cu_seqlens_k=offsets((2, 3)))
    with pytest.raises(ValueError, match="attention: cu_seqlens_k is for packed input, whose queries need cu_seqlens"):
        attention(q, q, q, cu_seqlens_k=cu)
    p = torch.zeros(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"attention: mask_k must be \[B, T_k\] = \[2, 2\] beside a mask of the queries"):
        attention(p, p[:, :2], p[:, :2], mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"attention: mask_k must be bool or integer \[B, T\] = \[2, 3\].* got torch.bool \[2, 2\]"
    ):
        attention(p, p, p, mask_k=torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention: mask must be bool or integer \[B, T\] = \[2, 3\].* got torch.float32"):
        attention(p, p, p, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"attention: mask must be .* got torch.int64 \[3, 2\]"):
        attention(p, p, p, mask=torch.ones(3, 2, dtype=torch.int64))
