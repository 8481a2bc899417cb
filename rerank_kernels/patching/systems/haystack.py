"""Haystack's rankers: the model behind them, and the order in which documents come out.

TransformersSimilarityRanker (Haystack 2) applies its sigmoid in the model's dtype and sorts by the result, unstably: its run is
asked for logits instead, and sigmoid, threshold, order and top_k are ours. SentenceTransformersSimilarityRanker (Haystack 2,
and sentence-transformers-haystack for 3) leaves all of that to a CrossEncoder. Both load their model in warm_up(): patched
before that, they are patched when it has run.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from rerank_kernels.models.bound import Method, serving
from rerank_kernels.ops.pooling import sigmoid
from rerank_kernels.patching.systems import sentence_transformers
from rerank_kernels.patching.systems.resolved import Resolved, ancestor, own_methods, see_patched
from rerank_kernels.ranking import descending

RELOADED = "a ranker made from its serialised form is a stock one: patch it again"
MODEL = {"TransformersSimilarityRanker": "model", "SentenceTransformersSimilarityRanker": "_cross_encoder"}  # None till warm_up


def similarity_ranker(obj: Any, cls: type) -> Resolved:
    found = _ranker(obj, cls)
    if obj.model is not None:
        found.modules["model"] = obj.model
    found.override(cls, "run", run, "sigmoid in float32; documents by logit, ties in the order given, NaN last")
    return found


def cross_encoder_ranker(obj: Any, cls: type) -> Resolved:
    found = _ranker(obj, cls)
    if obj._cross_encoder is not None:
        inner = obj._cross_encoder
        found.take("_cross_encoder", sentence_transformers.cross_encoder(inner, ancestor(inner, "CrossEncoder")))
    return found


def _ranker(obj: Any, cls: type) -> Resolved:
    found = Resolved(f"Haystack {cls.__qualname__}", obj, problems=own_methods(obj, cls, ("run", "warm_up")), notes=[RELOADED])
    if getattr(obj, MODEL[cls.__qualname__]) is None:
        found.override(cls, "warm_up", warm_up, "loads the model, then patches it: errors about the model come there")
    return found


def warm_up(method: Method) -> None:
    ranker = method.holder
    method.original()
    del vars(ranker)["warm_up"]
    try:
        report = method.patch(ranker)
    except Exception:
        # With a model in place, run() would not come here again, and rank with stock arithmetic.
        vars(ranker)["warm_up"] = method
        setattr(ranker, next(name for c in type(ranker).__mro__ if (name := MODEL.get(c.__qualname__))), None)
        raise
    vars(method.report).update(vars(report))


def run(
    method: Method,
    query: str,
    documents: list[Any],
    top_k: int | None = None,
    scale_score: bool | None = None,
    calibration_factor: float | None = None,
    score_threshold: float | None = None,
) -> Any:
    ranker = method.holder
    if ranker.model is None:
        ranker.warm_up()
    see_patched(method, ranker.model)
    # As its own run reads them: `or`, so that 0 and False mean "as the component has it".
    count = top_k or ranker.top_k
    scale = scale_score or ranker.scale_score
    factor = calibration_factor or ranker.calibration_factor
    threshold = score_threshold or ranker.score_threshold
    if not documents or count <= 0 or (scale and factor is None):  # its own answer, or its own error
        return method.original(query, documents, top_k, scale_score, calibration_factor, score_threshold)
    bare = copy.copy(ranker)
    bare.scale_score, bare.score_threshold = False, None
    result = type(ranker).run(bare, query, documents, top_k=len(documents))
    place = {document.id: i for i, document in reversed(list(enumerate(documents)))}
    found = sorted(result["documents"], key=lambda document: place[document.id])
    scores = torch.tensor([document.score for document in found], dtype=torch.float32, device=ranker.model.device)
    if scale:
        scores = scores * factor
    order = descending(scores.tolist())
    if scale:
        with serving(method.mode, method.backend):
            scores = sigmoid(scores)
    final = scores.tolist()
    ranked = [dataclasses.replace(found[i], score=final[i]) for i in order]
    if threshold is not None:
        ranked = [document for document in ranked if document.score >= threshold]
    return {**result, "documents": ranked[:count]}
