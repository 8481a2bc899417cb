"""linear and bmm of mode tensor on a Hopper, in the simulator: csrc/cuda/sm90/linear.cu, whose every way gives the bits of
csrc/cuda/sm80/linear.cu, as nvcc compiled both. A Hopper has few multiprocessors here, so that a block has several tiles.

Tensor cores add as an H100's (model 2), and as such that add backwards (model 3). The mutants stand at the end: each line
broken there must be caught by what is named beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hopper
import tensor
from cases import Case, numbers
from conftest import ran, require
from hopper import HALF, Check, Edit, Mutant, kernels, odd, simulated
from invariants import all_same, same
from rerank_kernels.backend import library
from rerank_kernels.backend.plan import cuda_linear
from rerank_kernels.ops.linear import bmm, linear

LAUNCHER = "linear_hopper_tensor"
FEW = simulated.Gpu(90, 3)  # multiprocessors
WAYS = range(8)
on_hopper = functools.partial(hopper.on_hopper, gpu=FEW)
every_way = functools.partial(hopper.every_way, launcher=LAUNCHER, ways=WAYS, kernel="linear_hopper", gpu=FEW)


@pytest.fixture(autouse=True)
def _cuda() -> None:
    ran("cuda")


def product(m: int, n: int, k: int, dtype: torch.dtype = HALF, **options: Any) -> Callable[[], Tensor]:
    x, w, b = numbers("x", (m, k), dtype), numbers("w", (n, k), dtype, 0.25), numbers("b", (n,), dtype)
    more = {"residual": numbers("r", (m, n), dtype)} if options.pop("residual", False) else {}
    return lambda: linear(x, w, b, mode="tensor", **options, **more)


def test_the_ways_are_known() -> None:
    assert simulated.launchers()[LAUNCHER] == len(WAYS)


# Edges of tiles in M and N, of wgmma, of stages and of 8 in K; groups of 8 outputs and such as are none.
SHAPES = [
    (1, 1, 8, {}),
    (1, 8, 16, {"activation": "gelu"}),
    (63, 17, 24, {"residual": True}),
    (65, 33, 64, {"out_dtype": torch.float32}),
    (129, 136, 72, {"activation": "relu", "residual": True}),
    (130, 264, 200, {"out_dtype": torch.float32, "residual": True}),
]


@pytest.mark.parametrize(("m", "n", "k", "options"), SHAPES, ids=lambda v: str(v) if isinstance(v, int) else "")
@pytest.mark.parametrize("dtype", tensor.HALVES, ids=lambda d: str(d)[6:])
def test_every_way_gives_the_bits_of_mma_sync(m: int, n: int, k: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    for model in (tensor.H100, 3):
        every_way(product(m, n, k, dtype, **options), f"{m}x{k}x{n}", model)


CASES = [c for c in tensor.CASES if c.op in ("linear", "bmm", "sparse_ffn")]


def test_every_case_of_the_mode(case: Case) -> None:
    """With the launcher's own choice; K that is no multiple of 8 is the other room's."""
    rows, shared = case.make_rows(HALF), case.make_shared(HALF)
    with tensor.simulated("cuda", tensor.H100):
        want = case.call(rows, shared)
    with on_hopper():
        all_same(case.call(rows, shared), want, str(case))


RING = (136, 264, 1096)  # every block goes round its ring, and has several tiles


@pytest.mark.parametrize("multiprocessors", [1, 2])
def test_round_the_ring_and_tile_after_tile(multiprocessors: int) -> None:
    """The stages run on from tile to tile, and the two warpgroups of a tile in turns go on where the other left off."""
    every_way(product(*RING), f"{multiprocessors} multiprocessors", gpu=simulated.Gpu(90, multiprocessors))


@pytest.mark.parametrize("sched", [1, 2])
def test_whatever_the_order_of_the_warps(sched: int) -> None:
    for seed in range(2):
        every_way(product(140, 136, 584), f"sched {sched}, seed {seed}", sched=sched, seed=seed)


def test_bmm() -> None:
    a, b = numbers("a", (3, 70, 88), HALF), numbers("b", (3, 88, 40), HALF)
    every_way(lambda: bmm(a, b, mode="tensor", out_dtype=torch.float32), "bmm")


def test_zeros_and_what_is_not_finite() -> None:
    """A chain starts from +0: products that are all -0 add up to +0. NaN and infinities reach their rows' outputs alone."""
    x, w = numbers("x", (66, 80), HALF), numbers("w", (24, 80), HALF)
    x[3], x[64] = -0.0, 0.0
    w[5] = -0.0
    x[1, 7], x[2, 70], x[65, 0], x[65, 79] = float("nan"), float("inf"), float("inf"), float("-inf")
    every_way(lambda: linear(x, w, mode="tensor", out_dtype=torch.float32), "not finite")
    with on_hopper():
        y = linear(x, w, mode="tensor", out_dtype=torch.float32)
    assert not y[[3, 64]].any() and not torch.signbit(y[[3, 64]]).any() and not torch.signbit(y[0, 5])
    assert y[1].isnan().all() and not y[[0, 3, 4, 63, 64]].isnan().any()


def test_a_rows_bits_are_those_that_it_has_alone() -> None:
    x, w = numbers("x", (150, 776), HALF), numbers("w", (100, 776), HALF, 0.25)

    def call(rows: slice) -> Tensor:
        return linear(x[rows], w, activation="gelu", mode="tensor")

    with on_hopper():
        full = call(slice(None))
        for rows in (slice(0, 1), slice(149, 150), slice(40, 73), slice(0, 128)):
            same(call(rows), full[rows], f"rows {rows.start} to {rows.stop}")


# ---- which kernel serves


def test_what_tma_cannot_take_is_the_other_rooms_with_the_same_bits() -> None:
    x, w = numbers("x", (40, 72), HALF), numbers("w", (24, 72), HALF)
    short_x, short_w = x[:, :70].contiguous(), w[:, :70].contiguous()
    for what, gpu, a, b, taken in (
        ("fits", FEW, x, w, True),
        ("x at an odd address", FEW, odd(x), w, False),
        ("weight at an odd address", FEW, x, odd(w), False),
        ("rows of 140 bytes", FEW, short_x, short_w, False),
        ("an older GPU", simulated.AMPERE, x, w, False),
        ("a newer GPU", simulated.Gpu(100, 148), x, w, False),
        ("a driver that refuses the map", simulated.HOPPER._replace(maps=0), x, w, False),
    ):
        with tensor.simulated("cuda", tensor.H100):
            want = linear(a, b, mode="tensor")
        kernels()
        with on_hopper(gpu=gpu):
            same(linear(a, b, mode="tensor"), want, what)
        (name,) = kernels()
        assert ("linear_hopper" in name) == taken, f"{what}: {name}"


def test_a_way_of_the_other_room_forces_that_room() -> None:
    call = product(40, 24, 72)
    with on_hopper(), simulated.forced("linear_tensor", 2):
        kernels()
        call()
    assert all("linear_tensor_tile" in name for name in kernels())


def test_no_rows_is_no_launch() -> None:
    x, w = torch.empty(0, 64, dtype=HALF), numbers("w", (24, 64), HALF)
    with on_hopper():
        kernels()
        assert linear(x, w, mode="tensor").shape == (0, 24)
    assert kernels() == []


def test_the_plan_says_what_is_launched() -> None:
    require("cuda")
    call, made = product(150, 264, 64), []
    for way in WAYS:
        simulated.launched.clear()
        with on_hopper(gpu=simulated.HOPPER), simulated.forced(LAUNCHER, way):
            call()
        ((_, grid, block, shared),) = simulated.launched
        made.append((grid, block[0], shared))
    tiles = cuda_linear(90, 64)[2]
    assert made == [((-(-150 // t.rows) * -(-264 // t.columns), 1, 1), t.threads, t.shared) for t in tiles]
    assert len(library.launch_tables()["sm90"]["linear"]) == len(WAYS)


# ---- mutants


def run(call: Callable[[], Tensor]) -> Check:
    """Some ways: together, in turns, one warpgroup."""
    return hopper.ways_hold(call, LAUNCHER, simulated.FEW_HOPPER_WAYS, simulated.Gpu(90, 2))


def small_bmm() -> Tensor:
    a, b = numbers("a", (2, 70, 72), HALF), numbers("b", (2, 72, 40), HALF)
    return bmm(a, b, mode="tensor", out_dtype=torch.float32)


DIFFER, STANDS = r"values differ", r"deadlock|endless"
LONG = run(product(*RING))
FILE = "sm90/linear.cu"
MUTANTS = [
    Mutant(
        "the four steps of a stage backwards",
        Edit(FILE, "multiply(x + s * STEP_ON, w + s * STEP_ON)", "multiply(x + (3 - s) * STEP_ON, w + (3 - s) * STEP_ON)"),
        DIFFER,
        LONG,
    ),
    Mutant(
        "a stage is given back while its products are under way",
        Edit(FILE, "wait_for_wgmma<1>();  // those of the stage before are through", "under_way = ring.slot;"),
        "race|changed|in flight|under way",
        LONG,
    ),
    Mutant(
        "nobody waits for a full stage",
        Edit(FILE, "full[ring.slot].wait(ring.parity);\n        const uint64_t x", "const uint64_t x"),
        f"race|{DIFFER}|changed|more arrivals",
        LONG,
    ),
    Mutant(
        "the producer waits for the wrong parity",
        Edit(FILE, "empty[ring.slot].wait(ring.parity ^ 1);", "empty[ring.slot].wait(ring.parity);"),
        STANDS,
        LONG,
    ),
    Mutant(
        "the producer does not wait for an empty stage",
        Edit(FILE, "empty[ring.slot].wait(ring.parity ^ 1);", ""),
        f"race|{DIFFER}|changed|overflow|expect",
        LONG,
    ),
    Mutant(
        "fewer bytes are expected than come",
        Edit(FILE, "full[ring.slot].expect(T::STAGE);", "full[ring.slot].expect(T::STAGE - 128);"),
        f"race|bytes|{STANDS}|{DIFFER}",
        LONG,
    ),
    Mutant(
        "one warp speaks for a warpgroup where four are counted",
        Edit(FILE, "const bool speaks = threadIdx.x % 32 == 0;", "const bool speaks = threadIdx.x % 128 == 0;"),
        STANDS,
        LONG,
    ),
    Mutant(
        "no turns: a warpgroup waits for a stage two phases on, and takes an earlier one for it",
        Edit(FILE, "turn[group].wait(parity), parity ^= 1;", "parity ^= 1;"),
        f"race|{DIFFER}|{STANDS}|changed|more arrivals",
        LONG,
    ),
    Mutant(
        "a warpgroup does not go past the stages of the other's tile",
        Edit(FILE, "if constexpr (!T::TOGETHER) ring.skip(stages_of_k);", ""),
        f"race|{DIFFER}|{STANDS}|changed|under way|arrivals",
        LONG,
    ),
    Mutant(
        "rows past the last one are stored",
        Edit(FILE, "if (row + r >= g.M || column", "if (column"),
        f"race|out-of-bounds|{DIFFER}",
        run(small_bmm),
    ),
    Mutant(
        "every product of bmm takes the first one's weight",
        Edit(FILE, "k * DEPTH, at.n0, at.batch);", "k * DEPTH, at.n0, 0);"),
        DIFFER,
        run(small_bmm),
    ),
    Mutant(
        "the last k's are left out where they fill no stage",
        Edit(FILE, "if (steps % STEPS > 0) {", "if (false) {"),
        f"{DIFFER}|{STANDS}|has ended before",
        run(small_bmm),
    ),
    Mutant(
        "sums change places by the row when they are written, and not when they are read",
        Edit(FILE, "from = mine + r * T::SLAB + (j ^ r % EIGHTS) * 8;", "from = mine + r * T::SLAB + j * 8;"),
        DIFFER,
        run(small_bmm),
    ),
]


@pytest.fixture(scope="module")
def compiled() -> None:
    hopper.compile_all(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant: Mutant, compiled: None) -> None:
    hopper.is_caught(mutant)
