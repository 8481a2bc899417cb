"""What the prompts of a query begin with is computed once: the same bits as without, in any list, and fewer tokens."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import models
import rerank_kernels as rk
from conftest import ran
from models import CORPUS
from rerank_kernels.backend import registry
from rerank_kernels.models import decoder as module
from rerank_kernels.models import registry as served
from rerank_kernels.models import shared
from rerank_kernels.ops.sequences import Sequences
from rerank_kernels.scoring import sharing
from rerank_kernels.scoring.templates import Template

WORDS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "yes", "no", "Yes"]
TEXTS = [*CORPUS[1:], CORPUS[1][:9], CORPUS[2] + CORPUS[3], ""]
QUERIES = (CORPUS[0], CORPUS[0] + " Where?", "other")
# Queries mixed, one of them with a single document, one that comes again, and a pair that does.
PAIRS = [(QUERIES[i % 2], text) for i, text in enumerate(TEXTS * 2)] + [(QUERIES[2], TEXTS[0]), (QUERIES[0], TEXTS[0])]
TEMPLATES = {
    "qwen3-reranker": "qwen3-reranker",
    "bge-reranker-v2-gemma": "bge-reranker-v2-gemma",
    "document first": Template("first", ("Here: ", "{document}", " fits {query}?")),
    "one piece": Template("one", ("{query}{document}", "?")),  # a document's first letters may merge with the query's last
}


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"):
        yield


@functools.cache
def tokenizer():
    own = models.tokenizer("roberta")
    own.add_tokens(WORDS)
    own.bos_token, own.model_input_names = "<s>", ["input_ids", "attention_mask"]
    own.model_max_length = 400
    return own


def reranker(kind="qwen3", dtype=torch.float32, cls="ForCausalLM", template=None, max_length=300, **changes):
    sizes = dict(vocab_size=len(tokenizer()), max_position_embeddings=512) | changes
    model = models.decoder(kind, dtype, cls=cls, **sizes)
    return rk.Reranker(model, tokenizer(), template=template, max_length=max_length)


def unshared(monkeypatch, own, pairs, **options):
    """Every token of every pair computed, and the number of them."""
    with monkeypatch.context() as patch:
        patch.setattr(served, "turning_points", lambda model: None)
        return own.score(pairs, **options)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.view(np.int32) == b.view(np.int32)).all(), "bits differ"


def computed(monkeypatch):
    """A list that grows with the tokens of each pass."""
    tokens = []
    honest = module._decode
    monkeypatch.setattr(module, "_decode", lambda d, batch: (tokens.append(len(batch.words)), honest(d, batch))[1])
    return tokens


# ---- the same bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["qwen3", "gemma", "mistral", "gemma3"])
def test_same_bits_as_without(monkeypatch, kind, template, dtype):
    """qwen3 and mistral have windows that are shorter than what is shared."""
    own = reranker(kind, dtype, template=TEMPLATES[template])
    want, tokens = unshared(monkeypatch, own, PAIRS), computed(monkeypatch)
    same(own.score(PAIRS), want)
    whole = sum(map(len, own._tokenised(*map(list, zip(*PAIRS, strict=True)))[0]))
    assert sum(tokens) < whole * (0.5 if template == "qwen3-reranker" else 1.0)


def test_any_order_and_any_batch(monkeypatch):
    own = reranker()
    want = unshared(monkeypatch, own, PAIRS)
    for seed, batch_tokens in ((0, 16384), (1, 1), (2, 300), (3, 1000)):
        order = np.random.default_rng(seed).permutation(len(PAIRS))
        same(own.score([PAIRS[i] for i in order], batch_tokens=batch_tokens), [part[order] for part in want])
    for i, pair in enumerate(PAIRS):
        same(own.score([pair]), [part[i : i + 1] for part in want])
    ranked = own.rank(QUERIES[0], TEXTS)
    logits = unshared(monkeypatch, own, [(QUERIES[0], t) for t in TEXTS]).logit
    assert [r.index for r in ranked] == np.argsort(-logits, kind="stable").tolist()


@pytest.mark.parametrize("template", [None, "qwen3-reranker"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_decoder_with_a_classification_head(monkeypatch, kind, template):
    """Without a template its tokenizer makes the pairs, and cuts the longest part: the ids decide what is shared."""
    own = reranker(kind, torch.bfloat16, cls="ForSequenceClassification", num_labels=1, template=template)
    for length in (300, 40) if template is None else (300,):
        own.max_length = length
        want = unshared(monkeypatch, own, PAIRS)
        with monkeypatch.context() as patch:
            tokens = computed(patch)
            same(own.score(PAIRS), want)
        whole = sum(map(len, own._tokenised(*map(list, zip(*PAIRS, strict=True)))[0]))
        assert sum(tokens) < 0.9 * whole


def test_longrope_shares_on_each_side_of_its_turning_point(monkeypatch):
    queries, documents = map(list, zip(*PAIRS, strict=True))
    ids = reranker()._tokenised(queries, documents)[0]
    turn = int(np.median([len(i) for i in ids]))
    said = dict(
        long_factor=[1.5 + i / 10 for i in range(8)],
        short_factor=[1.0 + i / 100 for i in range(8)],
        original_max_position_embeddings=turn,
    )
    own = reranker(**models.angles("longrope", **said))
    assert 3 < sum(len(i) > turn for i in ids) < len(ids) - 3
    want, tokens = unshared(monkeypatch, own, PAIRS), computed(monkeypatch)
    same(own.score(PAIRS), want)
    assert sum(tokens) < 0.7 * sum(map(len, ids))


# ---- what is computed --------------------------------------------------------------------------------------------------------


def test_tokens_of_one_query(monkeypatch):
    """What all begin with once, and the rest of each."""
    own, pairs = reranker(), [(QUERIES[0], text) for text in TEXTS]
    ids = own._tokenised(*map(list, zip(*pairs, strict=True)))[0]
    common = min(map(len, ids)) - 1
    while len({tuple(i[:common]) for i in ids}) > 1:
        common -= 1
    tokens = computed(monkeypatch)
    own.score(pairs)
    assert tokens == [common + sum(len(i) - common for i in ids)] and common > 60


def lists(lengths, common=0, seed=0):
    draw = np.random.default_rng(seed)
    first = draw.integers(5, 99, common)
    return [np.concatenate([first, draw.integers(5, 99, n - common)]).astype(np.int32) for n in lengths]


def whole(ids, own):
    """Of each item of a pass all its tokens, put together again."""
    for i, end in zip(own.items, own.ends, strict=True):
        parts = []
        while end is not None:
            parts.insert(0, own.sequences[end])
            end = own.before[end] if own.before else None
        assert np.array_equal(np.concatenate(parts), ids[i])


def test_passes_hold_whole_pairs_within_their_tokens():
    ids = [*lists((50, 61, 40, 200, 45), 30), *lists((70, 33, 33), 20, seed=1)]
    queries = ["a"] * 5 + ["b"] * 3
    for tokens in (1, 100, 150, 300, 10**6):
        made = list(sharing.shared_passes(ids, queries, tokens, [2**62]))
        assert sorted(i for own in made for i in own.items) == list(range(8))
        for own in made:
            whole(ids, own)
            held = sum(len(ids[i]) for i in own.items)
            assert held <= tokens or len(own.items) == 1, "what is shared counts for each pair"
            assert own.before is not None or len(own.items) == len(own.sequences)
    assert [len(own.items) for own in made] == [8]
    assert sum(map(len, made[0].sequences)) == sum(map(len, ids)) - 4 * 30 - 2 * 20


def test_equal_pairs_keep_a_token_of_their_own():
    (same_ids,) = lists((9,))
    (own,) = sharing.shared_passes([same_ids] * 3, ["q"] * 3, 100, [2**62])
    assert [len(s) for s in own.sequences] == [8, 1, 1, 1] and own.before == [None, 0, 0, 0]


def test_a_prompt_without_tokens(monkeypatch):
    own, (a, b) = reranker(template=Template("bare", ("{query}", "{document}"))), lists((9, 8), 5)
    pairs = [(CORPUS[0], "yes"), ("", ""), ("", CORPUS[0])]
    same(own.score(pairs), unshared(monkeypatch, own, pairs))
    (found,) = sharing.shared_passes([a, a[:0], b], ["q"] * 3, 100, [2**62])
    assert found.before is None and found.items == [0, 2, 1]


def test_two_levels():
    """What all queries begin with, then what each one's pairs do."""
    first, (a, b), (c,) = lists((20,))[0], lists((9, 8), 5, seed=2), lists((7,), seed=3)
    ids = [np.concatenate([first, rest]) for rest in (a, b, c)]
    (own,) = sharing.shared_passes(ids, ["x", "x", "y"], 1000, [2**62])
    whole(ids, own)
    assert own.before == [None, 0, 1, 1, 0] and [len(s) for s in own.sequences] == [20, 5, 4, 3, 7]


def test_layers_that_turn_at_other_lengths():
    """Two share where they are on the same side of each length."""
    ids = lists((9, 10, 11, 20, 21), 5)
    (own,) = sharing.shared_passes(ids, ["q"] * 5, 1000, [10, 20])
    whole(ids, own)
    of = {i: own.before[end] for i, end in zip(own.items, own.ends, strict=True)}
    assert of[0] == of[1] != of[2] == of[3] and of[4] is None
    three = Sequences.from_cu_seqlens(torch.tensor([0, 3, 4, 9], dtype=torch.int32), 9)
    for turns in ([2, 3], [2, 8], [9, 10]):
        shared.Shared("op", three, [None, 0, 0], turns)
    with pytest.raises(ValueError, match=r"at most 4 tokens, or all more"):
        shared.Shared("op", three, [None, 0, 0], [3, 4])


def test_an_encoder_shares_nothing():
    model = models.tiny("bert")
    rk.patch(model)
    assert served.turning_points(model) is None
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"before is for decoders, whose tokens see nothing behind them; leave it out"):
        served.packed_logits(model, torch.ones(5, dtype=torch.long), cu, before=[None, 0])
    served.packed_logits(model, torch.ones(5, dtype=torch.long), cu)


def test_bad_places():
    two = Sequences.from_cu_seqlens(torch.tensor([0, 3, 5], dtype=torch.int32), 5)
    for before in ([None], [0, None], [None, 1], [None, -1]):
        with pytest.raises(ValueError, match=r"op: before must be 2 places of earlier sequences, or None, got \["):
            shared.Shared("op", two, before, [2**62])
    three = Sequences.from_cu_seqlens(torch.tensor([0, 3, 4, 9], dtype=torch.int32), 9)
    with pytest.raises(
        ValueError, match=r"before must be of sequences that all have at most 5 tokens, or all more, got 4 and 8"
    ):
        shared.Shared("op", three, [None, 0, 0], [5])
    shared.Shared("op", three, [None, None, 0], [5])


# ---- the tests can fail ------------------------------------------------------------------------------------------------------


def fails():
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="bits differ"):
        test_same_bits_as_without(patch, "qwen3", "qwen3-reranker", torch.float32)


def test_mutant_places_from_0(monkeypatch):
    class FromZero(shared.Shared):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.starts = torch.zeros_like(self.starts)

    monkeypatch.setattr(module, "Shared", FromZero)
    fails()


def test_mutant_the_prefix_of_another_query(monkeypatch):
    class Turned(shared.Shared):
        def __init__(self, op, sequences, before, turns):
            nodes = sorted({b for b in before if b})  # behind what all share
            turned = dict(zip(nodes, nodes[1:] + nodes[:1], strict=True))
            super().__init__(
                op,
                sequences,
                [b if b is None or turned.get(b, b) >= i else turned.get(b, b) for i, b in enumerate(before)],
                turns,
            )

    monkeypatch.setattr(module, "Shared", Turned)
    fails()


def test_mutant_one_token_too_many(monkeypatch):
    honest = sharing._common
    monkeypatch.setattr(sharing, "_common", lambda ids, done: min(honest(ids, done) + 1, min(map(len, ids)) - 1))
    fails()


def test_mutant_a_window_is_ignored(monkeypatch):
    def wide(q, k, v, *, window, cu_seqlens_k, **options):
        return rk.attention(q, k, v, window=None if cu_seqlens_k else window, cu_seqlens_k=cu_seqlens_k, **options)

    monkeypatch.setattr(module, "attention", wide)
    fails()


def test_mutant_angles_of_the_part(monkeypatch):
    """Of longrope, by the length of what is shared and not of the whole."""

    class Short(shared.Shared):
        def __init__(self, op, sequences, before, turns):
            super().__init__(op, sequences, before, turns)
            self.reach = torch.tensor(sequences.lengths)

    monkeypatch.setattr(module, "Shared", Short)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="bits differ"):
        test_longrope_shares_on_each_side_of_its_turning_point(patch)
