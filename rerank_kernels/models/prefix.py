"""A prefix: tokens that many sequences begin with, run through a decoder once and continued with the bits of the whole.

Its keys and values are kept once, whoever continues it, and for every layer. They hold for the model as it was: whatever of it
was changed since is an error, for new queries would meet old keys.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.backend import registry as backends
from rerank_kernels.backend.weights import sample
from rerank_kernels.errors import PatchError
from rerank_kernels.models import caches
from rerank_kernels.models.bound import class_of, forward_of, name_of, serving
from rerank_kernels.models.decoder_types import inner
from rerank_kernels.models.fingerprint import Fingerprint
from rerank_kernels.models.packing import are_tensors, ready
from rerank_kernels.models.registry import ENCODERS


def prefix(model: nn.Module, ids: Any) -> Prefix:
    """The keys and values of tokens `ids`, a list or a tensor [T] or [1, T], for a patched decoder that takes a cache.

    Whatever continues them has the bits of the whole sequence:

        p = rk.prefix(model, tokenizer(text).input_ids)
        model.generate(**batch, past_key_values=p.cache(**batch))  # each row of the batch begins with `text`
        p.continued(**rests).logits                                # of the rests alone, keys of the prefix kept once
    """
    if not _takes_a_cache(model):
        raise PatchError(
            f"prefix: model must be a patched decoder, its *Model or *ForCausalLM, got {_shown(model)}; for scores of query "
            "and document take rk.Reranker, which shares what they begin with by itself"
        )
    return Prefix(model, _ids(ids))


def _takes_a_cache(m: Any) -> bool:
    served = ENCODERS.get(name_of(m))
    return served is not None and forward_of(m) is not None and served.turning_points is not None and served.gives != "logits"


def _shown(model: Any) -> str:
    """What came in a model's place, and what would work."""
    if isinstance(model, nn.Module):
        inside = next((name for name, m in model.named_modules() if _takes_a_cache(m)), None)
        if inside is not None and ENCODERS.get(name_of(model)) is None:
            return f"{class_of(model)}, around one; pass model.{inside}"
        if forward_of(model) is None:
            return f"{class_of(model)}, which is not patched; call rk.patch(model) first"
    return class_of(model)


def _ids(ids: Any) -> Tensor:
    """int64 [T], on the CPU."""
    if isinstance(ids, dict) or hasattr(ids, "input_ids"):
        check.fail("prefix", "ids", "a list or tensor of token ids", type(ids).__name__, "pass its input_ids")
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        check.fail("prefix", "ids", "a list or tensor of token ids", f"{type(ids).__name__} {ids!r:.40}")
    if tokens.dim() == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.dim() != 1:
        came = check.shape_of(tokens)
        check.fail("prefix", "ids", "one sequence, [T] or [1, T]", came, "make a prefix for each row")
    if not tokens.numel():
        check.fail("prefix", "ids", "one token or more", "none", "without a prefix call the model itself")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"prefix: ids must be integers, got {tokens.dtype}")
    return tokens.detach().long().cpu().clone()


def _are_ids(op: str, ids: Any, mask: Any) -> None:
    if ids is None:
        check.fail(op, "input_ids", "token ids [B, T]", None, "a prefix of embeddings is not served")
    are_tensors(op, input_ids=ids, attention_mask=mask)
    check.shape(op, "input_ids", ids, "B", "T")


class Prefix:
    """Keys and values of some first tokens, made by rk.prefix; len() is their number. Any number of threads may continue it."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        from transformers import DynamicCache

        self.model, self.ids = model, ids
        self._forward, self._state = forward_of(model), _State(model)
        cache: Any = DynamicCache()
        kept = {"logits_to_keep": 1} if ENCODERS[name_of(model)].gives == "words" else {}
        model(input_ids=ids[None].to(_device(model)), past_key_values=cache, use_cache=True, **kept)
        layers = cache.layers[: model.config.num_hidden_layers]
        # [T, H_kv, D] each: packed, as attention takes them
        self._keys = caches.PrefixKeys([tuple(t[0].transpose(0, 1) for t in (own.keys, own.values)) for own in layers])

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Prefix({len(self)} tokens of {class_of(self.model)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Prefix: it belongs to one model and is not copied or stored; make another with rk.prefix(model, ids)")

    def continued(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The model's output for continuations [B, T], padded on any side, which do not hold the prefix themselves.

        A layer puts the prefix's keys before each row's own as long as it runs. Nothing is stored, so the output has no cache.
        options: of the model's forward, such as logits_to_keep.
        """
        op = "Prefix.continued"
        for name in ("past_key_values", "cache"):
            if options.get(name) is not None:
                check.fail(op, name, "left out", class_of(options[name]), "the prefix takes its place")
        if options.pop("use_cache", None):
            check.fail(op, "use_cache", "left out", True, "continue the cache that Prefix.cache() makes")
        self._check(op)
        _are_ids(op, input_ids, attention_mask)
        if attention_mask is not None:
            check.shape(op, "attention_mask", attention_mask, *input_ids.shape)
            before = attention_mask.new_ones(len(input_ids), len(self))
            attention_mask = torch.cat([before, attention_mask], dim=1)
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=self._keys, use_cache=False, **options
        )

    def cache(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """A new DynamicCache for whole sequences [B, T], each of which begins with the prefix, padded on any side.

        It holds the first cache.get_seq_length() places of every row, padding among them, once per row. generate() takes the
        whole batch with it; the model takes input_ids behind those places, and the whole attention_mask. In a batch that is
        padded on the left, the shorter rows' last tokens of the prefix are behind them, and are computed again.
        """
        from transformers import DynamicCache

        op = "Prefix.cache"
        self._check(op)
        _are_ids(op, input_ids, attention_mask)
        b, t = input_ids.shape
        there = caches.valid(op, attention_mask, None, b, 0, t, input_ids.device)
        first = torch.where(there.any(1), there.long().argmax(1), t)
        for i in range(b):
            at = int(first[i])
            own = input_ids[i, at : at + len(self)]
            if at < t and not (bool(there[i, at : at + len(self)].all()) and torch.equal(own.cpu().long(), self.ids)):
                wanted = f"rows that begin with the prefix's {len(self)} tokens, without padding between them"
                check.fail(op, "input_ids", wanted, f"row {i} with {own.tolist()[:8]}", "tokenise both with one tokenizer")
        held = min(int(first.min()) + len(self) if b else 0, max(t - 1, 0))  # one token of each row is computed anew
        made = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if held:
            place = torch.arange(held, device=input_ids.device) - first[:, None]
            index, empty = place.clamp(min=0, max=len(self) - 1), (place < 0)[:, None, :, None]
            for i, layer in enumerate(self._keys.layers):
                rows = (x[index.to(x.device)].transpose(1, 2).masked_fill(empty.to(x.device), 0.0) for x in layer)
                made.update(*rows, i)
        caches.mark(made, inner(self.model))
        return made

    def _check(self, op: str) -> None:
        """An error if the model is not as it was when the prefix was computed."""
        if forward_of(self.model) is not self._forward:
            changed = "one that was unpatched, or patched anew"
        else:
            ready(self.model, ENCODERS[name_of(self.model)].roles)
            changed = self._state.changed(self.model)
        if changed:
            wanted = "as it was when the prefix was computed"
            check.fail(op, "the model", wanted, changed, "compute it again: rk.prefix(model, ids)")


class _State:
    """What of a model is in the bits of a prefix."""

    def __init__(self, model: Any) -> None:
        self.seen = Fingerprint(model, ENCODERS[name_of(model)].roles(model))
        self.backend = _backend(model)
        self.weights = [(name, p, _memory(p), *_values(p)) for name, p in model.base_model.named_parameters()]

    def changed(self, model: Any) -> str:
        """What is another, "" if nothing is."""
        now = list(model.base_model.parameters())
        if len(now) != len(self.weights):
            return "one with other parameters"
        for p, (name, was, memory, view, values) in zip(now, self.weights, strict=True):
            if p is not was or _memory(p) != memory or (view is not None and not torch.equal(view, values)):
                return f"one whose {name} was written, replaced or moved"
        if not self.seen.same():
            return "one with other modules, attributes, settings or hooks"
        if (serves := _backend(model)) != self.backend:
            return f"one that backend {serves!r} serves, and {self.backend!r} served"
        return ""


def _memory(p: Tensor) -> tuple[Any, ...]:
    return p.data_ptr(), p.dtype, p.device, p.shape, p.stride(), None if p.is_inference() else p._version


def _values(p: Tensor) -> tuple[Any, Any]:
    """Some of them as a view, and as they were: no version counts a write through .data, or under inference_mode."""
    if p.device.type != "cpu" or p.dtype not in check.FLOATS:
        return None, None
    view = sample(p.detach()) if p.dim() == 2 else p.detach().view(torch.int32 if p.element_size() == 4 else torch.int16)
    return view, view.clone()


def _backend(model: Any) -> str:
    forward = forward_of(model)
    assert forward is not None
    with serving(forward.mode, forward.backend):
        return backends.active(_device(model)).name


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
