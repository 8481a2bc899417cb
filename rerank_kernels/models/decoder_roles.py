"""What the forward of decoder.py reads of each module, role by role: the table that patch() holds a model to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.models import rope, sparse
from rerank_kernels.models.bert_roles import STOCK_ATTENTION
from rerank_kernels.models.bound import name_of
from rerank_kernels.models.decoder_types import SLIDING, ModelType
from rerank_kernels.models.leaf_roles import ACTIVATION, DROPOUT, LIST, NUMBER, embedding, linear
from rerank_kernels.models.leaves import ACTIVATIONS
from rerank_kernels.models.roles import PEFT, Assumed, Role, Roles, off

# How far a buffer may be from what the config says: the digits of its dtype, for .half() takes buffers along.
_NEAR = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _near(value: Any, wanted: Any) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, float | int) and abs(float(value) - float(wanted)) <= 1e-4 * abs(float(wanted))
    if value.device.type == "meta" or type(value) is not Tensor:  # a tracer's tensor holds no values
        return True
    share, numbers = _NEAR.get(value.dtype, 1e-4), value.flatten().tolist()  # and no arithmetic of PyTorch inside a call
    asked = wanted.tolist() if isinstance(wanted, Tensor) else [wanted]
    return len(numbers) == len(asked) and all(abs(a - b) <= share * abs(b) + 1e-7 for a, b in zip(numbers, asked, strict=True))


def _angles(m: Any, turn: str) -> rope.Frequencies:
    return rope.frequencies(rope.parameters(m.config, turn))


def _unserved(m: Any, turn: str) -> bool:
    """Which is said of the whole model."""
    return rope.problem(m.config, turn) is not None


def _rope_type(m: Any, turn: str) -> Any:
    return dict(rope.parameters(m.config, turn))["rope_type"]


def _types(value: Any, m: Any) -> bool:
    """Of each type of layer that has angles of its own, or of all."""
    each = value if isinstance(value, dict) else {"": value}
    return all(_unserved(m, turn) or kind == _rope_type(m, turn) for turn, kind in each.items())


def _of(turn: str) -> tuple[Assumed, ...]:
    """What rotary modules hold of the angles that are called so."""
    name, wanted = f"{turn}_" if turn else "", "what config says"

    def said(value: Any, m: Any) -> bool:
        return _unserved(m, turn) or _near(value, _angles(m, turn).inv_freq)

    def said_now(value: Any, m: Any) -> bool:  # where stock chooses anew for long texts, it is what the last text left there
        return _unserved(m, turn) or _rope_type(m, turn) in ("dynamic", "longrope") or said(value, m)

    def scaling(value: Any, m: Any) -> bool:
        return _unserved(m, turn) or _near(value, _angles(m, turn).scaling)

    return (
        Assumed(f"{name}inv_freq", wanted, said_now),
        Assumed(f"{name}original_inv_freq", wanted, said),
        Assumed(f"{name}attention_scaling", wanted, scaling),
    )


def rows_of(m: Any) -> int:
    """Of the weight of a linear layer, with adapters around it or without; -1 where there is none."""
    shape = getattr(getattr(getattr(m, "base_layer", m), "weight", None), "shape", None)
    return int(shape[0]) if shape else -1


def _head_size(config: Any) -> int:
    """Of which the angles are made."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


ANGLES = (*_of(""), *_of("full_attention"), *_of(SLIDING), Assumed("rope_type", "what config says", _types))
CAUSAL = Assumed("config.is_causal", "True", lambda value, _: value is None or bool(value))
WINDOW = Assumed("config.sliding_window", "None, or at least 1", lambda value, _: value is None or value >= 1)
_CAP = Assumed("", "None, or a number > 0", lambda value, _: value is None or (isinstance(value, float | int) and value > 0))
SELF = (
    STOCK_ATTENTION,
    Assumed("head_dim", "what config says", lambda value, m: value == _head_size(m.config), needed=True),
    Assumed("scaling", "a number", lambda value, _: isinstance(value, float), needed=True),
    Assumed("is_causal", "True", lambda value, _: bool(value)),
    Assumed("is_sliding", "what config.layer_types says", lambda value, m: _slides(m) in (None, value)),
    _CAP._replace(attribute="attn_logit_softcapping"),
)
GROUPS = Assumed(
    "num_key_value_groups",
    "the rows of q_proj.weight for each row of k_proj.weight",
    lambda value, m: value * rows_of(m.k_proj) == rows_of(m.q_proj),
)
# Of one matrix, whose rows are those of queries, keys and values.
FUSED = (
    Assumed("num_key_value_heads", "a number > 0", lambda value, _: type(value) is int and value > 0, needed=True),
    Assumed(
        "config.num_attention_heads",
        "what the rows of qkv_proj.weight leave for queries",
        lambda value, m: (value + 2 * m.num_key_value_heads) * m.head_dim == rows_of(m.qkv_proj),
        needed=True,
    ),
    Assumed(
        "num_key_value_groups",
        "the heads of queries for each head of keys",
        lambda value, m: value * m.num_key_value_heads == m.config.num_attention_heads,
    ),
)


def _slides(m: Any) -> bool | None:
    """Whether config gives a layer a window; None where it names no types of layers, and stock reads none."""
    types = getattr(m.config, "layer_types", None)
    return None if types is None else bool(types[m.layer_idx] == SLIDING)


ACT = Assumed(
    "act_fn", "an activation that is served", lambda act, _: name_of(act) in {*ACTIVATIONS, sparse.THRESHOLD}, needed=True
)
SCALE = Assumed("embed_scale", "the root of the model's width", lambda value, m: _near(value, m.weight.shape[1] ** 0.5))


def decoder(module: str, a: ModelType, problem: Callable[[Any], str | None]) -> Roles:
    """Of the decoder whose classes stand in `module`. Sizes: D, the model's; h, a head; q, k, all heads; f, the feed-forward
    layer."""

    def own(*parts: str, **rest: Any) -> Role:
        return Role(frozenset(f"{module}.{a.prefix}{part}" for part in parts), **rest)

    def norm(size: str, **rest: Any) -> Role:
        return own("RMSNorm", assumes=(NUMBER._replace(attribute=a.eps),), parameters={"weight": (size,)}, **rest)

    def attention(*more: Assumed) -> Role:
        return own("Attention", assumes=(*SELF, *more), drops="attention_dropout")

    words = embedding("V", "D")
    fused = {
        ".self_attn": attention(*FUSED),
        ".self_attn.qkv_proj": linear("qkv", "D"),
        ".resid_attn_dropout": DROPOUT,
        ".mlp": own("MLP", assumes=(ACT._replace(attribute="activation_fn"),)),
        ".mlp.gate_up_proj": linear("ff", "D"),
        ".mlp.activation_fn": replace(ACTIVATION, optional=True),
        ".resid_mlp_dropout": DROPOUT,
    }
    apart = {
        ".self_attn": attention(GROUPS),
        ".self_attn.q_proj": linear("q", "D"),
        ".self_attn.k_proj": linear("k", "D"),
        ".self_attn.v_proj": linear("k", "D"),
        ".self_attn.q_norm": norm("h", optional=True),
        ".self_attn.k_norm": norm("h", optional=True),
        ".mlp": own("MLP", assumes=(ACT,)),
        ".mlp.gate_proj": linear("f", "D"),
        ".mlp.up_proj": linear("f", "D"),
        # a function stands in no role: see ACT
        ".mlp.act_fn": replace(
            ACTIVATION, classes=ACTIVATION.classes | {sparse.THRESHOLD}, optional=True, ask=sparse.act_problem
        ),
    }
    behind = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if a.branch_norms else ()
    layer = {
        "": own("DecoderLayer"),
        ".input_layernorm": norm("D"),
        **(fused if a.fused else apart),
        ".self_attn.o_proj": linear("D", "q"),
        ".post_attention_layernorm": norm("D"),
        **{f".{name}": norm("D") for name in behind},
        ".mlp.down_proj": linear("D", "f"),
    }
    cap = (_CAP._replace(attribute="config.final_logit_softcapping"),) if a.word_cap else ()
    return {
        "": own(
            f"{a.text}Model",
            assumes=(STOCK_ATTENTION, off("config.use_bidirectional_attention"), CAUSAL, WINDOW, *cap),
            ask=problem,
        ),
        "embed_tokens": replace(
            words, classes=words.classes | {f"{module}.{a.prefix}TextScaledWordEmbedding"}, assumes=(*words.assumes, SCALE)
        ),
        "rotary_emb": own("RotaryEmbedding", assumes=ANGLES),
        "rotary_emb_local": own("RotaryEmbedding", assumes=ANGLES, optional=True),
        "layers": LIST,
        **{f"layers.*{path}": role for path, role in layer.items()},
        "norm": norm("D"),
    }


def around(module: str, name: str, inside: Roles, head: Roles) -> Roles:
    """Of a class that holds that decoder as `model`, and its head."""
    whole = replace(inside[""], classes=frozenset({f"{module}.{name}"}))
    return {"": whole, **{f"model.{path}" if path else "model": role for path, role in inside.items()}, **head}


HEADS = {
    "ForCausalLM": {"lm_head": linear("L", "D", adapters=PEFT)},
    "ForSequenceClassification": {"score": linear("L", "D", adapters=PEFT)},
}
