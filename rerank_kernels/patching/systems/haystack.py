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

from rerank_kernels.models.bound import CHANGING, Method, Methods, serving
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
    found.override(cls, "run", run_cross_encoder, "its own, once the model is there and patched")
    return found


def _ranker(obj: Any, cls: type) -> Resolved:
    found = Resolved(f"Haystack {cls.__qualname__}", obj, problems=own_methods(obj, cls, ("run", "warm_up")), notes=[RELOADED])
    if getattr(obj, MODEL[cls.__qualname__]) is None:
        found.override(cls, "warm_up", warm_up, "loads the model, then patches it: errors about the model come there")
    return found


def _attribute(ranker: Any) -> str:
    """Where a ranker keeps its model."""
    return next(name for cls in type(ranker).__mro__ if (name := MODEL.get(cls.__qualname__)) is not None)


def warm_up(method: Method) -> None:
    """Many threads may come here at once: one loads, where no other sees the model before it is patched, and the rest wait."""
    ranker, attribute = method.holder, _attribute(method.holder)
    with method.lock:
        loaded, before = None, dict(vars(ranker))
        if not method.undone and before[attribute] is None:
            loaded = copy.copy(ranker)
            for name in [name for name, value in before.items() if isinstance(value, Method | Methods)]:
                vars(loaded).pop(name, None)
            type(ranker).warm_up(loaded)
        with CHANGING:
            if not method.undone:  # by another thread, or by unpatch()
                report = method.patch(ranker if loaded is None else loaded)
                if loaded is not None:
                    made = {name: value for name, value in vars(loaded).items() if before.get(name, _ABSENT) is not value}
                    made = {name: value for name, value in made.items() if not isinstance(value, Method | Methods)}
                    own = made.pop(attribute)
                    vars(ranker).update(made)
                    vars(ranker)[attribute] = own  # last: who sees it takes all else for ready
                Methods.of(ranker).take_out("warm_up")
                vars(method.report).update(vars(report))
                return
    ranker.warm_up()  # its own, or that of a later patch()


_ABSENT = object()


def _ready(method: Method) -> None:
    """What was put off till warm_up() is done, whoever began it."""
    if "warm_up" in Methods.of(method.holder) or getattr(method.holder, _attribute(method.holder)) is None:
        method.holder.warm_up()


def run_cross_encoder(method: Method, *args: Any, **kwargs: Any) -> Any:
    """Its own, with a model that is patched: its warm_up() may have begun before patch(), in another thread."""
    _ready(method)
    see_patched(method, method.holder._cross_encoder.model)
    return method.original(*args, **kwargs)


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
    _ready(method)
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
