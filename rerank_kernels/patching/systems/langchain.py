"""LangChain's wrappers: the object of sentence-transformers in each, which they call without arithmetic of their own.

They hand out what it gives as Python's floats. Nothing of the wrapper is changed.
"""

from __future__ import annotations

from typing import Any

from rerank_kernels.patching.systems import sentence_transformers
from rerank_kernels.patching.systems.resolved import Resolved, own_methods

SORTS = (
    "CrossEncoderReranker sorts by what this gives, a score, and scores near 1.0 tie; for logits set client.activation_fn to "
    "torch.nn.Identity() before rk.patch()"
)


def embeddings(obj: Any, cls: type) -> Resolved:
    methods = ("embed_documents", "embed_query", "_embed")
    found = Resolved("LangChain HuggingFaceEmbeddings", obj, problems=own_methods(obj, cls, methods))
    path = "_client" if hasattr(obj, "_client") else "client"  # that of langchain_community
    sentence_transformers.held(found, path, getattr(obj, path), "SentenceTransformer")
    return found


def cross_encoder(obj: Any, cls: type) -> Resolved:
    found = Resolved("LangChain HuggingFaceCrossEncoder", obj, problems=own_methods(obj, cls, ("score",)), notes=[SORTS])
    sentence_transformers.held(found, "client", obj.client, "CrossEncoder")
    return found
