"""linear, bmm and activation: y = act(x · weightᵀ + bias) + residual, and y[i] = a[i] · b[i]."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

import cases
import contract
import invariants
from cases import Case, numbers
from invariants import same
from rerank_kernels.backend.registry import Backend
from rerank_kernels.ops.linear import ACTIVATIONS, activation, bmm, linear

CASES = cases.of("linear")
NAN, INF = float("nan"), float("inf")


class TestLinear(invariants.Promises):
    pass


@pytest.mark.promise("machine-invariant")
@pytest.mark.parametrize("k", [1, 2, 511, 512, 513, 1024, 1100])
def test_order_of_the_sum(backend: Backend, k: int, dtype: torch.dtype) -> None:
    x, w = numbers("x", (5, k), dtype), numbers("w", (18, k), dtype)
    same(linear(x, w, out_dtype=torch.float32), contract.dot(x, w), f"K = {k}, kernel against the contract in NumPy")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_fused_is_unfused(backend: Backend, kind: str) -> None:
    """In float32 there is no rounding between the steps, so fusing them may change nothing."""
    x, w, b, r = (numbers(n, s, torch.float32) for n, s in (("x", (9, 70)), ("w", (45, 70)), ("b", (45,)), ("r", (9, 45))))
    plain = linear(x, w, b)
    same(plain, linear(x, w) + b, "bias")
    same(linear(x, w, b, activation=kind), activation(plain, kind), kind)
    same(linear(x, w, b, activation=kind, residual=r), activation(plain, kind) + r, f"{kind} and residual")
    same(linear(x, w, b, residual=r), plain + r, "residual")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gated_activation_is_one_product_more(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    x, up = numbers("x", (3, 1001), dtype), numbers("u", (3, 1001), dtype)
    same(activation(x, kind, up=up), (activation(x.float(), kind) * up.float()).to(dtype), kind)
    same(activation(x, kind, up=up.float().mul(1.7)), (activation(x.float(), kind) * up.float().mul(1.7)).to(dtype), "dtypes")
    same(activation(x[:, 1:], kind, up=up[:, 1:]), activation(x, kind, up=up)[:, 1:], "no address of 16 bytes")


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_is_float32_rounded_once(backend: Backend, half: torch.dtype) -> None:
    x, w, b, r = (numbers(n, s, half) for n, s in (("x", (9, 600)), ("w", (21, 600)), ("b", (21,)), ("r", (9, 21))))
    wide = linear(x.float(), w.float(), b.float(), activation="gelu", residual=r.float())
    same(linear(x, w, b, activation="gelu", residual=r), wide.to(half), "half against float32 rounded once")
    same(linear(x, w, b, activation="gelu", residual=r, out_dtype=torch.float32), wide, "half in, float32 out")
    same(linear(x, w.float(), b, activation="gelu", residual=r.float()), wide.to(half), "weights of another dtype")
    same(linear(x.float(), w, b.float(), activation="gelu", residual=r, out_dtype=half), wide.to(half), "rows of another dtype")


def test_columns_are_independent(backend: Backend, dtype: torch.dtype) -> None:
    """y[m, n] knows row n of the weight and no other: not its content, not how many there are."""
    x, w = numbers("x", (6, 130), dtype), numbers("w", (40, 130), dtype)
    want = linear(x, w)
    for junk in (NAN, INF, 1e4):
        poisoned = w.clone()
        poisoned[7] = junk
        same(linear(x, poisoned)[:, :7], want[:, :7], f"{junk} in column 7")
        same(linear(x, poisoned)[:, 8:], want[:, 8:], f"{junk} in column 7")


@pytest.mark.promise("machine-invariant")
def test_columns_do_not_count(backend: Backend, dtype: torch.dtype) -> None:
    x, w = numbers("x", (6, 130), dtype), numbers("w", (40, 130), dtype)
    want = linear(x, w)
    for start, stop in ((0, 1), (39, 40), (3, 20), (1, 18)):
        same(linear(x, w[start:stop]), want[:, start:stop], f"columns {start}:{stop} alone")


def test_any_layout(backend: Backend, dtype: torch.dtype) -> None:
    x, w, b = numbers("x", (6, 24), dtype), numbers("w", (10, 24), dtype), numbers("b", (10,), dtype)
    want = linear(x, w, b)
    same(linear(x.t().contiguous().t(), w, b), want, "x transposed in memory")
    same(linear(x, w.t().contiguous().t(), b), want, "weight transposed in memory")
    same(linear(x, w, torch.stack([b, b], 1)[:, 0]), want, "strided bias")
    same(linear(x[0], w, b), want[0], "a vector")
    same(linear(x.view(1, 2, 3, 24), w, b), want.view(1, 2, 3, 10), "4-D")
    same(linear(x, w, b, residual=want.t().contiguous().t()), linear(x, w, b, residual=want), "residual transposed in memory")
    same(linear(x[:1].expand(6, 24), w, b), want[:1].expand(6, 10), "expanded rows")


def test_arguments_stay_as_they_are(backend: Backend, dtype: torch.dtype) -> None:
    x, w, b, r = (numbers(n, s, dtype) for n, s in (("x", (3, 8)), ("w", (5, 8)), ("b", (5,)), ("r", (3, 5))))
    before = [t.clone() for t in (x, w, b, r)]
    linear(x, w, b, activation="relu", residual=r)
    for t, old in zip((x, w, b, r), before, strict=True):
        same(t, old, "an argument")


def test_changed_weight_is_seen(backend: Backend, dtype: torch.dtype) -> None:
    """A contiguous copy of a weight that is not must not outlive the values it was made from; of others there is none."""
    x = numbers("x", (3, 40), dtype)
    for w in (numbers("w", (33, 40), dtype), numbers("w", (40, 33), dtype).t()):
        linear(x, w)
        w.mul_(2.0)
        same(linear(x, w), linear(x, w.contiguous().clone()), "after an in-place change")
        w.copy_(numbers("another", (33, 40), dtype))
        same(linear(x, w), linear(x, w.contiguous().clone()), "after a copy into it")


def test_activation_special_values(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, INF, -INF, NAN], dtype=dtype)
    want = {"tanh": [0, 1, -1], "relu": [0, INF, 0], "sigmoid": [0.5, 1, 0]}
    for kind in ACTIVATIONS:
        y = activation(x, kind).tolist()
        assert y[3] != y[3], f"{kind}(nan) = {y[3]}"
        assert y[0] == want.get(kind, [0])[0], f"{kind}(0) = {y[0]}"
        assert y[1] == want.get(kind, [0, INF])[1], f"{kind}(inf) = {y[1]}"
        if kind in want:
            assert y[2] == want[kind][2], f"{kind}(-inf) = {y[2]}"


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_is_of_each_value_alone(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Registers, several at a time, tails: every value at every place in them, the special ones too."""
    info = torch.finfo(dtype)
    special = [NAN, INF, -INF, 0.0, -0.0, 1e38, -1e38, 89.0, -104.0, 0.625, -16.0]
    small = [info.smallest_normal, -info.smallest_normal, info.smallest_normal * info.eps, -info.smallest_normal * info.eps]
    x = torch.cat([torch.tensor(special + small).to(dtype), numbers("x", (52,), dtype)])
    assert len(x) == 67, "prime, so that each value comes to every place in 64"
    assert bool((x[13:15] != 0).all())
    for name in ("scalar", isa):
        invariants.force_isa(name)
        alone = torch.cat([activation(v[None], kind) for v in x])
        for length in (67 * 70, 67, 63):
            many = x.repeat(70)[:length]
            same(activation(many, kind), alone.repeat(70)[:length], f"{kind}, {name}, {length} values against each alone")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_far_out(backend: Backend, kind: str) -> None:
    """Small results of large negative arguments keep their digits: the bound is relative."""
    x = torch.linspace(-80.0, 80.0, 4001)
    near = cases.near_activation(cases.exact(x.double()), kind)
    error = (activation(x, kind).double() - near.value).abs()
    allowed = near.slack + cases.U * near.value.abs() + 2.0**-150
    assert bool((error <= allowed).all()), f"worst at x = {float(x[(error / allowed).argmax()])}"


def test_autocast_changes_nothing(backend: Backend) -> None:
    """A user's torch.autocast asks PyTorch's own products for half precision; ours are what they are."""
    x, w = numbers("x", (6, 130), torch.float32), numbers("w", (40, 130), torch.float32)
    want = linear(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        same(linear(x, w), want, "inside autocast")


def test_errors(backend: Backend) -> None:
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"linear: weight must be \[N, 3\], got \[4, 5\]"):
        linear(x, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"linear: bias must be \[4\], got \[3\]"):
        linear(x, w, torch.zeros(3))
    with pytest.raises(ValueError, match=r"linear: residual must be \[2, 4\], got \[4\]"):
        linear(x, w, residual=torch.zeros(4))
    with pytest.raises(ValueError, match=r"linear: activation must be one of .*'gelu'.* got 'swish'"):
        linear(x, w, activation="swish")
    with pytest.raises(ValueError, match=r"linear: out_dtype must be one of .* got torch.float64"):
        linear(x, w, out_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"linear: x must be float32, float16 or bfloat16, got torch.int64; convert it"):
        linear(x.long(), w)
    with pytest.raises(TypeError, match=r"linear: weight must be a torch.Tensor, got list"):
        linear(x, [[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"linear: weight must be \[N, K\] with N, K > 0, got \[4, 0\]"):
        linear(torch.zeros(2, 0), torch.zeros(4, 0))
    with pytest.raises(ValueError, match=r"activation: kind must be one of .* got None"):
        activation(x, None)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"linear: x asks for gradients and rerank_kernels is forward only"):
        linear(x.requires_grad_() * 2, w)


# ---- bmm: the cases' rows are entries of the batch; here are the rows inside an entry


@pytest.mark.promise("batch-invariant")
def test_bmm_rows_are_independent(backend: Backend, dtype: torch.dtype) -> None:
    """M-invariance: row m of an entry knows neither its entry's other rows nor how many there are."""
    a, b = numbers("a", (3, 40, 65), dtype), numbers("b", (3, 65, 33), dtype)
    want = bmm(a, b)
    for start, stop in ((0, 1), (39, 40), (3, 10), (0, 17), (20, 36), (5, 5)):
        same(bmm(a[:, start:stop], b), want[:, start:stop], f"rows {start}:{stop} of each entry alone")
    order = torch.arange(39, -1, -1) * 7 % 40
    same(bmm(a[:, order], b), want[:, order], "rows in another order")
    for junk in invariants.HOSTILE:
        poisoned = a.clone()
        poisoned[:, 1::2] = junk
        same(bmm(poisoned, b)[:, ::2], want[:, ::2], f"{junk} in the odd rows")


def test_bmm_columns_are_independent(backend: Backend, dtype: torch.dtype) -> None:
    a, b = numbers("a", (2, 6, 65), dtype), numbers("b", (2, 65, 40), dtype)
    want = bmm(a, b)
    for junk in (NAN, INF, 1e4):
        poisoned = b.clone()
        poisoned[:, :, 7] = junk
        got = bmm(a, poisoned)
        same(got[:, :, :7], want[:, :, :7], f"{junk} in column 7")
        same(got[:, :, 8:], want[:, :, 8:], f"{junk} in column 7")


@pytest.mark.promise("machine-invariant")
def test_bmm_is_linear_entry_by_entry(backend: Backend, dtype: torch.dtype) -> None:
    """Also with enough rows and columns to be shared out over tasks, and in a mix of dtypes."""
    a, b = numbers("a", (2, 150, 70), dtype), numbers("b", (2, 70, 130), dtype)
    same(bmm(a, b), torch.stack([linear(x, w.t()) for x, w in zip(a, b, strict=True)]), "bmm against linear")
    mixed = torch.stack([linear(x, w.t(), out_dtype=torch.float32) for x, w in zip(a, b.float(), strict=True)])
    same(bmm(a, b.float(), out_dtype=torch.float32), mixed, "float32 b, float32 out")


def test_bmm_any_layout(backend: Backend, dtype: torch.dtype) -> None:
    a, b = numbers("a", (3, 6, 24), dtype), numbers("b", (3, 24, 10), dtype)
    want, before = bmm(a, b), (a.clone(), b.clone())
    same(bmm(a, b.transpose(1, 2).contiguous().transpose(1, 2)), want, "b transposed in memory")
    same(bmm(a.transpose(0, 2).contiguous().transpose(0, 2), b), want, "a transposed in memory")
    same(bmm(a, b[:1].expand(3, 24, 10))[0], want[0], "one b for all entries")
    same(bmm(a[:0], b[:0]), want[:0], "no entries")
    same(a, before[0], "an argument")
    same(b, before[1], "an argument")


def test_bmm_errors(backend: Backend) -> None:
    a = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"bmm: a must be \[B, M, K\], got \[3, 4\]"):
        bmm(a[0], a)
    with pytest.raises(ValueError, match=r"bmm: b must be \[2, 4, N\], got \[2, 3, 4\]"):
        bmm(a, a)
    with pytest.raises(ValueError, match=r"bmm: b must be \[B, K, N\] with K, N > 0, got \[2, 0, 5\]"):
        bmm(torch.zeros(2, 3, 0), torch.zeros(2, 0, 5))
    with pytest.raises(TypeError, match=r"bmm: b must be float32, float16 or bfloat16, got torch.int64"):
        bmm(a, torch.zeros(2, 4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bmm: mode must be one of 'portable', 'tensor', got 'fast'"):
        bmm(a, torch.zeros(2, 4, 5), mode="fast")


# ---- the cpu's ways through a product: the rows choose blocks, tiles and the way of few rows, threads choose shares of columns


def by_threes(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Three rows at a time, so that none of what is below is chosen; the first also alone."""
    got = torch.cat([linear(part, w, out_dtype=torch.float32) for part in x.split(3)])
    same(linear(x[:1], w, out_dtype=torch.float32), got[:1], "one row against three")
    return got


def mixed(dtype: torch.dtype) -> list[tuple[torch.dtype, torch.dtype]]:
    """Dtypes of rows and of a weight."""
    return [(dtype, dtype)] if dtype == torch.float32 else [(dtype, torch.float32), (torch.float32, dtype)]


@pytest.mark.parametrize("k", [1024, 1100], ids=["rows copied", "rows in place"])
def test_blocks_and_shares(isa: str, dtype: torch.dtype, k: int) -> None:
    """Two blocks of rows (avx512: above 504, avx2: 510); ten panels of columns in shares of up to four, which are laid out at
    once, and nineteen in shares that take more than one turn."""
    for of_x, of_w in mixed(dtype):
        x, w = numbers("x", (530, k), of_x), numbers("w", (600, k), of_w)
        want = by_threes(x, w)
        for threads, rows, columns in itertools.product((1, 3), (505, 530), (300, 600)):
            (got,) = invariants.with_threads(
                threads, lambda x=x[:rows], w=w[:columns]: (linear(x, w, out_dtype=torch.float32),)
            )
            what = f"{isa}, {of_x} x {of_w}, {rows} rows, {columns} columns, {threads} threads"
            same(got, want[:rows, :columns], f"{what}, against three rows at a time")


@pytest.mark.parametrize("k", [1, 31, 33, 63, 512, 545, 1055])
def test_the_way_of_few_rows(isa: str, dtype: torch.dtype, k: int) -> None:
    """One to nine rows, alone and beside forty, which go in tiles; edges of a register, of a pair of values and of a chunk."""
    for of_x, of_w in mixed(dtype):
        x, w = numbers("x", (40, k), of_x), numbers("w", (70, k), of_w)
        want = linear(x, w, out_dtype=torch.float32)
        for rows, columns in itertools.product(range(1, 10), (1, 33, 70)):
            got = linear(x[:rows], w[:columns], out_dtype=torch.float32)
            same(got, want[:rows, :columns], f"{isa}, {of_x} x {of_w}, {rows} rows, {columns} columns, against forty rows")


def test_few_rows_see_the_order_of_a_pair(isa: str, dtype: torch.dtype) -> None:
    """Control: a kernel that took the second value of each pair first would have other bits here."""
    x, w = numbers("x", (8, 512), dtype), numbers("w", (70, 512), dtype)
    turned = torch.arange(512).view(-1, 2).flip(1).flatten()
    for rows in range(1, 9):
        right, wrong = (linear(a[:rows], b, out_dtype=torch.float32) for a, b in ((x, w), (x[:, turned], w[:, turned])))
        assert not torch.equal(right, wrong), f"{isa}, {rows} rows"


def test_blocks_of_the_scalar_kernel(isa: str, dtype: torch.dtype) -> None:
    """The same for the slowest: two blocks above 512 rows."""
    for of_x, of_w in mixed(dtype):
        x, w = numbers("x", (530, 520), of_x), numbers("w", (100, 520), of_w)
        invariants.force_isa(isa)
        want = by_threes(x, w)
        invariants.force_isa("scalar")
        got = linear(x, w, out_dtype=torch.float32)
        same(got, want, f"{of_x} x {of_w}, 530 rows, scalar, against three at a time, {isa}")


def test_blocks_and_shares_of_bmm(isa: str, dtype: torch.dtype) -> None:
    """Two blocks of rows, and five panels, of which one task takes all, in two groups, where it has enough entries."""
    for of_a, of_b in mixed(dtype):
        a, b = numbers("a", (4, 530, 520), of_a), numbers("b", (4, 140, 520), of_b)
        want = torch.stack([by_threes(x, w) for x, w in zip(a, b, strict=True)])
        for threads in (1, 3):
            (got,) = invariants.with_threads(threads, lambda a=a, b=b: (bmm(a, b.transpose(1, 2), out_dtype=torch.float32),))
            same(got, want, f"{isa}, {of_a} x {of_b}, {threads} threads, against linear of three rows at a time")


LAST_BLOCK_OF_FOUR = """
import rerank_kernels as rk
import torch
from rerank_kernels.backend.registry import use
rows = torch.arange(4.0 * 11000).view(4, 11000) % 29 - 14
a = torch.zeros(1, 35 * 504 + 4, 11000, dtype=torch.float16)
a[0, -4:] = rows
b = torch.ones(1, 11000, 8, dtype=torch.float16) * torch.arange(1.0, 9.0)
with use("cpu"):
    torch.ops.rerank_kernels.force_isa("avx512")
    y = rk.bmm(a, b.half(), out_dtype=torch.float32)
    assert torch.equal(y[0, -4:], rows.sum(1)[:, None] * torch.arange(1.0, 9.0)) and not y[0, :-4].any()
later = [torch.ones(n * 1000) for n in range(1, 100)]  # what lies beside the scratch memory is looked at
"""


@pytest.mark.parametrize("isa", ["avx512"], indirect=True)
def test_memory_of_a_last_block_of_few_rows(isa: str) -> None:
    """36 blocks, the last of 4 rows, which are widened whole: 44000 floats, where a block of 504 rows needs 39904.

    In a process of its own whose heap holds the scratch memory, since glibc then sees that what follows was overwritten.
    """
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4194304", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LAST_BLOCK_OF_FOUR], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def test_case_table_covers_the_edges() -> None:
    """K below, at and beyond one chunk of 512, and two; M = N = K = 1."""
    ks = {case.rows["x"][0] for case in CASES if case.op == "linear"}
    assert {1, 511, 512, 513, 1024, 1025} <= ks
    assert any(isinstance(case, Case) and case.shared.get("weight") == (1, 1) for case in CASES)
