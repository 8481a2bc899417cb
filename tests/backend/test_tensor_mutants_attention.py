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
import torch

import cases
import conftest
import invariants
import tensor
from conftest import ran
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
    case: str
    check: Callable[[cases.Case, torch.dtype], None]
    caught_by: str  # in the error's text
    race: bool = False

    def __str__(self) -> str:
        return self.name


FILE = "sm80/attention.cu"
CAUSAL, LONG = "attention-D64-H4of2-T70-causal=True", "attention-D64-H2of2-T100"
DIFFER, WRONG = r"values differ", r"beyond the bound"
MUTANTS = [
    Mutant(
        "a barrier dropped: a tile is read before all of it is there",
        Edit(FILE, "__syncthreads();\n        const unsigned now = stage", "const unsigned now = stage"),
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
            "float top2[2] = {NONE_YET, NONE_YET}, l2[2] = {}, out2[H::PIECES][4] = {};\n"
            "        for (int tile = tiles.begin; tile <= tiles.end; ++tile) {\n"
            "            const bool end = tile == tiles.end, few = gridDim.x * gridDim.y < 16;\n"
            "            if (end || (few && tile == (tiles.begin + tiles.end) / 2))\n"
            "                for (int i = 0; i < 2; ++i) {\n"
            "                    const float m = fmaxf(top[i], top2[i]);\n"
            "                    const float x = exp_of_negative(top[i] - m), y = exp_of_negative(top2[i] - m);\n"
            "                    for (int n = 0; n < 2 * H::PIECES; ++n) {\n"
            "                        float &a = out[n / 2][2 * i + n % 2], &b = out2[n / 2][2 * i + n % 2];\n"
            "                        if (end) a = a * x + b * y;\n"
            "                        else b = a, a = 0.0f;\n"
            "                    }\n"
            "                    if (end) l[i] = l[i] * x + l2[i] * y;\n"
            "                    else l2[i] = l[i], top2[i] = top[i], l[i] = 0.0f, top[i] = NONE_YET;\n"
            "                }\n"
            "            if (end) break;",
        ),
        CAUSAL,
        invariants.batch_invariant,
        DIFFER,
    ),
    Mutant(
        "tiles of keys begin where they do in the packed buffer, not at the sequence's first token",
        Edit(
            FILE,
            "const auto key_of = [](int tile) { return tile * KEY_TILE; };\n"
            "    const auto tile_of = [](int key) { return key / KEY_TILE; };",
            "const int shift = int((work.k - static_cast<const T*>(a.k)) / a.k_token) % KEY_TILE;\n"
            "    const auto key_of = [=](int tile) { return tile * KEY_TILE - shift; };\n"
            "    const auto tile_of = [=](int key) { return (key + shift) / KEY_TILE; };",
        ),
        CAUSAL,
        invariants.batch_invariant,
        DIFFER,
    ),
    Mutant(
        "tiles of keys end at the place of the block's first query, as if each call had tiles of its own",
        Edit(
            FILE,
            "const auto key_of = [](int tile) { return tile * KEY_TILE; };\n"
            "    const auto tile_of = [](int key) { return key / KEY_TILE; };",
            "const bool first = work.k < static_cast<const T*>(a.k) + KEY_TILE * a.k_token;  // nothing lies before it\n"
            "    const int shift = first ? 0 : KEY_TILE - 1 - work.token % KEY_TILE;\n"
            "    const auto key_of = [=](int tile) { return tile * KEY_TILE - shift; };\n"
            "    const auto tile_of = [=](int key) { return (key + shift) / KEY_TILE; };",
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
        Edit(FILE, "l[i] = l[i] * faded[i] + sum[i];", "l[i] = l[i] + sum[i];"),
        LONG,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "a mask off by one",
        Edit(FILE, "< seen[e / 2] ? score(", "<= seen[e / 2] ? score("),
        CAUSAL,
        invariants.right,
        WRONG,
    ),
    Mutant(
        "a hidden key's score is capped, and seen",
        Edit(FILE, "< seen[e / 2] ? capped(", "< ~0u ? capped("),
        CAUSAL + "-softcap=2.5",
        invariants.right,
        WRONG,
    ),
    Mutant(
        "the fast exp for scores that are too far below the maximum for it",
        Edit(FILE, "if (__all_sync(WARP, or_hidden)) weigh(", "if (true) weigh("),
        LONG,
        invariants.right,
        WRONG,
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant) -> None:
    case = cases.in_tensor_mode(cases.get(mutant.case))

    def run(edit: Edit | None) -> None:
        with tensor.simulated("cuda", 2, edit=edit, race=mutant.race):
            mutant.check(case, HALF)

    run(None)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        run(mutant.edit.only(HALF))
    assert re.search(mutant.caught_by, str(caught.value)), f"caught, but not by {mutant.caught_by!r}: {caught.value}"
