"""Normalisations: layer_norm and rms_norm as rk has them, and those that are a layer_norm of another view."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rerank_kernels.ops import norm as own
from rerank_kernels.ops import softmax
from rerank_kernels.scoped.elementwise import root
from rerank_kernels.scoped.refusal import Refusal, floats


def layer_norm(
    input: Tensor,  # noqa: A002  PyTorch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    floats(input=input, weight=weight, bias=bias)
    count = math.prod(normalized_shape)
    scale = torch.ones(count, device=input.device) if weight is None else weight.flatten()
    rows = input.reshape(-1, count)
    return own.layer_norm(rows, scale, None if bias is None else bias.flatten(), eps).view(input.shape)


def native_layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = layer_norm(input, normalized_shape, weight, bias, eps)
    dims = tuple(range(input.dim() - len(normalized_shape), input.dim()))
    wide = input.float()
    average = softmax.mean(wide, dims, True)
    apart = wide - average
    return y, average, 1.0 / root(softmax.mean(apart * apart, dims, True) + eps)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:  # noqa: A002
    """As torch.nn.RMSNorm: rounded after the product with the weight."""
    floats(input=input, weight=weight)
    if eps is None:
        raise Refusal("eps is not given, and PyTorch's own choice differs between its releases; give eps to RMSNorm")
    count = math.prod(normalized_shape)
    scale = torch.ones(count, device=input.device) if weight is None else weight.flatten()
    return own.rms_norm(input.reshape(-1, count), scale, eps, cast="after").view(input.shape)


def group_norm(
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """layer_norm of each group in float32, then the channel's weight and bias, each step rounded."""
    floats(input=input, weight=weight, bias=bias)
    groups = input.float().reshape(input.shape[0] * num_groups, -1)
    y = own.layer_norm(groups, torch.ones(groups.shape[1], device=input.device), None, eps).view(input.shape)
    return _by_channel(y, weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """(x - mean) / √(var + eps) · weight + bias in float32, each step rounded."""
    if training or running_mean is None or running_var is None:
        raise Refusal("it normalises by the other rows of the batch; call model.eval()")
    floats(input=input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    y = input.float() - _channel(running_mean, input)
    y = y / root(_channel(running_var, input) + eps)
    return _by_channel(y, weight, bias).to(input.dtype)


def _channel(values: Tensor, like: Tensor) -> Tensor:
    return values.float().view(1, -1, *[1] * (like.dim() - 2))


def _by_channel(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * _channel(weight, y)
    return y if bias is None else y + _channel(bias, y)


ROUTES = {
    "layer_norm": layer_norm,
    "native_layer_norm": native_layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "batch_norm": batch_norm,
}
