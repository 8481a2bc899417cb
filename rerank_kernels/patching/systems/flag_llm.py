"""FlagEmbedding's FlagLLMReranker: the decoder that it holds, and how that is asked for the logit of Yes.

Its compute_score_single_gpu() runs as it is, on stand-ins for its model and its tokenizer. It asks the model for a logit of
every word at every place, rounded to the model's dtype, and reads one word at the last place. The stand-in gives that one
alone, in float32, as rk.Reranker has it. All else stays: the prompt and its cuts, sorting, padding, batches, normalize=True.

A tokenizer without a pad token is served: what stands at padding changes no bit, so any id will do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.errors import BackendError, PatchError
from rerank_kernels.models.bound import Method
from rerank_kernels.models.heads import asking
from rerank_kernels.patching.systems.flagembedding import NORMALIZE, SEVERAL_DEVICES, workers
from rerank_kernels.patching.systems.resolved import Resolved, own_methods, see_patched


def reranker(obj: Any, cls: type) -> Resolved:
    found = Resolved("FlagEmbedding FlagLLMReranker", obj, {"model": obj.model})
    found.problems += own_methods(obj, cls, ("compute_score", "compute_score_single_gpu"))
    words = getattr(getattr(obj.model, "config", None), "vocab_size", None)
    if words is not None and not 0 <= obj.yes_loc < words:
        found.problems.append(f"it asks for token {obj.yes_loc}, and the model has tokens 0 to {words - 1}")
    found.override(cls, "compute_score_single_gpu", compute_score_single_gpu, "the logit of Yes alone, as one dot in float32")
    found.notes += [SEVERAL_DEVICES, NORMALIZE]
    workers(found)
    return found


def by_layer(obj: Any, cls: type) -> Resolved:
    """Models of FlagEmbedding's own, or of a folder's code, which end at a layer of the caller's choice."""
    problem = "its model has heads of its own by layer, and is not served; FlagLLMReranker with bge-reranker-v2-gemma is"
    return Resolved(f"FlagEmbedding {type(obj).__name__}", obj, problems=[problem])


def compute_score_single_gpu(method: Method, *args: Any, **kwargs: Any) -> Any:
    holder = method.holder
    see_patched(method, holder.model)
    try:
        return type(holder).compute_score_single_gpu(_Reranker(holder), *args, **kwargs)
    except _Stopped as stopped:
        raise stopped.error from None


class _Instead:
    """What stands for an object: its attributes are read from it and written to it, but for those in `own`."""

    def __init__(self, held: Any, **own: Any) -> None:
        vars(self).update(own, _held=held)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_held" not in vars(self):  # a copy is made before it has anything
            raise AttributeError(name)
        return getattr(self._held, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._held, name, value)


class _Reranker(_Instead):
    """The answer of its model is the only word, at place 0."""

    def __init__(self, held: Any) -> None:
        super().__init__(held, model=_Model(held.model, yes=held.yes_loc), tokenizer=_Tokenizer(held.tokenizer), yes_loc=0)


class _Model(_Instead):
    """It is asked for the first batch twice, to see whether memory lasts; the second time it has the answer."""

    last: tuple[list[Tensor], Any] | None = None

    def __call__(self, **given: Any) -> Any:
        given.pop("output_hidden_states", None)  # which is never read
        inputs = list(given.values())
        if self.last is not None and all(map(torch.equal, inputs, self.last[0])):
            return self.last[1]
        try:
            with asking(self.yes) as question:
                logits: Tensor = self._held(**given, use_cache=False).logits  # nobody continues it
        except (PatchError, BackendError) as error:  # a RuntimeError, which is taken for a lack of memory
            raise _Stopped(error) from None
        if not question.answered:  # undone meanwhile
            logits = logits[..., [self.yes]]
        out = SimpleNamespace(logits=logits.expand(-1, given["input_ids"].shape[1], -1))
        vars(self)["last"] = inputs, out
        return out


class _Tokenizer(_Instead):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._held(*args, **kwargs)

    def pad(self, encoded: Any, **options: Any) -> Any:
        if self.pad_token_id is not None:
            return self._held.pad(encoded, **options)
        rows, each = encoded["input_ids"], options.get("pad_to_multiple_of") or 1
        width = -(-max(map(len, rows)) // each) * each
        left = self.padding_side == "left"
        made = {
            name: torch.tensor([[0] * (width - len(v)) + v if left else v + [0] * (width - len(v)) for v in encoded[name]])
            for name in ("input_ids", "attention_mask")
        }
        return _Batch(made)


class _Batch(dict[str, Tensor]):
    def to(self, device: Any) -> _Batch:
        return _Batch({name: t.to(device) for name, t in self.items()})


class _Stopped(Exception):
    def __init__(self, error: RuntimeError) -> None:
        super().__init__(error)
        self.error = error
