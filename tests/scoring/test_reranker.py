"""Reranker: one score per pair whatever the list, ranked by logit; with a tiny cross-encoder, and MiniLM for embeddings."""

from __future__ import annotations

import json
import math
import shutil
import threading

import numpy as np
import pytest
import torch

import rerank_kernels as rk
from models import CORPUS, POSITIONS, minilm, save_cross_encoder, tiny, tokenizer
from rerank_kernels.scoring import reranker as module

QUERY = CORPUS[0]
PAIRS = [(q, d) for q in CORPUS[:3] for d in (*CORPUS, "", CORPUS[1] * 9)]
ODD = ["", " ", "\n\t\0", "<s></s><pad>", "🙂" * 40, "e\u0301 ≠ é", "a" * 3000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="module")
def cross(folder):
    return rk.Reranker(folder)


@pytest.fixture(scope="module")
def embedding():
    return rk.Reranker(minilm())


def same(a, b):
    return all(np.array_equal(x.view(np.uint32), y.view(np.uint32)) for x, y in zip(a, b, strict=True))


# ---- scores -----------------------------------------------------------------------------------------------------------------


def test_scores_are_the_patched_model_on_padded_batches(cross):
    scores = cross.score(PAIRS)
    assert all(a.dtype == np.float32 and a.shape == (len(PAIRS),) for a in scores)
    assert len(set(scores.logit.tolist())) == len(set(PAIRS))
    batch = cross.tokenizer([q for q, _ in PAIRS], [d for _, d in PAIRS], padding=True, truncation=True, return_tensors="pt")
    logits = cross.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert same([scores.logit], [logits.numpy()])
    assert same([scores.score, scores.complement], [rk.sigmoid(logits).numpy(), rk.sigmoid(-logits).numpy()])


@pytest.mark.parametrize("kind", ["cross", "embedding"])
def test_a_pair_has_one_score(kind, request):
    reranker = request.getfixturevalue(kind)
    pairs = PAIRS[:14]
    want = reranker.score(pairs)
    order = np.random.default_rng(0).permutation(len(pairs))
    assert same(reranker.score([pairs[i] for i in order]), [a[order] for a in want])
    assert same(reranker.score(pairs, batch_tokens=1), want), "one pair at a time"
    assert same(reranker.score(pairs, batch_tokens=100), want)
    assert same(reranker.score(pairs * 2), [np.tile(a, 2) for a in want])
    assert same(reranker.score([list(p) for p in pairs], progress=False), want), "lists are pairs too"


def test_scores_near_one_tie_where_logits_and_complements_do_not(folder):
    reranker = rk.Reranker(folder)
    with torch.no_grad():
        reranker.model.classifier.out_proj.bias += 25.0
    scores = reranker.score(PAIRS[:8])
    assert set(scores.score.tolist()) == {1.0}
    assert len(set(scores.logit.tolist())) == len(set(scores.complement.tolist())) == 8


def test_any_text_is_fine(cross):
    pairs = [(a, b) for a in ODD for b in ODD]
    scores = cross.score(pairs)
    assert np.isfinite(scores.logit).all()
    assert same(cross.score(pairs[::-1]), [a[::-1] for a in scores])


def test_half_bodies_give_float32_scores(folder):
    want = rk.Reranker(folder).score(PAIRS).logit
    for dtype, bound in ((torch.float16, 2e-2), (torch.bfloat16, 2e-1)):
        reranker = rk.Reranker(folder, dtype=dtype)
        assert next(reranker.model.parameters()).dtype == dtype
        logit = reranker.score(PAIRS).logit
        assert logit.dtype == np.float32 and np.abs(logit - want).max() < bound
        assert same([reranker.score(PAIRS[5:6]).logit], [logit[5:6]])


def test_empty_lists(cross, embedding):
    for reranker in (cross, embedding):
        assert [a.shape for a in reranker.score([])] == [(0,)] * 3
        assert reranker.rank(QUERY, []) == []
    assert embedding.encode([]).shape == (0, 384)


def test_max_length_truncates_the_longer_text(cross, folder):
    assert cross.max_length == POSITIONS - 10, "the tokenizer's, which is less than the position table's"
    short = rk.Reranker(folder, max_length=16)
    assert same(short.score([(QUERY, "b " * 500)]), short.score([(QUERY, "b " * 900)]))
    assert not same(short.score([(QUERY, "b " * 500)]), cross.score([(QUERY, "b " * 500)]))
    longest = rk.Reranker(folder, max_length=POSITIONS - 2)  # RoBERTa's first position is padding_idx + 1 = 2
    assert np.isfinite(longest.score([("a b " * 200, "c d " * 200)]).logit).all()


def test_a_loaded_model_is_served_in_place(folder, cross):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    reranker = rk.Reranker(model, cross.tokenizer)
    assert reranker.model is model and reranker.report.calls()[""] == 0
    assert same(reranker.score(PAIRS), cross.score(PAIRS))
    assert reranker.report.calls()[""] > 0


def test_sentence_transformers_cross_encoder_gives_the_same_bits(folder, cross):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = st.CrossEncoder(str(folder), device="cpu")
    report = rk.patch(model)
    activation = "activation_fn" if hasattr(model, "activation_fn") else "activation_fct"  # before version 4
    for size in (1, 7, 32):
        logits = model.predict(PAIRS, batch_size=size, **{activation: torch.nn.Identity()})
        assert same([logits], [cross.score(PAIRS).logit])
    assert report.calls()["model"] > 0


def test_sentence_transformers_predict_gives_the_same_bits_at_every_batch_size(folder, cross):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = st.CrossEncoder(str(folder), device="cpu")
    rk.patch(model)
    draw = np.random.default_rng(0)
    pairs = [(f"{CORPUS[a]} {i}", CORPUS[b]) for i, (a, b) in enumerate(draw.integers(0, len(CORPUS), (520, 2)))]
    want = cross.score(pairs).score
    assert len(set(want.tolist())) > 400
    for size in (1, 32):
        got = model.predict(pairs, batch_size=size, show_progress_bar=False)
        assert int((got.view(np.uint32) != want.view(np.uint32)).sum()) == 0, f"batch_size {size}"


def test_bert_token_types_reach_the_model():
    own = tokenizer("bert")
    reranker = rk.Reranker(tiny("bert", vocab_size=len(own)), own)
    batch = own([QUERY], [CORPUS[1]], return_tensors="pt")
    assert batch["token_type_ids"].any()
    assert same([reranker.score([(QUERY, CORPUS[1])]).logit], [reranker.model(**batch).logits[:, 0].numpy()])


def test_threads_can_share_a_reranker(cross):
    want, got, errors = cross.score(PAIRS), {}, []

    def work(i):
        try:
            got[i] = cross.score(PAIRS[i:] + PAIRS[:i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and all(same(got[i], [np.roll(a, -i) for a in want]) for i in range(6))


# ---- ranking ----------------------------------------------------------------------------------------------------------------


def test_rank_sorts_by_logit_and_keeps_index_and_text(cross):
    ranked = cross.rank(QUERY, CORPUS)
    scores = cross.score([(QUERY, d) for d in CORPUS])
    assert [r.index for r in ranked] == sorted(range(len(CORPUS)), key=lambda i: -scores.logit[i])
    assert all(r.document == CORPUS[r.index] and r.logit == scores.logit[r.index] for r in ranked)
    assert all(r.score == scores.score[r.index] and r.complement == scores.complement[r.index] for r in ranked)
    assert cross.rank(QUERY, CORPUS, top_k=3) == ranked[:3]
    assert cross.rank(QUERY, CORPUS, top_k=0) == [] and len(cross.rank(QUERY, CORPUS, top_k=99)) == len(CORPUS)
    assert [r.index for r in cross.rank(QUERY, [CORPUS[4]] * 5)] == list(range(5)), "equal logits by ascending index"


def test_rank_goes_by_logit_not_score_and_puts_nan_last(cross, monkeypatch):
    logit = np.array([20.0, math.nan, 30.0, -math.inf, 20.0, math.inf, -0.0, 0.0], np.float32)
    monkeypatch.setattr(cross, "score", lambda pairs: module.Scores(logit, np.ones(8, np.float32), np.zeros(8, np.float32)))
    assert [r.index for r in cross.rank("q", list("abcdefgh"))] == [5, 2, 0, 4, 6, 7, 3, 1]


def test_what_can_be_read_once_is_read_once(cross, embedding):
    scores = cross.score(PAIRS)
    queries, documents = zip(*PAIRS, strict=True)
    assert same(cross.score(zip(queries, documents, strict=True)), scores)
    assert same(cross.score(pair for pair in PAIRS), scores)
    assert cross.rank(QUERY, (d for d in CORPUS)) == cross.rank(QUERY, CORPUS)
    assert cross.rank(QUERY, dict.fromkeys(CORPUS).keys()) == cross.rank(QUERY, np.array(CORPUS)) == cross.rank(QUERY, CORPUS)
    assert same([embedding.encode(d for d in CORPUS)], [embedding.encode(CORPUS)])
    assert [a.shape for a in cross.score(iter(()))] == [(0,)] * 3


@pytest.mark.parametrize("count", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=lambda n: type(n).__name__)
def test_top_k_is_any_integer(cross, count):
    assert cross.rank(QUERY, CORPUS, top_k=count) == cross.rank(QUERY, CORPUS, top_k=3)


# ---- the embedding model ----------------------------------------------------------------------------------------------------


def test_minilm_reads_the_sentence_transformers_files(embedding):
    assert (embedding.kind, embedding.pooling, embedding.normalise, embedding.max_length) == ("embedding", "mean", True, 256)


def test_minilm_embeddings_are_those_of_stock(embedding):
    from transformers import AutoModel

    texts = [*CORPUS, "", "capital " * 400]
    vectors = embedding.encode(texts)
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    batch = embedding.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    mask = batch["attention_mask"][..., None].double()
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(minilm()).eval().double()(**batch).last_hidden_state
    truth = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert (torch.from_numpy(vectors) - truth).abs().max() < 2e-6
    assert same([embedding.encode(texts[3:4])], [vectors[3:4]])


def test_minilm_ranks_by_cosine_and_encodes_a_text_once(embedding, monkeypatch):
    encoded = []
    encode = embedding._encode
    monkeypatch.setattr(embedding, "_encode", lambda texts, *rest: encoded.extend(texts) or encode(texts, *rest))
    ranked = embedding.rank(QUERY, [*CORPUS[1:], CORPUS[1], QUERY])
    assert sorted(encoded) == sorted(set(CORPUS))
    assert ranked[0].document == QUERY and [r.document for r in ranked[1:3]] == [CORPUS[1]] * 2
    assert abs(ranked[0].logit - 1.0) < 1e-6
    assert all(r.score == r.logit and r.complement == np.float32(1) - np.float32(r.logit) for r in ranked)


def flagged(mode):
    """As before version 5.4 of sentence-transformers."""
    return {f"pooling_mode_{mode}{'' if mode == 'lasttoken' else '_tokens'}": True, "pooling_mode_mean_tokens": False}


def copy_of_minilm(to, **files):
    """The folder of MiniLM with some files written anew; None leaves one out."""
    for file in minilm().iterdir():
        if file.is_file() and file.name not in files:
            shutil.copy(file, to)
    (to / "1_Pooling").mkdir()
    for name, content in files.items():
        if content is not None:
            (to / name).write_text(json.dumps(content))
    return to


@pytest.mark.parametrize(
    "pooling, message",
    [
        (
            {"pooling_mode_mean_sqrt_len_tokens": True},
            "1_Pooling's pooling mode must be cls or .* or max or .*, got mean_sqrt_len",
        ),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"got cls \+ mean"),
        ({"pooling_mode": ["max", "mean"]}, r"got max \+ mean"),
    ],
)
def test_other_poolings_are_refused(tmp_path, pooling, message):
    with pytest.raises(ValueError, match=message):
        rk.Reranker(copy_of_minilm(tmp_path, **{"1_Pooling/config.json": pooling}))


@pytest.mark.parametrize("mode", ["max", "lasttoken", "weightedmean"])
@pytest.mark.parametrize("written", [lambda mode: {"pooling_mode": mode}, flagged], ids=["name", "flag"])
def test_pooling_as_the_folder_says(tmp_path, mode, written):
    """As sentence-transformers' own module of that mode, in float64."""
    pooling = pytest.importorskip("sentence_transformers.models", reason="sentence-transformers is not installed").Pooling
    reranker = rk.Reranker(copy_of_minilm(tmp_path, **{"1_Pooling/config.json": written(mode)}))
    assert reranker.pooling == mode
    batch = reranker.tokenizer(CORPUS, padding=True, return_tensors="pt")
    states = reranker.model(**batch).last_hidden_state.double()
    stock = pooling(states.shape[-1], pooling_mode=mode)
    truth = stock({"token_embeddings": states, "attention_mask": batch["attention_mask"]})["sentence_embedding"]
    np.testing.assert_allclose(reranker.encode(CORPUS), truth / truth.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    assert same([reranker.encode([text])[0] for text in CORPUS], reranker.encode(CORPUS))


def test_cls_pooling_without_normalize(tmp_path):
    modules = json.loads((minilm() / "modules.json").read_text())[:2]
    files = {"1_Pooling/config.json": {"pooling_mode": "cls"}, "modules.json": modules}
    reranker = rk.Reranker(copy_of_minilm(tmp_path, **files))
    assert (reranker.pooling, reranker.normalise) == ("cls", False)
    batch = reranker.tokenizer([QUERY], return_tensors="pt")
    assert same([reranker.encode([QUERY])], [reranker.model(**batch).last_hidden_state[:, 0].numpy()])
    assert abs(reranker.score([(QUERY, QUERY)]).logit[0] - 1) < 1e-6, "a cosine is of unit vectors all the same"


def test_other_modules_and_prompts_are_refused(tmp_path):
    modules = [
        *json.loads((minilm() / "modules.json").read_text()),
        {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (tmp_path / "a" / "3_Dense").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"modules\.json must be Transformer, Pooling and .*, got .*, Dense"):
        rk.Reranker(copy_of_minilm(tmp_path / "a", **{"modules.json": modules}))
    (tmp_path / "b").mkdir()
    files = {
        "config_sentence_transformers.json": {"default_prompt_name": "question"},
        "1_Pooling/config.json": {"pooling_mode": "mean"},
    }
    with pytest.raises(ValueError, match="default_prompt_name must be one of its prompts, query, document, got 'question'"):
        rk.Reranker(copy_of_minilm(tmp_path / "b", **files))


# ---- the bar ----------------------------------------------------------------------------------------------------------------


def test_progress(cross, capfd, monkeypatch):
    want = cross.score(PAIRS)
    assert capfd.readouterr().err == ""
    assert same(cross.score(PAIRS, progress=True), want)
    captured = capfd.readouterr()
    assert f"{len(PAIRS)}/{len(PAIRS)}" in captured.err and captured.out == ""
    shown = []
    monkeypatch.setattr(module, "_bar", lambda n, show: shown.append(show) or bar(n, False))
    monkeypatch.setattr(module, "PROGRESS_FROM", 4)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    cross.score(PAIRS[:4])
    cross.score(PAIRS[:5])
    cross.score(PAIRS[:5], progress=False)
    assert shown == [False, True, False]


bar = module._bar


# ---- errors -----------------------------------------------------------------------------------------------------------------


def test_pairs_that_are_none(cross, embedding):
    good = (QUERY, CORPUS[1])
    with pytest.raises(TypeError, match=r"score: pair 1 must be \(query, document\), got str 'text'"):
        cross.score([good, "text"])
    with pytest.raises(TypeError, match=r"score: pair 0 must be \(query, document\), got tuple"):
        cross.score([(*good, "third")])
    with pytest.raises(TypeError, match="score: the document of pair 2 must be a str, got NoneType None"):
        cross.score([good, good, (QUERY, None)])
    with pytest.raises(TypeError, match="score: the query of pair 1 must be a str, got bytes"):
        embedding.score([good, (b"q", "d")])
    with pytest.raises(
        ValueError, match=r"the query of pair 0 must be valid Unicode, got a lone surrogate '\\ud83d' at place 2"
    ):
        cross.score([("ab\ud83d", "d")])
    with pytest.raises(TypeError, match="documents must be a list of str, got one str"):
        cross.rank(QUERY, "document")
    with pytest.raises(TypeError, match="rank: documents must be a list of str, got dict; pass its values or items as a list"):
        cross.rank(QUERY, {"a": "document"})
    with pytest.raises(
        TypeError, match=r"score: pairs must be a list of \(query, document\), got dict; pass its values or items"
    ):
        cross.score({QUERY: "document"})
    with pytest.raises(
        TypeError, match=r"score: pairs must be a list of \(query, document\), got one str; pass \[\(query, doc"
    ):
        cross.score("ab")
    with pytest.raises(TypeError, match=r"score: pairs must be a list of \(query, document\), got int 3"):
        cross.score(3)
    for wrong in (-1, np.int64(-1), True, 2.0, "3"):
        with pytest.raises(ValueError, match=r"rank: top_k must be None or an integer >= 0, got "):
            cross.rank(QUERY, CORPUS, top_k=wrong)
    with pytest.raises(ValueError, match="batch_tokens must be an integer >= 1, got 0"):
        cross.score([good], batch_tokens=0)
    with pytest.raises(TypeError, match="the model is a cross-encoder, which has no embedding"):
        cross.encode(["text"])
    with pytest.raises(TypeError, match="encode: text 1 must be a str, got int 3"):
        embedding.encode(["text", 3])


def test_folders_that_are_none(tmp_path, folder, cross):
    with pytest.raises(ValueError, match=r"must be a local model folder, got 'BAAI/bge-reranker-base'.*snapshot_download"):
        rk.Reranker("BAAI/bge-reranker-base")
    with pytest.raises(ValueError, match=r"must be a model folder with a readable config\.json"):
        rk.Reranker(tmp_path)
    (tmp_path / "config.json").write_text("{ broken")
    with pytest.raises(ValueError, match=r"must be a model folder with a readable config\.json"):
        rk.Reranker(str(tmp_path))
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no model could be loaded from"):
        rk.Reranker(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="no model could be loaded from"):
        rk.Reranker(tmp_path)
    tiny("xlm-roberta", head=False, vocab_size=cross.model.config.vocab_size).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold every parameter of a cross-encoder; \d+ are missing: classifier"):
        rk.Reranker(tmp_path, kind="cross-encoder")
    shutil.copy(folder / "model.safetensors", tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="no tokenizer could be loaded from"):
        rk.Reranker(tmp_path)


def test_arguments_that_do_not_fit(folder, cross):
    with pytest.raises(TypeError, match=r"model_or_path must be a folder or a torch\.nn\.Module, got int"):
        rk.Reranker(3)
    with pytest.raises(TypeError, match="tokenizer must be given with a loaded model"):
        rk.Reranker(cross.model)
    with pytest.raises(ValueError, match=r"config\.num_labels must be 1, one score per pair, got 3"):
        rk.Reranker(tiny("bert", num_labels=3), cross.tokenizer)
    with pytest.raises(ValueError, match="kind must be one of None, 'cross-encoder', 'embedding', got 'reranker'"):
        rk.Reranker(folder, kind="reranker")
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch\.float64"):
        rk.Reranker(folder, dtype=torch.float64)
    for wrong in (0, 4, POSITIONS - 1, "12", True):
        with pytest.raises(ValueError, match=rf"max_length must be an integer in \[5, {POSITIONS - 2}\], .*got {wrong!r}"):
            rk.Reranker(folder, max_length=wrong)


def test_a_sentence_transformers_wrapper_is_told_what_to_pass(folder, cross):
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    wrapper = st.CrossEncoder(str(folder), device="cpu")
    for given in ((wrapper,), (wrapper, cross.tokenizer)):
        with pytest.raises(
            TypeError, match=r"got a sentence-transformers CrossEncoder; use Reranker\(ce\.model, ce\.tokenizer\)"
        ):
            rk.Reranker(*given)
    assert same(rk.Reranker(wrapper.model, wrapper.tokenizer).score(PAIRS[:4]), cross.score(PAIRS[:4]))


def test_a_device_is_where_the_model_goes(folder, cross) -> None:
    there = rk.Reranker(folder, device="cpu")
    assert same(there.score(PAIRS[:4]), cross.score(PAIRS[:4]))
    with pytest.raises(RuntimeError, match="nonsense"):
        rk.Reranker(folder, device="nonsense")
