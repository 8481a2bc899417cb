"""What one model type does otherwise than Llama: each with a mistake in it that a test here finds."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache

import lora
import rerank_kernels as rk
from conftest import ran
from invariants import same
from models import decoder, padded, rows
from rerank_kernels.backend import registry
from rerank_kernels.models import decoder as module
from rerank_kernels.models import heads, rope
from rerank_kernels.models.registry import packed_answers

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def near_truth(model, lengths=(70, 9), bound=2e-5, change=lambda m: None):
    """Logits of the model, patched and changed, beside its own in float64."""
    sequences, twice = rows(lengths), copy.deepcopy(model).double()
    truth = [twice(input_ids=s[None], use_cache=False).logits[0] for s in sequences]
    rk.patch(model)
    for s, want in zip(sequences, truth, strict=True):
        assert want.std() > 0.2
        far = (model(input_ids=s[None], use_cache=False).logits[0] - want).abs().max()
        assert far < bound, f"{len(s)} tokens: {far:.1e} from float64"


# ---- Phi-3 -----------------------------------------------------------------------------------------------------------------

FACTORS = dict(long_factor=[2.0 + i for i in range(4)], short_factor=[1.0 + i / 10 for i in range(4)])


def phi3(**changes):
    return decoder("phi3", original_max_position_embeddings=64, rope_scaling={"type": "longrope", **FACTORS}, **changes)


def test_phi3_turns_by_the_length_of_each_sequence():
    model = phi3()
    said = dict(rope.parameters(model.config))
    assert said["rope_type"] == "longrope" and said["original_max_position_embeddings"] == 64 and said["features"] == 8
    near_truth(model, lengths=(65, 64, 9))


def generated(model, batch, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**batch, max_new_tokens=12, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, -12:], torch.stack(out.logits, 1)


def test_phi3_generates_past_its_turning_point():
    """transformers drops the cache there and computes the prompt anew; behind it the cache holds angles of a long text."""
    model, (s,) = phi3(), rows((59,))
    rk.patch(model)
    batch = {"input_ids": s[None], "attention_mask": torch.ones(1, 59, dtype=torch.long)}
    ids, logits = generated(model, batch, do_sample=False)
    other, theirs = generated(model, batch, do_sample=False, use_cache=False)
    assert torch.equal(ids, other)
    same(logits, theirs, "with a cache")


def test_phi3_a_cache_is_refused_where_its_angles_would_change():
    model, (a, b) = phi3(), rows((64, 70))
    rk.patch(model)
    cache = DynamicCache()
    model(input_ids=a[None], past_key_values=cache)
    with pytest.raises(ValueError, match=r"at most 64 tokens a sequence, for rope type 'longrope', got 65; .* use_cache=False"):
        model(input_ids=a[None, :1], past_key_values=cache)
    whole = torch.cat([a, a[:1]])[None]
    same(model(input_ids=whole, use_cache=False).logits[:, 64:], model(input_ids=whole).logits[:, 64:], "the advice")
    cache = DynamicCache()
    got = [model(input_ids=part, past_key_values=cache).logits for part in b[None].split(66, 1)]
    same(torch.cat(got, 1), model(input_ids=b[None]).logits, "a cache that began with a long text")


@pytest.mark.parametrize("names", [("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj"), ("qkv_proj", "gate_up_proj")])
def test_phi3_with_lora(names):
    model = lora.adapted(decoder("phi3"), names, saves=False)
    model.eval()
    (s,) = rows((30,))
    truth = copy.deepcopy(model).double()(input_ids=s[None], use_cache=False).logits
    bare = decoder("phi3").double()(input_ids=s[None], use_cache=False).logits
    rk.patch(model)
    assert (bare - truth).abs().max() > 0.1
    assert (model(input_ids=s[None], use_cache=False).logits - truth).abs().max() < 1e-4


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_phi3_activations(act):
    near_truth(decoder("phi3", hidden_act=act))


def test_phi3_of_as_many_key_heads_as_heads():
    near_truth(decoder("phi3", num_key_value_heads=4))


def test_mutant_halves_of_a_fused_matrix_swapped(monkeypatch):
    monkeypatch.setattr(module, "activation", lambda gate, act, up: rk.activation(up, act, up=gate))
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("phi3"))


def test_mutant_keys_and_values_of_a_fused_matrix_swapped(monkeypatch):
    honest = module._projected
    monkeypatch.setattr(module, "_projected", lambda *a: (lambda q, k, v: (q, v, k))(*honest(*a)))
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("phi3"))


def test_mutant_all_features_turned(monkeypatch):
    honest = rope.parameters
    monkeypatch.setattr(rope, "parameters", lambda *a: tuple(sorted((dict(honest(*a)) | {"features": 16}).items())))
    model = decoder("phi3")
    with pytest.raises(rk.PatchError, match="inv_freq must be what config says"):
        rk.patch(model)


# ---- Gemma 2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 50.0, 1.5])
def test_gemma2_caps_its_attention(cap):
    near_truth(decoder("gemma2", attn_logit_softcapping=cap))


def test_gemma2_has_its_cap_under_every_attn_implementation():
    """sdpa of transformers 4 leaves it out, that of 5 refuses it."""
    model, told, (s,) = decoder("gemma2"), decoder("gemma2"), rows((40,))
    told.config._attn_implementation = "sdpa"
    rk.patch(model), rk.patch(told)
    same(told(input_ids=s[None]).logits, model(input_ids=s[None]).logits, "sdpa")


def test_mutant_attention_without_its_cap(monkeypatch):
    monkeypatch.setattr(module, "attention", lambda *a, softcap, **k: rk.attention(*a, **k))
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma2"))


def test_mutant_a_cap_before_the_scale(monkeypatch):
    other = lambda *a, softcap, scale, **k: rk.attention(*a, softcap=softcap / scale, scale=scale, **k)  # noqa: E731
    monkeypatch.setattr(module, "attention", other)
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma2"))


# ---- Gemma 3 ---------------------------------------------------------------------------------------------------------------


def test_gemma3_layers_turn_by_angles_of_their_own():
    model = decoder("gemma3")
    thetas = {turn: dict(said)["rope_theta"] for turn, said in module._said(model.model).items()}
    assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}
    near_truth(model)


def test_gemma3_with_a_scaled_global_angle():
    model = decoder("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    kinds = {turn: dict(said)["rope_type"] for turn, said in module._said(model.model).items()}
    assert kinds == {"full_attention": "linear", "sliding_attention": "default"}
    near_truth(model)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_relu_behind_a_norm(kind):
    near_truth(decoder(kind, hidden_activation="relu"))


def test_gemma3_a_cap_on_attention_changes_nothing_as_in_transformers():
    plain, told = decoder("gemma3"), decoder("gemma3", attn_logit_softcapping=0.5)
    (s,) = rows((40,))
    assert torch.equal(plain(input_ids=s[None]).logits, told(input_ids=s[None]).logits), "transformers applies it now"
    rk.patch(plain), rk.patch(told)
    same(told(input_ids=s[None]).logits, plain(input_ids=s[None]).logits, "with a cap")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_words_have_a_cap(kind, cap):
    model = decoder(kind, final_logit_softcapping=cap)
    near_truth(model)
    largest = model(input_ids=rows((40,))[0][None]).logits.abs().max()
    assert largest <= cap if cap else largest > 3


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3"])
def test_embeddings_that_are_given(kind):
    """In transformers 4 the forward of Gemma scales them, in 5 nothing does."""
    model, (s,) = decoder(kind), rows((12,))
    words = torch.nn.functional.embedding(s[None], model.model.embed_tokens.weight)
    want = copy.deepcopy(model).double()(inputs_embeds=words.double()).logits
    rk.patch(model)
    assert (model(inputs_embeds=words).logits - want).abs().max() < 2e-5


def test_mutant_a_theta_for_the_other_layers(monkeypatch):
    honest, other = module.angles_of, {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
    monkeypatch.setattr(module, "angles_of", lambda m, turn: honest(m, other[turn]))
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma3"))


def test_mutant_a_window_for_the_other_layers(monkeypatch):
    monkeypatch.setattr(module, "attention", lambda *a, window, **k: rk.attention(*a, window=None if window else (19, -1), **k))
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma3"))


@pytest.mark.parametrize("more", [-1, 1])
@pytest.mark.parametrize("kind", ["phi3", "gemma2", "gemma3"])
def test_mutant_a_query_sees_another_number_of_keys_than_its_window(monkeypatch, kind, more):
    monkeypatch.setattr(
        module, "attention", lambda *a, window, **k: rk.attention(*a, window=window and (window[0] + more, -1), **k)
    )
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder(kind))


def test_mutant_a_norm_without_its_offset(monkeypatch):
    monkeypatch.setattr(module, "rms_norm", lambda *a, offset, **k: rk.rms_norm(*a, **k))
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma3"))


def test_mutant_a_branch_that_is_not_normed(monkeypatch):
    monkeypatch.setattr(module, "_plus", lambda kind, norm, branch, x: x + branch)
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma3"))


def test_mutant_words_without_their_cap(monkeypatch):
    monkeypatch.setattr(module, "capped", lambda logits, cap: logits)
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(decoder("gemma3"))


def test_a_layer_of_gemma3_1b():
    """Real sizes: heads of 256, one head of keys, sums over 6,912 in chunks."""
    sizes = dict(hidden_size=1152, intermediate_size=6912, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256)
    model, sequences = decoder("gemma3", torch.bfloat16, layers=1, **sizes), rows((40, 7))
    for layer in model.model.layers:  # drawn for a width of 64
        for m in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(m, torch.nn.Linear):
                m.weight.mul_(0.2)
    ratio = further_than_stock(model)
    assert ratio < 1.1, f"{ratio:.2f} times stock's squared distance from float64"
    batch = padded(sequences, 0, left=True)
    got = model(**batch, use_cache=False).logits
    for i, s in enumerate(sequences):
        same(got[i, -len(s) :], model(input_ids=s[None], use_cache=False).logits[0], f"{len(s)} tokens in a batch")


# ---- what a branch adds is rounded once --------------------------------------------------------------------------------------


def further_than_stock(model):
    """Mean squared distances from float64: ours over stock's."""
    sequences = rows((64, 40))
    twice = copy.deepcopy(model).double()
    truth = torch.cat([twice(input_ids=s[None], use_cache=False).logits[0] for s in sequences])
    stock = torch.cat([model(input_ids=s[None], use_cache=False).logits[0] for s in sequences])
    rk.patch(model)
    ours = torch.cat([model(input_ids=s[None], use_cache=False).logits[0] for s in sequences])
    return float((ours - truth).square().mean() / (stock.double() - truth).square().mean())


def test_a_branch_is_added_before_it_is_rounded():
    assert further_than_stock(decoder("gemma3", torch.bfloat16, layers=6)) < 0.73, "not much nearer than stock"


def test_mutant_a_branch_is_rounded_before_it_is_added(monkeypatch):
    rounded = lambda kind, norm, branch, x: x + module._norm(kind, norm, branch.to(x.dtype))  # noqa: E731
    monkeypatch.setattr(module, "_plus", rounded)
    with pytest.raises(AssertionError, match="not much nearer"):
        test_a_branch_is_added_before_it_is_rounded()


# ---- log-odds under a cap ---------------------------------------------------------------------------------------------------


def log_odds(model, lengths=(30, 9)):
    sequences = rows(lengths)
    flat, cu = torch.cat(sequences), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    twice = copy.deepcopy(model).double()
    truth = torch.stack([twice(input_ids=s[None]).logits[0, -1] for s in sequences])
    rk.patch(model)
    got = packed_answers(model, flat, cu, 7, 90).logit[:, 0]
    assert (got - (truth[:, 7] - truth[:, 90])).abs().max() < 2e-5, "log-odds"
    alone = packed_answers(model, flat, cu, 7, None).logit[:, 0]
    assert (alone - truth[:, 7]).abs().max() < 2e-5
    same(alone[:, None], model(**padded(sequences, 0, left=True)).logits[:, -1, 7:8], "the logit of one word")
    same(packed_answers(model, sequences[1], torch.tensor([0, 9], dtype=torch.int32), 7, 90).logit, got[1:, None], "alone")


def test_log_odds_of_words_with_a_cap():
    log_odds(decoder("gemma3", final_logit_softcapping=2.0))


def test_mutant_the_difference_is_capped(monkeypatch):
    """One dot with W[yes] - W[no], as without a cap."""
    honest = heads.AnswerHead.__call__

    def one_dot(self, x, sequences):
        made = honest(heads.AnswerHead(self.words, self.yes, self.no), x, sequences)
        return made._replace(logit=heads.capped(made.logit, self.cap))

    monkeypatch.setattr(heads.AnswerHead, "__call__", one_dot)
    with pytest.raises(AssertionError, match="log-odds"):
        log_odds(decoder("gemma3", final_logit_softcapping=2.0))


# ---- refused by name --------------------------------------------------------------------------------------------------------


def of_both_sides(m):
    m.config.use_bidirectional_attention = True


def no_cap(m):
    m.config.final_logit_softcapping = 0.0


def no_attention_cap(m):
    m.model.layers[0].self_attn.attn_logit_softcapping = -1.0


def other_heads(m):
    m.model.layers[1].self_attn.num_key_value_heads = 4


def other_layers(m):
    own = m.model.layers[0].self_attn
    own.config = copy.deepcopy(own.config)
    own.config.layer_types = ["full_attention", "full_attention"]


def other_local_angles(m):
    rotary = getattr(m.model, "rotary_emb_local", m.model.rotary_emb)
    next(b for name, b in rotary.named_buffers() if "full" not in name).mul_(2.0)


REFUSED = {
    "bidirectional": ("gemma3", of_both_sides, "config.use_bidirectional_attention must be False, got True"),
    "a cap of nothing": ("gemma3", no_cap, "config.final_logit_softcapping must be None, or a number > 0, got 0.0"),
    "heads that the fused rows are not": ("phi3", other_heads, "config.num_attention_heads must be what the rows of qkv_proj"),
    "an attention's cap of nothing": ("gemma2", no_attention_cap, "attn_logit_softcapping must be None, or a number > 0"),
    "a layer of another type": ("gemma3", other_layers, "is_sliding must be what config.layer_types says"),
    "angles of layers with a window": ("gemma3", other_local_angles, "inv_freq must be what config says"),
}


@pytest.mark.parametrize("between", [False, True], ids=["before", "between"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, between):
    kind, change, said = REFUSED[what]
    model, ids = decoder(kind), rows((9,))[0][None]
    if between:
        rk.patch(model)
        model(ids)
    change(model)
    with pytest.raises(rk.PatchError, match=said):
        model(ids) if between else rk.patch(model)


def test_angles_of_a_type_of_layer_that_the_config_leaves_out():
    model = decoder("gemma3")
    if not hasattr(model.config, "rope_parameters"):
        pytest.skip("transformers 4 has a number for each")
    model.config.rope_parameters = {"full_attention": model.config.rope_parameters["full_attention"]}
    with pytest.raises(rk.PatchError, match=r"config\.rope_parameters has nothing for sliding_attention"):
        rk.patch(model)


def test_a_hybrid_cache():
    """transformers 4 has the class, and calls it deprecated; a StaticCache holds the same layers."""
    from transformers import StaticCache, cache_utils

    if not hasattr(cache_utils, "HybridCache"):
        pytest.skip("transformers 5 has none")
    model, (s,) = decoder("gemma3"), rows((30,))
    rk.patch(model)
    with pytest.raises(
        ValueError, match=r"past_key_values must be a DynamicCache or StaticCache of transformers, got HybridCache"
    ):
        model(input_ids=s[None], past_key_values=cache_utils.HybridCache(config=model.config, max_cache_len=40))
    static = StaticCache(config=model.config, max_cache_len=40)
    same(model(input_ids=s[None], past_key_values=static).logits, model(input_ids=s[None]).logits, "the advice")


def test_after_hidden_states_were_asked_for():
    """transformers 4 leaves the forward of each layer's class in its __dict__."""
    model, stock, ids = decoder("gemma3"), decoder("gemma3"), rows((9,))[0][None]
    want = stock(ids, output_hidden_states=True).hidden_states
    for layer in model.model.layers:
        layer.forward = layer.forward
    rk.patch(model)
    for a, b in zip(model(ids, output_hidden_states=True).hidden_states, want, strict=True):
        assert (a - b).abs().max() < 1e-4
    model.model.layers[0].forward = stock.model.layers[0].forward
    with pytest.raises(rk.PatchError, match="has a forward of its own in its __dict__"):
        model(ids)
