"""sparse_ffn: down(relu(up(x))) or down(relu(gate(x)) * up(x)), computing only what active neurons touch.

x [..., K], up and gate [F, K], down [D, F] -> [..., D]. A neuron is active for a token if its relu is not zero. The sum over
neurons is the `dot` of NUMERICS.md with the zero terms left out. For finite w fma(0, w, s) = s, so sparse equals dense, bit for
bit. Each token has its own list of neurons: the batch changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import modes, registry
from rerank_kernels.backend.weights import FfnWeights
from rerank_kernels.ops.linear import linear_truth
from rerank_kernels.ops.opaque import opaque


def _sparse_ffn_result(x: Tensor, up_weight: Tensor, down_weight: Tensor, **_: Any) -> Tensor:
    check.shape("sparse_ffn", "down_weight", down_weight, "D", "F")
    return x.new_empty(*x.shape[:-1], down_weight.shape[0])


@opaque(_sparse_ffn_result)
def sparse_ffn(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    mode: str | None = None,
) -> Tensor:
    """Feed-forward layer with ReLU (no gate_weight) or ReGLU (with), sparse where the relu is zero.

    x: [..., K]; up_weight, gate_weight: [F, K]; down_weight: [D, F] as in nn.Linear; biases [F], [F], [D]. Returns [..., D]
    in x.dtype. The hidden activations stay float32. down_weight must be finite: a zero activation is skipped here, and times
    an infinite weight it would be NaN in the dense formula. A NaN activation counts as active and gives NaN.
    """
    tensors = {"x": x, "up_weight": up_weight, "down_weight": down_weight, "gate_weight": gate_weight}
    check.floating("sparse_ffn", **tensors, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias)
    k = x.shape[-1] if x.dim() else 0
    if k == 0:
        check.fail("sparse_ffn", "x", "[..., K] with K > 0", check.shape_of(x))
    check.shape("sparse_ffn", "up_weight", up_weight, "F", k)
    f = up_weight.shape[0]
    check.shape("sparse_ffn", "down_weight", down_weight, "D", f)
    if 0 in down_weight.shape:
        check.fail("sparse_ffn", "down_weight", "[D, F] with D, F > 0", check.shape_of(down_weight))
    if gate_weight is not None:
        check.shape("sparse_ffn", "gate_weight", gate_weight, f, k)
    elif gate_bias is not None:
        check.fail("sparse_ffn", "gate_bias", "left out without gate_weight", check.shape_of(gate_bias))
    for name, t, n in (("up_bias", up_bias, f), ("gate_bias", gate_bias, f), ("down_bias", down_bias, down_weight.shape[0])):
        if t is not None:
            check.shape("sparse_ffn", name, t, n)
    rows = x.reshape(-1, k).contiguous()
    first = {"gate_weight": gate_weight} if gate_weight is not None else {"up_weight": up_weight}
    numeric = modes.resolve("sparse_ffn", mode, x=x, **first)
    biases = [None if b is None else b.contiguous() for b in (up_bias, gate_bias, down_bias)]
    weights = FfnWeights(up_weight, biases[0], gate_weight, biases[1], down_weight, biases[2])
    y = registry.select("sparse_ffn", x.device, numeric)(rows, weights)
    return y.view(*x.shape[:-1], down_weight.shape[0])


def sparse_ffn_truth(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    up = linear_truth(x, up_weight, up_bias)
    hidden = torch.relu(up) if gate_weight is None else torch.relu(linear_truth(x, gate_weight, gate_bias)) * up
    return linear_truth(hidden, down_weight, down_bias)
