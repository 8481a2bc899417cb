"""The table of systems: from a class to the resolver that knows its insides.

It is looked up by package and name, along the class's own ancestors: no system is imported here, and subclasses are served
where they leave alone what the resolver knows. A resolver changes nothing. It says which modules walk.py
has to patch and which methods of ours go in place of the object's own. It says what stands in the way, and what stays the
system's own. Nothing outside the object is ever changed.

A new system is a file beside this one with its resolver and its methods, and its rows below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rerank_kernels.models.bound import name_of
from rerank_kernels.models.registry import COMPILED
from rerank_kernels.patching.systems import (
    flag_llm,
    flagembedding,
    haystack,
    infinity,
    langchain,
    llama_index,
    peft,
    sentence_transformers,
)
from rerank_kernels.patching.systems.resolved import Resolved

SYSTEMS: dict[tuple[str, str], Callable[[Any, type], Resolved]] = {
    ("sentence_transformers", "CrossEncoder"): sentence_transformers.cross_encoder,
    ("sentence_transformers", "SentenceTransformer"): sentence_transformers.embedder,
    ("FlagEmbedding", "BaseReranker"): flagembedding.reranker,
    ("FlagEmbedding", "BaseEmbedder"): flagembedding.embedder,
    ("FlagEmbedding", "M3Embedder"): flagembedding.m3,
    ("FlagEmbedding", "BaseLLMEmbedder"): flagembedding.llm_embedder,
    ("FlagEmbedding", "ICLLLMEmbedder"): flagembedding.with_examples,
    ("FlagEmbedding", "BaseLLMReranker"): flag_llm.reranker,
    ("FlagEmbedding", "LayerWiseLLMReranker"): flag_llm.by_layer,
    ("FlagEmbedding", "LightweightLLMReranker"): flag_llm.by_layer,
    ("haystack", "TransformersSimilarityRanker"): haystack.similarity_ranker,
    ("haystack", "SentenceTransformersSimilarityRanker"): haystack.cross_encoder_ranker,
    ("haystack_integrations", "SentenceTransformersSimilarityRanker"): haystack.cross_encoder_ranker,
    ("infinity_emb", "AsyncEngineArray"): infinity.array,
    ("infinity_emb", "SyncEngineArray"): infinity.sync_array,
    ("infinity_emb", "AsyncEmbeddingEngine"): infinity.engine,
    ("langchain_huggingface", "HuggingFaceEmbeddings"): langchain.embeddings,
    ("langchain_community", "HuggingFaceEmbeddings"): langchain.embeddings,
    ("langchain_community", "HuggingFaceBgeEmbeddings"): langchain.embeddings,
    ("langchain_community", "HuggingFaceCrossEncoder"): langchain.cross_encoder,
    ("peft", "PeftModel"): peft.model,
    ("llama_index", "SentenceTransformerRerank"): llama_index.rerank,
    ("llama_index", "HuggingFaceEmbedding"): llama_index.embedding,
}


def resolve(obj: Any) -> Resolved | None:
    """What a system's object holds; None if `obj` is of no system."""
    if name_of(obj) == COMPILED:
        return resolve(obj._orig_mod)
    for cls in type(obj).__mro__:
        if (found := SYSTEMS.get((cls.__module__.partition(".")[0], cls.__qualname__))) is not None:
            return found(obj, cls)
    return None
