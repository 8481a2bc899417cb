"""lora: a model with LoRA's adapters gives PEFT's answer, the same bits in every batch, whichever adapters are active.

PEFT's own classes are those of lora.py. The truth is their forward in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora
import rerank_kernels as rk
from models import BERTS, PAD, decoder, padded, rows, tiny
from rerank_kernels.models import lora as served
from rerank_kernels.models.bound import Forward
from rerank_kernels.models.registry import packed_answers

LENGTHS = (7, 1, 70, 23, 64)
BOUND = {torch.float32: 5e-6, torch.float16: 8e-3, torch.bfloat16: 8e-2}
TARGETS = {"two": ("query", "value"), "all": ("query", "key", "value", "dense", "out_proj", "classifier")}


def answers_as_peft(family, targets, dtype=torch.float32, saves=True, switch=lambda model: None):
    model = lora.adapted(tiny(family, num_labels=2), targets, saves=saves).to(dtype)
    rk.patch(model)
    switch(model)
    batch = padded(rows(LENGTHS), PAD[family])
    twin = copy.deepcopy(model)
    rk.unpatch(twin)
    with torch.no_grad():
        truth = twin.double()(**batch).logits
    got = model(**batch).logits
    assert truth.std() > 0.1 and got.dtype == torch.float32
    assert (got - truth).abs().max() < BOUND[dtype], "differs from PEFT's"
    for what, other in {
        "alone": torch.cat([model(input_ids=s[None]).logits for s in rows(LENGTHS)]),
        "left": model(**padded(rows(LENGTHS), PAD[family], left=True, to=90)).logits,
        "inside": model.base_model.model(**batch).logits,
    }.items():
        assert torch.equal(got.view(torch.int32), other.view(torch.int32)), f"{what}: differs"
    return got


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "electra"])
def test_adapters(family, targets, dtype):
    answers_as_peft(family, TARGETS[targets], dtype)


@pytest.mark.parametrize("family", BERTS)
def test_adapters_in_the_head(family):
    answers_as_peft(family, TARGETS["all"], saves=False)


EVERY = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("act", ["silu", "relu"])
@pytest.mark.parametrize("targets, saves", [(("q_proj", "v_proj"), True), ((*EVERY, "score"), False)], ids=["two", "all"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_adapters_in_a_decoder(kind, targets, saves, act):
    model = lora.adapted(decoder(kind, cls="ForSequenceClassification", num_labels=2, hidden_act=act), targets, saves=saves)
    batch = padded(rows(LENGTHS), model.base_model.model.config.pad_token_id)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**batch).logits
    plain = copy.deepcopy(model)
    plain.disable()
    rk.patch(plain)
    rk.patch(model)
    got = model(**batch).logits
    assert (got - truth).abs().max() < 2e-5 and (plain(**batch).logits - truth).abs().max() > 1e-2
    alone = torch.cat([model(input_ids=s[None]).logits for s in rows(LENGTHS)])
    assert torch.equal(got.view(torch.int32), alone.view(torch.int32))


def test_adapters_in_a_decoder_with_words():
    model = lora.adapted(decoder("llama", cls="ForCausalLM"), (*EVERY, "lm_head"), saves=False)
    batch = padded(rows(LENGTHS), model.base_model.model.config.pad_token_id)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**batch).logits
    rk.patch(model)
    kept = batch["attention_mask"].bool()
    assert (model(**batch).logits - truth)[kept].abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # the second caps its logits
def test_adapters_of_the_words_that_answer(kind):
    model = lora.adapted(decoder(kind), ("lm_head",), saves=False)
    inner, ids = model.base_model.model, rows((9, 17))
    with torch.no_grad():
        want = torch.stack([inner.double()(s[None]).logits[0, -1, [7, 9]] for s in ids])
        rk.patch(inner.float())
        cu = torch.tensor([0, 9, 26], dtype=torch.int32)
        for no, wanted in ((None, want[:, 0]), (9, want[:, 0] - want[:, 1])):
            logit = packed_answers(inner, torch.cat(ids), cu, 7, no).logit[:, 0]
            torch.testing.assert_close(logit.double(), wanted, atol=1e-4, rtol=0)
            alone = packed_answers(inner, ids[1], torch.tensor([0, 17], dtype=torch.int32), 7, no).logit[0, 0]
            assert alone == logit[1]


def merged(model):
    model.merge_adapter()


SWITCHES = {
    "another": lambda model: model.set_adapter("other"),
    "none": lambda model: model.set_adapter(),
    "disabled": lambda model: model.disable(),
    "enabled again": lambda model: (model.disable(), model.disable(False)),
    "merged": merged,
    "unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "no such adapter": lambda model: [
        setattr(m, "active_adapters", ["elsewhere"]) for m in model.layers() if hasattr(m, "lora_A")
    ],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_switched_after_patch(switch):
    got = answers_as_peft("bert", TARGETS["two"], switch=SWITCHES[switch])
    before = answers_as_peft("bert", TARGETS["two"])
    assert ((got - before).abs().max() < 1e-4) == (switch in ("enabled again", "merged", "unmerged"))


def test_two_adapters_at_once():
    model = lora.adapted(tiny("bert"), saves=False)
    model.set_adapter("default", "other")
    answers = []
    for names in (("default", "other"), ("other", "default")):
        model.set_adapter(*names)
        rk.patch(model)
        answers.append(model(**padded(rows(LENGTHS), 0)).logits)
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)


def written_out(m, x):
    """NUMERICS.md, "A LoRA layer", of public ops."""
    z = rk.linear(x, m.base_layer.weight, m.base_layer.bias, out_dtype=torch.float32)
    for name in m.active_adapters:
        low = rk.linear(x, m.lora_A[name].weight, out_dtype=torch.float32)
        z = z + rk.linear(low, m.lora_B[name].weight, out_dtype=torch.float32) * m.scaling[name]
    return rk.activation(z, "gelu").to(x.dtype)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_a_layer_is_the_stated_expression(dtype):
    draw = torch.Generator().manual_seed(1)
    m = lora.Linear(nn.Linear(70, 33).to(dtype)).eval()
    m.add("one", 4, 9.0, draw)
    m.add("two", 3, 5.0, draw)
    m.eval()
    m.active_adapters = ["two", "one"]
    x = torch.randn(19, 70, generator=draw).to(dtype)
    with torch.no_grad():
        got, want = served.product(m, x, "gelu"), written_out(m, x)
    assert got.dtype == dtype and torch.equal(got, want)


def test_a_leaf_is_no_linear():
    """LoRA's layer has a weight, that of its base: a forward that asks for no class would leave the adapters out."""
    layer = lora.Linear(nn.Linear(4, 4))
    with pytest.raises(rk.PatchError, match=r"Linear \(served only inside its whole model\)"):
        rk.patch(nn.Sequential(layer))


# ---- refused ----------------------------------------------------------------------------------------------------------------


class Variant:
    pass


def dora(model):
    first(model).lora_variant["default"] = Variant()


def old_dora(model):
    first(model).use_dora["default"] = True


def transposed(model):
    first(model).fan_in_fan_out = True


def quantised(model):
    first(model).base_layer = type("Linear4bit", (nn.Linear,), {})(64, 64)


def odd(model):
    first(model).lora_A["default"] = type("Other", (nn.Linear,), {})(64, 4, bias=False)


def training(model):
    first(model).lora_dropout["default"].train()


def hooked(model):
    first(model).lora_A["default"].register_forward_hook(lambda *_: None)


def own_forward(model):
    first(model).base_layer.forward = torch.sin


def both(model):
    model.merge_adapter()
    model.disable()


def first(model):
    return next(m for m in model.layers() if isinstance(m, lora.Linear))


MERGE = r"merge it first: model = peft_model\.merge_and_unload\(\), then rk\.patch\(model\)"
REFUSED = {
    dora: rf"adapter 'default' is no plain LoRA \(Variant\); {MERGE}",
    old_dora: rf"adapter 'default' is no plain LoRA \(DoRA\); {MERGE}",
    transposed: rf"fan_in_fan_out is set; {MERGE}",
    quantised: rf"its base_layer is a [\w.]+Linear4bit; {MERGE}",
    odd: rf"adapter 'default' holds a [\w.]+Other; {MERGE}",
    training: r"the dropout of adapter 'default' is set to train; call model\.eval\(\)",
    hooked: "has forward hooks|has hooks or a forward of its own",
    own_forward: "has a forward of its own|has hooks or a forward of its own",
    both: r"its adapters are disabled and merged, .* call unmerge_adapter\(\) first",
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_is_no_plain_lora_is_refused(change, moment):
    model = lora.adapted(tiny("bert"))
    if moment == "before":
        change(model)
        with pytest.raises(rk.PatchError, match=REFUSED[change]) as error:
            rk.patch(model)
        assert str(error.value).startswith("patch: PEFT PeftModelForSequenceClassification, base_model.model: BertFor")
        assert not any(isinstance(vars(m).get("forward"), Forward) for m in model.modules())
    else:
        rk.patch(model)
        change(model)
        with pytest.raises(rk.PatchError, match=REFUSED[change]):
            model(**padded(rows(LENGTHS), 0))


def test_the_advice_works():
    model = lora.adapted(tiny("bert"))
    dora(model)
    batch = padded(rows(LENGTHS), 0)
    with torch.no_grad():
        stock = model(**batch).logits
    with pytest.raises(rk.PatchError, match="merge_and_unload"):
        rk.patch(model)
    merged = model.merge_and_unload()
    rk.patch(merged)
    torch.testing.assert_close(merged(**batch).logits, stock, rtol=0, atol=1e-5)
    model = lora.adapted(tiny("bert"))
    training(model)
    rk.patch(model.eval())
    both(model)
    model.unmerge_adapter()
    model(**batch)


@lora.of("peft.tuners.ia3.layer")
class IA3(nn.Linear):
    pass


IA3.__qualname__ = IA3.__name__ = "Linear"


def test_a_wrapper_is_read_around_a_head_alone():
    """Inside, a forward would take it for the layer that it holds: refused before the first call, and after patch() too."""
    model = tiny("bert")
    own = model.bert.encoder.layer[0].attention.self
    plain, own.query = own.query, lora.ModulesToSaveWrapper(own.query)
    with pytest.raises(rk.PatchError, match=r"ModulesToSaveWrapper \(Linear must stand here\) at bert\.\S+\.query"):
        rk.patch(model)
    wrapper, own.query = own.query, plain
    rk.patch(model)
    own.query = wrapper
    with pytest.raises(rk.PatchError, match=r"self\.query \(ModulesToSaveWrapper\): Linear must stand here"):
        model(**padded(rows((5,)), 0))


def test_other_adapters_are_refused_by_their_whole_name():
    model = tiny("bert")
    model.bert.encoder.layer[0].output.dense = IA3(96, 64)
    with pytest.raises(rk.PatchError, match=rf"Linear \(peft\.tuners\.ia3\.layer\.Linear is not served; {MERGE}\) at bert\."):
        rk.patch(model)
    prompt = lora.PeftModel(tiny("bert"))
    with pytest.raises(rk.PatchError, match="its adapter works on the tokens of a call, not in layers, and is not served"):
        rk.patch(prompt)
    model = lora.adapted(tiny("bert"))
    model.base_model.model.classifier.active_adapters = ["default", "other"]
    with pytest.raises(rk.PatchError, match=rf"ModulesToSaveWrapper \(several of its modules are active at once; {MERGE}\)"):
        rk.patch(model)


# ---- the tests can fail -----------------------------------------------------------------------------------------------------


def without_scaling(m, x, act=None, out_dtype=None, residual=None):
    kept, m.scaling = m.scaling, dict.fromkeys(m.scaling, 1.0)
    try:
        return HONEST(m, x, act, out_dtype, residual)
    finally:
        m.scaling = kept


def base_alone(m, x, act=None, out_dtype=None, residual=None):
    return rk.linear(x, m.weight, m.bias, activation=act, out_dtype=out_dtype)


def added_to_the_rounded(m, x, act=None, out_dtype=None, residual=None):
    """As stock's own: the base's product is rounded before the adapters are added."""
    y = rk.linear(x, m.weight, m.bias)
    for name in m.active_adapters:
        y = y + rk.linear(rk.linear(x, m.lora_A[name].weight), m.lora_B[name].weight) * m.scaling[name]
    return (y if act is None else rk.activation(y, act)).to(out_dtype or x.dtype)


HONEST = served.product


@pytest.mark.parametrize("mutant", [without_scaling, base_alone])
def test_a_wrong_product_is_caught(mutant, monkeypatch):
    monkeypatch.setattr(served, "product", mutant)
    with pytest.raises(AssertionError, match="differs from PEFT's"):
        answers_as_peft("bert", TARGETS["two"])


def test_another_rounding_is_caught(monkeypatch):
    monkeypatch.setattr(served, "product", added_to_the_rounded)
    with pytest.raises(AssertionError):
        test_a_layer_is_the_stated_expression(torch.bfloat16)


def test_a_head_that_is_not_the_adapter_s_is_caught(monkeypatch):
    monkeypatch.setattr(served, "held", lambda m: getattr(m, "original_module", m))
    with pytest.raises(AssertionError, match="differs from PEFT's"):
        answers_as_peft("bert", TARGETS["two"])
