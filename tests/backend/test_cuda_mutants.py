"""The tests of the CUDA kernels are tested: each line broken here must be caught, by what is named beside it.

A mutant is csrc/cuda with one line changed, compiled by nvcc and run by the real launchers. The honest kernel passes the same
check first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

import cases
import conftest
import contract
import invariants
import rerank_kernels as rk
from conftest import ran
from invariants import all_same
from prefill import keys_in_a_cache
from rerank_kernels.backend import registry

simulated = pytest.importorskip("simulated.cuda")
Edit = simulated.Edit


@pytest.fixture(scope="module")
def compiled() -> None:
    """Every mutant's PTX, several at a time: nvcc takes longer than all the rest."""
    if conftest.missing("cuda"):
        return
    simulated.library()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda m: simulated.ptx(m.source, "80", m.edit.only(m.dtype)), MUTANTS))


@pytest.fixture(autouse=True)
def _cuda(compiled: None) -> None:
    ran("cuda")


@dataclass(frozen=True)
class Mutant:
    name: str
    edit: Edit
    case: str
    caught_by: str  # in the error's text
    check: Callable[[cases.Case, torch.dtype], None] | None = None  # else: the bits of the cpu backend
    dtype: torch.dtype = torch.float32
    force: tuple[str, int] | None = None
    lazy_async: bool = False
    race: bool = True
    sched: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def source(self) -> str:
        return f"portable/{cases.OPS[cases.get(self.case).op]}"


def exp_inside_softmax(falls: list[float]) -> None:
    """Rows of a 0 and a number below it: exp of both, and the first digits of exp of the second."""
    x = torch.tensor(falls)
    e = torch.from_numpy(contract.exp(x.numpy()))
    all_same((rk.softmax(torch.stack([torch.zeros_like(x), x], 1)),), (torch.stack([1 / (1 + e), e / (1 + e)], 1),), "exp")


DIFFER = r"values differ"
TWO_PRODUCTS = "p * float_of_bits(int((unsigned(bits_of_float(t)) << 23) + (unsigned(SHIFT + 127) << 23))) * BACK;"
MUTANTS = [
    Mutant(
        "a barrier dropped: a tile is read before all of it is there",
        Edit(
            "portable/gemm.cuh", "__syncthreads();  // this stage is there for all, and all are through with the last one", ""
        ),
        "linear-768x96-gelu-residual",
        "RACE|race",
    ),
    Mutant(
        "a wait dropped: a copy that has not landed",
        Edit("portable/gemm.cuh", "wait_for_copies<T::STAGES - 2>();  // this thread's part of the next stage has landed", ""),
        "linear-768x96-gelu-residual",
        DIFFER,
        lazy_async=True,
        race=False,
    ),
    Mutant(
        "K is split by M: few rows take chunks of 256",
        Edit(
            "portable/gemm.cuh",
            "const int chunk_end = stages - stage < CHUNK / T::BK ? stages : stage + CHUNK / T::BK;",
            "const int span = (rows > 4 ? CHUNK : CHUNK / 2) / T::BK;"
            "const int chunk_end = stages - stage < span ? stages : stage + span;",
        ),
        "linear-768x96-gelu-residual",
        DIFFER,
        invariants.batch_invariant,
    ),
    Mutant(
        "products in TF32",
        Edit(
            "portable/gemm.cuh",
            "sum[i][j] = fmadd(a[i].v[e], b.v[e], sum[i][j]);",
            "sum[i][j] = fmadd(__uint_as_float(__float_as_uint(a[i].v[e]) & 0xffffe000u), b.v[e], sum[i][j]);",
        ),
        "linear-768x96-gelu-residual",
        DIFFER,
    ),
    Mutant(
        "a large tile's barrier dropped: factors are read before they are there",
        Edit(
            "portable/gemm_large.cuh",
            "__syncthreads();  // the next stage is there for all, and all are through with this one",
            "",
        ),
        "linear-768x96-gelu-residual",
        "RACE|race",
        force=("linear", 0),
    ),
    Mutant(
        "a large tile's k in another order",
        Edit("portable/gemm_large.cuh", "(place() + a * 8 + e) * PITCH", "(place() + a * 8 + (e ^ 1)) * PITCH"),
        "linear-768x96-gelu-residual",
        DIFFER,
        force=("linear", 0),
    ),
    Mutant(
        "a large tile's k past the end are not zeros",
        Edit("portable/gemm_large.cuh", "if (e >= there) continue;", "if (e > there) continue;"),
        "linear-513x17-gelu",
        f"{DIFFER}|out of bounds|out-of-bounds|outside",
        force=("linear", 0),
    ),
    Mutant(
        "a large tile's totals forget a chunk",
        Edit("portable/gemm_large.cuh", "const bool first = stage == 0;", "const bool first = stage < 2 * CHUNK / T::BK;"),
        "linear-1536x24-float32",
        DIFFER,
        force=("linear", 0),
    ),
    Mutant(
        "chunk sums added from the last to the first",
        Edit("portable/linear.cu", "(chunk * rows + m) * g.N + n;", "((setup.chunks - 1 - chunk) * rows + m) * g.N + n;"),
        "linear-1536x24-float32",
        DIFFER,
        force=("linear", 1),
    ),
    Mutant(
        "2^n as a sum of exponents: a NaN becomes a number",
        Edit("../numerics.h", TWO_PRODUCTS, "float_of_bits(bits_of_float(p) + int(unsigned(bits_of_float(t)) << 23));"),
        "softmax-100",
        DIFFER,
        lambda case, dtype: exp_inside_softmax([float("nan")]),
    ),
    Mutant(
        "2^n in one product: nothing is left below 2^-126",
        Edit("../numerics.h", TWO_PRODUCTS, "p * float_of_bits(int((unsigned(bits_of_float(t)) << 23) + (127u << 23)));"),
        "softmax-100",
        DIFFER,
        lambda case, dtype: exp_inside_softmax([-87.5, -88.0, -90.0, -103.0]),
    ),
    Mutant(
        "chunk sums added by atomics: the order of the blocks is in the bits",
        Edit(
            "portable/linear.cu",
            "    if (setup.four) store_four(to, y[0]);\n    else\n",
            "    if (c + 3 < part.columns)\n"
            "        for (int e = 0; e < 4; ++e) atomicAdd(to - part.chunk * g.M * g.N + e, y[0].v[e]);\n"
            "    else\n",
        ),
        "linear-1536x24-float32",
        DIFFER,
        force=("linear", 7),
        sched=2,
    ),
    Mutant(
        "two blocks write one place",
        Edit(
            "portable/linear.cu",
            "(part.chunk * setup.batches * g.M + part.m + r) * g.N + part.n + c;",
            "(part.m + r) * g.N + part.n + c;",
        ),
        "linear-1536x24-float32",
        "RACE|race",
        force=("linear", 7),
    ),
    Mutant(
        "a tile's last rows are read though they do not exist",
        Edit("portable/linear.cu", "return x + (r < rows ? r : rows - 1) * setup.x.bytes;", "return x + r * setup.x.bytes;"),
        "linear-768x96-gelu-residual",
        "out of bounds|out-of-bounds|outside",
    ),
    Mutant(
        "a mask off by one",
        Edit("portable/attention.cu", "at < begin || at >= end", "at < begin || at > end"),
        "attention-D64-H4of2-T70-causal=True",
        DIFFER,
    ),
    Mutant(
        "a cap by the product with its inverse",
        Edit("attention.cuh", "tanh_of(score / softcap) * softcap", "tanh_of(score * (1.0f / softcap)) * softcap"),
        "attention-D40-H2of2-T70-window=(33,3)-scale=0.5-softcap=50.0",
        DIFFER,
    ),
    Mutant(
        "keys end where the next sequence's begin",
        Edit("attention.cuh", "clamped(packed.keys_end[b])", "clamped(packed.keys_begin[b + 1])"),
        "attention-D16-H4of2-T1of70-causal=True",
        DIFFER,
        lambda case, dtype: keys_in_a_cache(dtype),
    ),
    Mutant(
        "queries are the first ones of their keys, not the last",
        Edit("attention.cuh", "shift = keys - length;", "shift = 0;"),
        "attention-D16-H4of2-T1of70-causal=True",
        DIFFER,
    ),
    Mutant(
        "a row that sees no key divides by its sum of zero",
        Edit("portable/attention.cu", "if (l == 0.0f) l = 1.0f;", ""),
        "attention-D32-H2of1-T9of70-window=(40,3)",
        DIFFER,
    ),
    Mutant(
        "a hidden key is multiplied by zero",
        Edit("portable/attention.cu", "if (HIDES && __float_as_uint(e[i].v[m]) == 0x80000000u) continue;", ""),
        "attention-D64-H4of2-T70-causal=True",
        DIFFER,
        invariants.hidden_keys,
    ),
    Mutant(
        "a tile whose first key is hidden taken for one that hides nothing",
        Edit("portable/attention.cu", "work.begin(i_last) > key ||", "work.begin(i_last) > key + 1 ||"),
        "attention-D32-H2of2-T70-window=(30,-1)",
        DIFFER,
        invariants.hidden_keys,
    ),
    Mutant(
        "a tile whose last key is hidden taken for one that hides nothing",
        Edit(
            "portable/attention.cu",
            "work.end(i_first) < min(key + KEY_TILE, length)",
            "work.end(i_first) + 1 < min(key + KEY_TILE, length)",
        ),
        "attention-D32-H2of2-T70-window=(-1,30)",
        DIFFER,
        invariants.hidden_keys,
    ),
    Mutant(
        "scores take the place of Q while another warp reads it",
        Edit("portable/attention.cu", "if (round == 0 && kept && kept_at >= score_tiles) __syncthreads();", ""),
        "attention-D128-H2of2-T100",
        "RACE|race",
        dtype=torch.float16,
        force=("attention", 0),
    ),
    Mutant(
        "active neurons in another order",
        Edit(
            "portable/sparse_ffn.cu",
            "active.neuron[at * CHUNK + place] = int(f);",
            "active.neuron[at * CHUNK + (place ^ 1)] = int(f);",
        ),
        "sparse_ffn-33x513x17-bias",
        DIFFER,
        invariants.batch_invariant,  # few rows take the sparse way, many the dense one
    ),
    Mutant(
        "a relu on up that is forgotten",
        Edit("portable/sparse_ffn.cu", "up_relu && up <= 0.0f ? 0.0f : value * up", "value * up"),
        "sparse_ffn-36x600x24-gate-bias-threshold=0.25-up_activation=relu",
        DIFFER,
        invariants.batch_invariant,  # few rows take the sparse way, many the dense one
    ),
    Mutant(
        "an fma in two roundings",
        Edit(
            "portable/norm.cu",
            "return fmadd(c, c, sum);\n    });\n    const float rstd = rstd_of(squares, count, a.eps);\n    T*",
            "return c * c + sum;\n    });\n    const float rstd = rstd_of(squares, count, a.eps);\n    T*",
        ),
        "layer_norm-768",
        DIFFER,
    ),
    Mutant(
        "the weight multiplies what is not rounded yet",
        Edit("portable/norm.cu", "return rounded ? widen(narrow<T>(x)) : x;", "return x;"),
        "rms_norm-768-before",
        DIFFER,
        dtype=torch.float16,
    ),
    Mutant(
        "a product and a sum in one rounding",
        Edit("portable/rotary.cu", "*second = x_b * c[j] + x_a * s[j];", "*second = fmadd(x_b, c[j], x_a * s[j]);"),
        "rotary-D80-H2-P16",
        DIFFER,
    ),
    Mutant(
        "neighbours of an interleaved pair mixed up",
        Edit("portable/rotary.cu", "(j < N / 2 ? u : v) + 2 * j % N;", "(j < N / 2 ? u : v) + j % N;"),
        "rotary-D128-H3-P32-interleaved",
        DIFFER,
        dtype=torch.float16,
    ),
    Mutant(
        "a row's barrier dropped",
        Edit("portable/rows.cuh", "if constexpr (WARPS == 1) __syncwarp();\n    else __syncthreads();", ""),
        "layer_norm-768",
        "RACE|race",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant) -> None:
    case, dtype = cases.get(mutant.case), mutant.dtype
    rows, shared = case.make_rows(dtype), case.make_shared(dtype)
    with registry.use("cpu"):
        want = case.call(rows, shared)

    def run(edit: Edit | None) -> None:
        kernel, way = mutant.force or ("linear", -1)
        how = dict(race=mutant.race, lazy_async=mutant.lazy_async, sched=mutant.sched)
        with simulated.simulated(edit=edit, poison=0, **how), simulated.forced(kernel, way):
            if mutant.check:
                mutant.check(case, dtype)
            else:
                all_same(case.call(rows, shared), want, f"{case}, cuda against cpu")

    run(None)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        run(mutant.edit.only(dtype))
    assert re.search(mutant.caught_by, str(caught.value)), f"caught, but not by {mutant.caught_by!r}: {caught.value}"


def test_the_cpu_is_not_compared_with_itself() -> None:
    said = "ops on CPU tensors are csrc/cuda's"
    with simulated.simulated(), pytest.raises(registry.BackendError, match=said), registry.use("cpu"):
        pass
