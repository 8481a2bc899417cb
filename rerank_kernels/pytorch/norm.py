"""layer_norm: y = c * (1 / sqrt(mean(c²) + eps)) * weight + bias with c = s - mean(s), s = x + residual, for rows [R, D].

Means by `row_sum` and IEEE division; every other step is one element-wise IEEE operation on the row's own numbers. (Not the
bits of the compiled backend, which squares into its lanes and applies weight and bias by fma: PyTorch has no element-wise fma.)
"""

from __future__ import annotations

from torch import Tensor

from rerank_kernels.pytorch.softmax import row_sum


def layer_norm(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    d = rows.shape[-1]
    s = rows.float() if residual is None else rows.float() + residual.float()
    c = s - (row_sum(s) / d)[:, None]
    rstd = 1.0 / (row_sum(c * c) / d + eps).sqrt()
    y = c * rstd[:, None] * weight.float()
    return (y if bias is None else y + bias.float()).to(rows.dtype)
