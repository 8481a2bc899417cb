"""Whole rerankers with random weights, ours beside stock's ways, engines, and MKL's strict setting; on a CPU or a GPU.

The gate: a pair's logit alone = in the batch = in the reversed, left-padded batch, bit for bit, and close to float64's. Who
runs in a process of its own is held to the same float64 logits (rivals/engines.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import invariants
import rerank_kernels as rk
from bench.cases import shapes
from bench.cases.ops import DTYPES, Build, Place
from bench.harness.turns import Contestant, Work
from bench.rivals import engines

BASE, LARGE, MINILM = "BAAI/bge-reranker-base", "BAAI/bge-reranker-large", "cross-encoder/ms-marco-MiniLM-L6-v2"
SHORT = {BASE: "base", LARGE: "large"}
# Ours may be this far from float64. In fp32, on logits of order 1 after 12 layers, stock itself is off by about 1e-6; in half
# precision it is this much beyond four times stock's own distance, on logits of a few tenths.
LOGIT_SLACK = {"fp32": 2.0e-5, "fp16": 2.0e-3, "bf16": 1.6e-2}
PADDED, SORTED, SINGLE = "stock, padded", "stock, sorted in 8s", "stock, one by one"
EQUAL = "stock, SDPA"  # equal lengths: nothing is padded
ON_GPU = {PADDED: "padded", SORTED: "sorted 8s", SINGLE: "one by one", EQUAL: "eager"}
STOCK_BARS = {EQUAL: 1.2, PADDED: 3.8, SORTED: 1.6, SINGLE: 1.25}
ENGINE_BARS = {"ONNX Runtime": 1.15, "ONNX Runtime, fused": 1.15}  # equal lengths, several pairs


@functools.lru_cache(1)
def stock_model(name: str, layers: int, dtype: str, device: torch.device) -> Any:
    with torch.device(device):
        model = shapes.reranker(shapes.RERANKERS[name], layers=layers)
    return model.to(DTYPES[dtype])


@functools.lru_cache(2)
def patched_model(name: str, layers: int, dtype: str, device: torch.device, mode: str = "portable") -> Any:
    """The stock model's twin: they share every weight tensor."""
    ours = shapes.twin(stock_model(name, layers, dtype, device))
    rk.patch(ours, mode=mode)
    return ours


@functools.lru_cache(64)
def truth(name: str, layers: int, dtype: str, device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """The logit of one unpadded row with everything but the (exact) word embedding in float64, on the CPU."""
    stock = stock_model(name, layers, dtype, device)
    words = stock.base_model.embeddings.word_embeddings(torch.tensor([ids], device=device)).cpu().double()
    wide = shapes.twin(stock)
    wide.base_model.embeddings.word_embeddings = torch.nn.Identity()
    for module in wide.modules():
        for held in (module._parameters, module._buffers):
            for key, t in list(held.items()):
                if t is not None:
                    t = t.detach().cpu()
                    t = t.double() if t.is_floating_point() else t
                    held[key] = torch.nn.Parameter(t, requires_grad=False) if held is module._parameters else t
    return wide(inputs_embeds=words).logits[0]


def forget() -> None:
    for cache in (stock_model, patched_model, truth):
        cache.cache_clear()


def on(place: Place, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(place.device) for n, t in batch.items()}


class Model:
    """One reranker with so many layers, and the pairs of one case."""

    def __init__(self, place: Place, name: str, lengths: Sequence[int], dtype: str, layers: int | None = None) -> None:
        self.place, self.name, self.dtype, self.shape = place, name, dtype, shapes.RERANKERS[name]
        self.layers = layers or self.shape.layers
        self.key = (name, self.layers, dtype, place.device)
        self.rows = shapes.tokens(self.shape, tuple(lengths))
        self.by_length = sorted(range(len(self.rows)), key=lambda i: len(self.rows[i]))
        self.batch = on(place, shapes.padded(self.shape, self.rows))

    def ours(self, mode: str = "portable") -> Any:
        return patched_model(*self.key, mode)

    def near_truth(self, logits: Mapping[int, Tensor], who: str, rows: Sequence[Tensor] | None = None) -> None:
        """`logits`: some pairs', by their place in `rows`, which are the case's own if none are given."""
        for i, logit in logits.items():
            ids = (rows or self.rows)[i]
            right = truth(*self.key, tuple(ids.tolist()))
            allowed = LOGIT_SLACK[self.dtype]
            if self.dtype != "fp32":
                stock = stock_model(*self.key)(input_ids=ids[None].to(self.place.device)).logits[0]
                allowed += 4.0 * float((stock.cpu().double() - right).abs().max())
            error = float((logit.cpu().double() - right).abs().max())
            assert error <= allowed, f"{who}, pair {i}: logit {error:.2g} from float64's, allowed {allowed:.2g}"

    def telling(self) -> list[int]:
        """The pairs whose float64 truth is computed: the shortest and the middle one."""
        return sorted({self.by_length[0], self.by_length[len(self.rows) // 2]})

    def gate(self, model: Callable[[], Any]) -> None:
        ours, rows, by_length = model(), self.rows, self.by_length

        def logits(some: list[int], **how: Any) -> Tensor:
            return ours(**on(self.place, shapes.padded(self.shape, [rows[i] for i in some], **how))).logits

        full = ours(**self.batch).logits
        for i in sorted({by_length[0], by_length[len(rows) // 2], by_length[-1], 0, len(rows) - 1}):
            invariants.same(logits([i])[0], full[i], f"{self.name}, pair {i} alone against in the batch")
        few = [*reversed(by_length[: max(2, len(rows) // 4)])]
        words = f"{self.name}, {len(few)} pairs in another order, padded left, against in the batch"
        invariants.same(logits(few, left=True), full[few], words)
        if self.place.on_gpu:  # one pair for all cases: float64 takes seconds, and minutes are few
            pair = shapes.tokens(self.shape, (64,), seed=1)
            self.near_truth({0: ours(**on(self.place, shapes.padded(self.shape, pair))).logits[0]}, self.name, pair)
        else:
            self.near_truth({i: full[i] for i in self.telling()}, self.name)

    def contest(self, *, bars: bool = False, with_engines: bool = False, compiled: bool = False) -> Work:
        """Mixed lengths: stock padded, sorted and one by one; engines one by one, which is a CPU's best."""
        place, rows, lengths = self.place, self.rows, [len(row) for row in self.rows]
        stock = stock_model(*self.key)
        mixed = len(set(lengths)) > 1

        def ours(way: tuple[str, str]) -> Contestant:
            # patched when its turn comes, so that a mode that cannot be patched costs its own cell only
            call = lambda i: self.ours(way[1])(**self.batch).logits  # noqa: E731
            gate = functools.partial(self.gate, functools.partial(self.ours, way[1]))
            return Contestant(" ".join(way), call, lambda: rk.use(way[0]), gate, ours=True, graph=False)

        def through(of: int) -> Callable[[int], object]:
            made = shapes.batches(self.shape, rows, of) if of < len(rows) else [self.batch]
            made = [on(place, batch) for batch in made]
            return lambda i: [stock(**batch).logits for batch in made]

        def rival(way: str, call: Callable[[int], object]) -> Contestant:
            return Contestant(ON_GPU[way] if place.on_gpu else way, call, graph=False, bar=STOCK_BARS[way] if bars else None)

        ways = {PADDED: len(rows), SORTED: 8, SINGLE: 1} if mixed else {EQUAL: len(rows)}
        rivals = [rival(way, through(of)) for way, of in ways.items() if not compiled or of == len(rows)]
        first = rivals[0].call
        if compiled:
            fast = torch.compile(stock, dynamic=False)
            rivals.append(Contestant("compile", lambda i: fast(**self.batch).logits, graph=False))
        elif place.on_gpu and not mixed:
            rivals.append(Contestant("no mask", lambda i: stock(input_ids=self.batch["input_ids"]).logits, graph=False))
        if not compiled:
            rivals += place.invariant(first, graph=False)
        if with_engines:
            of, check = 1 if mixed else len(rows), tuple(self.telling())
            asked = engines.Question(self.shape, self.layers, tuple(lengths), of=of, check=check)
            for engine in engines.ENGINES:
                right = functools.partial(self.near_truth, who=engine)
                bar = ENGINE_BARS.get(engine) if bars and len(rows) > 1 and not mixed else None
                shown = f"{engine}, one by one" if mixed else engine
                rivals.append(Contestant(shown, away=functools.partial(engines.ready, engine, asked, right), bar=bar))
        s, total = self.shape, sum(lengths)
        per_token = self.layers * (4 * s.hidden**2 + 2 * s.hidden * s.ffn)
        fmas = per_token * total + 2 * self.layers * s.hidden * sum(n * n for n in lengths)
        contestants = [*(ours(way) for way in place.ways(self.dtype)), *rivals]
        return Work(contestants, fmas, per_token * DTYPES[self.dtype].itemsize, about={"group": "model"})


# ---- which of them a run has -----------------------------------------------------------------------------------------------


def on_a_cpu(place: Place, quick: bool) -> Iterator[tuple[str, Build]]:
    """Quick runs cut every model to two layers: every path is walked, but the times are no model's and no bar is for them."""

    def row(name: str, lengths: Sequence[int], bars: bool = False, with_engines: bool = True) -> tuple[str, Build]:
        said = f"{len(lengths)} of 16 to 512" if len(set(lengths)) > 1 else f"{len(lengths)}x{lengths[0]}"
        model = functools.partial(Model, place, name, tuple(lengths), "fp32", 2 if quick else None)
        build = lambda: model().contest(bars=bars and not quick, with_engines=with_engines)  # noqa: E731
        return f"{name.partition('/')[2]}{' cut to 2 layers' if quick else ''}, {said}", build

    for b, t in ((8, 128), (4, 512), (1, 128)):
        yield row(BASE, (t,) * b, bars=True)
    yield row(BASE, shapes.MIXED_LENGTHS, bars=True)
    for b in (8, 1):
        yield row(MINILM, (128,) * b)
    if not quick:
        yield row(LARGE, (128,) * 8, with_engines=False)


def on_a_gpu(batches: Mapping[str, tuple[int, ...]], compiled: bool) -> Iterator[tuple[str, bool, Build]]:
    """torch.compile takes its time, so its cases are asked for apart."""

    def build(name: str, lengths: tuple[int, ...], dtype: str) -> Build:
        return lambda place: Model(place, name, lengths, dtype).contest(compiled=compiled)

    if compiled:
        for words, lengths in batches.items():
            yield f"base {words} fp16, compiled", False, build(BASE, lengths, "fp16")
        return
    mixed = next(iter(batches))
    for name in (BASE, LARGE):
        for dtype in ("fp16", "fp32", "bf16"):
            for words, lengths in {**batches, "1x128": (128,)}.items():
                quick = name == BASE and (dtype == "fp16" or (words == mixed and dtype == "fp32"))
                if name == BASE or dtype != "bf16" or words == mixed:
                    yield f"{SHORT[name]} {words} {dtype}", quick, build(name, lengths, dtype)
