"""Decoders built like Llama, packed: Llama, Mistral, Qwen2, Qwen3 and Gemma, bare, with logits or with a classification head.

A model type whose modules carry Llama's names is one row in MODEL_TYPES. What differs from stock transformers: residuals are
added in float32 inside the product before them, angles are those of ops/rotary.py, positions count valid tokens unless they are
given, hidden states at padding are 0, logits are float32.

With a cache of transformers, new queries are the last ones of their keys. NUMERICS.md, "attention", gives them the bits that
they have in the whole sequence. The cache holds what stock's would, and zeros at padding, which nothing reads.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.graphs.buckets import Inputs, Reads, Tokens
from rerank_kernels.models import decoder_roles, lora, packing, rope, sparse
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.models.caches import Keys, belongs, chosen, length, valid
from rerank_kernels.models.decoder_types import MODEL_TYPES as MODEL_TYPES
from rerank_kernels.models.decoder_types import ModelType, angles_of, inner, type_of
from rerank_kernels.models.heads import AnswerHead, LastTokenHead, asked, capped
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.packing import dense, explained, in_table, lookup, ready
from rerank_kernels.models.replay import Replay, possible, without
from rerank_kernels.models.roles import Roles
from rerank_kernels.models.served import Head, Served
from rerank_kernels.models.shared import Gathered, Shared
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import activation
from rerank_kernels.ops.norm import rms_norm
from rerank_kernels.ops.opaque import traced
from rerank_kernels.ops.rotary import rotary
from rerank_kernels.ops.sequences import Sequences


class Batch(NamedTuple):
    """The valid new tokens of a batch, packed: [total] each; and what the caller asked for."""

    words: Tensor  # [total, D], word embeddings
    angles: Mapping[str, tuple[Tensor, Tensor]]  # of each of the type's `turns`: cos and sin, float32 [total, P]
    new: Sequences  # of the new tokens
    keys: Keys | Gathered | None  # where their keys are; None: nowhere else, the whole sequences are here
    states: list[Tensor] | None  # packed hidden states, collected if output_hidden_states
    as_dict: bool


# ---- forwards ---------------------------------------------------------------------------------------------------------------


ALL = "all words of a decoder, or its states"  # no graph holds them


def decoder_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """LlamaModel and its like, stock arguments: BaseModelOutputWithPast."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    ready(m, roles_of)
    with explained(m, roles_of):
        without(m, m.embed_tokens.weight.device, ALL)
        batch, _ = _pack(m, m, args, kwargs, cached=True)
        return _output(m, batch, BaseModelOutputWithPast, last_hidden_state=batch.new.unpack(_decode(m, batch)))


def causal_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """LlamaForCausalLM and its like, stock arguments: CausalLMOutputWithPast with float32 logits."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    ready(m, roles_of)
    with explained(m, roles_of):
        decoder, question = _enter(m), None if traced() else asked()
        replay = None if question is None else possible(m, decoder.embed_tokens.weight.device, lambda: no_graph(m))
        if replay is not None and question is not None:
            head = AnswerHead(lora.held(m.lm_head), question.yes, question.no, word_cap(m))
            logit = _replayed(m, replay, args, kwargs, (question.yes, question.no), head, cached=True)
            if logit is not None:
                question.answered = True
                return CausalLMOutputWithPast(logits=logit[:, None])
        if question is None:
            without(m, decoder.embed_tokens.weight.device, ALL)
        batch, given = _pack(m, decoder, args, kwargs, cached=True)
        places = _places(m, batch.new, given.get("logits_to_keep", 0))  # an error of it leaves the cache as it was
        packed = _decode(inner(m), batch)
        kept = batch.new.unpack(packed)[:, places]
        if question is not None:
            logits = question.answer(lora.held(m.lm_head), packed, batch.new, word_cap(m))
        else:
            logits = capped(dense(lora.held(m.lm_head), kept, out_dtype=torch.float32), word_cap(m))
        return _output(m, batch, CausalLMOutputWithPast, logits=logits)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """LlamaForSequenceClassification and its like, stock arguments: SequenceClassifierOutputWithPast with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    ready(m, roles_of)
    with explained(m, roles_of):
        decoder = _enter(m)
        replay = possible(m, decoder.embed_tokens.weight.device, lambda: no_graph(m))
        if replay is not None and (logit := _replayed(m, replay, args, kwargs, "logits", _head(m))) is not None:
            return SequenceClassifierOutputWithPast(logits=logit)
        batch, _ = _pack(m, decoder, args, kwargs, cached=False)
        logit = _head(m)(_decode(decoder, batch), batch.new).logit
        return _output(m, batch, SequenceClassifierOutputWithPast, logits=logit)


def _replayed(
    m: Any, replay: Replay, args: tuple[Any, ...], kwargs: dict[str, Any], what: Hashable, head: Head, cached: bool = False
) -> Tensor | None:
    """The head's logits of a call of input_ids and attention_mask alone, by a graph; None if another way has to serve it.
    cached: config.use_cache asks for a cache where the caller does not."""
    given = packing._signature(m.__class__).bind(None, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    others = [v for name, v in given.items() if name != "self" and v is not None and not (name == "use_cache" and v is False)]
    where, op, config = inner(m).embed_tokens.weight.device, f"{class_of(m)}.forward", m.config
    usual = getattr(config, "return_dict", True) and not any(
        getattr(config, name, False) for name in ("torchscript", "output_hidden_states", "output_attentions")
    )
    if cached and given.get("use_cache", config.use_cache) is not False:
        replay.leave("a cache")
        return None
    plain = all(isinstance(t, Tensor) and t.device == where and t.dim() == 2 for t in (ids, ids if mask is None else mask))
    if others or not usual or not plain:
        replay.leave("arguments besides input_ids and attention_mask")
        return None
    ids, mask = packing.fetched(ids, mask)
    assert ids is not None
    b, t = ids.shape
    new = Sequences.from_mask(valid(op, mask, None, b, 0, t, ids.device), (b, t), op=op)
    if mask is None:
        packing._warn_of_pads(op, ids, config.pad_token_id)
    tokens = tokens_of(m, new.pack(ids), new, None)
    if isinstance(tokens, str):
        replay.leave(tokens)
        return None

    def body(numbers: Inputs) -> tuple[Tensor, ...]:
        return (head(states_of(m, numbers), numbers.sequences).logit,)

    return replay.run(("a call", what), tokens, body, lambda _, out: out[0][:b].clone())


def packed_forward(
    m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None, before: Sequence[int | None] | None = None
) -> Tensor:
    """[total, D] of any of the three: ids [total], no padding. before: the earlier sequence that each continues (shared.py)."""
    decoder = entered(m)
    _no_types(decoder, types)
    op, cu = class_of(decoder), sequences.cu_seqlens
    lengths = (cu[1:] - cu[:-1]).long()
    positions = torch.arange(ids.shape[0], device=cu.device)
    positions = positions - torch.repeat_interleave(cu[:-1].long(), lengths, output_size=ids.shape[0])
    if before is None:
        turned = _angles(decoder, op, positions, sequences, lengths)
        return _decode(decoder, Batch(_words(decoder, op, ids), turned, sequences, None, None, True))
    keys = Shared(op, sequences, before, turning_points(m))
    turned = _angles(decoder, op, positions + keys.starts, keys.whole, keys.reach, lengths)
    return _decode(decoder, Batch(_words(decoder, op, ids), turned, sequences, keys, None, True))


def tokens_of(
    m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None, before: Sequence[int | None] | None = None
) -> Tokens | str:
    """What packed_forward takes, on the host, and looked at, for a graph; or why no graph serves them."""
    decoder = inner(m)
    op = class_of(decoder)
    _no_types(decoder, types)
    keys = None if before is None else Shared(op, sequences, before, turning_points(m))
    longest = (sequences if keys is None else keys.whole).longest
    rope.not_longer(op, longest, max_tokens(decoder))
    in_table(op, "input_ids", ids, decoder.embed_tokens)
    if longest > min(turning_points(m)):
        return "a sequence beyond the angles' turning point"
    cu = sequences.cu_seqlens.long()
    begins = torch.repeat_interleave(cu[:-1], cu[1:] - cu[:-1], output_size=sequences.total)
    positions = torch.arange(sequences.total, device=cu.device) - begins
    if keys is None:
        return Tokens(ids, None, positions, sequences)
    return Tokens(ids, None, positions + keys.starts, sequences, Reads(keys.index, keys.whole))


def states_of(m: Any, given: Inputs) -> Tensor:
    """[T, D], inside a graph: all sequences are whole, and of dead rows nobody reads a thing."""
    decoder, turned = inner(m), {}
    for turn, said in _said(decoder).items():
        longest = given.ids.shape[0] if given.reads is None else given.reads.rows.shape[0]
        tables = rope.tables(said, longest, given.ids.device)
        given.held.extend(tables)
        cos, sin = (t.index_select(0, given.positions) for t in tables)
        turned[turn] = cos, sin
    words = _words(decoder, class_of(decoder), given.ids, known=True)
    keys = None if given.reads is None else Gathered(*given.reads)
    return _decode(decoder, Batch(words, turned, given.sequences, keys, None, True))


def entered(m: Any) -> Any:
    """The decoder in m, whose packed entry runs."""
    return m if inner(m) is m else _enter(m)


def no_graph(m: Any) -> str | None:
    """What of a model no graph can hold; None if one can hold it."""
    return "sparse feed-forward layers" if sparse.layers(inner(m)) else None


def _no_types(decoder: Any, types: Tensor | None) -> None:
    if types is not None:
        raise ValueError(f"{class_of(decoder)}: token_types are not served, a decoder has none; leave them out")


def turning_points(m: Any) -> list[int]:
    """The longest sequences of a model whose angles are those of a short one; layers may differ."""
    return sorted(set(map(rope.turning_point, _said(inner(m)).values())))


def max_tokens(m: Any) -> int:
    return int(m.config.max_position_embeddings)


def word_cap(m: Any) -> float | None:
    """How far the logits of m's language head go."""
    return m.config.final_logit_softcapping if type_of(m).word_cap else None


def _head(m: Any) -> LastTokenHead:
    return LastTokenHead(lora.held(m.score))


def _enter(m: Any) -> Any:
    """The decoder of m. It does not pass its own forward, but a count of zero must mean it never ran."""
    forward = forward_of(inner(m))
    if forward is not None and not traced():
        forward.calls += 1
    return inner(m)


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
    windows = [type_of(decoder).window(decoder.config, i) for i in range(decoder.config.num_hidden_layers)]
    belongs(op, cache, decoder)
    past = length(op, cache, b, t, windows, decoder.config.num_key_value_heads, d, dtype)
    if places is not None and not _placed(places, past, t):
        check.fail(op, "cache_position", f"the {t} places behind the {past} that the cache holds", places)
    there = valid(op, mask, cache, b, past, t, (embeds if ids is None else ids).device)
    new = Sequences.from_mask(there[:, past:], (b, t), op=op)
    keys, counted = Keys(op, cache, there, new, past), there.long().cumsum(1)
    keys.foresee(len(windows))
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
    counts, crosses = None, False
    if past:
        before, lengths = counted[:, past - 1], counted[:, -1]
        counts, turns = lengths - before, turning_points(decoder)
        crosses = any(bool(((before > 0) & (before <= turn) & (lengths > turn)).any()) for turn in turns if turn < past + t)
    turned = _angles(decoder, op, own, keys.whole, None if crosses else there.sum(1), counts)
    words = _given(decoder, new.pack(embeds)) if ids is None else _words(decoder, op, new.pack(ids))
    return Batch(words, turned, new, None if cache is None else keys, states, as_dict), ours


def _placed(places: Any, past: int, new: int) -> bool:
    """Whether cache_position says where the new tokens are. Phi-3 in transformers 4 drops its cache at the turning point of its
    angles, gives all tokens anew, and the last one's place alone."""
    if not isinstance(places, Tensor) or places.dim() != 1 or not 0 < len(places) <= new:
        return False
    given = len(places) if past == 0 else new
    return len(places) == given and int(places[0]) == past + new - given and int(places[-1]) == past + new - 1


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
    turned = {
        turn: rope.angles(cu, own, dict(said)["features"] // 2, rope.written(said), limit, op)
        for turn, said in _said(decoder).items()
    }
    words = _given(decoder, new.pack(embeds)) if ids is None else _words(decoder, op, new.pack(ids))
    return Batch(words, turned, new, None, states, as_dict)


def _words(decoder: Any, op: str, ids: Tensor, known: bool = False) -> Tensor:
    words = lookup(op, "input_ids", ids, decoder.embed_tokens, known)
    scale = getattr(decoder.embed_tokens, "embed_scale", None)
    return _given(decoder, words) if scale is None else _scaled(words, scale)


def _given(decoder: Any, words: Tensor) -> Tensor:
    """Embeddings as the first layer takes them. In transformers 4 the forward of Gemma and Gemma 2 scales them, whosever they
    are; where the class of embeddings does it, what comes out of another one is not scaled."""
    scales = f"{type_of(decoder).prefix}TextScaledWordEmbedding"
    if not type_of(decoder).scaled or hasattr(sys.modules[name_of(decoder).rpartition(".")[0]], scales):
        return words
    return _scaled(words, words.new_full((), decoder.config.hidden_size**0.5))


def _scaled(words: Tensor, scale: Tensor) -> Tensor:
    scale = scale.to(words.dtype)
    return (words.float() * scale.float()).to(words.dtype)  # a product of halves is exact in float32: stock's bits


def _said(decoder: Any) -> dict[str, rope.Parameters]:
    return {turn: angles_of(decoder, turn) for turn in type_of(decoder).turns(decoder.config)}


def _angles(
    decoder: Any, op: str, positions: Tensor, keys: Sequences, lengths: Tensor | None, counts: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """cos and sin of the new tokens; lengths: of whole sequences, None where cached keys would need other angles; counts: of
    the new tokens of each, if those are not all."""
    limit = max_tokens(decoder)
    return {turn: rope.turned(said, limit, op, positions, keys, lengths, counts) for turn, said in _said(decoder).items()}


def _places(m: Any, new: Sequences, keep: Any) -> Any:
    """Index of the places whose logits are asked for, as stock's logits_to_keep says."""
    op = f"{class_of(m)}.forward"
    if isinstance(keep, Tensor):
        if keep.dim() == 1 and not keep.dtype.is_floating_point and keep.dtype != torch.bool:
            t = new.padded[1]  # type: ignore[index]
            if not traced() and keep.numel() and not (-t <= int(keep.min()) and int(keep.max()) < t):
                check.fail(op, "logits_to_keep", f"places in [{-t}, {t - 1}]", keep.tolist()[:8])
            return keep
    elif isinstance(keep, int | np.integer) and not isinstance(keep, bool) and keep >= 0:
        return slice(-int(keep), None) if keep else slice(None)  # more than there are: all of them
    check.fail(op, "logits_to_keep", "a number >= 0, or a 1-D tensor of places", keep)


def _output(m: Any, batch: Batch, cls: Any, **fields: Any) -> Any:
    states = None if batch.states is None else tuple(batch.new.unpack(x) for x in batch.states)
    name = "cache" if "cache" in packing._signature(m.__class__).parameters else "past_key_values"
    out = cls(hidden_states=states, **{name: batch.keys.cache if batch.keys else None}, **fields)
    return out if batch.as_dict else out.to_tuple()


# ---- layers -----------------------------------------------------------------------------------------------------------------


def _norm(kind: ModelType, m: Any, x: Tensor) -> Tensor:
    return rms_norm(x, m.weight, getattr(m, kind.eps), offset=kind.offset, cast=kind.cast)


def _decode(decoder: Any, batch: Batch) -> Tensor:
    """[total, D] through all layers and the last norm; collects what stock's hidden_states are."""
    kind, x = type_of(decoder), batch.words
    for i, layer in zip(range(decoder.config.num_hidden_layers), decoder.layers, strict=False):
        if batch.states is not None:
            batch.states.append(x)
        at = sparse.seat(decoder, i)
        if kind.branch_norms:
            x = _plus(kind, layer.post_attention_layernorm, _attend(kind, decoder.config, i, layer, x, batch, None), x)
            y = _feed_forward(layer.mlp, _norm(kind, layer.pre_feedforward_layernorm, x), None, at)
            x = _plus(kind, layer.post_feedforward_layernorm, y, x)
        else:
            x = _attend(kind, decoder.config, i, layer, x, batch, x)
            x = _feed_forward(layer.mlp, _norm(kind, layer.post_attention_layernorm, x), x, at)
    x = _norm(kind, decoder.norm, x)
    if batch.states is not None:
        batch.states.append(x)
    return x


def _plus(kind: ModelType, norm: Any, branch: Tensor, x: Tensor) -> Tensor:
    """x + norm(branch), rounded once: the branch is float32."""
    return (x.float() + _norm(kind, norm, branch)).to(x.dtype)


def _attend(kind: ModelType, config: Any, i: int, layer: Any, x: Tensor, batch: Batch, residual: Tensor | None) -> Tensor:
    """residual + attention(norm(x)); without a residual it is float32."""
    own, normed = layer.self_attn, _norm(kind, layer.input_layernorm, x)
    q, k, v = _projected(kind, own, normed)
    if kind.head_norms:
        q, k = _norm(kind, own.q_norm, q), _norm(kind, own.k_norm, k)
    cos, sin = batch.angles[kind.turn(config, i)]
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    k, v, keys = (k, v, None) if batch.keys is None else batch.keys.stored(i, k, v)
    window = kind.window(config, i)
    a = attention(
        q, k, v, cu_seqlens=batch.new, cu_seqlens_k=keys, causal=True,
        window=None if window is None else (window - 1, -1), scale=own.scaling,
        softcap=own.attn_logit_softcapping if kind.attention_cap else None,
    )  # fmt: skip
    return dense(own.o_proj, a.flatten(1), residual=residual, out_dtype=torch.float32 if residual is None else None)


def _projected(kind: ModelType, own: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [total, heads, D]; of one matrix they are slices of its product."""
    if kind.fused:
        heads, of_keys = own.config.num_attention_heads, own.num_key_value_heads
        return dense(own.qkv_proj, x).unflatten(-1, (-1, own.head_dim)).split((heads, of_keys, of_keys), 1)
    return tuple(dense(p, x).unflatten(-1, (-1, own.head_dim)) for p in (own.q_proj, own.k_proj, own.v_proj))


# A CPU takes so many tokens through the feed-forward layer at a time, for the same reason as in bert.py.
TOKENS_AT_ONCE = 1024


def _feed_forward(m: Any, x: Tensor, residual: Tensor | None, at: sparse.Seat = sparse.NOWHERE) -> Tensor:
    """residual + down(act(gate(x)) · up(x)), float32 without a residual; of relu and its kin only what active neurons touch."""
    if (firing := sparse.firing_of(m)) is not None:
        return sparse.feed_forward(m, x, residual, firing, at)
    fused = "gate_up_proj" in m._modules
    act = activation_of(m.activation_fn if fused else m.act_fn)

    def piece(x: Tensor, r: Tensor | None) -> Tensor:
        gate, up = dense(m.gate_up_proj, x).chunk(2, -1) if fused else (dense(m.gate_proj, x), dense(m.up_proj, x))
        y = activation(gate, act, up=up)
        return dense(m.down_proj, y, residual=r, out_dtype=torch.float32 if r is None else None)

    if x.device.type != "cpu" or traced() or x.shape[0] <= TOKENS_AT_ONCE:
        return piece(x, residual)
    rest = itertools.repeat(None) if residual is None else residual.split(TOKENS_AT_ONCE)
    return torch.cat([piece(part, r) for part, r in zip(x.split(TOKENS_AT_ONCE), rest, strict=False)])


# ---- the registry's rows ----------------------------------------------------------------------------------------------------


def problem(m: Any) -> str | None:
    """Why a decoder's angles cannot be served; None if they can."""
    return next((why for turn in type_of(m).turns(m.config) if (why := rope.problem(m.config, turn)) is not None), None)


def roles_of(m: Any) -> Roles:
    """What is read of a decoder, and of what is around it."""
    return _roles(*name_of(m).rsplit(".", 1))


@functools.cache
def _roles(module: str, name: str) -> Roles:
    a = MODEL_TYPES[module]
    inside = decoder_roles.decoder(module, a, problem)
    head = decoder_roles.HEADS.get(name.removeprefix(a.prefix).removeprefix(a.text))
    return inside if head is None else decoder_roles.around(module, name, inside, head)


def served() -> dict[str, Served]:
    """Exact class -> how it is served."""
    found: dict[str, Served] = {}
    inside: dict[str, Any] = dict(
        typed=False, turning_points=turning_points, tokens=tokens_of, states=states_of, entered=entered, why=no_graph
    )
    for module, a in MODEL_TYPES.items():
        found |= {
            f"{module}.{a.model}": Served(decoder_forward, roles_of, packed_forward, max_tokens, **inside),
            f"{module}.{a.causal}": Served(
                causal_forward,
                roles_of,
                packed_forward,
                max_tokens,
                lambda m: m.lm_head,
                cap=word_cap,
                **inside,
            ),
            f"{module}.{a.classifier}": Served(classifier_forward, roles_of, packed_forward, max_tokens, head=_head, **inside),
        }
    return found


def parts() -> frozenset[str]:
    """Classes of modules inside, which a decoder's forward reads and never calls; nothing by themselves."""
    return frozenset({sparse.THRESHOLD}) | frozenset(
        name
        for module, a in MODEL_TYPES.items()
        for role in _roles(module, a.model).values()
        for name in role.classes
        if name.startswith(f"{module}.{a.prefix}") and name not in served()
    )
