"""Calls of PyTorch's ops that rk.invariant routes, as functions of rows, and what is asked of each: `hold`.

A row of x has the bits that it has alone; in any memory layout; with any number of threads; and is near float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rerank_kernels as rk
from rerank_kernels.backend import registry

ROWS = 7
# On the pytorch backend a scope promises less.
NEEDS = pytest.mark.skipif(registry.missing("cpu") is not None, reason="backend cpu: the C++ library is missing")
Case = Callable[[Tensor], Tensor]  # [ROWS, 6, 70] -> [ROWS, ...]
K = 70


def number(*shape: int, seed: int = 5, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


W, B, SQUARE = number(33, K, scale=0.1), number(33, seed=6), number(K, K, seed=7, scale=0.1)
CONV1, CONV2, DEEP = number(8, K, 3, seed=8, scale=0.1), number(5, 1, 3, 7, seed=9), number(K, 1, 3, seed=10)


def like(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype)


CASES: dict[str, Case] = {
    "linear": lambda x: F.linear(x, like(W, x), like(B, x)),
    "mm": lambda x: torch.mm(x[:, 0], like(SQUARE, x)),
    "mm, transposed": lambda x: torch.mm(x[:, 0], like(W, x).t()),
    "mv": lambda x: torch.mv(x[:, 0], like(SQUARE[0], x)),
    "matmul": lambda x: torch.matmul(x, x.transpose(1, 2)),
    "bmm": lambda x: torch.bmm(x, x.transpose(1, 2)),
    "addmm": lambda x: torch.addmm(like(B, x), x[:, 0], like(W, x).t()),
    "addmm, alpha and beta": lambda x: torch.addmm(like(B, x), x[:, 0], like(W, x).t(), beta=0.3, alpha=1.7),
    "addmm, beta of nan": lambda x: torch.addmm(torch.full_like(like(B, x), torch.nan), x[:, 0], like(W, x).t(), beta=0),
    "addmv": lambda x: torch.addmv(x[:, 0, 0], x[:, 0], like(SQUARE[0], x), beta=0.5, alpha=3.0),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :6], x, x.transpose(1, 2), beta=0.5, alpha=0.1),
    "einsum": lambda x: torch.einsum("btk,nk->bnt", x, like(W, x)),
    "conv1d": lambda x: F.conv1d(x.transpose(1, 2), like(CONV1, x), padding=1),
    "conv1d, by channel": lambda x: F.conv1d(x.transpose(1, 2), like(DEEP, x), like(SQUARE[0], x), groups=K),
    "conv2d": lambda x: F.conv2d(x[:, None], like(CONV2, x), stride=(1, 7), dilation=(2, 1)),
    "softmax": lambda x: x.softmax(-1),
    "softmax, first": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "sum": lambda x: x.sum(-1),
    "sum of several": lambda x: x.sum((1, 2)),
    "mean": lambda x: x.mean(1),
    "mean of several": lambda x: x.mean((2, 1), keepdim=True),
    "var": lambda x: x.var(-1),
    "std": lambda x: x.std((1, 2), correction=0),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "norm, 1": lambda x: x.norm(p=1, dim=(1, 2)),
    "cumsum": lambda x: x.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x, (K,), like(SQUARE[0], x), like(SQUARE[1], x)),
    "layer_norm, no weight": lambda x: F.layer_norm(x, (6, K)),
    "group_norm": lambda x: F.group_norm(x, 3),
    "rms_norm": lambda x: F.rms_norm(x, (K,), like(SQUARE[0], x), 1e-6),
    "batch_norm": lambda x: F.batch_norm(x, like(SQUARE[0, :6], x), like(SQUARE[1, :6], x).square(), eps=0.1),
    "amax": lambda x: x.amax((1, 2)),
    "relu": lambda x: F.relu(x * 0.0 - 0.0 * x),
    "clamp": lambda x: (x * 0.0).clamp(min=0.0),
    "pow, 2": lambda x: x.pow(2),
    "gelu": lambda x: F.gelu(x),
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x),
    "glu": lambda x: F.glu(x),
    "mish": lambda x: F.mish(x),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "exp": lambda x: x.exp(),
    "exp in place": lambda x: x.clone().exp_(),
    "log": lambda x: x.abs().log(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "pow": lambda x: x.abs().pow(1.7),
    "pow, of a number": lambda x: torch.pow(3.0, x),
    "rsqrt": lambda x: (x.square() + 0.5).rsqrt(),
    "sqrt": lambda x: x.abs().sqrt(),
    "erf": lambda x: x.erf(),
    "softplus": lambda x: F.softplus(x),
    "elu": lambda x: F.elu(x),
    "add, alpha": lambda x: torch.add(x, x.square(), alpha=0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "index_add": lambda x: torch.index_add(x, 1, torch.tensor([2, 0, 2, 2, 0]), x[:, :5]),
    "grouped_mm": lambda x: torch._grouped_mm(
        x[:, 0].contiguous(), torch.stack([like(SQUARE, x), like(SQUARE, x).t()]), torch.tensor([0, len(x)], dtype=torch.int32)
    ),
}
# of the largest magnitude of the result
NEAR = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
NO_TRUTH = ("grouped_mm",)  # PyTorch has it for half precision alone, on few machines
HALF_ONLY = ("grouped_mm",)


def rows(dtype: torch.dtype) -> Tensor:
    return number(ROWS, 6, K, seed=3).to(dtype)


def laid_out(x: Tensor) -> Tensor:
    """The same numbers with the rows innermost."""
    return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def hold(case: Case, dtype: torch.dtype, truth: bool = True) -> None:
    x = rows(dtype)
    with torch.no_grad(), rk.invariant():
        y = case(x)
        alone = torch.cat([case(x[i : i + 1]) for i in range(ROWS)])
        strange = case(laid_out(x))
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1 if before > 1 else 2)
            threads = case(x)
        finally:
            torch.set_num_threads(before)
    for name, other in (("alone", alone), ("laid out", strange), ("threads", threads)):
        assert torch.equal(y, other), f"{name}: {(y != other).sum()} of {y.numel()} differ"
    if truth:
        with torch.no_grad():
            exact: Any = case(x.double())
        assert y.dtype == dtype and y.shape == exact.shape
        assert (y.double() - exact).abs().max() <= NEAR[dtype] * exact.abs().max()
