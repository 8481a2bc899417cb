"""Calls of the library's own ops, made of a seed: well-formed ones of odd shapes, strides and offsets, and hostile ones.

A hostile call is a well-formed one in which one argument was replaced by something that no caller should give. It must be an
error, or have the bits of the same call with a plain copy of that argument.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Place = Callable[[Tensor], Tensor]  # the same values, in memory of the caller's choice


@dataclass
class Call:
    op: str
    arguments: list[Any]

    def run(self) -> tuple[Tensor, ...]:
        out = getattr(torch.ops.rerank_kernels, self.op)(*self.arguments)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def tensors(self) -> list[int]:
        return [i for i, a in enumerate(self.arguments) if isinstance(a, Tensor)]

    def __str__(self) -> str:
        def said(a: Any) -> str:
            return f"{str(a.dtype)[6:]}{list(a.shape)}" if isinstance(a, Tensor) else repr(a)

        return f"{self.op}({', '.join(said(a) for a in self.arguments)})"


class Made:
    """The arguments of one call after another."""

    def __init__(self, seed: int, place: Place = lambda t: t, largest: int = 1) -> None:
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.place, self.largest = place, largest

    def size(self, most: int) -> int:
        """From 1: sizes beside a register's, a panel's and a chunk's are as likely as all others."""
        near = [n + d for n in (1, 8, 16, 32, 64, 128, 512, 1024) for d in (-1, 0, 1) if 1 <= n + d <= most]
        return self.random.choice([self.random.randint(1, most), self.random.choice(near)])

    def dtype(self) -> torch.dtype:
        return self.random.choice(FLOATS)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.numbers)
        if values.numel() and self.random.random() < 0.05:
            values.view(-1)[self.random.randrange(values.numel())] = self.random.choice([float("inf"), float("nan"), -0.0])
        return self.place(values.to(dtype or self.dtype()))

    def perhaps(self, *shape: int) -> Tensor | None:
        return self.floats(*shape) if self.random.random() < 0.5 else None

    def offsets(self, lengths: list[int]) -> Tensor:
        return self.place(torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32))

    def lengths(self) -> list[int]:
        return [self.random.choice([0, 1, self.random.randint(0, 70)]) for _ in range(self.random.randint(0, 5))]

    # ---- one op each; M may be 0 ---------------------------------------------------------------------------------------------

    def rows(self) -> int:
        return self.random.choice([0, 1, 2, 3, self.random.randint(1, 40 * self.largest)])

    def linear(self) -> list[Any]:
        m, n, k = self.rows(), self.size(150), self.size(700)
        tail = [self.random.randrange(11), self.perhaps(m, n), self.dtype()]
        return [self.floats(m, k), self.floats(n, k), self.perhaps(n), *tail]

    def bmm(self) -> list[Any]:
        b, m, n, k = self.random.randint(0, 3), self.rows(), self.size(80), self.size(130)
        return [self.floats(b, m, k), self.floats(b, n, k), self.dtype()]

    def activation(self) -> list[Any]:
        shape = [self.size(9) for _ in range(self.random.randint(0, 4))]
        return [self.floats(*shape), self.random.randrange(11), self.perhaps(*shape), self.dtype()]

    def layer_norm(self) -> list[Any]:
        r, d = self.rows(), self.size(1100)
        return [self.floats(r, d), self.floats(d), self.perhaps(d), 1e-5, self.perhaps(r, d)]

    def rms_norm(self) -> list[Any]:
        r, d = self.rows(), self.size(1100)
        flags = [self.random.random() < 0.5, self.random.random() < 0.5]
        return [self.floats(r, d), self.floats(d), 1e-6, *flags, self.perhaps(r, d)]

    def normalize(self) -> list[Any]:
        return [self.floats(self.rows(), self.size(1100)), 1e-12]

    def softmax(self) -> list[Any]:
        return [self.floats(self.rows(), self.size(1100))]

    sum = mean = softmax

    def attention(self) -> list[Any]:
        heads, group, d = self.random.randint(1, 3), self.random.randint(1, 3), self.size(70)
        lengths, dtype = self.lengths(), self.dtype()
        more = self.random.choice([9, 150])  # keys than queries
        own = [max(0, n + self.random.randint(-3, more)) for n in lengths] if self.random.random() < 0.5 else None

        def heads_of(tokens: int, count: int) -> Tensor:
            """Of their own, or a slice out of a wider array, as a fused projection gives them."""
            if self.random.random() < 0.5:
                return self.floats(tokens, count, d, dtype=dtype)
            before, after = self.random.randint(0, 2), self.random.randint(0, 2)
            whole = self.floats(tokens, before + count + after, d, dtype=dtype)
            return whole[:, before : before + count]

        keys = sum(lengths if own is None else own)
        q, k, v = heads_of(sum(lengths), heads * group), heads_of(keys, heads), heads_of(keys, heads)
        window = [self.random.choice([-1, 0, 3, 100, 2**62]) for _ in range(2)]
        cu_k = None if own is None else self.offsets(own)
        if cu_k is not None and self.random.random() < 0.5:  # where each begins and ends
            cu_k = self.place(torch.stack([cu_k[:-1], cu_k[1:]]))
        scores = [self.random.choice([0.125, 1.0, -2.0]), self.random.choice([0.0, 0.0, 0.5, 50.0])]
        return [q, k, v, self.offsets(lengths), cu_k, *window, *scores]

    def rotary(self) -> list[Any]:
        tokens, heads, d = self.rows(), self.random.randint(1, 4), self.size(140)
        before, pairs = self.random.randint(0, 2), self.random.randint(0, d // 2)
        x = self.floats(tokens, before + heads, d)[:, before:]
        return [x, self.floats(tokens, pairs), self.floats(tokens, pairs), self.random.random() < 0.5]

    def pool(self) -> list[Any]:
        lengths = self.lengths()
        return [self.floats(sum(lengths), self.size(130)), self.offsets(lengths), self.random.random() < 0.5, self.dtype()]

    def score_head(self) -> list[Any]:
        b, d, p, out = self.rows(), self.size(130), self.size(70), self.random.randint(1, 3)
        dense = self.random.random() < 0.5
        layer = [self.floats(p, d), self.perhaps(p)] if dense else [None, None]
        return [self.floats(b, d), *layer, self.random.randrange(11), self.floats(out, p if dense else d), self.perhaps(out)]

    def transpose_weight(self) -> list[Any]:
        w = self.floats(self.size(90), self.size(90))
        return [w.t() if self.random.random() < 0.5 else w]

    def sparse_ffn(self) -> list[Any]:
        from rerank_kernels.backend import weights

        m, k, f, d = self.random.randint(0, 3), self.size(200), self.size(600), self.size(300)
        screened = self.random.random() < 0.6
        x, first = self.floats(m, k), self.floats(f, k, dtype=torch.float32 if screened else None).nan_to_num(0.0, 0.0, 0.0)
        copies = [self.place(t) for t in weights._screened(first)] if screened else [None, None, None]
        up = [self.floats(f, k), self.perhaps(f)] if self.random.random() < 0.5 else [None, None]
        residual = self.floats(m, d) if self.random.random() < 0.3 else None
        candidates = self.place(torch.rand(m, f, generator=self.numbers) < 0.3) if self.random.random() < 0.3 else None
        how = [self.random.choice([0.0, 0.01]), self.random.random() < 0.3, up[0] is not None and self.random.random() < 0.3]
        down = [self.floats(f, d), self.perhaps(d), residual, candidates]
        return [x, self.place(first), self.perhaps(f), *copies, *up, *down, *how]

    OPS = (
        *("linear", "bmm", "activation", "layer_norm", "rms_norm", "normalize", "softmax", "sum", "mean"),
        *("attention", "rotary", "pool", "score_head", "transpose_weight", "sparse_ffn"),
    )

    def call(self, op: str) -> Call:
        return Call(op, getattr(self, op)())


# ---- what no caller should give ---------------------------------------------------------------------------------------------


def freed(t: Tensor, _: random.Random) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def half_freed(t: Tensor, _: random.Random) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def all_zeros_without_memory(t: Tensor, _: random.Random) -> Tensor:
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


def negative_view(t: Tensor, _: random.Random) -> Tensor:
    return torch._neg_view(t) if t.is_floating_point() else t


def one_value_shown_as_all(t: Tensor, _: random.Random) -> Tensor:
    return t.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t


def other_strides(t: Tensor, _: random.Random) -> Tensor:
    if t.dim() < 2:
        return torch.stack((t, t), -1)[..., 0]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def other_dtype(t: Tensor, r: random.Random) -> Tensor:
    return t.to(r.choice([torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int16]))


def other_device(t: Tensor, _: random.Random) -> Tensor:
    return t.to("meta")


def sparse(t: Tensor, _: random.Random) -> Tensor:
    return t.to_sparse()


def another_library_s(t: Tensor, _: random.Random) -> Tensor:
    return t.float().to_mkldnn() if t.is_floating_point() and t.numel() and t.dim() else t


def a_dimension_more(t: Tensor, _: random.Random) -> Tensor:
    return t.unsqueeze(0)


def a_dimension_less(t: Tensor, _: random.Random) -> Tensor:
    return t.flatten() if t.dim() > 1 else t.sum()


def smaller(t: Tensor, r: random.Random) -> Tensor:
    dim = r.randrange(t.dim()) if t.dim() else 0
    return t.narrow(dim, 0, t.shape[dim] // 2).clone() if t.dim() else t


def larger(t: Tensor, r: random.Random) -> Tensor:
    return torch.cat((t, t), r.randrange(t.dim())) if t.dim() else t


def empty(t: Tensor, r: random.Random) -> Tensor:
    return t.narrow(r.randrange(t.dim()), 0, 0).clone() if t.dim() else t


def huge_and_empty(t: Tensor, r: random.Random) -> Tensor:
    if t.dim() < 2:
        return t
    shape = [0] * t.dim()
    shape[r.randrange(t.dim())] = r.choice([0, 2**62])
    return t.new_empty(shape)


def beside_its_place(t: Tensor, _: random.Random) -> Tensor:
    if not t.numel():
        return t
    memory = bytearray(b"\0" + t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)


class _Wrapper(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def a_wrapper(t: Tensor, _: random.Random) -> Tensor:
    return Tensor._make_wrapper_subclass(_Wrapper, t.shape, dtype=t.dtype, device=t.device)


def wild_offsets(t: Tensor, r: random.Random) -> Tensor:
    if t.dtype != torch.int32:
        return t
    wild = [r.choice([0, -1, 1, 2**31 - 1, -(2**31), 5]) for _ in range(t.numel())]
    return torch.tensor(wild, dtype=torch.int32).view(t.shape)


HOSTILE = (
    *(freed, half_freed, all_zeros_without_memory, negative_view, one_value_shown_as_all, other_strides, other_dtype),
    *(other_device, sparse, another_library_s, a_dimension_more, a_dimension_less, smaller, larger, empty, huge_and_empty),
    *(beside_its_place, a_wrapper, wild_offsets),
)
# of these there is no plain copy
WITHOUT_VALUES = (freed, half_freed, other_device, a_wrapper, huge_and_empty)


def numbers_no_caller_gives(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [-1, -2, 11, 2**31, 2**40, -(2**62), 2**63 - 1]
    if isinstance(value, float):
        return [0.0, -1.0, float("nan"), float("inf"), 1e300]
    return [torch.float64, torch.int32, torch.bool, torch.complex64] if isinstance(value, torch.dtype) else []


@dataclass
class Hostile:
    kind: str
    call: Call
    plain: Call | None = None  # with a plain copy of what was replaced
    must_fail: bool = False


def hostile(call: Call, rng: random.Random) -> Iterator[Hostile]:
    offsets = [i for i in call.tensors() if call.arguments[i].dtype == torch.int32]
    for kind in HOSTILE:
        at = rng.choice(call.tensors() if kind is not wild_offsets else offsets or call.tensors())
        was = call.arguments[at]
        bad = kind(was, rng)
        if bad is was:
            continue
        made = Hostile(kind.__name__, _with(call, at, bad), must_fail=kind in WITHOUT_VALUES and bad.numel() > 0)
        if kind not in WITHOUT_VALUES:
            copy = bad.to_dense() if bad.layout != torch.strided else bad.resolve_neg()
            made.plain = _with(call, at, copy.clone(memory_format=torch.contiguous_format))
        yield made
    for at, value in enumerate(call.arguments):
        for bad in numbers_no_caller_gives(value):
            yield Hostile("a_number", _with(call, at, bad))


def _with(call: Call, at: int, value: Any) -> Call:
    return Call(call.op, [*call.arguments[:at], value, *call.arguments[at + 1 :]])
