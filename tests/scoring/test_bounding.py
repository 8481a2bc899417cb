"""Very long texts: what is cut before the tokenizer leaves the ids of the whole text, or is said to be bounded."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest

import models
import rerank_kernels as rk
from rerank_kernels.scoring import bounding

LENGTH = 18  # 15 ids of BERT's pairs: the longer text gets one more than the other
PIECES = ["a", "word", "Zürich", "123", "don't", "x" * 30, "Aa9" * 34, "ﷺ", "東京", "日本語の文", "한국어", "e\u0301\u0301"]
PIECES += [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\x00",
    "\x07",
    "\u200b",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\x1c",
    "\xad",
    "\ufffd",
    "\u0301",
]
PIECES += ["[SEP]", "[UNK]", "<mask>", "</s>", "##ing", "▁", "´", "😀", "-", "_", "ß", "İ", "Σ", "ﬁ", "...", "["]


def unigram() -> Any:
    """As XLM-RoBERTa's: NFKC, split at spaces, Unigram with ▁."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(kinds.Unigram())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    t.train_from_iterator(models.CORPUS, trainer)
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", unk_token="<unk>")


def wordpiece() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.minilm(), local_files_only=True)


TOKENIZERS = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "bpe, bert": lambda: models.tokenizer("bert"),
    "bpe, roberta": lambda: models.tokenizer("roberta"),
}


def ids(tokenizer: Any, first: str, second: str | None) -> list[int]:
    pair = ([first], None if second is None else [second])
    return list(tokenizer(*pair, truncation=True, max_length=LENGTH)["input_ids"][0])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_whole_text(monkeypatch, name) -> None:
    monkeypatch.setattr(bounding, "LONG", 40)  # so that texts of a few words are long
    tokenizer = TOKENIZERS[name]()
    rules = bounding.Rules.of(tokenizer)
    assert rules.words is not None and (rules.run is not None) == (name == "wordpiece")
    draw = random.Random(len(name))
    cut = 0
    for turn in range(48):
        weights = [draw.choice((0.1, 1.0, 9.0)) for _ in PIECES]
        # not both are very long: the tokenizer keeps what overflows, each part of one with each part of the other
        text = draw.choice(("", " ")).join(draw.choices(PIECES, weights, k=draw.choice((0, 20, 80))))
        text = "w " * 60 if turn % 4 == 0 else text
        for other in ("", "a", "- " * 19, "".join(draw.choices(PIECES, k=draw.choice((1, 2, 12))))):
            short, exact = bounding.bounded(rules, text, other, LENGTH)
            turned, _ = bounding.bounded(rules, other, text, LENGTH)
            assert exact, "nothing here is far beyond a text"
            cut += len(short) < len(text)
            assert ids(tokenizer, short, turned) == ids(tokenizer, text, other), (text, other)
            assert ids(tokenizer, turned, short) == ids(tokenizer, other, text), (text, other)
            if not other:
                assert ids(tokenizer, short, None) == ids(tokenizer, text, None), text
    assert cut > 10


@pytest.mark.parametrize(
    "change",
    [
        ("MOST_IDS", 0),  # the longer of two texts is no longer the longer one
        ("_WORDS_AND_IDEOGRAPHS", __import__("re").compile(r"[^ \t\n]")),  # a cut inside a word
        ("_WORDS_AND_IDEOGRAPHS", __import__("re").compile(r"[^ \t\n]+")),  # a word of what vanishes is counted
    ],
)
def test_the_test_would_see_it(monkeypatch, change) -> None:
    monkeypatch.setattr(bounding, *change)
    with pytest.raises(AssertionError):
        test_ids_are_those_of_the_whole_text(monkeypatch, "wordpiece")


def test_a_tokenizer_that_is_not_known_is_only_bounded() -> None:
    tokenizer = models.tokenizer("bert")
    for change in ("left", "spaces"):
        other = models.tokenizer("bert")
        if change == "left":
            other.truncation_side = "left"
        else:
            other.add_tokens(["two words"])
        assert bounding.Rules.of(other) == bounding.Rules() != bounding.Rules.of(tokenizer)
    assert bounding.Rules.of(object()) == bounding.Rules()


@pytest.fixture(scope="module")
def reranker(tmp_path_factory) -> rk.Reranker:
    return rk.Reranker(models.save_cross_encoder(tmp_path_factory.mktemp("model"), "roberta"))


def test_scores_are_those_of_the_whole_text(reranker, monkeypatch) -> None:
    words = [("what is it", "some words, "), ("query " * 9, "東京 is a city. "), ("", "x ")]
    pairs = [(q, d * (200_000 // len(d))) for q, d in words]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = reranker.score(pairs).logit
        alone = np.concatenate([reranker.score([pair]).logit for pair in pairs])
    monkeypatch.setattr(bounding, "LONG", 1 << 40)
    assert short.tobytes() == alone.tobytes() == reranker.score(pairs).logit.tobytes()


def test_what_is_bounded_is_said(reranker) -> None:
    word = "é" * (bounding.WORD + 5)
    with pytest.warns(bounding.BoundedWarning, match=r"pair 1: a text of 131,077 characters was cut to 131,072") as said:
        found = reranker.score([("a", "b"), ("a", word)])
    assert len(said) == 1 and said[0].message.text == word
    assert found.logit[1:].tobytes() == reranker.score([("a", word[: bounding.WORD])]).logit.tobytes()
