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
from rerank_kernels.models import bert_roles, lora
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.models.heads import ClassificationHead
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.packing import Table, dense, explained, lookup, norm, pack, positions_of, ready
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
        batch = pack(m, _table(m), args, kwargs)
        x = _encode(m, batch.words, batch.types, batch.positions, batch.sequences, batch.states)
        fields = {"last_hidden_state": batch.sequences.unpack(x)}
        if getattr(m, "pooler", None) is not None:  # ELECTRA has none, nor a place for its output
            first = pool(x, "cls", cu_seqlens=batch.sequences)
            fields["pooler_output"] = dense(m.pooler.dense, first, activation_of(m.pooler.activation))
    return batch.output(getattr(modeling_outputs, _model_type(m).output), **fields)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertForSequenceClassification and its like, stock arguments: SequenceClassifierOutput with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    ready(m, roles_of)
    with explained(m, roles_of):
        encoder = _enter_encoder(m)
        batch = pack(m, _table(encoder), args, kwargs)
        x = _encode(encoder, batch.words, batch.types, batch.positions, batch.sequences, batch.states)
        logits = _head(m)(x, batch.sequences).logit
    return batch.output(SequenceClassifierOutput, logits=logits)


def packed_forward(m: Any, ids: Tensor, sequences: Sequences, types: Tensor | None) -> Tensor:
    """[total, D] of encoder or classifier m: ids and types [total], no padding."""
    encoder = _enter_encoder(m) if _is_classifier(m) else m
    op = class_of(encoder)
    if types is not None:
        check.shape(op, "token_types", types, ids.shape[0])
    table = _table(encoder)
    return _encode(encoder, lookup(op, "ids", ids, table.words), types, positions_of(table, sequences), sequences, None)


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
) -> Tensor:
    """[total, D] through the embedding and all layers; appends the embedding's and each layer's output to `states`."""
    op, e = class_of(encoder), encoder.embeddings
    types = torch.zeros_like(positions) if types is None else types
    # In transformers' order; three terms and the norm stay in float32, so the body's dtype is rounded to once, here.
    total = words.float() + lookup(op, "token_type_ids", types, e.token_type_embeddings).float()
    total = total + lookup(op, "position_ids", positions, e.position_embeddings).float()
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
        encoder = Served(encoder_forward, roles_of, packed_forward, max_tokens)
        classifier = Served(classifier_forward, roles_of, packed_forward, max_tokens, head=_head)
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
