"""Sampling with a seed per sequence: the draws are those of the softmax, and one text for a prompt and a seed, in any batch."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria

import rerank_kernels as rk
from conftest import ran
from models import VOCABULARY, decoder, padded, rows, tokenizer
from rerank_kernels.backend import registry
from rerank_kernels.models import sampling as module

WARP = dict(temperature=0.8, top_k=40, top_p=0.95)
SEEDS = (7, 8, 2**64 - 1)
NOISE = ["0x1.7fdc12e755c1ap+1", "0x1.f1ab3d7b8dc26p-2", "0x1.5cc549d00d24ap+0"]  # of seed 2^64 - 1 behind 70 tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def patched(kind="llama", dtype=torch.float32):
    model = decoder(kind, dtype)
    rk.patch(model)
    return model


def sample(model, batch, seeds, new=12, **options):
    width = batch["input_ids"].shape[1]
    given = dict(do_sample=True, max_new_tokens=new, custom_generate=rk.Sampling(seeds), **(WARP | options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**batch, **given)[:, width:].tolist()


def batch_of(sequences, **how):
    return padded(sequences, 0, left=True, **how)


def one(s):
    return {"input_ids": s[None], "attention_mask": torch.ones(1, len(s), dtype=torch.long)}


# ---- one text for a prompt and a seed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dtype", [("llama", torch.float32), ("qwen3", torch.bfloat16)], ids=str)
def test_a_prompt_and_a_seed_decide_the_text(kind, dtype):
    """Alone, at each place of a batch, with more padding, without a cache, whatever PyTorch's generator says."""
    model, sequences = patched(kind, dtype), rows((30, 3, 17))
    want = [sample(model, one(s), [seed])[0] for s, seed in zip(sequences, SEEDS, strict=True)]
    assert len({tuple(w) for w in want}) == 3
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        torch.manual_seed(order[0])
        batch = batch_of([sequences[i] for i in order])
        assert sample(model, batch, [SEEDS[i] for i in order]) == [want[i] for i in order]
    assert sample(model, batch_of(sequences, to=41), SEEDS) == want
    assert sample(model, batch_of(sequences), SEEDS, use_cache=False) == want
    assert sample(model, one(sequences[0]), torch.tensor([7])) == want[:1]  # no mask is left after transformers drops it
    assert sample(model, {"input_ids": sequences[0][None]}, np.array([7])) == want[:1]


def test_a_text_goes_on_as_it_would_have():
    """The noise counts the tokens before a token: from prompt and text, and from a cache."""
    model, (s,) = patched(), rows((9,))
    whole = sample(model, one(s), [5], new=12)[0]
    longer = torch.cat([s, torch.tensor(whole[:5])])
    assert sample(model, one(longer), [5], new=7)[0] == whole[5:]
    cache = DynamicCache(config=model.config)
    model(input_ids=s[None, :-1], past_key_values=cache)
    assert sample(model, one(s), [5], past_key_values=cache)[0] == whole


def test_several_texts_for_a_prompt():
    model, (s,) = patched(), rows((9,))
    want = [sample(model, one(s), [seed])[0] for seed in (1, 2, 3)]
    assert sample(model, one(s), [1, 2, 3], num_return_sequences=3) == want and want[0] != want[1]


def test_the_scores_are_those_that_were_drawn_from():
    """output_scores gives what the warpers left, as stock does, and each new token is one of them."""
    model, (s,) = patched(), rows((9,))
    given = dict(do_sample=True, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True, **WARP)
    out = model.generate(**one(s), custom_generate=rk.Sampling([3]), **given)
    assert len(out.scores) == 4
    for scores, logits, token in zip(out.scores, out.logits, out.sequences[0, 9:], strict=True):
        left = torch.isfinite(scores)
        assert 1 <= int(left.sum()) <= 40 and left[0, token]
        assert torch.allclose(scores[left], logits[left] / 0.8)


def test_other_processors_and_a_streamer():
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.where(torch.arange(scores.shape[1]) < 20, scores, -torch.inf)

    model, (s,), heard = patched(), rows((9,)), []
    stream = SimpleNamespace(put=lambda t: heard.append(t.flatten().tolist()), end=lambda: heard.append("end"))
    given = dict(do_sample=True, max_new_tokens=6, temperature=3.0, logits_processor=LogitsProcessorList([Only()]))
    out = model.generate(**one(s), custom_generate=rk.Sampling([3], streamer=stream), **given)[0, 9:].tolist()
    assert max(out) < 20 and heard == [s.tolist(), *([t] for t in out), "end"]


@pytest.mark.parametrize(
    "given",
    [
        dict(temperature=0.3, repetition_penalty=100.0),
        dict(no_repeat_ngram_size=1),
        dict(eos_token_id=list(range(20, 100)), min_length=16),
        dict(eos_token_id=list(range(20, 100)), min_new_tokens=5),
    ],
    ids=lambda given: list(given)[-1],
)
def test_padding_is_none_of_the_tokens_that_a_processor_reads(given):
    """What stands at padding is a token that the text has."""
    model, seqs = patched(), rows((5, 13, 9))
    given = dict(new=24, pad_token_id=0, temperature=2.0, top_k=0, top_p=1.0) | given
    alone = [sample(model, one(s), [seed], **given)[0] for s, seed in zip(seqs, SEEDS, strict=True)]
    together = sample(model, padded(seqs, alone[0][3], left=True, to=30), SEEDS, **given)
    for text, wanted in zip(together, alone, strict=True):
        assert text[: len(wanted)] == wanted and set(text[len(wanted) :]) <= {0}


@pytest.mark.parametrize("given", [dict(encoder_repetition_penalty=3.0), dict(encoder_no_repeat_ngram_size=1)], ids=list)
def test_processors_of_the_prompt_take_no_padding(given):
    model, (s, _) = patched(), rows((9, 9))
    assert len(sample(model, one(s), [5], **given)[0]) == 12
    assert len(sample(model, batch_of(rows((9, 9))), [5, 6], **given)) == 2
    with pytest.raises(ValueError, match="processors must be one that reads no prompt, in a batch with padding, got Encoder"):
        sample(model, batch_of([s], to=12), [5], **given)


def test_a_text_stops_at_a_string():
    """As the docstring advises: generate's own stop_strings gets no tokenizer here."""
    own = tokenizer("roberta")
    model = decoder("llama", vocab_size=len(own))
    rk.patch(model)
    (s,) = rows((9,))
    whole = sample(model, one(s), [5])[0]
    end = next(t for t in own.convert_ids_to_tokens(whole) if t.isascii())
    stop = StoppingCriteriaList([StopStringCriteria(own, [end])])
    short = sample(model, one(s), [5], stopping_criteria=stop)[0]
    assert short == whole[: len(short)] and len(short) < len(whole) and end in own.decode(short)
    with pytest.raises(ValueError, match="tokenizer"):
        sample(model, one(s), [5], stop_strings=[end], tokenizer=own)


# ---- the draws ---------------------------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax():
    """6,000 seeds, and 6,000 places of one seed, against the probabilities: chi-squared below its 1e-6 quantile."""
    scores = np.array([1.0, -np.inf, 0.0, 2.0, -1.0, 0.5], np.float32)
    p = np.exp(scores.astype(np.float64))
    p /= p.sum()
    for keys in ([(seed, 4) for seed in range(6_000)], [(4, place) for place in range(6_000)]):
        counts = np.bincount([module.draw(scores, *key) for key in keys], minlength=6)
        assert counts[1] == 0
        kept = p > 0
        assert ((counts[kept] - 6_000 * p[kept]) ** 2 / (6_000 * p[kept])).sum() < 35  # 4 degrees of freedom


def test_noise_is_the_same_everywhere():
    """Written down, so that another machine that has other numbers fails."""
    got = module.noise(2**64 - 1, 70, np.array([0, 1, 151_642]))
    assert [v.hex() for v in got.tolist()] == NOISE
    assert len(np.unique(module.noise(1, 0, np.arange(100_000)))) == 100_000


@pytest.mark.parametrize("name, low, high", [("log", 2.0**-53, 1.0), ("exp", -700.0, 0.0)])
def test_element_functions(name, low, high):
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.uniform(low, high, 2000), [low, 1 - 2.0**-53, 0.7071067811865475, 0.7071067811865476, 36.7, 1e-9]])
    x = x if name == "log" else -np.abs(x)
    got = getattr(module, name)(x)
    for a, b in zip(x.tolist(), got.tolist(), strict=True):
        want = getattr(mpmath, name)(mpmath.mpf(a))
        assert abs(mpmath.mpf(b) - want) <= 3 * math.ulp(float(want)), (a, b)


def test_warpers_keep_what_those_of_transformers_keep():
    from transformers.generation import logits_process as theirs

    scores = torch.from_numpy(np.random.default_rng(3).normal(0, 2, (5, VOCABULARY)).astype(np.float32))
    warpers = [
        theirs.TemperatureLogitsWarper(0.7), theirs.TopKLogitsWarper(7), theirs.TopPLogitsWarper(0.6),
        theirs.TopPLogitsWarper(1e-6, min_tokens_to_keep=2), theirs.MinPLogitsWarper(0.1), theirs.TopKLogitsWarper(10**6),
    ]  # fmt: skip
    for warper in warpers:
        got, want = module._served(warper)(None, scores), warper(None, scores)
        assert torch.equal(torch.isfinite(got), torch.isfinite(want)), type(warper).__name__
        kept = torch.isfinite(got)
        assert torch.allclose(got[kept], want[kept], rtol=1e-6)


# ---- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, came", [(math.nan, "NaN"), (math.inf, r"\+inf")])
def test_logits_that_are_no_numbers(value, came):
    """An error names the sequence and the token, also where a processor would hide it; the model and its cache stay usable."""
    model, sequences = patched(), rows((9, 5))
    want = sample(model, batch_of(sequences), SEEDS[:2])
    cache, weight = DynamicCache(config=model.config), model.lm_head.weight
    state = model(input_ids=sequences[0][None], output_hidden_states=True).hidden_states[-1][0, -1]
    model(input_ids=sequences[0][None, :-1], past_key_values=cache)
    kept = weight[3].clone()
    weight[3] = value * state.sign()
    with pytest.raises(ValueError, match=f"the logits of sequence 0 at new token 0 must be finite.*got {came}; look for NaN"):
        sample(model, one(sequences[0]), [7], past_key_values=cache, suppress_tokens=[3])
    weight[3] = kept
    assert sample(model, batch_of(sequences), SEEDS[:2]) == want
    cache.crop(-1)
    assert sample(model, one(sequences[0]), [7], past_key_values=cache)[0] == want[0]


def test_no_token_is_left():
    model, (s,) = patched(), rows((9,))
    with pytest.raises(ValueError, match=r"processed logits of sequence 0 at new token 0 .* got -inf for every token"):
        sample(model, one(s), [1], suppress_tokens=list(range(VOCABULARY)))


def test_refusals():
    model, sequences = patched(), rows((9, 5))
    batch = batch_of(sequences)
    with pytest.raises(ValueError, match="seeds must be 2, one for each sequence that is generated, got 1"):
        sample(model, batch, [1])
    with pytest.raises(ValueError, match="seeds must be 6"):
        sample(model, batch, [1, 2], num_return_sequences=3)
    for seed in (-1, 2**64, 1.5, True, "1"):
        with pytest.raises(ValueError, match=r"seeds\[0\] must be an integer in"):
            rk.Sampling([seed])
    with pytest.raises(ValueError, match=r"one for each sequence, got 3; pass \[3\]"):
        rk.Sampling(3)
    given = dict(custom_generate=rk.Sampling([1, 2]), max_new_tokens=2)
    with pytest.raises(ValueError, match="mode must be sample, got greedy_search; pass do_sample=True"):
        model.generate(**batch, **given, do_sample=False)
    with pytest.raises(ValueError, match="mode must be sample, got beam_sample"):
        model.generate(**batch, **given, do_sample=True, num_beams=2)
    for option in (dict(typical_p=0.5), dict(epsilon_cutoff=0.1), dict(eta_cutoff=0.1), dict(renormalize_logits=True)):
        with pytest.raises(ValueError, match=r"warpers must be temperature, top_k, top_p and min_p, got .*leave that argument"):
            sample(model, batch, [1, 2], **option)


# ---- the tests can fail ----------------------------------------------------------------------------------------------------


def test_mutant_noise_of_the_place_in_the_batch(monkeypatch):
    honest, place = module.noise, iter(range(10**6))
    monkeypatch.setattr(module, "noise", lambda seed, before, tokens: honest(next(place) % 3, before, tokens))
    with pytest.raises(AssertionError):
        test_a_prompt_and_a_seed_decide_the_text("llama", torch.float32)


def test_mutant_tokens_counted_with_the_padding(monkeypatch):
    monkeypatch.setattr(module, "_tokens", lambda ids, mask, seen: [ids.shape[1]] * ids.shape[0])
    with pytest.raises(AssertionError):
        test_a_prompt_and_a_seed_decide_the_text("llama", torch.float32)


def test_mutant_steps_counted_from_the_prompts_end(monkeypatch):
    monkeypatch.setattr(module, "_tokens", lambda ids, mask, seen: [0] * ids.shape[0])
    with pytest.raises(AssertionError):
        test_a_text_goes_on_as_it_would_have()


@pytest.mark.parametrize(
    "given",
    [
        dict(no_repeat_ngram_size=1),
        dict(eos_token_id=list(range(20, 100)), min_length=16),
    ],
)
def test_mutant_processors_read_the_padding(monkeypatch, given):
    monkeypatch.setattr(module._Own, "reading", lambda self, processor: processor)
    with pytest.raises(AssertionError):
        test_padding_is_none_of_the_tokens_that_a_processor_reads(given)


def test_mutant_a_draw_before_the_warpers(monkeypatch):
    monkeypatch.setattr(module, "_served", lambda processor: lambda ids, scores: scores)
    with pytest.raises(AssertionError):
        test_the_scores_are_those_that_were_drawn_from()


def test_mutant_one_generator_for_the_batch(monkeypatch):
    draw = lambda scores, *_: int(torch.multinomial(torch.from_numpy(scores).softmax(0), 1))  # noqa: E731
    monkeypatch.setattr(module, "draw", draw)
    with pytest.raises(AssertionError):
        test_a_prompt_and_a_seed_decide_the_text("llama", torch.float32)


def test_mutant_noise_that_is_not_gumbels(monkeypatch):
    honest = module.noise
    monkeypatch.setattr(module, "noise", lambda *a: -honest(*a))
    with pytest.raises(AssertionError):
        test_draws_follow_the_softmax()
