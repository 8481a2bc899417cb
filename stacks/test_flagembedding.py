"""FlagReranker of FlagEmbedding: batches as large as memory allows, and a sigmoid of its own in float64."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import common
import pytest
import torch
from FlagEmbedding import FlagLLMReranker, FlagReranker

import rerank_kernels as rk


def load(folder: str, dtype: torch.dtype = torch.float32, devices: Sequence[str] = ("cpu",)) -> Any:
    reranker = FlagReranker(folder, devices=list(devices))
    reranker.model.to(dtype)  # use_fp16=True is for GPUs: on a CPU compute_score goes back to what the model holds
    return reranker


def logits(reranker: Any, pairs: Sequence[tuple[str, str]], batch: int) -> list[float]:
    return [float(x) for x in reranker.compute_score(list(pairs), batch_size=batch)]


def test_same_bits(results: common.Results, case: tuple[str, torch.dtype]) -> None:
    reranker = load(*case)
    common.hold(
        results,
        "FlagReranker",
        case,
        reranker,
        reranker.model,
        lambda query, documents, batch: logits(reranker, [(query, d) for d in documents], batch),
        lambda pairs, batch: logits(reranker, pairs, batch),
    )


def test_order(results: common.Results) -> None:
    """It does not rank; its user sorts by its scores, and a float64 sigmoid keeps float32 logits apart in 8..16."""
    reranker = load(str(common.data() / "minilm-saturated"))

    def ranking(query: str, documents: list[str]) -> list[int]:
        scores = reranker.compute_score([(query, d) for d in documents], normalize=True)
        return sorted(range(len(documents)), key=lambda i: -scores[i])

    common.hold_order(results, "FlagReranker", reranker, ranking, stock_ties=False)


def test_batch_that_memory_makes_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """compute_score takes a RuntimeError for lack of memory and tries three quarters of the batch."""
    reranker = load(str(common.data() / "xlmr"))
    rk.patch(reranker)
    wanted = common.bits_of(logits(reranker, common.pairs(), 32))
    sizes: list[int] = []

    def full(model: Any, args: Any, given: dict[str, Any]) -> None:
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 13:
            raise RuntimeError("no memory left")

    handle = reranker.model.register_forward_pre_hook(full, with_kwargs=True)
    found = common.bits_of(logits(reranker, common.pairs(), 32))
    handle.remove()
    assert sizes[0] == 32 and 1 < sizes[-2] <= 13, sizes
    assert found == wanted


def test_pickled() -> None:
    reranker = load(str(common.data() / "xlmr"))
    rk.patch(reranker)
    wanted = common.bits_of(logits(reranker, common.pairs(), 32))
    assert common.bits_of(logits(pickle.loads(pickle.dumps(reranker)), common.pairs(), 7)) == wanted


def test_workers_arrive_patched() -> None:
    """With several devices it sends itself to spawned workers."""
    alone, several = (load(str(common.data() / "xlmr"), devices=["cpu"] * n) for n in (1, 2))
    rk.patch(alone)
    rk.patch(several)
    try:
        assert common.bits_of(logits(several, common.pairs(), 7)) == common.bits_of(logits(alone, common.pairs(), 32))
    finally:
        several.stop_self_pool()


def test_llm_rerankers_are_refused() -> None:
    """Made without their weights: patch must not need them to say no."""
    reranker = FlagLLMReranker.__new__(FlagLLMReranker)
    reranker.model, reranker.pool = torch.nn.Linear(4, 4), None
    with pytest.raises(rk.PatchError, match="decoder"):
        rk.patch(reranker)
