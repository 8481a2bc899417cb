"""Infinity's engines: the model of every replica, and the order in which rerank() answers.

Its sigmoid is numpy's and it ranks by that score, which ties near 1.0 where logits do not: rerank() is asked for
logits instead, and sigmoid, order and top_n are ours. Batches are made by the clock and by what other clients ask: none of it
can change a bit of a patched model's score.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from rerank_kernels.models.bound import Method, class_of, serving
from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.pooling import sigmoid
from rerank_kernels.patching.systems import sentence_transformers
from rerank_kernels.patching.systems.resolved import Override, Resolved, ancestor, own_methods, see_patched
from rerank_kernels.ranking import descending

SYSTEM = "Infinity"
QUANTISED = ("int8", "fp8")
QUANTISED_HINT = "a dtype that is not quantised (--dtype float32, float16 or bfloat16)"
TORCH = 'load it with engine="torch" (--engine torch)'
OPTIONS = {  # the package that a replaced module comes from -> what would work
    "optimum": "bettertransformer=False (--no-bettertransformer)",
    "infinity_emb": QUANTISED_HINT,
}


def array(obj: Any, cls: type) -> Resolved:
    found = Resolved(f"{SYSTEM} {cls.__qualname__}", obj, problems=own_methods(obj, cls, ("rerank", "embed")))
    for name, one in obj.engines_dict.items():
        found.take(f"engines_dict[{name!r}]", engine(one, ancestor(one, "AsyncEmbeddingEngine")))
    return found


def sync_array(obj: Any, cls: type) -> Resolved:
    inner, found = obj.async_engine_array, Resolved(f"{SYSTEM} {cls.__qualname__}", obj)
    found.take("async_engine_array", array(inner, ancestor(inner, "AsyncEngineArray")))
    return found


def engine(obj: Any, cls: type) -> Resolved:
    found = Resolved(f"{SYSTEM} {cls.__qualname__}", obj, problems=own_methods(obj, cls, ("rerank", "embed")))
    for i, replica in enumerate(obj._model_replicas):
        found.take(f"_model_replicas[{i}]", _replica(replica))
    if "rerank" in obj.capabilities:
        found.override(cls, "rerank", rerank, "sigmoid in float32; documents by logit, ties in the order given, NaN last")
    if (dtype := getattr(obj.engine_args.dtype, "value", "")) in QUANTISED:
        found.problems.append(f"dtype={dtype!r} is quantised; load it with {QUANTISED_HINT}")
    if obj.engine_args.vector_disk_cache_path:
        found.problems.append(
            "its disk cache may answer with what was computed before; load it with vector_disk_cache_path='' "
            "(--no-vector-disk-cache)"
        )
    return found


def _replica(replica: Any) -> Resolved:
    """It calls the model, or the modules of a SentenceTransformer, without the methods of either."""
    found, name = Resolved(SYSTEM, replica), class_of(replica)
    if name == "CrossEncoderPatched":
        sentence_transformers.find_modules(replica, found)
    elif name == "SentenceTransformerPatched" and not replica.mode_colbert:
        sentence_transformers.find_modules(replica, found)
        found.overrides["encode_post"] = Override(replica, "encode_post", encode_post, "vectors of length 1, in float32")
    else:
        what = "ColBERT" if name == "SentenceTransformerPatched" else name
        found.problems.append(f"{what} is not served; rerankers and embedding models of PyTorch are: {TORCH}")
    for path, module in found.modules.items():
        packages = {type(m).__module__.partition(".")[0]: class_of(m) for m in module.modules()}
        found.problems += [f"{path} has a {packages[p]}; load it with {what}" for p, what in OPTIONS.items() if p in packages]
    return found


async def rerank(
    method: Method, *, query: str, docs: list[str], raw_scores: bool = False, top_n: int | None = None
) -> tuple[list[Any], int]:
    if raw_scores:
        return await method.original(query=query, docs=docs, raw_scores=True, top_n=top_n)
    models = [replica.model for replica in method.holder._model_replicas]
    see_patched(method, *models)
    ranked, usage = await method.original(query=query, docs=docs, raw_scores=True, top_n=None)
    ranked = [ranked[i] for i in descending([one.relevance_score for one in ranked], [one.index for one in ranked])]
    device = next(models[0].parameters()).device
    logits = torch.tensor([float(one.relevance_score) for one in ranked], dtype=torch.float32, device=device)
    with serving(method.mode, method.backend):
        scores = sigmoid(logits).cpu().numpy()
    best = [dataclasses.replace(one, relevance_score=score) for one, score in zip(ranked, scores, strict=True)]
    return best[:top_n] if top_n is not None and top_n > 0 else best, usage


def encode_post(method: Method, out_features: Any) -> Any:
    """Its own, but for the vectors' length: that is normalised here, and its own is told not to."""
    bare = copy.copy(method.holder)
    bare.normalize_embeddings = False
    if method.holder.normalize_embeddings and not sentence_transformers.of_length_one(method.holder):
        with serving(method.mode, method.backend):
            out_features = normalize(out_features.float())
    return type(bare).encode_post(bare, out_features)
