"""Encoders built like BERT, packed: BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, with or without ForSequenceClassification.

A model type whose modules carry BERT's names is one row in MODEL_TYPES. What differs from stock transformers: embeddings
and residuals are summed in float32, positions count valid tokens, hidden states at padding are 0, logits are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.models import lora
from rerank_kernels.models.bound import class_of, forward_of, name_of
from rerank_kernels.models.heads import ClassificationHead
from rerank_kernels.models.leaves import ACTIVATIONS, activation_of, activation_problem
from rerank_kernels.models.packing import Table, dense, lookup, norm, pack, positions_of, ready
from rerank_kernels.models.served import Served
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.opaque import traced
from rerank_kernels.ops.pooling import pool
from rerank_kernels.ops.sequences import Sequences


@dataclass(frozen=True)
class ModelType:
    """Classes of transformers whose modules carry BERT's names, only behind another prefix."""

    prefix: str
    first_position: Callable[[Any], int]  # the encoder -> position id of a sequence's first token
    head: Callable[[Any], ClassificationHead]  # of a classifier
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"  # of an encoder, in transformers.modeling_outputs


def _bert_head(m: Any) -> ClassificationHead:
    return ClassificationHead(m.bert.pooler.dense, lora.held(m.classifier))


def _own_head(m: Any) -> ClassificationHead:
    """A module of its own: tanh in RoBERTa's, which calls the function itself, and in ELECTRA's what it holds."""
    own = lora.held(m.classifier)
    held = getattr(own, "activation", None)
    return ClassificationHead(own.dense, own.out_proj, "tanh" if held is None else activation_of(held))


def _roberta(prefix: str) -> ModelType:
    return ModelType(prefix, lambda encoder: int(encoder.embeddings.padding_idx) + 1, _own_head)


MODEL_TYPES = {
    "transformers.models.bert.modeling_bert": ModelType("Bert", lambda _: 0, _bert_head),
    "transformers.models.roberta.modeling_roberta": _roberta("Roberta"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": _roberta("XLMRoberta"),
    "transformers.models.camembert.modeling_camembert": _roberta("Camembert"),
    "transformers.models.electra.modeling_electra": ModelType(
        "Electra", lambda _: 0, _own_head, "BaseModelOutputWithPastAndCrossAttentions"
    ),
}


def _model_type(m: object) -> ModelType:
    return MODEL_TYPES[type(m).__module__]


def encoder_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertModel and its like, stock arguments: its stock output."""
    from transformers import modeling_outputs

    ready(m)
    batch = pack(m, _table(m), args, kwargs)
    x = _encode(m, batch.words, batch.types, batch.positions, batch.sequences, batch.states)
    fields = {"last_hidden_state": batch.sequences.unpack(x)}
    if getattr(m, "pooler", None) is not None:  # ELECTRA has none, nor a place for its output
        fields["pooler_output"] = dense(m.pooler.dense, pool(x, "cls", cu_seqlens=batch.sequences), "tanh")
    return batch.output(getattr(modeling_outputs, _model_type(m).output), **fields)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertForSequenceClassification and its like, stock arguments: SequenceClassifierOutput with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    ready(m)
    encoder = _enter_encoder(m)
    batch = pack(m, _table(encoder), args, kwargs)
    x = _encode(encoder, batch.words, batch.types, batch.positions, batch.sequences, batch.states)
    return batch.output(SequenceClassifierOutput, logits=_head(m)(x, batch.sequences).logit)


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


def problem(m: Any) -> str | None:
    """Why an encoder or classifier, by its config or activation, cannot be served; None if it can."""
    if m.config.is_decoder or getattr(m.config, "add_cross_attention", False):
        return "config.is_decoder or config.add_cross_attention is set"
    if (kind := getattr(m.config, "position_embedding_type", "absolute")) != "absolute":
        return f"config.position_embedding_type is {kind!r}, and only 'absolute' is served"  # transformers 4 has others
    return None


def _activation_problem(m: Any) -> str | None:
    act = m.intermediate_act_fn if hasattr(m, "intermediate_act_fn") else m.activation
    if name_of(act) not in ACTIVATIONS:
        return f"activation {getattr(act, '__name__', class_of(act))} is unknown"
    return activation_problem(act)


def _is_classifier(m: Any) -> bool:
    return type(m).__qualname__.endswith("ForSequenceClassification")


def _head(m: Any) -> ClassificationHead:
    return _model_type(m).head(m)


def _table(encoder: Any) -> Table:
    e, first = encoder.embeddings, _model_type(encoder).first_position(encoder)
    return Table(encoder, e.word_embeddings, first, int(e.position_embeddings.num_embeddings) - first)


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
    if hasattr(encoder, "embeddings_project"):  # ELECTRA's, where words are narrower than the layers
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


# Read by an encoder's forward, which takes their weights and never calls them; nothing by themselves.
_PARTS = "Embeddings Encoder Layer Attention SelfAttention SelfOutput Output Pooler ClassificationHead"
_PARTS += " SdpaSelfAttention"  # transformers 4 has a class for each way of stock attention; the weights are the same


def served() -> dict[str, Served]:
    """Exact class -> how it is served."""
    found: dict[str, Served] = {}
    for module, a in MODEL_TYPES.items():
        encoder = Served(encoder_forward, problem, packed_forward, max_tokens)
        classifier = Served(classifier_forward, problem, packed_forward, max_tokens, head=_head)
        found |= {f"{module}.{a.prefix}Model": encoder, f"{module}.{a.prefix}ForSequenceClassification": classifier}
    return found


def parts() -> dict[str, Callable[[Any], str | None] | None]:
    """Exact class of a module inside -> what could stand in its way."""
    found: dict[str, Callable[[Any], str | None] | None] = {}
    for module, a in MODEL_TYPES.items():
        found |= dict.fromkeys(f"{module}.{a.prefix}{part}" for part in _PARTS.split())
        found[f"{module}.{a.prefix}Intermediate"] = _activation_problem
    found["transformers.models.electra.modeling_electra.ElectraClassificationHead"] = _activation_problem
    return found
