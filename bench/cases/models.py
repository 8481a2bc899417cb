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
from bench.cases.ops import DTYPES, Build, Place, given, installed
from bench.cases.shapes import BASE, LARGE, MINILM, Shape
from bench.harness.turns import Contestant, Work
from bench.rivals import engines

SHORT = {BASE: "base", LARGE: "large"}
# Ours may be this far from float64. In fp32, on logits of order 1 after 12 layers, stock itself is off by about 1e-6; in half
# precision it is this much beyond four times stock's own distance, on logits of a few tenths.
LOGIT_SLACK = {"fp32": 2.0e-5, "fp16": 2.0e-3, "bf16": 1.6e-2}
PADDED, SORTED, SINGLE = "stock, padded", "stock, sorted in 8s", "stock, one by one"
EQUAL = "stock, SDPA"  # equal lengths: nothing is padded
BARS = {EQUAL: 1.2, PADDED: 3.8, SORTED: 1.6, SINGLE: 1.25}
ENGINE_BARS = {"ONNX Runtime": 1.15, "ONNX Runtime, fused": 1.15}  # equal lengths, several pairs
COMPILED = ("default", "reduce-overhead", "max-autotune")  # torch.compile's modes, the slowest to compile last


@functools.lru_cache(1)
def stock_model(shape: Shape, dtype: str, device: torch.device) -> Any:
    with torch.device(device):
        return shapes.reranker(shape).to(DTYPES[dtype])


@functools.lru_cache(2)
def patched_model(shape: Shape, dtype: str, device: torch.device, mode: str = "portable") -> Any:
    """The stock model's twin: they share every weight tensor."""
    ours = shapes.twin(stock_model(shape, dtype, device))
    rk.patch(ours, mode=mode)
    return ours


@functools.lru_cache(64)
def truth(shape: Shape, dtype: str, device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """The logit of one unpadded row with everything but the (exact) word embedding in float64, on the CPU."""
    wide = shapes.twin(stock_model(shape, dtype, device))
    words = wide.base_model.embeddings.word_embeddings(torch.tensor([ids], device=device)).cpu().double()
    wide.base_model.embeddings.word_embeddings = torch.nn.Identity()  # not a quarter of a million rows in float64
    held = (*wide.named_parameters(), *wide.named_buffers())
    doubles = {n: t.cpu().double() if t.is_floating_point() else t.cpu() for n, t in held}
    return torch.func.functional_call(wide, doubles, (), {"inputs_embeds": words}).logits[0]


class Model:
    """One reranker, and the pairs of one case."""

    def __init__(self, place: Place, shape: Shape, lengths: Sequence[int], dtype: str) -> None:
        self.place, self.shape, self.dtype, self.lengths = place, shape, dtype, lengths
        self.key = (shape, dtype, place.device)
        self.rows = shapes.tokens(shape, lengths)
        self.batch = self.padded(self.rows)

    def ours(self, mode: str = "portable") -> Any:
        return patched_model(*self.key, mode)

    def padded(self, rows: Sequence[Tensor], **how: Any) -> dict[str, Tensor]:
        return self.place.on(shapes.padded(self.shape, rows, **how))

    def near_truth(self, logits: Mapping[int, Tensor], who: str, rows: Sequence[Tensor] | None = None) -> None:
        """`logits`: some pairs', by their place in `rows`, which are the case's own if none are given."""
        for i, logit in logits.items():
            row = (rows or self.rows)[i]
            right = truth(*self.key, tuple(row.tolist()))
            allowed = LOGIT_SLACK[self.dtype]
            if self.dtype != "fp32":
                stock = stock_model(*self.key)(**self.padded([row])).logits[0]
                allowed += 4.0 * float((stock.cpu().double() - right).abs().max())
            error = float((logit.cpu().double() - right).abs().max())
            assert error <= allowed, f"{who}, pair {i}: logit {error:.2g} from float64's, allowed {allowed:.2g}"

    def telling(self) -> list[int]:
        """The pairs whose float64 truth is computed: the shortest and the middle one."""
        order = shapes.by_length(self.rows)
        return sorted({order[-1], order[len(order) // 2]})

    def gate(self, model: Callable[[], Any], who: str) -> None:
        ours, rows, order = model(), self.rows, shapes.by_length(self.rows)
        full = ours(**self.batch).logits
        for i in sorted({*self.telling(), order[0], 0, len(rows) - 1}):
            invariants.same(ours(**self.padded([rows[i]])).logits[0], full[i], f"{who}, pair {i} alone against in the batch")
        few = order[-max(2, len(rows) // 4) :]
        words = f"{who}, {len(few)} pairs in another order, padded left, against in the batch"
        invariants.same(ours(**self.padded([rows[i] for i in few], left=True)).logits, full[few], words)
        if self.place.on_gpu:  # one pair for all cases: float64 takes seconds, and minutes are few
            pair = shapes.tokens(self.shape, (64,), seed=1)
            self.near_truth({0: ours(**self.padded(pair)).logits[0]}, who, pair)
        else:
            self.near_truth({i: full[i] for i in self.telling()}, who)

    def contest(
        self, *, bars: bool = False, with_engines: bool = False, compiled: str | None = None, one_by_one: bool = False
    ) -> Work:
        """Mixed lengths: stock padded, sorted and one by one; engines one by one, which is a CPU's best. one_by_one: also where
        lengths are equal. compiled: only stock as it comes, and in this mode of torch.compile."""
        place, count, mixed = self.place, len(self.rows), len(set(self.lengths)) > 1
        stock = stock_model(*self.key)

        def ours(way: tuple[str, str]) -> Contestant:
            # patched when its turn comes, so that a mode that cannot be patched costs its own cell only
            call = lambda i: self.ours(way[1])(**self.batch).logits  # noqa: E731
            gate = functools.partial(self.gate, functools.partial(self.ours, way[1]), " ".join(way))
            return Contestant(" ".join(way), call, lambda: rk.use(way[0]), gate, ours=True, graph=False)

        def rival(name: str, model: Any = stock, size: int = count, **leave: Any) -> Contestant:
            made = (
                [place.on(b) | leave for b in shapes.batches(self.shape, self.rows, size)]
                if size < count
                else [self.batch | leave]
            )
            return Contestant(
                name, lambda i: [model(**batch).logits for batch in made], graph=False, bar=BARS.get(name) if bars else None
            )

        ways = {PADDED: count, SORTED: 8, SINGLE: 1} if mixed else {EQUAL: count, **({SINGLE: 1} if one_by_one else {})}
        fewer = range(0) if compiled else range(1, count)
        rivals = [rival(way, size=size) for i, (way, size) in enumerate(ways.items()) if i == 0 or size in fewer]
        if compiled:
            torch.compiler.reset()  # else it gives up behind eight shapes, and runs eager
            # the shapes of a case never change, so this is what suits it best
            fast = torch.compile(stock, dynamic=False, mode=compiled)
            rivals.append(rival(f"stock, compile, {compiled}", fast))
        elif place.on_gpu:
            rivals += [] if mixed else [rival("stock, no mask", attention_mask=None)]
            rivals.append(rival("stock, eager attention", attending(stock, "eager")))
            name = "stock, FlashAttention 2"
            rivals.append(installed(name, "flash_attn", lambda _: rival(name, attending(stock, "flash_attention_2"))))
            rivals += place.invariant(rivals[0].call, graph=False)
        if with_engines:
            asked = engines.Question(self.shape, tuple(self.lengths), 1 if mixed else count, tuple(self.telling()))
            for engine in engines.ENGINES:
                right = functools.partial(self.near_truth, who=engine)
                bar = ENGINE_BARS.get(engine) if bars and count > 1 and not mixed else None
                shown = f"{engine}, one by one" if mixed else engine
                rivals.append(Contestant(shown, away=functools.partial(engines.ready, engine, asked, right), bar=bar))
        s, total = self.shape, sum(self.lengths)
        per_token = s.layers * (4 * s.hidden**2 + 2 * s.hidden * s.ffn)
        fmas = per_token * total + 2 * s.layers * s.hidden * sum(n * n for n in self.lengths)
        contestants = [*(ours(way) for way in place.ways(self.dtype)), *rivals]
        return Work(contestants, fmas, per_token * DTYPES[self.dtype].itemsize, about={"group": "model"})


def attending(stock: Any, how: str) -> Any:
    """The same weights with another attention; shapes.reranker asks for SDPA."""
    other = shapes.twin(stock)
    other.set_attn_implementation(how)
    return other


def on_a_cpu(quick: bool) -> Iterator[tuple[str, Build]]:
    """Quick runs cut every model to two layers: every path is walked, but the times are no model's and no bar is for them."""

    def contest(place: Place, name: str, lengths: Sequence[int]) -> Work:
        model = Model(place, shapes.shape(name, 2 if quick else None), lengths, "fp32")
        return model.contest(bars=name == BASE and not quick, with_engines=name != LARGE)

    equal = {BASE: ((8, 128), (4, 512), (1, 128)), MINILM: ((8, 128), (1, 128)), LARGE: () if quick else ((8, 128),)}
    for name, sizes in equal.items():
        for lengths in (*((t,) * b for b, t in sizes), *([shapes.MIXED_LENGTHS] if name == BASE else [])):
            said = f"{name.partition('/')[2]}{' cut to 2 layers' if quick else ''}, {shapes.said(lengths)}"
            yield said, given(contest, name, lengths)


def on_a_gpu(batches: Sequence[tuple[int, ...]], compiled: Sequence[str] = ()) -> Iterator[tuple[str, bool, Build]]:
    """torch.compile takes its time, so its cases are asked for apart."""

    def contest(place: Place, name: str, lengths: Sequence[int], dtype: str, mode: str | None = None) -> Work:
        return Model(place, shapes.shape(name), lengths, dtype).contest(compiled=mode)

    for mode in compiled:
        for lengths in (*batches, (128,)):
            yield f"base {shapes.said(lengths)} fp16, {mode}", False, given(contest, BASE, lengths, "fp16", mode)
    for name in () if compiled else (BASE, LARGE):
        for dtype in ("fp16", "fp32", "bf16"):
            for lengths in (*batches, (128,)):
                mixed = len(set(lengths)) > 1
                quick = name == BASE and (dtype == "fp16" or (mixed and dtype == "fp32"))
                if name == BASE or dtype != "bf16" or mixed:
                    yield f"{SHORT[name]} {shapes.said(lengths)} {dtype}", quick, given(contest, name, lengths, dtype)
