"""What the forward of bert.py reads of DistilBERT's modules, role by role: the table that patch() holds a model to."""

from __future__ import annotations

from typing import Any

from rerank_kernels.models.bert_roles import ACT, COUNTED, HEAD_SIZE, MODEL, STOCK_ATTENTION, rows_of
from rerank_kernels.models.leaf_roles import ACTIVATION, DROPOUT, LIST, embedding, layer_norm, linear
from rerank_kernels.models.roles import PEFT, Assumed, Role, Roles, is_scale, off


def _whole(m: Any) -> Any:
    """How wide all heads of attention m are together, as what it reads makes it."""
    return m.n_heads * m.attention_head_size


SELF = (
    HEAD_SIZE,
    Assumed(
        "n_heads",
        "what the rows of q_lin.weight make, by attention_head_size",
        lambda _, m: _whole(m) == rows_of(m.q_lin, _whole(m)),
        needed=True,
    ),
    Assumed("dim", "n_heads times attention_head_size", lambda value, m: value == _whole(m)),  # transformers 4 reads it
    is_scale("scaling", "attention_head_size"),
    STOCK_ATTENTION,
    off("is_causal"),
)
# Since transformers 5 the first alone; the others compute the same as the one before them.
ATTENTIONS = ("DistilBertSelfAttention", "MultiHeadSelfAttention", "DistilBertSdpaAttention", "DistilBertFlashAttention2")


def encoder(module: str, prefix: str) -> Roles:
    """Sizes: D, the model's; a, all heads together; f, the feed-forward layer."""

    def own(*names: str, **rest: Any) -> Role:
        return Role(frozenset(f"{module}.{name}" for name in names), **rest)

    layer = {
        "": own("TransformerBlock"),
        ".attention": own(*ATTENTIONS, assumes=SELF),
        ".attention.q_lin": linear("a", "D"),
        ".attention.k_lin": linear("a", "D"),
        ".attention.v_lin": linear("a", "D"),
        ".attention.out_lin": linear("D", "a"),
        ".attention.dropout": DROPOUT,
        ".sa_layer_norm": layer_norm("D"),
        ".ffn": own("FFN", assumes=(ACT._replace(attribute="activation"),)),
        ".ffn.dropout": DROPOUT,
        ".ffn.lin1": linear("f", "D"),
        ".ffn.lin2": linear("D", "f"),
        ".ffn.activation": ACTIVATION,
        ".output_layer_norm": layer_norm("D"),
    }
    return {
        "": own(f"{prefix}Model", assumes=MODEL),
        "embeddings": own("Embeddings", assumes=(COUNTED,)),
        "embeddings.word_embeddings": embedding("V", "D"),
        "embeddings.position_embeddings": embedding("P", "D"),
        "embeddings.LayerNorm": layer_norm("D"),
        "embeddings.dropout": DROPOUT,
        "transformer": own("Transformer"),
        "transformer.layer": LIST,
        **{f"transformer.layer.*{path}": role for path, role in layer.items()},
    }


def head(module: str, prefix: str) -> Roles:
    """A Linear, relu and a Linear on the first token. C: the width between them."""
    return {
        "pre_classifier": linear("C", "D", adapters=PEFT),
        "dropout": DROPOUT,
        "classifier": linear("L", "C", adapters=PEFT),
    }
