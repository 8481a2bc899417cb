"""Graphs: a replay has the bits of a call without one, at every bucket's edge; and what cannot be captured says why.

No GPU is needed: recorder.py takes the place of CUDA's capture, on the cpu backend. tests/backend/test_gpu.py has the real one.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import conftest
import lora
import recorder
import rerank_kernels as rk
from invariants import same
from models import CORPUS, FAMILIES, VOCABULARY, decoder, padded, rows, save_cross_encoder, tiny, tokenizer
from recorder import Recorder, recording
from rerank_kernels.graphs import buckets, captured
from rerank_kernels.graphs import device as graphs_device
from rerank_kernels.graphs.buckets import SEQUENCES, TOKENS
from rerank_kernels.models.heads import asking
from rerank_kernels.models.registry import packed_answers, packed_embeddings, packed_logits
from rerank_kernels.models.replay import said
from rerank_kernels.ops.sequences import Sequences
from rerank_kernels.verify import verify
from rerank_kernels.verify.controls import one_ulp_off
from simulated import served

SMALL = (8, 16, 24, 48)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    """A CPU that has graphs, of a few small buckets."""
    monkeypatch.setattr(buckets, "TOKENS", SMALL)
    monkeypatch.setattr(captured, "TOKENS", SMALL)
    monkeypatch.setattr(buckets, "KEYS", (*SMALL, 128))
    monkeypatch.setattr(captured, "SHARED_FROM", 256)
    with recording(monkeypatch) as made:
        yield made


def patched(model: Any, **options: Any) -> Any:
    rk.patch(model, **options)
    return model


def pair(family: str = "bert", **options: Any) -> tuple[Any, Any]:
    """One that captures, and one that does not."""
    return both(tiny(family, **options))


def both(model: Any) -> tuple[Any, Any]:
    other = copy.deepcopy(model)
    return patched(model), patched(other, graphs=False)


def graphs_of(model: Any) -> Any:
    return model.forward.graphs


def replayed(model: Any, *calls: Any) -> list[Any]:
    """What calls give, all of them replayed: the first call of a model captures nothing."""
    run = calls[0]
    run(model)
    before = graphs_of(model).replays
    found = [call(model) for call in calls]
    assert graphs_of(model).replays == before + len(calls), said(model.forward)
    return found


def call(lengths: tuple[int, ...], seed: int = 0, **how: Any) -> Any:
    return lambda model: model(**padded(rows(lengths, seed), model.config.pad_token_id, **how)).logits


EDGES = [(n,) for edge in SMALL for n in (edge - 1, edge, edge + 1) if n <= SMALL[-1]]
MIXED = [(3, 1, 9), (1,) * 8, (1,) * 9, (5, 0, 7), (0, 4), (4, 0), (20, 2, 2), (1,) * 33, (40, 8)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_of_a_call_without_a_graph(device: type[Recorder], family: str) -> None:
    """Every bucket's edge and its neighbours, each after a larger one that left other numbers in all that is shared."""
    with_graphs, without = pair(family)
    lengths = [*EDGES, *MIXED]
    large = call((13,) * 3, seed=99)
    found = replayed(with_graphs, *(c for i, n in enumerate(lengths) for c in (large, call(n, i))))
    for i, (n, got) in enumerate(zip(lengths, found[1::2], strict=True)):
        same(got, call(n, i)(without), f"logits of lengths {n}")
    (made,) = device.made
    assert made.captures[0] == SMALL[-1], "the largest first: its memory serves all others"
    assert len(graphs_of(with_graphs)) == len(made.captures) <= len(SMALL) * len(SEQUENCES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"left": True}, {"to": 30}])
def test_hidden_states_come_back_to_their_places(device: type[Recorder], how: dict[str, Any], dtype: torch.dtype) -> None:
    with_graphs, without = pair("xlm-roberta", head=False, dtype=dtype)
    outputs = [lambda m, n=n: m(**padded(rows(n), 1, **how)) for n in ((11, 3), (24,), (7, 7))]
    for got, run in zip(replayed(with_graphs, *outputs), outputs, strict=True):
        want = run(without)
        same(got.last_hidden_state, want.last_hidden_state, "hidden states")
        same(got.pooler_output, want.pooler_output, "pooler")


def test_hidden_states_and_positions_of_modernbert(device: type[Recorder]) -> None:
    """Positions that are given make angles, for which a graph has no table: that call runs without one."""
    with_graphs, without = pair("modernbert", head=False)
    outputs = [lambda m, n=n: m(**padded(rows(n), 1)).last_hidden_state for n in ((11, 3), (24,), (7, 7))]
    for got, run in zip(replayed(with_graphs, *outputs), outputs, strict=True):
        same(got, run(without), "hidden states")
    batch, places = padded(rows((9, 4)), 1), torch.arange(30, 39).expand(1, 9)
    got = with_graphs(**batch, position_ids=places).last_hidden_state
    same(got, without(**batch, position_ids=places).last_hidden_state, "given positions")
    assert "1 without: position_ids" in said(with_graphs.forward)


def test_token_types_and_positions(device: type[Recorder]) -> None:
    with_graphs, without = pair()
    batch = padded(rows((9, 4)), 0)
    types = torch.arange(18).view(2, 9) % 2
    places = torch.arange(30, 39).expand(1, 9)
    calls = [
        lambda m: m(**batch, token_type_ids=types).logits,
        lambda m: m(**batch, position_ids=places).logits,
        lambda m: m(**batch, token_type_ids=types, position_ids=places).logits,
        lambda m: m(**batch).logits,
        lambda m: m(batch["input_ids"].int(), batch["attention_mask"].bool()).logits,
        lambda m: m(batch["input_ids"]).logits,
        lambda m: m(**batch, return_dict=False)[0],
    ]
    for got, run in zip(replayed(with_graphs, *calls), calls, strict=True):
        same(got, run(without), "logits")


def packed(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat([*rows(lengths, seed), torch.zeros(0, dtype=torch.int64)]), cu


def test_packed_entries(device: type[Recorder]) -> None:
    with_graphs, without = pair("roberta")
    numbers = packed((5, 8, 3))
    for got, want in zip(
        replayed(with_graphs, lambda m: packed_logits(m, *numbers))[0], packed_logits(without, *numbers), strict=True
    ):
        same(got, want, "logit, score, complement")
    batch = padded(rows((5, 8, 3)), with_graphs.config.pad_token_id)
    (got,) = replayed(with_graphs, lambda m: m(**batch).logits)  # of the same size, and not the same graph
    same(got, without(**batch).logits, "logits of a call")
    same(replayed(with_graphs, lambda m: packed_logits(m, *numbers))[0].score, packed_logits(without, *numbers).score, "score")
    with_graphs, without = pair("bert", head=False)
    for pooling in ("cls", "mean", "max", "lasttoken", "weightedmean"):
        run = lambda m, p=pooling: packed_embeddings(m, *numbers, numbers[0] % 2, pooling=p)  # noqa: E731
        same(replayed(with_graphs, run)[0], run(without), pooling)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "phi3", "gemma2", "gemma3"])
def test_decoders(device: type[Recorder], kind: str) -> None:
    """Without a cache, as an LLM reranker asks them."""
    with_graphs, without = both(decoder(kind))
    for lengths in ((8,), (9, 1, 30), (16,), (5, 0, 3)):
        for words in ((7, 11), (7, None)):
            run = lambda m, n=lengths, w=words: packed_answers(m, *packed(n), *w)  # noqa: E731
            same(replayed(with_graphs, run)[0].logit, run(without).logit, f"{kind}, {lengths}")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_sequences_that_continue_others(device: type[Recorder], kind: str) -> None:
    """As the prompts of an LLM reranker do, whose first tokens are computed once."""
    with_graphs, without = both(decoder(kind))
    cases = [
        ((8, 3, 5), (None, 0, 0)),
        ((20, 1, 9, 4), (None, 0, 0, None)),
        ((3, 4, 2, 6, 1), (None, 0, 1, 1, 0)),
        ((24, 12, 12), (None, 0, 0)),
        ((20, 10, 10, 8), (None, 0, 0, 0)),
    ]
    for lengths, before in cases:
        run = lambda m, n=lengths, b=before: packed_answers(m, *packed(n), 7, 11, b)  # noqa: E731
        same(replayed(with_graphs, run)[0].logit, run(without).logit, f"{kind}, {lengths}, {before}")
    long = lambda m: packed_answers(m, *packed((40, *[2] * 4)), 7, 11, (None, 0, 0, 0, 0))  # noqa: E731
    same(long(with_graphs).logit, long(without).logit, "more keys than the largest bucket")
    assert f"1 without: {captured.BEYOND}" in said(with_graphs.forward)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_decoder_that_is_asked_for_two_words(device: type[Recorder], kind: str) -> None:
    """As the patched FlagLLMReranker asks; with a cache, or for all words, there is no graph."""
    with_graphs, without = both(decoder(kind))

    def asks(no: int | None, **more: Any) -> Any:
        def run(model: Any) -> torch.Tensor:
            with asking(7, no) as question:
                found = model(**padded(rows((9, 1, 30)), 0, left=True), **more).logits
            assert question.answered
            return found

        return run

    for no in (11, None):
        same(replayed(with_graphs, asks(no, use_cache=False))[0], asks(no, use_cache=False)(without), f"{kind}, 7 and {no}")
    same(asks(11)(with_graphs), asks(11)(without), "with a cache")
    assert said(with_graphs.forward).endswith(f"; 1 without: a cache; 1 without: {captured.FIRST}")
    batch = padded(rows((9, 4)), 0)
    same(with_graphs(**batch, use_cache=False).logits, without(**batch, use_cache=False).logits, "all words")
    assert "; 1 without: all words of a decoder, or its states" in said(with_graphs.forward)
    bare, _ = both(decoder(kind, cls="Model"))
    bare(**batch)
    assert said(bare.forward) == "0 captured, 0 replayed; 1 without: all words of a decoder, or its states"


def test_a_classifier_of_a_decoder(device: type[Recorder]) -> None:
    with_graphs, without = both(decoder("qwen3", cls="ForSequenceClassification", num_labels=1))
    run = lambda m: packed_logits(m, *packed((9, 1, 30)))  # noqa: E731
    same(replayed(with_graphs, run)[0].logit, run(without).logit, "logit")
    for how in ({}, {"left": True}, {"to": 40}):
        (got,) = replayed(with_graphs, call((9, 1, 30), 5, **how))
        same(got, call((9, 1, 30), 5)(without), f"logits of a call, {how}")
    ids = torch.full((1, 9), VOCABULARY)
    for model in (with_graphs, without):
        with pytest.raises(ValueError, match=rf"input_ids must be in \[0, {VOCABULARY - 1}\]"):
            model(ids)
    batch = padded(rows((9,)), 0)
    asked = {"inputs_embeds": with_graphs.model.embed_tokens(batch["input_ids"]).detach(), "input_ids": None}
    same(with_graphs(**(batch | asked)).logits, without(**batch).logits, "logits of embeddings")
    assert "1 without: arguments besides input_ids and attention_mask" in said(with_graphs.forward)


LOOKS: list[Any] = [
    lambda x: x.sum().item(),
    lambda x: x.tolist(),
    lambda x: float(x[0]),
    lambda x: bool((x > 0).any()),
    lambda x: x.cpu(),
    lambda x: x.to("meta"),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: x.unique(),
    lambda x: x[[0, 1]],
    lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    lambda x: torch.repeat_interleave(x, x.long()),
    lambda x: torch.equal(x, x),
]


@pytest.mark.parametrize("look", LOOKS)
def test_the_recorder_refuses_what_cuda_would(look: Any) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(recorder.Refused), recorder.Looking(), recorder.Recording():
        look(x)
    with recorder.Looking(), recorder.Recording() as written:
        torch.relu(x[:2] + torch.zeros(2)).masked_fill(x[:2] > 1, 0.0)
    assert len(written.steps) > 4


# ---- what is replayed is the model as it is ----------------------------------------------------------------------------------


def renew(model: Any) -> None:
    model.bert.encoder.layer[1].output.dense.weight = nn.Parameter(torch.randn(64, 96) * 0.1)


def write(model: Any) -> None:
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1.5)


def write_unseen(model: Any) -> None:
    model.classifier.bias.data += 1.0


def elsewhere(model: Any) -> None:
    p = model.bert.embeddings.LayerNorm.weight
    p.data = p.data * 1.25


def another_act(model: Any) -> None:
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def another_eps(model: Any) -> None:
    model.bert.encoder.layer[1].output.LayerNorm.eps = 0.5


def turned(model: Any) -> None:
    p = model.bert.encoder.layer[0].attention.self.value.weight  # square: the same memory, dtype and shape
    p.data = p.data.t()


CHANGES = [renew, write, write_unseen, elsewhere, another_act, another_eps, turned, lambda m: m.half(), lambda m: m.bfloat16()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_between_calls_counts_from_the_next(device: type[Recorder], change: Any) -> None:
    with_graphs, without = pair()
    run = call((9, 4))
    before = replayed(with_graphs, run, run)[1]
    torch.manual_seed(3)
    change(with_graphs)
    torch.manual_seed(3)
    change(without)
    want = run(without)
    assert not torch.equal(want, before)
    for _ in range(3):
        same(run(with_graphs), want, "logits after the change")


def test_a_kernel_that_goes_wrong_shows(device: type[Recorder]) -> None:
    """The controls of `verify` make kernels wrong, and what was captured before would hide it."""
    with_graphs, without = pair()
    run = call((9, 4))
    (right,) = replayed(with_graphs, run)
    for _ in range(2):
        with one_ulp_off("linear"):
            want = run(without)
            assert not torch.equal(want, right)
            for _ in range(3):
                same(run(with_graphs), want, "logits of wrong kernels")
        for _ in range(3):
            same(run(with_graphs), right, "logits of right kernels")


def test_copies_have_graphs_of_their_own(device: type[Recorder]) -> None:
    model = patched(tiny("bert"))
    run = call((9, 4))
    (want,) = replayed(model, run)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        write(other)
        assert len(graphs_of(other)) == 0
        assert not torch.equal(replayed(other, run)[0], want)
    same(run(model), want, "logits of the first")
    assert len(device.made) == 3
    kept = patched(tiny("bert"), graphs=False)
    assert not copy.deepcopy(kept).forward.wants_graphs


def test_results_outlive_the_next_call(device: type[Recorder]) -> None:
    with_graphs, without = pair(head=False)
    runs = [lambda m, s=s: m(**padded(rows((24,), s), 0)) for s in range(4)]
    for got, run in zip(replayed(with_graphs, *runs), runs, strict=True):
        same(got.last_hidden_state, run(without).last_hidden_state, "an earlier result")
        same(got.pooler_output, run(without).pooler_output, "an earlier result")


def test_large_outputs_lie_in_one_place(device: type[Recorder]) -> None:
    """Or each size would keep hidden states of its own."""
    model = patched(tiny("bert", head=False))
    replayed(model, *(lambda m, n=n: m(**padded(rows((n,)), 0)) for n in (5, 13, 24, 48)))
    graphs = graphs_of(model)
    (large,) = {g.outputs[0].untyped_storage().data_ptr() for g in graphs._captured.values()}
    assert large and len(graphs) == 5


def test_two_threads(device: type[Recorder]) -> None:
    device.slow = True
    with_graphs, without = pair()
    runs = [call((n % 13 + 1, n % 7 + 1), n) for n in range(40)]
    want = [run(without) for run in runs]
    call((1,))(with_graphs)
    with ThreadPoolExecutor(2) as pool:
        for got, right in zip(pool.map(lambda run: run(with_graphs), runs), want, strict=True):
            same(got, right, "logits in two threads")
    assert graphs_of(with_graphs).replays == 40


def test_in_and_out_of_inference_mode(device: type[Recorder]) -> None:
    """What is captured in one of them is replayed in the other."""
    with_graphs, without = pair()
    want = call((9, 4))(without)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            same(replayed(with_graphs, call((9, 4)))[0], want, f"inference_mode({inference})")


def test_a_default_device(device: type[Recorder]) -> None:
    """torch.set_default_device("cuda"), as many programs call it: the numbers of a call are on the host all the same."""
    (with_graphs, without), (first, _) = both(decoder("llama")), pair()
    plain, shared, pairs = packed((9, 1, 30)), packed((20, 4, 9)), padded(rows((9, 4)), 0)
    for run in (
        lambda m: packed_answers(m, *plain, 7, 11).logit,
        lambda m: packed_answers(m, *shared, 7, 11, (None, 0, 0)).logit,
    ):
        want = run(without)
        with torch.device("meta"):
            (got,) = replayed(with_graphs, run)
        same(got, want, "answers")
    want = first(**pairs).logits
    with torch.device("meta"):
        (got,) = replayed(first, lambda m: m(**pairs).logits)
    same(got, want, "logits")


def test_no_graph_is_left_where_none_can_serve(device: type[Recorder]) -> None:
    """Their memory is given back by unpatch, and at the first call on a device that has no graphs."""
    model, run = patched(tiny("bert")), call((9, 4))
    graphs = graphs_of(model)
    replayed(model, run)
    assert len(graphs)
    here = graphs_device.DEVICES.pop("cpu")
    try:
        run(model)
        assert len(graphs) == 0
    finally:
        graphs_device.DEVICES["cpu"] = here
    replayed(model, run)
    assert len(graphs)
    rk.unpatch(model)
    assert len(graphs) == 0


def test_graphs_go_with_their_model(device: type[Recorder]) -> None:
    model = patched(tiny("bert"))
    replayed(model, call((9, 4)))
    graphs = weakref.ref(graphs_of(model))
    del model
    gc.collect()
    assert graphs() is None


# ---- errors are those of a call without a graph ------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("an id beyond the vocabulary", {"input_ids": torch.full((1, 9), 160)}),
    ("an id below 0", {"input_ids": torch.full((1, 9), -1)}),
    ("ids that are floats", {"input_ids": torch.ones(1, 9)}),
    ("an additive mask", {"attention_mask": torch.tensor([[0.0] * 8 + [-10000.0]])}),
    ("a mask of another shape", {"attention_mask": torch.ones(1, 8)}),
    ("a token type beyond the table", {"token_type_ids": torch.full((1, 9), 2)}),
    ("a position beyond the table", {"position_ids": torch.full((1, 9), 140)}),
    ("a position below 0", {"position_ids": torch.full((1, 9), -1)}),
    ("a sequence that is too long", {"input_ids": torch.ones(1, 141, dtype=torch.int64), "attention_mask": None}),
    ("ids of 16 bits", {"input_ids": torch.ones(1, 9, dtype=torch.int16)}),
    ("token types of 8 bits", {"token_type_ids": torch.ones(1, 9, dtype=torch.uint8)}),
    ("positions of 16 bits", {"position_ids": torch.ones(1, 9, dtype=torch.int16)}),
    ("positions that are bools", {"position_ids": torch.ones(1, 9, dtype=torch.bool)}),
    ("labels", {"labels": torch.ones(1)}),
]


@pytest.mark.parametrize(("what", "wrong"), WRONG, ids=[what for what, _ in WRONG])
def test_errors_are_the_same(device: type[Recorder], what: str, wrong: dict[str, Any]) -> None:
    with_graphs, without = pair()
    batch = padded(rows((9,)), 0)
    replayed(with_graphs, lambda m: m(**batch).logits)
    said = []
    for model in (with_graphs, without):
        with pytest.raises((ValueError, TypeError)) as error:
            model(**(batch | wrong))
        said.append(str(error.value))
    assert said[0] == said[1] and next(iter(wrong)) in said[0]
    same(call((9,))(with_graphs), call((9,))(without), "logits after the error")


# ---- what runs without a graph, and why --------------------------------------------------------------------------------------


def why(model: Any, *calls: Any) -> str:
    for run in calls:
        run(model)
    return said(model.forward)


def test_the_first_call_captures_nothing(device: type[Recorder]) -> None:
    assert why(patched(tiny("bert")), call((9,))) == f"0 captured, 0 replayed; 1 without: {captured.FIRST}"


def test_no_gpu_and_no_graphs() -> None:
    report = rk.patch(model := tiny("bert"))
    call((9,))(model)
    assert report.graphs() == {"": "none, no GPU", "bert": "none, no GPU"}
    assert "graphs: none, no GPU" in str(report).splitlines()
    assert rk.patch(tiny("bert"), graphs=False).graphs()[""] == "off"
    with pytest.raises(rk.PatchError, match=r"graphs=True, and graphs=False was asked for; call rk.unpatch\(model\) first"):
        rk.patch(model, graphs=False)
    rk.unpatch(model)
    rk.patch(model, graphs=False)
    with pytest.raises(ValueError, match="graphs"):
        rk.patch(tiny("bert"), graphs="no")  # type: ignore[arg-type]


def test_off_is_off(device: type[Recorder]) -> None:
    model = patched(tiny("bert"), graphs=False)
    assert why(model, call((9,)), call((9,))) == "off" and device.made == []


def test_beyond_the_largest_bucket(device: type[Recorder]) -> None:
    with_graphs, without = pair()
    replayed(with_graphs, call((9,)))
    for lengths in ((49,), (30, 30), (1,) * 40 + (0,) * 100):
        same(call(lengths)(with_graphs), call(lengths)(without), "logits beyond")
    assert said(with_graphs.forward).endswith(f"; 3 without: {captured.BEYOND}; 1 without: {captured.FIRST}")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"output_hidden_states": True}, "hidden states were asked for"),
        ({"input_ids": None, "inputs_embeds": torch.ones(1, 9, 64)}, "inputs_embeds"),
    ],
)
def test_what_is_not_captured(device: type[Recorder], asked: dict[str, Any], reason: str) -> None:
    with_graphs, without = pair()
    batch = padded(rows((9,)), 0)
    replayed(with_graphs, lambda m: m(**batch).logits)
    same(with_graphs(**(batch | asked)).logits, without(**(batch | asked)).logits, reason)
    assert f"1 without: {reason}" in said(with_graphs.forward)


def test_adapters(device: type[Recorder]) -> None:
    model = patched(lora.adapted(tiny("bert"))).base_model.model
    told = "0 captured, 0 replayed; 2 without: adapters, whose choice is read at each call"
    assert why(model, call((9,)), call((9,))) == told


def test_a_sparse_decoder(device: type[Recorder]) -> None:
    model = patched(decoder("llama", hidden_act="relu"))
    run = lambda m: packed_answers(m, *packed((9,)), 7, 11)  # noqa: E731
    assert why(model, run, run) == "0 captured, 0 replayed; 2 without: sparse feed-forward layers"


def test_another_backend(device: type[Recorder]) -> None:
    model = patched(tiny("bert"), backend="pytorch")
    assert why(model, call((9,)), call((9,))) == "0 captured, 0 replayed; 2 without: backend pytorch"


def test_out_of_memory_in_a_capture(device: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory", 16)
    with_graphs, without = pair()
    for lengths in ((9,), (9,), (30,), (17,), (15,), (30,)):
        same(call(lengths)(with_graphs), call(lengths)(without), "logits")
    told = said(with_graphs.forward)
    assert told.startswith("1 captured, 2 replayed") and "no memory to capture 24 tokens" in told, told


@pytest.mark.parametrize("error", [ValueError("too many rows"), TypeError(), rk.PatchError("no")], ids=repr)
def test_an_error_that_only_a_capture_has(device: type[Recorder], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Dead rows are the graph's own: a call that is right without them gets its answer."""
    from rerank_kernels.models import bert

    attention = bert.attention

    def small(q: Any, *args: Any, **kwargs: Any) -> Any:
        if q.shape[0] in SMALL:
            raise error
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(bert, "attention", small)
    with_graphs, without = pair()
    for _ in range(3):
        same(call((9,))(with_graphs), call((9,))(without), "logits")
    assert f"2 without: capture was refused: {str(error) or 'TypeError'}" in said(with_graphs.forward)


def test_an_op_that_cannot_be_captured(device: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, and not at each call."""
    from rerank_kernels.models import bert

    attention = bert.attention

    def looking(q: Any, *args: Any, **kwargs: Any) -> Any:
        float(q[0, 0, 0])
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(bert, "attention", looking)
    with_graphs, without = pair()
    for _ in range(4):
        same(call((9,))(with_graphs), call((9,))(without), "logits")
    told = said(with_graphs.forward)
    assert "0 captured, 0 replayed; 3 without: capture was refused: operation not permitted when stream is capturing" in told
    assert len(device.made[0].captures) == 1


def test_inside_a_trace(device: type[Recorder]) -> None:
    with_graphs, without = pair()
    batch = padded(rows((9, 4)), 0)
    replayed(with_graphs, lambda m: m(**batch).logits)
    traced = torch.jit.trace(with_graphs, (batch["input_ids"], batch["attention_mask"]), strict=False)
    replays = graphs_of(with_graphs).replays
    same(traced(batch["input_ids"], batch["attention_mask"])["logits"], without(**batch).logits, "logits of a trace")
    assert graphs_of(with_graphs).replays == replays


def test_inside_torch_compile(device: type[Recorder]) -> None:
    """The compiler works around a patched model, whose graphs are its own."""
    with_graphs, without = pair()
    batch = padded(rows((9, 4)), 0)
    compiled = torch.compile(with_graphs, backend="eager")
    with torch.inference_mode():
        for _ in range(3):
            same(compiled(**batch).logits, without(**batch).logits, "logits under torch.compile")
    assert graphs_of(with_graphs).replays == 2


def test_around_another_capture(device: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    with_graphs, without = pair()
    replayed(with_graphs, call((9,)))
    monkeypatch.setattr("rerank_kernels.graphs.device.capturing", lambda: True)
    same(call((9,))(with_graphs), call((9,))(without), "logits")
    assert "1 without: a graph of somebody else" in said(with_graphs.forward)


# ---- CUDA's and Triton's own kernels, in the simulator -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["portable", "tensor"])
@pytest.mark.parametrize("served_by", ["cuda", pytest.param("triton", marks=pytest.mark.exhaustive)])
def test_kernels_leave_dead_rows_alone(served_by: str, mode: str) -> None:
    """Rows behind the last sequence, which hold NaN, and sequences without tokens, reach nothing."""
    conftest.ran(served_by)
    draw, dtype = torch.Generator().manual_seed(0), torch.float16
    q, k, v = (torch.randn(24, 2, 32, generator=draw).to(dtype) for _ in range(3))
    for t in (q, k, v):
        t[9:] = float("nan")
    live, padded = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 5, 9], [0, 5, *[9] * 9]))
    with served.simulator(served_by)():
        want = rk.attention(q[:9], k[:9], v[:9], cu_seqlens=live, mode=mode)
        got = rk.attention(q, k, v, cu_seqlens=Sequences(padded, 24), mode=mode)
        same(got[:9], want, f"attention, {served_by}, mode {mode}")
        if mode == "portable":
            for pooling in ("cls", "mean"):
                want = rk.pool(q[:9].flatten(1), pooling, cu_seqlens=live)
                got = rk.pool(q.flatten(1), pooling, cu_seqlens=Sequences(padded, 24))
                same(got[:2], want, f"{pooling}, {served_by}")
                assert not got[2:].any(), "sequences without tokens give 0"


def test_a_model_on_simulated_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through CUDA's launchers, whose tiles go by the rows of the bucket."""
    conftest.ran("cuda")
    monkeypatch.setattr(recorder, "simulated", True)
    monkeypatch.setattr(buckets, "TOKENS", (24,))
    monkeypatch.setattr(buckets, "SEQUENCES", (8,))
    with served.simulator("cuda")(), recording(monkeypatch, ("cuda",)):
        with_graphs, without = pair()
        same(replayed(with_graphs, call((9, 4)))[0], call((9, 4))(without), "logits")


def test_a_reranker(device: type[Recorder], tmp_path: Any) -> None:
    save_cross_encoder(tmp_path)
    query, documents = CORPUS[0], list(CORPUS[1:5])
    with_graphs, without = rk.Reranker(tmp_path), rk.Reranker(tmp_path, graphs=False)
    scores = [r.score([(query, d[:20]) for d in documents], batch_tokens=24) for r in (with_graphs, without)]
    same(torch.from_numpy(scores[0].logit), torch.from_numpy(scores[1].logit), "scores")
    assert graphs_of(with_graphs.model).replays and without.report.graphs()[""] == "off"
    assert not rk.Reranker(without.model, without.tokenizer).model.forward.wants_graphs
    assert not rk.Reranker(tmp_path, graphs=0).model.forward.wants_graphs  # type: ignore[arg-type]


def test_the_numbers_of_a_call_leave_none_of_another(device: type[Recorder]) -> None:
    ids, sequences = torch.arange(1, 10), Sequences.from_cu_seqlens(torch.tensor([0, 4, 9]), 9)
    whole = Sequences.from_cu_seqlens(torch.tensor([0, 4, 13]), 13)
    reads = buckets.Reads(torch.arange(13), whole)
    tokens = buckets.Tokens(ids, None, ids + 20, sequences, reads)
    size = buckets.bucket(tokens)
    assert size == (16, 8, 16)
    array = np.full(size.numbers, 99)
    buckets.write(array, size, tokens)
    given = buckets.Inputs.of(torch.from_numpy(array), size)
    assert given.ids.tolist() == [*range(1, 10), *[0] * 7]
    assert given.positions.tolist() == [*range(21, 30), *[0] * 7]
    assert given.types.tolist() == given.places.tolist() == [0] * 16
    assert given.sequences.cu_seqlens.tolist() == [0, 4, *[9] * 7] and given.sequences.total == 16
    assert given.reads is not None and given.reads.rows.tolist() == [*range(13), 0, 0, 0]
    assert given.reads.whole.cu_seqlens.tolist() == [0, 4, *[13] * 7] and given.reads.whole.total == 16
    assert 99 not in array


def test_verify_passes_and_its_controls_are_caught(device: type[Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (buckets, captured):
        monkeypatch.setattr(module, "TOKENS", (64, 256, 1024))
    own = tokenizer("bert")
    model = patched(tiny("bert", vocab_size=len(own), pad_token_id=own.pad_token_id))
    pairs = [(q, d) for q in (CORPUS[0], CORPUS[8]) for d in (*CORPUS[:6], "?", "x")]
    report = verify(model, own, pairs, limit=16)
    assert report.ok and all(c.caught for c in report.controls)
    assert graphs_of(model).replays > 100


def test_buckets() -> None:
    assert tuple(sorted(TOKENS)) == TOKENS and tuple(sorted(SEQUENCES)) == SEQUENCES
    assert all(n % 64 == 0 for n in TOKENS)
