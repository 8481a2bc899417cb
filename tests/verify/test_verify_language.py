"""verify of a language head: what is right passes, stock does not, and each of its checks sees the mistake that it is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import rerank_kernels.verify as package
from models import CORPUS, decoder, tokenizer
from prefill import decoding_by_another_order
from rerank_kernels.models import caches
from rerank_kernels.models import decoder as module
from rerank_kernels.scoring.language import next_logits
from rerank_kernels.verify import VerifyReport, controls, language, load, verify
from rerank_kernels.verify.checks import CACHED, CHUNKED, FINAL, GREEDY, HOME, NEW, UNCACHED, Call, Texts, all_checks, build
from rerank_kernels.verify.models import gguf

PAIRS = [(CORPUS[0], d) for d in (*CORPUS[1:6], " ".join(CORPUS[2:5]), "?", CORPUS[0] + "?")]
THROUGH = {"cache", "chunks", "generate"}
ROUTES = (CACHED[0], CACHED[1], *CHUNKED, GREEDY, UNCACHED)

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def head(kind: str = "llama", dtype: torch.dtype = torch.float32):
    own = tokenizer("roberta")
    own.add_tokens(["yes", "no"])
    own.model_max_length = 400
    return decoder(kind, dtype, vocab_size=len(own), max_position_embeddings=512), own


def run(model, own, **options) -> VerifyReport:
    return verify(model, own, PAIRS, **{"limit": HOME, "max_length": 24, **options})


def broken(report: VerifyReport) -> set[str]:
    return {r.check for r in report.results if not r.holds}


def seen(report: VerifyReport) -> set[str]:
    return {r.check for r in report.results}


def texts(model, own) -> Texts:
    return package._texts(model, own, PAIRS, cut=24, room=40, limit=HOME)


def only(monkeypatch, *names: str, sighted: bool = False) -> None:
    """verify without its other checks, and without the controls that test_verify.py holds."""
    true = package.all_checks
    monkeypatch.setattr(package, "all_checks", lambda *a, **k: [c for c in true(*a, **k) if c.name in names])
    if not sighted:
        monkeypatch.setattr(package, "sighted_controls", lambda *a: [])


# ---- models ------------------------------------------------------------------------------------------------------------------


def test_a_language_head_passes_and_is_left_as_it_was() -> None:
    model, own = head()
    report = run(model, own)
    assert report.ok, report.as_dict()
    assert report.kind == "language head" and seen(report) >= {*controls.SIGHTED, *THROUGH}
    assert all(r.total > 0 and r.max_difference == 0 and r.flips == 0 for r in report.results)
    assert {c.expected for c in report.controls} >= {*controls.SIGHTED, *THROUGH} and not report.powerless
    assert {"attention 1 ulp off through a cache", "rotary 1 ulp off in chunks"} <= {c.name for c in report.controls}
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_template_makes_pairs_of_it(monkeypatch) -> None:
    """Qwen3 with a window: its prompts are a reranker's, and Reranker's log-odds are checked."""
    only(monkeypatch, "padding side", "packed", "cache", sighted=True)
    monkeypatch.setattr(package, "SEEN", 2)  # fewer than the tokens that answer
    model, own = head("qwen3", torch.bfloat16)
    report = run(model, own, max_length=None, limit=HOME)
    assert report.ok and report.kind == "cross-encoder", report.as_dict()
    assert seen(report) == {"padding side", "packed", "cache"} and len(report.controls) >= 3
    cache = next(r for r in report.results if r.check == "cache")
    assert cache.total == 2 * HOME and cache.ordered > 0


def test_a_generation_config_changes_nothing_that_is_checked() -> None:
    """Beams, which keep the best of several texts, and a penalty, which would read the padding."""
    model, own = head()
    asked = {"num_beams": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 9.0}
    call = Call((0, 1, 2))
    want = language.routes(model, texts(model, own), torch.device("cpu"))[GREEDY](call)
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    got = language.routes(model, texts(model, own), torch.device("cpu"))[GREEDY](call)
    assert np.array_equal(got, want)


def test_stock_falls_where_it_must(monkeypatch) -> None:
    only(monkeypatch, "batch", "padding length", "padding side", *THROUGH)
    model, own = head()
    report = run(model, own, stock=True)
    assert not report.ok and {"batch", "padding length", *THROUGH} <= broken(report)
    # rounding: a mistake of ours in how stock is called would be larger
    assert max(r.max_difference for r in report.results) < 1e-4


def test_a_folder_and_a_fresh_process(tmp_path, monkeypatch) -> None:
    only(monkeypatch, "math library")
    model, own = head()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), torch.bfloat16)
    assert type(loaded.model).__name__ == "LlamaForCausalLM" and loaded.model.dtype == torch.bfloat16
    monkeypatch.setattr(package.fresh, "SETTINGS", package.fresh.SETTINGS[:1])
    monkeypatch.setattr("rerank_kernels.verify.checks.SETTINGS", package.fresh.SETTINGS)
    report = run(loaded.model, loaded.tokenizer, source=str(tmp_path))
    assert report.ok and seen(report) == {"math library"}, report.as_dict()
    assert "rms_norm 1 ulp off under MKL_CBWR=COMPATIBLE" in {c.name for c in report.controls}


def test_shapes() -> None:
    loaded = load("shape:relu-llama", torch.bfloat16)
    assert loaded.model.config.hidden_act == "relu" and loaded.note == "shape:relu-llama: random weights"
    with pytest.raises(ValueError, match=r"no shape is named 'no'; there are bge.*qwen3-reranker-0\.6b, relu-llama"):
        load("shape:no")


def test_files_of_gguf(tmp_path) -> None:
    assert gguf(tmp_path) is None
    (tmp_path / "a.gguf").touch()
    assert gguf(tmp_path) == gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    with pytest.raises(ValueError, match=r"a\.gguf: .*(pip install 'rerank-kernels\[gguf\]'|no model could be unpacked)"):
        load(str(tmp_path))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, a\.gguf, b\.gguf; name one of them"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert gguf(tmp_path) is None


def test_a_template_where_there_is_none() -> None:
    model, own = head()
    with pytest.raises(ValueError, match="verify: instruction must be unset without a template, got 'i'; name a template too"):
        run(model, own, instruction="i")
    loaded = load("shape:tiny")
    with pytest.raises(ValueError, match="verify: template must be unset for a model without a language head, got 'qwen3"):
        verify(loaded.model, loaded.tokenizer, template="qwen3-reranker")


# ---- the numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_next_token_is_behind_the_last_one(side: str) -> None:
    model, own = head()
    some = texts(model, own)
    got = next_logits(model, build(some, Call((0, 1, 2), length=30, side=side)))
    for i in range(3):
        with torch.no_grad():
            want = model(torch.tensor([some.tokens[i]["input_ids"]])).logits[0, -1]
        torch.testing.assert_close(got[i], want, atol=1e-4, rtol=0)


def test_routes_give_what_the_model_gives() -> None:
    model, own = head()
    some = texts(model, own)
    ways = language.routes(model, some, torch.device("cpu"))
    want = next_logits(model, build(some, Call((0, 1, 2)))).numpy()
    for name in (*CACHED, *CHUNKED):
        np.testing.assert_allclose(ways[name](Call((0, 1, 2))), want, atol=1e-4)
    written = ways[GREEDY](Call((0, 1, 2)))
    assert written.shape == (3, 2 * NEW) and written[:, 0].tolist() == want.argmax(1).tolist()
    np.testing.assert_allclose(written[:, NEW], want.max(1), atol=1e-4)


def test_differences_of_texts_end_at_the_first_other_token() -> None:
    call, n = Call((0,), route=GREEDY), 3
    want = np.array([5, 6, 7, 1.0, 2.0, 3.0], np.float32)
    got = np.array([5, 9, 9, 1.0, 2.5, 90.0], np.float32)
    assert len(want) == 2 * n and language.gap(call, want, got) == 0.5
    assert language.says(call, want) == (5, 6, 7) != language.says(call, got)
    assert language.says(Call((0,)), want) == (2,)


# ---- power -------------------------------------------------------------------------------------------------------------------


def test_each_sighted_control_is_seen_by_its_own_check_only() -> None:
    model, own = head()
    some = texts(model, own)
    reference = np.linspace(-3, 3, 2 * HOME, dtype=np.float32).reshape(HOME, 2)
    checks = all_checks(some, routes=("packed", "process", "isa:scalar", FINAL, *ROUTES))
    found = controls.sighted_controls(some, checks, reference)
    assert {c.expected: c.seen_by for c in found} == {c.name: (c.name,) for c in checks}
    assert {c.name for c in checks} >= {*controls.SIGHTED, *THROUGH}


@pytest.mark.parametrize("name", sorted(THROUGH))
def test_a_check_without_its_condition_is_powerless(name: str) -> None:
    model, own = head()
    some = texts(model, own)
    checks = [
        dataclasses.replace(c, scorings=((Call((0,), route=c.route),),)) if c.name == name else c
        for c in all_checks(some, routes=ROUTES)
    ]
    found = controls.sighted_controls(some, checks, np.zeros((HOME, 2), np.float32))
    assert [c.expected for c in found if not c.caught] == [name]


def test_mutant_the_cache_is_rounded(monkeypatch) -> None:
    only(monkeypatch, "batch", *THROUGH)
    honest = caches.Keys.stored
    coarse = lambda self, layer, k, v: honest(self, layer, k.bfloat16().to(k.dtype), v)  # noqa: E731
    monkeypatch.setattr(caches.Keys, "stored", coarse)
    assert broken(run(*head())) == THROUGH


def test_mutant_decoding_by_another_order(monkeypatch) -> None:
    """A kernel of its own for one new token of one sequence: only chunks of 1 and generate() of a text alone see it."""
    only(monkeypatch, "batch", *THROUGH)

    monkeypatch.setattr(module, "attention", decoding_by_another_order)
    assert broken(run(*head())) == {"chunks", "generate"}


def test_mutant_positions_of_the_padded_row(monkeypatch) -> None:
    only(monkeypatch, "batch", "padding length", "padding side", "repeat")
    honest = caches.valid

    def counted(op, mask, cache, b, past, t, device):
        there = honest(op, mask, cache, b, past, t, device)
        first = there.long().argmax(1)
        return there.roll(1, 1) if bool((first > 0).any()) and there.shape[0] > 2 else there

    monkeypatch.setattr("rerank_kernels.models.decoder.valid", counted)
    report = run(*head())
    assert {"batch", "padding length"} <= broken(report) and "repeat" not in broken(report)
