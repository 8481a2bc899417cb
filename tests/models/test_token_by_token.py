"""Greedy search beside stock's of one sequence in float32: the same tokens, but where two logits lie closer than rounding."""

from __future__ import annotations

import pytest
import torch

import rerank_kernels as rk
from conftest import ran
from models import DECODERS, decoder, rows
from rerank_kernels.backend import registry
from rerank_kernels.models import decoder as module

NEW = 24
BOUND = 2e-5  # of a float32 logit of size 2..7, stock's and ours together


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def tied(kind):
    """A decoder with a twin of each word, whose logit is another by a few last bits."""
    model = decoder(kind)
    weight = model.lm_head.weight
    weight[1::2] = weight[0::2] * (1 + 2e-7)
    return model


def unexplained(model, sequences):
    """(how many tokens differ from stock's, those whose two logits are further apart than rounding), along stock's own text."""
    texts = []
    for s in sequences:
        for _ in range(NEW):
            s = torch.cat([s, model(input_ids=s[None], use_cache=False).logits[0, -1:].argmax(-1)])
        texts.append(s)
    theirs = [model(input_ids=t[None], use_cache=False).logits[0] for t in texts]
    rk.patch(model)
    differ, found = 0, []
    for text, prompt, want in zip(texts, sequences, theirs, strict=True):
        got = model(input_ids=text[None]).logits[0]
        for place in range(len(prompt) - 1, len(text) - 1):
            a, b = want[place], got[place]
            if a.argmax() != b.argmax():
                differ += 1
                gap = float(a.max() - a[b.argmax()])
                if gap > BOUND:
                    found.append((place, gap))
    return differ, found


@pytest.mark.parametrize("kind", DECODERS)
def test_a_token_that_differs_is_a_near_tie(kind):
    assert unexplained(decoder(kind), rows((9, 3, 30))) == (0, [])


def test_near_ties_are_there_and_explained():
    differ, found = unexplained(tied("llama"), rows((9, 3, 30)))
    assert differ > 0 and found == []


def test_mutant_a_mistake_is_no_near_tie(monkeypatch):
    honest = module.rotary
    monkeypatch.setattr(module, "rotary", lambda x, cos, sin: honest(x, cos, 0.9 * sin))
    assert unexplained(decoder("llama"), rows((9, 3, 30)))[1] != []
