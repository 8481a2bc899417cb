"""roles: what patch takes for granted of each module is in a table, and the advice of each refusal works."""

from __future__ import annotations

import copy
import functools
import time

import numpy as np
import pytest
import torch
from torch import nn

import rerank_kernels as rk
from models import FAMILIES, padded, rows, save_cross_encoder, tiny, tokenizer
from rerank_kernels.models import bert, roles
from rerank_kernels.models.bound import name_of, served_class
from rerank_kernels.models.fingerprint import Fingerprint
from rerank_kernels.models.packing import ready
from rerank_kernels.models.registry import ENCODERS, EXACT, FORWARDS, packed_embeddings, packed_logits
from surroundings import Adapter, Doubled, Named, Quantised, filled, layer

BATCH = padded(rows((7, 3)), 0)


def logits(model):
    return model(**BATCH).logits


def refused(model):
    with pytest.raises(rk.PatchError) as error:
        rk.patch(model)
    assert not any("forward" in m.__dict__ and hasattr(m.forward, "calls") for m in model.modules()), "nothing is patched"
    return str(error.value)


# ---- the table --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_has_a_role_and_every_role_a_module(family, head):
    model = tiny(family, head=head)
    there = {path: m for path, m in model.named_modules(remove_duplicate=False)}
    read = ENCODERS[name_of(model)].roles(model)
    named = {path: m for path, _, m, _ in roles.places(model, read) if m is not None}
    assert named == there
    assert roles.problems(model, read) == {}


def test_what_is_served_by_name_is_named_by_its_own_class():
    """served_class climbs from a subclass to what it is a subclass of, and never from a class that stands in a table."""
    import transformers

    for name in ("BertModel", "RobertaModel", "XLMRobertaForSequenceClassification", "BertForSequenceClassification"):
        assert name_of(object.__new__(getattr(transformers, name))) in ENCODERS
    for cls in (nn.Linear, nn.LayerNorm, nn.Softmax, nn.GELU, nn.Embedding, nn.Dropout, nn.Sequential, nn.ModuleList):
        assert served_class(cls) is cls and name_of(object.__new__(cls)) in (FORWARDS | dict.fromkeys(EXACT))


class Mixin:
    def describe(self):
        return "mixed in"


class Constructed(Mixin, nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)


class Wrapped(nn.Linear):
    @functools.wraps(nn.Linear.forward)
    def forward(self, x):
        return 2.0 * nn.Linear.forward(self, x)


class Calling(nn.Linear):
    def __call__(self, x):
        return 2.0 * super().__call__(x)


class Found(nn.Linear):
    def __getattr__(self, name):
        return 2.0 * super().__getattr__(name) if name == "weight" else super().__getattr__(name)


class Mixing(nn.Module):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Mixed(Mixing, nn.Linear):
    pass


class Later(nn.Linear, Mixing):
    pass


class Aware(nn.Linear):
    def _call_impl(self, x):
        return 2.0 * super()._call_impl(x)


@pytest.mark.parametrize("cls", [Named, Constructed])
def test_a_subclass_that_overrides_nothing_is_served_and_named(cls):
    module = filled(cls(8) if cls is Constructed else cls(8, 8))
    report = rk.patch(nn.Sequential(module, nn.Tanh()))
    assert report.replaced["0"] == cls.__name__
    assert report.notes == [
        f"0: {cls.__name__} overrides nothing that is read, and is served as torch.nn.modules.linear.Linear"
    ]
    assert f"note: 0: {cls.__name__} overrides nothing" in str(report)
    x = torch.randn(3, 8)
    assert torch.equal(module(x), rk.linear(x, module.weight, module.bias).detach())


@pytest.mark.parametrize("cls", [Doubled, Wrapped, Calling, Found, Mixed, Later, Aware])
def test_a_subclass_that_overrides_something_is_not(cls):
    assert served_class(cls) is cls
    module = filled(cls(8, 8))
    assert f"{cls.__name__} at (the model itself)" in refused(module)


def test_a_subclass_of_a_model_is_served_and_changed_later_it_is_not():
    cls = type(tiny("bert"))
    mine = type("Mine", (cls,), {"describe": lambda self: "mine"})
    model = tiny("bert")
    want = copy.deepcopy(model)
    rk.patch(want)
    model.__class__ = mine
    assert "the model: Mine overrides nothing that is read" in str(rk.patch(model))
    assert torch.equal(logits(model), logits(want))
    mine.forward = lambda self, *args, **kwargs: None
    with pytest.raises(rk.PatchError, match=r"has another forward in its class now.* call rk\.unpatch"):
        logits(model)
    rk.unpatch(model)
    assert model(**BATCH) is None
    assert "Mine" in refused(model)


# ---- the fingerprint --------------------------------------------------------------------------------------------------------


def test_a_call_looks_at_what_was_seen_and_checks_all_of_it_only_then(monkeypatch):
    model = tiny("bert")
    rk.patch(model)
    looked, honest = [], roles.places
    monkeypatch.setattr(roles, "places", lambda *args: (looked.append(1), honest(*args))[1])
    logits(model)
    once = len(looked)
    assert once, "the first call looks at all of it"
    logits(model)
    model.half().float().train()
    logits(model.eval())
    assert len(looked) == once, "weights may change, and come and go"
    layer(model).output.dense = filled(nn.Linear(96, 64))
    logits(model)
    assert len(looked) == 2 * once
    logits(model)
    assert len(looked) == 2 * once, "what was seen to be well is remembered"


def test_a_fingerprint_of_twelve_layers_takes_microseconds():
    """Around 30 of them on one core of 2024; the bound is for machines that do much else."""
    model = tiny("bert", num_hidden_layers=12)
    rk.patch(model)
    ready(model, bert.roles_of)
    seen, times = model.forward.seen, []
    assert isinstance(seen, Fingerprint) and len(seen.modules) == len(list(model.modules()))
    for _ in range(100):
        start = time.perf_counter()
        assert seen.same()
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-4


def test_the_packed_entries_see_it_too():
    model = tiny("bert")
    rk.patch(model)
    ids, cu = BATCH["input_ids"][0], torch.tensor([0, 7], dtype=torch.int32)
    want = packed_logits(model, ids, cu).logit
    layer(model).attention.self.scaling = 0.01
    for run in (lambda: packed_logits(model, ids, cu), lambda: packed_embeddings(model.bert, ids, cu)):
        with pytest.raises(
            rk.PatchError, match=r"layer\.1\.attention\.self .*: scaling must be attention_head_size \*\* -0\.5"
        ):
            run()
    layer(model).attention.self.scaling = 0.25
    assert torch.equal(packed_logits(model, ids, cu).logit, want)
    model.double()
    with pytest.raises(rk.PatchError, match=r"embeddings\.word_embeddings .* got torch\.float64; call model\.float\(\)"):
        packed_logits(model, ids, cu)
    assert torch.equal(packed_logits(model.float(), ids, cu).logit, want)


# ---- what is not strict -----------------------------------------------------------------------------------------------------


def test_not_strict_serves_the_encoder_below_a_head_that_is_not_known():
    model = tiny("bert")
    model.classifier = nn.Sequential(filled(nn.Linear(64, 8)), nn.ReLU(), filled(nn.Linear(8, 1)))
    with torch.no_grad():
        stock = logits(model)
    assert "Sequential (Linear must stand here) at classifier" in refused(model)
    report = rk.patch(model, strict=False)
    assert report.unknown["classifier"] == "Sequential (Linear must stand here)" and "bert" in report.forwards
    torch.testing.assert_close(logits(model), stock, rtol=0, atol=2e-5)
    assert report.calls()["bert"] == 1 and report.calls()["classifier.2"] == 1


# ---- leaves -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (lambda: nn.Linear(4, 4).double(), "Linear (weight must be float32, float16 or bfloat16, got torch.float64; call"),
        (lambda: nn.Linear(4, 4, device="meta"), "Linear (weight is on device meta"),
        (lambda: nn.LayerNorm(4).double(), "LayerNorm (weight must be float32"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "Embedding (max_norm must be None, got 1.0)"),
        (lambda: nn.Softmax(), "Softmax (dim must be a number, got None)"),
    ],
)  # fmt: skip
def test_a_leaf_that_cannot_be_served_is_refused(leaf, said):
    assert said in refused(nn.Sequential(leaf(), nn.Tanh()))


def test_a_leaf_of_another_class_by_now_is_refused():
    leaf, x = filled(nn.Linear(8, 8)), torch.ones(1, 8)
    rk.patch(leaf)
    want = leaf(x)
    leaf.__class__ = Doubled
    with pytest.raises(rk.PatchError, match=r"Linear\.forward: the module is of class Doubled now, .* call rk\.unpatch"):
        leaf(x)
    rk.unpatch(leaf)
    torch.testing.assert_close(leaf(x), want * 2.0)


def test_dropout_is_served_until_it_drops():
    model, x = nn.Sequential(filled(nn.Linear(8, 8)), nn.Dropout(0.5)).eval(), torch.ones(1, 8)
    report = rk.patch(model)
    assert report.exact["1"] == "Dropout" and report.calls() == {"0": 0, "1": 0}
    want = model(x)
    model[1].train()
    with pytest.raises(rk.PatchError, match=r"Dropout\.forward: it is set to train, and drops 0\.5 .* call model\.eval"):
        model(x)
    assert torch.equal(model.eval()(x), want)
    rk.unpatch(model.train())
    assert not torch.equal(model(x), model(x))


# ---- advice, tried ----------------------------------------------------------------------------------------------------------


def test_float64():
    model = tiny("bert").double()
    assert "weight must be float32, float16 or bfloat16, got torch.float64; call model.float()) x" in refused(model)
    rk.patch(model.float())
    logits(model)


def test_dropout_below_a_model_in_eval_mode():
    model = tiny("bert")
    model.dropout.train()
    assert "Dropout (is set to train, and drops 0.1 at random; call model.eval()) at dropout" in refused(model)
    rk.patch(model.eval())
    want = logits(model)
    layer(model).output.dropout.train()
    with pytest.raises(
        rk.PatchError, match=r"output\.dropout \(Dropout\) is set to train, .* call model\.eval\(\), or call rk\.unp"
    ):
        logits(model)
    assert torch.equal(logits(model.eval()), want)
    rk.unpatch(model)
    rk.patch(model.train())  # as a whole it may be in training when it is patched
    assert torch.equal(logits(model.eval()), want)


def test_quantised():
    model = tiny("bert")
    kept = [one.output.dense for one in model.bert.encoder.layer]
    for one in model.bert.encoder.layer:
        one.output.dense = Quantised(one.output.dense)
    said = refused(model)
    assert "Quantised (is quantised; load the float checkpoint of it, or call model.dequantize() where" in said

    def dequantize():
        for one, dense in zip(model.bert.encoder.layer, kept, strict=True):
            one.output.dense = dense

    model.dequantize = dequantize
    model.dequantize()
    rk.patch(model)
    logits(model)


def test_quantised_by_pytorch():
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    try:
        model = quantize(tiny("bert"), {nn.Linear}, dtype=torch.qint8)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"this PyTorch quantises nothing here: {error}")
    assert "torch.ao.nn.quantized.dynamic.modules.linear.Linear" in refused(model) or "Linear (is quantised;" in refused(model)


def test_an_adapter_is_named_by_its_package():
    """Its class is called Linear, and the message lists Linear among what is served."""
    model = tiny("bert")
    layer(model).attention.self.value = Adapter(layer(model).attention.self.value)
    assert "surroundings.Linear at bert.encoder.layer.1.attention.self.value\n" in refused(model)


def test_dispatched_by_accelerate():
    """A stand-in with the lines of accelerate.hooks that decide, and remove_hook_from_submodules likewise."""
    model = tiny("bert")
    for m in model.modules():
        m._old_forward, m._hf_hook = m.forward, "hook"
        m.forward = functools.partial(lambda m, *args, **kwargs: m._old_forward(*args, **kwargs), m)
    said = refused(model)
    assert (
        "is dispatched by accelerate" in said and "without device_map, or call accelerate.hooks.remove_hook_from_submod" in said
    )
    for m in model.modules():
        m.forward = m._old_forward
        del m._old_forward, m._hf_hook
        m.__dict__.pop("forward")
    rk.patch(model)
    logits(model)


def test_weights_that_are_not_in_memory(tmp_path):
    folder = save_cross_encoder(tmp_path, "bert")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    layer(model).to("meta")
    assert "weight is on device meta, where no values are; load the model without device_map" in refused(model)
    rk.patch(AutoModelForSequenceClassification.from_pretrained(folder).eval())


def test_weights_on_two_devices():
    model = tiny("bert")

    class Elsewhere:
        device = torch.device("cuda:1")

    names = dict(model.named_parameters())
    names["bert.encoder.layer.1.output.dense.bias"] = Elsewhere()
    model.named_parameters = lambda *args, **kwargs: iter(names.items())
    said = refused(model)
    assert "bias must be on cpu as bert.embeddings.word_embeddings.weight is, got cuda:1; move all of the model to one" in said
    assert said.count("bert.encoder.layer.1.output.dense") == 1


def test_heads_that_mode_tensor_does_not_take():
    model = tiny("bert", torch.float16, num_attention_heads=1, hidden_size=320)
    with pytest.raises(
        rk.PatchError, match=r"of at most 256, and attention_head_size of \S*layer\.0\S* is 320; take mode='port"
    ):
        rk.patch(model, mode="tensor")
    rk.patch(model)
    logits(model)


def test_masks_that_are_no_mask():
    model = tiny("bert")
    rk.patch(model)
    want = logits(model)
    with pytest.raises(
        TypeError, match=r"attention_mask must be a torch\.Tensor, got list; pass torch\.as_tensor\(attention_mask\)"
    ):
        model(BATCH["input_ids"], attention_mask=BATCH["attention_mask"].tolist())
    assert torch.equal(model(BATCH["input_ids"], attention_mask=torch.as_tensor(BATCH["attention_mask"].tolist())).logits, want)
    with pytest.raises(TypeError, match=r"input_ids must be a torch\.Tensor, got ndarray; pass torch\.as_tensor\(input_ids\)"):
        model(BATCH["input_ids"].numpy(), attention_mask=BATCH["attention_mask"])
    with pytest.raises(
        ValueError, match=r"got \[2, 7, 7\]; masks of one value per pair of tokens, such as causal ones, are not"
    ):
        model(BATCH["input_ids"], attention_mask=torch.ones(2, 7, 7))
    with pytest.raises(
        ValueError, match=r"attention_mask must be \[B, T\] = \[2, 7\], nonzero where a token is, got \[2, 6\]$"
    ):
        model(BATCH["input_ids"], attention_mask=torch.ones(2, 6))


def test_kind_is_seen_by_the_constructor():
    for head, kind, other in ((False, "cross-encoder", "embedding"), (True, "embedding", "cross-encoder")):
        model, own = tiny("bert", head=head), tokenizer("bert")
        with pytest.raises(
            ValueError, match=rf"Reranker: kind must be '{other}', or left out, for this model, got '{kind}'; its"
        ):
            rk.Reranker(model, own, kind=kind)
        assert "forward" not in model.__dict__, "nothing was changed"
        assert rk.Reranker(model, own, kind=other).kind == rk.Reranker(model, own).kind == other


@pytest.mark.parametrize("number", [np.int64(3), np.int8(3), torch.tensor(3)], ids=lambda n: type(n).__name__)
def test_numbers_are_whatever_is_an_integer(number, tmp_path):
    reranker = rk.Reranker(save_cross_encoder(tmp_path))
    pairs = [("Paris", "Bread"), ("Rome", "Berlin"), ("one", "two")]
    want = reranker.score(pairs)
    assert (reranker.score(pairs, batch_tokens=number).logit == want.logit).all()
    assert [r.index for r in reranker.rank("Paris", ["a", "b", "c"], top_k=number)] == [
        r.index for r in reranker.rank("Paris", ["a", "b", "c"])
    ]
    assert rk.Reranker(tmp_path, max_length=number + 9).max_length == 12
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(rk.softmax(x, number), rk.softmax(x, 3)) and torch.equal(rk.sum(x, number), rk.sum(x, 3))
    assert torch.equal(rk.mean(x, (0, number)), rk.mean(x, (0, 3)))
    for wrong in (True, 0, 2.0, "3", None):
        with pytest.raises(ValueError, match="score: batch_tokens must be an integer >= 1, got "):
            reranker.score(pairs, batch_tokens=wrong)
    for wrong in (1.0, "1", None, [1.0]):
        with pytest.raises(ValueError, match="softmax: dim must be an integer, or several, got "):
            rk.softmax(x, wrong)
