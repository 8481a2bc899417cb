"""What the forward of bert.py reads of each module, role by role: the table that patch() holds a model to."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.models.bound import name_of
from rerank_kernels.models.leaf_roles import ACTIVATION, DROPOUT, LIST, embedding, layer_norm, linear
from rerank_kernels.models.leaves import ACTIVATIONS
from rerank_kernels.models.roles import PEFT, Assumed, Role, Roles, equal, is_scale, off

# The ways in which transformers computes attention, all of them softmax(q kᵀ scale) v; a name that a user registered is none.
ATTENTION = ("eager", "sdpa", "flash_attention", "flex_attention", "paged|", "kernels-community/")


# What forwards of transformers call of their own file: another one in its place computes something else.
FUNCTIONS = (
    *("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "apply_chunking_to_forward"),
    *("create_causal_mask", "create_sliding_window_causal_mask"),
    *("create_bidirectional_mask", "create_bidirectional_sliding_window_mask"),
)


def _stock_attention(name: Any, m: Any) -> bool:
    if name is not None and not str(name).startswith(ATTENTION):
        return False
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = sys.modules[name_of(m).rpartition(".")[0]]
    theirs = ("transformers.", "kernels")
    if any(not getattr(vars(own).get(one), "__module__", theirs[0]).startswith(theirs) for one in FUNCTIONS):
        return False
    masks = getattr(sys.modules.get("transformers.masking_utils"), "ALL_MASK_ATTENTION_FUNCTIONS", {})
    if not getattr(masks.get(name), "__module__", theirs[0]).startswith(theirs):
        return False
    function = ALL_ATTENTION_FUNCTIONS.get(name) or getattr(own, "eager_attention_forward", None)  # transformers 4.57 has none
    return function is None or getattr(function, "__module__", "").startswith(theirs)


def _counts(value: Any, _: Any) -> bool:
    return value is None or (
        isinstance(value, Tensor) and _is(value, torch.arange(value.shape[-1], device="cpu").expand(value.shape))
    )


def _zeros(value: Any, _: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and _is(value, torch.zeros_like(value, device="cpu")))


def _is(buffer: Tensor, values: Tensor) -> bool:
    if buffer.device.type == "meta" or type(buffer) is not Tensor:  # a tracer's tensor holds no values
        return True
    return torch.equal(buffer.cpu(), values.to(device="cpu", dtype=buffer.dtype))


STOCK_ATTENTION = Assumed(
    "config._attn_implementation", "one of transformers' own (eager, sdpa), with the functions of its file", _stock_attention
)
MODEL = (
    off("config.is_decoder"),
    off("config.add_cross_attention"),
    off("config.is_causal"),
    equal("config.position_embedding_type", "absolute"),  # transformers 4 has others
    STOCK_ATTENTION,
)
EMBEDDINGS = (
    equal("position_embedding_type", "absolute"),
    Assumed("token_type_ids", "zeros", _zeros),  # the types of a call that gives none
)
COUNTED = Assumed("position_ids", "0, 1, 2, ...", _counts)  # the positions of a call that gives none
PADDED = Assumed("padding_idx", "an integer >= 0", lambda value, _: type(value) is int and value >= 0, needed=True)


def _rows(m: Any, otherwise: int) -> int:
    """Of m.weight; `otherwise` where there is none, of which the role of m has to speak."""
    shape = getattr(getattr(m, "weight", None), "shape", None)
    return int(shape[0]) if shape else otherwise


SELF = (
    Assumed("attention_head_size", "an integer > 0", lambda value, _: type(value) is int and value > 0, needed=True),
    Assumed(
        "num_attention_heads",
        "what the rows of query.weight make, by attention_head_size",
        lambda value, m: value * m.attention_head_size == _rows(m.query, value * m.attention_head_size),
        needed=True,
    ),
    is_scale("scaling", "attention_head_size"),
    STOCK_ATTENTION,
    off("is_decoder"),
    off("is_causal"),
    equal("position_embedding_type", "absolute"),
)
LAYER = (off("is_decoder"), off("add_cross_attention"))
ACT = Assumed("intermediate_act_fn", "an activation that is served", lambda act, _: name_of(act) in ACTIVATIONS, needed=True)


def encoder(module: str, prefix: str, embeddings: tuple[Assumed, ...]) -> Roles:
    """Of the encoder whose classes stand in `module` under `prefix`; `embeddings`: what this type alone assumes of them.

    Sizes: D, the model's; a, all heads together; f, the feed-forward layer. Pruned layers have their own a and f.
    """

    words = "E" if prefix == "Electra" else "D"  # they may be narrower than the layers

    def own(*parts: str, **rest: Any) -> Role:
        return Role(frozenset(f"{module}.{prefix}{part}" for part in parts), **rest)

    layer = {
        "": own("Layer", assumes=LAYER),
        ".attention": own("Attention"),
        ".attention.self": own("SelfAttention", "SdpaSelfAttention", assumes=SELF, drops="dropout.p"),
        ".attention.self.query": linear("a", "D"),
        ".attention.self.key": linear("a", "D"),
        ".attention.self.value": linear("a", "D"),
        ".attention.self.dropout": DROPOUT,
        ".attention.output": own("SelfOutput"),
        ".attention.output.dense": linear("D", "a"),
        ".attention.output.LayerNorm": layer_norm("D"),
        ".attention.output.dropout": DROPOUT,
        ".intermediate": own("Intermediate", assumes=(ACT,)),
        ".intermediate.dense": linear("f", "D"),
        ".intermediate.intermediate_act_fn": replace(
            ACTIVATION, optional=True
        ),  # it may be a function: ACT says of which class
        ".output": own("Output"),
        ".output.dense": linear("D", "f"),
        ".output.LayerNorm": layer_norm("D"),
        ".output.dropout": DROPOUT,
    }
    return {
        "": own("Model", assumes=MODEL),
        "embeddings": own("Embeddings", assumes=EMBEDDINGS + embeddings),
        "embeddings.word_embeddings": embedding("V", words),
        "embeddings.position_embeddings": embedding("P", words),
        "embeddings.token_type_embeddings": embedding("T", words),
        "embeddings.LayerNorm": layer_norm(words),
        "embeddings.dropout": DROPOUT,
        "embeddings_project": replace(linear("D", "E"), optional=True),  # ELECTRA's
        "encoder": own("Encoder"),
        "encoder.layer": LIST,
        **{f"encoder.layer.*{path}": role for path, role in layer.items()},
        "pooler": own("Pooler", optional=True),
        "pooler.dense": linear("H", "D"),
        "pooler.activation": ACTIVATION,
    }


def classifier(module: str, prefix: str, base: str, of_encoder: Roles, head: Roles) -> Roles:
    """Of the classifier around that encoder, which it holds as `base`."""
    return {
        "": Role(frozenset({f"{module}.{prefix}ForSequenceClassification"}), assumes=MODEL),
        **{f"{base}.{path}" if path else base: role for path, role in of_encoder.items()},
        **head,
    }


def pooler_head(module: str, prefix: str) -> Roles:
    """BERT's: a Linear on what the encoder's pooler gives."""
    pooler = Role(frozenset({f"{module}.{prefix}Pooler"}))
    return {"bert.pooler": pooler, "dropout": DROPOUT, "classifier": linear("L", "H", adapters=PEFT)}


def electra_head(module: str, prefix: str) -> Roles:
    """RoBERTa's with an activation that it holds."""
    roles = dense_head(module, prefix)
    own = replace(roles["classifier"], assumes=(ACT._replace(attribute="activation"),))
    return {**roles, "classifier": own, "classifier.activation": replace(ACTIVATION, optional=True)}


def dense_head(module: str, prefix: str) -> Roles:
    """RoBERTa's: a module of its own on the first token, with tanh in its forward."""
    return {
        "classifier": Role(frozenset({f"{module}.{prefix}ClassificationHead"}), adapters=PEFT),
        "classifier.dense": linear("C", "D"),
        "classifier.dropout": DROPOUT,
        "classifier.out_proj": linear("L", "C"),
    }
