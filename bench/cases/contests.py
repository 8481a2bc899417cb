"""Every contest by name, ours and stock PyTorch, op by op and model by model; rivals/ add theirs."""

from __future__ import annotations

import functools
import hashlib

import torch

import rerank_kernels as rk
from bench.cases import decoders, models, ops, shapes
from bench.cases.ops import Build, Place
from bench.harness.worker import Calls


@functools.cache
def listed(device: str, quick: bool) -> dict[str, Build]:
    """Name -> how to build it of a place; built when its turn comes, so that no two sets of weights are held at a time. What is
    least missed when a GPU's time runs out comes last."""
    if device == "cpu":
        return dict([*ops.on_a_cpu(), *models.on_a_cpu(quick), *decoders.on_a_cpu(quick)])
    batches = (shapes.MIXED_LENGTHS, (128,) * 32, (512,) * 32)
    every = (*models.on_a_gpu(batches), *ops.on_a_gpu(batches), *models.on_a_gpu(batches, models.COMPILED))
    return {name: build for name, of_quick, build in every if of_quick or not quick}


def forget() -> None:
    """All weights."""
    for cache in (ops._ffn, models.stock_model, models.patched_model, models.truth, decoders.stacks):
        cache.cache_clear()


def place(device: str, compile: bool = False) -> Place:  # noqa: A002  the option's name
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return Place(torch.device(device), compile)


def prepare(case: str, who: str, quick: bool, device: str = "cpu", tree: str = "") -> tuple[Calls, str]:
    """In a process of its own: this contestant's call, and its bits; with no name, ours."""
    assert (rk.__file__ or "").startswith(tree), f"{tree} was asked for, and {rk.__file__} was imported"
    work = listed(device, quick)[case](place(device))
    one = next(c for c in work.contestants if c.name == who) if who else work.ours

    def around(i: int) -> object:  # clocked from Python, as a user meets it
        with one.around():
            return one.call(i)

    given, digest = around(0), hashlib.sha256()
    for t in [given] if isinstance(given, torch.Tensor) else given:  # type: ignore[attr-defined]
        digest.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return around if one.ours else one.call, digest.hexdigest()
