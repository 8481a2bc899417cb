"""Haystack's rankers: TransformersSimilarityRanker (haystack2), SentenceTransformersSimilarityRanker (haystack3).

Both load their model in warm_up, take one query at a time and give documents back, best first, with a score.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import common
import pytest
import torch
from haystack import Document, Pipeline

import rerank_kernels as rk

try:
    from haystack_integrations.components.rankers.sentence_transformers import SentenceTransformersSimilarityRanker as Ranker
except ImportError:
    from haystack.components.rankers import TransformersSimilarityRanker as Ranker
NAME = Ranker.__name__


def load(folder: str, dtype: torch.dtype = torch.float32, warm: bool = True, **how: Any) -> Any:
    ranker = Ranker(model=folder, model_kwargs={"dtype": dtype}, top_k=common.PAIRS, **how)
    if warm:
        ranker.warm_up()
    return ranker


def inner(ranker: Any) -> Any:
    return ranker._cross_encoder.model if hasattr(ranker, "_cross_encoder") else ranker.model


def run(ranker: Any, query: str, texts: Sequence[str], **how: Any) -> list[tuple[int, float]]:
    """(place in the list, score) of each document, best first."""
    documents = [Document(content=text, meta={"place": i}) for i, text in enumerate(texts)]
    ranked = ranker.run(query=query, documents=documents, **how)["documents"]
    return [(document.meta["place"], document.score) for document in ranked]


def logits(ranker: Any, query: str, texts: Sequence[str], batch: int) -> list[float]:
    ranker.batch_size = batch
    of = dict(run(ranker, query, texts))
    return [of[i] for i in range(len(texts))]


def tiny(**how: Any) -> Any:
    """Patched; the small model is enough where bits have been compared already."""
    ranker = load(str(common.data() / "xlmr"), **how)
    rk.patch(ranker)
    return ranker


def test_same_bits(results: common.Results, case: tuple[str, torch.dtype]) -> None:
    # Both ask `scale_score or self.scale_score` or the like: only the component's own False gives logits in both.
    ranker = load(*case, scale_score=False)
    common.hold(results, NAME, case, ranker, inner(ranker), lambda query, texts, batch: logits(ranker, query, texts, batch))


def test_order(results: common.Results) -> None:
    ranker = load(str(common.data() / "minilm-saturated"))
    common.hold_order(results, NAME, ranker, lambda query, texts: [place for place, _ in run(ranker, query, texts)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scores(dtype: torch.dtype) -> None:
    """Its sigmoid too: float32 whatever the model's dtype, and the same bits in a list of 20 as alone."""
    ranker = tiny(dtype=dtype)
    (query, texts), *_ = common.lists()
    together = dict(run(ranker, query, texts))
    alone = {i: score for i, text in enumerate(texts) for _, score in run(ranker, query, [text])}
    assert common.bits_of(together[i] for i in range(20)) == common.bits_of(alone[i] for i in range(20))
    ranker.scale_score = False
    wanted = rk.sigmoid(torch.tensor(logits(ranker, query, texts, 16))).tolist()
    assert common.bits_of(together[i] for i in range(20)) == common.bits_of(wanted)


def test_top_k_and_threshold() -> None:
    ranker = tiny()
    (query, texts), *_ = common.lists()
    every = run(ranker, query, texts)
    assert run(ranker, query, texts, top_k=3) == every[:3]
    threshold = every[7][1]
    assert run(ranker, query, texts, score_threshold=threshold) == every[:8]
    assert run(ranker, query, texts, score_threshold=threshold, top_k=2) == every[:2]
    if NAME == "TransformersSimilarityRanker":
        half = run(ranker, query, texts, calibration_factor=0.5)
        logit = logits(load(str(common.data() / "xlmr"), scale_score=False), query, texts, 16)
        assert [place for place, _ in half] == [place for place, _ in every]
        assert max(abs(score - 1 / (1 + 2.718281828459045 ** (-0.5 * logit[place]))) for place, score in half) < 1e-5


def test_what_it_refuses_stays_refused() -> None:
    stock, ranker = load(str(common.data() / "xlmr")), tiny()
    (query, texts), *_ = common.lists()
    asked: list[dict[str, Any]] = [{"top_k": -1}, {"top_k": "three"}, {"score_threshold": "high"}, {"nonsense": 1}]
    for how in asked:
        said = []
        for one in (stock, ranker):
            with pytest.raises(Exception) as error:
                run(one, query, texts, **how)
            said.append((type(error.value), str(error.value).removeprefix(f"{NAME}.")))  # as Python names a method
        assert said[0] == said[1], how
    for one in (stock, ranker):
        assert one.run(query=query, documents=[]) == {"documents": []}
    twice = [Document(content=text, id="the same") for text in texts[:2]]
    assert (
        len(ranker.run(query=query, documents=twice)["documents"])
        == len(stock.run(query=query, documents=twice)["documents"])
        == 1
    )


def test_patched_before_it_is_warm() -> None:
    ranker = load(str(common.data() / "xlmr"), warm=False, scale_score=False)
    rk.patch(ranker)
    ranker.warm_up()
    (query, texts), *_ = common.lists()
    assert common.bits_of(logits(ranker, query, texts, 7)) == common.bits_of(logits(tiny(scale_score=False), query, texts, 16))


def test_in_a_pipeline() -> None:
    """A pipeline reads a component's inputs and outputs when it is added, and calls its run."""
    ranker = tiny()
    (query, texts), *_ = common.lists()
    wanted = run(ranker, query, texts)
    pipeline = Pipeline()
    pipeline.add_component("ranker", ranker)
    documents = [Document(content=text, meta={"place": i}) for i, text in enumerate(texts)]
    ranked = pipeline.run({"ranker": {"query": query, "documents": documents}})["ranker"]["documents"]
    assert [(document.meta["place"], document.score) for document in ranked] == wanted


def test_copied_and_written_down() -> None:
    """A copy computes as the original; what a pipeline's YAML keeps of it is what it keeps of a stock one."""
    ranker = tiny(scale_score=False)
    (query, texts), *_ = common.lists()
    wanted = common.bits_of(logits(ranker, query, texts, 16))
    assert common.bits_of(logits(copy.deepcopy(ranker), query, texts, 7)) == wanted
    stock = load(str(common.data() / "xlmr"), scale_score=False)
    logits(stock, query, texts, 16)
    assert ranker.to_dict() == stock.to_dict()
