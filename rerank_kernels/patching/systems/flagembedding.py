"""FlagEmbedding: FlagReranker, FlagModel and FlagLLMModel; FlagLLMReranker is in flag_llm.py.

FlagReranker: the model that it holds. All else may stay. It calls .half() and .to() for each list (a patched model stays
patched), sorts by length, and takes smaller batches when memory runs out: none of it can change a bit of a patched model's
logit. With normalize=True it applies a sigmoid to each, which is NumPy's, in float64: the same wherever a pair stands, but not
on every machine. With several devices it pickles itself to workers that it spawns, and its model arrives patched.

FlagModel: the model, and what it makes of hidden states: pooling, which reads the first place even where it is padding, and the
vectors' length. FlagLLMModel, which takes the last token of a decoder: the model and the vectors' length.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.models.bound import Method, forward_of, serving
from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.pooling import pool
from rerank_kernels.patching.systems.resolved import Resolved, own_methods, see_patched

SYSTEM = "FlagEmbedding FlagReranker"
SEVERAL_DEVICES = "several devices: workers get the model as it is when they start"
NORMALIZE = "normalize=True: the sigmoid is NumPy's; rk.sigmoid of the logits has the same bits on every machine"
POOLINGS = ("cls", "mean")  # that it knows; another one is its own error


def reranker(obj: Any, cls: type) -> Resolved:
    found = Resolved(SYSTEM, obj, {"model": obj.model})
    found.notes += [SEVERAL_DEVICES, NORMALIZE]
    found.notes.append(
        "it takes any RuntimeError for a lack of memory: an error of ours about the model may show as one of its own"
    )
    found.problems += own_methods(obj, cls, ("compute_score", "compute_score_single_gpu"))
    workers(found)
    return found


def embedder(obj: Any, cls: type) -> Resolved:
    found = Resolved("FlagEmbedding FlagModel", obj, {"model": obj.model})
    found.notes.append(SEVERAL_DEVICES)
    found.problems += own_methods(obj, cls, ("encode", "encode_queries", "encode_corpus", "encode_single_device", "pooling"))
    found.override(cls, "pooling", pooling, "the sequence's own first token, or the mean, in float32")
    found.override(cls, "encode_single_device", encode_single_device, "vectors of length 1, in float32")
    workers(found)
    return found


def workers(found: Resolved) -> None:
    """A problem where worker processes run already."""
    patched = forward_of(found.obj.model) is not None
    if getattr(found.obj, "pool", None) is not None and not patched:
        found.problems.append("its worker processes run already, with the model as it was; call stop_self_pool() first")


def pooling(method: Method, last_hidden_state: Tensor, attention_mask: Tensor | None = None) -> Any:
    mode = method.holder.pooling_method
    if mode not in POOLINGS:
        return method.original(last_hidden_state, attention_mask)
    mask = None if attention_mask is None else attention_mask != 0
    with serving(method.mode, method.backend):
        return pool(last_hidden_state, mode, mask=mask, out_dtype=torch.float32)


class _Bare:
    """An embedder that leaves its vectors as long as they are. No copy of it: one that ends stops the embedder's workers."""

    normalize_embeddings = False

    def __init__(self, holder: Any) -> None:
        self.holder = holder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.holder, name)


def encode_single_device(method: Method, sentences: Any, *args: Any, **kwargs: Any) -> Any:
    holder = method.holder
    see_patched(method, holder.model)
    given = inspect.signature(method.original).bind(sentences, *args, **kwargs)
    given.apply_defaults()
    arguments = given.arguments
    extra, as_numpy = arguments.pop("kwargs", {}), arguments["convert_to_numpy"]
    arguments["convert_to_numpy"] = False
    made = type(holder).encode_single_device(_Bare(holder), **arguments, **extra).float()
    if holder.normalize_embeddings:
        with serving(method.mode, method.backend):
            made = normalize(made)
    return made.cpu().numpy() if as_numpy else made


def m3(obj: Any, cls: type) -> Resolved:
    problem = (
        "BGE-M3's sparse and multi-vector heads are not served; its dense vectors are: rk.Reranker(path, kind='embedding')"
    )
    return Resolved("FlagEmbedding BGEM3FlagModel", obj, problems=[problem])


def llm_embedder(obj: Any, cls: type) -> Resolved:
    """FlagLLMModel, whose vector is that of the last token: it takes that from the mask, on any side."""
    found = Resolved("FlagEmbedding FlagLLMModel", obj, {"model": obj.model}, notes=[SEVERAL_DEVICES])
    found.problems += own_methods(obj, cls, ("encode", "encode_queries", "encode_corpus", "encode_single_device"))
    found.override(cls, "encode_single_device", encode_single_device, "vectors of length 1, in float32")
    workers(found)
    return found


def with_examples(obj: Any, cls: type) -> Resolved:
    problem = "it puts examples before its texts, and is not served; FlagLLMModel is"
    return Resolved(f"FlagEmbedding {type(obj).__name__}", obj, problems=[problem])
