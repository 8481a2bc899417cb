"""The CPU's contests of single ops, ours beside eager PyTorch, and the bars they are held to.

Cases, truths and invariants are the tests' own: there is one table (tests/cases.py). Bars hold for float32, backend cpu and two
threads; half precision has rows and no bars.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

from clock import Contest, Rival

import cases
import invariants

LINEAR_BARS = {2048: 0.95, 512: 0.95, 128: 0.95, 64: 0.95, 16: None, 8: 1.0, 4: 1.0, 1: 1.0}  # by rows; of MKL's speed
ATTENTION_BAR = 1.2
ELEMENT_BAR = 1.5  # layer_norm, softmax, gelu
SPARSE_BAR, PREFILL_BAR = 4.0, 1.0  # one token with a tenth of the neurons active; 128 tokens
PROJECTIONS = (  # K, N of the encoders' layers: attention, up, down
    *((768, 768), (768, 3072), (3072, 768)),  # bge-reranker-base
    *((1024, 1024), (1024, 4096), (4096, 1024)),  # bge-reranker-large
)
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of a sparse FFN's neurons that are active
Theirs = Callable[..., object]
Build = Callable[[], Contest]


@dataclass(frozen=True)
class Held(cases.Case):
    """A case of the tests whose tensors are made once: gate and clock see the same ones."""

    dtype: torch.dtype = torch.float32
    held: dict[str, cases.Tensors] = field(default_factory=dict)

    def make_rows(self, dtype: torch.dtype, total: int | None = None, salt: str = "") -> cases.Tensors:
        if total not in (None, self.total) or salt:
            return super().make_rows(dtype, total, salt)
        if "rows" not in self.held:
            self.held["rows"] = super().make_rows(dtype)
        return self.held["rows"]

    def make_shared(self, dtype: torch.dtype) -> cases.Tensors:
        if "shared" not in self.held:
            self.held["shared"] = super().make_shared(dtype)
        return self.held["shared"]


def op_contest(case: Held, rival: str, theirs: Theirs, bar: float | None = None) -> Contest:
    """`theirs` is called with the case's rows and shared tensors by name. A bar is for float32."""
    rows, shared = case.make_rows(case.dtype), case.make_shared(case.dtype)

    def gate() -> None:
        invariants.right(case, case.dtype)
        invariants.batch_invariant(case, case.dtype)

    return Contest(
        functools.partial(case.call, rows, shared),
        [Rival(rival, functools.partial(theirs, **rows, **shared), bar if case.dtype == torch.float32 else None)],
        gate,
        {"group": case.op},
    )


def linear(m: int, k: int, n: int, dtype: torch.dtype = torch.float32, bar: float | None = None) -> Contest:
    case = Held("linear", f"{m}x{k}x{n}", {"x": (k,)}, {"weight": (n, k)}, count=m, dtype=dtype)
    return op_contest(case, "F.linear", lambda x, weight: F.linear(x, weight), bar)


def linear_gelu(m: int, k: int, n: int) -> Contest:
    shared = {"weight": (n, k), "bias": (n,)}
    case = Held("linear", f"+ gelu {m}x{k}x{n}", {"x": (k,)}, shared, {"activation": "gelu"}, count=m)
    return op_contest(case, "F.gelu(F.linear)", lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)))


def layer_norm(m: int, d: int, dtype: torch.dtype = torch.float32) -> Contest:
    rows = {"x": (d,), "residual": (d,)}
    case = Held("layer_norm", f"+ residual {m}x{d}", rows, {"weight": (d,), "bias": (d,)}, count=m, dtype=dtype)

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, (d,), weight, bias)

    return op_contest(case, "F.layer_norm(x + r)", theirs, ELEMENT_BAR)


def softmax(m: int, d: int) -> Contest:
    case = Held("softmax", f"{m}x{d}", {"x": (d,)}, options={"dim": -1}, count=m)
    return op_contest(case, "torch.softmax", lambda x: torch.softmax(x, -1), ELEMENT_BAR)


def gelu(m: int, d: int, dtype: torch.dtype = torch.float32) -> Contest:
    case = Held("activation", f"gelu {m}x{d}", {"x": (d,)}, options={"kind": "gelu"}, count=m, dtype=dtype)
    return op_contest(case, "F.gelu", lambda x: F.gelu(x), ELEMENT_BAR)


def attention(b: int, t: int, heads: int = 12, d: int = 64, dtype: torch.dtype = torch.float32) -> Contest:
    rows = dict.fromkeys("qkv", (heads, d))
    case = Held("attention", f"{b}x{t}, {heads} heads of {d}", rows, lengths=(t,) * b, dtype=dtype)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(z.view(b, t, heads, d).transpose(1, 2) for z in (q, k, v)))

    return op_contest(case, "F.sdpa", theirs, ATTENTION_BAR)


@functools.lru_cache(1)
def ffn_weights(k: int, f: int, gate: bool) -> cases.Tensors:
    """They take seconds to make, and serve every share and every number of tokens."""
    shared = {"up_weight": (f, k), "down_weight": (k, f), **({"gate_weight": (f, k)} if gate else {})}
    return Held("sparse_ffn", f"{k}x{f}", {}, shared).make_shared(torch.float32)


def sparse_ffn(k: int, f: int, *, gate: bool, m: int = 1, active: float = 0.1, bar: float | None = None) -> Contest:
    """A bias leaves round(active * m * f) of the m tokens' neurons above zero."""
    weights, relu = ffn_weights(k, f, gate), "gate" if gate else "up"
    label = f"{'ReGLU' if gate else 'ReLU'} {m}x{k}x{f}, {active:.0%} active"
    shapes = {n: tuple(w.shape) for n, w in weights.items()} | {f"{relu}_bias": (f,)}
    case = Held("sparse_ffn", label, {"x": (k,)}, shapes, count=m)
    before = case.make_rows(case.dtype)["x"].double() @ weights[f"{relu}_weight"].double().t()
    wanted = round(active * before.numel())
    ordered = before.flatten().sort(descending=True).values
    dropped = ordered[wanted] if wanted < len(ordered) else ordered[-1] - 1.0
    bias = torch.full((f,), -float(ordered[wanted - 1] + dropped) / 2)
    case.held["shared"] = {**weights, f"{relu}_bias": bias}

    def theirs(x: Tensor, up_weight: Tensor, down_weight: Tensor, **more: Tensor) -> Tensor:
        if gate:
            h = F.relu(F.linear(x, more["gate_weight"], more["gate_bias"])) * F.linear(x, up_weight)
        else:
            h = F.relu(F.linear(x, up_weight, more["up_bias"]))
        return F.linear(h, down_weight)

    contest = op_contest(case, "dense F.linear", theirs, bar)

    def checked() -> None:
        count = int((before + bias.double() > 0).sum())
        # of a million neurons one may stand so near its bias that float32 decides
        assert abs(count - wanted) <= before.numel() // 10**6, f"{case}: {count} neurons are active, want {wanted}"
        contest.gate()

    return Contest(contest.ours, contest.rivals, checked, {**contest.about, "tokens": m, "active": active})


HALVES = (torch.float16, torch.bfloat16)


def listed() -> Iterator[tuple[str, Build]]:
    """Name and how to build it; built when its turn comes, so that no two sets of weights are held at a time."""
    for k, n in PROJECTIONS:
        for m, bar in LINEAR_BARS.items():
            yield f"linear {m}x{k}x{n}", functools.partial(linear, m, k, n, bar=bar)
    for dtype in HALVES:
        yield f"linear 2048x768x3072 {str(dtype)[6:]}", functools.partial(linear, 2048, 768, 3072, dtype)
    yield "linear + gelu 2048x768x3072", functools.partial(linear_gelu, 2048, 768, 3072)
    for dtype in (torch.float32, torch.bfloat16):
        name = "" if dtype == torch.float32 else f" {str(dtype)[6:]}"
        for m, d in ((2048, 768), (2048, 1024), (128, 768)):  # the tensors of 128 rows fit into the caches
            yield f"layer_norm + residual {m}x{d}{name}", functools.partial(layer_norm, m, d, dtype)
        for m in (2048, 128):
            yield f"activation gelu {m}x3072{name}", functools.partial(gelu, m, 3072, dtype)
    for m, d in ((12288, 128), (6144, 512), (1536, 128)):
        yield f"softmax {m}x{d}", functools.partial(softmax, m, d)
    for heads, t in ((12, 128), (12, 256), (12, 384), (12, 512), (16, 512)):
        yield f"attention {2048 // t}x{t}, {heads} heads of 64", functools.partial(attention, 2048 // t, t, heads)
    for share in SHARES:
        bar = SPARSE_BAR if share == 0.1 else None
        build = functools.partial(sparse_ffn, 4096, 11008, gate=False, active=share, bar=bar)
        yield f"sparse_ffn ReLU 1x4096x11008, {share:.0%} active", build
    build = functools.partial(sparse_ffn, 4096, 11008, gate=False, m=128, bar=PREFILL_BAR)
    yield "sparse_ffn ReLU 128x4096x11008, 10% active", build
    build = functools.partial(sparse_ffn, 4096, 11008, gate=True, bar=SPARSE_BAR)
    yield "sparse_ffn ReGLU 1x4096x11008, 10% active", build
