"""sparse_ffn: down(act(up(x))) or down(act(gate(x)) * up(x)), computing only what active neurons touch.

x [..., K], up and gate [F, K], down [D, F] -> [..., D]. act is relu or one of its kin. A neuron is active for a token if its
act is not zero. The sum over neurons is the `dot` of NUMERICS.md with the zero terms left out. For finite w fma(0, w, s) = s,
so sparse equals dense, bit for bit. Each token has its own list of neurons: the batch changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import modes, registry
from rerank_kernels.backend.firing import Firing
from rerank_kernels.backend.weights import FfnWeights
from rerank_kernels.ops.linear import activation_truth, linear_truth
from rerank_kernels.ops.opaque import opaque

SPARSE_ACTIVATIONS = ("relu", "relu2")


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
    activation: str = "relu",
    threshold: float = 0.0,
    up_activation: str | None = None,
    candidates: Tensor | None = None,
    residual: Tensor | None = None,
    mode: str | None = None,
) -> Tensor:
    """down(act(up(x))), or down(act(gate(x)) · up(x)) with gate_weight, plus residual; sparse where act is zero.

    x: [..., K]; up_weight, gate_weight: [F, K]; down_weight: [D, F] as in nn.Linear; biases [F], [F], [D]. Returns [..., D]
    in x.dtype. The hidden activations stay float32. down_weight must be finite: a zero activation is skipped here, and times
    an infinite weight it would be NaN in the dense formula. A NaN activation counts as active and gives NaN.

    activation: "relu" or "relu2", its square. threshold: what is not above it gives 0 (ProSparse's FATReLU); at least 0.
    up_activation: "relu" for a ReLU on up too, before the product with the gate (TurboSparse's dReLU).
    candidates: bool [..., F], the neurons that a predictor proposes for each row. All others count as zero, so the result is
    another function of x than without. It has every promise if the predictor's row depends on nothing but its own row of x.
    residual: [..., D], added in float32 before the one rounding.
    """
    tensors = {"x": x, "up_weight": up_weight, "down_weight": down_weight, "gate_weight": gate_weight}
    check.floating("sparse_ffn", **tensors, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, residual=residual)
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
    how = _checked(x, f, down_weight.shape[0], gate_weight, activation, threshold, up_activation, candidates, residual)
    rows = x.reshape(-1, k).contiguous()
    first = {"gate_weight": gate_weight} if gate_weight is not None else {"up_weight": up_weight}
    numeric = modes.resolve("sparse_ffn", mode, x=x, **first)
    biases = [None if b is None else b.contiguous() for b in (up_bias, gate_bias, down_bias)]
    weights = FfnWeights(up_weight, biases[0], gate_weight, biases[1], down_weight, biases[2])
    y = registry.select("sparse_ffn", x.device, numeric)(rows, weights, how)
    return y.view(*x.shape[:-1], down_weight.shape[0])


def _checked(
    x: Tensor,
    f: int,
    d: int,
    gate_weight: Tensor | None,
    activation: str,
    threshold: float,
    up_activation: str | None,
    candidates: Tensor | None,
    residual: Tensor | None,
) -> Firing:
    op = "sparse_ffn"
    check.choice(op, "activation", activation, SPARSE_ACTIVATIONS)
    check.choice(op, "up_activation", up_activation, (None, "relu"))
    if up_activation is not None and gate_weight is None:
        check.fail(op, "up_activation", "left out without gate_weight", up_activation, "activation says it of up then")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 <= threshold < math.inf:
        check.fail(op, "threshold", "a finite number >= 0", threshold, "what is below 0 is inactive anyway")
    if candidates is not None:
        if not isinstance(candidates, Tensor) or candidates.dtype != torch.bool or candidates.layout != torch.strided:
            came = getattr(candidates, "dtype", type(candidates).__name__)
            raise TypeError(
                f"{op}: candidates must be a dense tensor of torch.bool, got {came}; pass torch.as_tensor(...) != 0"
            )
        check.on_device(op, "candidates", candidates, "x", x.device)
        check.shape(op, "candidates", candidates, *x.shape[:-1], f)
        check.stored(op, "candidates", candidates)
        candidates = candidates.reshape(-1, f).contiguous()
    if residual is not None:
        check.shape(op, "residual", residual, *x.shape[:-1], d)
        residual = residual.reshape(-1, d).contiguous()
    in_float32 = torch.tensor(threshold, dtype=torch.float32).item()
    return Firing(activation, in_float32, up_activation is not None, candidates, residual)


def sparse_ffn_truth(
    x: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    threshold: float = 0.0,
    up_activation: str | None = None,
    candidates: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    first = linear_truth(x, up_weight, up_bias) if gate_weight is None else linear_truth(x, gate_weight, gate_bias)
    hidden = activation_truth(torch.where(first <= threshold, torch.zeros_like(first), first), activation)
    if gate_weight is not None:
        gated = hidden * activation_truth(linear_truth(x, up_weight, up_bias), up_activation)
        hidden = torch.where(hidden == 0, hidden, gated)  # 0 whatever is beside it
    if candidates is not None:
        hidden = hidden * candidates
    return linear_truth(hidden, down_weight, down_bias, residual=residual)
