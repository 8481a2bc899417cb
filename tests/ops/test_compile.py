"""torch.compile: a public op is one opaque call with equal bits, sizes may vary, and errors stay the op's own.

Most tests stop before Inductor, whose C++ compiler takes seconds a graph; what it adds is what it does around our ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
from cases import Case, numbers
from conftest import require
from invariants import all_same, same
from models import padded, rows, tiny
from rerank_kernels import HeadOutput, backends, patch
from rerank_kernels.backend import weights
from rerank_kernels.backend.modes import PORTABLE, TENSOR, of_the_model
from rerank_kernels.backend.registry import OPS
from rerank_kernels.ops import attention as attention_module
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.opaque import NAMESPACE, register
from rerank_kernels.ops.pooling import pool, score_head
from rerank_kernels.ops.sequences import Sequences
from rerank_kernels.ops.softmax import mean, softmax, sum  # noqa: A004
from rerank_kernels.ops.sparse_ffn import sparse_ffn

# of each op the case with the most arguments
CASES = [max((c for c in cases.CASES if c.op == op), key=lambda c: len(c.rows) + len(c.shared) + len(c.options)) for op in OPS]


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def arguments(case: Case, dtype: torch.dtype, total: int = 29) -> dict[str, Any]:
    own = {**case.make_rows(dtype, total), **case.make_shared(dtype)}
    if case.lengths:
        own["cu_seqlens"] = cases.offsets((4, total - 4, 0))
    return own


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def test_same_bits_and_dynamic_sizes(case: Case, dtype: torch.dtype) -> None:
    """One graph for any number of rows, without a graph break."""
    f = cases.FUNCTIONS[case.op]
    g = compiled(lambda own: f(**own, **case.options), dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for total in (29, 11, 23):  # no size of a case, which a compiler would take for the same size
            own = arguments(case, dtype, total)
            all_same(outputs(g(own)), outputs(f(**own, **case.options)), f"{case} with {total} rows, compiled against eager")


def test_what_is_registered_is_what_happens(case: Case) -> None:
    """PyTorch's own check: no argument is changed or handed out, shapes, strides and dtypes are those of the fake."""
    own = {**arguments(case, torch.float32), **case.options}
    if case.op in ("sum", "mean"):
        own["dim"] = [own["dim"]]
    assert register(case.op)
    op = getattr(getattr(torch.ops, NAMESPACE), case.op).default
    taken = op._schema.arguments
    positional = tuple(own.pop(a.name) for a in taken if not a.kwarg_only and not a.has_default_value())
    torch.library.opcheck(op, positional, {a.name: own[a.name] for a in taken if a.name in own})


def test_other_forms() -> None:
    """What the table of cases does not say: masks, other dimensions, the names of a head's results."""
    x, mask = numbers("x", (3, 7, 2, 8), torch.float32), torch.ones(3, 7, dtype=torch.bool)
    mask[1, :4] = False
    same(compiled(lambda x, m: attention(x, x, x, mask=m, window=(2, -1)))(x, mask),
         attention(x, x, x, mask=mask, window=(2, -1)), "attention, padded")  # fmt: skip
    same(compiled(lambda x: attention(x, x, x, scale=0.5))(x), attention(x, x, x, scale=0.5), "attention without a mask")
    same(compiled(lambda x: attention(x, x, x, softcap=0.5))(x), attention(x, x, x, softcap=0.5), "attention with a softcap")
    y = x.flatten(2)
    same(compiled(lambda y, m: pool(y, "mean", mask=m))(y, mask), pool(y, "mean", mask=mask), "pool, padded")
    same(compiled(lambda y: softmax(y, 1))(y), softmax(y, 1), "softmax over the middle")
    same(compiled(lambda y: sum(y, (0, 2), keepdim=True))(y), sum(y, (0, 2), keepdim=True), "sum over two")
    same(compiled(lambda y: mean(y, 0))(y), mean(y, 0), "mean over the first")
    head = compiled(lambda p, w: score_head(p, w))(y[0], y[1, :2])
    assert isinstance(head, HeadOutput)
    same(head.complement, score_head(y[0], y[1, :2]).complement, "complement")


def test_inductor() -> None:
    """Inductor makes its own code of what stands around, and may lay tensors out as it likes; our ops do not see it."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        return softmax(linear(x.transpose(0, 1), w) * 2.0, 0)

    x, w = numbers("x", (6, 40), torch.float32).t(), numbers("w", (9, 6), torch.float32)
    same(compiled(f, "inductor", dynamic=True)(x.t(), w), f(x.t(), w), "compiled by Inductor")


def test_weights_are_laid_out_once() -> None:
    """The op gets the caller's own weights, so the layout made of one is found again."""
    require("cpu")
    up, down = (torch.nn.Parameter(numbers(name, s, torch.float32)) for name, s in (("up", (40, 33)), ("down", (9, 40))))
    x = numbers("x", (1, 33), torch.float32)
    g = compiled(lambda x: sparse_ffn(x, up, down))
    want = g(x)
    kept = weights._kept["transposed"][down].layout
    same(g(x), want, "again")
    assert weights._kept["transposed"][down].layout is kept and not want.requires_grad
    with torch.no_grad():
        down.mul_(2.0)
    same(g(x), sparse_ffn(x, up, down), "after an in-place change")
    same(g(x), want * 2.0, "after a change that doubles")


def test_errors_are_the_ops_own() -> None:
    x, w = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(Exception, match=r"linear: weight must be \[N, K\], got \[3\]"):
        compiled(linear)(x, w[0])
    with pytest.raises(ValueError, match=r"linear: weight must be \[N, 3\], got \[4, 5\]"):
        compiled(linear)(x, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"linear: activation must be one of .*'gelu'.* got 'swish'"):
        compiled(lambda x, w: linear(x, w, activation="swish"))(x, w)
    with pytest.raises(TypeError, match=r"linear: x must be float32, float16 or bfloat16, got torch.int64"):
        compiled(linear)(x.long(), w)
    with pytest.raises(ValueError, match=r"cu_seqlens must be ascending from 0 to 2"):
        compiled(lambda x, cu: pool(x, "cls", cu_seqlens=cu))(x, torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"linear: x asks for gradients and rerank_kernels is forward only"):
        compiled(lambda x, w: linear(x * 2, w), "eager")(x.requires_grad_(), w)


def test_keys_of_their_own_and_sequences() -> None:
    """What only the host knows of Sequences does not pass: the op inside checks their offsets once more."""
    q, k = numbers("q", (5, 2, 16), torch.float32), numbers("k", (9, 2, 16), torch.float32)
    cu, cu_k = cases.offsets((2, 3)), cases.offsets((4, 5))
    want = attention(q, k, k, cu_seqlens=cu, cu_seqlens_k=cu_k, causal=True)
    same(compiled(lambda: attention(q, k, k, cu_seqlens=cu, cu_seqlens_k=cu_k, causal=True))(), want, "compiled")
    own, keys = Sequences.from_cu_seqlens(cu, 5), Sequences.from_cu_seqlens(cu_k, 9)
    same(compiled(lambda: attention(q, k, k, cu_seqlens=own, cu_seqlens_k=keys, causal=True))(), want, "Sequences, compiled")
    same(compiled(lambda: pool(q[:, 0], "mean", cu_seqlens=own))(), pool(q[:, 0], "mean", cu_seqlens=cu), "pool, compiled")


def test_mode_is_asked_when_the_graph_runs() -> None:
    """A graph compiled inside one model's forward is no other's: the mode around is looked at each time."""
    x = torch.zeros(2, 4, dtype=torch.float16)
    g = compiled(lambda x: linear(x, x))
    g(x)
    with of_the_model(TENSOR), pytest.raises(Exception, match="mode 'tensor' needs a GPU's tensor cores"):
        g(x)
    assert attention_module.modes._of_the_model.get() == PORTABLE and "linear" in backends()


def test_a_patched_model_keeps_its_bits() -> None:
    model = tiny("bert")
    patch(model)
    batch = padded(rows((5, 9)), 0)
    want = model(**batch).logits
    same(torch.compile(lambda **b: model(**b).logits * 1.0, backend="aot_eager")(**batch), want, "around a patched model")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a patched model runs as it is"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch)
