"""The tests of attention in mode "tensor" on CUDA are tested: each line broken here must be caught, by what is named beside it.

As in test_cuda_mutants.py a mutant is csrc/cuda with one line changed, run by the real launcher; the honest one passes first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import test_tensor_contract
import torch

import cases
import conftest
import invariants
import tensor
from conftest import ran
from not_finite import not_finite
from prefill import steps_against_prefill

simulated = pytest.importorskip("simulated.cuda")
Edit = simulated.Edit
HALF = torch.float16


@pytest.fixture(scope="module")
def compiled() -> None:
    """Every mutant's PTX, several at a time: nvcc takes longer than all the rest."""
    if conftest.missing("cuda"):
        return
    simulated.library()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda m: simulated.ptx("sm80/attention", "80", m.edit.only(HALF)), MUTANTS))


@pytest.fixture(autouse=True)
def _cuda(compiled: None) -> None:
    ran("cuda")


@dataclass(frozen=True)
class Mutant:
    name: str
    edit: Edit
    case: str | cases.Case
    check: Callable[[cases.Case, torch.dtype], None]
    caught_by: str  # in the error's text
    race: bool = False

    def __str__(self) -> str:
        return self.name


FILE = "sm80/attention.cu"
CAUSAL, LONG = "attention-D64-H4of2-T70-causal=True", "attention-D64-H2of2-T100"
TILES = cases._attention(64, (2, 1), (140, 3, 260), causal=True)  # of 128 keys: two and three
DIFFER, WRONG, KINDS = r"values differ", r"beyond the bound", r"results of another kind"


def stated(case: cases.Case, dtype: torch.dtype) -> None:
    test_tensor_contract.as_stated("cuda", 150, 64, dtype, causal=True)


MUTANTS = [
    Mutant(
        "a barrier dropped: a tile is read before all of it is there",
        Edit(FILE, "__syncthreads();\n        const unsigned before = stage", "const unsigned before = stage"),
        LONG,
        invariants.right,
        "RACE|race",
        race=True,
    ),
    Mutant(
        "a wait dropped: a copy that has not landed",
        Edit(FILE, "wait_for_copies<H::STAGES - 2>();", ""),
        LONG,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "the keys are split in two chains where there are few blocks",
        Edit(
            FILE,
            "for (int tile = tiles.begin; tile < tiles.end; ++tile) {",
            "float top2[2] = {NONE_YET, NONE_YET}, l2[4] = {}, out2[H::PIECES][4] = {};\n"
            "        for (int tile = tiles.begin; tile <= tiles.end; ++tile) {\n"
            "            const bool end = tile == tiles.end, few = gridDim.x * gridDim.y < 16;\n"
            "            if (end || (few && tile == (tiles.begin + tiles.end) / 2))\n"
            "                for (int i = 0; i < 2; ++i) {\n"
            "                    const float m = fmaxf(top[i], top2[i]), c = weigh.c, least = weigh.least;\n"
            "                    const float x = exp2_short(top[i] - m, c, least), y = exp2_short(top2[i] - m, c, least);\n"
            "                    for (int n = 0; n < 2 * H::PIECES; ++n) {\n"
            "                        float &a = out[n / 2][2 * i + n % 2], &b = out2[n / 2][2 * i + n % 2];\n"
            "                        if (end) a = a * x + b * y;\n"
            "                        else b = a, a = 0.0f;\n"
            "                    }\n"
            "                    if (end) l[2 * i] = l[2 * i] * x + l2[2 * i] * y;\n"
            "                    else l2[2 * i] = l[2 * i], top2[i] = top[i], l[2 * i] = 0.0f, top[i] = NONE_YET;\n"
            "                }\n"
            "            if (end) break;",
        ),
        TILES,
        invariants.batch_invariant,
        DIFFER,
    ),
    Mutant(
        "tiles of keys begin where they do in the packed buffer, not at the sequence's first token",
        Edit(
            FILE,
            "const auto key_of = [](int tile) { return tile * H::KEYS; };\n"
            "    const auto tile_of = [](int key) { return key / H::KEYS; };",
            "const int shift = int((work.k - static_cast<const T*>(a.k)) / a.k_token) % H::KEYS;\n"
            "    const auto key_of = [=](int tile) { return tile * H::KEYS - shift; };\n"
            "    const auto tile_of = [=](int key) { return (key + shift) / H::KEYS; };",
        ),
        TILES,
        invariants.batch_invariant,
        DIFFER,
    ),
    Mutant(
        "tiles of keys end at the place of the block's first query, as if each call had tiles of its own",
        Edit(
            FILE,
            "const auto key_of = [](int tile) { return tile * H::KEYS; };\n"
            "    const auto tile_of = [](int key) { return key / H::KEYS; };",
            "const bool first = work.k < static_cast<const T*>(a.k) + H::KEYS * a.k_token;  // nothing lies before it\n"
            "    const int shift = first ? 0 : H::KEYS - 1 - work.token % H::KEYS;\n"
            "    const auto key_of = [=](int tile) { return tile * H::KEYS - shift; };\n"
            "    const auto tile_of = [=](int key) { return (key + shift) / H::KEYS; };",
        ),
        CAUSAL,
        lambda case, dtype: steps_against_prefill(64, dtype, mode="tensor"),
        DIFFER,
    ),
    Mutant(
        "behind a sequence's end its neighbour is read, and multiplied by zero",
        Edit(
            FILE,
            "work.length - int(key), D, wide",
            "int((static_cast<const T*>(a.k) + packed.total_k * a.k_token - work.k) / a.k_token - key), D, wide",
        ),
        CAUSAL,
        invariants.batch_invariant,
        DIFFER,
    ),
    Mutant(
        "l is not rescaled",
        Edit(FILE, "l[e] = l[e] * faded[e / 2];", "l[e] = l[e] * 1.0f;"),
        TILES,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "a mask off by one",
        Edit(FILE, "< seen[e / 2] ? score : NONE_YET", "<= seen[e / 2] ? score : NONE_YET"),
        CAUSAL,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "the clamp is lost: a score far below the largest leaves the range of the exponent",
        Edit("../numerics.h", "    d = larger_of(d, least);\n", ""),
        LONG,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "nothing is taken off the scores",
        Edit(FILE, "base[i] = most == NONE_YET ? 0.0f : most;", "base[i] = 0.0f;"),
        LONG,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "the maximum drops a NaN",
        Edit(FILE, "max.NaN.f32", "max.f32"),
        LONG,
        not_finite,
        KINDS,
    ),
    Mutant(
        "nobody looks whether the maximum is a number: of an earlier tile something is left",
        Edit(FILE, "fabsf(top[i]) < -NONE_YET ? l[2 * i] : __int_as_float(0x7fc00000)", "l[2 * i]"),
        TILES,
        not_finite,
        KINDS,
    ),
    # Right, the same everywhere, and not the stated bits: what only the contract in NumPy sees.
    Mutant(
        "tiles of 64 keys",
        Edit("sm80/tiles.h", "return width <= 128 ? 128 : 64;", "return 64;"),
        TILES,
        stated,
        DIFFER,
    ),
    Mutant(
        "the sum of weights that are not rounded",
        Edit(
            FILE,
            "                        weights[g][i] = round_two<T>(a_half, b_half);",
            "                        const unsigned both = weights[g][i] = round_two<T>(a_half, b_half);\n"
            "                        const float a_rest = a_half - widen(T{uint16_t(both)});\n"
            "                        const float b_rest = b_half - widen(T{uint16_t(both >> 16)});\n"
            "                        unsigned rest[4] = {};\n"
            "                        rest[i] = round_two<T>(a_rest, b_rest);\n"
            "                        mma<T>(l, rest, ONES<T>, ONES<T>);",
        ),
        TILES,
        stated,
        DIFFER,
    ),
    Mutant(
        "eight terms at a time",
        Edit(
            "sm80/mma.cuh",
            "template <>\n__device__ __forceinline__ void mma<f16>(",
            "template <>\n"
            "__device__ __forceinline__ void mma<f16>(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {\n"
            "    for (int h = 0; h < 2; ++h)\n"
            '        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "\n'
            '            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"\n'
            '            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])\n'
            '            : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(h ? b1 : b0));\n'
            "}\n"
            "template <class Half>\n__device__ __forceinline__ void whole_mma(",
        ),
        TILES,
        stated,
        DIFFER,
    ),
    Mutant(
        "the values of a part from its end to its beginning",
        Edit(
            FILE,
            "for (int g = 0; g < GROUPS; ++g) {\n                    if (left_out(GROUPS * p + g)) continue;\n"
            "                    const unsigned",
            "for (int g = GROUPS - 1; g >= 0; --g) {\n                    if (left_out(GROUPS * p + g)) continue;\n"
            "                    const unsigned",
        ),
        TILES,
        stated,
        DIFFER,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant) -> None:
    case = cases.in_tensor_mode(cases.get(mutant.case) if isinstance(mutant.case, str) else mutant.case)

    def run(edit: Edit | None) -> None:
        with tensor.simulated("cuda", 2, edit=edit, race=mutant.race):
            mutant.check(case, HALF)

    run(None)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        run(mutant.edit.only(HALF))
    assert re.search(mutant.caught_by, str(caught.value)), f"caught, but not by {mutant.caught_by!r}: {caught.value}"
