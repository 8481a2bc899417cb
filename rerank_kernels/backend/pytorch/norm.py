"""layer_norm: y = c * (1 / sqrt(mean(c²) + eps)) * weight + bias with c = s - mean(s), s = x + residual, for rows [R, D].
rms_norm: y = (s * (1 / sqrt(mean(s²) + eps))) * weight. normalize: y = x / max(sqrt(row_sum(x * x)), eps).

Means by `row_sum` and IEEE division; every other step is one element-wise IEEE operation on the row's own numbers. (layer_norm
and rms_norm have not the bits of backend cpu, which squares into its lanes by fma: PyTorch has no element-wise fma.
normalize has them.)
"""

from __future__ import annotations

from torch import Tensor

from rerank_kernels.backend.pytorch.softmax import row_sum


def layer_norm(rows: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    d = rows.shape[-1]
    s = rows.float() if residual is None else rows.float() + residual.float()
    c = s - (row_sum(s) / d)[:, None]
    rstd = 1.0 / square_root(row_sum(c * c) / d + eps)
    y = c * rstd[:, None] * weight.float()
    return (y if bias is None else y + bias.float()).to(rows.dtype)


def rms_norm(rows: Tensor, weight: Tensor, eps: float, plus_one: bool, rounded: bool, residual: Tensor | None) -> Tensor:
    s = rows.float() if residual is None else rows.float() + residual.float()
    normed = s * (1.0 / square_root(row_sum(s * s) / rows.shape[-1] + eps))[:, None]
    w = weight.float() + 1.0 if plus_one else weight.float()
    return ((normed.to(rows.dtype).float() if rounded else normed) * w).to(rows.dtype)


def normalize(rows: Tensor, eps: float) -> Tensor:
    x = rows.float()
    return (x / square_root(row_sum(x * x)).clamp_min(eps)[:, None]).to(rows.dtype)


def square_root(x: Tensor) -> Tensor:
    """Of float32, correctly rounded, which torch.sqrt is not: MKL computes it, and not on each of its paths to the last bit.

    In float64 any root within 3 ulp will do. Take x as an integer of 47 or 48 bits times a power of 4: its root r is in
    [2^23, 2^24), float32 holds the integers there, and rounding can only go wrong at a midpoint m + 1/2. (m + 1/2)² is an
    integer and a quarter, so x is 1/4 away from it at least, and r more than 2^-27 from m + 1/2: 4 ulp of float64.
    """
    return x.double().sqrt().float()
