"""rk.prefix: what continues a prefix has the bits of the whole sequence; its keys are held once; a changed model is seen."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

import lora
import rerank_kernels as rk
from conftest import ran
from invariants import same, with_threads
from models import DECODERS, angles, decoder, padded, rows
from rerank_kernels.backend import registry
from rerank_kernels.models import caches
from rerank_kernels.models import decoder as module
from rerank_kernels.models.prefix import Prefix

FIRST = 37  # tokens of the prefix: more than a window of 20
RESTS = (30, 3, 17, 1, 70)  # over one key tile of 64, and over windows

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def patched(kind, dtype=torch.float32, **changes):
    model = decoder(kind, dtype, **changes)
    rk.patch(model)
    return model


def texts(first=FIRST, lengths=RESTS):
    """A prefix, what continues it, and both."""
    prefix, rests = rows((first,), 5)[0], rows(lengths, 9)
    return prefix, rests, [torch.cat([prefix, rest]) for rest in rests]


def alone(model, sequences):
    return [next(iter(model(input_ids=s[None], use_cache=False).values()))[0] for s in sequences]


# ---- the bits of the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_continued(kind, dtype):
    model, (prefix, rests, wholes) = patched(kind, dtype), texts()
    want, p = alone(model, wholes), rk.prefix(model, prefix)
    for left, to in ((True, 0), (False, 81)):
        batch = padded(rests, 7, left=left, to=to)
        got = p.continued(**batch).logits
        for i, own in enumerate(want):
            same(got[i][batch["attention_mask"][i].bool()], own[FIRST:], f"{RESTS[i]} tokens behind the prefix, left={left}")
    same(p.continued(rests[0][None]).logits[0], want[0][FIRST:], "alone")
    last = p.continued(**padded(rests, 0, left=True), logits_to_keep=1).logits
    same(last[:, 0], torch.stack([own[-1] for own in want]), "the last logits")


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_cache_of_it(kind, chunk):
    """Padded on the left by more or less, in chunks, and on the right; windows forget what they hide."""
    model, (prefix, _, wholes) = patched(kind, torch.bfloat16), texts()
    want, p = alone(model, wholes), rk.prefix(model, prefix)
    for left, to in ((True, 0), (True, 115), (False, 0)):
        batch = padded(wholes, 0, left=left, to=to)
        cache = p.cache(**batch)
        held, mask, got = cache.get_seq_length(), batch["attention_mask"], []
        assert held == FIRST + (8 if to else 0)
        step = chunk if left else 200  # a window cannot remember padding behind a row's end, with a prefix or without
        for at in range(held, mask.shape[1], step):
            ids = batch["input_ids"][:, at : at + step]
            got.append(model(input_ids=ids, attention_mask=mask[:, : at + step], past_key_values=cache).logits)
        got = torch.cat(got, 1)
        for i, own in enumerate(want):
            cached = max(0, held - int(mask[i].argmax()))  # of the row's own tokens
            same(got[i][mask[i, held:].bool()], own[cached:], f"row {i}, {step} at a time, left={left}")


@pytest.mark.parametrize("kind", DECODERS)
def test_generate_continues_it(kind):
    model, (prefix, _, wholes) = patched(kind, torch.bfloat16), texts()
    p = rk.prefix(model, prefix.tolist())
    batch = padded(wholes, 0, left=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(max_new_tokens=24, do_sample=False, return_dict_in_generate=True, output_logits=True)
        want = model.generate(**batch, **options)
        got = model.generate(**batch, **options, past_key_values=p.cache(**batch))
        beams = dict(max_new_tokens=8, do_sample=False, num_beams=2)
        cache = p.cache(**batch)
        cache.batch_repeat_interleave(2)  # generate() repeats the rows, and leaves a cache that it is given as it is
        turned = model.generate(**batch, **beams, past_key_values=cache)
        assert torch.equal(turned, model.generate(**batch, **beams))
    assert torch.equal(got.sequences, want.sequences)
    same(torch.stack(got.logits), torch.stack(want.logits), "logits of what was generated")


def test_every_length_of_a_prefix():
    """One token, and on both sides of a key tile; each continued by one token and by many."""
    model = patched("qwen3")
    for first in (1, 19, 20, 63, 64, 65, 128):
        prefix, rests, wholes = texts(first, (1, 66))
        p = rk.prefix(model, prefix[None])
        got = p.continued(**(batch := padded(rests, 0))).logits
        for i, own in enumerate(alone(model, wholes)):
            same(got[i][batch["attention_mask"][i].bool()], own[first:], f"a prefix of {first}")


def test_a_bare_decoder_and_hidden_states():
    model, (prefix, rests, wholes) = patched("gemma", cls="Model"), texts()
    p, want = rk.prefix(model, prefix), model(input_ids=wholes[0][None], output_hidden_states=True)
    got = p.continued(rests[0][None], output_hidden_states=True)
    same(got.last_hidden_state, want.last_hidden_state[:, FIRST:], "last hidden states")
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        same(a, b[:, FIRST:], "hidden states")
    assert got.past_key_values is None
    assert type(p.continued(rests[0][None], return_dict=False)) is tuple


def test_rows_without_tokens_and_rows_that_are_the_prefix():
    model, (prefix, rests, wholes) = patched("llama"), texts()
    p, want = rk.prefix(model, prefix), alone(model, [wholes[1], prefix])
    batch = padded([rests[1], rests[1]], 0)
    batch["attention_mask"][1] = 0
    got = p.continued(**batch).logits
    same(got[0], want[0][FIRST:], "beside an empty row")
    batch = padded([wholes[1], prefix], 0, left=True)
    cache = p.cache(**batch)
    held = cache.get_seq_length()
    out = model(input_ids=batch["input_ids"][:, held:], attention_mask=batch["attention_mask"], past_key_values=cache).logits
    same(out[:, -1], torch.stack([want[0][-1], want[1][-1]]), "a row that holds nothing else")
    one = {"input_ids": prefix[None]}
    cache = p.cache(**one)
    assert cache.get_seq_length() == FIRST - 1
    same(model(input_ids=prefix[None, -1:], past_key_values=cache).logits[0], want[1][-1:], "the prefix alone")


def test_threads():
    model, (prefix, rests, _) = patched("qwen3", torch.bfloat16), texts()
    batch = padded(rests, 0)
    want = rk.prefix(model, prefix).continued(**batch).logits
    for threads in (1, 2, 3):
        same(with_threads(threads, lambda: rk.prefix(model, prefix).continued(**batch).logits), want, f"{threads} threads")


def test_many_threads_and_no_copy():
    model, (prefix, rests, _) = patched("gemma3", torch.bfloat16), texts()
    with torch.inference_mode():
        p = rk.prefix(model, prefix)
    batch = padded(rests, 0)
    want = p.continued(**batch).logits
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: p.continued(**batch).logits, range(8)):
            same(got, want, "beside other threads")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Prefix: it belongs to one model and is not copied or stored; make another with"):
            copied(p)


def test_keys_are_held_once_and_for_one_layer_at_a_time(monkeypatch):
    model, (prefix, _, _) = patched("llama", layers=4), texts()
    p = rk.prefix(model, prefix)
    held = sum(t.untyped_storage().nbytes() for layer in p._keys.layers for t in layer)
    assert len(p) == FIRST and repr(p) == "Prefix(37 tokens of LlamaForCausalLM)" and isinstance(p, rk.Prefix)
    assert held == 4 * 2 * FIRST * 2 * 16 * 4, "layers, keys and values, tokens, heads, features, bytes"
    keys = []

    def watched(q, k, v, **options):
        assert k.shape[0] == 50 * (FIRST + 2)
        assert [r for r in keys if r() is not None] == [], "keys of an earlier layer"
        keys.append(weakref.ref(k))
        return rk.attention(q, k, v, **options)

    monkeypatch.setattr(module, "attention", watched)
    p.continued(torch.ones(50, 2, dtype=torch.long))
    assert len(keys) == 4


# ---- angles that depend on the length ----------------------------------------------------------------------------------------


LONG = dict(
    long_factor=[1.5 + i / 10 for i in range(8)],
    short_factor=[1.0 + i / 100 for i in range(8)],
    original_max_position_embeddings=64,
)


def test_longrope_up_to_its_turning_point():
    model, (prefix, rests, wholes) = patched("llama", **angles("longrope", **LONG)), texts(37, (27, 28))
    p, want = rk.prefix(model, prefix), alone(model, wholes)
    same(p.continued(rests[0][None]).logits[0], want[0][37:], "64 tokens")
    with pytest.raises(ValueError, match=r"at most 64 tokens a sequence, for rope type 'longrope', got 65; .* use_cache=False"):
        p.continued(rests[1][None])
    assert not torch.equal(model(input_ids=wholes[1][None], use_cache=False).logits[0, :37], want[0][:37]), "the advice"
    p, (far,) = rk.prefix(model, wholes[1]), alone(model, [torch.cat([wholes[1], rests[0]])])
    same(p.continued(rests[0][None]).logits[0], far[65:], "a prefix that is beyond it")


def test_dynamic_up_to_its_length():
    model = patched("llama", **angles("dynamic", factor=2.0), max_position_embeddings=64)
    prefix, rests, wholes = texts(37, (27, 28))
    p = rk.prefix(model, prefix)
    same(p.continued(rests[0][None]).logits[0], alone(model, wholes[:1])[0][37:], "64 tokens")
    with pytest.raises(ValueError, match=r"at most 64 tokens a sequence"):
        p.continued(rests[1][None])


# ---- a model that is another one ---------------------------------------------------------------------------------------------


def written_through_data(m):
    m.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)


def written_in_place(m):
    m.model.layers[1].self_attn.k_proj.weight[3, 3] += 1.0


def a_norm_through_data(m):
    m.model.layers[0].input_layernorm.weight.data[5] = 9.0


def loaded(m):
    m.load_state_dict(decoder("llama", seed=1).state_dict())


def half(m):
    m.half()


def other_eps(m):
    m.model.norm.variance_epsilon = 0.1


def another_layer(m):
    m.model.layers[1] = copy.deepcopy(m.model.layers[1])


def patched_anew(m):
    rk.unpatch(m)
    rk.patch(m)


CHANGES = {
    written_through_data: r"one whose layers.1.mlp.up_proj.weight was written, replaced or moved",
    written_in_place: r"one whose layers.1.self_attn.k_proj.weight was written",
    a_norm_through_data: r"one whose layers.0.input_layernorm.weight was written",
    loaded: r"one whose embed_tokens.weight was written",
    half: r"one whose embed_tokens.weight was written, replaced or moved",
    other_eps: r"one with other modules, attributes, settings or hooks",
    another_layer: r"one whose layers.1.self_attn.q_proj.weight was written, replaced or moved",
    patched_anew: r"one that was unpatched, or patched anew",
    rk.unpatch: r"one that was unpatched, or patched anew",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_model(change):
    model, (prefix, rests, wholes) = patched("llama"), texts()
    p = rk.prefix(model, prefix)
    change(model)
    wanted = r"the model must be as it was when the prefix was computed, got " + CHANGES[change]
    with pytest.raises(ValueError, match="Prefix.continued: " + wanted + r".*; compute it again: rk.prefix\(model, ids\)"):
        p.continued(rests[0][None])
    with pytest.raises(ValueError, match="Prefix.cache: " + wanted):
        p.cache(wholes[0][None])
    if change is rk.unpatch:
        rk.patch(model)
    same(rk.prefix(model, prefix).continued(rests[0][None]).logits[0], alone(model, wholes)[0][FIRST:], "the advice")


def test_a_model_that_trains_and_one_that_another_backend_serves():
    model, (prefix, rests, _) = patched("llama"), texts()
    p = rk.prefix(model, prefix)
    want = p.continued(rests[0][None]).logits
    model.train()
    with pytest.raises(RuntimeError, match=r"is set to train.*call model.eval\(\)"):
        p.continued(rests[0][None])
    model.eval()
    same(p.continued(rests[0][None]).logits, want, "the advice")
    with registry.use("pytorch"), pytest.raises(ValueError, match=r"got one that backend 'pytorch' serves, and 'cpu' served"):
        p.continued(rests[0][None])


def test_a_cache_that_goes_to_another_model():
    model, other, (prefix, _, wholes) = patched("llama"), patched("llama", seed=1), texts()
    cache = rk.prefix(model, prefix).cache(wholes[0][None])
    rest = wholes[0][None, FIRST:]
    with pytest.raises(ValueError, match=r"past_key_values must be of this model as it is patched, got another one's prefix"):
        other(input_ids=rest, past_key_values=cache)
    twin = copy.deepcopy(cache)
    same(model(input_ids=rest, past_key_values=cache).logits, model(input_ids=rest, past_key_values=twin).logits, "its own")


def test_adapters():
    """PEFT's wrapper names what it wraps; another adapter is another model."""
    model, (prefix, rests, wholes) = lora.adapted(decoder("llama"), ("q_proj", "v_proj"), saves=False), texts()
    rk.patch(model)
    with pytest.raises(rk.PatchError, match=r"got PeftModel\w*, around one; pass model.base_model.model; for"):
        rk.prefix(model, prefix)
    inner = model.base_model.model
    p = rk.prefix(inner, prefix)
    same(p.continued(rests[0][None]).logits[0], alone(inner, wholes)[0][FIRST:], "with an adapter")
    for change in (lambda: model.disable(), lambda: (model.disable(False), model.set_adapter("other"))):
        change()
        with pytest.raises(ValueError, match=r"got one with other modules, attributes, settings or hooks; compute it again"):
            p.continued(rests[0][None])
        again = rk.prefix(inner, prefix).continued(rests[0][None]).logits[0]
        same(again, alone(inner, wholes)[0][FIRST:], "the advice")


# ---- bad arguments -----------------------------------------------------------------------------------------------------------


def test_embeddings_do_not_continue_a_prefix():
    p = rk.prefix(patched("llama"), [5, 6])
    for call, op in ((p.continued, "continued"), (p.cache, "cache")):
        with pytest.raises(
            ValueError, match=rf"Prefix.{op}: input_ids must be token ids \[B, T\], got None; a prefix of embeddings"
        ):
            call(None)


def test_what_has_no_prefix():
    with pytest.raises(
        rk.PatchError, match=r"prefix: model must be a patched decoder, .* got LlamaForCausalLM, which is not patched; call"
    ):
        rk.prefix(decoder("llama"), [1])
    with pytest.raises(rk.PatchError, match=r"got LlamaForSequenceClassification; .* take rk.Reranker"):
        rk.prefix(patched("llama", cls="ForSequenceClassification"), [1])
    with pytest.raises(rk.PatchError, match=r"got str; for scores"):
        rk.prefix("model", [1])


def test_bad_ids():
    model = patched("llama")
    for ids, error in (
        ([], r"ids must be one token or more, got none; without a prefix call the model itself"),
        (
            torch.ones(2, 3, dtype=torch.long),
            r"ids must be one sequence, \[T\] or \[1, T\], got \[2, 3\]; make a prefix for each",
        ),
        ({"input_ids": [1]}, r"ids must be a list or tensor of token ids, got dict; pass its input_ids"),
        ("text", r"ids must be a list or tensor of token ids, got str 'text'"),
        ([160], r"input_ids must be in \[0, 159\], got values in \[160, 160\]"),
        ([1] * 257, r"at most 256 tokens a sequence"),
    ):
        with pytest.raises(ValueError, match=error):
            rk.prefix(model, ids)
    for ids in ([1.5], [True]):
        with pytest.raises(TypeError, match=r"prefix: ids must be integers, got torch"):
            rk.prefix(model, ids)


def test_bad_continuations():
    model, (prefix, rests, wholes) = patched("llama"), texts()
    p, batch = rk.prefix(model, prefix), padded(rests, 0)
    with pytest.raises(ValueError, match=r"attention_mask must be \[5, 70\]"):
        p.continued(batch["input_ids"], batch["attention_mask"][:, 1:])
    with pytest.raises(TypeError, match=r"input_ids must be a torch.Tensor, got list"):
        p.continued([[1, 2]])
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match=rf"{name} must be left out, got DynamicCache; the prefix takes its place"):
            p.continued(rests[0][None], **{name: DynamicCache()})
    with pytest.raises(ValueError, match=r"use_cache must be left out, got True; continue the cache that Prefix.cache"):
        p.continued(rests[0][None], use_cache=True)
    with pytest.raises(ValueError, match=r"at most 256 tokens a sequence, .*got 257"):
        p.continued(torch.ones(1, 220, dtype=torch.long))
    wrong = padded(wholes, 0, left=True)
    wrong["input_ids"][2, -20] += 1  # of the prefix
    with pytest.raises(ValueError, match=r"input_ids must be rows that begin with the prefix's 37 tokens, .* got row 2 "):
        p.cache(**wrong)
    gap = padded(wholes, 0)
    gap["attention_mask"][1, 5] = 0
    with pytest.raises(ValueError, match=r"without padding between them, got row 1 with"):
        p.cache(**gap)
    with pytest.raises(ValueError, match=r"begin with the prefix's 37 tokens, .* got row 0"):
        p.cache(prefix[None, :9])


# ---- the tests can fail ------------------------------------------------------------------------------------------------------


def test_mutant_places_counted_from_the_continuation(monkeypatch):
    honest = module._angles
    from_0 = lambda d, op, positions, *a: honest(d, op, positions - positions.min(), *a)  # noqa: E731
    monkeypatch.setattr(module, "_angles", from_0)
    for test in (lambda: test_continued("llama", torch.float32), lambda: test_a_cache_of_it("llama", 64)):
        with pytest.raises(AssertionError, match="differ"):
            test()


def test_mutant_a_window_is_ignored(monkeypatch):
    def wide(q, k, v, *, window, cu_seqlens_k, **options):
        window = window if cu_seqlens_k is None else None
        return rk.attention(q, k, v, window=window, cu_seqlens_k=cu_seqlens_k, **options)

    monkeypatch.setattr(module, "attention", wide)
    with pytest.raises(AssertionError, match="differ"):
        test_continued("qwen3", torch.float32)


def test_mutant_a_prefix_of_one_token_more(monkeypatch):
    honest = Prefix.__init__
    monkeypatch.setattr(Prefix, "__init__", lambda self, model, ids: honest(self, model, torch.cat([ids, ids[-1:]])))
    with pytest.raises(AssertionError, match="differ"):
        test_continued("llama", torch.float32)


def test_mutant_keys_of_the_row_before(monkeypatch):
    honest = caches.Keys._continued.func
    turned = property(lambda self: honest(self).roll(-1))
    monkeypatch.setattr(caches.Keys, "_continued", turned)
    with pytest.raises(AssertionError, match="differ"):
        test_continued("llama", torch.float32)


def test_mutant_left_padding_is_not_counted(monkeypatch):
    """Places in the cache from the row's start, as if no row were padded."""
    honest = caches.valid

    def all_there(op, mask, *rest):
        return honest(op, None if op == "Prefix.cache" else mask, *rest)

    monkeypatch.setattr(caches, "valid", all_there)
    with pytest.raises((AssertionError, ValueError)):
        test_a_cache_of_it("llama", 64)
