"""What is tested on every op: `right`, and one function a promise (repeatable, batch_invariant, ...).

Each takes a case of cases.py and a dtype, runs the public function, and raises AssertionError with the first difference.
Results are compared as bits, with no tolerance; only `right` has one, the bound stated in cases.py. test_mutants.py runs
these very functions on deliberately wrong kernels and expects them to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from cases import Case, Tensors, numbers
from rerank_kernels.backend import registry
from rerank_kernels.ops.linear import linear
from simulated import served

INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
HOSTILE = (float("nan"), float("inf"), -3.0e4)  # what may stand in rows and places that are none of a row's business


def same(got: Tensor, want: Tensor, what: str) -> None:
    """Bit for bit; every NaN equals every NaN."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    integer = INTEGERS[got.dtype]
    a, b = got.contiguous().view(integer), want.contiguous().view(integer)
    wrong = (a != b) & ~(got.isnan() & want.isnan())
    if not wrong.any():
        return
    where = tuple(wrong.nonzero()[0].tolist())
    digits = torch.finfo(got.dtype).bits // 4
    mask = (1 << 4 * digits) - 1
    x, y = int(a[where]), int(b[where])
    worst = (_ordered(a).long() - _ordered(b).long())[wrong].abs().max()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} values differ, by up to {int(worst)} ulp; first at {where}: "
        f"got 0x{x & mask:0{digits}x} ({float(got[where])!r}), want 0x{y & mask:0{digits}x} ({float(want[where])!r}), "
        f"{abs(int(_ordered(a)[where]) - int(_ordered(b)[where]))} ulp"
    )


def _ordered(bits: Tensor) -> Tensor:
    """Bits of floats as integers in the order of the floats, so that a difference counts ulps."""
    wide = bits.long()
    return torch.where(wide < 0, -(wide & torch.iinfo(bits.dtype).max), wide)


def all_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...], what: str, rows: Tensor | slice = slice(None)) -> None:
    """`got` against the given rows of `want`, for every output of the op."""
    assert len(got) == len(want)
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        same(g, w[rows], what if len(got) == 1 else f"{what}, output {number}")


def right(case: Case, dtype: torch.dtype) -> None:
    """Within the stated bound of the float64 truth, also where softmax and sigmoid come near 0 and 1."""
    shared = case.make_shared(dtype)
    for scale in (1.0, 8.0):
        rows = {n: t * scale for n, t in case.make_rows(dtype).items()}
        out = case.call(rows, shared)
        for got, near in zip(out, case.near(rows, shared, out), strict=True):
            assert got.shape == near.value.shape, f"{case}: shape {tuple(got.shape)}, want {tuple(near.value.shape)}"
            error = (got.double() - near.value).abs()
            bad = ~(error <= near.slack)  # also where the error is NaN
            if bad.any():
                where = tuple(bad.nonzero()[0].tolist())
                value, truth, slack = (float(t[where]) for t in (got, near.value, near.slack))
                raise AssertionError(
                    f"{case}, {dtype}, rows * {scale}: {int(bad.sum())} of {bad.numel()} values beyond the bound; "
                    f"first at {where}: got {value!r}, truth {truth!r}, allowed error {slack:.3g}"
                )


def repeatable(case: Case, dtype: torch.dtype) -> None:
    rows, shared = case.make_rows(dtype), case.make_shared(dtype)
    first = case.call(rows, shared)
    for _ in range(2):
        all_same(case.call(rows, shared), first, f"{case} run again")


def batch_invariant(case: Case, dtype: torch.dtype) -> None:
    """A row's bits do not depend on the other rows, on how many there are, or on where it stands among them."""
    shared = case.make_shared(dtype)
    (_sequences_batch if case.lengths else _rows_batch)(case, case.make_rows(dtype), shared)


def _rows_batch(case: Case, rows: Tensors, shared: Tensors) -> None:
    full = case.call(rows, shared)
    m = case.count
    for start, stop in [(0, 1), (1, 2), (m - 1, m), (0, 2), (3, 10), (1, 14), (0, 15), (20, 36), (0, 17), (2, 35), (0, 0)]:
        part = {n: t[start:stop] for n, t in rows.items()}
        all_same(case.call(part, shared), full, f"{case}, rows {start}:{stop} alone", slice(start, stop))
    order = torch.arange(m - 1, -1, -1) * 5 % m
    all_same(case.call({n: t[order] for n, t in rows.items()}, shared), full, f"{case}, rows in another order", order)
    more = case.make_rows(next(iter(rows.values())).dtype, 113, "more")
    grown = case.call({n: torch.cat([more[n], t]) for n, t in rows.items()}, shared)
    all_same(tuple(g[113:] for g in grown), full, f"{case}, 113 rows more in front")
    shifted = {n: _misaligned(t) for n, t in rows.items()}
    all_same(case.call(shifted, shared), full, f"{case}, rows at an odd address")
    for value in HOSTILE:
        others = {n: t.clone() for n, t in rows.items()}
        for t in others.values():
            t[1::2] = value
        got = case.call(others, shared)
        all_same(tuple(g[::2] for g in got), full, f"{case}, {value} in the odd rows", slice(None, None, 2))


def _sequences_batch(case: Case, rows: Tensors, shared: Tensors) -> None:
    full = case.call(rows, shared)
    bounds = {n: _bounds(case.lengths_of(n)) for n in rows}
    out = _bounds(case.lengths)
    per_token = full[0].shape[0] == case.total and case.op != "pool"

    def of(out: tuple[Tensor, ...], b: int, start: int, stop: int) -> tuple[Tensor, ...]:
        return tuple(t[start:stop] if per_token else t[b : b + 1] for t in out)

    def chosen(order: list[int]) -> tuple[Tensor, ...]:
        """Of these sequences only, in this order."""
        part = {n: torch.cat([t[slice(*bounds[n][b])] for b in order]) for n, t in rows.items()}
        lengths, keys = (tuple(some[b] for b in order) if some else () for some in (case.lengths, case.keys))
        return case.call(part, shared, lengths, keys)

    for b, (start, stop) in enumerate(out):
        all_same(chosen([b]), of(full, b, start, stop), f"{case}, sequence {b} alone")
    order = list(reversed(range(len(out))))
    token = torch.cat([torch.arange(*out[b]) for b in order])
    all_same(chosen(order), full, f"{case}, sequences in another order", token if per_token else torch.tensor(order))
    shifted = {n: _misaligned(t) for n, t in rows.items()}
    all_same(case.call(shifted, shared), full, f"{case}, tokens at an odd address")
    for value in HOSTILE:
        for parity in (0, 1):
            others = {n: t.clone() for n, t in rows.items()}
            for n, t in others.items():
                for start, stop in bounds[n][parity::2]:
                    t[start:stop] = value
            got = case.call(others, shared)
            for b, (start, stop) in list(enumerate(out))[1 - parity :: 2]:
                all_same(of(got, b, start, stop), of(full, b, start, stop), f"{case}, {value} in sequences beside {b}")


def padding_invariant(case: Case, dtype: torch.dtype) -> None:
    """A row's bits do not depend on padded length, side, pad content, or on packed against padded."""
    shared = case.make_shared(dtype)
    (_sequences_padded if case.lengths else _rows_padded)(case, case.make_rows(dtype), shared)


def _rows_padded(case: Case, rows: Tensors, shared: Tensors) -> None:
    full = case.call(rows, shared)
    m = case.count
    i = torch.arange(m)
    for places, junk in ((i * 2, 0.0), (i + 3, HOSTILE[0]), (i * 2 + i % 2, HOSTILE[1]), (2 * m - 1 - i, HOSTILE[2])):
        padded = {n: t.new_full((2 * m, *t.shape[1:]), junk).index_copy_(0, places, t) for n, t in rows.items()}
        got = case.call(padded, shared)
        all_same(tuple(g[places] for g in got), full, f"{case}, padded with {junk}")


def _sequences_padded(case: Case, rows: Tensors, shared: Tensors) -> None:
    packed = case.call(rows, shared)
    of = {"mask": case.lengths, "mask_k": case.keys} if case.keys else {"mask": case.lengths}
    bounds = {n: _bounds(case.lengths_of(n)) for n in rows}
    for side, more in (("left", 0), ("right", 0), ("left", 9), ("right", 64), ("scattered", 31)):
        masks = {name: _mask(side, lengths, max(lengths) + more) for name, lengths in of.items()}
        its = {n: masks["mask_k" if case.keys and n in ("k", "v") else "mask"] for n in rows}
        mask, what = masks["mask"], f"{case}, padded {side} to {max(case.lengths) + more}"
        for junk, form in zip((0.0, *HOSTILE), (Tensor.bool, lambda m: m.long() * 7, Tensor.bool, Tensor.int), strict=True):
            padded = {n: t.new_full((*its[n].shape, *t.shape[1:]), junk) for n, t in rows.items()}
            for n, t in padded.items():
                t[its[n]] = rows[n]
            got = case.call_padded(padded, shared, {name: form(m) for name, m in masks.items()})
            if case.op == "pool":
                all_same(got, packed, f"{what} with {junk}")
                continue
            all_same(tuple(g[mask] for g in got), packed, f"{what} with {junk}")
            assert all(bool((g[~mask] == 0).all()) for g in got), f"{case}: a padded place of the result is not 0"
    for b, (start, stop) in enumerate(_bounds(case.lengths)):
        if stop - start == max(case.lengths):  # no mask is a mask of ones
            alone = {n: t[None, slice(*bounds[n][b])] for n, t in rows.items()}
            want = tuple(t[b : b + 1] if case.op == "pool" else t[None, start:stop] for t in packed)
            all_same(case.call_padded(alone, shared, {}), want, f"{case}, sequence {b} without a mask")


def _mask(side: str, lengths: tuple[int, ...], width: int) -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for b, n in enumerate(lengths):
        mask[b, place(side, n, width)] = True
    return mask


def place(side: str, n: int, width: int) -> Tensor:
    """Where the n tokens of a sequence stand in a padded row."""
    if side == "left":
        return torch.arange(width - n, width)
    if side == "right":
        return torch.arange(n)
    return torch.arange(width)[torch.argsort(numbers("scattered", (width,), torch.float32))[:n].sort().values]


def thread_invariant(case: Case, dtype: torch.dtype) -> None:
    """Enough rows that a kernel has something to split, at thread counts that divide nothing."""
    shared = case.make_shared(dtype)
    rows = case.make_rows(dtype) if case.lengths else case.make_rows(dtype, 150)
    want = with_threads(1, lambda: case.call(rows, shared))
    for threads in (2, 3, 7):
        all_same(with_threads(threads, lambda: case.call(rows, shared)), want, f"{case} with {threads} threads against 1")


def schedule_invariant(case: Case, dtype: torch.dtype, simulated: Callable[..., AbstractContextManager[None]]) -> None:
    """A GPU's side of thread-invariant: blocks and warps in any order. In the simulator, with the search for races on."""
    shared = case.make_shared(dtype)
    rows = case.make_rows(dtype) if case.lengths else case.make_rows(dtype, 70)
    want = case.call(rows, shared)
    for how in (dict(sched=1, race=True), dict(sched=2, seed=3, race=True, lazy_async=True)):
        with simulated(**how):
            all_same(case.call(rows, shared), want, f"{case} with {how} against blocks and warps in order")


def hidden_keys(case: Case, dtype: torch.dtype) -> None:
    """attention: what a row may not see (causal, window) does not reach it, not even as 0 * NaN."""
    rows, shared = case.make_rows(dtype), case.make_shared(dtype)
    (want,) = case.call(rows, shared)
    left, right = case.options.get("window", (-1, -1))
    right = 0 if case.options.get("causal") else right
    for (start, stop), (first, last) in zip(_bounds(case.lengths), _bounds(case.lengths_of("k")), strict=True):
        for token in {first, (first + last) // 2, last - 1} if start < stop and first < last else ():
            away = torch.arange(last - (stop - start), last) - token  # row - key; the rows are the last ones of their keys
            blind = torch.zeros(stop - start, dtype=torch.bool)
            if right >= 0:
                blind |= away < -right
            if left >= 0:
                blind |= away > left
            for junk in HOSTILE:
                poisoned = {n: t.clone() for n, t in rows.items()}
                for t in (poisoned["k"], poisoned["v"], *(() if case.keys else (poisoned["q"],))):
                    t[token] = junk
                (got,) = case.call(poisoned, shared)
                same(
                    got[start:stop][blind], want[start:stop][blind], f"{case}, {junk} in token {token}, rows that do not see it"
                )


def sparse_is_dense(case: Case, dtype: torch.dtype) -> None:
    """sparse_ffn: skipping neurons changes no bit against the chain of dense layers."""
    rows, w = case.make_rows(dtype), case.make_shared(dtype)
    options = case.options
    hidden = linear(rows["x"], w["up_weight"], w.get("up_bias"), out_dtype=torch.float32)
    first = linear(rows["x"], w["gate_weight"], w.get("gate_bias"), out_dtype=torch.float32) if "gate_weight" in w else hidden
    act = torch.where(first > options.get("threshold", 0.0), first, torch.zeros_like(first))
    act = act * act if options.get("activation") == "relu2" else act
    up = torch.relu(hidden) if options.get("up_activation") else hidden
    hidden = act * up if "gate_weight" in w else act
    assert 0.05 < float((hidden == 0).double().mean()) < 0.95, f"{case}: the case exercises nothing"
    dense = linear(hidden, w["down_weight"], w.get("down_bias"), residual=rows.get("residual"), out_dtype=dtype)
    all_same(case.call(rows, w), (dense,), f"{case}, sparse against dense")


def force_isa(name: str) -> str:
    """Makes the cpu backend use "avx512", "avx2", "scalar" or, with "auto", the best there is; returns what it now uses."""
    return torch.ops.rerank_kernels.force_isa(name)


def with_threads(count: int, f: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return f()
    finally:
        torch.set_num_threads(before)


def _bounds(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [(e - n, e) for e, n in zip(ends, lengths, strict=True)]


def _misaligned(t: Tensor) -> Tensor:
    """The same contiguous values one element off any boundary."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


class Promises:
    """The tests every op has; a mirror test_<family>.py derives from it once and sets CASES."""

    def test_right(self, backend: registry.Backend, case: Case, dtype: torch.dtype) -> None:
        right(case, dtype)

    @pytest.mark.promise("repeatable")
    def test_repeatable(self, backend: registry.Backend, case: Case, dtype: torch.dtype) -> None:
        repeatable(case, dtype)

    @pytest.mark.promise("batch-invariant")
    def test_batch_invariant(self, backend: registry.Backend, case: Case, dtype: torch.dtype) -> None:
        batch_invariant(case, dtype)

    @pytest.mark.promise("padding-invariant")
    def test_padding_invariant(self, backend: registry.Backend, case: Case, dtype: torch.dtype) -> None:
        padding_invariant(case, dtype)

    @pytest.mark.promise("thread-invariant")
    def test_thread_invariant(self, backend: registry.Backend, case: Case, dtype: torch.dtype) -> None:
        if backend.name in served.SIMULATED:
            schedule_invariant(case, dtype, served.simulator(backend.name))
        else:
            thread_invariant(case, dtype)

    def test_machine_invariant(self, isa: str, case: Case, dtype: torch.dtype) -> None:
        """avx512 = avx2 = scalar: three kernels from one source, bit for bit; so are each one's ways for few rows."""
        rows, shared = case.make_rows(dtype), case.make_shared(dtype)
        force_isa("scalar")
        want = case.call(rows, shared)
        for name in ("scalar", isa):
            force_isa(name)
            all_same(case.call(rows, shared), want, f"{case}, {name} against scalar")
            for few in () if case.lengths else (1, 3, 7):
                part = {n: t[:few] for n, t in rows.items()}
                all_same(case.call(part, shared), want, f"{case}, {few} rows, {name} against scalar", slice(few))

    @pytest.mark.promise("repeatable")
    def test_more_dimensions(self, backend: registry.Backend, case: Case) -> None:
        """[..., D] is the same rows: leading dimensions and memory layout are no part of the arithmetic."""
        if case.lengths or case.op in ("score_head", "bmm"):  # whose shapes are fixed
            return
        rows, shared = case.make_rows(torch.float32, 24), case.make_shared(torch.float32)
        want = case.call(rows, shared)
        for shape in ((2, 3, 4), (24, 1, 1)):
            got = case.call({n: t.view(*shape, *t.shape[1:]) for n, t in rows.items()}, shared)
            all_same(tuple(g.flatten(0, 2) for g in got), want, f"{case} as {shape}")
        strided = {n: torch.stack([t, t + 1], -1)[..., 0] for n, t in rows.items()}
        all_same(case.call(strided, shared), want, f"{case}, every second element of a wider tensor")
        turned = {n: torch.stack([w, w + 1], -1)[..., 0] for n, w in shared.items()}
        all_same(case.call(rows, turned), want, f"{case}, weights with gaps")

    @pytest.mark.promise("repeatable")
    def test_no_rows(self, backend: registry.Backend, case: Case, dtype: torch.dtype) -> None:
        rows, shared = case.make_rows(dtype, 0), case.make_shared(dtype)
        full = case.call(case.make_rows(dtype), shared)
        if case.lengths:
            for lengths in ((), (0,), (0, 0, 0)):
                for got, f in zip(case.call(rows, shared, lengths, lengths), full, strict=True):
                    first = len(lengths) if case.op == "pool" else 0
                    assert got.shape == (first, *f.shape[1:]) and got.dtype == f.dtype and not got.any()
            return
        for got, f in zip(case.call(rows, shared), full, strict=True):
            assert got.shape == (0, *f.shape[1:]) and got.dtype == f.dtype
