"""Caches that a call or a cut left half done: an error leaves a cache as it was, and layers that disagree are an error."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import DynamicCache, StaticCache

import rerank_kernels as rk
from models import VOCABULARY, decoder
from rerank_kernels.models import caches
from rerank_kernels.models import decoder as module

IDS = torch.randint(5, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
MAKE = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


def patched(kind, **changes):
    model = decoder(kind, **changes)
    rk.patch(model)
    return model


def seen(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


@pytest.mark.parametrize("which", MAKE)
def test_an_error_leaves_a_cache_as_it_was(which):
    model = patched("gemma2")  # its first layer has a window
    whole = model(IDS, use_cache=False).logits
    cache = MAKE[which](model.config)
    model(IDS[:, :30], past_key_values=cache)
    holes = torch.ones(2, 31, dtype=torch.long)
    holes[0, 25] = 0
    wrong = {
        "without padding behind a sequence's first token": {"attention_mask": holes},
        "logits_to_keep must be a number >= 0, or a 1-D tensor of places, got -1": {"logits_to_keep": -1},
        "logits_to_keep must be places in [-1, 0], got [0, 7]": {"logits_to_keep": torch.tensor([0, 7])},
        "input_ids must be in [0, 159]": {"input_ids": torch.full((2, 1), 9999)},
    }
    for said, options in wrong.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            model(**{"input_ids": IDS[:, 30:31], "past_key_values": cache, **options})
        assert seen(cache) == [30, 30], said
    assert torch.equal(model(IDS[:, 30:], past_key_values=cache).logits, whole[:, 30:])


def cut(layer, by):
    layer.keys, layer.values = layer.keys[:, :, :-by], layer.values[:, :, :-by]


@pytest.mark.parametrize("kept", [25, 0], ids=["some", "none"])
def test_layers_that_have_seen_other_numbers_of_places_are_refused(kept):
    """transformers' own crop stops at a layer whose window is full, and layers before it are cut by then."""
    model = patched("gemma2", layer_types=["full_attention", "sliding_attention"])
    cache = DynamicCache(config=model.config)
    model(IDS[:, :30], past_key_values=cache)
    cut(cache.layers[0], 30 - kept)
    said = f"past_key_values must be {kept} places in layer 1, as in the first one, got 30; a cache belongs to one model"
    with pytest.raises(ValueError, match=re.escape(said)):
        model(IDS[:, kept : kept + 1], past_key_values=cache)


@pytest.mark.parametrize("which", MAKE)
def test_an_emptied_cache_of_another_batch_is_refused_by_name(which):
    model = patched("llama")
    cache = MAKE[which](model.config)
    model(IDS[:, :5], past_key_values=cache)
    if which == "static":
        cache.reset()
    else:
        for layer in cache.layers:
            cut(layer, 5)
    said = "past_key_values must be keys [1, 2, places, 16] of torch.float32 in layer 0, got [2, 2, "
    with pytest.raises(ValueError, match=re.escape(said)):
        model(IDS[:1, :5], past_key_values=cache)
    assert torch.equal(model(IDS[:, :5], past_key_values=cache).logits, model(IDS[:, :5], use_cache=False).logits)


def test_values_of_another_dtype_are_refused():
    model, cache = patched("llama"), DynamicCache()
    model(IDS[:, :5], past_key_values=cache)
    for layer in cache.layers:
        layer.values = layer.values.half()  # torch.cat would make float32 of them
    with pytest.raises(ValueError, match=r"past_key_values must be torch.float32 as the model, got torch.float16"):
        model(IDS[:, 5:6], past_key_values=cache)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_no_rows_and_no_places(kind):
    model = patched(kind)
    cache = DynamicCache(config=model.config)
    assert model(IDS[:, :0], past_key_values=cache).logits.shape == (2, 0, VOCABULARY)
    assert torch.equal(model(IDS[:, :5], past_key_values=cache).logits, model(IDS[:, :5], use_cache=False).logits)
    cache = DynamicCache(config=model.config)
    for _ in range(2):
        assert model(IDS[:0, :5], past_key_values=cache).logits.shape == (0, 5, VOCABULARY)


# ---- the tests can fail ------------------------------------------------------------------------------------------------------


def test_mutant_holes_are_found_by_the_layer_that_meets_them(monkeypatch):
    monkeypatch.setattr(caches.Keys, "foresee", lambda self, layers: None)
    with pytest.raises(AssertionError):
        test_an_error_leaves_a_cache_as_it_was("dynamic")


def test_mutant_places_are_looked_at_behind_the_layers(monkeypatch):
    monkeypatch.setattr(module, "_places", lambda m, new, keep: keep if isinstance(keep, torch.Tensor) else slice(None))
    with pytest.raises((AssertionError, IndexError, pytest.fail.Exception)):
        test_an_error_leaves_a_cache_as_it_was("dynamic")


def test_mutant_no_look_at_what_layers_have_seen(monkeypatch):
    monkeypatch.setattr(caches, "_seen", lambda layer: None)
    with pytest.raises(pytest.fail.Exception):
        test_layers_that_have_seen_other_numbers_of_places_are_refused(25)
