"""Encoders built like BERT, packed: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, with or without ForSequenceClassification.

A model type whose modules carry BERT's names is one row in MODEL_TYPES. What differs from stock transformers: embeddings
and residuals are summed in float32, positions count valid tokens, hidden states at padding are 0, logits are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.graphs.buckets import Inputs, Tokens
from rerank_kernels.models import bert_roles, lora
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.models.heads import ClassificationHead
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.packing import (
    Table,
    dense,
    explained,
    in_table,
    looked_at,
    lookup,
    norm,
    pack,
    positions_of,
    ready,
    unpacked,
)  # fmt: skip
from rerank_kernels.models.replay import possible
from rerank_kernels.models.roles import Assumed, Roles
from rerank_kernels.models.served import Served
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.opaque import traced
from rerank_kernels.ops.pooling import pool
from rerank_kernels.ops.sequences import Sequences


@dataclass(frozen=True)
class ModelType:
    """Classes of transformers whose modules carry BERT's names, only behind another prefix."""

    prefix: str
    base: str  # what the classifier calls its encoder
    first_position: Callable[[Any], int]  # the encoder -> position id of a sequence's first token
    head: Callable[[Any], ClassificationHead]  # of a classifier
    head_roles: Callable[[str, str], Roles]  # module and prefix of the classes -> what is read of the head
    embeddings: tuple[Assumed, ...]  # what this type alone assumes of its embeddings
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"  # of an encoder, in transformers.modeling_outputs


def _bert_head(m: Any) -> ClassificationHead:
    pooler = m.bert.pooler
    return ClassificationHead(pooler.dense, lora.held(m.classifier), activation_of(pooler.activation))


def _own_head(m: Any) -> ClassificationHead:
    """A module of its own: tanh in RoBERTa's, which calls the function itself, and in ELECTRA's what it holds."""
    own = lora.held(m.classifier)
    held = getattr(own, "activation", None) if _model_type(m).base == "electra" else None
    return ClassificationHead(own.dense, own.out_proj, "tanh" if held is None else activation_of(held))


def _roberta(prefix: str) -> ModelType:
    first = lambda encoder: int(encoder.embeddings.padding_idx) + 1  # noqa: E731
    return ModelType(prefix, "roberta", first, _own_head, bert_roles.dense_head, (bert_roles.PADDED,))


MODEL_TYPES = {
    "transformers.models.bert.modeling_bert": ModelType(
        "Bert", "bert", lambda _: 0, _bert_head, bert_roles.pooler_head, (bert_roles.COUNTED,)
    ),
    "transformers.models.roberta.modeling_roberta": _roberta("Roberta"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": _roberta("XLMRoberta"),
    "transformers.models.camembert.modeling_camembert": _roberta("Camembert"),
    "transformers.models.electra.modeling_electra": ModelType(
        "Electra",
        "electra",
        lambda _: 0,
        _own_head,
        bert_roles.electra_head,
        (bert_roles.COUNTED,),
        "BaseModelOutputWithPastAndCrossAttentions",
    ),
}


def _model_type(m: object) -> ModelType:
    return MODEL_TYPES[name_of(m).rpartition(".")[0]]


def roles_of(m: Any) -> Roles:
    """What is read of an encoder or classifier."""
    return _roles(*name_of(m).rsplit(".", 1))


@functools.cache
def _roles(module: str, name: str) -> Roles:
    a = MODEL_TYPES[module]
    inside = bert_roles.encoder(module, a.prefix, a.embeddings)
    if not name.endswith("ForSequenceClassification"):
        return inside
    return bert_roles.classifier(module, a.prefix, a.base, inside, a.head_roles(module, a.prefix))


def encoder_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertModel and its like, stock arguments: its stock output."""
    from transformers import modeling_outputs

    ready(m, roles_of)
    with explained(m, roles_of):
        table = _table(m)
        replay = possible(m, table.words.weight.device)
        batch = pack(m, table, args, kwargs, replay)
        fields = None
        if replay is not None and batch.tokens is not None:
            fields = replay.run(
                "states", batch.tokens, functools.partial(_outputs, m), functools.partial(unpacked, batch.sequences)
            )
        if fields is None:
            batch = batch.sent(table)
            x = _encode(m, batch.words, batch.types, batch.positions, batch.sequences, batch.states, batch.tokens is not None)
            fields = [batch.sequences.unpack(x), *_pooled(m, x, batch.sequences)]
    # ELECTRA has no pooler, nor a place for its output
    named = dict(zip(("last_hidden_state", "pooler_output"), fields, strict=False))
    return batch.output(getattr(modeling_outputs, _model_type(m).output), **named)


def _pooled(m: Any, x: Tensor, sequences: Sequences) -> tuple[Tensor, ...]:
    if getattr(m, "pooler", None) is None:
        return ()
    return (dense(m.pooler.dense, pool(x, "cls", cu_seqlens=sequences), activation_of(m.pooler.activation)),)


def _outputs(m: Any, given: Inputs) -> tuple[Tensor, ...]:
    x = states_of(m, given)
    return x, *_pooled(m, x, given.sequences)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertForSequenceClassification and its like, stock arguments: SequenceClassifierOutput with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    ready(m, roles_of)
    with explained(m, roles_of):
        encoder = _enter_encoder(m)
        table, logits = _table(encoder), None
        replay = possible(m, table.words.weight.device)
        batch = pack(m, table, args, kwargs, replay)
        if replay is not None and batch.tokens is not None:
            count = batch.sequences.count
            logits = replay.run("logits", batch.tokens, functools.partial(_logits, m), lambda _, out: out[0][:count].clone())
        if logits is None:
            batch = batch.sent(table)
            words, types, positions, sequences, states = batch[:5]
            x = _encode(encoder, words, types, positions, sequences, states, batch.tokens is not None)
            logits = _head(m)(x, sequences).logit
    return batch.output(SequenceClassifierOutput, logits=logits)


def _logits(m: Any, given: Inputs) -> tuple[Tensor, ...]:
    return (_head(m)(states_of(m, given), given.sequences).logit,)


def packed_forward(m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None) -> Tensor:
    """[total, D] of encoder or classifier m: ids and types [total], no padding."""
    encoder = entered(m)
    op = class_of(encoder)
    if types is not None:
        check.shape(op, "token_types", types, ids.shape[0])
    table = _table(encoder)
    return _encode(encoder, lookup(op, "ids", ids, table.words), types, positions_of(table, sequences), sequences, None)


def tokens_of(m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None) -> Tokens:
    """What packed_forward takes, on the host, and looked at, for a graph."""
    table = _table(m.base_model)
    op = class_of(table.encoder)
    if types is not None:
        check.shape(op, "token_types", types, ids.shape[0])
    in_table(op, "ids", ids, table.words)
    return looked_at(op, table, ids, types, positions_of(table, sequences), sequences)


def states_of(m: Any, given: Inputs) -> Tensor:
    """[T, D] of encoder or classifier m, inside a graph."""
    encoder = m.base_model
    words = lookup("", "", given.ids, _table(encoder).words, known=True)
    return _encode(encoder, words, given.types, given.positions, given.sequences, None, True)


def entered(m: Any) -> Any:
    """The encoder in m, whose packed entry runs."""
    return _enter_encoder(m) if _is_classifier(m) else m


def max_tokens(m: Any) -> int:
    """The longest sequence the position table of encoder or classifier m holds."""
    return _table(m.base_model).limit


def _is_classifier(m: Any) -> bool:
    return name_of(m).endswith("ForSequenceClassification")


def _head(m: Any) -> ClassificationHead:
    return _model_type(m).head(m)


def _table(encoder: Any) -> Table:
    e, first = encoder.embeddings, _model_type(encoder).first_position(encoder)
    return Table(encoder, e.word_embeddings, first, e.position_embeddings.weight.shape[0] - first)


def _enter_encoder(m: Any) -> Any:
    """The encoder of a classifier. It does not pass its own forward, but a count of zero must mean it never ran."""
    forward = forward_of(m.base_model)
    if forward is not None and not traced():
        forward.calls += 1
    return m.base_model


def _encode(
    encoder: Any,
    words: Tensor,
    types: Tensor | None,
    positions: Tensor,
    sequences: Sequences,
    states: list[Tensor] | None,
    known: bool = False,
) -> Tensor:
    """[total, D] through the embedding and all layers; appends the embedding's and each layer's output to `states`.

    known: types and positions were looked at, on the host.
    """
    op, e = class_of(encoder), encoder.embeddings
    types = torch.zeros_like(positions, dtype=torch.int64) if types is None else types  # whatever the positions are
    # In transformers' order; three terms and the norm stay in float32, so the body's dtype is rounded to once, here.
    total = words.float() + lookup(op, "token_type_ids", types, e.token_type_embeddings, known).float()
    total = total + lookup(op, "position_ids", positions, e.position_embeddings, known).float()
    x = norm(e.LayerNorm, total).to(e.word_embeddings.weight.dtype)
    own = _model_type(encoder).base == "electra"  # whose words may be narrower than its layers
    if own and hasattr(encoder, "embeddings_project"):
        x = dense(encoder.embeddings_project, x)
    if states is not None:
        states.append(x)
    for layer in encoder.encoder.layer:
        x = _layer(layer, x, sequences)
        if states is not None:
            states.append(x)
    return x


# A CPU takes so many tokens through the feed-forward layer at a time: what lies between its two products, four times as wide as
# the model, stays in the caches and does not grow with the batch. Each token is on its own there: no bit depends on this.
TOKENS_AT_ONCE = 1024


def _layer(layer: Any, x: Tensor, sequences: Sequences) -> Tensor:
    """Post-norm: the residual is added inside layer_norm, where the sum stays float32."""
    own, after, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    heads = (x.shape[0], own.num_attention_heads, own.attention_head_size)
    q, k, v = (dense(p, x).view(heads) for p in (own.query, own.key, own.value))
    a = attention(q, k, v, cu_seqlens=sequences).flatten(1)
    x = norm(after.LayerNorm, dense(after.dense, a), x)
    many = x.device.type == "cpu" and not traced() and x.shape[0] > TOKENS_AT_ONCE
    parts = x.split(TOKENS_AT_ONCE) if many else (x,)
    act = activation_of(up.intermediate_act_fn)
    done = [norm(down.LayerNorm, dense(down.dense, dense(up.dense, part, act)), part) for part in parts]
    return done[0] if len(done) == 1 else torch.cat(done)


def served() -> dict[str, Served]:
    """Exact class -> how it is served."""
    found: dict[str, Served] = {}
    for module, a in MODEL_TYPES.items():
        inside: dict[str, Any] = dict(tokens=tokens_of, states=states_of, entered=entered)
        encoder = Served(encoder_forward, roles_of, packed_forward, max_tokens, **inside)
        classifier = Served(classifier_forward, roles_of, packed_forward, max_tokens, head=_head, **inside)
        found |= {f"{module}.{a.prefix}Model": encoder, f"{module}.{a.prefix}ForSequenceClassification": classifier}
    return found


def parts() -> frozenset[str]:
    """Classes of modules inside, which an encoder's forward reads and never calls; nothing by themselves."""
    return frozenset(
        name
        for module, a in MODEL_TYPES.items()
        for role in _roles(module, f"{a.prefix}ForSequenceClassification").values()
        for name in role.classes
        if name.startswith(f"{module}.{a.prefix}") and name not in served()
    )
