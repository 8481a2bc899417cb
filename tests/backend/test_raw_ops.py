"""The library's own ops, called with what no caller should give: an error that names the argument, or the right bits.

rk.linear and its like check before; here is what stands behind them (csrc/checks.h). `make sanitize` runs the same calls for
longer, where an access outside of an array is seen (tests/sanitize).
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rerank_kernels as rk
from conftest import require
from invariants import same
from sanitize import calls, stress

HERE = Path(__file__).parents[1]
CSRC = HERE.parent / "csrc"


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require("cpu")


HUGE = torch.empty(2**62, 0)


def ops() -> Any:
    return torch.ops.rerank_kernels


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **other: Any) -> Tensor:
    return ops().linear(x, weight, bias, other.get("kind", 0), other.get("residual"), other.get("dtype", torch.float32))


# ---- by name ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("call", [linear, rk.linear], ids=["op", "rk"])
def test_a_freed_tensor_is_named(call: Callable[..., Tensor], name: str) -> None:
    """A freed bias was silently no bias: its pointer is null, as an absent one's was."""
    given = {"x": numbers(4, 64), "weight": numbers(8, 64), "bias": numbers(8), "residual": numbers(4, 8)}
    given[name] = freed(given[name])
    with pytest.raises((RuntimeError, ValueError), match=rf"linear: {name} must .*memory for its \d+ elements.* 0 bytes"):
        call(**given)


@pytest.mark.parametrize("shape", [(6, 2, 8), (2, 3, 2, 8)], ids=["packed", "padded"])
def test_a_freed_tensor_reaches_no_operation_of_pytorch(shape: tuple[int, ...]) -> None:
    q, cu = numbers(*shape), torch.tensor([0, 6], dtype=torch.int32)
    where: dict[str, Any] = {"cu_seqlens": cu} if len(shape) == 3 else {"mask": torch.ones(2, 3)[:, :, None][..., 0].bool()}
    with pytest.raises(ValueError, match="attention: k must be a tensor with memory for its 96 elements, got a storage of 0"):
        rk.attention(q, freed(q), q, **where)
    with pytest.raises(ValueError, match=r"attention: (mask|cu_seqlens) must be a tensor with memory"):
        rk.attention(q, q, q, **{name: freed(t) for name, t in where.items()})
    with pytest.raises(ValueError, match="linear: x must be a tensor with memory"):
        turned = numbers(64, 4).t()
        turned.untyped_storage().resize_(0)
        rk.linear(turned, numbers(8, 64))


def test_zeros_without_memory_are_named_and_the_advice_works() -> None:
    x, zero, w = numbers(4, 64), torch._efficientzerotensor((4, 64)), numbers(8, 64)
    with pytest.raises(RuntimeError, match=r"linear: x must be contiguous, got .*; \.clone\(memory_format=torch") as said:
        rk.linear(zero, w)
    advice = re.search(r"\.clone\(.*\)", str(said.value))
    assert advice is not None
    laid_out = eval(f"zero{advice[0]}")
    same(rk.linear(laid_out, w), rk.linear(torch.zeros(4, 64), w), "zeros")
    wide = x.t().contiguous().t()
    with pytest.raises(RuntimeError, match="linear: x must be contiguous"):
        linear(wide, w)
    same(linear(eval(f"wide{advice[0]}"), w), linear(x, w), "laid out")


def test_views_that_pytorch_resolves_are_served() -> None:
    x, w = numbers(4, 64), numbers(8, 64)
    same(rk.linear(torch._neg_view(x), w), rk.linear(-x, w), "a negative view")
    q = numbers(6, 2, 8)
    with pytest.raises(RuntimeError, match="attention: q must have its features side by side, got"):
        rk.attention(torch._efficientzerotensor((6, 2, 8)), q, q, cu_seqlens=torch.tensor([0, 6], dtype=torch.int32))


@pytest.mark.parametrize(
    ("said", "call"),
    [
        (r"linear: weight must be \[N, K = 64\], got \[8, 63\]", lambda x: linear(x, numbers(8, 63))),
        (r"linear: bias must be \[N = 8\], got \[7\]", lambda x: linear(x, numbers(8, 64), numbers(7))),
        (r"linear: residual must be \[M = 4, N = 8\], got \[8\]", lambda x: linear(x, numbers(8, 64), residual=numbers(8))),
        (r"linear: x must be \[M, K\], got \[1, 4, 64\]", lambda x: linear(x[None], numbers(8, 64))),
        (r"linear: weight must be float32, float16 or bfloat16, got float64", lambda x: linear(x, numbers(8, 64).double())),
        (r"linear: out_dtype must be float32, .* got int64", lambda x: linear(x, numbers(8, 64), dtype=torch.int64)),
        (r"linear: the activation must be from 0 to 10, got 11", lambda x: linear(x, numbers(8, 64), kind=11)),
        (r"linear: the activation must be .*, got 4294967297", lambda x: linear(x, numbers(8, 64), kind=2**32 + 1)),
        (r"activation: the activation must be .*, got -1", lambda x: ops().activation(x, -1, None, torch.float32)),
        (r"linear: N and K must be > 0", lambda x: linear(x[:, :0], numbers(8, 0))),
        (r"layer_norm: residual must be \[R = 4, D = 64\]", lambda x: ops().layer_norm(x, x[0], None, 1e-5, x[:3])),
        (r"layer_norm: x must be \[R, D\] with D > 0", lambda x: ops().layer_norm(HUGE, x[0, :0], None, 1e-5, None)),
        (r"softmax: x must be \[R, D\], got \[64\]", lambda x: ops().softmax(x[0])),
        (r"bmm: b must be \[B = 2, N, K = 32\]", lambda x: ops().bmm(x.view(2, 4, 32), x.view(4, 2, 32), torch.float32)),
        (r"score_head: dense_bias must be left out", lambda x: ops().score_head(x, None, x[0], 0, x, None)),
        (r"pool: cu_seqlens must be int32, got int64", lambda x: ops().pool(x, torch.tensor([0, 4]), True, torch.float32)),
        (r"hold_threads: count must be what began", lambda x: ops().hold_threads(2**40)),
    ],
)  # fmt: skip
def test_a_misused_op_says_what_it_wanted(said: str, call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=said):
        call(numbers(4, 64))


def attention(**other: Any) -> Tensor:
    q = numbers(6, 4, 8)
    given = {"q": q, "k": q, "v": q, "cu": torch.tensor([0, 2, 6], dtype=torch.int32), "cu_k": None} | other
    return ops().attention(*given.values()) if "left" in given else ops().attention(*given.values(), -1, -1, 0.5)


@pytest.mark.parametrize(
    ("said", "other"),
    [
        (r"H must be a multiple of H_kv, and D > 0, got H = 4, H_kv = 3", {"k": numbers(6, 3, 8), "v": numbers(6, 3, 8)}),
        (r"v must be \[total_k = 6, H_kv = 4, D = 8\], got \[6, 2, 8\]", {"v": numbers(6, 2, 8)}),
        (r"k must be \[total_k, H_kv, D = 8\]", {"k": numbers(6, 4, 9)}),
        (r"k and v must be of the dtype of q; convert them with \.to\(q\.dtype\)", {"k": numbers(6, 4, 8).half()}),
        (r"left and right must be >= 0, or -1", {"left": -2, "right": -1, "scale": 0.5}),
        (r"scale must be finite", {"left": -1, "right": -1, "scale": 1e300}),
        (r"softcap must be finite and > 0 .*, or 0 for none, got -1", {"left": -1, "right": -1, "scale": 0.5, "softcap": -1.0}),
        (r"softcap must be finite", {"left": -1, "right": -1, "scale": 0.5, "softcap": 1e-50}),
        (r"cu_seqlens_k must be \[begins and ends = 2, B = 2\]", {"cu_k": torch.zeros(2, 3, dtype=torch.int32)}),
        (r"cu_seqlens_k must lie between 0 and 6", {"cu_k": torch.tensor([[0, 3], [4, 7]], dtype=torch.int32)}),
        (r"cu_seqlens_k must lie between 0 and 6", {"cu_k": torch.tensor([[0, 3], [4, 2]], dtype=torch.int32)}),
        (r"cu_seqlens_k must lie between 0 and 6", {"cu_k": torch.tensor([[-1, 3], [4, 6]], dtype=torch.int32)}),
        (r"cu_seqlens must ascend from 0 to 6", {"cu": torch.tensor([0, 7, 6], dtype=torch.int32)}),
        (r"cu_seqlens must ascend from 0 to 6", {"cu": torch.tensor([0, -(2**31), 6], dtype=torch.int32)}),
        (r"cu_seqlens_k must have as many sequences", {"cu_k": torch.tensor([0, 6], dtype=torch.int32)}),
        (r"k and v must have as many tokens as q, or", {"k": numbers(5, 4, 8), "v": numbers(5, 4, 8)}),
    ],
)  # fmt: skip
def test_a_misused_attention_says_what_it_wanted(said: str, other: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="attention: " + said):
        attention(**other)


def test_a_window_of_any_width_is_one_without_limit() -> None:
    """Places are added to it: 2^63 - 1 and one more is no place."""
    want = attention(left=-1, right=-1, scale=0.5)
    for wide in (6, 2**31 - 1, 2**62, 2**63 - 1):
        same(attention(left=wide, right=wide, scale=0.5), want, f"a window of {wide}")


# ---- memory that changes meanwhile ------------------------------------------------------------------------------------------


def test_offsets_that_change_during_a_call_are_read_once() -> None:
    """In a process of its own: checked in one state and read in another, they led outside of the array."""
    program = HERE / "sanitize" / "changing.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    refused, served = map(int, done.stdout.split())
    assert refused > 0 and served > 0, "the offsets never changed at the right time: the test has no power"


# ---- presence ---------------------------------------------------------------------------------------------------------------

POINTER_AS_ANSWER = re.compile(
    r"!\s*[\w.]+\.data\b(?!\()|\b[\w.]+\.data\s*(\?|&&|\|\||[!=]=)|\(\s*[\w.]+\.data\s*\)\s*[\w{]|\b(if|while) \([\w.]+\.data\)"
)


def asks_a_pointer(text: str) -> Iterator[str]:
    for line in text.splitlines():
        code = line.partition("//")[0]
        if POINTER_AS_ANSWER.search(code):
            yield line.strip()


def test_no_kernel_takes_a_null_pointer_for_an_absent_argument() -> None:
    sources = [p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh") and p.name != "checks.h"]
    assert len(sources) > 30
    assert {p.name: said for p in sources if (said := list(asks_a_pointer(p.read_text())))} == {}


@pytest.mark.parametrize("line", ["if (g.bias.data) {", "y = a.bias.data ? 1 : 2;", "if (!a.residual.data) return;"])
def test_the_search_for_such_a_pointer_finds_it(line: str) -> None:
    assert list(asks_a_pointer(line)) == [line]
    assert list(asks_a_pointer(line.replace(".data", ".given"))) == []


# ---- a short share of what make sanitize runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["hostile", "guarded"])
def test_calls_of_any_kind_stay_inside(what: str) -> None:
    """In a process of its own: what goes wrong here ends it."""
    command = [sys.executable, str(HERE / "sanitize" / "stress.py"), "--seeds", "1:5", f"--{what}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"SAY=1 {' '.join(command)}\n{done.stderr[-3000:]}"
    counts = json.loads(done.stdout)
    if what == "guarded":
        assert set(counts["kinds"]) == set(calls.Made.OPS)
    else:
        assert counts["refused"] > counts["served"] > 0
        assert {*counts["kinds"]} >= {kind.__name__ for kind in calls.HOSTILE}


@pytest.fixture
def bad() -> calls.Hostile:
    call = calls.Made(1).call("softmax")
    while not call.arguments[0].numel():
        call = calls.Made(random.randrange(100)).call("softmax")
    return next(calls.hostile(call, random.Random(1)))


def test_an_op_that_serves_what_it_must_refuse_is_found(bad: calls.Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bad.kind == "freed" and bad.must_fail and stress.outcome(bad) == "refused"
    monkeypatch.setattr(calls.Call, "run", lambda self: (torch.zeros(3),))
    with pytest.raises(AssertionError, match="is served, with freed"):
        stress.outcome(bad)


def test_other_bits_are_found(bad: calls.Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((torch.zeros(3), torch.ones(3)) * 9)
    monkeypatch.setattr(calls.Call, "run", lambda self: (next(answers),))
    with pytest.raises(AssertionError, match="other bits than with a plain copy"):
        stress.outcome(calls.Hostile("smaller", bad.call, bad.call))
    with pytest.raises(AssertionError, match="has other bits than"):
        stress.right(bad.call, 2)
