"""Leaves: modules that compute one op on what they are called with, wherever they stand in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.models.bound import class_of, name_of
from rerank_kernels.ops.linear import activation, linear
from rerank_kernels.ops.norm import layer_norm
from rerank_kernels.ops.softmax import softmax

_TORCH = {"GELU": "gelu", "Tanh": "tanh", "ReLU": "relu", "SiLU": "silu", "Sigmoid": "sigmoid"}
_TORCH |= {"LeakyReLU": "leaky_relu", "Mish": "mish"}
_HF = {"GELUActivation": "gelu", "SiLUActivation": "silu", "MishActivation": "mish"}
_HF |= {"QuickGELUActivation": "quick_gelu", "ReLUSquaredActivation": "relu2"}
_HF |= dict.fromkeys(
    ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "GELUTanh", "PytorchGELUTanh"), "gelu_tanh"
)
ACTIVATIONS = {f"torch.nn.modules.activation.{name}": kind for name, kind in _TORCH.items()} | {
    f"transformers.activations.{name}": kind for name, kind in _HF.items()
}


SLOPE = 0.01  # of leaky_relu


def activation_problem(m: Any) -> str | None:
    """Why m, one of ACTIVATIONS, cannot be served; None if it can."""
    slope = vars(m).get("negative_slope", SLOPE)  # nn.Module takes its time to find nothing
    return None if slope == SLOPE else f"negative_slope is {slope}, and only {SLOPE} is served"


def activation_of(m: Any) -> str:
    """The `activation` of ops.linear that module m is."""
    if (why := activation_problem(m)) is not None:  # it may have been set after patch()
        raise PatchError(f"{class_of(m)}: {why}; call rk.unpatch(model)")
    kind = ACTIVATIONS[name_of(m)]
    return "gelu_tanh" if vars(m).get("approximate", "none") == "tanh" else kind


def _linear(m: Any, x: Tensor) -> Tensor:
    return linear(x, m.weight, m.bias)


def _layer_norm(m: Any, x: Tensor) -> Tensor:
    d = len(m.normalized_shape)
    check.shape("LayerNorm.forward", "input", x, *("..." for _ in range(x.dim() - d)), *m.normalized_shape)
    weight = torch.ones(m.normalized_shape, dtype=x.dtype, device=x.device) if m.weight is None else m.weight
    flat, bias = x.flatten(-d), None if m.bias is None else m.bias.detach().flatten()
    return layer_norm(flat, weight.detach().flatten(), bias, m.eps).view(x.shape)


def _activation(m: Any, x: Tensor) -> Tensor:
    return activation(x, activation_of(m))


def _softmax(m: Any, x: Tensor) -> Tensor:
    return softmax(x, m.dim)


def _dropout(m: Any, x: Tensor) -> Tensor:
    if m.training and m.p != 0.0:
        raise PatchError(
            f"{class_of(m)}.forward: it is set to train, and drops {m.p} of its input at random; call model.eval(), or "
            "rk.unpatch(model) to train"
        )
    return x


FORWARDS: dict[str, Callable[..., Any]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "torch.nn.modules.activation.Softmax": _softmax,
    **dict.fromkeys(ACTIVATIONS, _activation),
}
# They compute nothing where they are served, and have a forward that refuses the rest.
GUARDS: dict[str, Callable[..., Any]] = {"torch.nn.modules.dropout.Dropout": _dropout}
