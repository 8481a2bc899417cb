"""What is done to a decoder around patch, and arguments that say something else than they seem: served as stock, or refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers.models.llama.modeling_llama as modeling
from torch import nn
from transformers import DynamicCache, StaticCache

import rerank_kernels as rk
from conftest import ran
from models import decoder, rows, tiny
from rerank_kernels.backend import registry

IDS = rows((20,), 1)[0][None]


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def bidirectional(m):
    m.config.is_causal = False


def other_angles(m):
    config = copy.deepcopy(m.config)
    config.rope_parameters["rope_theta"] = 100.0
    return config


def plain_embedding(m):
    made = nn.Embedding(*m.get_input_embeddings().weight.shape)
    made.weight.copy_(m.get_input_embeddings().weight)
    m.set_input_embeddings(made)


def head_norms(m):
    for layer in m.model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = (modeling.LlamaRMSNorm(16) for _ in "qk")


def written_in_place(m):
    m.config.rope_parameters["rope_theta"] = 100.0


def own_attention(m):
    own = m.model.layers[1].self_attn
    own.config = copy.deepcopy(own.config)
    own.config._attn_implementation = "mine"


SERVED = {
    "angles of another config": (
        "llama",
        lambda m: setattr(m.model, "rotary_emb", modeling.LlamaRotaryEmbedding(other_angles(m))),
    ),
    "another config beside its angles": ("llama", lambda m: setattr(m.model, "config", other_angles(m))),
    "Gemma with an embedding that does not scale": ("gemma", plain_embedding),
    "norms that Llama's forward does not call": ("llama", head_norms),
    "a window that Llama's forward does not read": (
        "llama",
        lambda m: setattr(m.model.layers[0].self_attn, "is_sliding", True),
    ),
}
REFUSED = {
    "bidirectional": ("llama", bidirectional, "config.is_causal must be True, got False"),
    "rope_parameters": ("llama", written_in_place, "inv_freq must be what config says"),
    "a config of one attention": ("llama", own_attention, "config._attn_implementation must be one of transformers' own"),
    "a window of nothing": ("mistral", lambda m: setattr(m.config, "sliding_window", 0), "config.sliding_window must be None"),
}


@pytest.mark.parametrize("between", [False, True], ids=["before", "between"])
@pytest.mark.parametrize("what", SERVED)
def test_served_as_stock(what, between):
    kind, change = SERVED[what]
    ours, stock = decoder(kind), decoder(kind)
    change(stock)
    if between:
        rk.patch(ours)
        ours(IDS)
    change(ours)
    if not between:
        rk.patch(ours)
    assert (ours(IDS).logits - stock.double()(IDS).logits).abs().max() < 2e-5


@pytest.mark.parametrize("between", [False, True], ids=["before", "between"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, between):
    kind, change, said = REFUSED[what]
    ours = decoder(kind)
    if between:
        rk.patch(ours)
        ours(IDS)
    change(ours)
    with pytest.raises(rk.PatchError, match=said):
        ours(IDS) if between else rk.patch(ours)


def test_a_function_of_the_models_file_is_replaced(monkeypatch):
    ours = decoder("llama")
    rk.patch(ours)
    ours(IDS)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))
    with pytest.raises(rk.PatchError, match="with the functions of its file"):
        ours(IDS)
    with pytest.raises(rk.PatchError, match="with the functions of its file"):
        rk.patch(decoder("llama"))


@pytest.mark.parametrize("registry", ["AttentionInterface", "AttentionMaskInterface"])
@pytest.mark.parametrize("make", [decoder, tiny])
def test_a_function_under_a_stock_name(make, registry):
    import transformers

    make = functools.partial(make, "llama" if make is decoder else "bert", attn_implementation="sdpa")
    ours, held = make(), getattr(transformers, registry)
    rk.patch(ours)
    ours(IDS)
    stock = held._global_mapping["sdpa"]
    try:
        held.register("sdpa", lambda *a, **k: stock(*a, **k))
        with pytest.raises(rk.PatchError, match=r"config\._attn_implementation must be one of"):
            ours(IDS)
        with pytest.raises(rk.PatchError, match=r"config\._attn_implementation must be one of"):
            rk.patch(make())
    finally:
        held.register("sdpa", stock)
    ours(IDS)


def test_arguments_that_mean_something_else():
    ours = decoder("llama")
    rk.patch(ours)
    with pytest.raises(ValueError, match=r"is_causal must be True, or left out, got False"):
        ours(IDS, is_causal=False)
    with pytest.raises(
        ValueError, match=r"position_ids must be one more at each place, .* got a row that begins anew; give each"
    ):
        ours(IDS, position_ids=torch.tensor([[*range(10), *range(10)]]), use_cache=False)
    with pytest.raises(TypeError, match=r"position_ids must be int64 or int32, got torch.float32"):
        ours(IDS, position_ids=torch.arange(20)[None] * 0.5)
    with pytest.raises(TypeError, match=r"input_ids must be a torch.Tensor, got list; pass torch.as_tensor"):
        ours(IDS.tolist())
    static = StaticCache(config=ours.config, max_cache_len=20)
    with pytest.raises(ValueError, match=r"attention_mask must be causal, got a mask of its own for each query; pass the mask"):
        ours(IDS, attention_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool), past_key_values=static)
    with pytest.raises(ValueError, match=r"attention_mask must be of full attention, got masks of sliding_attention"):
        ours(IDS, attention_mask={"sliding_attention": None}, past_key_values=static)
    far = decoder("llama", rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4))
    rk.patch(far)
    with pytest.raises(
        ValueError, match=r"position_ids must be below 256, for rope type 'dynamic' and a sequence of 20 tokens, got 319"
    ):
        far(IDS, position_ids=torch.arange(300, 320)[None])


def test_a_cache_that_forgets_too_much():
    short = DynamicCache(config=decoder("mistral", sliding_window=10).config)
    for kind in ("llama", "mistral"):
        ours = decoder(kind)
        rk.patch(ours)
        with pytest.raises(ValueError, match=r"past_key_values must be all keys that layer 0 sees, .* got a window of 10"):
            ours(IDS, past_key_values=short)


def test_more_logits_than_tokens_and_numbers_of_numpy():
    import numpy as np

    ours = decoder("llama")
    rk.patch(ours)
    whole = ours(IDS).logits
    assert torch.equal(ours(IDS, logits_to_keep=np.int64(50)).logits, whole)
    assert torch.equal(ours(IDS, logits_to_keep=np.int64(2)).logits, whole[:, -2:])


def test_exported_twice():
    ours = tiny("bert")
    rk.patch(ours)
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for _ in range(2):
        exported = torch.export.export(ours, (), given, strict=False)
        assert torch.equal(exported.module()(**given).logits, ours(**given).logits)


def test_a_default_device_leaves_nothing_behind():
    from rerank_kernels.models import rope

    rope._table.cache_clear(), rope.frequencies.cache_clear()
    with torch.device("meta"), pytest.raises(rk.PatchError, match="meta"):
        rk.patch(modeling.LlamaForCausalLM(decoder("llama").config).eval())
    ours, stock = decoder("llama"), decoder("llama")
    rk.patch(ours)
    assert (ours(IDS).logits - stock.double()(IDS).logits).abs().max() < 2e-5
