"""ModernBERT, packed: with or without ForSequenceClassification.

Layers are pre-norm, turn queries and keys by angles, and see all tokens or a window, layer by layer. What differs from stock
transformers: residuals are added in float32 inside the product before them, angles are those of ops/rotary.py, positions count
valid tokens unless they are given, hidden states at padding are 0, the head is float32 and reads the first valid token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rerank_kernels.graphs.buckets import Inputs, Tokens
from rerank_kernels.models import lora, modernbert_roles, packing, rope
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.models.heads import NormedHead
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.modernbert_roles import CLASSIFIER, MODEL, MODULE, said_of, window_of
from rerank_kernels.models.packing import Table, dense, explained, in_table, looked_at, lookup, norm, pack, positions_of, ready
from rerank_kernels.models.replay import possible
from rerank_kernels.models.roles import Roles
from rerank_kernels.models.served import Served
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import activation
from rerank_kernels.ops.opaque import traced
from rerank_kernels.ops.rotary import rotary
from rerank_kernels.ops.sequences import Sequences

Tables = dict[rope.Parameters, tuple[Tensor, Tensor]]  # cos and sin, float32 [total, P]


class Turned(NamedTuple):
    """What a layer knows of its tokens' places."""

    angles: tuple[Tensor, Tensor]
    window: tuple[int, int] | None


# ---- forwards ---------------------------------------------------------------------------------------------------------------


def encoder_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """ModernBertModel, stock arguments: BaseModelOutput."""
    from transformers.modeling_outputs import BaseModelOutput

    ready(m, roles_of)
    with explained(m, roles_of):
        table, fields = _table(m), None
        replay = possible(m, table.words.weight.device)
        batch = pack(m, table, args, kwargs, replay)
        if replay is not None and batch.tokens is not None:
            outputs = lambda given: (states_of(m, given),)  # noqa: E731
            fields = replay.run("states", batch.tokens, outputs, functools.partial(packing.unpacked, batch.sequences))
        if fields is None:
            batch = batch.sent(table)
            fields = [batch.sequences.unpack(_encoded(m, batch))]
    return batch.output(BaseModelOutput, last_hidden_state=fields[0])


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """ModernBertForSequenceClassification, stock arguments: SequenceClassifierOutput with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    ready(m, roles_of)
    with explained(m, roles_of):
        encoder = entered(m)
        table, logits = _table(encoder), None
        replay = possible(m, table.words.weight.device)
        batch = pack(m, table, args, kwargs, replay)
        if replay is not None and batch.tokens is not None:
            count = batch.sequences.count
            outputs = lambda given: (_head(m)(states_of(m, given), given.sequences).logit,)  # noqa: E731
            logits = replay.run("logits", batch.tokens, outputs, lambda _, out: out[0][:count].clone())
        if logits is None:
            batch = batch.sent(table)
            logits = _head(m)(_encoded(encoder, batch), batch.sequences).logit
    return batch.output(SequenceClassifierOutput, logits=logits)


def packed_forward(m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None) -> Tensor:
    """[total, D] of encoder or classifier m: ids [total], no padding."""
    encoder = entered(m)
    op, table = class_of(encoder), _table(encoder)
    if types is not None:
        packing.refuse_types(op, "token_types", table)
    turned = _turned(encoder, op, positions_of(table, sequences), sequences)
    return _encode(encoder, lookup(op, "ids", ids, table.words), turned, sequences, None)


def tokens_of(m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None) -> Tokens:
    """What packed_forward takes, on the host, and looked at, for a graph."""
    table = _table(m.base_model)
    op = class_of(table.encoder)
    if types is not None:
        packing.refuse_types(op, "token_types", table)
    in_table(op, "ids", ids, table.words)
    return looked_at(op, table, ids, None, positions_of(table, sequences), sequences)


def states_of(m: Any, given: Inputs) -> Tensor:
    """[T, D] of encoder or classifier m, inside a graph."""
    encoder = m.base_model
    tables: Tables = {}
    for said in dict.fromkeys(_said(encoder)):
        whole = rope.tables(said, given.ids.shape[0], given.ids.device)
        given.held.extend(whole)
        cos, sin = (t.index_select(0, given.positions) for t in whole)
        tables[said] = cos, sin
    words = lookup("", "", given.ids, _table(encoder).words, known=True)
    return _encode(encoder, words, _by_layer(encoder, tables), given.sequences, None)


def entered(m: Any) -> Any:
    """The encoder in m. That of a classifier does not pass its own forward, but a count of zero must mean it never ran."""
    if not _is_classifier(m):
        return m
    forward = forward_of(m.base_model)
    if forward is not None and not traced():
        forward.calls += 1
    return m.base_model


def max_tokens(m: Any) -> int:
    return int(m.config.max_position_embeddings)


def no_graph(m: Any) -> str | None:
    """What of a model no graph can hold; None if one can hold it."""
    turns = any(rope.turning_point(said) < max_tokens(m) for said in _said(m.base_model))
    return "angles that depend on a sequence's length" if turns else None


# ---- what a forward reads ---------------------------------------------------------------------------------------------------


def _is_classifier(m: Any) -> bool:
    return name_of(m) == CLASSIFIER


def _head(m: Any) -> NormedHead:
    own = lora.held(m.head)
    return NormedHead(own.dense, own.norm, lora.held(m.classifier), activation_of(own.act), m.config.classifier_pooling)


def _table(encoder: Any) -> Table:
    return Table(encoder, encoder.embeddings.tok_embeddings, 0, max_tokens(encoder), typed=False, placed=False)


def _said(encoder: Any) -> list[rope.Parameters]:
    """Of each layer."""
    return [said_of(encoder, layer) for layer in encoder.layers]


def _by_layer(encoder: Any, tables: Tables) -> list[Turned]:
    return [Turned(tables[said_of(encoder, layer)], window_of(layer)) for layer in encoder.layers]


def _turned(encoder: Any, op: str, positions: Tensor, sequences: Sequences) -> list[Turned]:
    """Of each layer; layers whose angles are the same share them."""
    if positions.is_floating_point():
        raise TypeError(f"{op}: position_ids must be int64 or int32, got {positions.dtype}")
    limit, cu = max_tokens(encoder), sequences.cu_seqlens
    tables: Tables = {}
    for said in dict.fromkeys(_said(encoder)):
        if traced():
            tables[said] = rope.angles(cu, positions, dict(said)["features"] // 2, rope.written(said), limit, op)
        else:
            tables[said] = rope.turned(said, limit, op, positions.long(), sequences, (cu[1:] - cu[:-1]).long())
    return _by_layer(encoder, tables)


def _encoded(encoder: Any, batch: packing.Batch) -> Tensor:
    turned = _turned(encoder, class_of(encoder), batch.positions, batch.sequences)
    return _encode(encoder, batch.words, turned, batch.sequences, batch.states)


# ---- layers -----------------------------------------------------------------------------------------------------------------


def _encode(encoder: Any, words: Tensor, turned: Sequence[Turned], sequences: Sequences, states: list[Tensor] | None) -> Tensor:
    """[total, D] through the embedding, all layers and the last norm; collects what stock's hidden_states are."""
    x = norm(encoder.embeddings.norm, words)
    for layer, of_layer in zip(encoder.layers, turned, strict=True):
        if states is not None:
            states.append(x)
        x = _layer(layer, x, of_layer, sequences)
    last = norm(encoder.final_norm, x)
    if states is not None:
        # of transformers 4 and 5.0, whose forwards take a mask of the window, the last one is what the last norm reads
        before = "sliding_window_mask" in packing._signature(encoder.__class__).parameters
        states.append(x if before else last)
    return last


# A CPU takes so many tokens through the feed-forward layer at a time, for the same reason as in bert.py.
TOKENS_AT_ONCE = 1024


def _layer(layer: Any, x: Tensor, turned: Turned, sequences: Sequences) -> Tensor:
    """Pre-norm: the residual is added inside a product, where the sum stays float32."""
    own, mlp = layer.attn, layer.mlp
    first = name_of(layer.attn_norm) == modernbert_roles.IDENTITY  # of the first layer, whose input is normed already
    qkv = dense(own.Wqkv, x if first else norm(layer.attn_norm, x)).unflatten(-1, (3, -1, own.head_dim))
    q, k = rotary(qkv[:, :2].flatten(1, 2), *turned.angles).chunk(2, 1)
    a = attention(q, k, qkv[:, 2], cu_seqlens=sequences, window=turned.window)
    x = dense(own.Wo, a.flatten(1), residual=x)
    act = activation_of(mlp.act)

    def fed(part: Tensor) -> Tensor:
        one, other = dense(mlp.Wi, norm(layer.mlp_norm, part)).chunk(2, -1)
        return dense(mlp.Wo, activation(one, act, up=other), residual=part)

    many = x.device.type == "cpu" and not traced() and x.shape[0] > TOKENS_AT_ONCE
    return torch.cat([fed(part) for part in x.split(TOKENS_AT_ONCE)]) if many else fed(x)


# ---- the registry's rows ----------------------------------------------------------------------------------------------------


def roles_of(m: Any) -> Roles:
    """What is read of encoder or classifier m."""
    return modernbert_roles.classifier() if _is_classifier(m) else modernbert_roles.encoder()


def served() -> dict[str, Served]:
    """Exact class -> how it is served."""
    inside: dict[str, Any] = dict(typed=False, tokens=tokens_of, states=states_of, entered=entered, why=no_graph)
    return {
        MODEL: Served(encoder_forward, roles_of, packed_forward, max_tokens, **inside),
        CLASSIFIER: Served(classifier_forward, roles_of, packed_forward, max_tokens, head=_head, **inside),
    }


def parts() -> frozenset[str]:
    """Classes of modules inside, which an encoder's forward reads and never calls; nothing by themselves."""
    names = {name for role in modernbert_roles.classifier().values() for name in role.classes}
    return frozenset(name for name in names if name.startswith(MODULE) and name not in served())
