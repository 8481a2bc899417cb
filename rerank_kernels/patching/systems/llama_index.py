"""LlamaIndex's wrappers: the object of sentence-transformers in each, which they call without arithmetic of their own.

SentenceTransformerRerank sorts nodes by the score that they get, in a stable order. HuggingFaceEmbedding hands out vectors as
Python's floats. Nothing of the wrapper is changed.
"""

from __future__ import annotations

from typing import Any

from rerank_kernels.patching.systems import sentence_transformers
from rerank_kernels.patching.systems.resolved import Resolved, own_methods

SORTS = (
    "it sorts by score, and scores near 1.0 tie; for logits load it with "
    "cross_encoder_kwargs={'activation_fn': torch.nn.Identity()}"
)


def rerank(obj: Any, cls: type) -> Resolved:
    system = "LlamaIndex SentenceTransformerRerank"
    found = Resolved(system, obj, problems=own_methods(obj, cls, ("_postprocess_nodes",)), notes=[SORTS])
    sentence_transformers.held(found, "_model", obj._model, "CrossEncoder")
    return found


def embedding(obj: Any, cls: type) -> Resolved:
    methods = ("_embed", "_embed_with_retry", "_get_query_embedding", "_get_text_embedding", "_get_text_embeddings")
    found = Resolved("LlamaIndex HuggingFaceEmbedding", obj, problems=own_methods(obj, cls, methods))
    sentence_transformers.held(found, "_model", obj._model, "SentenceTransformer")
    return found
