"""Decoders: right against float64 and stock, and the same bits alone, batched, padded anyhow, cached, in chunks, generated."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

import conftest
import rerank_kernels as rk
from conftest import ran
from invariants import force_isa, same, with_threads
from models import DECODERS, decoder, padded, rows
from prefill import decoding_by_another_order
from rerank_kernels.backend import registry
from rerank_kernels.models import caches, rope
from rerank_kernels.models import decoder as module
from rerank_kernels.models.registry import packed_logits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (70, 3, 33, 1, 64)  # around one key tile of 64, and three windows of 20
BOUND = {torch.float32: 1e-5, torch.float16: 4e-2, torch.bfloat16: 0.3}  # logits of size 2..7

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


def alone(model, sequences):
    return [model(input_ids=s[None], use_cache=False).logits[0] for s in sequences]


def each(y, mask):
    """The valid rows of every sequence."""
    return [y[i][mask[i].bool()] for i in range(len(mask))]


# ---- right -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_close_to_float64(kind, dtype):
    model = decoder(kind, dtype)
    sequences = rows(LENGTHS)
    truth = [copy.deepcopy(model).double()(input_ids=s[None]).logits[0] for s in sequences]
    stock = [model(input_ids=s[None]).logits[0] for s in sequences]
    rk.patch(model)
    ours = alone(model, sequences)
    for s, want, got in zip(sequences, truth, ours, strict=True):
        assert got.dtype == torch.float32 and want.std() > 0.2
        assert (got - want).abs().max() < BOUND[dtype], f"{len(s)} tokens"
    far = [(torch.cat(y) - torch.cat(truth)).square().mean().sqrt() for y in (ours, stock)]
    assert far[0] < 1.2 * far[1], "further from the truth than stock"


@pytest.mark.parametrize("cls", ["Model", "ForCausalLM", "ForSequenceClassification"])
@pytest.mark.parametrize("kind", DECODERS)
def test_outputs_are_those_of_stock(kind, cls):
    model = decoder(kind, cls=cls, num_labels=3)
    batch = padded(rows((9, 9)), 0)
    want = model(**batch, output_hidden_states=True)
    rk.patch(model)
    got = model(**batch, output_hidden_states=True)
    assert type(got) is type(want)
    kept = set(want.keys()) - ({"cache", "past_key_values"} if cls == "ForSequenceClassification" else set())
    assert set(got.keys()) == kept
    for name in ("last_hidden_state", "logits"):
        if name in want:
            assert (got[name] - want[name]).abs().max() < 1e-4
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert (a - b).abs().max() < 1e-4
    assert type(model(**batch, return_dict=False)) is tuple


@pytest.mark.parametrize("act", ["relu", "gelu_pytorch_tanh", "silu"])
def test_activations(act):
    model = decoder("llama", hidden_act=act)
    batch = padded(rows((30,)), 0)
    want = model(**batch).logits
    rk.patch(model)
    assert (model(**batch).logits - want).abs().max() < 1e-4


def test_a_relu_layer_is_the_dense_one_bit_for_bit():
    model = patched("llama", hidden_act="relu")
    x, mlp = torch.randn(5, 64), model.model.layers[0].mlp
    gate, up = (rk.linear(x, m.weight, activation=a) for m, a in ((mlp.gate_proj, "relu"), (mlp.up_proj, None)))
    dense = x + rk.linear(gate * up, mlp.down_proj.weight)
    same(module._feed_forward(mlp, x, x), dense, "sparse against dense")


def test_the_classifier_reads_the_last_token_that_the_mask_keeps():
    """Stock takes the last one that is not the pad token; a pad token that the mask keeps is a token here."""
    model = patched("qwen3", cls="ForSequenceClassification", num_labels=1)
    s = rows((12,))[0]
    s[-1] = 0
    cut = padded([s[:7]], 0, to=12)
    same(model(input_ids=s[None]).logits, packed_logits(model, s, torch.tensor([0, 12], dtype=torch.int32)).logit, "packed")
    same(model(**cut).logits, model(input_ids=s[None, :7]).logits, "right padding")
    assert not torch.equal(model(input_ids=s[None]).logits, model(input_ids=s[None, :-1]).logits)


def test_logits_to_keep():
    model = patched("llama")
    batch = padded(rows((9, 4)), 0, left=True)
    whole = model(**batch).logits
    for keep, want in ((0, whole), (1, whole[:, -1:]), (3, whole[:, -3:]), (torch.tensor([2, 8]), whole[:, [2, 8]])):
        same(model(**batch, logits_to_keep=keep).logits, want, f"logits_to_keep={keep}")
    with pytest.raises(ValueError, match=r"logits_to_keep must be a number >= 0, or a 1-D tensor of places, got -1"):
        model(**batch, logits_to_keep=-1)


# ---- the same bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_batch_and_padding(kind, dtype):
    model, sequences = patched(kind, dtype), rows(LENGTHS)
    want = alone(model, sequences)
    for left, to, pad in ((True, 0, 0), (False, 0, 0), (True, 90, 7), (False, 131, 99)):
        batch = padded(sequences, pad, left=left, to=to)
        got = each(model(**batch, use_cache=False).logits, batch["attention_mask"])
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            same(a, b, f"{LENGTHS[i]} tokens, {'left' if left else 'right'} padded with {pad}")
    turned = padded(sequences[::-1], 0)
    got = each(model(**turned).logits, turned["attention_mask"])[::-1]
    for a, b in zip(got, want, strict=True):
        same(a, b, "another place in the batch, with a cache made")


def caches_of(model):
    return {
        "dynamic": DynamicCache,
        "rolling": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=100),
    }


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("which", ["dynamic", "rolling", "static"])
@pytest.mark.parametrize("kind", DECODERS)
def test_chunks_through_a_cache(kind, which, chunk):
    for dtype in DTYPES if chunk == 7 else (torch.float32,):
        model, (s,) = patched(kind, dtype), rows((91,))
        want, cache, got = alone(model, [s])[0], caches_of(model)[which](), []
        for part in s[None].split(chunk, 1):
            got.append(model(input_ids=part, past_key_values=cache).logits[0])
        same(torch.cat(got), want, f"{which}, {chunk} at a time, {dtype}")


@pytest.mark.parametrize("kind", DECODERS)
def test_a_batch_through_a_cache_that_forgets(kind):
    """Left-padded rows of other lengths: each has dropped another number of keys."""
    model, sequences = patched(kind, torch.bfloat16), rows((91, 30, 64))
    batch = padded(sequences, 0, left=True)
    want, cache, got = alone(model, sequences), DynamicCache(config=model.config), []
    for start in range(0, 91, 13):
        stop = min(start + 13, 91)
        got.append(
            model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=batch["attention_mask"][:, :stop],
                past_key_values=cache,
            ).logits
        )
    for i, (a, b) in enumerate(zip(each(torch.cat(got, 1), batch["attention_mask"]), want, strict=True)):
        same(a, b, f"row {i}")


@pytest.mark.parametrize("kind", DECODERS)
def test_threads_and_instruction_sets(kind):
    model, sequences = patched(kind, torch.bfloat16), rows(LENGTHS)
    batch = padded(sequences, 0, left=True)
    want = model(**batch).logits
    for threads in (1, 2, 3):
        same(with_threads(threads, lambda: model(**batch).logits), want, f"{threads} threads")
    try:
        for isa in conftest.ISAS:
            with contextlib.suppress(RuntimeError):  # this CPU has it not
                force_isa(isa)
                same(model(**batch).logits, want, isa)
    finally:
        force_isa("auto")


def generated(model, batch, **options):
    width = batch["input_ids"].shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **batch, max_new_tokens=28, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
    return out.sequences[:, width:], torch.stack(out.logits, 1) if options.get("num_beams", 1) == 1 else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_generate(kind, dtype):
    """Ids and logits: alone, in a left-padded batch, without a cache, with each kind of it, and with beams."""
    model, sequences = patched(kind, dtype), rows((30, 3, 17))
    batch = padded(sequences, 0, left=True)
    ids, logits = generated(model, batch)
    static = kind not in ("mistral", "phi3")  # whose layers all have a window: see test_a_cache_of_something_else
    ways = [dict(use_cache=False), *([dict(cache_implementation="static")] if static else [])]
    for options in ways:
        other, theirs = generated(model, batch, **options)
        assert torch.equal(other, ids)
        same(theirs, logits, f"{options}")
    beams, _ = generated(model, batch, num_beams=3)
    for i, s in enumerate(sequences):
        own = {"input_ids": s[None], "attention_mask": torch.ones(1, len(s), dtype=torch.long)}
        one, theirs = generated(model, own)
        assert torch.equal(one[0], ids[i])
        same(theirs[0], logits[i], f"row {i} alone")
        assert torch.equal(generated(model, own, num_beams=3)[0][0], beams[i])


def test_given_positions_are_taken():
    model, (s,) = patched("llama"), rows((9,))
    given = torch.arange(9)[None] + 5
    want = model(input_ids=torch.cat([torch.tensor([3] * 5), s])[None], position_ids=torch.arange(14)[None]).logits
    got = model(input_ids=s[None], position_ids=given).logits
    assert not torch.equal(got, model(input_ids=s[None]).logits) and got.shape == (1, 9, want.shape[2])
    same(model(input_ids=s[None], position_ids=torch.arange(9)[None]).logits, model(input_ids=s[None]).logits, "the usual ones")


def seen_by_attention(monkeypatch):
    """Of every call of attention in a decoder: where its keys begin in memory, and how they are said to lie."""
    seen = []

    def spied(q, k, v, *, cu_seqlens_k, **options):
        seen.append((k.untyped_storage().data_ptr(), type(cu_seqlens_k)))
        return rk.attention(q, k, v, cu_seqlens_k=cu_seqlens_k, **options)

    monkeypatch.setattr(module, "attention", spied)
    return seen


@pytest.mark.parametrize("which", ["dynamic", "static"])
def test_a_cache_is_read_where_it_lies(which, monkeypatch):
    """Padded on the left, or not at all. What stands in places without a token is not read."""
    model, sequences = patched("llama"), rows((20, 9))
    for some in (sequences, sequences[:1]):
        batch, cache = padded(some, 0, left=True), caches_of(model)[which]()
        first = model(
            input_ids=batch["input_ids"][:, :17], attention_mask=batch["attention_mask"][:, :17], past_key_values=cache
        )
        for layer in cache.layers:
            for t in (layer.keys, layer.values):
                t[:, :, :17][~batch["attention_mask"][:, :17].bool()[:, None].expand(t[:, :, :17].shape[:-1])] = float("nan")
        seen = seen_by_attention(monkeypatch)
        rest = model(input_ids=batch["input_ids"][:, 17:], attention_mask=batch["attention_mask"], past_key_values=cache)
        assert seen == [(layer.keys.untyped_storage().data_ptr(), caches.Spans) for layer in cache.layers]
        for i, (a, b) in enumerate(
            zip(each(torch.cat([first.logits, rest.logits], 1), batch["attention_mask"]), alone(model, some), strict=True)
        ):
            same(a, b, f"row {i}")


def test_a_cache_with_padding_between_its_tokens_is_packed(monkeypatch):
    model, (long, short) = patched("llama"), rows((20, 9))
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[1, 8:20] = 0
    ids = torch.ones(2, 21, dtype=torch.long)
    ids[0], ids[1, :8], ids[1, 20] = torch.cat([long, long[:1]]), short[:8], short[8]
    cache = DynamicCache()
    model(input_ids=ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    seen = seen_by_attention(monkeypatch)
    got = model(input_ids=ids[:, 20:], attention_mask=mask, past_key_values=cache).logits
    assert {kind for _, kind in seen} == {caches.Sequences}
    for i, s in enumerate((torch.cat([long, long[:1]]), short)):
        same(got[i, 0], alone(model, [s])[0][-1], f"row {i}")


# ---- the tests can fail ------------------------------------------------------------------------------------------------------


def test_mutant_positions_of_the_padded_row(monkeypatch):
    honest = rope.rows
    by_place = lambda config, positions, *a, **k: honest(config, torch.arange(len(positions)) % 91, *a, **k)  # noqa: E731
    monkeypatch.setattr(rope, "rows", by_place)
    with pytest.raises(AssertionError, match="differ"):
        test_batch_and_padding("llama", torch.float32)


def test_mutant_keys_counted_from_what_a_window_left(monkeypatch):
    """Chunks that begin at the first key that is still there."""
    honest = caches.Keys._rolling

    def unanchored(self, width):
        keep = self._there[:, -width:]
        self._rolled[width] = (
            caches.Sequences.from_mask(torch.cat([torch.zeros(len(keep), 64, dtype=torch.bool), keep], 1)),
            64,
        )
        return honest(self, width)

    monkeypatch.setattr(caches.Keys, "_rolling", unanchored)
    with pytest.raises(AssertionError, match="differ"):
        test_chunks_through_a_cache("mistral", "rolling", 7)


@pytest.mark.parametrize("wrong", ["one place more", "no look at holes"])
def test_mutant_a_cache_is_read_where_no_token_is(wrong, monkeypatch):
    def runs(self):
        count, places = self._there.sum(1), self._there.shape[1]
        return (places - count - 1).clamp(min=0) if wrong == "one place more" else places - count, count * 0 + places

    monkeypatch.setattr(caches.Keys, "_runs", property(runs))
    with pytest.raises(AssertionError, match=r"differ|Spans"):
        if wrong == "one place more":
            test_a_cache_is_read_where_it_lies("dynamic", monkeypatch)
        else:
            test_a_cache_with_padding_between_its_tokens_is_packed(monkeypatch)


def test_mutant_a_query_sees_one_key_more_than_its_window(monkeypatch):
    monkeypatch.setattr(
        module, "attention", lambda *a, window, **k: rk.attention(*a, window=window and (window[0] + 1, -1), **k)
    )
    with pytest.raises(AssertionError):
        test_close_to_float64("mistral", torch.float32)


def test_mutant_decoding_by_another_order(monkeypatch):
    """A kernel of its own for one new token."""

    monkeypatch.setattr(module, "attention", decoding_by_another_order)
    with pytest.raises(AssertionError, match="differ"):
        test_chunks_through_a_cache("llama", "dynamic", 1)


def test_mutant_the_cache_is_rounded(monkeypatch):
    honest = caches.Keys.stored
    coarse = lambda self, layer, k, v: honest(self, layer, k.bfloat16().to(k.dtype), v)  # noqa: E731
    monkeypatch.setattr(caches.Keys, "stored", coarse)
    with pytest.raises(AssertionError, match="differ"):
        test_chunks_through_a_cache("llama", "dynamic", 7)


# ---- refused by name ---------------------------------------------------------------------------------------------------------


def test_refusals_at_patch():
    shares = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    model = decoder("llama", rope_parameters=shares)
    model.config.rope_parameters = shares | {"rope_type": "proportional"}
    with pytest.raises(rk.PatchError, match=r"rope type is 'proportional', and served are default, linear"):
        rk.patch(model)
    model = decoder("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Hardtanh()
    with pytest.raises(rk.PatchError, match="Hardtanh"):
        rk.patch(model)


def test_bad_arguments():
    model, batch = patched("llama"), padded(rows((9, 4)), 0, left=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match=r"exactly one of input_ids \[B, T\] and inputs_embeds"):
        model(attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] = \[2, 9\], nonzero where a token is, got \[2, 8\]"):
        model(input_ids=ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match=r"input_ids must be in \[0, 159\], got values in \[0, 160\]"):
        model(input_ids=torch.tensor([[0, 160]]))
    with pytest.raises(
        ValueError, match=r"at most 256 tokens a sequence, for config.max_position_embeddings, got 257; tokenise"
    ):
        model(input_ids=torch.ones(1, 257, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position_ids must be at least 0, got -1"):
        model(input_ids=ids, position_ids=torch.arange(9)[None] - 1)
    with pytest.raises(ValueError, match=r"labels is not served by a patched model; no loss is computed"):
        model(input_ids=ids, labels=ids)


def test_a_cache_of_something_else():
    model, (s,) = patched("llama"), rows((9,))
    cache = DynamicCache()
    model(input_ids=s[None], past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"past_key_values must be keys and values \[2, 2, 9, 16\] of layer 0, got \[1, 2, 9, 16\]"
    ):
        model(input_ids=s[None].expand(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values must be torch.bfloat16 as the model, got torch.float32"):
        patched("llama", torch.bfloat16)(input_ids=s[None], past_key_values=cache)
    with pytest.raises(ValueError, match=r"keys and values of 3 layers, got none of layer 2; a cache belongs to one model"):
        patched("llama", layers=3)(input_ids=s[None], past_key_values=cache)
    with pytest.raises(ValueError, match=r"nonzero where a token is, the 9 places of the cache first, got \[1, 9\]"):
        model(input_ids=s[None], attention_mask=torch.ones(1, 9), past_key_values=cache)
    with pytest.raises(ValueError, match=r"past_key_values must be a DynamicCache or StaticCache of transformers, got list"):
        model(input_ids=s[None], past_key_values=[])
    windows, words = StaticCache(config=decoder("mistral").config, max_cache_len=40), patched("mistral")
    with pytest.raises(
        ValueError, match=r"attention_mask must be of full attention, got that of a StaticCache that drops keys"
    ):
        words(input_ids=s[None], attention_mask=torch.ones(1, 1, 9, 40), past_key_values=windows)
    same(words(input_ids=s[None], past_key_values=windows).logits, words(input_ids=s[None]).logits, "the advice: no such mask")
    with pytest.raises(
        ValueError, match=r"past_key_values must be room for 9 places in layer 0, got 8; make one with a larger"
    ):
        model(input_ids=s[None], past_key_values=StaticCache(config=model.config, max_cache_len=8))
    want = model(input_ids=torch.cat([s, s])[None]).logits[0, 9:]
    same(model(input_ids=s[None], past_key_values=cache).logits[0], want, "the cache is as it was")


def test_padding_that_a_window_cannot_remember():
    model, cache = patched("mistral"), DynamicCache(config=decoder("mistral").config)
    ids, mask = torch.ones(1, 40, dtype=torch.long), torch.ones(1, 41, dtype=torch.long)
    model(input_ids=ids, past_key_values=cache)
    mask[0, 30] = 0
    with pytest.raises(
        ValueError, match=r"attention_mask must be without padding behind a sequence's first token, got padding"
    ):
        model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)


# ---- angles ------------------------------------------------------------------------------------------------------------------

ROPES = {
    "default": {},
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=2.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(factor=4.0, original_max_position_embeddings=64),
    "longrope": dict(
        long_factor=[1.5 + i / 10 for i in range(8)],
        short_factor=[1.0 + i / 100 for i in range(8)],
        original_max_position_embeddings=64,
        factor=2.0,
    ),
}


def rope_model(kind, **changes):
    return decoder("llama", rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **ROPES[kind]), **changes)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_types_are_those_of_transformers(kind):
    model = rope_model(kind)
    own, stock = rope.frequencies(rope.parameters(model.config)), model.model.rotary_emb
    assert ((own.inv_freq / stock.inv_freq - 1.0).abs() < 3e-7).all(), "PyTorch's pow is a few ulp away"
    assert own.scaling == pytest.approx(stock.attention_scaling, rel=1e-12)
    sequences = rows((50, 9))
    truth = [copy.deepcopy(model).double()(input_ids=s[None]).logits[0] for s in sequences]
    rk.patch(model)
    for got, want in zip(alone(model, sequences), truth, strict=True):
        assert (got - want).abs().max() < 2e-5


def test_longrope_turns_at_the_sequences_own_length():
    """In transformers one long sequence changes the angles of all others in the batch."""
    model, sequences = rope_model("longrope"), rows((65, 64, 9))
    truth = [copy.deepcopy(model).double()(input_ids=s[None]).logits[0] for s in sequences]
    rk.patch(model)
    batch = padded(sequences, 0)
    got = each(model(**batch, use_cache=False).logits, batch["attention_mask"])
    for a, b, want in zip(got, alone(model, sequences), truth, strict=True):
        same(a, b, f"{len(want)} tokens")
        assert (a - want).abs().max() < 2e-5
    cache = DynamicCache()
    model(input_ids=sequences[1][None], past_key_values=cache)
    with pytest.raises(ValueError, match=r"at most 64 tokens a sequence, for rope type 'longrope', got 65; .* use_cache=False"):
        model(input_ids=sequences[2][None, :1], past_key_values=cache)


def test_dynamic_is_refused_beyond_its_length():
    model = rope_model("dynamic", max_position_embeddings=32)
    rk.patch(model)
    model.config.max_position_embeddings = 64
    with pytest.raises(ValueError, match=r"at most 64 tokens a sequence"):
        model(input_ids=rows((65,))[0][None])


def test_frequencies_are_rounded_once():
    import mpmath

    with mpmath.workprec(150):
        for theta, n in ((10000.0, 64), (500000.0, 128), (1000000.0, 128)):
            said = (("features", n), ("longest", 99), ("rope_theta", theta), ("rope_type", "default"))
            got = rope.frequencies(said).inv_freq.tolist()
            for i, f in enumerate(got):
                exact = mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / n)
                assert abs(exact - f) <= mpmath.mpf(2) ** (mpmath.floor(mpmath.log(exact, 2)) - 24) * 1.0001
