"""sentence-transformers 3 to 6: CrossEncoder and SentenceTransformer, and what other systems subclass of them.

CrossEncoder: the model; predict(), which applies its activation with our ops, the stored one or one passed with the call; and
rank(), which sorts by logit and gives each score. Near 1.0 scores tie where logits do not. Around a decoder with a language
head also forward(), which asks it for the log-odds of the answer: one dot, where LogitScore subtracts two rounded logits.
SentenceTransformer: the transformer, Pooling, Normalize and Dense (rerank_kernels/models/sentence.py), and encode()'s own
normalisation.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_kernels.models.bound import Method, class_of, name_of, serving
from rerank_kernels.models.heads import asking
from rerank_kernels.models.sentence import LOGIT_SCORE, NORMALIZES
from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.pooling import sigmoid
from rerank_kernels.patching import walk
from rerank_kernels.patching.systems.resolved import Resolved, own_methods, see_patched
from rerank_kernels.ranking import descending

SIGMOID = "torch.nn.modules.activation.Sigmoid"
SIGMOIDS = (torch.sigmoid, F.sigmoid, torch.special.expit)
ACTIVATION = ("activation_fn", "activation_fct")  # predict's and rank's argument, since version 4 and before
STORED = ("activation_fn", "default_activation_function")
POOLS = "a pool of worker processes has the model as it was when the pool was started: patch before start_multi_process_pool()"


def cross_encoder(obj: Any, cls: type) -> Resolved:
    system = "sentence-transformers CrossEncoder"
    found = Resolved(system, obj, problems=own_methods(obj, cls, ("predict", "rank", "forward", "_inference")))
    find_modules(obj, found)
    _find_answers(obj, cls, found)
    stored = _stored(obj)
    if not _known(stored):
        found.problems.append(
            f"its activation {getattr(stored, '__name__', class_of(stored))} is unknown; set {_stored_name(obj)} to "
            "torch.nn.Sigmoid() or torch.nn.Identity()"
        )
    found.override(cls, "predict", predict, "its activation, in float32")
    found.override(cls, "rank", rank, "documents by logit, ties in the order given, NaN last")
    found.notes += [POOLS, "an activation of your own, passed to predict() or rank(), computes as it is"]
    return found


def _find_answers(obj: Any, cls: type, found: Resolved) -> None:
    """LogitScore of a decoder, and whether what it asks for is there."""
    scores: dict[str, Any] = {path: m for path, m in found.modules.items() if name_of(m) == LOGIT_SCORE}
    if not scores:
        return
    words = obj.model.config.get_text_config().vocab_size
    for path, m in scores.items():
        wrong = [i for i in (m.true_token_id, m.false_token_id) if i is not None and not 0 <= i < words]
        if wrong:
            found.problems.append(f"[{path}] LogitScore asks for token {wrong[0]}, and the model has tokens 0 to {words - 1}")
    if len(scores) > 1:
        found.problems.append("it has several LogitScore modules, and one is served; leave one")
    found.override(cls, "forward", forward, "the decoder's answer as one dot, in float32")


def embedder(obj: Any, cls: type) -> Resolved:
    system = "sentence-transformers SentenceTransformer"
    found = Resolved(system, obj, problems=own_methods(obj, cls, ("encode", "_inference", "forward")))
    find_modules(obj, found)
    found.override(cls, "encode", encode, "normalize_embeddings=True, in float32")
    found.notes += [POOLS, "similarity() is PyTorch's product; rk.linear(a, b) is the same with one set of bits"]
    return found


def find_modules(obj: Any, found: Resolved) -> None:
    """The model of a CrossEncoder, which is a sequence of modules since version 5.4; those of a SentenceTransformer."""
    if getattr(obj, "backend", "torch") != "torch":
        found.problems.append(f"backend={obj.backend!r} runs no model of PyTorch; load it with backend='torch'")
    elif not isinstance(obj, nn.Sequential):
        found.modules["model"] = obj.model
    else:
        for i, child in enumerate(obj):
            if getattr(child, "can_flatten_inputs", False):
                found.problems.append(f"[{i}] joins the texts of a batch to one; set model[{i}].unpad_inputs = False")
            model = getattr(obj, "model", None) if i == 0 else None  # of a CrossEncoder
            found.modules |= {str(i): child} if model is None else {"model": model}
    if vars(obj).get("keep_in_fp32_modules"):
        found.problems.append("keep_in_fp32_modules: call set_keep_in_fp32_modules([]), for a patched head is float32 anyway")


def held(found: Resolved, path: str, inner: Any, name: str) -> None:
    """Take the CrossEncoder or SentenceTransformer, by `name`, that another system's object holds at `path`."""
    ours = [
        c for c in type(inner).__mro__ if (c.__module__.partition(".")[0], c.__qualname__) == ("sentence_transformers", name)
    ]
    if ours:
        found.take(path, {"CrossEncoder": cross_encoder, "SentenceTransformer": embedder}[name](inner, ours[0]))
    else:
        found.problems.append(f"its {path} is a {class_of(inner)}, and only sentence-transformers' {name} is served there")


# ---- the activation ---------------------------------------------------------------------------------------------------------


def _stored_name(obj: Any) -> str:
    return next(name for name in STORED if name in vars(obj) or name in getattr(obj, "_modules", ()))


def _stored(obj: Any) -> Any:
    return getattr(obj, _stored_name(obj))


def _known(activation: Any) -> bool:
    """Whether `activation` can be served whole."""
    if not isinstance(activation, nn.Module):
        return activation in SIGMOIDS
    return not walk.unknown(activation)


def _is_sigmoid(activation: Any) -> bool:
    return activation in SIGMOIDS or name_of(activation) == SIGMOID


def _served(activation: Any, method: Method) -> Any:
    """`activation` on our ops: a copy, for it is the user's; as it is if it is no module, or unknown."""
    if activation in SIGMOIDS:
        activation = nn.Sigmoid()
    if isinstance(activation, nn.Module):
        activation = copy.deepcopy(activation)
        walk.unpatch(activation)
        walk.patch(activation, method.mode, strict=False, backend=method.backend)
    return activation


class _Softmax:
    """An activation, any callable, and then a softmax over the labels; a class, for it is pickled to worker processes."""

    def __init__(self, activation: Any, softmax: Any) -> None:
        self.activation, self.softmax = activation, softmax

    def __call__(self, scores: Tensor) -> Tensor:
        made: Tensor = self.softmax(self.activation(scores))
        return made


class _Arguments:
    """Arguments of one call, in which some are looked up and replaced, by place or by name."""

    def __init__(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.places = {name: i for i, name in enumerate(inspect.signature(method.original).parameters)}
        self.args, self.kwargs = list(args), dict(kwargs)

    def get(self, *names: str) -> Any:
        """The first of `names` that was given and is not None."""
        given = [self.kwargs.get(name) for name in names]
        given += [self.args[i] for name in names if (i := self.places.get(name, len(self.args))) < len(self.args)]
        return next((value for value in given if value is not None), None)

    def gives(self, name: str, value: Any) -> bool:
        """Whether the argument `name` was given, as `value` itself."""
        place = self.places.get(name, len(self.args))
        return (name in self.kwargs and self.kwargs[name] is value) or (place < len(self.args) and self.args[place] is value)

    def set(self, names: tuple[str, ...], value: Any) -> None:
        """Give `value` to the one of `names` that the method takes."""
        name = next(name for name in names if name in self.places)
        for other in names:
            self.kwargs.pop(other, None)
        if self.places[name] < len(self.args):
            self.args[self.places[name]] = value
        else:
            self.kwargs[name] = value


def predict(method: Method, *args: Any, **kwargs: Any) -> Any:
    see_patched(method, method.holder.model)
    call = _Arguments(method, args, kwargs)
    activation = call.get(*ACTIVATION)
    activation = _served(_stored(method.holder) if activation is None else activation, method)
    if call.get("apply_softmax"):
        call.set(("apply_softmax",), False)
        if _labels(method.holder) > 1:
            activation = _Softmax(activation, _served(nn.Softmax(-1), method))
    call.set(ACTIVATION, activation)
    return method.original(*call.args, **call.kwargs)


def forward(method: Method, *args: Any, **kwargs: Any) -> Any:
    see_patched(method, method.holder.model)
    score = next(m for m in method.holder if name_of(m) == LOGIT_SCORE)
    with asking(score.true_token_id, score.false_token_id):
        return method.original(*args, **kwargs)


def _labels(obj: Any) -> int:
    return int(obj.num_labels if hasattr(obj, "num_labels") else obj.config.num_labels)


def rank(method: Method, *args: Any, **kwargs: Any) -> Any:
    call = _Arguments(method, args, kwargs)
    activation = call.get(*ACTIVATION)
    if not _is_sigmoid(_stored(method.holder) if activation is None else activation):
        return method.original(*args, **kwargs)  # which calls predict above
    count = call.get("top_k")
    call.set(ACTIVATION, nn.Identity())
    call.set(("top_k",), None)
    ranked = method.original(*call.args, **call.kwargs)
    order = descending([float(one["score"]) for one in ranked], [one["corpus_id"] for one in ranked])
    ranked = [ranked[i] for i in order[:count]]
    logits = torch.tensor([float(one["score"]) for one in ranked], dtype=torch.float32, device=method.holder.model.device)
    with serving(method.mode, method.backend):
        scores = sigmoid(logits)
    for one, score in zip(ranked, scores, strict=True):
        one["score"] = _like(one["score"], score)
    return ranked


def _like(was: Any, score: Tensor) -> Any:
    """`score` as the type that rank() has: a float, numpy's or a tensor, by version and argument."""
    if isinstance(was, Tensor):
        return score.to(was.device)
    return np.float32(score.item()) if isinstance(was, np.generic | np.ndarray) else score.item()


# ---- embeddings -------------------------------------------------------------------------------------------------------------


def of_length_one(obj: Any) -> bool:
    """Whether a SentenceTransformer ends in Normalize: once more would move last bits, and away from Reranker.encode's."""
    return name_of(list(obj.children())[-1]) in NORMALIZES


def encode(method: Method, *args: Any, **kwargs: Any) -> Any:
    see_patched(method, method.holder)
    call = _Arguments(method, args, kwargs)
    other = call.get("output_value") not in (None, "sentence_embedding") or call.gives("output_value", None)
    if not call.get("normalize_embeddings") or other:  # its own normalises nothing else
        return method.original(*args, **kwargs)
    if (precision := call.get("precision")) not in (None, "float32"):
        raise ValueError(
            f"encode: precision must be float32 with normalize_embeddings=True, got {precision!r}; end the model with a "
            "Normalize module and leave normalize_embeddings out"
        )
    call.set(("normalize_embeddings",), False)
    cut = call.get("truncate_dim") or getattr(method.holder, "truncate_dim", None)
    if of_length_one(method.holder) and cut is None:
        return method.original(*call.args, **call.kwargs)
    made = method.original(*call.args, **call.kwargs)
    with serving(method.mode, method.backend):
        if isinstance(made, np.ndarray):
            return normalize(torch.from_numpy(made)).numpy() if made.size else made
        return [normalize(one) for one in made] if isinstance(made, list) else normalize(made)
