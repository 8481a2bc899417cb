"""Decoders whose feed-forward layers are sparse: right, the same bits as dense, counted, and with a predictor."""

from __future__ import annotations

import copy
import hashlib
import pickle
import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import mutants
import rerank_kernels as rk
from conftest import ran
from invariants import same, with_threads
from models import decoder, padded, rows
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import TENSOR
from rerank_kernels.backend.pytorch import linear as honest_linear
from rerank_kernels.backend.weights import FfnWeights
from rerank_kernels.models import decoder as module
from rerank_kernels.models import sparse
from rerank_kernels.models.bound import Forward

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (30, 3, 17, 1)
NEURONS = 96

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")
T = 0.25
# what stands in an mlp as act_fn -> the op's own words for it
ACTS = {
    "relu": (nn.ReLU(), {}),
    "relu2": (decoder("llama", hidden_act="relu2").model.layers[0].mlp.act_fn, {"activation": "relu2"}),
    "fatrelu": (nn.Threshold(T, 0.0), {"threshold": T}),
}


@pytest.fixture(autouse=True)
def _cpu():
    ran("cpu")
    with registry.use("cpu"), torch.no_grad():
        yield


def stock(act, dtype=torch.float32, kind="llama", **changes):
    model = decoder(kind, dtype, **changes)
    for layer in model.model.layers:
        layer.mlp.act_fn = copy.deepcopy(ACTS[act][0])
    return model


def patched(act, dtype=torch.float32, predictor=None, **changes):
    model = stock(act, dtype, **changes)
    return model, rk.patch(model, predictor=predictor)


# ---- right -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_no_further_from_float64_than_stock(act, dtype):
    model = stock(act, dtype)
    batch = padded(rows((40, 40)), 0)
    truth, theirs = copy.deepcopy(model).double()(**batch).logits, model(**batch).logits
    rk.patch(model)
    ours = model(**batch).logits
    assert truth.std() > 0.2
    far = [float((y - truth).square().mean().sqrt()) for y in (ours, theirs)]
    assert far[0] < 1.2 * far[1] and far[0] < 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_a_layer_is_the_dense_one_with_one_rounding(act, dtype):
    """float32 up to the residual: few rows and many, bit for bit."""
    model, _ = patched(act, dtype)
    mlp, x = model.model.layers[0].mlp, torch.randn(20, 64).to(dtype)
    gate, up = (rk.linear(x, m.weight, out_dtype=torch.float32) for m in (mlp.gate_proj, mlp.up_proj))
    hidden = torch.where(gate > (T if act == "fatrelu" else 0.0), gate, torch.zeros_like(gate))
    hidden = (hidden * hidden if act == "relu2" else hidden) * up
    dense = rk.linear(hidden, mlp.down_proj.weight, residual=x, out_dtype=dtype)
    for n in (1, 5, 20):
        same(module._feed_forward(mlp, x[:n], x[:n]), dense[:n], f"{n} rows, sparse against dense")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_normed_behind_a_layer_is_float32(dtype):
    """Gemma 2 norms what the layer gives before it is added: there the rounding comes once, after the sum."""
    model, _ = patched("relu", dtype, kind="gemma2")
    mlp, x = model.model.layers[0].mlp, torch.randn(20, 64).to(dtype)
    gate, up = (rk.linear(x, m.weight, out_dtype=torch.float32) for m in (mlp.gate_proj, mlp.up_proj))
    dense = rk.linear(torch.relu(gate) * up, mlp.down_proj.weight)
    assert dense.dtype == torch.float32
    for n in (1, 20):
        same(module._feed_forward(mlp, x[:n], None), dense[:n], f"{n} rows")
    at = sparse.Seat(Forward(mlp, module.decoder_forward, TENSOR), 0)
    with pytest.raises(rk.PatchError, match=r"Gemma2MLP: a sparse layer .* is served in mode 'portable' alone"):
        module._feed_forward(mlp, x, None, at)


def test_it_runs_through_sparse_ffn(monkeypatch):
    """Also in the other model types; a model whose activation is another one does not."""
    seen = []
    honest = sparse.sparse_ffn
    monkeypatch.setattr(sparse, "sparse_ffn", lambda *a, **k: seen.append(k) or honest(*a, **k))
    for act, (_, words) in ACTS.items():
        for kind in ("llama", "qwen3", "gemma", "gemma2", "gemma3"):
            patched(act, kind=kind)[0](rows((5,))[0][None])
            assert len(seen) == 2 and all(k.get(name) == value for k in seen for name, value in words.items())
            seen.clear()
    model = decoder("llama")
    rk.patch(model)
    model(rows((5,))[0][None])
    assert not seen


def test_errors():
    model = stock("fatrelu")
    model.model.layers[1].mlp.act_fn = nn.Threshold(0.1, 0.5)
    with pytest.raises(rk.PatchError, match=r"Threshold \(value is 0.5, and only 0 is served\) at model.layers.1.mlp.act_fn"):
        rk.patch(model)
    model.model.layers[1].mlp.act_fn = nn.Threshold(-0.1, 0.0)
    with pytest.raises(rk.PatchError, match=r"Threshold \(threshold is -0.1, and only >= 0 is served\)"):
        rk.patch(model)
    model.model.layers[1].mlp.act_fn = nn.Threshold(0.1, 0.0)
    rk.patch(model)
    model.model.layers[1].mlp.act_fn.threshold = -1.0
    with pytest.raises(rk.PatchError, match=r"threshold is -1.0, and only >= 0 is served"):
        model(rows((5,))[0][None])
    with pytest.raises(rk.PatchError, match=r"Threshold \(served only inside its whole model\)"):
        rk.patch(nn.Sequential(nn.Linear(3, 3), nn.Threshold(0.1, 0.0)))


# ---- the PowerInfer case ----------------------------------------------------------------------------------------------

PROMPTS = rows((9, 4, 17, 2, 12, 6, 5, 1), seed=3)
TOKENS, RUNS = 2, 20


def answered(model, prompts):
    """The logits of each next word, [prompts, TOKENS, V]: greedy, left-padded, with a cache."""
    batch, cache, steps = padded(prompts, 0, left=True), DynamicCache(), []
    for _ in range(TOKENS):
        steps.append(model(**batch, past_key_values=cache, logits_to_keep=1).logits[:, -1])
        mask = batch["attention_mask"]
        batch = {
            "input_ids": steps[-1].argmax(-1)[:, None],
            "attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
        }
    return torch.stack(steps, 1)


def hashes(model, runs):
    """What 8 prompts are answered with, over runs, threads and batches."""

    def digest(batch):
        whole = torch.cat([answered(model, PROMPTS[i : i + batch]) for i in range(0, len(PROMPTS), batch)])
        return hashlib.sha256(whole.contiguous().numpy().tobytes()).hexdigest()

    return {with_threads(threads, lambda b=batch: digest(b)) for _ in range(runs) for threads in (1, 2) for batch in (1, 8)}


def test_twenty_runs_have_one_hash():
    """PowerInfer's ReluLLaMA answers differently from run to run: its kernel adds active neurons in no fixed order."""
    assert len(hashes(patched("relu", layers=1)[0], RUNS)) == 1


@pytest.mark.parametrize("order", [mutants.sparse_ffn_by_activity, mutants.sparse_ffn_atomics])
def test_another_order_of_neurons_has_several(order, monkeypatch):
    def gated(x, w, how):
        """The mutants take no gate. They get the products that down reads as their x, and an up that copies them."""
        hidden = torch.relu(honest_linear.linear(x, w.gate, None, None, None, torch.float32))
        hidden = hidden * honest_linear.linear(x, w.up, None, None, None, torch.float32)
        # their relu would cut off what is negative: each neuron stands there twice, once for either sign
        both, eye = torch.cat([hidden, -hidden], 1), torch.eye(2 * hidden.shape[1])
        y = order(both, FfnWeights(eye, None, None, None, torch.cat([w.down, -w.down], 1), None), how)
        return (y + how.residual.float()).to(x.dtype)

    model, _ = patched("relu", layers=1)
    honest = registry.select
    monkeypatch.setattr(registry, "select", lambda op, *rest: gated if op == "sparse_ffn" else honest(op, *rest))
    assert len(hashes(model, 1)) > 1


# ---- how many are active -----------------------------------------------------------------------------------------------


def truth_of_shares(model, ids):
    """Stock's own activations, layer by layer."""
    counts = []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda m, x, y: counts.append(float((y != 0).double().mean())))
        for layer in model.model.layers
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("act", ACTS)
def test_the_report_says_how_many_were_active(act):
    model, ids = stock(act), rows((50,))[0][None]
    want = truth_of_shares(model, ids)
    report = rk.patch(model)
    assert report.active() == {} and "active neurons" not in str(report)
    model(input_ids=ids)
    assert list(report.active()) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert list(report.active().values()) == pytest.approx(want, abs=1 / (50 * NEURONS))
    assert f"active neurons: model.layers.0.mlp {report.active()['model.layers.0.mlp']:.1%}, model.layers.1.mlp" in str(report)


def test_few_rows_and_many_are_counted_alike():
    (a, one), (b, many) = patched("relu"), patched("relu")
    ids = rows((50,))[0]
    cache = DynamicCache()
    for token in ids:
        a(input_ids=token[None, None], past_key_values=cache)
    b(input_ids=ids[None])
    assert one.active() == many.active()


def test_padding_is_not_counted_and_copies_begin_anew():
    model, report = patched("relu")
    sequences = rows(LENGTHS)
    for s in sequences:
        model(input_ids=s[None])
    alone = report.active()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = rk.patch(twin)
        assert again.active() == {}
        twin(**padded(sequences, 0, left=True, to=60))
        assert again.active() == alone


def test_threads_lose_no_count():
    model, report = patched("relu")
    ids = rows((5,))[0][None]
    model(input_ids=ids)
    once = report.active()
    activity = model.model.forward.activity
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        for _ in range(25):
            model(input_ids=ids)

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert report.active() == pytest.approx(once)
    assert sum(neurons for (place, _), (_, neurons) in activity._cells.items() if place == "layers.0.mlp") == 201 * 5 * NEURONS


# ---- a predictor ----------------------------------------------------------------------------------------------------------


def halves(layer, x):
    """By rows: those whose first feature is negative keep the even neurons, others all but every third."""
    places = torch.arange(NEURONS)
    return torch.where(x[:, :1] < 0, (places + layer) % 2 == 0, places % 3 != 0)


def test_a_predictor_leaves_neurons_out():
    model, _ = patched("relu", predictor=halves)
    mlp, x = model.model.layers[1].mlp, torch.randn(20, 64)
    gate, up = (rk.linear(x, m.weight, activation=a) for m, a in ((mlp.gate_proj, "relu"), (mlp.up_proj, None)))
    zero = torch.zeros_like(gate)
    dense = rk.linear(torch.where(halves(1, x), gate * up, zero), mlp.down_proj.weight, residual=x)
    at = sparse.seat(model.model, 1)
    for n in (1, 20):
        same(module._feed_forward(mlp, x[:n], x[:n], at), dense[:n], f"{n} rows")
    everyone, _ = patched("relu", predictor=lambda layer, x: torch.ones(len(x), NEURONS, dtype=torch.bool))
    ids = rows((9,))[0][None]
    same(everyone(ids).logits, patched("relu")[0](ids).logits, "all proposed")
    assert not torch.equal(model(ids).logits, everyone(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_predictor_the_promises_hold(dtype):
    model, report = patched("relu", dtype, predictor=halves)
    sequences = rows(LENGTHS)
    want = [model(input_ids=s[None]).logits[0] for s in sequences]
    batch = padded(sequences, 0, left=True)
    for threads in (1, 2):
        got = with_threads(threads, lambda: model(**batch).logits)
        for i, y in enumerate(want):
            same(got[i][batch["attention_mask"][i].bool()], y, f"row {i}, {threads} threads")
    assert 0.1 < report.active()["model.layers.0.mlp"] < 0.4
    assert "note: model: a predictor chooses neurons, which makes it another function" in str(report)


def test_a_predictor_that_looks_at_the_batch_breaks_them():
    """The promise is the predictor's to keep, as the page says."""

    def union(layer, x):
        return (x[:, :1] > 0).any() & torch.ones(len(x), NEURONS, dtype=torch.bool) | halves(layer, x)

    model, _ = patched("relu", predictor=union)
    sequences = rows(LENGTHS)
    want = torch.cat([model(input_ids=s[None]).logits[0] for s in sequences])
    batch = padded(sequences, 0)
    assert not torch.equal(model(**batch).logits[batch["attention_mask"].bool()], want)


def test_errors_of_a_predictor():
    ids = rows((5,))[0][None]
    wrong = {
        r"float32 \[5, 96\]": lambda layer, x: torch.ones(len(x), NEURONS),
        r"bool \[96\]": lambda layer, x: torch.ones(NEURONS, dtype=torch.bool),
        r"NoneType": lambda layer, x: None,
    }
    for came, predictor in wrong.items():
        model, _ = patched("relu", predictor=predictor)
        wanted = r"LlamaMLP, layers.0.mlp: what the predictor returns must be a bool tensor \[rows, neurons\] = \[5, 96\], got "
        with pytest.raises(ValueError, match=f"{wanted}.*{came}; it is called as predictor"):
            model(ids)
    with pytest.raises(TypeError, match="patch: predictor must be a function of layer and rows, got str"):
        patched("relu", predictor="all")
    model = decoder("llama")
    with pytest.raises(rk.PatchError, match="patch: predictor must be left out, for no decoder here has a sparse feed-forward"):
        rk.patch(model, predictor=halves)
    rk.patch(model)
    model, _ = patched("relu", predictor=halves)
    rk.patch(model, predictor=halves)
    for other in (None, wrong[r"NoneType"]):
        with pytest.raises(
            rk.PatchError, match=r"model \(LlamaModel\) is patched already, with another predictor or none; call"
        ):
            rk.patch(model, predictor=other)
    with pytest.raises(rk.PatchError, match=r"LlamaModel.forward: a predictor cannot be traced or exported; patch without one"):
        torch.jit.trace(lambda ids: model.requires_grad_(False)(ids, use_cache=False).logits, ids)
    rk.unpatch(model)
    rk.patch(model)
    same(model(ids).logits, patched("relu")[0](ids).logits, "as the message says")
