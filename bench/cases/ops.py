"""Single ops, ours beside PyTorch's, at any size and on any device; the bars they are held to, and which sizes a run has.

The gate is the tests' own, on the tensors that are timed: against float64 within the bound of tests/cases.py (on a GPU, whose
minutes are few, some rows), and rows alone, in other batches and in another order against the whole call, bit for bit.
Bars hold for float32, backend cpu and two threads.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cases
import invariants
import rerank_kernels as rk
from bench.cases import shapes
from bench.harness.turns import Contestant, Work, absent
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
COMPILED = ("default", "max-autotune-no-cudagraphs")  # of ops: the clock captures the graph itself
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

    def on(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(self.device) for n, t in batch.items()}

    def invariant(self, call: Callable[[int], object], graph: bool = True) -> list[Contestant]:
        """batch_invariant_ops, which replaces products and means on a GPU."""
        made = lambda m: Contestant("b-inv", call, m.set_batch_invariant_mode, graph=graph)  # noqa: E731
        return [installed("b-inv", "batch_invariant_ops", made)] if self.on_gpu else []


def installed(name: str, package: str, made: Callable[[Any], Contestant]) -> Contestant:
    """A rival that a package makes, or a row that says that there is none."""
    if importlib.util.find_spec(package) is None:
        return absent(name, f"not installed: {package}")
    return made(importlib.import_module(package))


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

    def sequences(self, lengths: tuple[int, ...] | None = None, keys: tuple[int, ...] | None = None) -> cases.Tensors:
        """On the device, and made once: a caller has them."""
        own = self.lengths if lengths is None else lengths
        return {"cu_seqlens": _offsets(own, self.place.device)} if self.lengths else {}

    def near(self, rows: cases.Tensors, shared: cases.Tensors, out: tuple[Tensor, ...]) -> tuple[cases.Near, ...]:
        """On the CPU, whatever the device."""
        on_cpu = ({n: t.cpu() for n, t in given.items()} for given in (rows, shared))
        to = self.place.device
        return tuple(n._replace(value=n.value.to(to), slack=n.slack.to(to)) for n in super().near(*on_cpu, out))

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

    (name, first), *more = theirs.items()
    contestants = [ours(way) for way in place.ways(op.dtype)]
    contestants.append(Contestant(name, rival(first), bar=bar if op.dtype == "fp32" and not place.on_gpu else None))
    contestants += [Contestant(name, rival(f)) for name, f in more]
    if place.compile and op.op in ("layer_norm", "softmax", "activation", "linear") and op.options:
        torch.compiler.reset()  # else it gives up behind eight shapes, and runs eager
        for mode in COMPILED:
            contestants.append(Contestant(f"compile, {mode}", rival(torch.compile(first, dynamic=False, mode=mode))))
    if op.op in ("linear", "sparse_ffn", "bmm"):
        contestants += place.invariant(rival(first))
    return Work(contestants, fmas, moved * DTYPES[op.dtype].itemsize, count, {"group": op.op})


def linear(place: Place, m: int, k: int, n: int, dtype: str = "fp32", *, gelu: bool = False, bar: float | None = None) -> Work:
    shared = {"weight": (n, k), **({"bias": (n,)} if gelu or place.on_gpu else {})}
    options = {"activation": "gelu"} if gelu else {}
    op = Op("linear", f"{m}x{k}x{n}", {"x": (k,)}, shared, options, count=m, place=place, dtype=dtype)
    theirs: dict[str, Theirs] = {"F.linear": lambda x, weight, bias=None: F.linear(x, weight, bias)}
    if gelu:
        theirs = {"F.gelu(F.linear)": lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))}
    return contest(op, theirs, m * k * n, m * k + n * k + m * n, bar)


def bmm(place: Place, entries: int, m: int, k: int, n: int, dtype: str) -> Work:
    op = Op("bmm", f"{entries}x{m}x{k}x{n}", {"a": (m, k), "b": (k, n)}, count=entries, place=place, dtype=dtype)
    theirs = {"torch.bmm": lambda a, b: torch.bmm(a, b)}
    return contest(op, theirs, entries * m * k * n, entries * (m * k + n * k + m * n))


def layer_norm(place: Place, m: int, d: int, dtype: str = "fp32") -> Work:
    rows, shared = {"x": (d,), "residual": (d,)}, {"weight": (d,), "bias": (d,)}
    op = Op("layer_norm", f"{m}x{d}", rows, shared, {"eps": 1e-5}, count=m, place=place, dtype=dtype)
    theirs = {"F.layer_norm(x + r)": lambda x, residual, weight, bias: F.layer_norm(x + residual, (d,), weight, bias)}
    return contest(op, theirs, 3 * m * d, 3 * m * d, ELEMENT_BAR)


def softmax(place: Place, m: int, d: int, dtype: str = "fp32") -> Work:
    op = Op("softmax", f"{m}x{d}", {"x": (d,)}, options={"dim": -1}, count=m, place=place, dtype=dtype)
    return contest(op, {"torch.softmax": lambda x: torch.softmax(x, -1)}, (EXP + 1) * m * d, 2 * m * d, ELEMENT_BAR)


def gelu(place: Place, m: int, d: int, dtype: str = "fp32") -> Work:
    op = Op("activation", f"gelu {m}x{d}", {"x": (d,)}, options={"kind": "gelu"}, count=m, place=place, dtype=dtype)
    return contest(op, {"F.gelu": lambda x: F.gelu(x)}, GELU * m * d, 2 * m * d, ELEMENT_BAR)


# ---- attention -------------------------------------------------------------------------------------------------------------


def attention(place: Place, lengths: tuple[int, ...], heads: int, d: int, dtype: str = "fp32") -> Work:
    """Beside SDPA as PyTorch chooses it; on a GPU also each of its backends, and kernels that take packed sequences."""
    batch, longest, scores = len(lengths), max(lengths), heads * sum(n * n for n in lengths)
    rows = dict.fromkeys("qkv", (heads, d))
    op = Op("attention", f"{batch} of {longest}, {heads}x{d}", rows, lengths=lengths, place=place, dtype=dtype)
    theirs: dict[str, Theirs] = {}
    if min(lengths) == longest:
        theirs["F.sdpa"] = lambda q, k, v: F.scaled_dot_product_attention(
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
        theirs["F.sdpa, padded"] = lambda q, k, v: F.scaled_dot_product_attention(*padded, attn_mask=mask)
        theirs["F.sdpa, one by one"] = lambda q, k, v: [
            F.scaled_dot_product_attention(*(z.transpose(0, 1)[None] for z in one))
            for one in zip(*(z.split(lengths) for z in (q, k, v)), strict=True)
        ]
    packed = _packed(lengths, place, dtype) if place.on_gpu else {}
    theirs |= {name: f for name, f in packed.items() if not isinstance(f, str)}
    work = contest(op, theirs, scores * (2 * d + EXP + 1), 4 * sum(lengths) * heads * d, ATTENTION_BAR)
    more = [absent(name, why) for name, why in packed.items() if isinstance(why, str)]
    if place.on_gpu:
        first = next(c for c in work.contestants if not c.ours)
        more += [replace(first, name=f"{first.name}, {name}", around=kind) for name, kind in _kinds_of_sdpa().items()]
    return replace(work, contestants=[*work.contestants, *more])


def _kinds_of_sdpa() -> dict[str, Callable[[], Any]]:
    """Every backend that this PyTorch knows, by name; one that refuses a case has a row that says so."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {n: b for n, b in SDPBackend.__members__.items() if n not in ("ERROR", "OVERRIDEABLE")}
    return {n.removesuffix("_ATTENTION").lower(): functools.partial(sdpa_kernel, b) for n, b in kinds.items()}


def _packed(lengths: tuple[int, ...], place: Place, dtype: str) -> dict[str, Theirs | str]:
    """Kernels that take the sequences as ours does, or why one is not there."""
    cu, longest = _offsets(lengths, place.device), max(lengths)
    found: dict[str, Theirs | str] = {}
    for name, module, function in (
        ("varlen", "torch.nn.attention.varlen", "varlen_attn"),
        ("FlashAttention 2", "flash_attn", "flash_attn_varlen_func"),
        ("FlashAttention 3", "flash_attn_interface", "flash_attn_varlen_func"),
    ):
        if importlib.util.find_spec(module) is None:
            found[name] = f"not installed: {module}"
        elif dtype == "fp32":
            found[name] = "takes half precision only"
        else:
            call = getattr(importlib.import_module(module), function)
            found[name] = lambda q, k, v, call=call: call(q, k, v, cu, cu, longest, longest)
    return found


# ---- sparse_ffn ------------------------------------------------------------------------------------------------------------


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
    count = int((before + bias.double() > 0).sum())
    label = f"{'ReGLU' if gate else 'ReLU'} {m}x{k}x{f}, {active:.0%} active"
    # of a million neurons one may stand so near its bias that float32 decides
    enough = dtype != "fp32" or abs(count - wanted) <= before.numel() // 10**6
    assert enough, f"{label}: {count} neurons are active, want {wanted}"
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
    work = contest(op, {"dense F.linear": dense}, m * k * f * (1 + 2 * active), needed, bar)
    about = {"tokens": m, "active": active, "notes": f"{count / before.numel():.1%} active"}
    return replace(work, about={**work.about, **about})


# ---- which sizes a run has -------------------------------------------------------------------------------------------------


def given(build: Build, *arguments: Any, **more: Any) -> Build:
    """What wants a place and nothing else."""
    return lambda place: build(place, *arguments, **more)


def on_a_cpu() -> Iterator[tuple[str, Build]]:
    """Name and how to build it of a place."""
    words = {"fp32": "", "fp16": " float16", "bf16": " bfloat16"}
    for k, n in (*BASE_SIZES, *LARGE_SIZES):
        for m, bar in LINEAR_BARS.items():
            yield f"linear {m}x{k}x{n}", given(linear, m, k, n, bar=bar)
    for dtype in ("fp16", "bf16"):
        yield f"linear 2048x768x3072{words[dtype]}", given(linear, 2048, 768, 3072, dtype)
    yield "linear + gelu 2048x768x3072", given(linear, 2048, 768, 3072, gelu=True)
    for dtype in ("fp32", "bf16"):
        for m, d in ((2048, 768), (2048, 1024), (128, 768)):  # the tensors of 128 rows fit into the caches
            yield f"layer_norm + residual {m}x{d}{words[dtype]}", given(layer_norm, m, d, dtype)
        for m in (2048, 128):
            yield f"activation gelu {m}x3072{words[dtype]}", given(gelu, m, 3072, dtype)
    for m, d in ((12288, 128), (6144, 512), (1536, 128)):
        yield f"softmax {m}x{d}", given(softmax, m, d)
    for heads, t in ((12, 128), (12, 256), (12, 384), (12, 512), (16, 512)):
        yield f"attention {2048 // t}x{t}, {heads} heads of 64", given(attention, (t,) * (2048 // t), heads, 64)
    for gate, m, share, bar in (
        *((False, 1, share, SPARSE_BAR if share == 0.1 else None) for share in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)),
        (False, 128, 0.1, PREFILL_BAR),
        (True, 1, 0.1, SPARSE_BAR),
    ):
        build = given(sparse_ffn, m, 4096, 11008, gate=gate, active=share, bar=bar)
        yield f"sparse_ffn {'ReGLU' if gate else 'ReLU'} {m}x4096x11008, {share:.0%} active", build


def on_a_gpu(batches: Sequence[tuple[int, ...]]) -> Iterator[tuple[str, bool, Build]]:
    """Name, whether a quick run has it, and how to build it of a place; what is least missed when time runs out comes last."""

    for heads, d in ((12, 64), (16, 64), (8, 128)):
        for lengths in batches:
            for dtype in ("fp16", "fp32", "bf16") if heads == 12 else ("fp16", "fp32"):
                quick = heads == 12 and dtype == "fp16"
                yield f"attention {shapes.said(lengths)} {heads}x{d} {dtype}", quick, given(attention, lengths, heads, d, dtype)
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
