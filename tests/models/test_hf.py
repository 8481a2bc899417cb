"""hf: a patched transformers model is right (float64, stock), the same bits in every batch, and undone without a trace."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import rerank_kernels as rk
from conftest import require
from models import BERTS, FAMILIES, PAD, POSITIONS, UNTYPED, config, minilm, padded, rows, tiny
from rerank_kernels.models import bert
from rerank_kernels.models.bound import Forward
from rerank_kernels.models.packing import ready
from rerank_kernels.models.registry import packed_embeddings, packed_logits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (7, 1, 70, 23, 64, 2, 65, 23)  # around one key tile of 64, and equal ones
HASHES = {"bert": "6606d6874a67e6ed", "electra": "6ba195796a762157", "modernbert": "c2ade4667d6a5d36"} | dict.fromkeys(
    ("roberta", "xlm-roberta", "camembert"), "baa9ec9efcce8a5b"
)
HASHES |= {"distilbert": "1a5bbe8fa6516578", "albert": "d88f329f89041c33"}
HASHES |= {"xlm-roberta-xl": "fdf49485111a26e0", "roberta-prelayernorm": "53923f9c1ef8c9a3"}


def bits(t):
    return t.detach().contiguous().view({4: torch.int32, 2: torch.int16}[t.element_size()])


def assert_same_bits(a, b, what=""):
    assert a.dtype == b.dtype and a.shape == b.shape
    differ = (bits(a) != bits(b)).flatten().nonzero().flatten()
    assert not len(differ), (
        f"{what}: {len(differ)} of {a.numel()} values differ, first {a.flatten()[differ[0]]} {b.flatten()[differ[0]]}"
    )


def alone(model, sequences):
    return torch.cat([model(input_ids=s[None]).logits for s in sequences])


def clean(model):
    return not any("forward" in m.__dict__ for m in model.modules())


# ---- right ------------------------------------------------------------------------------------------------------------------

# |patched - float64 of the same weights|, logits of size 1..5: float32 noise, and a few roundings of a half body
BOUND = {torch.float32: 5e-6, torch.float16: 8e-3, torch.bfloat16: 8e-2}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_float64(family, dtype):
    model = tiny(family, dtype, num_labels=3)
    batch = padded(rows(LENGTHS), PAD[family])
    if family not in UNTYPED:
        batch["token_type_ids"] = (torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"]) % 3 == 0).long()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**batch).logits
    rk.patch(model)
    logits = model(**batch).logits
    assert logits.dtype == torch.float32 and logits.shape == (len(LENGTHS), 3)
    assert truth.std() > 0.2, "the model does not tell these inputs apart: the comparison would be empty"
    assert (logits - truth).abs().max() < BOUND[dtype]


@pytest.mark.parametrize("heads, hidden", [(1, 64), (4, 96), (16, 64), (2, 80)])
@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_stock_in_float32(family, heads, hidden):
    model = tiny(family, head=False, num_attention_heads=heads, hidden_size=hidden)
    batch = padded(rows(LENGTHS), PAD[family])
    with torch.no_grad():
        stock = model(**batch, output_hidden_states=True)
    rk.patch(model)
    out = model(**batch, output_hidden_states=True)
    kept = batch["attention_mask"].bool()
    assert type(out) is type(stock) and list(out) == list(stock) and len(out.hidden_states) == len(stock.hidden_states) == 3
    far = 5e-5 if family == "modernbert" else 2e-5  # no norm keeps the states between its layers small
    for ours, theirs in zip(out.hidden_states, stock.hidden_states, strict=True):
        torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=far)
        assert not ours[~kept].any(), "padding must be 0"
    if "pooler_output" in stock:
        torch.testing.assert_close(out.pooler_output, stock.pooler_output, rtol=0, atol=2e-5)
    if torch.equal(stock.last_hidden_state, stock.hidden_states[-1]):  # ModernBERT's in transformers 4 is not normed
        assert_same_bits(out.last_hidden_state, out.hidden_states[-1])


LATER = ("quick_gelu", "relu2", "leaky_relu", "mish")


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh", *LATER])
def test_activations(act):
    model = tiny("bert", hidden_act=act)
    batch = padded(rows(LENGTHS), 0)
    with torch.no_grad():
        stock = model(**batch).logits
    rk.patch(model)
    torch.testing.assert_close(model(**batch).logits, stock, rtol=0, atol=2e-5)


def test_another_slope_is_refused():
    model = tiny("bert", hidden_act="leaky_relu")
    act = model.bert.encoder.layer[1].intermediate.intermediate_act_fn
    act.negative_slope = 0.2
    with pytest.raises(rk.PatchError, match=r"LeakyReLU \(negative_slope must be 0\.01, got 0\.2\) at bert\.enc"):
        rk.patch(model)
    act.negative_slope = 0.01
    rk.patch(model)
    act.negative_slope = 0.2
    with pytest.raises(
        rk.PatchError, match=r"intermediate_act_fn \(LeakyReLU\).*negative_slope must be 0\.01, got 0\.2.*rk\.unpatch"
    ):
        model(**padded(rows((5,)), 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_and_embeddings_given(family):
    model = tiny(family)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("a DistilBERT of transformers 4 takes no positions")
    batch = padded(rows((9, 5)), PAD[family])
    positions = torch.randint(2, POSITIONS, (2, 9), generator=torch.Generator().manual_seed(1))
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    with torch.no_grad():
        stock = model(**batch, position_ids=positions).logits
    rk.patch(model)
    logits = model(**batch, position_ids=positions).logits
    torch.testing.assert_close(logits, stock, rtol=0, atol=2e-5)
    assert_same_bits(model(**batch, position_ids=positions[:1]).logits[0], logits[0])
    embeds[1, 5:] = float("nan")
    mask = batch["attention_mask"]
    assert_same_bits(model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits, logits)
    assert_same_bits(model(inputs_embeds=embeds, attention_mask=mask).logits, model(**batch).logits)


def heads_follow_their_activation():
    """ELECTRA's head holds a gelu where RoBERTa's calls tanh itself."""
    for held in (None, nn.Tanh(), nn.ReLU()):
        model = tiny("electra", num_labels=3)
        if held is not None:
            model.classifier.activation = held
        batch = padded(rows(LENGTHS), 0)
        with torch.no_grad():
            truth = copy.deepcopy(model).double()(**batch).logits
        rk.patch(model)
        assert (model(**batch).logits - truth).abs().max() < BOUND[torch.float32], f"{held}"


def test_a_head_computes_the_activation_that_it_holds(monkeypatch):
    heads_follow_their_activation()
    monkeypatch.setattr(bert, "activation_of", lambda m: "tanh")
    with pytest.raises(AssertionError):
        heads_follow_their_activation()


@pytest.mark.parametrize("held", [torch.sin, nn.Softplus()], ids=["function", "module"])
def test_a_head_with_an_unknown_activation_is_refused(held):
    model = tiny("electra")
    del model.classifier.activation
    model.classifier.activation = held
    with pytest.raises(
        rk.PatchError, match=r"ElectraClassificationHead \(activation must be an activation that is served, got (sin|Softplus)"
    ):
        rk.patch(model)


def test_words_as_wide_as_the_layers():
    """An ELECTRA of that shape has no projection."""
    model = tiny("electra", embedding_size=64)
    assert not hasattr(model.electra, "embeddings_project")
    batch = padded(rows(LENGTHS), 0)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**batch).logits
    rk.patch(model)
    assert (model(**batch).logits - truth).abs().max() < BOUND[torch.float32]


# ---- the same ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_batch(family, dtype):
    model, pad = tiny(family, dtype), PAD[family]
    rk.patch(model)
    sequences = rows(LENGTHS)
    want = alone(model, sequences)
    assert len(set(want.flatten().tolist())) > 4
    with torch.no_grad():
        model.get_input_embeddings().weight[pad] = float("nan")  # whoever reads padding returns NaN from here on
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [sequences[i] for i in order]
    for what, got in {
        "batched": model(**padded(sequences, pad)).logits,
        "left": model(**padded(sequences, pad, left=True)).logits,
        "longer": model(**padded(sequences, pad, to=130)).logits,
        "longer left": model(**padded(sequences, pad, to=131, left=True)).logits,
        "another pad id": model(**padded(sequences, 77, left=True)).logits,
        "bool mask": model(**{k: v if k == "input_ids" else v.bool() for k, v in padded(sequences, pad).items()}).logits,
        "float mask": model(**{k: v if k == "input_ids" else v.float() for k, v in padded(sequences, pad).items()}).logits,
        "tuple": model(**padded(sequences, pad), return_dict=False)[0],
        "again": alone(model, sequences),
    }.items():
        assert_same_bits(got, want, what)
    assert_same_bits(model(**padded(shuffled, pad)).logits, want[order], "shuffled")


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_version_of_transformers(family):
    """One hash, whatever version runs the tests; `make stacks` runs 4.57 too."""
    model, draw = tiny(family), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):  # their order is another one in transformers 4
            p.copy_(torch.randn(p.shape, generator=draw) * 0.15)
    rk.patch(model)
    require("cpu")
    with rk.use("cpu"):
        logits = model(**padded(rows(LENGTHS), PAD[family])).logits
    assert hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16] == HASHES[family]


def test_bits_with_holes_are_the_bits_without():
    model = tiny("xlm-roberta")
    rk.patch(model)
    (ids,) = rows((12,))
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0])
    got = model(input_ids=ids[None], attention_mask=mask[None]).logits
    assert_same_bits(got, model(input_ids=ids[mask.bool()][None]).logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", BERTS)
def test_bits_do_not_depend_on_how_many_tokens_at_once(family, dtype, monkeypatch):
    """On a CPU the feed-forward layer takes the batch in parts."""
    model, batch = tiny(family, dtype), padded(rows(LENGTHS), PAD[family])
    rk.patch(model)
    want = model(**batch, output_hidden_states=True)
    honest, seen = bert.norm, []
    monkeypatch.setattr(bert, "norm", lambda m, x, *residual: (seen.append(len(x)), honest(m, x, *residual))[1])
    for most in (100, 3, 1):
        monkeypatch.setattr(bert, "TOKENS_AT_ONCE", most)
        seen.clear()
        got = model(**batch, output_hidden_states=True)
        parts = -(-sum(LENGTHS) // most)
        assert seen == [sum(LENGTHS)] + 2 * [sum(LENGTHS), *[most] * (parts - 1), sum(LENGTHS) - most * (parts - 1)]
        assert_same_bits(got.logits, want.logits, f"{most} tokens at once")
        assert len(got.hidden_states) == len(want.hidden_states) == 3
        for n, (ours, theirs) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
            assert_same_bits(ours, theirs, f"{most} tokens at once, hidden state {n}")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_entries_give_the_bits_of_the_forward(family):
    model, sequences = tiny(family), rows(LENGTHS)
    rk.patch(model)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    out = packed_logits(model, torch.cat(sequences), cu)
    assert_same_bits(out.logit, alone(model, sequences))
    assert_same_bits(out.score, rk.sigmoid(out.logit))
    assert_same_bits(out.complement, rk.sigmoid(-out.logit))
    encoder = model.base_model
    means = packed_embeddings(encoder, torch.cat(sequences), cu, normalise=False)
    torch.testing.assert_close(means[3], encoder(sequences[3][None]).last_hidden_state[0].mean(0), rtol=0, atol=1e-5)
    units = packed_embeddings(encoder, torch.cat(sequences), cu)
    torch.testing.assert_close(units, nn.functional.normalize(means), rtol=0, atol=1e-6)
    with pytest.raises(rk.PatchError, match=r"must be a patched \*ForSequenceClassification, got \w+Model"):
        packed_logits(encoder, torch.cat(sequences), cu)


def test_empty_rows_and_batches():
    model = tiny("bert")
    rk.patch(model)
    sequences = rows((5, 8))
    batch = padded([sequences[0], sequences[0][:0], sequences[1]], 0)
    out = model(**batch).logits
    assert_same_bits(out[[0, 2]], alone(model, sequences))
    assert model(input_ids=torch.zeros(0, 4, dtype=torch.long)).logits.shape == (0, 1)


# ---- the patch lives with the model -----------------------------------------------------------------------------------------


def test_unpatch_restores_everything():
    model = tiny("xlm-roberta")
    batch = padded(rows(LENGTHS), 1)
    before = {m: set(m.__dict__) for m in model.modules()}
    tensors = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    with torch.no_grad():
        stock = model(**batch).logits
    rk.patch(model)
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == {k: p for k, (p, _) in tensors.items()}
    model(**batch)
    rk.unpatch(model)
    assert {m: set(m.__dict__) for m in model.modules()} == before and clean(model)
    assert all(torch.equal(v, tensors[k][1]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert_same_bits(model(**batch).logits, stock)
    rk.unpatch(model)  # once more changes nothing


def test_classes_and_other_models_stay_stock():
    kept = inspect.getattr_static(nn.Linear, "forward")
    model, other = tiny("bert"), tiny("bert")
    rk.patch(model)
    assert clean(other) and inspect.getattr_static(nn.Linear, "forward") is kept
    assert type(model).forward is type(other).forward


def test_deepcopy_uses_its_own_weights():
    model = tiny("bert")
    rk.patch(model)
    sequences = rows((5, 30))
    want = alone(model, sequences)
    twin = copy.deepcopy(model)
    assert_same_bits(alone(twin, sequences), want)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same_bits(alone(twin, sequences), want)
    assert twin.forward.module is twin and twin.bert.forward.module is twin.bert
    rk.unpatch(twin)
    assert clean(twin) and not clean(model)


def test_pickle_in_a_fresh_process(tmp_path):
    model = tiny("bert")
    rk.patch(model)
    sequences = rows((5, 30))
    want = alone(model, sequences)
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again.forward, Forward) and again.forward.module is again
    assert_same_bits(alone(again, sequences), want)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False)\n"
        "print(type(m.forward).__name__, *[m(input_ids=torch.tensor([eval(a)])).logits.item().hex() for a in sys.argv[2:]])"
    )
    path = os.pathsep.join([str(Path(rk.__file__).parents[1]), *sys.path])
    arguments = [str(tmp_path / "model.pt"), *(str(s.tolist()) for s in sequences)]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["Forward", *(v.hex() for v in want.flatten().tolist())]


def test_dtype_and_weights_can_change_after_patching():
    model, half = tiny("roberta"), tiny("roberta", torch.float16)
    sequences = rows(LENGTHS)
    rk.patch(model)
    wide = alone(model, sequences)
    rk.patch(half)
    assert_same_bits(alone(model.half(), sequences), alone(half, sequences))
    other = tiny("roberta", seed=7)
    assert model.float().load_state_dict(other.state_dict()).missing_keys == []
    rk.patch(other)
    assert_same_bits(alone(model, sequences), alone(other, sequences))
    model.load_state_dict(tiny("roberta").state_dict(), assign=True)
    assert_same_bits(alone(model.to("cpu"), sequences), wide)


def test_save_pretrained_of_a_patched_model(tmp_path):
    model = tiny("bert")
    sequences = rows((5, 30))
    rk.patch(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert clean(again)
    rk.patch(again)
    assert_same_bits(alone(again, sequences), alone(model, sequences))


def test_torch_compile_does_not_reach_inside():
    model, sequences = tiny("roberta"), rows((7, 64, 23))
    rk.patch(model)
    want = alone(model, sequences)
    compiled = torch.compile(model)
    assert_same_bits(compiled(**padded(sequences, 1)).logits, want)
    assert_same_bits(torch.cat([compiled(input_ids=s[None]).logits for s in sequences]), want)


def test_signature_is_the_stock_one():
    model = tiny("bert")
    stock = inspect.signature(model.forward)
    rk.patch(model)
    assert inspect.signature(model.forward) == stock


# ---- the report -------------------------------------------------------------------------------------------------------------


def test_report_names_every_module_once_and_counts_calls():
    model = tiny("xlm-roberta")
    report = rk.patch(model)
    assert report.mode == "portable" and report.unknown == {}
    assert set(report.replaced) | set(report.exact) == {path for path, _ in model.named_modules()}
    assert not set(report.replaced) & set(report.exact)
    assert report.replaced[""] == "XLMRobertaForSequenceClassification"
    assert report.exact["roberta.embeddings.word_embeddings"] == "Embedding"
    assert report.calls() == {"": 0, "roberta": 0}
    alone(model, rows((3, 4)))
    assert report.calls() == {"": 2, "roberta": 2}
    model.roberta(rows((3,))[0][None])
    assert report.calls() == {"": 2, "roberta": 3}
    lines = str(report).splitlines()
    assert lines[0] == "mode portable" and lines[-1] == "calls: (the model) 2, roberta 3"
    assert any(line.split() == ["Linear", "14", "-", "-"] for line in lines), str(report)


def test_patching_twice_is_patching_once():
    model = tiny("bert")
    first = rk.patch(model)
    bound = model.forward
    alone(model, rows((3,)))
    second = rk.patch(model)
    assert model.forward is bound and second.calls() == first.calls() == {"": 1, "bert": 1}


def test_leaves_in_plain_containers():
    model = nn.Sequential(
        nn.Linear(48, 40), nn.LayerNorm(40), nn.GELU(), nn.Dropout(0.5), nn.Linear(40, 24, bias=False), nn.GELU("tanh"),
        nn.Unflatten(1, (4, 6)), nn.LayerNorm((4, 6), elementwise_affine=False), nn.Flatten(), nn.SiLU(), nn.Softmax(-1),
    ).eval()  # fmt: skip
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = model(x)
    report = rk.patch(model, strict=False)
    assert report.unknown == {"6": "Unflatten"} and report.exact == {"": "Sequential", "3": "Dropout", "8": "Flatten"}
    y = model(x)
    assert set(report.calls().values()) == {1}
    torch.testing.assert_close(y, stock, rtol=1e-5, atol=1e-6)
    assert_same_bits(torch.cat([model(row[None]) for row in x]), y)
    with pytest.raises(RuntimeError, match=r"Linear\.forward: an input asks for gradients .*inference_mode"):
        model(x.clone().requires_grad_())


@pytest.mark.parametrize("leaf", [nn.Sigmoid(), nn.Softmax(-1), nn.Linear(48, 8), nn.LayerNorm(48)], ids=str)
def test_a_leaf_without_dropout_has_no_training_mode(leaf):
    assert leaf.training, "as nn.Module makes it, and CrossEncoder.activation_fn stays"
    x = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    rk.patch(leaf)
    y = leaf(x)
    assert_same_bits(torch.cat([leaf(row[None]) for row in x]), y)
    assert_same_bits(leaf.eval()(x), y)


# ---- refusals ---------------------------------------------------------------------------------------------------------------


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


def foreign(name):
    import transformers as tf

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    if name == "MPNet":
        return tf.MPNetModel(tf.MPNetConfig(**sizes))
    if name == "DebertaV2":
        return tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**sizes))
    model = tiny("bert")
    model.bert.encoder.layer[1].output.dense = Shifted(96, 64)
    return model


@pytest.mark.parametrize(
    "name, line",
    [
        ("MPNet", r"MPNetAttention at encoder\.layer\.0\.attention\n"),
        ("DebertaV2", r"DebertaV2Encoder at deberta\.encoder\n"),
        ("custom", r"Shifted at bert\.encoder\.layer\.1\.output\.dense\n"),
    ],
)
def test_strict_names_what_it_does_not_know_and_changes_nothing(name, line):
    model = foreign(name).eval()
    with pytest.raises(rk.PatchError, match=line) as error:
        rk.patch(model)
    assert "nothing was patched" in str(error.value) and type(model).__name__ in str(error.value)
    assert clean(model)


def refusal(model):
    """The lines between the first and the last of patch's error."""
    with pytest.raises(rk.PatchError) as error:
        rk.patch(model)
    return [line.strip() for line in str(error.value).splitlines()[1:-1]]


def test_a_refusal_has_one_line_a_class_and_the_causes_only():
    import transformers as tf

    sizes = dict(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    model = tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**sizes)).eval()
    lines = refusal(model)
    assert "DebertaV2Layer x 12, e.g. deberta.encoder.layer.0" in lines
    assert "DebertaV2ForSequenceClassification at (the model itself)" in lines
    unknown = rk.patch(model, strict=False).unknown
    assert len(unknown) > 70 and {line.split(" ")[0] for line in lines} == set(unknown.values())
    assert len(lines) == len(set(unknown.values()))


def test_a_refusal_begins_with_the_cause():
    model = tiny("bert", num_hidden_layers=12, hidden_act="laplace")
    at = "x 12, e.g. bert.encoder.layer.0.intermediate"
    assert refusal(model) == [
        f"BertIntermediate (intermediate_act_fn must be an activation that is served, got LaplaceActivation) {at}",
        f"LaplaceActivation {at}.intermediate_act_fn",
    ]
    assert rk.patch(model, strict=False).unknown["bert"] == "BertModel (holds the unknown modules)", "the report keeps all"
    model = foreign("custom").eval()
    model.bert.encoder.layer[1].register_forward_hook(lambda m, a, out: out)
    assert refusal(model) == [
        "BertLayer (has forward hooks) at bert.encoder.layer.1",
        "Shifted at bert.encoder.layer.1.output.dense",
    ]


def test_not_strict_leaves_the_unknown_and_the_encoder_around_it():
    model = foreign("custom").eval()
    batch = padded(rows((9, 5)), 0)
    with torch.no_grad():
        stock = model(**batch).logits
    report = rk.patch(model, strict=False)
    assert report.unknown["bert.encoder.layer.1.output.dense"] == "Shifted"
    assert report.unknown[""] == "BertForSequenceClassification (holds the unknown modules)"
    assert "unknown: bert.encoder.layer.1.output.dense: Shifted" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, stock, rtol=0, atol=2e-5)
    assert report.calls()["bert.encoder.layer.0.output.dense"] == 1


def test_unknown_activations_are_refused():
    model = tiny("roberta", head=False, hidden_act="laplace")
    with pytest.raises(rk.PatchError, match=r"LaplaceActivation x 2, e\.g\. encoder\.layer\.0\.intermediate\.int"):
        rk.patch(model)
    model = tiny("roberta", head=False)
    del model.encoder.layer[1].intermediate.intermediate_act_fn
    model.encoder.layer[1].intermediate.intermediate_act_fn = torch.sin
    with pytest.raises(
        rk.PatchError, match=r"RobertaIntermediate \(inter.* must be an activation that is served, got sin\) at"
    ):
        rk.patch(model)


def test_a_module_put_in_after_patching_is_not_passed_over():
    model = tiny("bert")
    rk.patch(model)
    model.bert.encoder.layer[1].output.dense = Shifted(96, 64)
    with pytest.raises(rk.PatchError, match=r"layer\.1\.output\.dense \(Shifted\): Linear must stand here, .* undo the"):
        model(rows((5,))[0][None])
    model.bert.encoder.layer[1].output.dense = nn.Linear(96, 64)
    model(rows((5,))[0][None])


def test_hooks_and_own_forwards_inside_an_encoder_are_refused():
    model = tiny("bert")
    batch = padded(rows((4,)), 0)
    with torch.no_grad():
        model(**batch, output_hidden_states=True)  # leaves transformers' own hooks behind, which are harmless
    rk.unpatch(model)
    rk.patch(model)
    rk.unpatch(model)
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda m, a, out: out * 0)
    with pytest.raises(rk.PatchError, match=r"BertLayer \(has forward hooks\) at bert\.encoder\.layer\.0\n"):
        rk.patch(model)
    handle.remove()
    linear = model.bert.encoder.layer[0].output.dense
    linear.forward = lambda x: x
    with pytest.raises(rk.PatchError, match=r"Linear \(has a forward of its own"):
        rk.patch(model)
    rk.unpatch(model)
    assert "forward" in linear.__dict__, "unpatch must leave what is not ours"


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_put_in_after_patching_are_not_passed_over(kind):
    model = tiny("bert")
    batch = padded(rows((4,)), 0)
    ids, cu = batch["input_ids"][0], torch.tensor([0, 4], dtype=torch.int32)
    with torch.no_grad():
        model(**batch, output_hidden_states=True)  # leaves transformers' own hooks behind, which are harmless
    rk.patch(model)
    want, seen = model(**batch).logits, []

    def hook(m, *args):
        seen.append(type(m).__name__)

    runs = {
        "": lambda: model(**batch),
        "encoder": lambda: model.bert(**batch),
        "packed": lambda: packed_logits(model, ids, cu),
        "packed encoder": lambda: packed_embeddings(model.bert, ids, cu),
    }
    inner = (model.bert.encoder.layer[1].output.dense, "Linear", set(runs))
    for module, name, refused in (inner, (model.bert, "BertModel", set(runs) - {"encoder"}), (model, "BertFor", {"packed"})):
        handle = getattr(module, f"register_{kind}_hook")(hook)
        for what, run in runs.items():
            message = rf"\({name}\w*\) has forward hooks, and hooks inside a patched encoder do not run"
            with pytest.raises(rk.PatchError, match=message) if what in refused else contextlib.nullcontext():
                run()
        handle.remove()
        for run in runs.values():
            run()
    assert seen == ["BertModel", "BertForSequenceClassification"], "hooks on what is called run"
    assert_same_bits(model(**batch).logits, want)


def test_looking_for_hooks_takes_less_than_a_millisecond():
    model = tiny("bert", num_hidden_layers=12)
    rk.patch(model)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        ready(model, bert.roles_of)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_patch_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, or .* served, got str"):
        rk.patch("bert")
    with pytest.raises(ValueError, match="patch: mode must be one of 'portable', 'tensor', got 'fast'"):
        rk.patch(tiny("bert"), mode="fast")
    with pytest.raises(rk.BackendError, match=r"unknown backend 'rocm' \(asked for by patch\(model, backend='rocm'\)\)"):
        rk.patch(tiny("bert"), backend="rocm")
    holder = type("FlagReranker", (), {"model": tiny("bert")})()
    with pytest.raises(TypeError, match=r"got FlagReranker; .* pass its \.model"):
        rk.patch(holder)
    decoder = tiny("bert", head=False, is_decoder=True)
    with pytest.raises(rk.PatchError, match=r"BertModel \(config\.is_decoder"):
        rk.patch(decoder)
    with pytest.raises(rk.PatchError, match=r"BertLayer \(served only inside its whole model\)"):
        rk.patch(tiny("bert").bert.encoder.layer[0])


def test_forward_refuses_what_it_would_have_to_ignore():
    model = tiny("bert")
    rk.patch(model)
    batch = padded(rows((5, 3)), 0)
    stock = inspect.signature(type(model).forward).parameters
    takes = stock.get("kwargs")
    for name, value in {
        "labels": torch.zeros(2),
        "output_attentions": True,
        "head_mask": torch.ones(2, 4),
        "past_key_values": (1,),
        "use_cache": True,
        "surprise": 3,
    }.items():
        if takes is None and name not in stock:  # transformers 4, whose classifiers take no other arguments
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                model(**batch, **{name: value})
            continue
        with pytest.raises(ValueError, match=rf"BertForSequenceClassification\.forward: {name} is not served"):
            model(**batch, **{name: value})
        model(**batch, **{name: None})
    model.bert(**batch, use_cache=False, output_attentions=False)
    with pytest.raises(ValueError, match="encoder_hidden_states is not served"):
        model.bert(**batch, encoder_hidden_states=torch.zeros(2, 5, 64))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got \[5\]"):
        model(batch["input_ids"][0])
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[2, 5\], .* got \[2, 1, 5, 5\]"):
        model(batch["input_ids"], attention_mask=torch.ones(2, 1, 5, 5))
    additive = (1 - batch["attention_mask"]) * -10000
    for mask in (additive, additive.int(), additive.float(), additive.float() * float("inf")):
        with pytest.raises(ValueError, match="nonzero where a token is, got negative values; additive masks are not served"):
            model(batch["input_ids"], attention_mask=torch.nan_to_num(mask, nan=0.0, neginf=-float("inf")))
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 159\]"):
        model(batch["input_ids"] + 200)
    with pytest.raises(ValueError, match=rf"at most {POSITIONS} tokens a sequence.*got {POSITIONS + 1}; tokenise with trunc"):
        model(rows((POSITIONS + 1,))[0][None])
    with pytest.raises(ValueError, match="output_hidden_states must be True or False"):
        model(**batch, output_hidden_states=[1])
    with pytest.warns(UserWarning, match="begin or end with the pad token 0 and attention_mask is missing"):
        model(batch["input_ids"])
    model.train()
    with pytest.raises(RuntimeError, match=r"set to train.* call model\.eval\(\), or rk\.unpatch\(model\)"):
        model(**batch)


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) > 4, reason="transformers 5 has absolute positions only")
@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_are_refused(kind):
    with pytest.raises(rk.PatchError, match=rf"BertModel \(config\.position_embedding_type must be 'absolute', got '{kind}'"):
        rk.patch(tiny("bert", position_embedding_type=kind))


def test_no_gradients_even_if_asked_for():
    model = tiny("bert")
    rk.patch(model)
    batch = padded(rows((5, 3)), 0)
    assert not model(**batch).logits.requires_grad
    embeds = torch.zeros(2, 5, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="an input asks for gradients"):
        model(inputs_embeds=embeds)


def test_config_can_be_patched_in_every_served_family():
    for family in FAMILIES:
        rk.patch(type(tiny(family))(config(family, hidden_dropout_prob=0.3)).eval())


# ---- real weights, and through sentence-transformers ------------------------------------------------------------------------


def test_minilm_through_sentence_transformers():
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = st.SentenceTransformer(str(minilm()), device="cpu")
    texts = ["Paris is the capital of France.", "bread", "The order of a sum matters. " * 12]
    stock = torch.from_numpy(model.encode(texts))
    reranker = rk.Reranker(minilm())
    with pytest.raises(rk.PatchError, match=r"SentenceTransformer, a wrapper .* pass model\[0\]\.auto_model"):
        rk.Reranker(model, reranker.tokenizer)
    report = rk.patch(model)
    ours = torch.from_numpy(model.encode(texts))
    assert len(report.calls()) == 3 and all(report.calls().values())
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-6)
    assert_same_bits(ours, torch.from_numpy(reranker.encode(texts)))
