"""ModernBERT: what it does otherwise than BERT, against stock in float64; a mutant beside each, and a case for each role."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import lora
import models
import rerank_kernels as rk
from conftest import ran
from models import HALF, padded, rows, tiny
from rerank_kernels.backend import registry
from rerank_kernels.models import heads, roles
from rerank_kernels.models import modernbert as module
from rerank_kernels.models import modernbert_roles as table
from rerank_kernels.models.registry import packed_embeddings, packed_logits

LENGTHS = (7, 1, 130, 2 * HALF, 64, 2 * HALF + 2, 65)  # below, at and above a window
OLD = "sliding_window_mask" in module.packing._signature(type(tiny("modernbert", head=False))).parameters  # before 5.1


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def made(**changes):
    """Four layers: the first and the third see all tokens."""
    return tiny("modernbert", **({"num_hidden_layers": 4, "num_labels": 3} | changes))


def near_truth(model, bound=2e-5, **how):
    """The logits of a patched model, after comparing them with stock's in float64."""
    batch = padded(rows(LENGTHS), 1, **how)
    truth = copy.deepcopy(model).double()(**batch).logits
    rk.patch(model)
    got = model(**batch).logits
    assert truth.std() > 0.1, "the model does not tell these inputs apart: the comparison would be empty"
    assert (got - truth).abs().max() < bound, f"{(got - truth).abs().max():.1e} from float64"
    return got


def same(a, b, what=""):
    assert torch.equal(a.view(torch.int32), b.view(torch.int32)), f"{what}: differs"


def mutated(said="from float64", **changes):
    model = made(**changes)
    with pytest.raises(AssertionError, match=said):
        near_truth(model)


# ---- what it computes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("biased", [False, True])
def test_heads_and_biases(pooling, biased):
    names = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
    near_truth(made(classifier_pooling=pooling, **dict.fromkeys(names, biased)))


@pytest.mark.parametrize("acts", [("silu", "tanh"), ("gelu_new", "relu"), ("relu", "silu")])
def test_activations(acts):
    near_truth(made(hidden_activation=acts[0], classifier_activation=acts[1]))


@pytest.mark.parametrize("attention", [0, 1, 2, 3, 33, 128, 1000])
def test_windows(attention):
    """Half of it on each side, itself aside; the odd one counts for nothing."""
    near_truth(made(local_attention=attention))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_stock_under_each_attn_implementation(implementation):
    """Beyond a window stock's eager attention divides 0 by 0 at padding, so there is none here."""
    model, (ids,) = made(attn_implementation=implementation), rows((90,))
    truth = copy.deepcopy(model).double()(input_ids=ids[None]).logits
    rk.patch(model)
    assert (model(input_ids=ids[None]).logits - truth).abs().max() < 2e-5


@pytest.mark.parametrize("first, second", [(160000.0, 10000.0), (10.0, 500.0)])
def test_each_kind_of_layer_has_its_angles(first, second):
    near_truth(made(global_rope_theta=first, local_rope_theta=second))


SCALED = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.skipif(OLD, reason="transformers before 5.1 reads rope_scaling for some layers alone")
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_angles(kind):
    said = {
        "full_attention": {"rope_type": kind, "rope_theta": 100.0, **SCALED[kind]},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
    }
    near_truth(made(rope_parameters=said))


def test_the_shape_of_the_real_one():
    """The base model's width, heads, windows and thetas; 8 of its 22 layers, and a short vocabulary."""
    sizes = dict(hidden_size=768, num_attention_heads=12, intermediate_size=1152, num_hidden_layers=8, local_attention=128)
    model = made(
        **sizes, max_position_embeddings=8192, global_attn_every_n_layers=3, classifier_pooling="mean", vocab_size=1000
    )
    for name, p in model.named_parameters():
        if not models.is_norm(name):
            p.mul_(0.2)  # drawn for a width of 64
    batch = padded(rows((170, 20)), 1)
    truth, stock = copy.deepcopy(model).double()(**batch).logits, model(**batch).logits
    rk.patch(model)
    got = model(**batch).logits
    assert truth.std() > 0.1
    assert (got - truth).abs().max() < 2e-6 + 2 * (stock - truth).abs().max()


def test_padding_on_the_left_is_none():
    """Stock pools the first place, which is padding then; ours the first token."""
    model = made()
    right = near_truth(model)
    same(model(**padded(rows(LENGTHS), 1, left=True, to=139)).logits, right, "left")
    stock = copy.deepcopy(model)
    rk.unpatch(stock)
    assert (stock(**padded(rows(LENGTHS), 1, left=True, to=139)).logits - right).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_how_many_tokens_at_once(dtype, monkeypatch):
    model, batch = made(dtype=dtype), padded(rows(LENGTHS), 1)
    rk.patch(model)
    want, seen = model(**batch).logits, []
    honest = module.activation
    monkeypatch.setattr(module, "activation", lambda x, act, up: (seen.append(len(x)), honest(x, act, up=up))[1])
    for most in (100, 7):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", most)
        seen.clear()
        same(model(**batch).logits, want, f"{most} tokens at once")
        assert max(seen) == most and len(seen) == 4 * -(-sum(LENGTHS) // most)


def test_mean_and_first_embeddings():
    model, sequences = made().model, rows(LENGTHS)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    truth = [copy.deepcopy(model).double()(input_ids=s[None]).last_hidden_state[0] for s in sequences]
    rk.patch(model)
    for pooling, wanted in (("mean", [t.mean(0) for t in truth]), ("cls", [t[0] for t in truth])):
        got = packed_embeddings(model, torch.cat(sequences), cu, pooling=pooling)
        assert (got - nn.functional.normalize(torch.stack(wanted))).abs().max() < 1e-5


def test_adapters():
    names = ("Wqkv", "Wo", "Wi", "dense")
    for saves in (True, False):
        model = lora.adapted(made(), names if saves else (*names, "classifier"), saves=saves)
        batch = padded(rows(LENGTHS), 1)
        truth, plain = copy.deepcopy(model).double()(**batch).logits, copy.deepcopy(model)
        plain.disable()
        rk.patch(model), rk.patch(plain)
        got = model(**batch).logits
        assert (got - truth).abs().max() < 5e-5 and (plain(**batch).logits - truth).abs().max() > 1e-2
        same(torch.cat([model(input_ids=s[None]).logits for s in rows(LENGTHS)]), got, "alone")


def test_a_wrapped_head():
    """PEFT's modules_to_save may name the head, too."""
    model = made()
    wrapper = lora.ModulesToSaveWrapper(model.head)
    wrapper.modules_to_save["default"] = copy.deepcopy(model.head)
    wrapper.modules_to_save["default"].dense.weight.mul_(0.5)
    wrapper.active_adapters = ["default"]
    model.head = wrapper.eval()
    near_truth(model)


# ---- through a Reranker -----------------------------------------------------------------------------------------------------


def test_a_reranker_that_pools_means(tmp_path):
    """As gte-reranker-modernbert-base is: one label, mean pooling, no token types."""
    folder = models.save_cross_encoder(tmp_path, "modernbert", classifier_pooling="mean")
    reranker = rk.Reranker(folder)
    reranker.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # as it is where nobody sets it
    assert reranker.model.config._attn_implementation == "sdpa", "FlashAttention of transformers 4 is not served"
    stock = copy.deepcopy(reranker.model)
    rk.unpatch(stock)
    pairs = [("the capital", text) for text in models.CORPUS]
    ids = [reranker.tokenizer(*pair, return_tensors="pt")["input_ids"] for pair in pairs]
    truth = [stock.double()(input_ids=one).logits.item() for one in ids]
    assert (torch.from_numpy(reranker.score(pairs).logit) - torch.tensor(truth)).abs().max() < 2e-5
    if not OLD:
        batch = reranker.tokenizer(*pairs[1], return_tensors="pt")
        with pytest.raises(ValueError, match=r"leave them out: tokenizer\.model_input_names = \['input_ids', 'att"):
            reranker.model(**batch)
        reranker.tokenizer.model_input_names = ["input_ids", "attention_mask"]
        reranker.model(**reranker.tokenizer(*pairs[1], return_tensors="pt"))


# ---- mutants ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [(-1, 0), (1, 0), (0, -1), (0, 1), (1, 1)])
def test_mutant_a_window_off_by_one(monkeypatch, by):
    honest = module.window_of
    wrong = lambda layer: None if (w := honest(layer)) is None else (w[0] + by[0], w[1] + by[1])  # noqa: E731
    monkeypatch.setattr(module, "window_of", wrong)
    mutated()


def test_mutant_every_layer_has_a_window(monkeypatch):
    monkeypatch.setattr(module, "window_of", lambda layer: (HALF, HALF))
    mutated()


def test_mutant_thetas_exchanged(monkeypatch):
    """Whatever is read of a layer, the roles compare with what stock would turn by; so the mutant is behind them."""
    honest = module._by_layer

    def exchanged(encoder, tables):
        turned = honest(encoder, tables)
        other = [*turned[1:], turned[-2]]  # the layers alternate
        return [t._replace(angles=o.angles) for t, o in zip(turned, other, strict=True)]

    monkeypatch.setattr(module, "_by_layer", exchanged)
    mutated(global_rope_theta=1000.0, local_rope_theta=10.0)


def test_mutant_halves_of_the_gated_layer_exchanged(monkeypatch):
    monkeypatch.setattr(module, "activation", lambda x, act, up: rk.activation(up, act, up=x))
    mutated()


def test_mutant_the_first_layers_input_is_normed(monkeypatch):
    """Which changes nothing where the embeddings' norm has no weight of its own: here it has."""
    honest = module.name_of
    monkeypatch.setattr(module, "name_of", lambda m: "" if isinstance(m, nn.Identity) else honest(m))
    monkeypatch.setattr(
        module, "norm", lambda m, x: rk.layer_norm(x, torch.ones(64)) if isinstance(m, nn.Identity) else heads.norm(m, x)
    )
    mutated()


def test_mutant_keys_and_values_exchanged(monkeypatch):
    monkeypatch.setattr(module, "attention", lambda q, k, v, **how: rk.attention(q, v, k, **how))
    mutated()


def test_mutant_no_last_norm(monkeypatch):
    honest = module.norm
    monkeypatch.setattr(module, "norm", lambda m, x: x if m is at else honest(m, x))
    model = made(norm_bias=True, classifier_pooling="mean")
    at = model.model.final_norm
    with pytest.raises(AssertionError, match="from float64"):
        near_truth(model)


def test_mutant_padding_counts_in_a_mean(monkeypatch):
    honest, width = heads.pool, max(LENGTHS)

    def over_places(x, mode, *, cu_seqlens, **how):
        lengths = torch.tensor(cu_seqlens.lengths)[:, None]
        return honest(x, mode, cu_seqlens=cu_seqlens, **how) * lengths / width

    monkeypatch.setattr(heads, "pool", over_places)
    mutated(classifier_pooling="mean")


def test_mutant_a_head_without_its_norm(monkeypatch):
    monkeypatch.setattr(heads, "norm", lambda m, x: x)
    mutated()


def test_mutant_the_pooling_is_not_read(monkeypatch):
    honest = heads.pool
    monkeypatch.setattr(heads, "pool", lambda x, mode, **how: honest(x, "cls", **how))
    mutated(classifier_pooling="mean")


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_arguments_that_it_would_have_to_ignore():
    model = made()
    rk.patch(model)
    batch = padded(rows((9, 5)), 1)
    want = model(**batch).logits
    types = torch.zeros_like(batch["input_ids"])
    if not OLD:  # there a forward that takes no such argument says so
        said = r"Classification\.forward: token_type_ids are not served, a ModernBertModel has no token types; leave them out"
        with pytest.raises(ValueError, match=said):
            model(**batch, token_type_ids=types)
    else:
        with pytest.raises(ValueError, match=r"sliding_window_mask is not served by a patched model; leave it out"):
            model(**batch, sliding_window_mask=types)
    flat, cu = torch.cat(rows((9, 5))), torch.tensor([0, 9, 14], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"ModernBertModel: token_types are not served, .* leave them out"):
        packed_logits(model, flat, cu, torch.zeros_like(flat))
    same(packed_logits(model, flat, cu).logit, want, "without them")
    with pytest.raises(TypeError, match=r"ModernBertModel: position_ids must be int64 or int32, got torch\.float32"):
        model(**batch, position_ids=torch.arange(9.0)[None])
    same(model(**batch, position_ids=torch.arange(9, dtype=torch.int32)[None]).logits, want, "counted")
    with pytest.raises(ValueError, match=r"position_ids must be at least 0, got -1"):
        model(**batch, position_ids=torch.arange(-1, 8)[None])
    with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor, got dict"):
        model(batch["input_ids"], attention_mask={"full_attention": types})


def test_a_sequence_longer_than_config_says():
    model = made()
    rk.patch(model)
    most = models.POSITIONS
    with pytest.raises(ValueError, match=rf"at most {most} tokens a sequence, .* got {most + 1}; tokenise with trunc"):
        model(rows((most + 1,))[0][None])
    model(rows((most,))[0][None])


def own(**values):
    return lambda m: [setattr(m.model.layers[1].attn, name, value) for name, value in values.items()]


def configured(**values):
    """Of one attention, whose config is another then."""

    def change(m):
        attention = m.model.layers[1].attn
        attention.config = copy.deepcopy(m.config)
        vars(attention.config).update(values)

    return change


def pooled(mode):
    return lambda m: vars(m.config).update(classifier_pooling=mode)


def angles(m):
    return m.model.rotary_emb if hasattr(m.model, "rotary_emb") else m.model.layers[1].attn.rotary_emb


def turned(**values):
    return lambda m: vars(angles(m)).update(values)


def buffer(name):
    def change(m):
        setattr(angles(m), name, getattr(angles(m), name) * 1.01)  # transformers 4 has two names for one tensor

    return change


def acting(m):
    delattr(m.model.layers[0].mlp, "act")  # no function stands where a module was
    m.model.layers[0].mlp.act = torch.sin


SLIDING_LINEAR = {"sliding_attention": "linear"} if hasattr(made().model, "rotary_emb") else "linear"
# attribute of a line of modernbert_roles.py -> what is done to a model
LINES = {
    "config._attn_implementation": configured(_attn_implementation_internal="mine"),
    "head_dim": own(head_dim=8),
    "config.num_attention_heads": configured(num_attention_heads=8, hidden_size=128),
    "config.local_attention": configured(local_attention=-4),
    "config.classifier_pooling": pooled("max"),
    "act": acting,
    "rope_type": turned(rope_type=SLIDING_LINEAR),
}
NAMES = ("inv_freq", "original_inv_freq", "attention_scaling")
if OLD:
    LINES |= {"local_attention": own(local_attention=(HALF, HALF + 1))}
if hasattr(made().model.layers[1].attn, "sliding_window"):
    LINES |= {"sliding_window": own(sliding_window=HALF), "is_causal": own(is_causal=True)}
if hasattr(made().model.layers[1], "attention_type"):
    LINES |= {"attention_type": lambda m: setattr(m.model.layers[1], "attention_type", "full_attention")}
for kind in ("full_attention_", "sliding_attention_") if hasattr(made().model, "rotary_emb") else ("",):
    LINES |= {f"{kind}{name}": turned(**{kind + name: 1.1}) if "scal" in name else buffer(kind + name) for name in NAMES}


def stated():
    """The attributes that modernbert_roles.py has lines about, and that this version of transformers has."""
    model, found = made(), set()
    for _, _, m, role in roles.places(model, module.roles_of(model)):
        if m is not None and any(".modeling_" in name for name in role.classes):
            found |= {a.attribute for a in role.assumes if hasattr(m, a.attribute.partition(".")[0])}
    return found


def test_every_line_has_a_case():
    assert stated() == set(LINES)


def refused(attribute):
    for late in (False, True):
        model = made()
        if late:
            rk.patch(model)
            model(**padded(rows((4,)), 1))
        LINES[attribute](model)
        with pytest.raises(rk.PatchError, match=rf"(\(|: ){attribute} must be "):
            model(**padded(rows((4,)), 1)) if late else rk.patch(model)


@pytest.mark.parametrize("attribute", LINES)
def test_what_stock_would_compute_otherwise_is_refused(attribute):
    refused(attribute)


@pytest.mark.parametrize("attribute", LINES)
def test_mutant_a_line_is_missing(attribute, monkeypatch):
    honest = table.classifier()
    without = {
        path: dataclasses.replace(role, assumes=tuple(line for line in role.assumes if line.attribute != attribute))
        for path, role in honest.items()
    }
    monkeypatch.setattr(table, "classifier", lambda: without)
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError, TypeError, ValueError, RuntimeError)):
        refused(attribute)


OURS = hasattr(made().model, "rotary_emb")  # since transformers 5 one for all layers
PARTS = {
    "embeddings": (lambda m: setattr(m.model.embeddings.tok_embeddings, "max_norm", 1.0), r"max_norm must be None, got 1"),
    "norm": (lambda m: setattr(m.model, "final_norm", nn.LayerNorm(32)), r"weight must be \[64\].* got \[32\]"),
    "no norm": (lambda m: setattr(m.model, "final_norm", nn.Identity()), r"Identity \(LayerNorm must stand here"),
    "head's act": (lambda m: setattr(m.head, "act", nn.Softplus()), r"ModernBertPredictionHead \(act must be an activation"),
    "dropout": (lambda m: m.model.layers[1].mlp.drop.train(), r"is set to train, and drops 0\.5 at random; call model\.eval"),
    "rope": (
        lambda m: setattr(m.model if OURS else m.model.layers[1].attn, "rotary_emb", None),
        r"no rotary_emb that says what its angles are",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_another_is_refused(part):
    change, said = PARTS[part]
    model = made(mlp_dropout=0.5)
    change(model)
    with pytest.raises(rk.PatchError, match=said):
        rk.patch(model)


@pytest.mark.skipif(not OLD, reason="since transformers 5.1 it reads its angles from the same place")
def test_flash_attention_of_transformers_4_is_refused_and_the_advice_works():
    model = made()
    model.config._attn_implementation_internal = "flash_attention_2"
    said = r"its angles are FlashAttention's, which are not served; load it with attn_implementation='sdpa'"
    with pytest.raises(rk.PatchError, match=said):
        rk.patch(model)
    rk.patch(made(attn_implementation="sdpa"))


@pytest.mark.skipif(not OLD, reason="a table of transformers 4 and 5.0")
def test_another_attention_of_transformers_4_is_refused(monkeypatch):
    import transformers.models.modernbert.modeling_modernbert as stock

    monkeypatch.setitem(stock.MODERNBERT_ATTENTION_FUNCTION, "sdpa", lambda *a, **k: None)
    with pytest.raises(rk.PatchError, match=r"an attention of MODERNBERT_ATTENTION_FUNCTION is not transformers' own"):
        rk.patch(made())


@pytest.mark.skipif(OLD, reason="since transformers 5.1 it calls functions of its file")
@pytest.mark.parametrize("name", ["create_bidirectional_sliding_window_mask", "create_bidirectional_mask", "rotate_half"])
def test_another_function_of_its_file_is_refused(monkeypatch, name):
    import transformers.models.modernbert.modeling_modernbert as stock

    monkeypatch.setattr(stock, name, lambda *a, **k: None)
    with pytest.raises(rk.PatchError, match=r"with the functions of its file"):
        rk.patch(made())


def test_other_heads_of_it_are_refused():
    import transformers as tf

    model = tf.ModernBertForTokenClassification(models.config("modernbert")).eval()
    with pytest.raises(rk.PatchError, match="ModernBertForTokenClassification"):
        rk.patch(model)
    rk.patch(model.model)  # its encoder is served


@pytest.mark.skipif(OLD, reason="transformers before 5.1 reads rope_scaling for some layers alone")
def test_angles_that_depend_on_the_length(monkeypatch):
    """A sequence's own length decides, not the longest of the batch; no graph holds that, and one call of it is right."""
    long = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 3.0, "original_max_position_embeddings": 40}
    long |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = made(rope_parameters={"full_attention": long, "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}})
    truth = [copy.deepcopy(model).double()(input_ids=s[None]).logits for s in rows(LENGTHS)]
    rk.patch(model)
    got = model(**padded(rows(LENGTHS), 1)).logits
    assert (got - torch.cat(truth)).abs().max() < 2e-5
    same(torch.cat([model(input_ids=s[None]).logits for s in rows(LENGTHS)]), got, "alone")
    assert module.no_graph(model) == "angles that depend on a sequence's length" and module.no_graph(made()) is None
