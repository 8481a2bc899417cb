"""systems: what the user of a system holds is patched as a whole, gives one score per pair, and is undone without a trace.

The systems here are those of systems.py; stacks/ has the real ones. What is asserted of a system is a function that a mutant of
each override must fail.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import lora
import rerank_kernels as rk
import systems
from models import CORPUS, tiny, tokenizer
from rerank_kernels.models import registry as served
from rerank_kernels.models.bound import Forward, Method
from rerank_kernels.patching import walk
from rerank_kernels.patching.systems import table

QUERY = CORPUS[0]
TEXTS = list(CORPUS)
PAIRS = [[query, document] for query in CORPUS[:4] for document in CORPUS]
SIGMOIDS = (nn.Sigmoid(), torch.sigmoid, nn.functional.sigmoid, torch.special.expit)


def bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def same(got, want, what=""):
    assert np.array_equal(bits(got), bits(want)), f"{what}: {int((bits(got) != bits(want)).sum())} of {np.size(want)} differ"


def reference(model):
    """Logits and scores of PAIRS, by the Reranker, of a copy of `model`."""
    model = copy.deepcopy(model)
    rk.unpatch(model)
    return rk.Reranker(model, tokenizer("xlm-roberta"), max_length=model.config.max_position_embeddings - 10)


def saturated(model):
    """Logits far above 17, where every float32 score is 1.0."""
    with torch.no_grad():
        model.classifier.out_proj.bias += 25.0
    return model


def clean(*objects):
    return not any(
        isinstance(value, Forward | Method)
        for obj in objects
        for holder in (obj, *(obj.modules() if isinstance(obj, nn.Module) else ()))
        for value in vars(holder).values()
    )


VERSIONS = {"3": systems.CrossEncoder3, "6": systems.CrossEncoder}
ACTIVATION = {"3": "activation_fct", "6": "activation_fn"}


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


# ---- CrossEncoder -----------------------------------------------------------------------------------------------------------


def one_score_a_pair(version, model):
    encoder = VERSIONS[version](model)
    want = reference(model).score(PAIRS)
    rk.patch(encoder)
    for size in (1, 7, 32):
        same(encoder.predict(PAIRS, batch_size=size), want.score, f"stored, batches of {size}")
        for activation in SIGMOIDS:
            same(encoder.predict(PAIRS, batch_size=size, **{ACTIVATION[version]: activation}), want.score, f"{activation}")
        same(encoder.predict(PAIRS, batch_size=size, **{ACTIVATION[version]: nn.Identity()}), want.logit, "logits")


def ranked_by_logit(version, model):
    encoder, honest = VERSIONS[version](model), reference(model)
    rk.patch(encoder)
    for options in ({}, {ACTIVATION[version]: nn.Sigmoid()}, {ACTIVATION[version]: nn.Identity()}, {"top_k": 3}):
        ranked, want = encoder.rank(QUERY, TEXTS, **options), honest.rank(QUERY, TEXTS, options.get("top_k"))
        assert [one["corpus_id"] for one in ranked] == [one.index for one in want], f"order differs with {options}"
        logits = isinstance(options.get(ACTIVATION[version]), nn.Identity)
        same([one["score"] for one in ranked], [one.logit if logits else one.score for one in want])


def test_cross_encoder_gives_one_score_a_pair(version):
    one_score_a_pair(version, systems.model())


def test_stock_cross_encoder_does_not(version):
    encoder = VERSIONS[version](systems.model())
    one, many = (encoder.predict(PAIRS, batch_size=size) for size in (1, 32))
    assert (bits(one) != bits(many)).any()


def test_cross_encoder_ranks_by_logit(version):
    ranked_by_logit(version, systems.model())
    ranked_by_logit(version, saturated(systems.model()))
    scores = [one["score"] for one in VERSIONS[version](saturated(systems.model())).rank(QUERY, TEXTS)]
    assert set(map(float, scores)) == {1.0}, "the scores that must not rank"


def test_rank_gives_what_it_gave_before(version):
    stock, ours = VERSIONS[version](systems.model()), VERSIONS[version](systems.model())
    rk.patch(ours)
    for options in ({"return_documents": True}, {} if version == "6" else {"convert_to_tensor": True}):
        one, other = stock.rank(QUERY, TEXTS, 4, **options), ours.rank(QUERY, TEXTS, 4, **options)
        assert [sorted(r) for r in one] == [sorted(r) for r in other] and type(one[0]["score"]) is type(other[0]["score"])
    assert inspect.signature(ours.rank) == inspect.signature(stock.rank)
    assert inspect.signature(ours.predict) == inspect.signature(stock.predict)


def test_arguments_by_place(version):
    encoder = VERSIONS[version](systems.model())
    want = reference(encoder.model).score(PAIRS)
    rk.patch(encoder)
    same(encoder.predict(PAIRS, 7 if version == "3" else None, None if version == "3" else 7, nn.Identity()), want.logit)
    same(encoder.predict(PAIRS, 7 if version == "3" else None, None if version == "3" else 7, nn.Sigmoid()), want.score)


def softmax_is_ours(version, model):
    encoder = VERSIONS[version](model)
    rk.patch(encoder)
    logits = encoder.predict(PAIRS, **{ACTIVATION[version]: nn.Identity()})
    want = rk.softmax(torch.from_numpy(logits), -1)
    for size in (1, 32):
        got = encoder.predict(PAIRS, batch_size=size, apply_softmax=True, **{ACTIVATION[version]: nn.Identity()})
        same(got, want, f"batches of {size}")


def test_several_labels(version):
    softmax_is_ours(version, systems.model(num_labels=3))
    encoder = VERSIONS[version](systems.model(num_labels=3))
    rk.patch(encoder)
    got = encoder.predict(PAIRS, apply_softmax=True, **{ACTIVATION[version]: lambda x: x * 0})
    assert set(np.ravel(got)) == {np.float32(1 / 3)}, "after an activation of the user's own"


def test_an_activation_of_ones_own_computes_as_it_is(version):
    encoder = VERSIONS[version](systems.model())
    want = reference(encoder.model).score(PAIRS).logit
    rk.patch(encoder)
    same(encoder.predict(PAIRS, **{ACTIVATION[version]: lambda x: x * 2}), want * 2)
    kept = nn.Sequential(nn.Sigmoid())
    encoder.predict(PAIRS, **{ACTIVATION[version]: kept})
    assert clean(kept), "what the user hands in is not changed"
    setattr(encoder, {"3": "default_activation_function", "6": "activation_fn"}[version], nn.Identity())
    same(encoder.predict(PAIRS), want, "the stored one is read at each call")


@pytest.mark.parametrize("activation", [torch.sin, nn.Softplus()], ids=["function", "module"])
def test_an_unknown_stored_activation_is_refused(version, activation):
    encoder = VERSIONS[version](systems.model(), activation)
    with pytest.raises(rk.PatchError, match=r"its activation (sin|Softplus) is unknown; set \w+ to torch\.nn\.Sigmoid\(\)"):
        rk.patch(encoder)
    assert clean(encoder, encoder.model)
    report = rk.patch(encoder, strict=False)
    assert "is unknown" in report.notes[0] and report.replaced["model"] == "XLMRobertaForSequenceClassification"


def test_cross_encoder_options_that_are_refused():
    encoder = systems.CrossEncoder(systems.model())
    encoder.keep_in_fp32_modules = ["0.model.classifier.out_proj"]
    with pytest.raises(rk.PatchError, match=r"keep_in_fp32_modules: call set_keep_in_fp32_modules\(\[\]\)"):
        rk.patch(encoder)
    encoder = systems.CrossEncoder(systems.model())
    encoder[0].can_flatten_inputs = True
    with pytest.raises(rk.PatchError, match=r"set model\[0\]\.unpad_inputs = False"):
        rk.patch(encoder)
    encoder.backend = "onnx"
    with pytest.raises(rk.PatchError, match="load it with backend='torch'"):
        rk.patch(encoder)


class Louder(systems.CrossEncoder3):
    def predict(self, *args, **kwargs):
        return super().predict(*args, **kwargs) * 2


class Named(systems.CrossEncoder3):
    pass


def test_subclasses_are_served_where_they_leave_the_known_methods_alone():
    assert rk.patch(Named(systems.model())).system == "sentence-transformers CrossEncoder"
    with pytest.raises(rk.PatchError, match="Louder has a predict of its own, and only that of CrossEncoder is known"):
        rk.patch(Louder(systems.model()))
    encoder = systems.CrossEncoder3(systems.model())
    encoder.rank = print
    with pytest.raises(rk.PatchError, match="CrossEncoder has a rank of its own"):
        rk.patch(encoder)


# ---- patched, copied, undone ------------------------------------------------------------------------------------------------


class Shared(systems.CrossEncoder):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Odd(systems.CrossEncoder3):
    def predict(self, *args, **kwargs):
        return super().predict(*args, **kwargs)


def test_a_forward_of_its_own_is_refused():
    with pytest.raises(rk.PatchError, match="Shared has a forward of its own, and only that of CrossEncoder is known"):
        rk.patch(Shared(systems.model()))


def test_not_strict_leaves_a_method_of_its_own():
    encoder = Odd(systems.model())
    report = rk.patch(encoder, strict=False)
    assert "predict" not in vars(encoder) and list(report.overrides) == ["rank"]
    assert any("Odd has a predict of its own" in note for note in report.notes)
    assert len(encoder.predict(PAIRS)) == len(PAIRS) and len(encoder.rank(QUERY, TEXTS, top_k=2)) == 2


def test_another_model_put_in_later_is_an_error():
    encoder = systems.CrossEncoder3(systems.model())
    rk.patch(encoder)
    encoder.model = systems.model()
    for call in (lambda: encoder.predict(PAIRS), lambda: encoder.rank(QUERY, TEXTS)):
        with pytest.raises(rk.PatchError, match=r"its model is not the one that rk\.patch\(\) saw"):
            call()
    rk.unpatch(encoder)
    rk.patch(encoder)
    assert len(encoder.predict(PAIRS)) == len(PAIRS)
    rk.unpatch(encoder.model)
    with pytest.raises(rk.PatchError, match="or was unpatched by itself"):
        encoder.predict(PAIRS)


def test_a_shallow_copy_is_patched_by_itself():
    ranker = systems.TransformersSimilarityRanker(systems.model)
    ranker.warm_up()
    rk.patch(ranker)
    other = copy.copy(ranker)
    other.top_k = 2
    rk.patch(other)
    documents = [systems.Document(text, text) for text in TEXTS]
    assert len(other.run(QUERY, documents)["documents"]) == 2
    assert len(ranker.run(QUERY, documents)["documents"]) > 2


def test_nan_ranks_last(version):
    inner = systems.model()
    encoder = VERSIONS[version](inner)
    rk.patch(encoder)
    honest = [one["corpus_id"] for one in encoder.rank(QUERY, TEXTS)]
    predict = encoder.predict

    def with_nans(pairs, *args, **kwargs):
        scores = np.array([float(score) for score in predict(pairs, *args, **kwargs)], np.float32)
        scores[[honest[0], honest[3]]] = np.nan
        return scores

    vars(encoder)["predict"] = with_nans
    want = [i for i in honest if i not in (honest[0], honest[3])] + sorted((honest[0], honest[3]))
    assert [one["corpus_id"] for one in encoder.rank(QUERY, TEXTS)] == want
    assert [one["corpus_id"] for one in encoder.rank(QUERY, TEXTS, top_k=2)] == want[:2]


def test_unpatch_restores_everything(version):
    encoder = VERSIONS[version](systems.model())
    before, stock = set(vars(encoder)), encoder.predict(PAIRS)
    rk.patch(encoder)
    assert not clean(encoder) and not clean(encoder.model)
    rk.unpatch(encoder)
    assert set(vars(encoder)) == before and clean(encoder, encoder.model)
    same(encoder.predict(PAIRS), stock)
    rk.unpatch(encoder)


def test_twice_is_once_and_another_way_is_an_error(version):
    encoder = VERSIONS[version](systems.model())
    rk.patch(encoder)
    bound = vars(encoder)["rank"]
    again = rk.patch(encoder)
    assert vars(encoder)["rank"] is bound and again.calls() == {"model": 0, "model.roberta": 0}
    with pytest.raises(rk.PatchError, match=r"is patched already, in mode 'portable'.* call rk\.unpatch"):
        rk.patch(encoder, backend="pytorch")
    with pytest.raises(rk.PatchError, match=r"is patched already, with graphs=True.* call rk\.unpatch"):
        rk.patch(encoder, graphs=False)
    rk.unpatch(encoder)
    report = rk.patch(encoder, backend="pytorch")
    encoder.rank(QUERY, TEXTS)
    assert report.backend == "pytorch" and report.calls()["model"] == 1


def test_another_way_before_the_model_is_loaded():
    ranker = systems.TransformersSimilarityRanker(systems.model)
    rk.patch(ranker)
    rk.patch(ranker)
    wrong = r"with graphs=True, and graphs=False was asked for; call rk\.unpatch\(\) with it first"
    with pytest.raises(rk.PatchError, match=wrong):
        rk.patch(ranker, graphs=False)
    rk.unpatch(ranker)
    rk.patch(ranker, graphs=False)
    ranker.warm_up()
    assert not ranker.model.forward.wants_graphs


def arrives_patched(version, carry):
    encoder = VERSIONS[version](systems.model())
    rk.patch(encoder)
    scores, ranked = encoder.predict(PAIRS), encoder.rank(QUERY, TEXTS)
    with systems.installed():
        twin = carry(encoder)
    with torch.no_grad():
        for p in encoder.model.parameters():
            p.zero_()
    assert twin.rank.holder is twin and twin.model.forward.module is twin.model, "a copy must be on its own"
    same(twin.predict(PAIRS), scores)
    assert twin.rank(QUERY, TEXTS) == ranked
    rk.unpatch(twin)
    assert clean(twin, twin.model) and not clean(encoder)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
def test_copies_and_pickles_are_patched(version, carry):
    arrives_patched(version, carry)


def test_report_says_what_is_whose():
    report = rk.patch(systems.CrossEncoder(systems.model()))
    lines = str(report).splitlines()
    assert lines[0] == "sentence-transformers CrossEncoder, mode portable"
    assert "override: rank: documents by logit, ties in the order given, NaN last" in lines
    assert any(line.startswith("note: a pool of worker processes") for line in lines)
    assert lines[-1] == "calls: model 0, model.roberta 0"
    assert report.replaced["model.classifier.out_proj"] == "Linear"


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"unpatch: model must be a torch\.nn\.Module, got str"):
        rk.unpatch("bge-reranker-base")
    pipeline = type("Pipeline", (), {})()
    for obj, hint in (
        ("bge-reranker-base", r"got str; load it first, or take rk\.Reranker\(path\)"),
        ([systems.model()], "got list; patch one at a time"),
        (pipeline, r"got Pipeline; pass its ranker, pipeline\.get_component\(name\)"),
        (None, r"got NoneType; help\(rk\.patch\) names what is taken"),
    ):
        with pytest.raises(TypeError, match=f"must be a torch.nn.Module, or an object of a system that is served, {hint}"):
            rk.patch(obj)
    with pytest.raises(ValueError, match="patch: mode must be one of 'portable', 'tensor', got 'fast'"):
        rk.patch(systems.CrossEncoder(systems.model()), mode="fast")


def test_an_inner_refusal_names_the_path():
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=500, num_labels=1)
    deberta = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(**sizes)).eval()
    encoder = systems.CrossEncoder3(deberta)
    with pytest.raises(
        rk.PatchError, match=r"^patch: sentence-transformers CrossEncoder, model: DebertaV2ForSeq.*\n.*DebertaV2"
    ):
        rk.patch(encoder)
    assert clean(encoder, deberta)


# ---- torch.compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["called before", "not called before"])
@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_compiled_models(how, before):
    model = systems.model()
    want = torch.from_numpy(reference(model).score(PAIRS).logit)[:, None]
    if how == "wrapper":
        held = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        held = model
    own = tokenizer("xlm-roberta")
    batches = [systems._padded(pairs, own) for pairs in (PAIRS, PAIRS[:1], PAIRS[3:9])]
    with torch.no_grad():
        stock = [held(**batch).logits for batch in batches] if before else []
        report = rk.patch(held)
        got = [held(**batch).logits for batch in batches]
        for logits, part in zip(got, (slice(None), slice(1), slice(3, 9)), strict=True):
            same(logits, want[part])
        assert set(report.calls().values()) == {3}, "compiled code of the stock model ran instead"
        rk.unpatch(held)
        for logits, batch in zip(stock, batches, strict=False):
            same(held(**batch).logits, logits, "stock again")
    assert clean(model)


def test_compiled_inside_a_system():
    encoder = systems.CrossEncoder3(torch.compile(systems.model(), backend="eager"))
    want = reference(encoder.model._orig_mod).score(PAIRS).score
    report = rk.patch(encoder)
    same(encoder.predict(PAIRS, batch_size=7), want)
    assert report.calls()["model._orig_mod"] > 0
    whole = torch.compile(systems.CrossEncoder(systems.model()), backend="eager")
    rk.patch(whole)
    same(whole.predict(PAIRS), want)
    rk.unpatch(whole)
    assert clean(whole._orig_mod)


# ---- SentenceTransformer ----------------------------------------------------------------------------------------------------


def embedder(*more, cls=systems.SentenceTransformer, mode="mean", dtype=torch.float32, **pooling):
    own = tokenizer("xlm-roberta")
    encoder = tiny("xlm-roberta", head=False, vocab_size=len(own), pad_token_id=own.pad_token_id)
    return cls(systems.Transformer(encoder, "token_embeddings"), systems.Pooling(mode, **pooling), *more).to(dtype).eval()


def embeds_as_the_reranker(dtype=torch.float32):
    model = embedder(systems.Normalize(), dtype=dtype)
    encoder = copy.deepcopy(model[0].model)
    want = rk.Reranker(encoder, model.tokenizer, kind="embedding", max_length=130).encode(TEXTS)
    report = rk.patch(model)
    for size in (1, 7, 32):
        same(model.encode(TEXTS, batch_size=size), want, f"batches of {size}")
    same(model.encode(TEXTS, normalize_embeddings=True), want, "of length 1 already")
    same(model.encode(TEXTS[3]), want[3], "a text alone")
    assert all(report.calls().values())


def lengths_are_ours():
    for model in (embedder(), embedder(systems.Normalize())):
        model.truncate_dim = 40
        raw = copy.deepcopy(model)
        rk.patch(model)
        rk.patch(raw)
        want = rk.normalize(torch.from_numpy(raw.encode(TEXTS)))
        same(model.encode(TEXTS, normalize_embeddings=True), want)
        same(model.encode(TEXTS[0], normalize_embeddings=True), want[0])
        same(np.stack(model.encode(TEXTS, normalize_embeddings=True, convert_to_numpy=False)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sentence_transformer_gives_the_bits_of_the_reranker(dtype):
    embeds_as_the_reranker(dtype)


def test_stock_sentence_transformer_does_not():
    model = embedder(systems.Normalize())
    one, many = (model.encode(TEXTS, batch_size=size) for size in (1, 32))
    assert (bits(one) != bits(many)).any()


def test_normalize_embeddings():
    lengths_are_ours()
    model = embedder()
    rk.patch(model)
    with pytest.raises(ValueError, match="precision must be float32 with normalize_embeddings=True, got 'int8'; end the model"):
        model.encode(TEXTS, normalize_embeddings=True, precision="int8")


@pytest.mark.parametrize(
    "mode, include_prompt",
    [("cls", True), ("mean", False), (("mean",), True), ("max", False), ("lasttoken", True), ("weightedmean", True)],
)
def test_pooling(mode, include_prompt):
    model = embedder(mode=mode, include_prompt=include_prompt)
    stock = model.encode(TEXTS, prompt="query: ", batch_size=1)
    rk.patch(model)
    got = model.encode(TEXTS, prompt="query: ")
    np.testing.assert_allclose(got, stock, rtol=0, atol=2e-5)
    same(got, model.encode(TEXTS, prompt="query: ", batch_size=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dense(dtype):
    model = embedder(systems.Dense(24, nn.Tanh()), dtype=dtype)
    stock = model.encode(TEXTS, batch_size=1)
    report = rk.patch(model)
    got = model.encode(TEXTS)
    np.testing.assert_allclose(got, stock, rtol=0, atol=2e-5 if dtype == torch.float32 else 4e-3)
    same(got, model.encode(TEXTS, batch_size=1))
    assert report.calls()["2.linear"] > 0 and report.calls()["2.activation_function"] > 0


@pytest.mark.parametrize("mode, shown", [("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"), (("cls", "mean"), r"cls\+mean")])
def test_other_poolings_are_refused(mode, shown):
    with pytest.raises(rk.PatchError, match=rf"Pooling \(pooling mode {shown} is not served; cls, mean, .*weightedmean are\)"):
        rk.patch(embedder(mode=mode))
    model = embedder()
    rk.patch(model)
    model[1].pooling_mode = mode
    with pytest.raises(ValueError, match=rf"Pooling: pooling mode {shown} is not served"):
        model.encode(TEXTS)


def test_weights_that_count_a_prompt_left_out_are_refused():
    model = embedder(mode="weightedmean", include_prompt=False)
    with pytest.raises(rk.PatchError, match="weightedmean is not served without the prompt; set include_prompt = True"):
        rk.patch(model)
    model[1].include_prompt = True
    rk.patch(model)
    assert model.encode(TEXTS, prompt="query: ").shape == (len(TEXTS), 64)
    model[1].include_prompt = False
    with pytest.raises(ValueError, match="weightedmean is not served without the prompt"):
        model.encode(TEXTS, prompt="query: ")


def test_modules_of_a_sentence_transformer_that_are_refused():
    with pytest.raises(rk.PatchError, match=r"SentenceTransformer, 2: Unflatten has modules"):
        rk.patch(embedder(nn.Unflatten(1, (8, 8))))
    with pytest.raises(rk.PatchError, match=r"Dense \(its activation_function is no torch\.nn\.Module\)"):
        rk.patch(embedder(systems.Dense(24, torch.tanh)))
    model = embedder()
    rk.patch(model)
    features = {"token_embeddings": torch.zeros(1, 2, 64), "token_weights_sum": torch.ones(1)}
    with pytest.raises(ValueError, match="Pooling: token_weights_sum is not served by a patched model"):
        model[1](features)


# ---- FlagEmbedding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_flag_reranker(half):
    reranker = systems.BaseReranker(systems.model())
    reranker.use_fp16 = half
    want = reference(reranker.model.half() if half else reranker.model).score(PAIRS).logit
    reranker.model.float()
    stock = [reranker.compute_score(PAIRS, size) for size in (1, 32)]
    assert stock[0] != stock[1]
    report = rk.patch(reranker)
    for size in (1, 7, 32):
        same(reranker.compute_score(PAIRS, size), want)
    assert report.calls()["model"] > 0 and report.overrides == {}
    with systems.installed():
        twin = pickle.loads(pickle.dumps(reranker))
    same(twin.compute_score(PAIRS), want, "in a worker")


def test_flag_reranker_with_stock_workers_is_refused():
    reranker = systems.BaseReranker(systems.model())
    rk.patch(reranker)
    reranker.pool = {"processes": []}
    rk.patch(reranker)  # nothing more: they were started with the patched model
    rk.unpatch(reranker)
    with pytest.raises(rk.PatchError, match=r"worker processes run already, .* call stop_self_pool\(\) first"):
        rk.patch(reranker)


def flag_embeds_as_the_reranker(pooling_method="cls", half=False):
    model = tiny_encoder().half() if half else tiny_encoder()
    honest = rk.Reranker(copy.deepcopy(model), tokenizer("xlm-roberta"), kind="embedding", max_length=130)
    honest.pooling = pooling_method
    want = honest.encode(TEXTS)
    embedder = systems.BaseEmbedder(model, pooling_method)
    rk.patch(embedder)
    for size in (1, 7, 32):
        same(embedder.encode(TEXTS, size), want, f"batches of {size}")
        same(embedder.encode(TEXTS, batch_size=size, convert_to_numpy=False), want, f"tensors, batches of {size}")
    same(embedder.encode(TEXTS[3]), want[3], "a text alone")
    embedder.tokenizer.padding_side = "left"
    same(embedder.encode(TEXTS), want, "padded on the left")
    return embedder, want


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("pooling_method", ["cls", "mean"])
def test_flag_model(pooling_method, half):
    embedder, want = flag_embeds_as_the_reranker(pooling_method, half)
    with systems.installed():
        twin = pickle.loads(pickle.dumps(embedder))
    same(twin.encode(TEXTS), want, "in a worker")
    stopped = type(embedder).stopped
    embedder.truncate_dim, embedder.normalize_embeddings = 20, False
    raw = embedder.encode(TEXTS)
    embedder.normalize_embeddings = True
    same(embedder.encode(TEXTS), rk.normalize(torch.from_numpy(raw)), "cut, then of length 1")
    assert type(embedder).stopped == stopped, "one that ends stops its workers: no copy of it may be made for a call"
    rk.unpatch(embedder)
    assert clean(embedder, embedder.model)


def test_stock_flag_model_does_not():
    embedder = systems.BaseEmbedder(tiny_encoder())
    one, many = (embedder.encode(TEXTS, size) for size in (1, 32))
    assert (bits(one) != bits(many)).any()
    embedder.tokenizer.padding_side = "left"
    assert np.abs(embedder.encode(TEXTS) - one).max() > 0.1, "stock takes padding for the first token"


def test_flag_model_s_own_errors_and_workers():
    embedder = systems.BaseEmbedder(tiny_encoder(), "last_token")
    rk.patch(embedder)
    with pytest.raises(NotImplementedError, match="pooling method last_token not implemented"):
        embedder.encode(TEXTS)
    rk.unpatch(embedder)
    embedder.pool = {"processes": []}
    with pytest.raises(rk.PatchError, match=r"call stop_self_pool\(\) first"):
        rk.patch(embedder)
    with pytest.raises(rk.PatchError, match=r"BGE-M3's sparse and multi-vector heads are not served; .*kind='embedding'"):
        rk.patch(systems.M3Embedder())


def tiny_encoder():
    own = tokenizer("xlm-roberta")
    return tiny("xlm-roberta", head=False, vocab_size=len(own), pad_token_id=own.pad_token_id)


def flag_llm_embeds_as_the_reranker(dtype=torch.float32):
    inner, own = systems.llm(cls="Model"), systems.llm_tokenizer("right")
    for p in inner.parameters():  # as from_pretrained loads them; .to() would round the angles too
        p.data = p.data.to(dtype)
    want = rk.Reranker(copy.deepcopy(inner).float(), own, kind="embedding", max_length=400)
    want.pooling = "lasttoken"
    embedder = systems.BaseLLMEmbedder(inner)
    stock = embedder.encode(TEXTS)
    rk.patch(embedder)
    for size in (1, 7, 32):
        same(embedder.encode(TEXTS, size), want.encode(TEXTS), f"batches of {size}")
    same(embedder.encode(TEXTS, convert_to_numpy=False), want.encode(TEXTS), "as a tensor")
    same(embedder.encode(TEXTS[0]), want.encode(TEXTS)[0], "a text alone")
    return embedder, stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flag_llm_model(dtype):
    embedder, stock = flag_llm_embeds_as_the_reranker(dtype)
    rk.unpatch(embedder)
    assert clean(embedder, embedder.model)
    same(embedder.encode(TEXTS), stock)
    one, many = (embedder.encode(TEXTS, size) for size in (1, 32))
    assert (bits(one) != bits(many)).any()


@pytest.mark.parametrize(
    "name, why",
    [
        ("LayerWiseLLMReranker", "heads of its own by layer, and is not served; FlagLLMReranker with bge-reranker-v2-gemma is"),
        (
            "LightweightLLMReranker",
            "heads of its own by layer, and is not served; FlagLLMReranker with bge-reranker-v2-gemma is",
        ),
        ("ICLLLMEmbedder", "it puts examples before its texts, and is not served; FlagLLMModel is"),
    ],
)
def test_what_of_flagembedding_is_refused(name, why):
    obj = type(name, (), {"__module__": "FlagEmbedding.inference"})()
    for strict in (True, False):
        with pytest.raises(rk.PatchError, match=rf"FlagEmbedding {name} cannot be served.*\n.*{why}"):
            rk.patch(obj, strict=strict)


# ---- Haystack ---------------------------------------------------------------------------------------------------------------

RANKERS = {"model": systems.TransformersSimilarityRanker, "_cross_encoder": systems.SentenceTransformersSimilarityRanker}
DOCUMENTS = [systems.Document(str(i), text) for i, text in enumerate(TEXTS)]


def haystack_ranks_by_logit(held, model):
    ranker = RANKERS[held](lambda: model)
    rk.patch(ranker)
    honest = reference(model)
    for options in ({}, {"top_k": 3}):
        got, want = ranker.run(query=QUERY, documents=DOCUMENTS, **options), honest.rank(QUERY, TEXTS, options.get("top_k"))
        assert [d.content for d in got["documents"]] == [one.document for one in want], "order differs"
        same([d.score for d in got["documents"]], [one.score for one in want])
    alone = [ranker.run(query=QUERY, documents=[d])["documents"][0].score for d in DOCUMENTS]
    same(alone, honest.score([(QUERY, text) for text in TEXTS]).score, "one document a list")


@pytest.mark.parametrize("held", RANKERS)
def test_haystack(held):
    haystack_ranks_by_logit(held, systems.model())
    haystack_ranks_by_logit(held, saturated(systems.model()))


@pytest.mark.parametrize("held", RANKERS)
def test_haystack_before_and_after_warm_up(held):
    ranker = RANKERS[held](systems.model)
    report = rk.patch(ranker)
    assert "warm_up" in report.overrides and report.calls() == {}
    lazily = ranker.run(query=QUERY, documents=DOCUMENTS)
    assert "warm_up" not in vars(ranker) and set(report.calls().values()) == {1}, "the first report is filled in"
    assert rk.patch(ranker).calls() == report.calls(), "once more changes nothing"
    ready = RANKERS[held](systems.model)
    ready.warm_up()
    rk.patch(ready)
    assert ready.run(query=QUERY, documents=DOCUMENTS) == lazily
    for one in (ranker, ready, RANKERS[held](systems.model)):
        rk.unpatch(one)
        assert clean(one) and (getattr(one, held) is None or clean(getattr(one, held)))


@pytest.mark.parametrize("held", RANKERS)
def test_haystack_with_a_model_that_is_refused(held):
    ranker = RANKERS[held](lambda: systems.model().train())
    model = systems.model()
    model.roberta.encoder.layer[0].output.dense = nn.Bilinear(1, 1, 1)
    ranker.load = lambda: model
    rk.patch(ranker)
    for _ in range(2):
        with pytest.raises(rk.PatchError, match=r"Haystack \w+, [\w.]+: XLMRoberta\w+ has modules that cannot be served"):
            ranker.run(query=QUERY, documents=DOCUMENTS)
        assert getattr(ranker, held) is None, "a model in place would rank, stock, at the second call"
    rk.unpatch(ranker)
    assert clean(ranker)


def test_haystack_options():
    model = systems.model()
    ranker, honest = systems.TransformersSimilarityRanker(lambda: model), reference(model)
    stock = systems.TransformersSimilarityRanker(systems.model)
    rk.patch(ranker)

    def run(**options):
        return ranker.run(QUERY, DOCUMENTS, **options)["documents"]

    want = honest.rank(QUERY, TEXTS)
    middle = want[4].score
    assert [d.content for d in run(score_threshold=middle)] == [one.document for one in want if one.score >= middle]
    for factor in (0.25, -1.0):
        scaled = rk.sigmoid(torch.tensor([one.logit for one in want]) * factor)
        order = range(len(want)) if factor > 0 else reversed(range(len(want)))
        got = run(calibration_factor=factor)
        assert [d.content for d in got] == [want[i].document for i in order]
        same(sorted(d.score for d in got), sorted(scaled.tolist()))
    for arguments in ({"top_k": -1}, {"documents": []}):
        arguments = {"query": QUERY, "documents": DOCUMENTS, **arguments}
        answers = []
        for one in (stock, ranker):
            try:
                answers.append(one.run(**arguments))
            except ValueError as error:
                answers.append(str(error))
        assert answers[0] == answers[1]
    ranker.calibration_factor = None
    with pytest.raises(ValueError, match="scale_score is True so calibration_factor must be provided"):
        run()
    ranker.scale_score = False
    same([d.score for d in run()], [one.logit for one in want])


def test_haystack_ties_keep_their_order():
    ranker = systems.TransformersSimilarityRanker(systems.model, top_k=100)
    rk.patch(ranker)
    documents = [systems.Document(f"{i}", TEXTS[i % 2]) for i in range(40)]
    ids = [int(d.id) for d in ranker.run(QUERY, documents)["documents"]]
    assert [i for i in ids if i % 2] == list(range(1, 40, 2)) and [i for i in ids if not i % 2] == list(range(0, 40, 2))


# ---- Infinity ---------------------------------------------------------------------------------------------------------------


def engines(model=None, **options):
    return systems.AsyncEngineArray(
        one=systems.AsyncEmbeddingEngine(systems.CrossEncoderPatched(model or systems.model()), **options)
    )


def infinity_ranks_by_logit(model):
    array, honest = engines(model), reference(model)
    rk.patch(array)
    for options in ({}, {"top_n": 3}, {"top_n": 0}, {"raw_scores": True}, {"raw_scores": True, "top_n": 3}):
        got, usage = asyncio.run(array.rerank(model="one", query=QUERY, docs=TEXTS, **options))
        want = honest.rank(QUERY, TEXTS, options.get("top_n") or None)
        assert [one.index for one in got] == [one.index for one in want], f"order differs with {options}"
        same([one.relevance_score for one in got], [one.logit if "raw_scores" in options else one.score for one in want])
        assert usage == len(TEXTS) and all(one.document == TEXTS[one.index] for one in got)
    assert isinstance(got[0], systems.RerankReturnType) and isinstance(got[0].relevance_score, np.float32)


def test_infinity():
    infinity_ranks_by_logit(systems.model())
    infinity_ranks_by_logit(saturated(systems.model()))
    array = engines()
    report = rk.patch(array)
    path = "engines_dict['one']._model_replicas[0].model"
    assert list(report.calls()) == [path, f"{path}.roberta"] and list(report.overrides) == ["engines_dict['one'].rerank"]
    rk.patch(array)
    rk.unpatch(array)
    assert clean(array.engines_dict["one"], array.engines_dict["one"]._model_replicas[0].model)
    assert rk.patch(array.engines_dict["one"]).system == "Infinity AsyncEmbeddingEngine"


def infinity_embeds_as_the_reranker():
    for more in ((), (systems.Normalize(),)):
        replica = embedder(*more, cls=systems.SentenceTransformerPatched)
        want = rk.Reranker(copy.deepcopy(replica[0].model), replica.tokenizer, kind="embedding", max_length=130).encode(TEXTS)
        array = systems.AsyncEngineArray(one=systems.AsyncEmbeddingEngine(replica))
        rk.patch(array)
        same(asyncio.run(array.embed(model="one", sentences=TEXTS)), want)
        same(asyncio.run(array.embed(model="one", sentences=TEXTS[:1])), want[:1])


def test_infinity_embeddings():
    infinity_embeds_as_the_reranker()
    replica = embedder(cls=systems.SentenceTransformerPatched)
    replica.mode_colbert = True
    with pytest.raises(rk.PatchError, match="ColBERT is not served"):
        rk.patch(systems.AsyncEngineArray(one=systems.AsyncEmbeddingEngine(replica)))


@systems.of("optimum.bettertransformer.models.encoder_models")
class BertLayerBetterTransformer(nn.Module):
    pass


@systems.of("infinity_emb.transformer.quantization.quant")
class WeightOnlyInt8Linear(nn.Module):
    pass


@pytest.mark.parametrize(
    "module, option",
    [
        (BertLayerBetterTransformer, r"bettertransformer=False \(--no-bettertransformer\)"),
        (WeightOnlyInt8Linear, "a dtype that"),
    ],
)
def test_infinity_modules_that_are_refused(module, option):
    model = systems.model()
    model.roberta.encoder.layer[0] = module()
    with pytest.raises(rk.PatchError, match=rf"\[0\]: model has a {module.__name__}; load it with {option}"):
        rk.patch(engines(model))


def test_infinity_engines_that_are_refused():
    with pytest.raises(rk.PatchError, match=r"its disk cache .* \(--no-vector-disk-cache\)"):
        rk.patch(engines(vector_disk_cache_path="cache"))
    with pytest.raises(rk.PatchError, match=r"dtype='int8' is quantised; load it with .* \(--dtype float32, "):
        rk.patch(engines(dtype=SimpleNamespace(value="int8")))
    classifier = systems.AsyncEmbeddingEngine(systems.SentenceClassifier())
    with pytest.raises(
        rk.PatchError, match=r'SentenceClassifier is not served.*load it with engine="torch" \(--engine torch\)'
    ):
        rk.patch(classifier)
    good = systems.AsyncEmbeddingEngine(systems.CrossEncoderPatched(systems.model()))
    bad = systems.model()
    bad.roberta.encoder.layer[1].output.dense = nn.Bilinear(1, 1, 1)
    array = systems.AsyncEngineArray(good=good, bad=systems.AsyncEmbeddingEngine(systems.CrossEncoderPatched(bad)))
    with pytest.raises(rk.PatchError, match=r"engines_dict\['bad'\]\._model_replicas\[0\]\.model: XLMRoberta"):
        rk.patch(array)
    assert clean(good, good._model_replicas[0].model), "all or nothing"


# ---- LangChain and LlamaIndex -----------------------------------------------------------------------------------------------

WRAPPED = {
    "langchain_huggingface": lambda: systems.HuggingFaceEmbeddings(embedder(), normalize_embeddings=True),
    "langchain_community": lambda: systems.HuggingFaceBgeEmbeddings(embedder(systems.Normalize())),
    "llama_index": lambda: systems.HuggingFaceEmbedding(embedder()),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_embedders(wrapped):
    held = WRAPPED[wrapped]()
    inner = held._model if wrapped == "llama_index" else held._client if hasattr(held, "_client") else held.client
    want = rk.Reranker(copy.deepcopy(inner[0].model), inner.tokenizer, kind="embedding", max_length=130).encode(TEXTS)
    texts, query = (held._get_text_embeddings, held._get_query_embedding) if wrapped == "llama_index" else (
        held.embed_documents, held.embed_query)  # fmt: skip
    stock = [query(text) for text in TEXTS], texts(TEXTS)
    assert (bits(stock[0]) != bits(stock[1])).any(), "stock does not"
    report = rk.patch(held)
    same(texts(TEXTS), want, "texts")
    same([query(text) for text in TEXTS], want, "a query each")
    assert all(report.calls().values()) and all(path.startswith(("_client", "client", "_model")) for path in report.calls())
    assert clean(held), "nothing of the wrapper is changed"
    rk.unpatch(held)
    assert clean(inner)


def test_wrapped_cross_encoders(version):
    encoder = VERSIONS[version](systems.model())
    want = reference(encoder.model).score(PAIRS).score
    langchain = systems.HuggingFaceCrossEncoder(encoder)
    report = rk.patch(langchain)
    same(langchain.score(PAIRS), want, "LangChain")
    same([langchain.score([pair])[0] for pair in PAIRS], want, "LangChain, a pair each")
    assert report.system == "LangChain HuggingFaceCrossEncoder" and set(report.overrides) == {"client.predict", "client.rank"}
    rk.unpatch(langchain)
    assert clean(encoder, encoder.model, langchain)
    llama = systems.SentenceTransformerRerank(encoder, top_n=len(TEXTS))
    rk.patch(llama)
    alone = [llama._postprocess_nodes([one], QUERY)[0].score for one in DOCUMENTS]
    ranked = llama._postprocess_nodes(DOCUMENTS, QUERY)
    same([one.score for one in ranked], sorted(alone, reverse=True), "LlamaIndex")


def test_the_advice_for_wrappers_that_sort_by_score():
    """Their notes name what sorts by logit; it is tried here."""
    encoder = systems.CrossEncoder(saturated(systems.model()), nn.Identity())
    want = [one.document for one in reference(encoder.model).rank(QUERY, TEXTS)]
    llama = systems.SentenceTransformerRerank(encoder, top_n=len(TEXTS))
    assert any("'activation_fn': torch.nn.Identity()" in note for note in rk.patch(llama).notes)
    assert [node.content for node in llama._postprocess_nodes(DOCUMENTS, QUERY)] == want
    langchain = systems.HuggingFaceCrossEncoder(systems.CrossEncoder(saturated(systems.model())))
    langchain.client.activation_fn = nn.Identity()
    assert any("set client.activation_fn to torch.nn.Identity()" in note for note in rk.patch(langchain).notes)
    scores = langchain.score([(QUERY, text) for text in TEXTS])
    assert [TEXTS[i] for i in sorted(range(len(TEXTS)), key=lambda i: -scores[i])] == want


def test_wrappers_around_something_else_are_refused():
    for obj, path in (
        (systems.HuggingFaceEmbeddings(nn.Linear(2, 2)), "_client"),
        (systems.HuggingFaceCrossEncoder(nn.Linear(2, 2)), "client"),
        (systems.SentenceTransformerRerank(nn.Linear(2, 2)), "_model"),
    ):
        with pytest.raises(
            rk.PatchError, match=rf"its {path} is a Linear, and only sentence-transformers' \w+ is served there"
        ):
            rk.patch(obj)
    held = systems.HuggingFaceCrossEncoder(systems.CrossEncoder(systems.model()))
    held.score = print
    with pytest.raises(rk.PatchError, match="HuggingFaceCrossEncoder has a score of its own"):
        rk.patch(held)


# ---- settings of the process ------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    yield settings
    settings.fp32_precision = before


def test_tf32_is_warned_of_where_it_reaches_a_product(tf32):
    with pytest.warns(UserWarning, match="allow_tf32 is set, and backend 'pytorch'"):
        report = rk.patch(systems.CrossEncoder(systems.model()), backend="pytorch")
    assert "allow_tf32 is set" in report.notes[-1]
    assert not any("tf32" in note for note in rk.patch(systems.CrossEncoder(systems.model()), backend="cpu").notes)
    tf32.fp32_precision = "ieee"
    assert not any("tf32" in note for note in rk.patch(systems.CrossEncoder(systems.model()), backend="pytorch").notes)


# ---- decoders that answer ---------------------------------------------------------------------------------------------------


def answers_as_one_dot(dtype=torch.bfloat16, false=True):
    """CrossEncoder around a language head: the log-odds that the packed entry gives for the same tokens."""
    own, inner = systems.llm_tokenizer(), systems.llm(dtype=dtype)
    yes, no = own.convert_tokens_to_ids(["yes", "no"])
    encoder = systems.CrossEncoder(inner, None, systems.LogitScore(yes, no if false else None))
    ids = [torch.tensor(own(*pair)["input_ids"]) for pair in PAIRS]
    twin = copy.deepcopy(inner)
    rk.patch(twin)
    cu = torch.tensor([0, *np.cumsum([len(i) for i in ids])], dtype=torch.int32)
    want = served.packed_answers(twin, torch.cat(ids), cu, yes, no if false else None)
    report = rk.patch(encoder)
    for size in (1, 7, 32):
        same(encoder.predict(PAIRS, batch_size=size, activation_fn=nn.Identity()), want.logit[:, 0], f"batches of {size}")
        same(encoder.predict(PAIRS, batch_size=size), want.score[:, 0], f"scores, batches of {size}")
    features = dict(systems._padded(PAIRS[:3], own))
    same(encoder(features)["scores"], want.logit[:3], "called by itself")
    ranked = encoder.rank(QUERY, TEXTS)
    assert [one["corpus_id"] for one in ranked] == sorted(range(len(TEXTS)), key=lambda i: (-want.logit[i, 0].item(), i))
    assert all(report.calls().values())
    return encoder, want


@pytest.mark.parametrize("false", [True, False], ids=["yes beside no", "yes alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_encoder_around_a_language_head(dtype, false):
    encoder, want = answers_as_one_dot(dtype, false)
    features = encoder[0](dict(systems._padded(PAIRS, encoder.tokenizer)))
    assert features["causal_logits"].shape[-1] > 1, "nobody asked"
    np.testing.assert_allclose(encoder[1](features)["scores"].numpy(), want.logit.numpy(), rtol=0, atol=1e-5)
    for carry in (copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))):
        with systems.installed():
            twin = carry(encoder)
        same(twin.predict(PAIRS), want.score[:, 0], "a copy")
    rk.unpatch(encoder)
    assert clean(encoder, *encoder)
    one, many = (encoder.predict(PAIRS, batch_size=size, activation_fn=nn.Identity()) for size in (1, 32))
    assert (bits(one) != bits(many)).any(), "stock must move, or the above shows nothing"
    assert dtype == torch.float32 or np.abs(one - want.logit[:, 0].numpy()).max() > 1e-3, "stock's two rounded logits"


def test_cross_encoder_around_a_language_head_is_refused():
    def held(*scores):
        return systems.CrossEncoder(systems.llm(), None, *scores)

    words = systems.llm().config.vocab_size
    with pytest.raises(
        rk.PatchError, match=rf"\[1\] LogitScore asks for token {words}, and the model has tokens 0 to {words - 1}"
    ):
        rk.patch(held(systems.LogitScore(1, words)))
    with pytest.raises(rk.PatchError, match="it has several LogitScore modules, and one is served; leave one"):
        rk.patch(held(systems.LogitScore(1), systems.LogitScore(2)))
    rk.patch(held(systems.LogitScore(1, words - 1)))
    encoder = held(systems.LogitScore(1))
    rk.patch(encoder)
    encoder[0].model = systems.llm()
    with pytest.raises(rk.PatchError, match=r"its model is not the one that rk\.patch\(\) saw"):
        encoder(dict(systems._padded(PAIRS[:1], encoder.tokenizer)))


FEW = PAIRS[5:15]


def flag_answers_as_the_reranker(dtype=torch.bfloat16, side="right", pad=True, kind="gemma"):
    own, inner = copy.deepcopy(systems.llm_tokenizer(side)), systems.llm(kind, dtype)
    own.model_max_length = 400
    want = rk.Reranker(copy.deepcopy(inner), own, template="bge-reranker-v2-gemma").score(FEW)
    if not pad:
        own.pad_token = None
    flag = systems.BaseLLMReranker(inner, own)
    report = rk.patch(flag)
    for size in (1, 7, 128):
        same(flag.compute_score(FEW, batch_size=size), want.logit, f"batches of {size}")
    np.testing.assert_allclose(flag.compute_score(FEW, normalize=True), want.score, rtol=0, atol=1e-6)
    same(flag.compute_score(FEW[0]), want.logit[:1], "a pair alone")
    assert all(report.calls().values()) and flag.use_fp16 is False, "what it writes of itself is written"
    return flag, want


@pytest.mark.parametrize("side, pad", [("right", True), ("left", True), ("right", False), ("left", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flag_llm_reranker_gives_the_bits_of_the_reranker(dtype, side, pad):
    flag, want = flag_answers_as_the_reranker(dtype, side, pad)
    for carry in (copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))):
        with systems.installed():
            same(carry(flag).compute_score(FEW), want.logit, "a copy")
    rk.unpatch(flag)
    assert clean(flag, flag.model)
    if pad:
        stock = flag.compute_score(FEW)
        same(stock, systems.BaseLLMReranker(systems.llm("gemma", dtype), flag.tokenizer).compute_score(FEW), "stock again")
        assert dtype == torch.float32 or np.abs(stock - want.logit).max() > 1e-3, "stock's rounded logit"


def test_flag_llm_reranker_with_a_cap():
    """Gemma 2 caps the logits of its words."""
    flag_answers_as_the_reranker(torch.float32, kind="gemma2")


def test_stock_flag_llm_reranker_does_not():
    flag = systems.BaseLLMReranker(systems.llm())
    pairs = [*PAIRS, [QUERY, " ".join(CORPUS)[:400]]]
    one, many = (flag.compute_score(pairs, batch_size=size) for size in (1, 41))
    assert (bits(one) != bits(many)).any()
    flag.tokenizer = copy.deepcopy(flag.tokenizer)
    flag.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="does not have a padding token"):
        flag.compute_score(PAIRS)


def test_flag_llm_reranker_says_what_is_wrong():
    """It takes a RuntimeError for a lack of memory and asks for less, until nothing is left."""
    flag = systems.BaseLLMReranker(systems.llm("gemma"))
    rk.patch(flag)
    handle = flag.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(rk.PatchError, match=r"layers\.0\.mlp\.gate_proj \(Linear\) has forward hooks"):
        flag.compute_score(FEW)
    handle.remove()
    assert len(flag.compute_score(FEW)) == len(FEW), "the advice helps"
    flag.model = systems.llm("gemma")
    with pytest.raises(rk.PatchError, match=r"its model is not the one that rk\.patch\(\) saw"):
        flag.compute_score(FEW)
    rk.unpatch(flag)
    flag.yes_loc = 10_000
    with pytest.raises(rk.PatchError, match=r"it asks for token 10000, and the model has tokens 0 to"):
        rk.patch(flag)


def test_flag_llm_reranker_where_memory_is_short():
    flag, sizes, widths = systems.BaseLLMReranker(systems.llm("gemma")), [], set()
    rk.patch(flag)
    want = flag.compute_score(FEW)

    def full(model, args, given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > 5:
            raise RuntimeError("no memory left")

    flag.model.register_forward_pre_hook(full, with_kwargs=True)
    flag.model.register_forward_hook(lambda model, args, out: widths.add(out.logits.shape[1:]))
    same(flag.compute_score(FEW, batch_size=8), want)
    assert widths == {(1, 1)}, "one word at one place"
    assert sizes == [8, 6, 4, 4, 2], "a batch is made smaller until it fits, and the first is computed once"


def test_undone_on_the_way():
    """unpatch() while a call runs: it ends as stock."""
    flag = systems.BaseLLMReranker(systems.llm("gemma"))
    want = flag.compute_score(FEW)
    rk.patch(flag)
    flag.model.register_forward_pre_hook(lambda *_: rk.unpatch(flag))
    same(flag.compute_score(FEW), want)


# ---- the tests are tested ---------------------------------------------------------------------------------------------------


def stock(method, *args, **kwargs):
    """An override that overrides nothing."""
    return method.original(*args, **kwargs)


# What the resolvers put in place of a method, read from their sources, so that no new one goes without a mutant.
HONEST = {
    f"{file.stem}.{name}": getattr(getattr(table, file.stem), name)
    for file in Path(table.__file__).parent.glob("*.py")
    for name in re.findall(r'verride\(\w+, "(\w+)", \w+, "', file.read_text())
}


def by_score(method, *args, **kwargs):
    """rank() with the right scores, in their order."""
    return sorted(method.original(*args, **kwargs), key=lambda one: one["corpus_id"], reverse=False)


def unstable(method, query, documents, **options):
    """Haystack's run in the order of the scores."""
    found = HONEST["haystack.run"](method, query, documents, **options)
    return {"documents": sorted(found["documents"], key=lambda d: (-d.score, d.id))}


def forgetful(method, *args, **kwargs):
    """The activation that is handed in with the call stays PyTorch's."""
    if isinstance(kwargs.get("activation_fct"), nn.Sigmoid):
        return method.original(*args, **kwargs)
    return HONEST["sentence_transformers.predict"](method, *args, **kwargs)


def rounded(method, *args, **kwargs):
    """The logit in the model's dtype."""
    scores = HONEST["flag_llm.compute_score_single_gpu"](method, *args, **kwargs)
    return torch.tensor(scores).to(method.holder.model.dtype).float().tolist()


MUTANTS = [
    ("sentence_transformers.predict", stock, lambda: many_scores("3")),
    ("sentence_transformers.predict", stock, lambda: many_scores("6")),
    ("sentence_transformers.predict", stock, lambda: softmax_is_ours("6", systems.model(num_labels=3))),
    ("sentence_transformers.predict", forgetful, lambda: many_scores("3", nn.Sigmoid())),
    ("sentence_transformers.rank", stock, lambda: ranked_by_logit("3", saturated(systems.model()))),
    ("sentence_transformers.rank", stock, lambda: ranked_by_logit("6", saturated(systems.model()))),
    ("sentence_transformers.rank", by_score, lambda: ranked_by_logit("6", systems.model())),
    ("sentence_transformers.forward", stock, lambda: answers_as_one_dot()),
    ("sentence_transformers.encode", stock, lambda: embeds_as_the_reranker()),
    ("flagembedding.pooling", stock, flag_embeds_as_the_reranker),
    ("flagembedding.encode_single_device", stock, flag_embeds_as_the_reranker),
    ("flagembedding.encode_single_device", stock, flag_llm_embeds_as_the_reranker),
    ("flag_llm.compute_score_single_gpu", rounded, lambda: flag_answers_as_the_reranker()),
    ("haystack.run", stock, lambda: haystack_ranks_by_logit("model", saturated(systems.model()))),
    ("haystack.run", unstable, lambda: haystack_ranks_by_logit("model", saturated(systems.model()))),
    ("haystack.warm_up", stock, lambda: haystack_ranks_by_logit("model", systems.model())),
    ("infinity.rerank", stock, lambda: infinity_ranks_by_logit(saturated(systems.model()))),
    ("infinity.encode_post", stock, lambda: infinity_embeds_as_the_reranker()),
]


def many_scores(version, activation=None):
    """As one_score_a_pair, with lists long enough that PyTorch's sigmoid has a full vector and a tail."""
    encoder = VERSIONS[version](systems.model())
    pairs = [[f"{query} {i}", document] for i in range(5) for query, document in PAIRS]
    rk.patch(encoder)
    want = rk.sigmoid(torch.from_numpy(encoder.predict(pairs, **{ACTIVATION[version]: nn.Identity()})))
    for size in (1, 32):
        same(encoder.predict(pairs, batch_size=size, **{ACTIVATION[version]: activation}), want, f"batches of {size}")


@pytest.mark.parametrize(
    "key, mutant, check", MUTANTS, ids=[f"{key}-{m.__name__}-{i}" for i, (key, m, _) in enumerate(MUTANTS)]
)
def test_mutant_is_caught(monkeypatch, key, mutant, check):
    check()
    module, name = key.split(".")
    monkeypatch.setattr(getattr(table, module), name, mutant)
    with pytest.raises((AssertionError, rk.PatchError), match=r"differ|order|its model is not the one"):
        check()


def test_every_override_has_a_mutant():
    assert {key for key, *_ in MUTANTS} == set(HONEST)


def test_every_system_has_its_row():
    """The table finds each class of systems.py and lora.py; one of another package with the same name is none of them."""
    found = {(cls.__module__.partition(".")[0], cls.__qualname__) for cls in systems.FAKES}
    assert lora.PeftModel in systems.FAKES and found & set(table.SYSTEMS) == set(table.SYSTEMS) - {
        ("FlagEmbedding", "ICLLLMEmbedder"),
        ("FlagEmbedding", "LayerWiseLLMReranker"),
        ("FlagEmbedding", "LightweightLLMReranker"),
        ("haystack", "SentenceTransformersSimilarityRanker"),
        ("infinity_emb", "SyncEngineArray"),
        ("langchain_community", "HuggingFaceEmbeddings"),
    }
    stranger = type("CrossEncoder", (), {"__module__": "elsewhere"})()
    stranger.model = systems.model()
    with pytest.raises(TypeError, match=r"got CrossEncoder; .*, pass its \.model"):
        rk.patch(stranger)
    assert table.resolve(SimpleNamespace()) is None and walk.unknown(systems.model()) == {}
