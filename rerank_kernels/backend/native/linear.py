"""linear, bmm and activation by the library; weights are read as nn.Linear holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels.backend.native import hopper, proven
from rerank_kernels.backend.weights import contiguous

# enum Activation in csrc/numerics.h
CODES = {None: 0, "gelu": 1, "gelu_tanh": 2, "tanh": 3, "relu": 4, "silu": 5, "sigmoid": 6}
CODES |= {"quick_gelu": 7, "relu2": 8, "leaky_relu": 9, "mish": 10}


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return torch.ops.rerank_kernels.linear(x, contiguous(weight), bias, CODES[activation], residual, out_dtype)


def linear_tensor(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    weight = contiguous(weight)
    hopper.before_a_call(hopper.LINEAR, x.device)
    if activation is None and out_dtype == x.dtype and proven.wanted():
        y = proven.linear(x, weight, bias, residual, _plain)
        if y is not None:
            return y
    return torch.ops.rerank_kernels.linear_tensor(x, weight, bias, CODES[activation], residual, out_dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return torch.ops.rerank_kernels.linear_tensor(x, weight, bias, CODES[None], residual, x.dtype)


def bmm_tensor(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    hopper.before_a_call(hopper.LINEAR, a.device)
    return torch.ops.rerank_kernels.bmm_tensor(a, b, out_dtype)


def activation(x: Tensor, kind: str, up: Tensor | None) -> Tensor:
    return torch.ops.rerank_kernels.activation(x, CODES[kind], up, x.dtype)
