"""What the forward of bert.py reads of ALBERT's modules, role by role: the table that patch() holds a model to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rerank_kernels.models.bert_roles import ACT, COUNTED, EMBEDDINGS, MODEL, SELF
from rerank_kernels.models.leaf_roles import ACTIVATION, DROPOUT, LIST, embedding, layer_norm, linear
from rerank_kernels.models.roles import PEFT, Assumed, Role, Roles


def group_of(i: int, config: Any) -> int:
    """Which group of layers runs as number i; a quotient in float64, as in transformers, also where groups do not divide it."""
    return int(i / (config.num_hidden_layers / config.num_hidden_groups))


GROUPS = (
    Assumed("config.num_hidden_layers", "an integer from 1 on", lambda value, _: type(value) is int and value > 0, needed=True),
    Assumed(
        "config.num_hidden_groups",
        "the number of albert_layer_groups",
        lambda value, m: type(value) is int and value == len(m.albert_layer_groups),
        needed=True,
    ),
)
POOLER = Assumed(
    "pooler_activation", "there where a pooler is", lambda act, m: (act is None) == (m.pooler is None), needed=True
)  # fmt: skip
ONE = Assumed("albert_layers", "at least one layer", lambda layers, _: len(layers) > 0, needed=True)


def encoder(module: str, prefix: str) -> Roles:
    """Sizes: D, the model's; E, the words'; a, all heads together; f, the feed-forward layer."""

    def own(name: str, **rest: Any) -> Role:
        return Role(frozenset({f"{module}.{prefix}{name}"}), **rest)

    attention = replace(own("Attention", assumes=SELF), classes=frozenset({f"{module}.{prefix}{kind}" for kind in ATTENTIONS}))
    layer = {
        "": own("Layer", assumes=(ACT._replace(attribute="activation"),)),
        ".full_layer_layer_norm": layer_norm("D"),
        ".attention": attention,
        ".attention.query": linear("a", "D"),
        ".attention.key": linear("a", "D"),
        ".attention.value": linear("a", "D"),
        ".attention.attention_dropout": DROPOUT,
        ".attention.output_dropout": DROPOUT,
        ".attention.dense": linear("D", "a"),
        ".attention.LayerNorm": layer_norm("D"),
        ".ffn": linear("f", "D"),
        ".ffn_output": linear("D", "f"),
        ".activation": ACTIVATION,
        ".dropout": DROPOUT,
    }
    return {
        "": own("Model", assumes=(*MODEL, POOLER)),
        "embeddings": own("Embeddings", assumes=(*EMBEDDINGS, COUNTED)),
        "embeddings.word_embeddings": embedding("V", "E"),
        "embeddings.position_embeddings": embedding("P", "E"),
        "embeddings.token_type_embeddings": embedding("T", "E"),
        "embeddings.LayerNorm": layer_norm("E"),
        "embeddings.dropout": DROPOUT,
        "encoder": own("Transformer", assumes=GROUPS),
        "encoder.embedding_hidden_mapping_in": linear("D", "E"),
        "encoder.albert_layer_groups": LIST,
        "encoder.albert_layer_groups.*": own("LayerGroup", assumes=(ONE,)),
        "encoder.albert_layer_groups.*.albert_layers": LIST,
        **{f"encoder.albert_layer_groups.*.albert_layers.*{path}": role for path, role in layer.items()},
        "pooler": replace(linear("H", "D"), optional=True),
        "pooler_activation": replace(ACTIVATION, optional=True),
    }


ATTENTIONS = ("Attention", "SdpaAttention")  # the second in transformers 4


def head(module: str, prefix: str) -> Roles:
    """A Linear on what the encoder's pooler gives."""
    return {"albert.pooler": linear("H", "D"), "dropout": DROPOUT, "classifier": linear("L", "H", adapters=PEFT)}
