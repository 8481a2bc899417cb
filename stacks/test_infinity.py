"""Infinity: its engine in this process, and `rerank-kernels infinity-server` as a live server beside a stock one.

What is in a batch of the server depends on which clients ask at the same time; a patched one must give a pair one score anyway.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import pytest
import torch
from infinity_emb import AsyncEngineArray, EngineArgs
from server import START, Answer, Asked, Server, clients, command, serving, terminated_under_load

import rerank_kernels as rk

# How often every pair is asked alone and every list of 20 as one, by how many clients at once. 210 requests a time.
ROUNDS = {1: 1, 10: 3, 32: 6}
STOCK_ROUNDS = {10: 1, 32: 1}


# ---- the engine ------------------------------------------------------------------------------------------------------------


class Engines:
    """An AsyncEngineArray of one engine, and a loop to run it in."""

    def __init__(self, folder: str, dtype: str = "float32", devices: Sequence[int] = ()) -> None:
        how = {"device": "cpu", "engine": "torch", "dtype": dtype, "model_warmup": False, "bettertransformer": False}
        how |= {"device_id": list(devices)} if devices else {}
        self.array = AsyncEngineArray.from_args([EngineArgs(model_name_or_path=folder, **how)])
        self.engine = self.array[0]
        self.loop = asyncio.new_event_loop()
        self.batch = 0

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: Any) -> None:
        self.loop.run_until_complete(self.array.astop())
        self.loop.close()

    def rerank(self, query: str, texts: Sequence[str], batch: int = 32, **how: Any) -> list[tuple[int, float]]:
        """(place in the list, score) of each document, best first."""
        if batch != self.batch:
            # an engine reads its batch size when it is started
            object.__setattr__(self.engine.engine_args, "batch_size", batch)
            self.loop.run_until_complete(self.array.astop())
            self.loop.run_until_complete(self.array.astart())
            self.batch = batch
        name = self.engine.engine_args.served_model_name
        found, _ = self.loop.run_until_complete(self.array.rerank(model=name, query=query, docs=list(texts), **how))
        return [(hit.index, float(hit.relevance_score)) for hit in found]

    def logits(self, query: str, texts: Sequence[str], batch: int) -> list[float]:
        of = dict(self.rerank(query, texts, batch, raw_scores=True))
        return [of[i] for i in range(len(texts))]


def test_same_bits(results: common.Results, case: tuple[str, torch.dtype]) -> None:
    with Engines(case[0], str(case[1]).removeprefix("torch.")) as engines:
        inner = engines.engine._model_replicas[0].model
        common.hold(results, "AsyncEngineArray", case, engines.array, inner, engines.logits)


def test_order(results: common.Results) -> None:
    with Engines(str(common.data() / "minilm-saturated")) as engines:
        common.hold_order(
            results, "AsyncEngineArray", engines.array, lambda query, texts: [i for i, _ in engines.rerank(query, texts)]
        )


def test_scores_and_top_n() -> None:
    with Engines(str(common.data() / "xlmr")) as engines:
        rk.patch(engines.array)
        (query, texts), *_ = common.lists()
        every = engines.rerank(query, texts)
        wanted = rk.sigmoid(torch.tensor(engines.logits(query, texts, 32))).tolist()
        assert common.bits_of(score for _, score in every) == common.bits_of(wanted[i] for i, _ in every)
        assert engines.rerank(query, texts, top_n=3) == every[:3]
        assert engines.rerank(query, texts, top_n=100) == every
        raw = engines.rerank(query, texts, raw_scores=True)
        assert [i for i, _ in raw] == [i for i, _ in every] and raw[0][1] != every[0][1]
        assert engines.rerank(query, texts, raw_scores=True, top_n=2) == raw[:2]


def test_every_replica_is_patched() -> None:
    """Asked one by one: an engine of two replicas wants more threads than Infinity starts on two cores, and waits for ever."""
    engines = Engines(str(common.data() / "xlmr"), devices=(0, 1))
    rk.patch(engines.array)
    first, second = engines.engine._model_replicas

    def logits(replica: Any, batch: int) -> list[int]:
        parts = [common.pairs()[i : i + batch] for i in range(0, common.PAIRS, batch)]
        return common.bits_of(
            x for part in parts for x in replica.encode_post(replica.encode_core(replica.encode_pre(part))).tolist()
        )

    assert logits(first, 1) == logits(second, 7)


# ---- the server ------------------------------------------------------------------------------------------------------------


def models() -> dict[str, str]:
    return {name: str(common.data() / name) for name in ("minilm", "minilm-saturated", "xlmr")}


@pytest.fixture(scope="module")
def stock() -> Iterator[Server]:
    with serving(False, models()) as server:
        yield server


@pytest.fixture(scope="module")
def ours() -> Iterator[Server]:
    with serving(True, models()) as server:
        said = server.log.read_text()
        assert [name for name in models() if f"rerank_kernels: {name}," not in " ".join(said.split())] == [], said
        yield server


def one_round(number: int) -> list[Asked]:
    """Every pair alone and every list of 20, its documents in an order of this round; logits in every other round."""
    chance = random.Random(number)
    work = []
    for j, (query, texts) in enumerate(common.lists()):
        places = list(range(len(texts)))
        chance.shuffle(places)
        for chosen in ([*places], *([i] for i in places)):
            pairs = tuple(j * len(texts) + i for i in chosen)
            work.append(Asked(query, tuple(texts[i] for i in chosen), pairs, number % 2 == 0))
    return work


def scores_of(done: Sequence[tuple[Asked, Answer]]) -> dict[tuple[int, bool], set[float]]:
    """(pair, whether a logit) -> the scores it was given."""
    found: dict[tuple[int, bool], set[float]] = {}
    for asked, answer in done:
        assert answer.status == 200, answer
        assert sorted(hit["index"] for hit in answer.body["results"]) == list(range(len(asked.pairs)))
        for hit in answer.body["results"]:
            found.setdefault((asked.pairs[hit["index"]], asked.raw), set()).add(hit["relevance_score"])
    return found


def asked_by_all(server: Server, rounds: dict[int, int]) -> tuple[dict[tuple[int, bool], set[float]], int]:
    done = []
    for count, times in rounds.items():
        # the first round is logits, so that even one client alone gives them
        done += clients(server, "minilm", [asked for n in range(times) for asked in one_round(n)], count)
    return scores_of(done), len(done)


def test_one_score_a_pair(results: common.Results, ours: Server) -> None:
    scores, requests = asked_by_all(ours, ROUNDS)
    many = {pair: found for pair, found in scores.items() if len(found) != 1}
    assert requests >= 2000
    assert not many, f"{len(many)} of {len(scores)} pairs have several scores, e.g. {next(iter(many.items()))}"
    assert len(scores) == 2 * common.PAIRS
    logits = [scores[pair, True].pop() for pair in range(common.PAIRS)]
    wanted = rk.sigmoid(torch.tensor(logits)).tolist()
    assert common.bits_of(scores[pair, False].pop() for pair in range(common.PAIRS)) == common.bits_of(wanted)
    results.note("ours infinity-server", "minilm float32", common.bits_of(logits))
    results.note("server", "ours", {"requests": requests, "pairs with several scores": 0, "most scores of a pair": 1})


def test_stock_has_several(results: common.Results, stock: Server) -> None:
    """Or the rounds above would show nothing."""
    scores, requests = asked_by_all(stock, STOCK_ROUNDS)
    many = {pair for (pair, _), found in scores.items() if len(found) > 1}
    most = max(len(found) for found in scores.values())
    results.note(
        "server", "stock", {"requests": requests, "pairs with several scores": len(many), "most scores of a pair": most}
    )
    assert many


def test_server_keeps_the_order(results: common.Results, stock: Server, ours: Server) -> None:
    """All 200 documents against one query, logits in 8..16: best first by logit, in the answer to a plain request."""
    query = common.lists()[0][0]
    texts = [common.documents()[i] for i in common.shuffled(common.PAIRS)]
    plain, raw = (Asked(query, tuple(texts), (), is_raw) for is_raw in (False, True))

    def order(server: Server, asked: Asked) -> list[int]:
        ((_, answer),) = clients(server, "minilm-saturated", [asked], 1)
        return [hit["index"] for hit in answer.body["results"]]

    wanted = order(ours, raw)
    found = {name: common.differ(order(server, plain), wanted) for name, server in (("stock", stock), ("ours", ours))}
    results.note("order", "infinity-server", found)
    assert found["ours"] == 0


def mistakes() -> dict[str, tuple[bytes, str, str]]:
    """Requests that Infinity refuses in words of its own: body, path, method."""
    (query, texts), *_ = common.lists()
    right = {"model": "xlmr", "query": query, "documents": texts[:2]}
    wrong: dict[str, Any] = {
        "no query": {k: v for k, v in right.items() if k != "query"},
        "no documents": {k: v for k, v in right.items() if k != "documents"},
        "an empty list": right | {"documents": []},
        "documents are text": right | {"documents": "text"},
        "a document is a number": right | {"documents": [1]},
        "the query is null": right | {"query": None},
        "top_n is 0": right | {"top_n": 0},
        "another model": right | {"model": "nobody"},
        "a document of a million letters": right | {"documents": ["x" * 1_000_000]},
        "20,000 documents": right | {"documents": ["x"] * 20_000},
        "a list": [right],
    }
    found = {name: (json.dumps(body).encode(), "/rerank", "POST") for name, body in wrong.items()}
    found |= {
        name: (body, "/rerank", "POST")
        for name, body in (("no body", b""), ("no JSON", b"{"), ("no UTF-8", b'{"query": "\xff"}'))
    }
    return found | {"another path": (b"{}", "/reranks", "POST"), "another method": (b"", "/rerank", "GET")}


def test_errors_are_infinitys_own(results: common.Results, stock: Server, ours: Server) -> None:
    statuses = {}
    for name, request in mistakes().items():
        theirs, answer = stock.ask(*request), ours.ask(*request)
        assert theirs.status >= 400, f"{name}: stock takes it, so it is no mistake"
        assert answer == theirs, name
        statuses[name] = answer.status
    results.note("server", "errors", statuses)


def test_strange_texts_have_one_score_too(ours: Server) -> None:
    """Empty, blank, longer than the model: alone and beside others."""
    texts = ["", "  ", "word " * 5000, "\u00e9\u4e2d\U0001f600", "x"]
    for query in ("", "which exception is raised?", "long " * 3000):
        together = Asked(query, tuple(texts), tuple(range(len(texts))), True)
        alone = [Asked(query, (text,), (i,), True) for i, text in enumerate(texts)]
        scores = scores_of(clients(ours, "xlmr", [together, *alone], 3))
        assert {len(found) for found in scores.values()} == {1}


def test_sigterm_loses_no_request(results: common.Results) -> None:
    """Every list of 20 five times, all at once, and the signal at the first answer: what the server has, it answers."""
    work = [asked for n in range(5) for asked in one_round(2 * n) if len(asked.pairs) > 1]
    ends: dict[str, dict[str, int]] = {}
    for name, patched in (("stock", False), ("ours", True)):
        with serving(patched, {"minilm": models()["minilm"]}) as server:
            answers, still_open, code = terminated_under_load(server, "minilm", work)
            with pytest.raises(OSError):
                server.ask(b"", "/health", "GET")
        good = [(asked, answer) for asked, answer in zip(work, answers, strict=True) if isinstance(answer, Answer)]
        lost = len(work) - sum(answer.status == 200 for _, answer in good)
        ends[name] = {"requests": len(work), "open at the signal": still_open, "lost": lost, "exit code": code}
        results.note("sigterm", name, ends[name])
        assert still_open >= len(work) // 2, f"{name}: {ends[name]}: the signal came too late to show much"
        assert lost == 0, (
            f"{name}: {ends[name]}, e.g. {next(a for a in answers if not isinstance(a, Answer) or a.status != 200)}"
        )
    assert ends["ours"]["exit code"] == ends["stock"]["exit code"]
    assert {len(found) for found in scores_of(good).values()} == {1}


def test_what_cannot_be_patched_is_not_served(tmp_path: Path) -> None:
    """A server that starts with a stock model would break the promise without a word."""
    from transformers import AutoTokenizer, MPNetConfig, MPNetForSequenceClassification

    config = MPNetConfig(vocab_size=8000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config.num_labels = 1
    MPNetForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(str(common.data() / "xlmr")).save_pretrained(tmp_path)
    arguments = ["--model-id", str(tmp_path), "--device", "cpu", "--no-bettertransformer", "--no-model-warmup", "--port", "0"]
    done = subprocess.run(command(True, *arguments), capture_output=True, text=True, timeout=START)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "MPNet" in done.stdout + done.stderr
