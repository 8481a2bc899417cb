"""LLM rerankers: the token ids of their authors, log-odds of yes and no, the same bits in any batch, and refusals."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

import models
import rerank_kernels as rk
from conftest import ran
from models import CORPUS
from rerank_kernels.backend import registry
from rerank_kernels.models import heads
from rerank_kernels.scoring import templates
from rerank_kernels.scoring.templates import TEMPLATES, Prompts, Template

QUERY, TEXTS = CORPUS[0], list(CORPUS[1:])
WORDS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "yes", "no", "Yes", "1", "0"]


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"):
        yield


@functools.cache
def tokenizer():
    own = models.tokenizer("roberta")
    own.add_tokens(WORDS)
    own.bos_token, own.model_max_length = "<s>", 400
    return own


def model(kind="qwen3", dtype=torch.float32, cls="ForCausalLM", **changes):
    own = tokenizer()
    return models.decoder(kind, dtype, cls=cls, vocab_size=len(own), max_position_embeddings=512, **changes)


def qwen3_ids(pairs, max_length, instruction="Given a web search query, retrieve relevant passages that answer the query"):
    """As the model card of Qwen3-Reranker makes them."""
    own = tokenizer()
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    before, behind = (own.encode(text, add_special_tokens=False) for text in (prefix, suffix))
    bodies = [f"<Instruct>: {instruction}\n<Query>: {q}\n<Document>: {d}" for q, d in pairs]
    cut = own(
        bodies,
        padding=False,
        truncation="longest_first",
        add_special_tokens=False,
        max_length=max_length - len(before) - len(behind),
    )["input_ids"]
    return [before + body + behind for body in cut]


def gemma_ids(query, passage, max_length):
    """As FlagEmbedding makes them for bge-reranker-v2-gemma, where the query is not cut."""
    own = tokenizer()
    prompt = own(templates._YES_NO, return_tensors=None, add_special_tokens=False)["input_ids"]
    sep = own("\n", return_tensors=None, add_special_tokens=False)["input_ids"]
    q = own(f"A: {query}", return_tensors=None, add_special_tokens=False, max_length=max_length * 3 // 4, truncation=True)
    d = own(f"B: {passage}", return_tensors=None, add_special_tokens=False, max_length=max_length, truncation=True)
    first, second = [own.bos_token_id, *q["input_ids"]], [*sep, *d["input_ids"]]
    return first + second[: max_length - len(first)] + sep + prompt


def mxbai_ids(query, document, max_length, positions, instruction=None):
    """As mxbai-rerank makes them for its version 2, where the query is not cut: max_length counts query and document alone."""
    own = tokenizer()

    def ids(text, most=None):
        return own(text, add_special_tokens=False, max_length=most, truncation=most is not None)["input_ids"]

    template = TEMPLATES["mxbai-rerank-v2"].pieces
    prefix, task, suffix, sep = ids(template[0]), ids(template[5]), ids(template[6]), ids("\n")
    fixed = len(prefix) + len(task) + len(suffix) + len(sep)
    max_length = min(max_length, positions - fixed)
    told = f"instruction: {instruction}\n" if instruction else ""
    first = ids(f"{told}query: {query}", max_length * 3 // 4)
    second = sep + ids(f"document: {document}", min(positions - len(first) - fixed, max_length))
    return prefix + first + second[: max_length - len(first)] + sep + task + suffix


@pytest.mark.parametrize("max_length, positions", [(400, 4096), (120, 4096), (400, 460)])
def test_ids_of_mxbai(max_length, positions):
    own, long, template = tokenizer(), " ".join(CORPUS * 4), TEMPLATES["mxbai-rerank-v2"]
    for instruction in ("", "Find cities."):
        prompts = Prompts(template, own, max_length, instruction, positions)
        for text in (*TEXTS, long):
            assert prompts.ids(QUERY, text) == mxbai_ids(QUERY, text, max_length, positions, instruction)
        assert (len(prompts.ids(QUERY, long)) == positions) == (positions == 460)
    all_counted = dataclasses.replace(template, ahead=0, beyond=0)
    assert Prompts(all_counted, own, 400, "", 4096).ids(QUERY, long) != mxbai_ids(QUERY, long, 400, 4096), "a mutant"
    assert "1 for relevant).\nRelevance:<|im_end|>" in own.decode(prompts.ids("a", "b")).replace("> ", ">").replace(" <", "<")


def test_a_prompt_is_never_longer_than_the_model():
    """What does not count for max_length counts for the model."""
    for kind in ("gemma", "qwen2"):
        reranker = rk.Reranker(model(kind), tokenizer(), max_length=500)
        assert len(reranker._prompts.ids(QUERY, " ".join(CORPUS * 4))) <= 512
        assert np.isfinite(reranker.score([(QUERY, " ".join(CORPUS * 4))]).logit).all()


def test_a_bos_that_is_none():
    """As FlagEmbedding does it: no bos token, or one that pads, is left out."""
    own = copy.deepcopy(tokenizer())
    own.bos_token = "<s>"
    with_bos = Prompts(TEMPLATES["bge-reranker-v2-gemma"], own, 400, "").ids(QUERY, TEXTS[0])
    own.bos_token = own.pad_token
    assert Prompts(TEMPLATES["bge-reranker-v2-gemma"], own, 400, "").ids(QUERY, TEXTS[0]) == with_bos[1:]
    own.bos_token = None
    assert Prompts(TEMPLATES["bge-reranker-v2-gemma"], own, 400, "").ids(QUERY, TEXTS[0]) == with_bos[1:]


@pytest.mark.parametrize("max_length", [400, 240])
def test_ids_are_those_of_the_authors(max_length):
    own, long = tokenizer(), " ".join(CORPUS * 2)
    prompts = Prompts(TEMPLATES["qwen3-reranker"], own, max_length, TEMPLATES["qwen3-reranker"].instruction)
    pairs = [(QUERY, t) for t in (*TEXTS, long)]
    assert [prompts.ids(*pair) for pair in pairs] == qwen3_ids(pairs, max_length)
    assert len(prompts.ids(QUERY, long)) == max_length
    prompts = Prompts(TEMPLATES["bge-reranker-v2-gemma"], own, max_length, "")
    assert [prompts.ids(QUERY, t) for t in (*TEXTS, long)] == [gemma_ids(QUERY, t, max_length) for t in (*TEXTS, long)]


def test_the_two_streams_of_qwen3_differ():
    first, second = (
        Prompts(TEMPLATES[name], tokenizer(), 400, "i").ids(QUERY, TEXTS[0])
        for name in ("qwen3-reranker", "qwen3-reranker-evaluation")
    )
    assert first != second


def test_a_text_is_no_template():
    """What stands in a query for a place of the template is text like any other."""
    own = tokenizer()
    prompts = Prompts(TEMPLATES["qwen3-reranker"], own, 400, "{query}")
    text = own.decode(prompts.ids("{document} {instruction}", "{query}"))
    assert "<Instruct>: {query}\n<Query>: {document} {instruction}\n<Document>: {query}" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma"])
def test_log_odds_of_the_answer(kind, dtype):
    own, stock = tokenizer(), model(kind, dtype)
    truth = copy.deepcopy(stock).double()
    reranker = rk.Reranker(stock, own, max_length=300)
    assert reranker.kind == "cross-encoder" and reranker.template.name == templates.OF_MODEL_TYPE[kind]
    found = reranker.score([(QUERY, t) for t in TEXTS])
    yes, no = (own.convert_tokens_to_ids(w) for w in {"qwen2": "10", "qwen3": ("yes", "no"), "gemma": ("Yes", "no")}[kind])
    made = {
        "qwen2": lambda text: mxbai_ids(QUERY, text, 300, 512),
        "qwen3": lambda text: qwen3_ids([(QUERY, text)], 300)[0],
        "gemma": lambda text: gemma_ids(QUERY, text, 300),
    }[kind]
    for text, logit, score, complement in zip(TEXTS, *found, strict=True):
        with torch.no_grad():
            last = truth(input_ids=torch.tensor([made(text)])).logits[0, -1]
        want = last[yes] - (0.0 if kind == "gemma" else last[no])
        assert abs(logit - want) < (1e-4 if dtype == torch.float32 else 0.3)
        assert score == pytest.approx(
            1.0 / (1.0 + np.exp(-np.float64(logit))), abs=1e-6
        ) and score + complement == pytest.approx(1.0)


def test_same_bits_in_any_list():
    reranker = rk.Reranker(model(dtype=torch.bfloat16), tokenizer(), max_length=300)
    pairs = [(QUERY, t) for t in TEXTS]
    whole = reranker.score(pairs)
    for i, pair in enumerate(pairs):
        assert [float(part[0]) for part in reranker.score([pair])] == [float(part[i]) for part in whole]
    small = reranker.score(pairs[::-1], batch_tokens=200)
    for a, b in zip(small, whole, strict=True):
        assert (a[::-1].view(np.int32) == b.view(np.int32)).all()
    assert [r.index for r in reranker.rank(QUERY, TEXTS)] == np.argsort(-whole.logit, kind="stable").tolist()


def test_an_instruction_and_a_template_of_ones_own():
    own = tokenizer()
    short = Template("short", ("{query}", "\n", "{document}", "\n"), yes="yes", no="no")
    found = {
        float(rk.Reranker(model(), own, max_length=300, **options).score([(QUERY, TEXTS[0])]).logit[0])
        for options in ({}, {"instruction": "Find cities."}, {"template": short}, {"template": "qwen3-reranker"})
    }
    assert len(found) == 3, "the usual template is that of the model's type"
    assert rk.Reranker(model("llama"), own, template=short).template is short


def test_a_classifier_may_have_a_template():
    own, made = tokenizer(), model(cls="ForSequenceClassification", num_labels=1)
    truth = copy.deepcopy(made).double()
    reranker = rk.Reranker(made, own, template="qwen3-reranker", max_length=300)
    with torch.no_grad():
        want = truth(input_ids=torch.tensor(qwen3_ids([(QUERY, TEXTS[0])], 300))).logits
    assert abs(float(reranker.score([(QUERY, TEXTS[0])]).logit[0]) - float(want)) < 1e-4


def test_a_folder(tmp_path):
    model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    stored = rk.Reranker(tmp_path, max_length=300)
    loaded = rk.Reranker(model(dtype=torch.bfloat16), tokenizer(), max_length=300)
    assert stored.model.lm_head.weight.dtype == torch.bfloat16
    pairs = [(QUERY, t) for t in TEXTS]
    assert (stored.score(pairs).logit.view(np.int32) == loaded.score(pairs).logit.view(np.int32)).all()


def answering_folder(folder, prompt=None, **score):
    """As sentence-transformers 5.4 and later save a CrossEncoder around a language head."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    yes, no = tokenizer().convert_tokens_to_ids(["yes", "no"])
    package, logits = "sentence_transformers", {"method": "forward", "method_output_name": "logits"}
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    for name, content in {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": f"{package}.base.modules.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_LogitScore", "type": f"{package}.cross_encoder.modules.logit_score.LogitScore"},
        ],
        "sentence_bert_config.json": {
            "transformer_task": "text-generation",
            "modality_config": {"text": logits, "message": logits | {"format": "flat"}},
            "module_output_name": "causal_logits",
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            "prompts": {"own": prompt} if prompt else {},
            "default_prompt_name": "own" if prompt else None,
        },
        "1_LogitScore/config.json": {"true_token_id": yes, "false_token_id": no, "module_input_name": "causal_logits"} | score,
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_folder_of_sentence_transformers_that_answers(tmp_path):
    folder, loaded = answering_folder(tmp_path), rk.Reranker(model(), tokenizer(), max_length=300)
    with pytest.raises(ValueError, match=r"template must be given for this folder, whose own chat .*name the template"):
        rk.Reranker(folder)
    named = rk.Reranker(folder, template="qwen3-reranker", max_length=300)
    pairs = [(QUERY, t) for t in TEXTS[:3]]
    assert (named.score(pairs).logit == loaded.score(pairs).logit).all()
    with pytest.raises(
        ValueError, match=r"template must be one that asks for tokens \(\d+, \d+\), as this folder does, got 'bge"
    ):
        rk.Reranker(folder, template="bge-reranker-v2-gemma")


def test_the_prompt_of_a_folder_is_its_instruction(tmp_path):
    folder = answering_folder(tmp_path, "Find cities.", false_token_id=None)
    alone = dataclasses.replace(TEMPLATES["qwen3-reranker"], no=None)
    assert rk.Reranker(folder, template=alone).instruction == "Find cities."
    assert rk.Reranker(folder, template=alone, instruction="Find bread.").instruction == "Find bread."
    bare = Template("bare", ("{query} {document}",), no=None)
    with pytest.raises(
        ValueError, match=r'template must be one that holds {instruction}, .*; pass instruction="" to leave it out'
    ):
        rk.Reranker(folder, template=bare)
    assert rk.Reranker(folder, template=bare, instruction="").instruction == ""


@pytest.mark.parametrize(
    "score, said",
    [
        ({"true_token_id": None}, "1_LogitScore's true_token_id must be a token id, got None"),
        ({"false_token_id": -1}, "1_LogitScore's false_token_id must be a token id, got -1"),
        ({"module_input_name": "scores"}, "1_LogitScore's module_input_name must be causal_logits, got 'scores'"),
        ({"scale": 2}, "1_LogitScore's config.json must be of keys that are known, got 'scale'"),
    ],
)
def test_settings_of_an_answer_that_are_refused(tmp_path, score, said):
    with pytest.raises(ValueError, match=said):
        rk.Reranker(answering_folder(tmp_path, **score), template="qwen3-reranker")


def test_mutant_logits_rounded_before_they_are_subtracted(monkeypatch):
    def rounded(self, x, sequences):
        last = heads.last_rows(x, sequences.cu_seqlens)
        yes, no = (rk.linear(last, self.words.weight[i, None]) for i in (self.yes, self.no))
        logit = (yes - no).float()
        return heads.HeadOutput(logit, rk.sigmoid(logit), rk.sigmoid(-logit))

    reranker = rk.Reranker(model(dtype=torch.bfloat16), tokenizer(), max_length=300)
    ids = qwen3_ids([(QUERY, t) for t in TEXTS], 300)
    states = reranker.model.model
    with torch.no_grad():
        last = torch.cat([states(input_ids=torch.tensor([i])).last_hidden_state[:, -1] for i in ids]).double()
    w = reranker.model.lm_head.weight.detach().double()
    yes, no = tokenizer().convert_tokens_to_ids(["yes", "no"])
    want = (last @ (w[yes] - w[no])).numpy()

    def error():
        return np.abs(reranker.score([(QUERY, t) for t in TEXTS]).logit - want).max()

    assert error() < 1e-5
    monkeypatch.setattr(heads.AnswerHead, "__call__", rounded)
    assert error() > 1e-3


@pytest.mark.parametrize("lacks", ["the model", "its head"])
def test_answers_that_the_model_has_no_row_for(lacks):
    own = tokenizer()
    small = models.decoder("qwen3", vocab_size=own.convert_tokens_to_ids("yes") if lacks == "the model" else len(own))
    if lacks == "its head":
        small.lm_head = torch.nn.Linear(64, own.convert_tokens_to_ids("yes"), bias=False)
    with pytest.raises(
        ValueError, match=r"template must be one that asks for tokens 0 to \d+, got 'qwen3-reranker', of tokens"
    ):
        rk.Reranker(small, own)


def test_refusals():
    own = tokenizer()
    with pytest.raises(ValueError, match=r"template must be one of qwen3-.* got None; a llama decoder has none of its own"):
        rk.Reranker(model("llama"), own)
    with pytest.raises(ValueError, match=r"template must be one of .*, or a Template, got 'qwen4'"):
        rk.Reranker(model(), own, template="qwen4")
    with pytest.raises(ValueError, match=r"the query 'word word .* take \d+ tokens, and max_length is 120, so nothing"):
        rk.Reranker(model(), own, max_length=120).score([("word " * 80, "text")])
    with pytest.raises(ValueError, match=r"'qwen3-reranker' asks for 'yes', which must be one token of this tokenizer"):
        rk.Reranker(model(), models.tokenizer("roberta"), max_length=300)
    with pytest.raises(ValueError, match=r"instruction must be unset without a template that holds {instruction}, got 'x'"):
        rk.Reranker(model("gemma"), own, instruction="x")
    with pytest.raises(ValueError, match=r"template must be unset with an embedding model"):
        rk.Reranker(models.tiny("roberta", head=False, vocab_size=len(own)), own, template="qwen3-reranker")
    with pytest.raises(ValueError, match=r"Template: pieces must be with {query} once, got 2 of them"):
        Template("twice", ("{query}{query}", "{document}"))
    with pytest.raises(ValueError, match=r"with {document} at the end of its piece, where it is cut, got {document}!"):
        Template("behind", ("{query}", "{document}!"))
    with pytest.raises(ValueError, match=r"kind must be 'cross-encoder', or left out, for this model, got 'embedding'"):
        rk.Reranker(model(), own, kind="embedding", max_length=300)
