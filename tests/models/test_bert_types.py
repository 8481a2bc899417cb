"""bert_types: DistilBERT, ALBERT and pre-norm RoBERTas: against stock in float64, what their roles refuse, and mutants."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch

import lora
import rerank_kernels as rk
from models import padded, rows, tiny
from rerank_kernels.backend import registry
from rerank_kernels.models import albert_roles, bert, bert_types
from rerank_kernels.models.registry import packed_logits
from surroundings import filled

LENGTHS = (7, 1, 70, 23)
BATCH = padded(rows(LENGTHS), 0)
KEPT = BATCH["attention_mask"].bool()
TYPES = {"token_type_ids": (torch.arange(BATCH["input_ids"].numel()) % 3 == 0).long().view_as(BATCH["input_ids"])}
NEAR = 2e-5
FOUR = "output_hidden_states" in inspect.signature(type(tiny("albert").albert.encoder).forward).parameters  # transformers 4
# layers, groups and layers in a group
GROUPS = ((6, 1, 1), (6, 3, 1), (3, 2, 1), (5, 3, 1), (4, 2, 2), (2, 1, 2))


def albert(layers=5, groups=3, inner=1, **changes):
    return tiny("albert", num_hidden_layers=layers, num_hidden_groups=groups, inner_group_num=inner, **changes)


def differs(model, pad=0, **inputs):
    """How far logits and hidden states are from stock's in float64."""
    inputs = padded(rows(LENGTHS), pad) | inputs
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**inputs, output_hidden_states=True)
    rk.patch(model)
    got = model(**inputs, output_hidden_states=True)
    assert truth.logits.std() > 0.05, "the model does not tell these inputs apart: the comparison would be empty"
    assert len(got.hidden_states) == len(truth.hidden_states)
    pairs = [(got.logits, truth.logits), *((x[KEPT], y[KEPT]) for x, y in zip(got[1], truth[1], strict=True))]
    return max(float((x - y).abs().max()) for x, y in pairs)


# ---- against stock ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_albert_runs_its_groups_in_stocks_order(shape, attention):
    model = albert(*shape, attn_implementation=attention, num_labels=3)
    assert differs(model, **TYPES) < NEAR


def test_words_as_wide_as_the_layers_are_mapped_too():
    assert differs(albert(embedding_size=64)) < NEAR


def test_an_albert_without_a_pooler():
    from transformers import AlbertModel

    with_one = tiny("albert", head=False)
    bare = AlbertModel(with_one.config, add_pooling_layer=False).eval()
    bare.load_state_dict(with_one.state_dict(), strict=False)
    for model in (bare, with_one):
        rk.patch(model)
    out = bare(**BATCH)
    assert out.pooler_output is None and torch.equal(out.last_hidden_state, with_one(**BATCH).last_hidden_state)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("family", ["distilbert", "albert"])
def test_activations(family, act):
    assert differs(tiny(family, hidden_act=act)) < NEAR


PRE_NORM = ("xlm-roberta-xl", "roberta-prelayernorm")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", PRE_NORM)
def test_norms_before_what_they_norm(family, attention):
    if attention == "sdpa" and not type(tiny(family))._supports_sdpa:
        pytest.skip("transformers 4 has no such attention of it")
    assert differs(tiny(family, attn_implementation=attention), pad=1, **TYPES) < NEAR


def test_places_from_a_sine():
    assert differs(tiny("distilbert", sinusoidal_pos_embds=True)) < NEAR


def test_as_many_layers_as_config_says_now():
    """Stock reads config at each call."""
    model = albert(2, 1)
    rk.patch(model)
    two = model(**BATCH).logits
    model.config.num_hidden_layers = 4
    with_four = copy.deepcopy(model)
    rk.unpatch(with_four)
    with torch.no_grad():
        truth = with_four.double()(**BATCH).logits
    got = model(**BATCH).logits
    assert (got - truth).abs().max() < NEAR < (got - two).abs().max()


def test_a_distilbert_has_no_token_types():
    model, (ids,) = tiny("distilbert"), rows((9,))
    rk.patch(model)
    cu = torch.tensor([0, 9], dtype=torch.int32)
    want = packed_logits(model, ids, cu).logit
    with pytest.raises(ValueError, match=r"token_types are not served, a DistilBertModel has no token types; leave them out"):
        packed_logits(model, ids, cu, torch.zeros_like(ids))
    with pytest.raises((ValueError, TypeError), match="token_type_ids"):  # an unexpected argument in transformers 4
        model(input_ids=ids[None], token_type_ids=torch.zeros_like(ids)[None])
    assert torch.equal(model(input_ids=ids[None]).logits, want)


TARGETS = {
    "distilbert": ("q_lin", "v_lin", "lin1", "out_lin", "pre_classifier"),
    "albert": ("query", "dense", "ffn", "embedding_hidden_mapping_in", "pooler"),
}


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("family", TARGETS)
def test_adapters(family, saves):
    model = lora.adapted(tiny(family, num_labels=2), TARGETS[family], saves=saves)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**BATCH).logits
    rk.patch(model)
    got = model(**BATCH).logits
    assert (got - truth).abs().max() < NEAR
    assert torch.equal(model(input_ids=rows(LENGTHS)[3][None]).logits, got[3:])
    model.disable()
    assert (model(**BATCH).logits - truth).abs().max() > 1e-2, "the adapters tell"


def test_a_head_that_an_adapter_saves_whole():
    """PEFT's advice for a DistilBERT: both layers of the head are the adapter's own."""
    model = tiny("distilbert", num_labels=2)
    model.pre_classifier = wrapper = lora.ModulesToSaveWrapper(model.pre_classifier)
    wrapper.modules_to_save["default"] = filled(torch.nn.Linear(64, 64))
    made = lora.adapted(model)
    with torch.no_grad():
        truth = copy.deepcopy(made).double()(**BATCH).logits
    rk.patch(made)
    assert (made(**BATCH).logits - truth).abs().max() < NEAR


# ---- mutants of the arithmetic ----------------------------------------------------------------------------------------------


def with_row(monkeypatch, family, **changes):
    module = f"transformers.models.{family}.modeling_{family}"
    monkeypatch.setitem(bert_types.MODEL_TYPES, module, dataclasses.replace(bert_types.MODEL_TYPES[module], **changes))


@pytest.mark.parametrize("wrong", ["tanh", "gelu", None])
def test_mutant_a_head_without_its_relu(monkeypatch, wrong):
    honest = bert_types._distilbert_head
    with_row(monkeypatch, "distilbert", head=lambda m: dataclasses.replace(honest(m), activation=wrong))
    assert differs(tiny("distilbert")) > 10 * NEAR


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, config: i % config.num_hidden_groups,
        lambda i, config: config.num_hidden_groups - 1 - int(i / (config.num_hidden_layers / config.num_hidden_groups)),
        lambda i, config: min(i // (config.num_hidden_layers // config.num_hidden_groups), config.num_hidden_groups - 1),
        lambda i, config: 0,
    ],
    ids=["in turn", "backwards", "whole quotient", "the first"],
)
def test_mutant_groups_in_another_order(monkeypatch, wrong):
    monkeypatch.setattr(albert_roles, "group_of", wrong)
    assert differs(albert()) > 10 * NEAR


@pytest.mark.parametrize("family", ["distilbert", "albert"])
@pytest.mark.parametrize("wrong", [{"norm": "last", "last": "norm"}, {"query": "key", "key": "query"}, {"up": "out"}], ids=str)
def test_mutant_modules_in_each_others_place(monkeypatch, family, wrong):
    honest = getattr(bert_types, f"_{family}_layers")
    swapped = lambda m: [  # noqa: E731
        one._replace(**{to: getattr(one, of) for to, of in wrong.items()}) for one in honest(m)
    ]
    with_row(monkeypatch, family, layers=swapped)
    equal = {"intermediate_size": 64}  # so that any Linear fits
    assert differs(tiny(family, **equal)) > 10 * NEAR


MISTAKES = {
    "post-norm": lambda row: {"layers": lambda m: [one._replace(first=False) for one in row.layers(m)]},
    "norms swapped": lambda row: {"layers": lambda m: [one._replace(norm=one.last, last=one.norm) for one in row.layers(m)]},
    "no last norm": lambda row: {"final": lambda _: None},
    "embeddings as they are": lambda row: {"normed": False},
}


# XLM-RoBERTa-XL's embeddings have no norm that could be forgotten
MADE = [(family, one) for family in PRE_NORM for one in MISTAKES if (family, one) != (PRE_NORM[0], "embeddings as they are")]


@pytest.mark.parametrize("family, mistake", MADE)
def test_mutant_of_pre_norm(monkeypatch, family, mistake):
    model = tiny(family)
    name = family.replace("-", "_")
    with_row(monkeypatch, name, **MISTAKES[mistake](bert_types.model_type(model)))
    assert differs(model, pad=1) > 10 * NEAR


@pytest.mark.parametrize("changes", [{"typed": False}, {"project": lambda _: None}], ids=["types", "mapping"])
def test_mutant_a_step_is_left_out(monkeypatch, changes):
    with_row(monkeypatch, "albert", **changes)
    with pytest.raises((AssertionError, ValueError)):
        assert differs(albert(embedding_size=64), **TYPES) < NEAR


def test_mutant_hidden_states_of_the_other_transformers(monkeypatch):
    monkeypatch.setattr(bert_types, "_collects", lambda _: not FOUR)
    with pytest.raises(AssertionError, match="hidden_states"):
        differs(albert(4, 2, 2))


# ---- roles ------------------------------------------------------------------------------------------------------------------


def attention(**values):
    return lambda m: vars(own_attention(m)).update(values)


def first_layer(m):
    own = m.base_model
    return own.transformer.layer[0] if hasattr(m, "distilbert") else own.encoder.albert_layer_groups[0].albert_layers[0]


def own_attention(m):
    return first_layer(m).attention


def act(m):
    own = first_layer(m).ffn if hasattr(m, "distilbert") else first_layer(m)
    del own.activation  # no function stands where a module was
    own.activation = torch.sin


def config(**values):
    return lambda m: vars(m.config).update(values)


def elsewhere(m):
    own = own_attention(m)
    own.config = copy.deepcopy(own.config)
    own.config._attn_implementation = "mine"


def shifted(m):
    m.base_model.embeddings.position_ids += 1


def typed(m):
    m.base_model.embeddings.token_type_ids += 1


def half_a_pooler(m):
    m.albert.pooler_activation = None


def emptied(m):
    m.albert.encoder.albert_layer_groups[0].albert_layers = torch.nn.ModuleList()


# model type -> attribute -> what is done to it
CASES = {
    "distilbert": {
        "attention_head_size": attention(attention_head_size=0),
        "n_heads": attention(n_heads=2, dim=32),
        "dim": attention(dim=32),
        "scaling": attention(scaling=0.3),
        "is_causal": attention(is_causal=True),
        "config._attn_implementation": elsewhere,
        "activation": act,
        "position_ids": shifted,
    },
    "albert": {
        "attention_head_size": attention(attention_head_size=0),
        "num_attention_heads": attention(num_attention_heads=2),
        "scaling": attention(scaling=0.3),
        "is_causal": attention(is_causal=True),
        "activation": act,
        "position_ids": shifted,
        "token_type_ids": typed,
        "config.num_hidden_layers": config(num_hidden_layers=0),
        "config.num_hidden_groups": config(num_hidden_groups=1),
        "albert_layers": emptied,
        "pooler_activation": half_a_pooler,
    },
}
EVERY = [(family, attribute) for family, cases in CASES.items() for attribute in cases]
# Lines of bert_roles.py for what these models lack, or of what test_hf.py changes.
SHARED = {"config.is_decoder", "config.add_cross_attention", "config.is_causal", "config.position_embedding_type"}
SHARED |= {"position_embedding_type", "is_decoder", "config._attn_implementation"}


@pytest.mark.parametrize("family", CASES)
def test_every_line_has_a_case(family):
    lines = {
        line.attribute
        for role in bert.roles_of(tiny(family)).values()
        if any(".modeling_" in name for name in role.classes)
        for line in role.assumes
    }
    assert lines - SHARED == set(CASES[family]) - SHARED


def refusal(model):
    with pytest.raises(rk.PatchError) as error:
        rk.patch(model)
    return str(error.value)


def refuses(family, attribute):
    model = tiny(family, attn_implementation="sdpa")
    CASES[family][attribute](model)
    assert f"({attribute} must be " in refusal(model)


@pytest.mark.parametrize("family, attribute", EVERY)
def test_refused(family, attribute):
    refuses(family, attribute)


@pytest.mark.parametrize("family, attribute", EVERY)
def test_mutant_a_line_is_missing(monkeypatch, family, attribute):
    honest = bert._roles

    def without(*names):
        return {
            path: dataclasses.replace(role, assumes=tuple(line for line in role.assumes if line.attribute != attribute))
            for path, role in honest(*names).items()
        }

    monkeypatch.setattr(bert, "_roles", without)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        refuses(family, attribute)


@pytest.mark.parametrize("family, attribute", EVERY)
def test_what_changes_after_patch_is_seen_at_the_next_call(family, attribute):
    model = tiny(family, attn_implementation="sdpa")
    rk.patch(model)
    with registry.use("cpu"):
        want = model(**BATCH).logits
        CASES[family][attribute](model)
        with pytest.raises(rk.PatchError, match=rf"{attribute.replace('.', '[.]')} must be .*rk\.unpatch\(model\)"):
            model(**BATCH)
        fresh = tiny(family, attn_implementation="sdpa")
        rk.patch(fresh)
        assert torch.equal(fresh(**BATCH).logits, want)


@pytest.mark.skipif(FOUR, reason="transformers 4 has no such choice")
@pytest.mark.parametrize("family", PRE_NORM)
def test_a_last_hidden_state_that_is_not_normed(family):
    model = tiny(family)
    model.config.tie_last_hidden_states = False
    assert "config.tie_last_hidden_states must be True, or left out, got False" in refusal(model)
    model.config.tie_last_hidden_states = True
    rk.patch(model)


def test_a_classifier_without_its_pooler():
    model = tiny("albert")
    model.albert.pooler = model.albert.pooler_activation = None
    assert "albert.pooler is missing" in refusal(model)
