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
from rerank_kernels.models.leaf_roles import ACTIVATION, LIST, NUMBER, embedding, linear
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


def _angles(m: Any) -> rope.Frequencies:
    return rope.frequencies(rope.parameters(m.config))


def _said(value: Any, m: Any) -> bool:
    if rope.problem(m.config) is not None:  # which is said of the whole model
        return True
    return _near(value, _angles(m).inv_freq)


def _said_now(value: Any, m: Any) -> bool:
    """Where stock chooses anew for long texts, inv_freq is what the last text left there."""
    return dict(rope.parameters(m.config))["rope_type"] in ("dynamic", "longrope") or _said(value, m)


def _rows(m: Any) -> int:
    shape = getattr(getattr(getattr(m, "base_layer", m), "weight", None), "shape", None)
    return int(shape[0]) if shape else -1


def _head_size(config: Any) -> int:
    """Of which the angles are made."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


ANGLES = (
    Assumed("inv_freq", "what config says", _said_now),
    Assumed("original_inv_freq", "what config says", _said),
    Assumed(
        "rope_type",
        "what config says",
        lambda value, m: rope.problem(m.config) is not None or value == dict(rope.parameters(m.config))["rope_type"],
    ),
    Assumed(
        "attention_scaling",
        "what config says",
        lambda value, m: rope.problem(m.config) is not None or _near(value, _angles(m).scaling),
    ),
)
CAUSAL = Assumed("config.is_causal", "True", lambda value, _: value is None or bool(value))
WINDOW = Assumed("config.sliding_window", "None, or at least 1", lambda value, _: value is None or value >= 1)
SELF = (
    STOCK_ATTENTION,
    Assumed("head_dim", "what config says", lambda value, m: value == _head_size(m.config), needed=True),
    Assumed("scaling", "a number", lambda value, _: isinstance(value, float), needed=True),
    Assumed("is_causal", "True", lambda value, _: bool(value)),
    Assumed(
        "num_key_value_groups",
        "the rows of q_proj.weight for each row of k_proj.weight",
        lambda value, m: value * _rows(m.k_proj) == _rows(m.q_proj),
    ),
)
ACT = Assumed(
    "act_fn", "an activation that is served", lambda act, _: name_of(act) in {*ACTIVATIONS, sparse.THRESHOLD}, needed=True
)
SCALE = Assumed("embed_scale", "the root of the model's width", lambda value, m: _near(value, m.weight.shape[1] ** 0.5))


def decoder(module: str, prefix: str, eps: str, problem: Callable[[Any], str | None]) -> Roles:
    """Of the decoder whose classes stand in `module` under `prefix`. Sizes: D, the model's; h, a head; q, k, all heads."""

    def own(*parts: str, **rest: Any) -> Role:
        return Role(frozenset(f"{module}.{prefix}{part}" for part in parts), **rest)

    def norm(size: str, **rest: Any) -> Role:
        return own("RMSNorm", assumes=(NUMBER._replace(attribute=eps),), parameters={"weight": (size,)}, **rest)

    words = embedding("V", "D")
    layer = {
        "": own("DecoderLayer"),
        ".input_layernorm": norm("D"),
        ".self_attn": own("Attention", assumes=SELF, drops="attention_dropout"),
        ".self_attn.q_proj": linear("q", "D"),
        ".self_attn.k_proj": linear("k", "D"),
        ".self_attn.v_proj": linear("k", "D"),
        ".self_attn.o_proj": linear("D", "q"),
        ".self_attn.q_norm": norm("h", optional=True),
        ".self_attn.k_norm": norm("h", optional=True),
        ".post_attention_layernorm": norm("D"),
        ".mlp": own("MLP", assumes=(ACT,)),
        ".mlp.gate_proj": linear("f", "D"),
        ".mlp.up_proj": linear("f", "D"),
        ".mlp.down_proj": linear("D", "f"),
        # a function stands in no role: see ACT
        ".mlp.act_fn": replace(
            ACTIVATION, classes=ACTIVATION.classes | {sparse.THRESHOLD}, optional=True, ask=sparse.act_problem
        ),
    }
    return {
        "": own(
            "Model",
            assumes=(STOCK_ATTENTION, off("config.use_bidirectional_attention"), CAUSAL, WINDOW),
            ask=problem,
        ),
        "embed_tokens": replace(
            words, classes=words.classes | {f"{module}.{prefix}TextScaledWordEmbedding"}, assumes=(*words.assumes, SCALE)
        ),
        "rotary_emb": own("RotaryEmbedding", assumes=ANGLES),
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
