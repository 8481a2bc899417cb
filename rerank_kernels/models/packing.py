"""Packing: the arguments of transformers' forwards to the valid tokens alone, [total] with cu_seqlens, and back to its outputs.

Every architecture's forward goes through here, so that padding, options and hooks mean the same for all of them. An argument
that would have to be ignored is an error.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.models import lora
from rerank_kernels.models.bound import class_of, hooked
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.norm import layer_norm
from rerank_kernels.ops.opaque import opaque, traced
from rerank_kernels.ops.sequences import Sequences

_NO_CROSS, _WHOLE = "there is no cross-attention in a reranker's encoder", "an encoder sees the whole sequence at once"
REFUSED = {
    "labels": "no loss is computed; take the logits, or call rk.unpatch(model) to train",
    "output_attentions": "attention probabilities are never stored; call rk.unpatch(model) to see them",
    "encoder_hidden_states": _NO_CROSS,
    "encoder_attention_mask": _NO_CROSS,
    "past_key_values": _WHOLE,
    "use_cache": _WHOLE,
}


class Kept(NamedTuple):
    """Offsets of the sequences, int32 [B + 1], and where their tokens stand among the places of the batch, int64 [total]."""

    cu_seqlens: Tensor
    places: Tensor


class Batch(NamedTuple):
    """The valid tokens of a batch, packed: [total] each; and what the caller asked for."""

    words: Tensor  # [total, D], word embeddings
    types: Tensor | None
    positions: Tensor
    sequences: Sequences  # made once, for all layers and the head
    states: list[Tensor] | None  # packed hidden states, collected if output_hidden_states
    as_dict: bool

    def output(self, cls: Any, **fields: Any) -> Any:
        states = None if self.states is None else tuple(self.sequences.unpack(x) for x in self.states)
        out = cls(hidden_states=states, **fields)
        return out if self.as_dict else out.to_tuple()


def ready(m: Any) -> None:
    """Refuse what the forward of encoder or classifier m would silently ignore: dropout, and hooks of the modules in m.

    Both can come after patch(), which saw neither. So this walks m at each call, in a fraction of a millisecond.
    """
    if m.training or m.base_model.training:
        raise RuntimeError(
            f"{class_of(m)}.forward: the model is set to train, and rerank_kernels is forward only, without dropout; "
            "call model.eval(), or rk.unpatch(model) to train"
        )
    below, seen = list(m._modules.values()), {m, None}
    while below:  # and not m.modules(), which makes names too and takes three times as long
        inner = below.pop()
        if inner not in seen:
            if hooked(inner):
                refuse_hooks(m, inner)
            seen.add(inner)
            below += inner._modules.values()


def refuse_hooks(m: nn.Module, inner: nn.Module) -> NoReturn:
    path = next(path for path, module in m.named_modules() if module is inner)
    raise PatchError(
        f"{class_of(m)}: {path or 'the model'} ({class_of(inner)}) has forward hooks, and hooks inside a patched encoder do "
        "not run; remove them (handle.remove()), or call rk.unpatch(model)"
    )


def dense(m: Any, x: Tensor, act: str | None = None) -> Tensor:
    if lora.is_lora(m):
        return lora.product(m, x, act)
    as_patched(m, nn.Linear)
    return linear(x, m.weight, m.bias, activation=act)


def norm(m: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    as_patched(m, nn.LayerNorm)
    return layer_norm(x, m.weight, m.bias, m.eps, residual=residual)


def as_patched(m: object, cls: type[nn.Module]) -> None:
    """An adapter put in after patch() would be ignored silently: its base weights look the same from here."""
    if type(m) is not cls:
        raise PatchError(
            f"a {class_of(m)} stands where patch() saw nn.{cls.__name__}; call rk.unpatch(model), then patch it again"
        )


class Table(NamedTuple):
    """What a forward looks tokens up in: its encoder, the word embeddings, and the places that a sequence can have."""

    encoder: Any
    words: nn.Embedding
    first: int  # position id of a sequence's first token
    limit: int  # tokens of the longest sequence


def pack(m: Any, table: Table, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Stock arguments to packed tokens; an argument that would have to be ignored is an error."""
    op, given = f"{class_of(m)}.forward", _signature(m.__class__).bind(None, *args, **kwargs).arguments
    given.pop("self")
    given |= given.pop("kwargs", {})
    ids, mask, embeds = (given.pop(name, None) for name in ("input_ids", "attention_mask", "inputs_embeds"))
    types, positions = given.pop("token_type_ids", None), given.pop("position_ids", None)
    states, as_dict = _options(m, op, given)
    if (ids is None) == (embeds is None):
        raise ValueError(f"{op}: exactly one of input_ids [B, T] and inputs_embeds [B, T, D] must be given")
    if ids is None:
        check.shape(op, "inputs_embeds", embeds, "B", "T", table.words.embedding_dim)
        b, t = embeds.shape[:2]
    else:
        check.shape(op, "input_ids", ids, "B", "T")
        b, t = ids.shape
    asked = embeds if ids is None else ids, mask, None if ids is None else m.config.pad_token_id, op
    if traced():
        cu, index = kept(*asked)
        sequences = Sequences(cu, index.shape[0], (b, t), index, op)
    else:
        sequences = _tokens(*asked)

    def packed(name: str, x: Tensor | None) -> Tensor | None:
        if x is not None:
            if not traced():  # there expand() says it, when it runs
                check.shape(op, name, x, 1 if x.shape[0] == 1 else b, t)
            x = sequences.pack(x.expand(b, t))
        return x

    if ids is None:
        words = sequences.pack(embeds)
    else:
        words = lookup(op, "input_ids", sequences.pack(ids), table.words)
    own = packed("position_ids", positions)
    if own is None:
        own = positions_of(table, sequences)
    return Batch(words, packed("token_type_ids", types), own, sequences, states, as_dict)


def _kept_result(like: Tensor, mask: Tensor | None, pad: int | None, op: str) -> tuple[Tensor, Tensor]:
    cu = like.new_empty(like.shape[0] + 1, dtype=torch.int32)
    return cu, like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@opaque(_kept_result, result=Kept)
def kept(like: Tensor, mask: Tensor | None, pad: int | None, op: str) -> Kept:
    """_tokens, where a tracer writes it down: how many there are is known when the graph runs."""
    sequences = _tokens(like, mask, pad, op)
    assert sequences.index is not None
    return Kept(sequences.cu_seqlens, sequences.index)


def _tokens(like: Tensor, mask: Tensor | None, pad: int | None, op: str) -> Sequences:
    """Those of a padded batch, like [B, T, ...]: where mask [B, T] is not 0; every place without a mask."""
    b, t = like.shape[:2]
    if mask is None:
        _warn_of_pads(op, like, pad)
        mask = torch.ones(b, t, dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (b, t):
        came = check.shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
        check.fail(op, "attention_mask", f"[B, T] = [{b}, {t}], nonzero where a token is", came, "causal masks are not served")
    # 0 for tokens and -10000 for padding: `!= 0` would turn it around
    if mask.dtype != torch.bool and mask.numel() and mask.min() < 0:
        check.fail(op, "attention_mask", "nonzero where a token is", "negative values", "additive masks are not served")
    return Sequences.from_mask(mask != 0, (b, t), op=op)


@functools.cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _warn_of_pads(op: str, ids: Tensor | None, pad: int | None) -> None:
    if ids is not None and pad is not None and ids.numel() and bool((ids[:, [0, -1]] == pad).any()):
        # Stock transformers takes them as tokens too; guessing a mask would be worse than saying what happens.
        warnings.warn(
            f"{op}: input_ids begin or end with the pad token {pad} and attention_mask is missing: "
            "padding is read as tokens and changes the result; pass the tokenizer's attention_mask",
            stacklevel=9,
        )


def positions_of(table: Table, sequences: Sequences) -> Tensor:
    """[total]: counted over a sequence's valid tokens, from the table's first position.

    Stock RoBERTa counts tokens that differ from the pad id instead. The two agree except for a pad id that the mask keeps:
    it is counted here like every other token.
    """
    op, first, limit = class_of(table.encoder), table.first, table.limit
    if traced():
        assert sequences.index is not None
        return places(sequences.cu_seqlens, sequences.index, first, limit, op)
    return _counted(sequences, first, limit, op)


@opaque(lambda cu_seqlens, index, *_: index.new_empty(index.shape))
def places(cu_seqlens: Tensor, index: Tensor, first: int, limit: int, op: str) -> Tensor:
    """positions_of, where a tracer writes it down: of what sequences hold it takes tensors alone."""
    return _counted(Sequences.from_cu_seqlens(cu_seqlens, index.shape[0], op=op), first, limit, op)


def _counted(sequences: Sequences, first: int, limit: int, op: str) -> Tensor:
    # One look, on a GPU too: there wrong offsets would end in an assertion that takes the process's context with it.
    longest, cu, total = sequences.longest, sequences.cu_seqlens, sequences.total
    if longest > limit:
        wanted = f"at most {limit} tokens a sequence, for config.max_position_embeddings = {limit + first}"
        check.fail(op, "input_ids", wanted, longest, f"tokenise with truncation=True, max_length={limit}")
    if sequences.count == 1:
        return torch.arange(first, first + total, device=cu.device)
    start = torch.repeat_interleave(cu[:-1].long(), (cu[1:] - cu[:-1]).long(), output_size=total)
    return torch.arange(first, first + total, device=cu.device) - start


def lookup(op: str, name: str, ids: Tensor, table: nn.Embedding) -> Tensor:
    return looked_up(ids, table.weight, op, name)


@opaque(lambda ids, weight, *_: weight.new_empty(*ids.shape, weight.shape[1]))
def looked_up(ids: Tensor, weight: Tensor, op: str, name: str) -> Tensor:
    n = weight.shape[0]
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
    if ids.numel():  # on a GPU too, for the same reason as above
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= n:
            check.fail(op, name, f"in [0, {n - 1}]", f"values in [{low}, {high}]")
    return F.embedding(ids, weight)


def _options(m: Any, op: str, given: dict[str, Any]) -> tuple[list[Tensor] | None, bool]:
    """(where to collect hidden states, return_dict)."""
    asked = {name: value for name, value in given.items() if value is not None}
    hidden = asked.pop("output_hidden_states", getattr(m.config, "output_hidden_states", False))
    # transformers 4 gives tuples to torch.jit.trace where config.torchscript says so
    usual = getattr(m.config, "return_dict", True) and not getattr(m.config, "torchscript", False)
    as_dict = asked.pop("return_dict", usual)
    asked.setdefault("output_attentions", getattr(m.config, "output_attentions", False))
    for name, value in asked.items():
        if value is not False:
            raise ValueError(f"{op}: {name} is not served by a patched model; {REFUSED.get(name, 'leave it out')}")
    if not isinstance(hidden, bool):
        check.fail(op, "output_hidden_states", "True or False", hidden, "take the layers you want from the tuple")
    return ([] if hidden else None), bool(as_dict)
