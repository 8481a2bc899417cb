"""Model types like BERT: what transformers calls their modules, and what each does otherwise than BERT."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rerank_kernels.models import albert_roles, bert_roles, distilbert_roles, lora, prenorm_roles
from rerank_kernels.models.bound import name_of
from rerank_kernels.models.heads import ClassificationHead
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.roles import Roles


class Layer(NamedTuple):
    """The modules of a layer, whatever its model type calls them."""

    heads: int
    size: int  # of a head
    query: Any
    key: Any
    value: Any
    out: Any
    norm: Any  # of attention
    up: Any
    act: Any
    down: Any
    last: Any  # the norm of the feed-forward layer
    first: bool = False  # pre-norm: both norms stand before what they are of
    kept: bool = True  # what it gives is one of stock's hidden states


def _none(_: Any) -> None:
    return None


@dataclass(frozen=True)
class ModelType:
    """Classes of transformers that compute what BERT's do, with modules under names of their own."""

    prefix: str
    base: str  # what the classifier calls its encoder
    first_position: Callable[[Any], int]  # the encoder -> position id of a sequence's first token
    head: Callable[[Any], ClassificationHead]  # of a classifier
    roles: Callable[[str, str], Roles]  # module and prefix of the classes -> what is read of the encoder
    head_roles: Callable[[str, str], Roles]  # the same -> what is read of the head
    layers: Callable[[Any], list[Layer]]  # of an encoder, in the order in which they run
    project: Callable[[Any], Any]  # of an encoder: what makes words as wide as the layers; None where they are
    pooler: Callable[[Any], tuple[Any, Any] | None]  # of an encoder: the Linear and the activation of its pooler
    typed: bool = True  # tokens have types
    normed: bool = True  # embeddings have a norm
    final: Callable[[Any], Any] = _none  # of an encoder: the norm behind all layers; None where there is none
    raw: Callable[[Any], bool] = lambda _: False  # of an encoder: stock's last hidden state is what that norm reads
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"  # of an encoder, in transformers.modeling_outputs


def model_type(m: object) -> ModelType:
    return MODEL_TYPES[name_of(m).rpartition(".")[0]]


def _collects(layers: Any) -> bool:
    """Whether a list of layers collects hidden states itself, as in transformers 4. Since 5 what each layer gives is caught."""
    return "output_hidden_states" in inspect.signature(type(layers).forward).parameters


def _from_0(_: Any) -> int:
    return 0


# ---- with BERT's names ------------------------------------------------------------------------------------------------------


def _layers(encoder: Any) -> list[Layer]:
    return [_layer(layer) for layer in encoder.encoder.layer]


def _layer(layer: Any) -> Layer:
    own, after, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    return Layer(
        *(own.num_attention_heads, own.attention_head_size, own.query, own.key, own.value, after.dense, after.LayerNorm),
        *(up.dense, up.intermediate_act_fn, down.dense, down.LayerNorm),
    )


def _pooler(encoder: Any) -> tuple[Any, Any] | None:
    own = getattr(encoder, "pooler", None)
    return None if own is None else (own.dense, own.activation)


def _bert_head(m: Any) -> ClassificationHead:
    pooler = m.bert.pooler
    return ClassificationHead(pooler.dense, lora.held(m.classifier), activation_of(pooler.activation))


def _own_head(m: Any) -> ClassificationHead:
    """A module of its own: tanh in RoBERTa's, which calls the function itself, and in ELECTRA's what it holds."""
    own = lora.held(m.classifier)
    held = getattr(own, "activation", None) if model_type(m).base == "electra" else None
    return ClassificationHead(own.dense, own.out_proj, "tanh" if held is None else activation_of(held))


_counted = functools.partial(bert_roles.encoder, embeddings=(bert_roles.COUNTED,))
_padded = functools.partial(bert_roles.encoder, embeddings=(bert_roles.PADDED,))


def _roberta(prefix: str) -> ModelType:
    return ModelType(prefix, "roberta", _behind_pad, _own_head, _padded, bert_roles.dense_head, _layers, _none, _pooler)


def _behind_pad(encoder: Any) -> int:
    return int(encoder.embeddings.padding_idx) + 1


# ---- RoBERTa, pre-norm ------------------------------------------------------------------------------------------------------


def _xl_layers(encoder: Any) -> list[Layer]:
    return [_pre_norm(layer, layer.attention.self_attn_layer_norm, layer.LayerNorm) for layer in encoder.encoder.layer]


def _prelayernorm_layers(encoder: Any) -> list[Layer]:
    return [_pre_norm(layer, layer.attention.LayerNorm, layer.intermediate.LayerNorm) for layer in encoder.encoder.layer]


def _pre_norm(layer: Any, norm: Any, last: Any) -> Layer:
    own, up = layer.attention.self, layer.intermediate
    return Layer(
        *(own.num_attention_heads, own.attention_head_size, own.query, own.key, own.value, layer.attention.output.dense, norm),
        *(up.dense, up.intermediate_act_fn, layer.output.dense, last),
        first=True,
    )


# ---- DistilBERT -------------------------------------------------------------------------------------------------------------


def _distilbert_layers(encoder: Any) -> list[Layer]:
    return [_distilbert_layer(layer) for layer in encoder.transformer.layer]


def _distilbert_layer(layer: Any) -> Layer:
    own, ffn = layer.attention, layer.ffn
    return Layer(
        *(own.n_heads, own.attention_head_size, own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm),
        *(ffn.lin1, ffn.activation, ffn.lin2, layer.output_layer_norm),
    )


def _distilbert_head(m: Any) -> ClassificationHead:
    return ClassificationHead(lora.held(m.pre_classifier), lora.held(m.classifier), "relu")


# ---- ALBERT -----------------------------------------------------------------------------------------------------------------


def _albert_layers(encoder: Any) -> list[Layer]:
    """Each as often as it runs: a group of layers stands for several layers in a row."""
    own, config = encoder.encoder, encoder.encoder.config
    groups = [[_albert_layer(layer) for layer in group.albert_layers] for group in own.albert_layer_groups]
    if _collects(own):  # what groups give
        groups = [[*(one._replace(kept=False) for one in group[:-1]), group[-1]] for group in groups]
    places = (albert_roles.group_of(i, config) for i in range(config.num_hidden_layers))
    return [layer for place in places for layer in groups[place]]


def _albert_layer(layer: Any) -> Layer:
    own = layer.attention
    return Layer(
        *(own.num_attention_heads, own.attention_head_size, own.query, own.key, own.value, own.dense, own.LayerNorm),
        *(layer.ffn, layer.activation, layer.ffn_output, layer.full_layer_layer_norm),
    )


def _albert_pooler(encoder: Any) -> tuple[Any, Any] | None:
    return None if encoder.pooler is None else (encoder.pooler, encoder.pooler_activation)


def _albert_head(m: Any) -> ClassificationHead:
    own = m.albert
    return ClassificationHead(own.pooler, lora.held(m.classifier), activation_of(own.pooler_activation))


# ---- the rows ---------------------------------------------------------------------------------------------------------------

MODEL_TYPES = {
    "transformers.models.bert.modeling_bert": ModelType(
        "Bert", "bert", _from_0, _bert_head, _counted, bert_roles.pooler_head, _layers, _none, _pooler
    ),
    "transformers.models.roberta.modeling_roberta": _roberta("Roberta"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": _roberta("XLMRoberta"),
    "transformers.models.camembert.modeling_camembert": _roberta("Camembert"),
    "transformers.models.electra.modeling_electra": ModelType(
        *("Electra", "electra", _from_0, _own_head, _counted, bert_roles.electra_head, _layers),
        lambda encoder: getattr(encoder, "embeddings_project", None),
        _none,
        output="BaseModelOutputWithPastAndCrossAttentions",
    ),
    "transformers.models.xlm_roberta_xl.modeling_xlm_roberta_xl": ModelType(
        *("XLMRobertaXL", "roberta", _behind_pad, _own_head, prenorm_roles.xl, bert_roles.dense_head),
        *(_xl_layers, _none, _pooler),
        normed=False,
        final=lambda encoder: encoder.encoder.LayerNorm,
    ),
    "transformers.models.roberta_prelayernorm.modeling_roberta_prelayernorm": ModelType(
        *("RobertaPreLayerNorm", "roberta_prelayernorm", _behind_pad, _own_head, prenorm_roles.prelayernorm),
        *(bert_roles.dense_head, _prelayernorm_layers, _none, _pooler),
        final=lambda encoder: encoder.LayerNorm,
        raw=lambda encoder: _collects(encoder.encoder),
    ),
    "transformers.models.distilbert.modeling_distilbert": ModelType(
        *("DistilBert", "distilbert", _from_0, _distilbert_head, distilbert_roles.encoder, distilbert_roles.head),
        *(_distilbert_layers, _none, _none),
        typed=False,
        output="BaseModelOutput",
    ),
    "transformers.models.albert.modeling_albert": ModelType(
        *("Albert", "albert", _from_0, _albert_head, albert_roles.encoder, albert_roles.head, _albert_layers),
        lambda encoder: encoder.encoder.embedding_hidden_mapping_in,
        _albert_pooler,
        output="BaseModelOutputWithPooling",
    ),
}
