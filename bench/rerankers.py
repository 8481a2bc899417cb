"""The CPU's contests of whole rerankers with random weights: ours beside stock's three ways, engines, and MKL's strict mode.

The gate: a pair's logit alone = in the batch = in the reversed, left-padded batch, bit for bit, and close to float64's. Who
runs in a process of its own is held to the same float64 logits (bench/engines.py).
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import engines
import shapes
from clock import Away, Contest, Rival

import invariants
import rerank_kernels as rk

BASE, LARGE, MINILM = "BAAI/bge-reranker-base", "BAAI/bge-reranker-large", "cross-encoder/ms-marco-MiniLM-L6-v2"
LOGIT_BOUND = 2.0e-5  # on logits of order 1, after 12 layers of float32: stock PyTorch itself is off by about 1e-6
PADDED, SORTED, SINGLE = "stock, padded", "stock, sorted in 8s", "stock, one by one"
EQUAL = "stock, SDPA"  # equal lengths: nothing is padded
STOCK_BARS = {EQUAL: 1.2, PADDED: 3.8, SORTED: 1.6, SINGLE: 1.25}
ENGINE_BARS = {"ONNX Runtime": 1.15, "ONNX Runtime, fused": 1.15}  # equal lengths, several pairs
Build = Callable[[], Contest]


@functools.lru_cache(1)
def models(name: str, layers: int) -> tuple[Any, Any]:
    """The stock model and its patched twin; they share every weight tensor."""
    stock = shapes.reranker(shapes.RERANKERS[name], layers=layers)
    ours = shapes.twin(stock)
    rk.patch(ours)
    return stock, ours


_truths: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}


def model_truth(name: str, layers: int, ids: Tensor) -> Tensor:
    """Logits of one unpadded row with everything but the (exact) word embedding in float64."""
    key = (name, layers, tuple(ids.tolist()))
    if key not in _truths:
        wide = shapes.twin(models(name, layers)[0])
        encoder = wide.base_model
        words = encoder.embeddings.word_embeddings(ids[None]).double()
        others = [m for n, m in encoder.embeddings.named_children() if n != "word_embeddings"]
        for module in (*others, encoder.encoder, wide.classifier, *filter(None, [getattr(encoder, "pooler", None)])):
            for owner in module.modules():
                for key_, p in list(owner._parameters.items()):
                    if p is not None:
                        owner._parameters[key_] = torch.nn.Parameter(p.double(), requires_grad=False)
        _truths[key] = wide(inputs_embeds=words).logits[0]
    return _truths[key]


def forget() -> None:
    models.cache_clear()
    _truths.clear()


def near_truth(name: str, layers: int, rows: Sequence[Tensor], logits: Mapping[int, Tensor], who: str) -> None:
    """`logits`: some pairs', by their place in `rows`."""
    for i, logit in logits.items():
        error = float((logit.double() - model_truth(name, layers, rows[i])).abs().max())
        assert error <= LOGIT_BOUND, f"{who}, pair {i}: logit {error:.2g} from float64's, allowed {LOGIT_BOUND:.2g}"


def telling(rows: Sequence[Tensor]) -> list[int]:
    """The pairs whose float64 truth is computed: the shortest and the middle one."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return sorted({by_length[0], by_length[len(rows) // 2]})


def model_gate(name: str, layers: int, ours: Any, rows: list[Tensor]) -> None:
    shape = shapes.RERANKERS[name]
    full = ours(**shapes.padded(shape, rows)).logits
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in sorted({by_length[0], by_length[len(rows) // 2], by_length[-1], 0, len(rows) - 1}):
        alone = ours(**shapes.padded(shape, [rows[i]])).logits[0]
        invariants.same(alone, full[i], f"{name}, pair {i} alone against in the batch")
    few = [*reversed(by_length[: max(2, len(rows) // 4)])]
    turned = ours(**shapes.padded(shape, [rows[i] for i in few], left=True)).logits
    invariants.same(turned, full[few], f"{name}, {len(few)} pairs in another order, padded left, against in the batch")
    near_truth(name, layers, rows, {i: full[i] for i in telling(rows)}, name)


def model(name: str, lengths: Sequence[int], layers: int, *, bars: bool = True, with_engines: bool = True) -> Contest:
    """The whole reranker. Mixed lengths: stock padded, sorted and one by one; engines one by one, which is a CPU's best."""
    shape = shapes.RERANKERS[name]
    stock, ours = models(name, layers)
    rows = shapes.tokens(shape, tuple(lengths))
    mixed, several = len(set(lengths)) > 1, len(lengths) > 1
    batch = shapes.padded(shape, rows)

    def through(made: list[dict[str, Tensor]]) -> Callable[[], list[Tensor]]:
        return lambda: [stock(**b).logits for b in made]

    ways = {PADDED: len(rows), SORTED: 8, SINGLE: 1} if mixed else {EQUAL: len(rows)}
    rivals: list[Rival | Away] = [
        Rival(way, through([batch] if of == len(rows) else shapes.batches(shape, rows, of)), STOCK_BARS[way] if bars else None)
        for way, of in ways.items()
    ]
    if with_engines:
        check = tuple(telling(rows))
        asked = engines.Question(shape, layers, tuple(lengths), of=1 if mixed else len(rows), check=check)
        for engine in engines.ENGINES:

            def right(logits: Mapping[int, Tensor], engine: str = engine) -> None:
                near_truth(name, layers, rows, logits, engine)

            bar = ENGINE_BARS.get(engine) if bars and several and not mixed else None
            shown = f"{engine}, one by one" if mixed else engine
            rivals.append(Away(shown, functools.partial(engines.ready, engine, asked, right), bar))
    return Contest(lambda: ours(**batch).logits, rivals, lambda: model_gate(name, layers, ours, rows), {"group": "model"})


def listed(quick: bool) -> Iterator[tuple[str, Build]]:
    """Quick runs cut every model to two layers: every path is walked, but the times are no model's and no bar is for them."""
    cut = " cut to 2 layers" if quick else ""

    def row(name: str, lengths: Sequence[int], bars: bool = False, with_engines: bool = True) -> tuple[str, Build]:
        said = f"{len(lengths)} of 16 to 512" if len(set(lengths)) > 1 else f"{len(lengths)}x{lengths[0]}"
        layers = 2 if quick else shapes.RERANKERS[name].layers
        build = functools.partial(model, name, tuple(lengths), layers, bars=bars and not quick, with_engines=with_engines)
        return f"{name.partition('/')[2]}{cut}, {said}", build

    for b, t in ((8, 128), (4, 512), (1, 128)):
        yield row(BASE, (t,) * b, bars=True)
    yield row(BASE, shapes.MIXED_LENGTHS, bars=True)
    for b in (8, 1):
        yield row(MINILM, (128,) * b)
    if not quick:
        yield row(LARGE, (128,) * 8, with_engines=False)
