"""The cases of `python bench/run.py --device cuda`: ops and whole models, ours in every backend and mode beside theirs.

Ours: backends cuda and triton, mode portable, and for half precision mode tensor. Theirs, as far as each is there: PyTorch
eager (float32 without TF32), F.scaled_dot_product_attention (without a mask where lengths are equal, so that PyTorch may choose
flash; padded with its mask; one sequence at a time), varlen_attn, torch.compile, and batch_invariant_ops, which replaces
products and means.

The gate stands before every contestant of ours, on the tensors that are timed: some rows against float64 on the CPU within the
bound of tests/cases.py, and rows alone, in other batches and in another order against the whole call, bit for bit, on the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import shapes
import torch
import torch.nn.functional as F
from torch import Tensor
from turns import Contestant, Work

# the cases and their truths are the tests' own: there is one table
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import cases
import invariants
import rerank_kernels as rk

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WAYS = {
    "cuda": (("cuda", "portable"), ("cuda", "tensor"), ("triton", "portable"), ("triton", "tensor")),
    "cpu": (("cpu", "portable"), ("pytorch", "portable")),
}
L2_OVER = 1.5  # sets of tensors together, over the L2 cache
MIXED = shapes.MIXED_LENGTHS
BASE, LARGE = "BAAI/bge-reranker-base", "BAAI/bge-reranker-large"
SHORT = {BASE: "base", LARGE: "large"}
# ours may be this far from float64 beyond four times stock's own distance, on logits of a few tenths
LOGIT_SLACK = {"fp32": 2.0e-5, "fp16": 2.0e-3, "bf16": 1.6e-2}
Theirs = Callable[..., object]


@dataclass(frozen=True)
class Place:
    """Where the cases run. `compile`: whether torch.compile is among the contestants."""

    device: torch.device
    compile: bool = True

    def ways(self, dtype: str) -> list[tuple[str, str]]:
        return [(b, m) for b, m in WAYS[self.device.type] if m == "portable" or dtype != "fp32"]

    def sets(self, size: float) -> int:
        """Copies of tensors of `size` bytes that no cache holds all of."""
        if self.device.type != "cuda":
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(1, min(48, math.ceil(L2_OVER * cache / max(size, 1.0))))

    def random(self, shape: Sequence[int], dtype: str, seed: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).mul_(scale).to(DTYPES[dtype])


@dataclass(frozen=True)
class Job:
    group: str
    quick: bool
    build: Callable[[Place], Work]


def contestant(
    way: tuple[str, str], call: Callable[[int], object], gate: Callable[[], None] | None, *, graph: bool
) -> Contestant:
    return Contestant(" ".join(way), call, lambda: rk.use(way[0]), gate, ours=True, graph=graph)


def invariant_mode() -> AbstractContextManager[Any] | None:
    """batch_invariant_ops switched on, where it is installed."""
    if importlib.util.find_spec("batch_invariant_ops") is None:
        return None
    return importlib.import_module("batch_invariant_ops").set_batch_invariant_mode(True)


# ---- ops -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A case of the tests at the size and on the device of the benchmark; its rows and shared tensors are given, not made."""

    case: cases.Case
    rows: cases.Tensors
    shared: cases.Tensors
    cu: Tensor | None = None

    def call(self, rows: cases.Tensors, shared: cases.Tensors, mode: str, cu: Tensor | None = None) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {**self.case.options}
        if mode != "portable":
            options["mode"] = mode
        if self.cu is not None:
            options["cu_seqlens"] = self.cu if cu is None else cu
        out = cases.FUNCTIONS[self.case.op](**rows, **shared, **options)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def near(self, rows: cases.Tensors, out: tuple[Tensor, ...], mode: str, **changes: Any) -> None:
        case = replace(self.case, **changes)
        if mode == "tensor":
            case = cases.in_tensor_mode(case)
        on_cpu = [{n: t.cpu() for n, t in held.items()} for held in (rows, self.shared)]
        got = tuple(o.cpu() for o in out)
        for g, n in zip(got, case.near(*on_cpu, got), strict=True):
            error = (g.double() - n.value).abs()
            bad = ~(error <= n.slack)  # also where it is NaN
            assert not bad.any(), (
                f"{int(bad.sum())} of {bad.numel()} values beyond the bound, the worst error is "
                f"{float((error / n.slack).nan_to_num(math.inf).max()):.3g} times what is allowed"
            )

    def gate(self, mode: str) -> None:
        (self._sequences if self.cu is not None else self._rows)(mode)

    def _rows(self, mode: str) -> None:
        full = self.call(self.rows, self.shared, mode)
        m = self.case.count
        some = torch.tensor(sorted({0, m // 2, m - 1}), device=full[0].device)
        self.near({n: t[some] for n, t in self.rows.items()}, tuple(o[some] for o in full), mode)
        spans = [(0, 1), (m // 2, m // 2 + 1), (m - 1, m), (0, 2), (3, 10), (m // 3, m // 3 + 130), (1, m // 2 + 2)]
        for start, stop in {(a, min(b, m)) for a, b in spans if a < min(b, m)}:
            part = self.call({n: t[start:stop] for n, t in self.rows.items()}, self.shared, mode)
            invariants.all_same(part, full, f"{self.case}, rows {start}:{stop} alone", slice(start, stop))
        order = torch.arange(m - 1, -1, -1, device=full[0].device)
        turned = self.call({n: t[order] for n, t in self.rows.items()}, self.shared, mode)
        invariants.all_same(turned, full, f"{self.case}, rows in another order", order)

    def _sequences(self, mode: str) -> None:
        full = self.call(self.rows, self.shared, mode)
        lengths, device = self.case.lengths, full[0].device
        ends = torch.tensor(lengths).cumsum(0).tolist()
        by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
        for b in {by_length[0], by_length[len(lengths) // 2], by_length[-1], len(lengths) - 1}:
            span = slice(ends[b] - lengths[b], ends[b])
            rows = {n: t[span] for n, t in self.rows.items()}
            alone = self.call(rows, self.shared, mode, cases.offsets((lengths[b],)).to(device))
            invariants.all_same(alone, full, f"{self.case}, sequence {b} alone", span)
            if b == by_length[len(lengths) // 2]:
                self.near(rows, alone, mode, lengths=(lengths[b],))
        order = list(reversed(range(len(lengths))))
        token = torch.cat([torch.arange(ends[b] - lengths[b], ends[b]) for b in order]).to(device)
        cu = cases.offsets(tuple(lengths[b] for b in order)).to(device)
        turned = self.call({n: t[token] for n, t in self.rows.items()}, self.shared, mode, cu)
        invariants.all_same(turned, full, f"{self.case}, sequences in another order", token)


def op_work(
    place: Place, op: Op, dtype: str, theirs: Mapping[str, Theirs], flops: float, moved: float, notes: str = ""
) -> Work:
    """`theirs` are called with rows and shared tensors by name; "compile" is made of the first of them."""
    held = [*op.rows.values(), *op.shared.values()]
    count = place.sets(sum(t.numel() * t.element_size() for t in held))
    sets = [(op.rows, op.shared)]
    sets += [tuple({n: t.clone() for n, t in d.items()} for d in sets[0]) for _ in range(count - 1)]  # type: ignore[misc]
    contestants = [
        contestant(
            (name, mode),
            lambda i, mode=mode: op.call(*sets[i % count], mode),
            functools.partial(op.gate, mode),
            graph=True,
        )
        for name, mode in place.ways(dtype)
    ]

    def rival(f: Theirs) -> Callable[[int], object]:
        return lambda i: f(**sets[i % count][0], **sets[i % count][1])

    contestants += [Contestant(name, rival(f)) for name, f in theirs.items()]
    first = next(iter(theirs.values()))
    if place.compile and op.case.op in ("layer_norm", "softmax", "activation", "linear") and op.case.options:
        contestants.append(Contestant("compile", rival(torch.compile(first, dynamic=False))))
    if place.device.type == "cuda" and op.case.op in ("linear", "sparse_ffn") and invariant_mode() is not None:
        contestants.append(Contestant("b-inv", rival(first), invariant_mode))  # type: ignore[arg-type]
    return Work(contestants, flops, moved, count, notes)


def tensors(place: Place, case: cases.Case, dtype: str) -> tuple[cases.Tensors, cases.Tensors]:
    """Normal numbers; weights [N, K] are scaled by about 1 / sqrt(K)."""
    rows = {n: place.random((case.total, *s), dtype, i) for i, (n, s) in enumerate(case.rows.items())}
    scales = {n: 2.0 ** -round(math.log2(math.sqrt(s[1]))) if len(s) == 2 else 1.0 for n, s in case.shared.items()}
    return rows, {n: place.random(s, dtype, 50 + i, scales[n]) for i, (n, s) in enumerate(case.shared.items())}


def linear(m: int, k: int, n: int, dtype: str, activation: str | None, place: Place) -> Work:
    options = {"activation": activation} if activation else {}
    case = cases.Case("linear", f"{m}x{k}x{n}", {"x": (k,)}, {"weight": (n, k), "bias": (n,)}, options, count=m)
    stock: Theirs = lambda x, weight, bias: F.linear(x, weight, bias)  # noqa: E731
    if activation:
        stock = lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))  # noqa: E731
    size = DTYPES[dtype].itemsize
    op = Op(case, *tensors(place, case, dtype))
    return op_work(place, op, dtype, {"eager": stock}, 2.0 * m * k * n, size * (m * k + n * k + m * n))


def bmm(b: int, m: int, k: int, n: int, dtype: str, place: Place) -> Work:
    """Not a row op: a batch entry is one matrix against its own."""
    x = place.random((b, m, k), dtype, 0)
    y = place.random((b, n, k), dtype, 1, 2.0 ** -round(math.log2(math.sqrt(k)))).transpose(1, 2)

    def gate(mode: str) -> None:
        full = rk.bmm(x, y, mode=mode)  # type: ignore[attr-defined]
        for i in (0, b - 1):
            invariants.same(rk.bmm(x[i : i + 1], y[i : i + 1], mode=mode), full[i : i + 1], f"bmm, entry {i} alone")  # type: ignore[attr-defined]
            few = rk.bmm(x[i : i + 1, 3:10], y[i : i + 1], mode=mode)  # type: ignore[attr-defined]
            invariants.same(few, full[i : i + 1, 3:10], f"bmm, rows 3:10 of entry {i} alone")
            p, q, got = x[i].cpu().double(), y[i].cpu().double(), full[i].cpu()
            count = cases.tensor_steps(k) if mode == "tensor" else cases.steps(k)
            n = cases._rounded(cases.Near(p @ q, count * cases.U * (p.abs() @ q.abs())), got.dtype)
            assert bool(((got.double() - n.value).abs() <= n.slack).all()), f"bmm, entry {i} beyond the bound"

    ours = [
        contestant((name, mode), lambda i, mode=mode: rk.bmm(x, y, mode=mode), functools.partial(gate, mode), graph=True)  # type: ignore[attr-defined]
        for name, mode in place.ways(dtype)
    ]
    theirs = [Contestant("eager", lambda i: torch.bmm(x, y))]
    if place.device.type == "cuda" and invariant_mode() is not None:
        theirs.append(Contestant("b-inv", lambda i: torch.bmm(x, y), invariant_mode))  # type: ignore[arg-type]
    return Work([*ours, *theirs], 2.0 * b * m * k * n, DTYPES[dtype].itemsize * b * (m * k + n * k + m * n))


def attention(lengths: Sequence[int], heads: int, d: int, dtype: str, place: Place) -> Work:
    case = cases.Case("attention", f"{len(lengths)} of {max(lengths)}, {heads}x{d}", dict.fromkeys("qkv", (heads, d)))
    case = replace(case, lengths=tuple(lengths))
    rows, _ = tensors(place, case, dtype)
    cu = cases.offsets(case.lengths).to(place.device)
    batch, longest, total = len(lengths), max(lengths), sum(lengths)
    theirs: dict[str, Theirs] = {}
    if min(lengths) == longest:
        theirs["eager"] = lambda q, k, v: F.scaled_dot_product_attention(
            *(z.view(batch, longest, heads, d).transpose(1, 2) for z in (q, k, v))
        )
    else:
        index = torch.cat([torch.arange(n) + b * longest for b, n in enumerate(lengths)]).to(place.device)
        mask = torch.zeros(batch * longest, dtype=torch.bool, device=place.device)
        mask[index] = True
        mask = mask.view(batch, 1, 1, longest)
        # stock's tensors are padded before the clock starts: it never had them packed
        padded = {
            n: z.new_zeros(batch * longest, heads, d).index_copy_(0, index, z).view(batch, longest, heads, d).transpose(1, 2)
            for n, z in rows.items()
        }
        theirs["padded"] = lambda q, k, v: F.scaled_dot_product_attention(padded["q"], padded["k"], padded["v"], attn_mask=mask)
        theirs["one by one"] = lambda q, k, v: [
            F.scaled_dot_product_attention(*(z.transpose(0, 1)[None] for z in one))
            for one in zip(*(z.split(lengths) for z in (q, k, v)), strict=True)
        ]
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if dtype != "fp32" and place.device.type == "cuda":
            theirs["varlen"] = lambda q, k, v: varlen_attn(q, k, v, cu, cu, longest, longest)
    flops = 4.0 * heads * d * sum(n * n for n in lengths)
    return op_work(place, Op(case, rows, {}, cu), dtype, theirs, flops, 4.0 * total * heads * d * DTYPES[dtype].itemsize)


def layer_norm(m: int, d: int, dtype: str, place: Place) -> Work:
    rows = {"x": (d,), "residual": (d,)}
    case = cases.Case("layer_norm", f"{m}x{d}", rows, {"weight": (d,), "bias": (d,)}, {"eps": 1e-5}, count=m)
    op = Op(case, *tensors(place, case, dtype))
    stock: Theirs = lambda x, residual, weight, bias: F.layer_norm(x + residual, (d,), weight, bias)  # noqa: E731
    return op_work(place, op, dtype, {"eager": stock}, 8.0 * m * d, 3.0 * m * d * DTYPES[dtype].itemsize)


def softmax(m: int, d: int, dtype: str, place: Place) -> Work:
    case = cases.Case("softmax", f"{m}x{d}", {"x": (d,)}, options={"dim": -1}, count=m)
    op = Op(case, *tensors(place, case, dtype))
    return op_work(
        place, op, dtype, {"eager": lambda x: torch.softmax(x, -1)}, 5.0 * m * d, 2.0 * m * d * DTYPES[dtype].itemsize
    )


def gelu(m: int, d: int, dtype: str, place: Place) -> Work:
    case = cases.Case("activation", f"gelu {m}x{d}", {"x": (d,)}, options={"kind": "gelu"}, count=m)
    op = Op(case, *tensors(place, case, dtype))
    return op_work(place, op, dtype, {"eager": lambda x: F.gelu(x)}, 20.0 * m * d, 2.0 * m * d * DTYPES[dtype].itemsize)


def sparse_ffn(m: int, k: int, f: int, active: float, dtype: str, place: Place) -> Work:
    """ReLU-gated; one bias for all neurons leaves about `active` of them above zero."""
    shared = {"up_weight": (f, k), "down_weight": (k, f), "gate_weight": (f, k), "gate_bias": (f,)}
    case = cases.Case("sparse_ffn", f"{m}x{k}x{f}", {"x": (k,)}, shared, count=m)
    rows, weights = tensors(place, case, dtype)
    before = rows["x"].float() @ weights["gate_weight"].float().t()
    threshold = before.flatten().topk(round(active * before.numel()) + 1).values[-1]
    weights["gate_bias"].fill_(-float(threshold))
    share = float((before + weights["gate_bias"].float() > 0).double().mean())

    def dense(x: Tensor, up_weight: Tensor, down_weight: Tensor, gate_weight: Tensor, gate_bias: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight), down_weight)

    size = DTYPES[dtype].itemsize
    rowwise = size * f * k * (1.0 + 2.0 * active)  # the gate, and the active neurons of up and down
    op = Op(case, rows, weights)
    return op_work(place, op, dtype, {"eager": dense}, 2.0 * m * k * f * (1 + 2 * active), rowwise, f"{share:.1%} active")


# ---- whole models ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def stock_model(name: str, dtype: str, device: torch.device) -> torch.nn.Module:
    with torch.device(device):
        model = shapes.reranker(shapes.RERANKERS[name])
    return model.to(DTYPES[dtype])


@functools.lru_cache(maxsize=2)
def patched_model(name: str, dtype: str, device: torch.device, mode: str) -> torch.nn.Module:
    ours = shapes.twin(stock_model(name, dtype, device))
    rk.patch(ours, mode=mode)
    return ours


@functools.lru_cache(maxsize=2)
def probe(name: str, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """A pair of 64 tokens, its logit in float64 on the CPU, and how far stock is from it."""
    stock = stock_model(name, dtype, device)
    ids = shapes.tokens(shapes.RERANKERS[name], (64,), seed=1)[0]
    wide = shapes.twin(stock)
    words = stock.base_model.embeddings.word_embeddings(ids[None].to(device)).cpu().double()  # type: ignore[union-attr,operator]
    wide.base_model.embeddings.word_embeddings = torch.nn.Identity()  # type: ignore[union-attr]
    for module in wide.modules():
        for held in (module._parameters, module._buffers):
            for key, t in list(held.items()):
                if t is not None:
                    t = t.detach().cpu()
                    t = t.double() if t.is_floating_point() else t
                    held[key] = torch.nn.Parameter(t, requires_grad=False) if held is module._parameters else t
    truth = wide(inputs_embeds=words).logits
    return ids, truth, float((stock(input_ids=ids[None].to(device)).logits.cpu().double() - truth).abs().max())


def model_gate(name: str, dtype: str, place: Place, mode: str, rows: list[Tensor]) -> None:
    """A pair's logit: alone = in the batch = in the reversed, left-padded batch; and as near to float64's as stock's."""
    shape, ours = shapes.RERANKERS[name], patched_model(name, dtype, place.device, mode)
    full = ours(**on(place, shapes.padded(shape, rows))).logits
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in sorted({by_length[0], by_length[len(rows) // 2], by_length[-1], 0, len(rows) - 1}):
        alone = ours(**on(place, shapes.padded(shape, [rows[i]]))).logits[0]
        invariants.same(alone, full[i], f"{name}, pair {i} alone against in the batch")
    few = [*reversed(by_length[: max(2, len(rows) // 4)])] if len(rows) > 1 else [0]
    turned = ours(**on(place, shapes.padded(shape, [rows[i] for i in few], left=True))).logits
    invariants.same(turned, full[few], f"{name}, {len(few)} pairs in another order, padded left, against in the batch")
    ids, truth, stock_error = probe(name, dtype, place.device)
    error = float((ours(input_ids=ids[None].to(place.device)).logits.cpu().double() - truth).abs().max())
    allowed = 4.0 * stock_error + LOGIT_SLACK[dtype]
    assert error <= allowed, f"{name}: logit {error:.2g} from float64's, stock {stock_error:.2g}, allowed {allowed:.2g}"


def on(place: Place, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.to(place.device) for n, t in batch.items()}


def model(name: str, lengths: Sequence[int], dtype: str, compiled: bool, place: Place) -> Work:
    shape, stock = shapes.RERANKERS[name], stock_model(name, dtype, place.device)
    rows = shapes.tokens(shape, tuple(lengths))
    batch = on(place, shapes.padded(shape, rows))
    mixed = min(lengths) != max(lengths)

    def ours(mode: str) -> Callable[[int], object]:
        # patched when its turn comes, so that a mode that cannot be patched costs its own cell only
        return lambda i: patched_model(name, dtype, place.device, mode)(**batch).logits

    def in_batches(of: int) -> Callable[[int], object]:
        ordered = sorted(rows, key=len, reverse=True)
        batches = [on(place, shapes.padded(shape, ordered[i : i + of])) for i in range(0, len(rows), of)]
        return lambda i: [stock(**b).logits for b in batches]

    theirs: dict[str, Callable[[int], object]] = {"padded" if mixed else "eager": lambda i: stock(**batch).logits}
    if compiled:
        theirs["compile"] = (lambda f: lambda i: f(**batch).logits)(torch.compile(stock, dynamic=False))
    elif mixed:
        theirs |= {"sorted 8s": in_batches(8), "one by one": in_batches(1)}
    else:
        theirs["no mask"] = lambda i: stock(input_ids=batch["input_ids"]).logits
    contestants = [
        contestant((b, mode), ours(mode), functools.partial(model_gate, name, dtype, place, mode, rows), graph=False)
        for b, mode in place.ways(dtype)
    ]
    contestants += [Contestant(n, f, graph=False) for n, f in theirs.items()]
    if place.device.type == "cuda" and not compiled and invariant_mode() is not None:
        contestants.append(Contestant("b-inv", next(iter(theirs.values())), invariant_mode, graph=False))  # type: ignore[arg-type]
    per_token = shape.layers * (4.0 * shape.hidden**2 + 2.0 * shape.hidden * shape.ffn)
    flops = 2.0 * per_token * sum(lengths) + 4.0 * shape.layers * shape.hidden * sum(n * n for n in lengths)
    return Work(contestants, flops, per_token * DTYPES[dtype].itemsize)


# ---- the list --------------------------------------------------------------------------------------------------------------


def jobs() -> dict[str, Job]:
    """Name -> case, in the order in which they run: what is least missed when time runs out comes last."""
    table: dict[str, Job] = {}

    def add(group: str, name: str, build: Callable[..., Work], *arguments: Any, quick: bool = False) -> None:
        table[name] = Job(group, quick, functools.partial(build, *arguments))

    mixed = f"32 of {min(MIXED)}..{max(MIXED)}"
    batches = {mixed: MIXED, "32x128": (128,) * 32, "32x512": (512,) * 32}
    for name in (BASE, LARGE):
        for dtype in ("fp16", "fp32", "bf16"):
            for words, lengths in (*batches.items(), ("1x128", (128,))):
                quick = name == BASE and (dtype == "fp16" or (words == mixed and dtype == "fp32"))
                add("model", f"{SHORT[name]} {words} {dtype}", model, name, lengths, dtype, False, quick=quick)
    for heads, d in ((12, 64), (16, 64), (8, 128)):
        for words, lengths in batches.items():
            for dtype in ("fp16", "fp32", "bf16"):
                quick = heads == 12 and dtype == "fp16"
                if dtype != "bf16" or heads == 12:
                    add("attention", f"attention {words} {heads}x{d} {dtype}", attention, lengths, heads, d, dtype, quick=quick)
    for m in (16384, 4096, 1024, 128, 16, 1):
        for k, n in ((768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 1024)):
            for dtype in ("fp16", "fp32", "bf16"):
                quick = (k, n) == (768, 3072) and (dtype == "fp16" or (m == 4096 and dtype == "fp32"))
                some = m in (16384, 128, 1)
                if dtype == "fp16" or (dtype == "fp32" and (some or k in (768, 3072))) or ((k, n) == (1024, 4096) and some):
                    add("linear", f"linear {m}x{k}x{n} {dtype}", linear, m, k, n, dtype, None, quick=quick)
    for dtype in ("fp16", "fp32"):
        add("linear", f"linear+gelu 16384x768x3072 {dtype}", linear, 16384, 768, 3072, dtype, "gelu", quick=dtype == "fp16")
        for m, k, n in ((128, 64, 128), (512, 64, 512), (512, 512, 64)):
            add("linear", f"bmm 384x{m}x{k}x{n} {dtype}", bmm, 384, m, k, n, dtype, quick=m == k and dtype == "fp16")
        for m in (1, 128):
            quick = dtype == "fp16"
            add("sparse_ffn", f"sparse_ffn {m}x4096x11008 {dtype}", sparse_ffn, m, 4096, 11008, 0.1, dtype, quick=quick)
        for d in (768, 1024):
            quick = dtype == "fp16" and d == 768
            add("rows", f"layer_norm+residual 16384x{d} {dtype}", layer_norm, 16384, d, dtype, quick=quick)
        for d in (128, 512):
            add("rows", f"softmax 49152x{d} {dtype}", softmax, 49152, d, dtype, quick=dtype == "fp16" and d == 512)
        add("rows", f"gelu 16384x3072 {dtype}", gelu, 16384, 3072, dtype, quick=dtype == "fp16")
    for words, lengths in batches.items():  # last: torch.compile takes its time
        add("model", f"base {words} fp16, compiled", model, BASE, lengths, "fp16", True)
    return table
