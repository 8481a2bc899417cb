"""Single ops, ours beside PyTorch's, at any size and on any device; the bars they are held to, and which sizes a run has.

The gate is the tests' own, on the tensors that are timed: against float64 within the bound of tests/cases.py (on a GPU, whose
minutes are few, some rows), and rows alone, in other batches and in another order against the whole call, bit for bit.
Bars hold for float32, backend cpu and two threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import invariants
import rerank_kernels as rk
from bench.harness.turns import Contestant, Work
from rerank_kernels.backend import registry

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GPU_WAYS = (("cuda", "portable"), ("cuda", "tensor"), ("triton", "portable"), ("triton", "tensor"))
L2_OVER = 1.5  # sets of tensors together, over the L2 cache
LINEAR_BARS = {2048: 0.95, 512: 0.95, 128: 0.95, 64: 0.95, 16: None, 8: 1.0, 4: 1.0, 1: 1.0}  # by rows; of MKL's speed
ATTENTION_BAR = 1.2
ELEMENT_BAR = 1.5  # layer_norm, softmax, gelu
SPARSE_BAR, PREFILL_BAR = 4.0, 1.0  # one token with a tenth of the neurons active; 128 tokens
BASE_SIZES = ((768, 768), (768, 3072), (3072, 768))  # K, N of an encoder's layers, attention, up, down: bge-reranker-base
LARGE_SIZES = ((1024, 1024), (1024, 4096), (4096, 1024))  # bge-reranker-large
GELU, EXP = 29, 11  # multiplications and fused multiply-adds of an element in numerics.h
Theirs = Callable[..., object]
Build = Callable[..., Work]


@dataclass(frozen=True)
class Place:
    """Where the cases run, and in which of our ways; `compile`: whether torch.compile is among the contestants."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compile: bool = False
    all_ways: tuple[tuple[str, str], ...] = ()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def ways(self, dtype: str) -> list[tuple[str, str]]:
        given = self.all_ways or (GPU_WAYS if self.on_gpu else ((registry.active("cpu").name, "portable"),))
        return [(b, m) for b, m in given if m == "portable" or dtype != "fp32"]

    def sets(self, size: float) -> int:
        """Copies of tensors of `size` bytes that no cache of a GPU holds all of."""
        if not self.on_gpu:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(48, math.ceil(L2_OVER * cache / max(size, 1.0))))

    def random(self, shape: Sequence[int], dtype: str, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).mul_(scale).to(DTYPES[dtype])

    def eager(self, name: str) -> str:
        """What stock PyTorch is called: on a CPU by its function."""
        return "eager" if self.on_gpu else name

    def invariant(self, call: Callable[[int], object], graph: bool = True) -> list[Contestant]:
        """batch_invariant_ops, which replaces products and means, where it is installed."""
        if not self.on_gpu or importlib.util.find_spec("batch_invariant_ops") is None:
            return []
        switched: Callable[[bool], AbstractContextManager[Any]]
        switched = importlib.import_module("batch_invariant_ops").set_batch_invariant_mode
        return [Contestant("b-inv", call, lambda: switched(True), graph=graph)]


@dataclass(frozen=True)
class Op(cases.Case):
    """A case of the tests whose tensors are made once, on a device: gate and clock see the same ones."""

    place: Place = field(default_factory=Place)
    dtype: str = "fp32"
    held: dict[str, cases.Tensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normal numbers; weights [N, K] are scaled by about 1 / sqrt(K)."""
        if self.held:
            return
        random, shared = functools.partial(self.place.random, dtype=self.dtype), {}
        for i, (name, s) in enumerate(self.shared.items()):
            scale = 2.0 ** -round(math.log2(math.sqrt(s[1]))) if len(s) == 2 else 1.0
            shared[name] = random(s, seed=50 + i, scale=scale)
        rows = {n: random((self.total, *s), seed=i) for i, (n, s) in enumerate(self.rows.items())}
        self.held.update(rows=rows, shared=shared)

    def make_rows(self, dtype: torch.dtype, total: int | None = None, salt: str = "") -> cases.Tensors:
        if not salt:
            return self.held["rows"]
        return {n: t.to(self.place.device) for n, t in super().make_rows(dtype, total, salt).items()}

    def make_shared(self, dtype: torch.dtype) -> cases.Tensors:
        return self.held["shared"]

    def call(self, rows: cases.Tensors, shared: cases.Tensors, lengths: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
        more = {"cu_seqlens": _offsets(self.lengths if lengths is None else lengths, self.place.device)} if self.lengths else {}
        out = cases.FUNCTIONS[self.op](**rows, **shared, **self.options, **more)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def near(self, rows: cases.Tensors, shared: cases.Tensors, out: tuple[Tensor, ...]) -> tuple[cases.Near, ...]:
        """On the CPU, whatever the device."""
        on_cpu = ({n: t.cpu() for n, t in given.items()} for given in (rows, shared))
        there = self.place.device
        return tuple(n._replace(value=n.value.to(there), slack=n.slack.to(there)) for n in super().near(*on_cpu, out))

    def gate(self) -> None:
        dtype = DTYPES[self.dtype]
        invariants.right(self._some() if self.place.on_gpu else self, dtype)
        invariants.batch_invariant(self, dtype)
        if self.op == "bmm":  # whose entries have rows
            few = self.call({**self.held["rows"], "a": self.held["rows"]["a"][:, 3:10]}, {})
            full = self.call(self.held["rows"], {})
            invariants.all_same(few, tuple(o[:, 3:10] for o in full), f"{self}, rows 3:10 of each entry alone")

    def _some(self) -> Op:
        """The first, the middle and the last row, or a sequence of middle length."""
        middle, lengths = self.count // 2, self.lengths
        some = torch.tensor(sorted({0, middle, self.count - 1}))
        if lengths:
            b = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
            some, lengths = torch.arange(lengths[b]) + sum(lengths[:b]), (lengths[b],)
        rows = {n: t[some.to(t.device)] for n, t in self.held["rows"].items()}
        return replace(self, held={**self.held, "rows": rows}, lengths=lengths, count=len(some))


@functools.lru_cache(64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return cases.offsets(lengths).to(device)


def contest(op: Op, theirs: Mapping[str, Theirs], fmas: float, moved: float, bar: float | None = None) -> Work:
    """`theirs` are called with rows and shared tensors by name; the bar is for the first of them. `moved`: elements."""
    place, rows, shared = op.place, op.held["rows"], op.held["shared"]
    count = place.sets(sum(t.numel() * t.element_size() for t in (*rows.values(), *shared.values())))
    sets = [(rows, shared)]
    sets += [({n: t.clone() for n, t in rows.items()}, {n: t.clone() for n, t in shared.items()}) for _ in range(count - 1)]

    def ours(way: tuple[str, str]) -> Contestant:
        case = op if way[1] == "portable" else cases.in_tensor_mode(op)
        return Contestant(" ".join(way), lambda i: case.call(*sets[i % count]), lambda: rk.use(way[0]), case.gate, ours=True)

    def rival(f: Theirs) -> Callable[[int], object]:
        return lambda i: f(**sets[i % count][0], **sets[i % count][1])

    first = next(iter(theirs))
    bars = {first: bar if op.dtype == "fp32" and not place.on_gpu else None}
    contestants = [ours(way) for way in place.ways(op.dtype)]
    contestants += [Contestant(name, rival(f), bar=bars.get(name)) for name, f in theirs.items()]
    if place.compile and op.op in ("layer_norm", "softmax", "activation", "linear") and op.options:
        contestants.append(Contestant("compile", rival(torch.compile(theirs[first], dynamic=False))))
    if op.op in ("linear", "sparse_ffn", "bmm"):
        contestants += place.invariant(rival(theirs[first]))
    return Work(contestants, fmas, moved * DTYPES[op.dtype].itemsize, count, {"group": op.op})


def linear(place: Place, m: int, k: int, n: int, dtype: str = "fp32", *, gelu: bool = False, bar: float | None = None) -> Work:
    shared = {"weight": (n, k), **({"bias": (n,)} if gelu or place.on_gpu else {})}
    options = {"activation": "gelu"} if gelu else {}
    op = Op("linear", f"{m}x{k}x{n}", {"x": (k,)}, shared, options, count=m, place=place, dtype=dtype)
    stock: Theirs = lambda x, weight, bias=None: F.linear(x, weight, bias)  # noqa: E731
    if gelu:
        stock = lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))  # noqa: E731
    name = place.eager("F.gelu(F.linear)" if gelu else "F.linear")
    return contest(op, {name: stock}, m * k * n, m * k + n * k + m * n, bar)


def bmm(place: Place, entries: int, m: int, k: int, n: int, dtype: str) -> Work:
    op = Op("bmm", f"{entries}x{m}x{k}x{n}", {"a": (m, k), "b": (k, n)}, count=entries, place=place, dtype=dtype)
    stock: Theirs = lambda a, b: torch.bmm(a, b)  # noqa: E731
    return contest(op, {place.eager("torch.bmm"): stock}, entries * m * k * n, entries * (m * k + n * k + m * n))


def layer_norm(place: Place, m: int, d: int, dtype: str = "fp32") -> Work:
    rows, shared = {"x": (d,), "residual": (d,)}, {"weight": (d,), "bias": (d,)}
    op = Op("layer_norm", f"{m}x{d}", rows, shared, {"eps": 1e-5}, count=m, place=place, dtype=dtype)
    stock: Theirs = lambda x, residual, weight, bias: F.layer_norm(x + residual, (d,), weight, bias)  # noqa: E731
    return contest(op, {place.eager("F.layer_norm(x + r)"): stock}, 3 * m * d, 3 * m * d, ELEMENT_BAR)


def softmax(place: Place, m: int, d: int, dtype: str = "fp32") -> Work:
    op = Op("softmax", f"{m}x{d}", {"x": (d,)}, options={"dim": -1}, count=m, place=place, dtype=dtype)
    return contest(
        op, {place.eager("torch.softmax"): lambda x: torch.softmax(x, -1)}, (EXP + 1) * m * d, 2 * m * d, ELEMENT_BAR
    )


def gelu(place: Place, m: int, d: int, dtype: str = "fp32") -> Work:
    op = Op("activation", f"gelu {m}x{d}", {"x": (d,)}, options={"kind": "gelu"}, count=m, place=place, dtype=dtype)
    return contest(op, {place.eager("F.gelu"): lambda x: F.gelu(x)}, GELU * m * d, 2 * m * d, ELEMENT_BAR)


def attention(place: Place, lengths: tuple[int, ...], heads: int, d: int, dtype: str = "fp32") -> Work:
    batch, longest, scores = len(lengths), max(lengths), heads * sum(n * n for n in lengths)
    rows = dict.fromkeys("qkv", (heads, d))
    op = Op("attention", f"{batch} of {longest}, {heads}x{d}", rows, lengths=lengths, place=place, dtype=dtype)
    theirs: dict[str, Theirs] = {}
    if min(lengths) == longest:
        theirs[place.eager("F.sdpa")] = lambda q, k, v: F.scaled_dot_product_attention(
            *(z.view(batch, longest, heads, d).transpose(1, 2) for z in (q, k, v))
        )
    else:
        index = torch.cat([torch.arange(n) + b * longest for b, n in enumerate(lengths)]).to(place.device)
        mask = torch.zeros(batch * longest, dtype=torch.bool, device=place.device)
        mask[index] = True
        mask = mask.view(batch, 1, 1, longest)
        # stock's tensors are padded before the clock starts: it never had them packed
        padded = [
            z.new_zeros(batch * longest, heads, d).index_copy_(0, index, z).view(batch, longest, heads, d).transpose(1, 2)
            for z in op.held["rows"].values()
        ]
        theirs["padded"] = lambda q, k, v: F.scaled_dot_product_attention(*padded, attn_mask=mask)
        theirs["one by one"] = lambda q, k, v: [
            F.scaled_dot_product_attention(*(z.transpose(0, 1)[None] for z in one))
            for one in zip(*(z.split(lengths) for z in (q, k, v)), strict=True)
        ]
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if dtype != "fp32" and place.on_gpu:
            cu = _offsets(lengths, place.device)
            theirs["varlen"] = lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest)
    return contest(op, theirs, scores * (2 * d + EXP + 1), 4 * sum(lengths) * heads * d, ATTENTION_BAR)


@functools.lru_cache(1)
def _ffn(place: Place, m: int, k: int, f: int, gate: bool, dtype: str) -> tuple[Op, Tensor]:
    """It takes seconds to make, and serves every share: the op without its bias, and what decides which neurons are active."""
    shared = {"up_weight": (f, k), "down_weight": (k, f), **({"gate_weight": (f, k)} if gate else {})}
    op = Op("sparse_ffn", f"{m}x{k}x{f}", {"x": (k,)}, shared, count=m, place=place, dtype=dtype)
    decides = op.held["shared"]["gate_weight" if gate else "up_weight"]
    return op, op.held["rows"]["x"].double() @ decides.double().t()


def sparse_ffn(
    place: Place, m: int, k: int, f: int, dtype: str = "fp32", *, gate: bool, active: float = 0.1, bar: float | None = None
) -> Work:
    """A bias leaves round(active * m * f) of the m tokens' neurons above zero; in half precision about so many."""
    made, before = _ffn(place, m, k, f, gate, dtype)
    wanted = round(active * before.numel())
    least, *dropped = before.flatten().topk(min(wanted + 1, before.numel())).values[wanted - 1 :].tolist()
    relu = "gate_bias" if gate else "up_bias"
    bias = torch.full((f,), -(least + (dropped or [least - 1.0])[0]) / 2, device=place.device).to(DTYPES[dtype])
    label = f"{'ReGLU' if gate else 'ReLU'} {m}x{k}x{f}, {active:.0%} active"
    held = {**made.held, "shared": {**made.held["shared"], relu: bias}}
    op = replace(made, label=label, shared={**made.shared, relu: (f,)}, held=held)

    def dense(x: Tensor, up_weight: Tensor, down_weight: Tensor, **more: Tensor) -> Tensor:
        if gate:
            h = F.relu(F.linear(x, more["gate_weight"], more["gate_bias"])) * F.linear(x, up_weight)
        else:
            h = F.relu(F.linear(x, up_weight, more["up_bias"]))
        return F.linear(h, down_weight)

    # what has to be read: who is active, and of these the rest; on a CPU our coarse copy, a byte a weight, says who is
    needed = k * f * (1 + (2 if gate else 1) * active) if place.on_gpu else k * f * (0.25 + (3 if gate else 2) * active)
    work = contest(op, {place.eager("dense F.linear"): dense}, m * k * f * (1 + 2 * active), needed, bar)
    count = int((before + bias.double() > 0).sum())
    about = {**work.about, "tokens": m, "active": active, "notes": f"{count / before.numel():.1%} active"}

    def checked(gate: Callable[[], None]) -> None:
        # of a million neurons one may stand so near its bias that float32 decides
        assert dtype != "fp32" or abs(count - wanted) <= before.numel() // 10**6, (
            f"{op}: {count} neurons are active, want {wanted}"
        )
        gate()

    return replace(
        work,
        contestants=[
            replace(c, gate=functools.partial(checked, c.gate)) if c.gate is not None else c for c in work.contestants
        ],
        about=about,
    )


def forget() -> None:
    _ffn.cache_clear()


# ---- which sizes a run has -------------------------------------------------------------------------------------------------


def on_a_cpu(place: Place) -> Iterator[tuple[str, Build]]:
    """Name and how to build it; built when its turn comes, so that no two sets of weights are held at a time."""
    words = {"fp32": "", "fp16": " float16", "bf16": " bfloat16"}
    for k, n in (*BASE_SIZES, *LARGE_SIZES):
        for m, bar in LINEAR_BARS.items():
            yield f"linear {m}x{k}x{n}", functools.partial(linear, place, m, k, n, bar=bar)
    for dtype in ("fp16", "bf16"):
        yield f"linear 2048x768x3072{words[dtype]}", functools.partial(linear, place, 2048, 768, 3072, dtype)
    yield "linear + gelu 2048x768x3072", functools.partial(linear, place, 2048, 768, 3072, gelu=True)
    for dtype in ("fp32", "bf16"):
        for m, d in ((2048, 768), (2048, 1024), (128, 768)):  # the tensors of 128 rows fit into the caches
            yield f"layer_norm + residual {m}x{d}{words[dtype]}", functools.partial(layer_norm, place, m, d, dtype)
        for m in (2048, 128):
            yield f"activation gelu {m}x3072{words[dtype]}", functools.partial(gelu, place, m, 3072, dtype)
    for m, d in ((12288, 128), (6144, 512), (1536, 128)):
        yield f"softmax {m}x{d}", functools.partial(softmax, place, m, d)
    for heads, t in ((12, 128), (12, 256), (12, 384), (12, 512), (16, 512)):
        build = functools.partial(attention, place, (t,) * (2048 // t), heads, 64)
        yield f"attention {2048 // t}x{t}, {heads} heads of 64", build
    ffn = functools.partial(sparse_ffn, place, k=4096, f=11008)
    for share in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):  # of the neurons that are active
        bar = SPARSE_BAR if share == 0.1 else None
        yield (
            f"sparse_ffn ReLU 1x4096x11008, {share:.0%} active",
            functools.partial(ffn, m=1, gate=False, active=share, bar=bar),
        )
    yield "sparse_ffn ReLU 128x4096x11008, 10% active", functools.partial(ffn, m=128, gate=False, bar=PREFILL_BAR)
    yield "sparse_ffn ReGLU 1x4096x11008, 10% active", functools.partial(ffn, m=1, gate=True, bar=SPARSE_BAR)


def on_a_gpu(batches: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, bool, Build]]:
    """Name, whether a quick run has it, and how to build it of a place; what is least missed when time runs out comes last."""

    def given(build: Build, *arguments: Any, **more: Any) -> Build:
        return lambda place: build(place, *arguments, **more)

    for heads, d in ((12, 64), (16, 64), (8, 128)):
        for words, lengths in batches.items():
            for dtype in ("fp16", "fp32", "bf16") if heads == 12 else ("fp16", "fp32"):
                quick = heads == 12 and dtype == "fp16"
                yield f"attention {words} {heads}x{d} {dtype}", quick, given(attention, lengths, heads, d, dtype)
    for dtype in ("fp16", "fp32"):
        half = dtype == "fp16"
        yield f"linear+gelu 16384x768x3072 {dtype}", half, given(linear, 16384, 768, 3072, dtype, gelu=True)
        for m, k, n in ((128, 64, 128), (512, 64, 512), (512, 512, 64)):
            yield f"bmm 384x{m}x{k}x{n} {dtype}", m == k and half, given(bmm, 384, m, k, n, dtype)
        for m in (1, 128):
            yield f"sparse_ffn {m}x4096x11008 {dtype}", half, given(sparse_ffn, m, 4096, 11008, dtype, gate=True)
        for d in (768, 1024):
            yield f"layer_norm+residual 16384x{d} {dtype}", half and d == 768, given(layer_norm, 16384, d, dtype)
        for d in (128, 512):
            yield f"softmax 49152x{d} {dtype}", half and d == 512, given(softmax, 49152, d, dtype)
        yield f"gelu 16384x3072 {dtype}", half, given(gelu, 16384, 3072, dtype)
    for m in (16384, 4096, 1024, 128, 16, 1):
        for k, n in (*BASE_SIZES, *LARGE_SIZES):
            for dtype in ("fp16", "fp32", "bf16"):
                quick = (k, n) == (768, 3072) and (dtype == "fp16" or (m == 4096 and dtype == "fp32"))
                some = m in (16384, 128, 1)
                if dtype == "fp16" or (dtype == "fp32" and (some or k in (768, 3072))) or ((k, n) == (1024, 4096) and some):
                    yield f"linear {m}x{k}x{n} {dtype}", quick, given(linear, m, k, n, dtype)
