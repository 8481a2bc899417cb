"""What the tests of Hopper's kernels share: each way of a launcher of csrc/cuda/sm90 beside mma.sync, in the simulator, and the
check that a mutant is caught.

A test file says its launcher, its ways and its kernel's name once, with functools.partial.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import conftest
import tensor
from invariants import same

simulated = pytest.importorskip("simulated.cuda")
Edit = simulated.Edit
Check = Callable[[Any], None]
HALF = torch.float16


def on_hopper(model: int = tensor.H100, gpu: Any = simulated.HOPPER, **how: Any) -> Any:
    return tensor.simulated("cuda", model, **{"gpu": gpu, "race": True, **how})


def kernels() -> list[str]:
    """The names of what was launched since they were last asked for."""
    names = [name for name, *_ in simulated.launched]
    simulated.launched.clear()
    return names


def every_way(
    call: Callable[[], Tensor],
    what: str,
    model: int = tensor.H100,
    *,
    launcher: str,
    ways: Iterable[int],
    kernel: str,
    **how: Any,
) -> Tensor:
    """On a Hopper each way of its launcher, and what it takes itself, gives the bits of mma.sync."""
    with tensor.simulated("cuda", model):
        want = call()
    kernels()
    for way in (-1, *ways):
        with on_hopper(model, **how), simulated.forced(launcher, way):
            same(call(), want, f"{what}, way {way}, tensor cores: {model}")
        assert all(kernel in name for name in kernels()), f"{what}: another kernel served"
    return want


def odd(t: Tensor) -> Tensor:
    """The same numbers, 2 bytes past a multiple of 16."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


# ---- mutants


@dataclass(frozen=True)
class Mutant:
    name: str
    edit: Edit
    caught_by: str  # in the error's text
    check: Check
    wide: bool = False  # it takes heads of 128 to see it

    def __str__(self) -> str:
        return self.name

    @property
    def whole(self) -> Edit:
        return self.edit if self.wide else self.edit.only(HALF)


def ways_hold(call: Callable[[], Tensor], launcher: str, ways: Iterable[int], gpu: Any = simulated.HOPPER) -> Check:
    """Whether these ways give the bits of the honest mma.sync kernel."""

    def check(edit: Any) -> None:
        with tensor.simulated("cuda", tensor.H100):
            want = call()
        for way in ways:
            with on_hopper(gpu=gpu, edit=edit, max_steps=2_000_000), simulated.forced(launcher, way):
                same(call(), want, f"way {way}")

    return check


@functools.cache
def honest(check: Check) -> None:
    check(None)


def compile_all(mutants: Iterable[Mutant]) -> None:
    """Every mutant's PTX, several at a time."""
    if conftest.missing("cuda"):
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda m: simulated.ptx(m.edit.file.removesuffix(".cu"), "80", m.whole), mutants))


def is_caught(mutant: Mutant) -> None:
    """By what is named, and the honest kernel is not."""
    honest(mutant.check)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        mutant.check(mutant.whole)
    assert re.search(mutant.caught_by, str(caught.value), re.IGNORECASE), (
        f"caught, but not by {mutant.caught_by!r}: {caught.value}"
    )
