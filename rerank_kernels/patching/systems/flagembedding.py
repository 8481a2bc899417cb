"""FlagEmbedding's FlagReranker: the model that it holds. All else may stay.

It calls .half() and .to() for each list (a patched model stays patched), sorts by length, and takes smaller batches when
memory runs out: none of it can change a bit of a patched model's logit. With normalize=True it applies a sigmoid to each, which
is NumPy's, in float64: the same wherever a pair stands, but not on every machine. With several devices it pickles itself to
workers that it spawns, and its model arrives patched.
"""

from __future__ import annotations

from typing import Any

from rerank_kernels.models.bound import forward_of
from rerank_kernels.patching.systems.resolved import Resolved, own_methods

SYSTEM = "FlagEmbedding FlagReranker"


def reranker(obj: Any, cls: type) -> Resolved:
    found = Resolved(SYSTEM, obj, {"model": obj.model})
    found.notes.append("several devices: workers get the model as it is when they start")
    found.notes.append("normalize=True: the sigmoid is NumPy's; rk.sigmoid of the logits has the same bits on every machine")
    found.notes.append(
        "it takes any RuntimeError for a lack of memory: an error of ours about the model may show as one of its own"
    )
    found.problems += own_methods(obj, cls, ("compute_score", "compute_score_single_gpu"))
    patched = forward_of(obj.model) is not None
    if getattr(obj, "pool", None) is not None and not patched:
        found.problems.append("its worker processes run already, with the model as it was; call stop_self_pool() first")
    return found


def decoder(obj: Any, cls: type) -> Resolved:
    return Resolved(
        f"FlagEmbedding {type(obj).__name__}",
        obj,
        problems=["its model is a decoder, and decoders are not served yet; FlagReranker, whose model is an encoder, is"],
    )
