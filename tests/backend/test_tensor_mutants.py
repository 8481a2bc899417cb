"""The tests of mode tensor on CUDA are tested: each line broken here must be caught, by what is named beside it, with tensor
cores that add as `model` says. Where the model matters, the reason is there.

As in test_cuda_mutants.py a mutant is csrc/cuda with one line changed, run by the real launchers; the honest kernel passes
first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import test_cuda
import test_tensor_contract
import torch

import cases
import conftest
import invariants
import tensor
from cases import Case
from conftest import ran
from invariants import all_same
from rerank_kernels.backend.native import sparse_ffn

simulated = pytest.importorskip("simulated.cuda")
Edit = simulated.Edit
Check = Callable[[Case, torch.dtype], None]
HALF = torch.float16


@pytest.fixture(scope="module")
def compiled() -> None:
    """Every mutant's PTX, several at a time: nvcc takes longer than all the rest."""
    if conftest.missing("cuda"):
        return
    simulated.library()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda m: simulated.ptx("sm80/linear", "80", m.edit.only(HALF)), MUTANTS))


@pytest.fixture(autouse=True)
def _cuda(compiled: None) -> None:
    ran("cuda")


def every_way(case: Case, dtype: torch.dtype) -> None:
    """What test_cuda.py asks of a launcher's ways."""
    rows, shared = case.make_rows(dtype), case.make_shared(dtype)
    want = case.call(rows, shared)
    for way in range(simulated.launchers()["linear_tensor"]):
        with simulated.forced("linear_tensor", way):
            all_same(case.call(rows, shared), want, f"{case}, way {way}")


def stated_gelu(case: Case, dtype: torch.dtype) -> None:
    test_tensor_contract.gelu_as_stated("cuda", dtype)


@dataclass(frozen=True)
class Mutant:
    name: str
    edit: Edit
    case: str
    check: Check
    caught_by: str  # in the error's text
    model: int = 2
    race: bool = False

    def __str__(self) -> str:
        return self.name


DIFFER = r"values differ"
MUTANTS = [
    Mutant(
        "a barrier dropped: a tile is read before all of it is there",
        Edit("sm80/linear.cu", "__syncthreads();                   // it is there for all, and all", "// for all, and all"),
        "linear-768x96-gelu-residual",
        invariants.right,
        "RACE|race",
        race=True,
    ),
    Mutant(
        "a barrier dropped: sums take the place of a tile that another warp reads",
        Edit(
            "sm80/linear.cu",
            "        __syncthreads();\n#pragma unroll\n        for (int i = 0; i < T::TM; ++i) {\n            if",
            "#pragma unroll\n        for (int i = 0; i < T::TM; ++i) {\n            if",
        ),
        "linear-513x17-gelu",
        invariants.right,
        "RACE|race",
        race=True,
    ),
    Mutant(
        "a wait of one stage too few: a copy that has not landed",
        Edit(
            "sm80/linear.cu",
            "wait_for_copies<T::STAGES - 2>();  // this thread's part of the next stage has landed",
            "wait_for_copies<T::STAGES - 1>();",
        ),
        "linear-768x96-gelu-residual",
        invariants.right,
        "beyond the bound",
    ),
    Mutant(
        "K is split by M: two accumulators, added at the end, for more than 4 rows",
        Edit(
            "sm80/linear.cu",
            "    for (int stage = 0; stage < full; ++stage) {",
            "    float other[T::TM][T::TN][4] = {};\n"
            "    for (int stage = 0; stage <= full; ++stage) {\n"
            "        const bool last = stage == full;\n"
            "        if (last || (g.M > 4 && stage == full / 2)) {\n"
            "            for (int at = 0; at < T::TM * T::TN * 4; ++at) {\n"
            "                float& a = other[at / 4 / T::TN][at / 4 % T::TN][at % 4];\n"
            "                float& b = sum[at / 4 / T::TN][at / 4 % T::TN][at % 4];\n"
            "                const float before = a;\n"
            "                a = b;\n"
            "                b = last ? before + b : 0.0f;\n"
            "            }\n"
            "        }\n"
            "        if (last) break;",
        ),
        "linear-1536x24-float32",
        invariants.batch_invariant,
        DIFFER,
    ),
    # Model 0 adds 16 products as it adds 8 and then 8: there this one is no mistake.
    Mutant(
        "the smallest tile, which few rows take, has m16n8k8 instead of m16n8k16",
        Edit(
            "sm80/linear.cu",
            "mma<Half>(sum[i][j], a[i], b[j][0], b[j][1]);",
            "if (T::BM > 16) mma<Half>(sum[i][j], a[i], b[j][0], b[j][1]);\n"
            "                else\n"
            "                    for (int h = 0; h < 2; ++h)\n"
            '                        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "\n'
            '                            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"\n'
            '                            : "+f"(sum[i][j][0]), "+f"(sum[i][j][1]), "+f"(sum[i][j][2]), "+f"(sum[i][j][3])\n'
            '                            : "r"(a[i][2 * h]), "r"(a[i][2 * h + 1]), "r"(b[j][h]));',
        ),
        "linear-1536x24-float32",
        every_way,
        DIFFER,
        model=3,
    ),
    Mutant(
        "the sum is rounded to half precision before the bias",
        Edit(
            "sm80/linear.cu",
            "            finish<Digits::OF_RESULT>(g, setup.eight, first + r, n0 + c, y);",
            "            for (int e = 0; e < 8; ++e) y[e / 4].v[e % 4] = widen(narrow<Half>(y[e / 4].v[e % 4]));\n"
            "            finish<Digits::OF_RESULT>(g, setup.eight, first + r, n0 + c, y);",
        ),
        "linear-1536x24-float32",
        invariants.right,
        "beyond the bound",
    ),
    Mutant(
        "what is missing in the last 16 k is what stands behind the row",
        Edit("sm80/mma.cuh", "if (e < valid) pairs[e / 2] |=", "pairs[e / 2] |="),
        "linear-513x17-gelu",
        invariants.right,
        "beyond the bound|out-of-bounds",
    ),
    Mutant(
        "the last k are left out where they do not fill an instruction",
        Edit("sm80/linear.cu", "steps = (K + STEP - 1) / STEP;", "steps = K / STEP;"),
        "linear-513x17-gelu",
        invariants.right,
        "beyond the bound",
    ),
    Mutant(
        "pieces that change places by the row when they are written, and not when they are read",
        Edit(
            "sm80/linear.cu",
            "swizzled<T::ROW>(warp_n * T::WN + b_row, piece_of_b());",
            "(b_row * T::ROW + piece_of_b() * 16);",
        ),
        "linear-768x96-gelu-residual",
        invariants.right,
        "beyond the bound",
    ),
    Mutant(
        "gelu has its long form for a half result too",
        Edit("epilogue.cuh", "return each(x, gelu_short);", "return each(x, gelu_of<float>);"),
        "linear-513x17-gelu",
        stated_gelu,
        DIFFER,
    ),
    Mutant(
        "every product of bmm takes the first one's second operand",
        Edit("sm80/linear.cu", "(batch * g.N + n0) * g.K * 2, g.K, columns", "n0 * g.K * 2, g.K, columns"),
        "bmm-33x64x70",
        invariants.batch_invariant,
        DIFFER,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant) -> None:
    case = cases.in_tensor_mode(cases.get(mutant.case))

    def run(edit: Edit | None) -> None:
        with tensor.simulated("cuda", mutant.model, edit=edit, race=mutant.race):
            mutant.check(case, HALF)

    run(None)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        run(mutant.edit.only(HALF))
    assert re.search(mutant.caught_by, str(caught.value)), f"caught, but not by {mutant.caught_by!r}: {caught.value}"


def test_sparse_ffn_of_many_rows_in_portable_products_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many take two ways; here only one of them has tensor cores."""
    test_cuda.test_tensor_sparse_ffn_of_few_rows_and_of_many(HALF)
    monkeypatch.setattr(sparse_ffn, "linear_tensor", sparse_ffn.linear)
    with pytest.raises(AssertionError, match=DIFFER):
        test_cuda.test_tensor_sparse_ffn_of_few_rows_and_of_many(HALF)
