"""Decoders built like Llama, packed: Llama, Mistral, Qwen2, Qwen3 and Gemma, bare, with logits or with a classification head.

A model type whose modules carry Llama's names is one row in MODEL_TYPES. What differs from stock transformers: residuals are
added in float32 inside the product before them, angles are those of ops/rotary.py, positions count valid tokens unless they are
given, hidden states at padding are 0, logits are float32.

With a cache of transformers, new queries are the last ones of their keys. NUMERICS.md, "attention", gives them the bits that
they have in the whole sequence. The cache holds what stock's would, and zeros at padding, which nothing reads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.models import decoder_roles, lora, packing, rope, sparse
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.models.caches import Keys, belongs, chosen, length, valid
from rerank_kernels.models.heads import LastTokenHead
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.packing import dense, explained, lookup, ready
from rerank_kernels.models.roles import Roles
from rerank_kernels.models.served import Served
from rerank_kernels.models.shared import Shared
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import activation
from rerank_kernels.ops.norm import rms_norm
from rerank_kernels.ops.opaque import opaque, traced
from rerank_kernels.ops.rotary import rotary
from rerank_kernels.ops.sequences import Sequences


@dataclass(frozen=True)
class ModelType:
    """Classes of transformers whose modules carry Llama's names, only behind another prefix."""

    prefix: str
    window: Callable[[Any, int], int | None] = lambda config, layer: None  # keys that a query of a layer sees, itself included
    eps: str = "variance_epsilon"  # of the norms
    offset: int = 0  # added to the norms' weights
    cast: str = "before"
    head_norms: bool = False  # queries and keys are normed, head by head
    scaled: bool = False  # embeddings are multiplied by the root of the model's width


def _by_layer(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None


MODEL_TYPES = {
    "transformers.models.llama.modeling_llama": ModelType("Llama"),
    "transformers.models.mistral.modeling_mistral": ModelType("Mistral", lambda config, layer: config.sliding_window),
    "transformers.models.qwen2.modeling_qwen2": ModelType("Qwen2", _by_layer),
    "transformers.models.qwen3.modeling_qwen3": ModelType("Qwen3", _by_layer, head_norms=True),
    "transformers.models.gemma.modeling_gemma": ModelType("Gemma", eps="eps", offset=1, cast="after", scaled=True),
}


class Batch(NamedTuple):
    """The valid new tokens of a batch, packed: [total] each; and what the caller asked for."""

    words: Tensor  # [total, D], word embeddings
    cos: Tensor  # float32 [total, P]
    sin: Tensor
    new: Sequences  # of the new tokens
    keys: Keys | Shared | None  # where their keys are; None: nowhere else, the whole sequences are here
    states: list[Tensor] | None  # packed hidden states, collected if output_hidden_states
    as_dict: bool


# ---- forwards ---------------------------------------------------------------------------------------------------------------


def decoder_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """LlamaModel and its like, stock arguments: BaseModelOutputWithPast."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    ready(m, roles_of)
    with explained(m, roles_of):
        batch, _ = _pack(m, m, args, kwargs, cached=True)
        return _output(m, batch, BaseModelOutputWithPast, last_hidden_state=batch.new.unpack(_decode(m, batch)))


def causal_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """LlamaForCausalLM and its like, stock arguments: CausalLMOutputWithPast with float32 logits."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    ready(m, roles_of)
    with explained(m, roles_of):
        batch, given = _pack(m, _enter(m), args, kwargs, cached=True)
        x = batch.new.unpack(_decode(m.base_model, batch))
        kept = _kept(m, x, given.get("logits_to_keep", 0))
        logits = dense(lora.held(m.lm_head), kept, out_dtype=torch.float32)
        return _output(m, batch, CausalLMOutputWithPast, logits=logits)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """LlamaForSequenceClassification and its like, stock arguments: SequenceClassifierOutputWithPast with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    ready(m, roles_of)
    with explained(m, roles_of):
        batch, _ = _pack(m, _enter(m), args, kwargs, cached=False)
        logit = _head(m)(_decode(m.base_model, batch), batch.new).logit
        return _output(m, batch, SequenceClassifierOutputWithPast, logits=logit)


def packed_forward(
    m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None, before: Sequence[int | None] | None = None
) -> Tensor:
    """[total, D] of any of the three: ids [total], no padding. before: the earlier sequence that each continues (shared.py)."""
    decoder = m.base_model if m.base_model is m else _enter(m)
    if types is not None:
        raise ValueError(f"{class_of(decoder)}: token_types are not served, a decoder has none; leave them out")
    op, cu = class_of(decoder), sequences.cu_seqlens
    lengths = (cu[1:] - cu[:-1]).long()
    positions = torch.arange(ids.shape[0], device=cu.device)
    positions = positions - torch.repeat_interleave(cu[:-1].long(), lengths, output_size=ids.shape[0])
    if before is None:
        cos, sin = _angles(decoder, op, positions, sequences, lengths)
        return _decode(decoder, Batch(_words(decoder, op, ids), cos, sin, sequences, None, None, True))
    keys = Shared(op, sequences, before, turning_point(m))
    cos, sin = _angles(decoder, op, positions + keys.starts, keys.whole, keys.reach, lengths)
    return _decode(decoder, Batch(_words(decoder, op, ids), cos, sin, sequences, keys, None, True))


def turning_point(m: Any) -> int:
    """The longest sequence of a model whose angles are those of a short one."""
    return rope.turning_point(rope.parameters(m.base_model.rotary_emb.config))


def max_tokens(m: Any) -> int:
    return int(m.config.max_position_embeddings)


def _head(m: Any) -> LastTokenHead:
    return LastTokenHead(lora.held(m.score))


def _enter(m: Any) -> Any:
    """The decoder of m. It does not pass its own forward, but a count of zero must mean it never ran."""
    forward = forward_of(m.base_model)
    if forward is not None and not traced():
        forward.calls += 1
    return m.base_model


# ---- arguments and outputs --------------------------------------------------------------------------------------------------


def _pack(m: Any, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, cached: bool) -> tuple[Batch, dict[str, Any]]:
    """Stock arguments to packed tokens, and those that are left for the head. cached: a cache is made where config.use_cache
    says so, as stock does; else where the caller does."""
    op, given = f"{class_of(m)}.forward", packing._signature(m.__class__).bind(None, *args, **kwargs).arguments
    given.pop("self")
    given |= given.pop("kwargs", {})
    ids, mask, embeds, positions = (
        given.pop(name, None) for name in ("input_ids", "attention_mask", "inputs_embeds", "position_ids")
    )
    caches = [c for c in (given.pop("cache", None), given.pop("past_key_values", None)) if c is not None]
    use_cache, places = given.pop("use_cache", None), given.pop("cache_position", None)
    ours = {"logits_to_keep": given.pop("logits_to_keep")} if "logits_to_keep" in given else {}
    if given.pop("is_causal", None) not in (None, True):
        check.fail(op, "is_causal", "True, or left out", False, "a decoder's queries see what is before them")
    states, as_dict = packing._options(m, op, given)
    packing.are_tensors(op, input_ids=ids, inputs_embeds=embeds, position_ids=positions)
    if positions is not None and positions.is_floating_point():
        raise TypeError(f"{op}: position_ids must be int64 or int32, got {positions.dtype}")
    if (ids is None) == (embeds is None):
        raise ValueError(f"{op}: exactly one of input_ids [B, T] and inputs_embeds [B, T, D] must be given")
    if ids is None:
        check.shape(op, "inputs_embeds", embeds, "B", "T", decoder.embed_tokens.weight.shape[1])
    else:
        check.shape(op, "input_ids", ids, "B", "T")
    b, t = (embeds if ids is None else ids).shape[:2]
    cache = chosen(op, caches, bool(decoder.config.use_cache and cached) if use_cache is None else use_cache)
    if traced():
        return _traced(decoder, op, ids, embeds, mask, positions, cache, places, states, as_dict), ours
    d, dtype = decoder.layers[0].self_attn.head_dim, decoder.embed_tokens.weight.dtype
    windows = [_type(decoder).window(decoder.config, i) for i in range(decoder.config.num_hidden_layers)]
    belongs(op, cache, decoder)
    past = length(op, cache, b, windows, decoder.config.num_key_value_heads, d, dtype)
    if places is not None and (not isinstance(places, Tensor) or places.shape != (t,) or int(places[0]) != past):
        check.fail(op, "cache_position", f"the {t} places behind the {past} that the cache holds", places)
    there = valid(op, mask, cache, b, past, t, (embeds if ids is None else ids).device)
    new = Sequences.from_mask(there[:, past:], (b, t), op=op)
    keys, counted = Keys(op, cache, there, new, past), there.long().cumsum(1)
    if positions is None:
        own = new.pack(counted[:, past:] - 1)
    else:
        check.shape(op, "position_ids", positions, 1 if positions.shape[0] == 1 else b, t)
        # stock takes each beginning for a sequence of its own
        if mask is None and not past and bool((positions.diff() != 1).any()):
            wanted = "one more at each place, where no attention_mask is given"
            check.fail(op, "position_ids", wanted, "a row that begins anew", "give each sequence a row of its own, or a mask")
        own = new.pack(positions.expand(b, t)).long()
    if mask is None and not cached:
        packing._warn_of_pads(op, ids, m.config.pad_token_id)
    cos, sin = _angles(decoder, op, own, keys.whole, None if past else counted[:, -1])
    words = new.pack(embeds) if ids is None else _words(decoder, op, new.pack(ids))
    return Batch(words, cos, sin, new, None if cache is None else keys, states, as_dict), ours


def _traced(
    decoder: Any, op: str, ids: Any, embeds: Any, mask: Any, positions: Any, cache: Any, places: Any, states: Any, as_dict: bool
) -> Batch:
    """The batch where a tracer writes it down: what looks at numbers is an op, and there is no cache."""
    if cache is not None or places is not None:
        what, cure = ("a cache", "use_cache=False") if cache is not None else ("cache_position", "none")
        raise PatchError(f"{op}: {what} cannot be traced or exported; pass {cure}, or set model.config.use_cache = False")
    b, t = (embeds if ids is None else ids).shape[:2]
    cu, index = packing.kept(embeds if ids is None else ids, mask, None, op)
    new, limit = Sequences(cu, index.shape[0], (b, t), index, op), max_tokens(decoder)
    own = packing.places(cu, index, 0, limit, op)
    if positions is not None:
        own = new.pack(positions.expand(b, t)).long()
    said = rope.parameters(decoder.rotary_emb.config)
    cos, sin = angles(cu, own, dict(said)["features"] // 2, rope.written(said), limit, op)
    words = new.pack(embeds) if ids is None else _words(decoder, op, new.pack(ids))
    return Batch(words, cos, sin, new, None, states, as_dict)


def _angles_result(cu_seqlens: Tensor, positions: Tensor, pairs: int, *_: Any) -> tuple[Tensor, Tensor]:
    cos, sin = (positions.new_empty(positions.shape[0], pairs, dtype=torch.float32) for _ in range(2))
    return cos, sin


@opaque(
    _angles_result,
    result=lambda cos, sin: (cos, sin),
    schema="(Tensor cu_seqlens, Tensor positions, int pairs, str said, int limit, str op) -> (Tensor, Tensor)",
)
def angles(cu_seqlens: Tensor, positions: Tensor, pairs: int, said: str, limit: int, op: str) -> tuple[Tensor, Tensor]:
    """_angles of whole sequences, where a tracer writes it down; said: the angles' parameters as a text."""
    keys = Sequences.from_cu_seqlens(cu_seqlens, positions.shape[0], op=op)
    return _turned(rope.read(said), limit, op, positions, keys, (cu_seqlens[1:] - cu_seqlens[:-1]).long())


def _words(decoder: Any, op: str, ids: Tensor) -> Tensor:
    words = lookup(op, "input_ids", ids, decoder.embed_tokens)
    if not _type(decoder).scaled:
        return words
    scale = getattr(decoder.embed_tokens, "embed_scale", None)
    if scale is None:  # in transformers 4 the model's forward does it; a plain embedding put in later is not scaled
        if hasattr(sys.modules[name_of(decoder).rpartition(".")[0]], f"{_type(decoder).prefix}TextScaledWordEmbedding"):
            return words
        scale = words.new_full((), decoder.config.hidden_size**0.5)
    scale = scale.to(words.dtype)
    return (words.float() * scale.float()).to(words.dtype)  # a product of halves is exact in float32: stock's bits


def _angles(
    decoder: Any, op: str, positions: Tensor, keys: Sequences, lengths: Tensor | None, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of the new tokens; lengths: of whole sequences, None where a cache holds a part of them; counts: of the new
    tokens of each, if those are not all."""
    return _turned(rope.parameters(decoder.rotary_emb.config), max_tokens(decoder), op, positions, keys, lengths, counts)


def _turned(
    said: rope.Parameters, limit: int, op: str, positions: Tensor, keys: Sequences, lengths: Tensor | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    longest = keys.longest
    if longest > limit:
        wanted = f"at most {limit} tokens a sequence, for config.max_position_embeddings"
        check.fail(op, "input_ids", wanted, longest, f"tokenise with truncation=True, max_length={limit}")
    own = None
    if lengths is not None and longest > rope.turning_point(said):
        own = torch.repeat_interleave(lengths, lengths if counts is None else counts, output_size=positions.shape[0])
    return rope.rows(said, positions, longest, own, op=op)


def _kept(m: Any, x: Tensor, keep: Any) -> Tensor:
    """The rows of [B, T, D] whose logits are asked for, as stock's logits_to_keep says."""
    if isinstance(keep, Tensor):
        if keep.dim() == 1 and not keep.dtype.is_floating_point and keep.dtype != torch.bool:
            return x[:, keep]
    elif isinstance(keep, int | np.integer) and not isinstance(keep, bool) and keep >= 0:
        return x[:, -int(keep) :] if keep else x  # more than there are: all of them
    check.fail(f"{class_of(m)}.forward", "logits_to_keep", "a number >= 0, or a 1-D tensor of places", keep)


def _output(m: Any, batch: Batch, cls: Any, **fields: Any) -> Any:
    states = None if batch.states is None else tuple(batch.new.unpack(x) for x in batch.states)
    name = "cache" if "cache" in packing._signature(m.__class__).parameters else "past_key_values"
    out = cls(hidden_states=states, **{name: batch.keys.cache if batch.keys else None}, **fields)
    return out if batch.as_dict else out.to_tuple()


# ---- layers -----------------------------------------------------------------------------------------------------------------


def _type(m: Any) -> ModelType:
    return MODEL_TYPES[name_of(m).rpartition(".")[0]]


def _norm(kind: ModelType, m: Any, x: Tensor) -> Tensor:
    return rms_norm(x, m.weight, getattr(m, kind.eps), offset=kind.offset, cast=kind.cast)


def _decode(decoder: Any, batch: Batch) -> Tensor:
    """[total, D] through all layers and the last norm; collects what stock's hidden_states are."""
    kind, x = _type(decoder), batch.words
    for i, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
        if batch.states is not None:
            batch.states.append(x)
        x = _attend(kind, decoder.config, i, layer, x, batch)
        x = _feed_forward(layer.mlp, _norm(kind, layer.post_attention_layernorm, x), x, sparse.seat(decoder, i))
    x = _norm(kind, decoder.norm, x)
    if batch.states is not None:
        batch.states.append(x)
    return x


def _attend(kind: ModelType, config: Any, i: int, layer: Any, x: Tensor, batch: Batch) -> Tensor:
    own, normed = layer.self_attn, _norm(kind, layer.input_layernorm, x)
    q, k, v = (dense(p, normed).unflatten(-1, (-1, own.head_dim)) for p in (own.q_proj, own.k_proj, own.v_proj))
    if kind.head_norms:
        q, k = _norm(kind, own.q_norm, q), _norm(kind, own.k_norm, k)
    q, k = rotary(q, batch.cos, batch.sin), rotary(k, batch.cos, batch.sin)
    k, v, keys = (k, v, None) if batch.keys is None else batch.keys.stored(i, k, v)
    window = kind.window(config, i)
    a = attention(
        q, k, v, cu_seqlens=batch.new, cu_seqlens_k=keys, causal=True,
        window=None if window is None else (window - 1, -1), scale=own.scaling,
    )  # fmt: skip
    return dense(own.o_proj, a.flatten(1), residual=x)


# A CPU takes so many tokens through the feed-forward layer at a time, for the same reason as in bert.py.
TOKENS_AT_ONCE = 1024


def _feed_forward(m: Any, x: Tensor, residual: Tensor, at: sparse.Seat = sparse.NOWHERE) -> Tensor:
    """residual + down(act(gate(x)) · up(x)); where act is relu or its kin, only what active neurons touch."""
    if (firing := sparse.firing_of(m)) is not None:
        return sparse.feed_forward(m, x, residual, firing, at)
    act = activation_of(m.act_fn)
    split = x.device.type == "cpu" and not traced() and x.shape[0] > TOKENS_AT_ONCE
    pieces = zip(x.split(TOKENS_AT_ONCE), residual.split(TOKENS_AT_ONCE), strict=True) if split else ((x, residual),)
    done = [
        dense(m.down_proj, activation(dense(m.gate_proj, part), act, up=dense(m.up_proj, part)), residual=r)
        for part, r in pieces
    ]
    return done[0] if len(done) == 1 else torch.cat(done)


# ---- the registry's rows ----------------------------------------------------------------------------------------------------


def problem(m: Any) -> str | None:
    """Why a decoder's angles cannot be served; None if they can."""
    return rope.problem(m.config)


def roles_of(m: Any) -> Roles:
    """What is read of a decoder, and of what is around it."""
    return _roles(*name_of(m).rsplit(".", 1))


@functools.cache
def _roles(module: str, name: str) -> Roles:
    a = MODEL_TYPES[module]
    inside = decoder_roles.decoder(module, a.prefix, a.eps, problem)
    head = decoder_roles.HEADS.get(name.removeprefix(a.prefix))
    return inside if head is None else decoder_roles.around(module, name, inside, head)


def served() -> dict[str, Served]:
    """Exact class -> how it is served."""
    found: dict[str, Served] = {}
    for module, a in MODEL_TYPES.items():
        found |= {
            f"{module}.{a.prefix}Model": Served(
                decoder_forward, roles_of, packed_forward, max_tokens, turning_point=turning_point
            ),
            f"{module}.{a.prefix}ForCausalLM": Served(
                causal_forward, roles_of, packed_forward, max_tokens, lambda m: m.lm_head, turning_point=turning_point
            ),
            f"{module}.{a.prefix}ForSequenceClassification": Served(
                classifier_forward, roles_of, packed_forward, max_tokens, head=_head, turning_point=turning_point
            ),
        }
    return found


def parts() -> frozenset[str]:
    """Classes of modules inside, which a decoder's forward reads and never calls; nothing by themselves."""
    return frozenset({sparse.THRESHOLD}) | frozenset(
        name
        for module, a in MODEL_TYPES.items()
        for role in _roles(module, f"{a.prefix}Model").values()
        for name in role.classes
        if name.startswith(f"{module}.{a.prefix}") and name not in served()
    )
