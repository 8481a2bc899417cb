"""What decoder_roles.py takes for granted: a case for each line of it, which nothing refuses where that line is missing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import rerank_kernels as rk
from conftest import ran
from models import DECODERS, decoder
from rerank_kernels.backend import registry
from rerank_kernels.models import decoder as module
from rerank_kernels.models.decoder_types import SLIDING


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def attention(**values):
    return lambda m: vars(m.model.layers[1].self_attn).update(values)


def config(**values):
    return lambda m: vars(m.config).update(values)


def angles(**values):
    return lambda m: vars(m.model.rotary_emb).update(values)


def buffer(name):
    return lambda m: getattr(m.model.rotary_emb, name).mul_(1.01)


def own_config(m, **values):
    own = m.model.layers[0].self_attn
    own.config = copy.deepcopy(own.config)
    for name, value in values.items():
        setattr(own.config, name, value)


def act(name):
    def change(m):
        delattr(m.model.layers[0].mlp, name)  # no function stands where a module was
        setattr(m.model.layers[0].mlp, name, torch.sin)

    return change


def fused_heads(m):
    """As many rows, shared out otherwise."""
    own = m.model.layers[0].self_attn
    own.config = copy.deepcopy(own.config)
    own.config.num_attention_heads = 5


def of_nothing(m):
    own = m.model.layers[0].self_attn
    own.num_key_value_heads, own.config = 0, copy.deepcopy(own.config)
    own.config.num_attention_heads = 8
    own.num_key_value_groups = 2


NESTED = hasattr(decoder("gemma3").model.rotary_emb, f"{SLIDING}_inv_freq")  # transformers 5
# attribute -> (model type, what is done to it)
CASES = {
    "config._attn_implementation": ("llama", lambda m: own_config(m, _attn_implementation="mine")),
    "config.use_bidirectional_attention": ("gemma3", config(use_bidirectional_attention=True)),
    "config.is_causal": ("llama", config(is_causal=False)),
    "config.sliding_window": ("mistral", config(sliding_window=0)),
    "config.final_logit_softcapping": ("gemma2", config(final_logit_softcapping=0.0)),
    "config.num_attention_heads": ("phi3", fused_heads),
    "num_key_value_heads": ("phi3", of_nothing),
    "num_key_value_groups": ("llama", attention(num_key_value_groups=4)),
    "head_dim": ("llama", attention(head_dim=32)),
    "scaling": ("llama", attention(scaling=None)),
    "is_causal": ("llama", attention(is_causal=False)),
    "is_sliding": ("gemma3", attention(is_sliding=True)),
    "attn_logit_softcapping": ("gemma2", attention(attn_logit_softcapping=-1.0)),
    "act_fn": ("llama", act("act_fn")),
    "activation_fn": ("phi3", act("activation_fn")),
    "embed_scale": ("gemma3", lambda m: m.model.embed_tokens.embed_scale.mul_(1.01)),
    "inv_freq": ("llama", buffer("inv_freq")),
    "original_inv_freq": ("llama", lambda m: angles(original_inv_freq=m.model.rotary_emb.inv_freq * 1.01)(m)),
    "rope_type": ("llama", angles(rope_type="linear")),
    "attention_scaling": ("llama", angles(attention_scaling=1.1)),
    **{
        f"{turn}_{name}": (
            ("gemma3", angles(**{f"{turn}_{name}": 1.1})) if "scaling" in name else ("gemma3", buffer(f"{turn}_{name}"))
        )
        for turn in ("full_attention", SLIDING)
        for name in ("inv_freq", "original_inv_freq", "attention_scaling")
        if NESTED
    },
}


def stated():
    """The attributes that decoder_roles.py itself has lines about."""
    found = set()
    for kind in DECODERS:
        for role in module.roles_of(decoder(kind)).values():
            if any(".modeling_" in name for name in role.classes):
                found |= {line.attribute for line in role.assumes}
    return found - {"eps", "variance_epsilon", "max_norm"}  # leaf_roles.py


def test_every_line_has_a_case():
    nested = {name for name in stated() if name.startswith(("full_attention", SLIDING))}
    assert stated() - (set() if NESTED else nested) == set(CASES)


def refused(attribute):
    kind, change = CASES[attribute]
    model = decoder(kind)
    if attribute == "original_inv_freq" and attribute in model.model.rotary_emb._buffers:
        change = buffer(attribute)
    change(model)
    with pytest.raises(rk.PatchError, match=rf"\({attribute} must be "):
        rk.patch(model)


@pytest.mark.parametrize("attribute", CASES)
def test_refused(attribute):
    refused(attribute)


@pytest.mark.parametrize("attribute", CASES)
def test_mutant_a_line_is_missing(attribute, monkeypatch):
    honest = module._roles

    def without(*names):
        return {
            path: dataclasses.replace(role, assumes=tuple(line for line in role.assumes if line.attribute != attribute))
            for path, role in honest(*names).items()
        }

    monkeypatch.setattr(module, "_roles", without)
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError, TypeError)):  # served, or an error that names nothing
        refused(attribute)
