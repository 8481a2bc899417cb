"""`rerank-kernels bench`: the user's model stays as it was, every text is in every way, and bits that differ are said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import rerank_kernels.bench as user
from rerank_kernels import cli
from rerank_kernels.verify import load
from rerank_kernels.verify.models import default_pairs

PAIRS = [pair for pair in default_pairs() if len(pair[1]) < 300][:11]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load("shape:tiny")


def run(tiny: Any, **how: Any) -> user.BenchReport:
    return user.bench(tiny.model, tiny.tokenizer, PAIRS, batch_size=4, seconds=0.1, **how)


def test_patched_keeps_its_bits_and_stock_does_not(tiny: Any) -> None:
    before = {n: p.data_ptr() for n, p in tiny.model.named_parameters()}
    report = run(tiny)
    assert report.ok and report.rows == len(PAIRS)
    assert report.differ(user.WAYS[0], "stock") > 0 and report.differ("one by one", "stock") == 0
    assert "forward" not in tiny.model.__dict__, "the user's model was patched"
    assert before == {n: p.data_ptr() for n, p in tiny.model.named_parameters()}
    for way, of in report.times.items():
        calls = 11 if way == "one by one" else 3
        for timed in of.values():
            assert len(timed.rounds) >= user.LEAST_ROUNDS and len(timed.calls) == calls * len(timed.rounds)
            assert sum(timed.calls) == pytest.approx(sum(timed.rounds))
        # the same texts in the same order, whatever the batches
        torch.testing.assert_close(of["stock"].results, of["patched"].results, atol=1e-4, rtol=0)
    told = report.as_dict()
    json.dumps(told)
    assert told["ways"]["one by one"]["ratio"] > 0 and told["texts"] == 11 and told["ok"]


def test_bits_that_differ_are_said(tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(user, "_patched_twin", lambda model, mode: model)
    monkeypatch.setattr(user, "max_tokens", lambda model: 512)
    assert not run(tiny).ok
    assert cli.main(["bench", "shape:tiny", "--limit", "11", "--batch-size", "4", "--seconds", "1"]) == 1
    assert "BITS DIFFER" in capsys.readouterr().out


def test_ratio_is_the_median_of_the_rounds() -> None:
    times = {
        way: {"stock": user.Timed([2.0, 9.0, 4.0], [1.0]), "patched": user.Timed([1.0, 3.0, 4.0], [1.0])} for way in user.WAYS
    }
    assert user.BenchReport(1, 1, {}, times).ratio(user.WAYS[0]) == 2.0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out.json"
    pairs.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in PAIRS))
    argv = [
        "bench",
        "shape:tiny",
        "--pairs",
        str(pairs),
        "--limit",
        "5",
        "--batch-size",
        "2",
        "--seconds",
        "1",
        "--dtype",
        "bf16",
    ]
    assert cli.main([*argv, "--json", str(out)]) == 0
    held = json.loads(out.read_text())
    assert held["texts"] == 5 and held["dtype"] == "bfloat16" and set(held["ways"]) == set(user.WAYS)
    printed = capsys.readouterr().out
    assert all(way.split(" ")[-1] in printed for way in user.WAYS) and "the same bits in every way" in printed
    pairs.write_text("")
    assert cli.main(argv) == 2 and "there are no pairs" in capsys.readouterr().err


def test_an_embedding_model(capsys: pytest.CaptureFixture[str]) -> None:
    import models

    assert cli.main(["bench", str(models.minilm()), "--limit", "4", "--batch-size", "2", "--seconds", "1"]) == 0
    assert "BertModel" in capsys.readouterr().out


def test_a_language_head_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ways, the last two with tokens of greedy search; stock in the place of the patched twin fails."""
    loaded = load("shape:relu-llama")
    loaded.model.model.layers = loaded.model.model.layers[:2]
    loaded.model.config.num_hidden_layers = 2
    report = user.bench(loaded.model, loaded.tokenizer, PAIRS[:5], batch_size=3, seconds=0.1)
    assert report.ok and list(report.times) == [*user.WAYS, *user.WRITING]
    assert report.differ(user.WAYS[0], "stock") > 0 and report.differ(user.WRITING[0], "stock") > 0
    assert report.times[user.WAYS[0]]["patched"].results.shape == (5, loaded.model.config.vocab_size)
    assert report.times[user.WRITING[0]]["patched"].results.shape == (5, 2 * user.NEW)
    assert report.fastest_way("patched") in user.WAYS
    monkeypatch.setattr(user, "_patched_twin", lambda model, mode: model)
    monkeypatch.setattr(user, "max_tokens", lambda model: 512)
    wrong = user.bench(loaded.model, loaded.tokenizer, PAIRS[:5], batch_size=3, seconds=0.1)
    assert not wrong.ok and wrong.differ(user.WRITING[0], "patched") > 0
    with pytest.raises(ValueError, match="bench: instruction must be unset without a template"):
        user.bench(loaded.model, loaded.tokenizer, PAIRS[:5], instruction="i")
