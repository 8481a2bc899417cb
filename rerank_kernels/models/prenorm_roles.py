"""What the forward of bert.py reads of RoBERTas with norms before what they norm: the tables that patch() holds a model to."""

from __future__ import annotations

from dataclasses import replace

from rerank_kernels.models import bert_roles
from rerank_kernels.models.leaf_roles import layer_norm
from rerank_kernels.models.roles import Assumed, Role, Roles

LAYER = "encoder.layer.*"
MOVED = (f"{LAYER}.attention.output.LayerNorm", f"{LAYER}.output.LayerNorm")  # there in a layer that is post-norm


TIED = Assumed("config.tie_last_hidden_states", "True, or left out", lambda value, _: value is None or value is True)


def _roles(module: str, prefix: str, norms: tuple[str, ...], without: tuple[str, ...] = ()) -> Roles:
    roles: dict[str, Role] = dict(bert_roles.encoder(module, prefix, (bert_roles.PADDED,)))
    for path in (*MOVED, *without):
        del roles[path]
    roles[""] = replace(roles[""], assumes=(*roles[""].assumes, TIED))
    return roles | {path: layer_norm("D") for path in norms}


def xl(module: str, prefix: str) -> Roles:
    """XLM-RoBERTa-XL: its embeddings have no norm."""
    norms = (f"{LAYER}.attention.self_attn_layer_norm", f"{LAYER}.LayerNorm", "encoder.LayerNorm")
    return _roles(module, prefix, norms, ("embeddings.LayerNorm", f"{LAYER}.output.dropout"))


def prelayernorm(module: str, prefix: str) -> Roles:
    return _roles(module, prefix, (f"{LAYER}.attention.LayerNorm", f"{LAYER}.intermediate.LayerNorm", "LayerNorm"))
