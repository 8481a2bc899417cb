"""What the forward of modernbert.py reads of each module, role by role: the table that patch() holds a model to."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

from rerank_kernels.models import rope
from rerank_kernels.models.bert_roles import ACT, STOCK_ATTENTION
from rerank_kernels.models.bound import name_of
from rerank_kernels.models.decoder_roles import ANGLES, rows_of
from rerank_kernels.models.decoder_types import SLIDING
from rerank_kernels.models.leaf_roles import ACTIVATION, DROPOUT, LIST, embedding, layer_norm, linear
from rerank_kernels.models.roles import PEFT, Assumed, Role, Roles

MODULE = "transformers.models.modernbert.modeling_modernbert"
MODEL = f"{MODULE}.ModernBertModel"
CLASSIFIER = f"{MODULE}.ModernBertForSequenceClassification"
IDENTITY = "torch.nn.modules.linear.Identity"

POOLINGS = ("cls", "mean")


def said_of(encoder: Any, layer: Any) -> rope.Parameters:
    """What a layer's angles are made of. Since transformers 5 one module holds those of all layers."""
    shared = getattr(encoder, "rotary_emb", None)
    if shared is not None:
        return rope.parameters(shared.config, layer.attention_type)
    return rope.parameters(layer.attn.rotary_emb.config)


def window_of(layer: Any) -> tuple[int, int] | None:
    """How many keys before and behind itself a query of a layer sees, None for all: half of config.local_attention each."""
    sees = getattr(layer.attn, "local_attention", None)  # before transformers 5.1 the layer's attention says it
    local = layer.attention_type == SLIDING if sees is None else tuple(sees) != WHOLE
    return (layer.attn.config.local_attention // 2,) * 2 if local else None


WHOLE = (-1, -1)


def problem(m: Any) -> str | None:
    """Why the angles of encoder or classifier m cannot be served; None if they can."""
    encoder = m if name_of(m) == MODEL else m.model
    functions = vars(sys.modules[MODULE]).get("MODERNBERT_ATTENTION_FUNCTION", {})  # before transformers 5.1
    if functions and m.config._attn_implementation == "flash_attention_2":
        return "its angles are FlashAttention's, which are not served; load it with attn_implementation='sdpa'"
    if any(function.__module__ != MODULE for function in functions.values()):
        return "an attention of MODERNBERT_ATTENTION_FUNCTION is not transformers' own; restore it"
    shared = getattr(encoder, "rotary_emb", None)
    for layer in encoder.layers:
        config = getattr(shared or getattr(layer.attn, "rotary_emb", None), "config", None)
        if config is None:
            return "it has no rotary_emb that says what its angles are"
        if (why := rope.problem(config, layer.attention_type if shared is not None else "")) is not None:
            return why
    return None


def _slides(m: Any) -> bool | None:
    """Whether config gives the layer of attention m a window; None where it names no types of layers."""
    types, layer = getattr(m.config, "layer_types", None), getattr(m, "layer_idx", getattr(m, "layer_id", None))
    return None if types is None or layer is None else bool(types[layer] == SLIDING)


def _half(m: Any) -> int:
    return int(m.config.local_attention // 2)


def _sees(value: Any, m: Any) -> bool:
    """FlashAttention reads these numbers, the masks only whether there is a window."""
    return tuple(value) in (WHOLE, (_half(m),) * 2) and _slides(m) in (None, tuple(value) != WHOLE)


KINDS = ("full_attention", SLIDING)
SELF = (
    STOCK_ATTENTION,
    Assumed("head_dim", "what config says", lambda value, m: value == m.config.hidden_size // m.config.num_attention_heads),
    Assumed(
        "config.num_attention_heads",
        "a third of the rows of Wqkv.weight, by head_dim",
        lambda value, m: 3 * value * m.head_dim == rows_of(m.Wqkv),
        needed=True,
    ),
    Assumed("config.local_attention", "at least 0", lambda value, _: type(value) is int and value >= 0, needed=True),
    Assumed("local_attention", "(-1, -1), or half of config.local_attention twice, as config says of the layer", _sees),
    Assumed(
        "sliding_window",
        "None, or half of config.local_attention and 1, as config.layer_types says",
        lambda value, m: value in (None, _half(m) + 1) and _slides(m) in (None, value is not None),
    ),
    Assumed("is_causal", "False", lambda value, _: not value),
)
LAYER = (
    Assumed(
        "attention_type",
        f"{KINDS[0]} or {KINDS[1]}, as config.layer_types says",
        lambda value, m: value in KINDS and _slides(m.attn) in (None, value == SLIDING),
    ),
)
POOLING = Assumed("config.classifier_pooling", " or ".join(map(repr, POOLINGS)), lambda v, _: v in POOLINGS, needed=True)
MLP_ACT, HELD = ACT._replace(attribute="act"), replace(ACTIVATION, optional=True)  # a function stands in no role: see ACT


def _own(*parts: str, **rest: Any) -> Role:
    return Role(frozenset(f"{MODULE}.ModernBert{part}" for part in parts), **rest)


def _norm_or_not(d: str) -> Role:
    """The first layer's, whose input the embeddings' norm gives, is none."""
    norm = layer_norm(d)
    return replace(norm, classes=norm.classes | {IDENTITY}, assumes=tuple(a._replace(needed=False) for a in norm.assumes))


@functools.cache
def encoder() -> Roles:
    """Sizes: D, the model's; qkv, all heads of queries, keys and values; f, the feed-forward layer, and ff twice it."""
    angles = _own("RotaryEmbedding", assumes=ANGLES, optional=True)
    layer = {
        "": _own("EncoderLayer", assumes=LAYER),
        ".attn_norm": _norm_or_not("D"),
        ".attn": _own("Attention", assumes=SELF, drops="attention_dropout"),
        ".attn.Wqkv": linear("qkv", "D"),
        ".attn.rotary_emb": angles,
        ".attn.Wo": linear("D", "D"),
        ".attn.out_drop": DROPOUT,
        ".mlp_norm": layer_norm("D"),
        ".mlp": _own("MLP", assumes=(MLP_ACT,)),
        ".mlp.Wi": linear("ff", "D"),
        ".mlp.act": HELD,
        ".mlp.drop": DROPOUT,
        ".mlp.Wo": linear("D", "f"),
    }
    return {
        "": _own("Model", assumes=(STOCK_ATTENTION,), ask=problem),
        "embeddings": _own("Embeddings"),
        "embeddings.tok_embeddings": embedding("V", "D"),
        "embeddings.norm": layer_norm("D"),
        "embeddings.drop": DROPOUT,
        "rotary_emb": angles,
        "layers": LIST,
        **{f"layers.*{path}": role for path, role in layer.items()},
        "final_norm": layer_norm("D"),
    }


@functools.cache
def classifier() -> Roles:
    """C is the width of the head, L the number of labels."""
    return {
        "": _own("ForSequenceClassification", assumes=(STOCK_ATTENTION, POOLING), ask=problem),
        **{f"model.{path}" if path else "model": role for path, role in encoder().items()},
        "head": _own("PredictionHead", assumes=(MLP_ACT,), adapters=PEFT),
        "head.dense": linear("C", "D"),
        "head.act": HELD,
        "head.norm": layer_norm("C"),
        "drop": DROPOUT,
        "classifier": linear("L", "C", adapters=PEFT),
    }
