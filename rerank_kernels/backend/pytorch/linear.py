"""linear: y = act(x · weightᵀ + bias) + residual for rows [M, K]; bmm, entry by entry the same; and the activations alone.

The BLAS behind F.linear picks its kernel, and with it the order of the sum over K, by M, by narrow N and by alignment. A row
gets other bits at other batch sizes, and with N = 7 even at another place in the same batch. So it is only ever asked for one
shape: TILE rows, zero-padded, times a weight of a multiple of TILE rows, both on 64-byte boundaries. Then a row's bits depend
on K and N, which belong to the layer. Bias, activation and residual follow as single float32 steps, one rounding at the store.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 32
ALIGNMENT = 64  # bytes; what torch gives every tensor it allocates, but not every view or memory-mapped weight


# Autocast would turn the matrix product into half precision behind our back.
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    m, n = rows.shape[0], weight.shape[0]
    wide = _pad_weight(weight)
    y = rows.new_empty(m, n, dtype=torch.float32)
    for start in range(0, m, TILE):
        stop = min(start + TILE, m)
        tile = rows.new_zeros(TILE, rows.shape[1], dtype=torch.float32)
        tile[: stop - start] = rows[start:stop]
        y[start:stop] = F.linear(tile, wide)[: stop - start, :n]
    if bias is not None:
        y += bias.float()
    if act is not None:
        y = activation(y, act)
    if residual is not None:
        y += residual.float()
    return y.to(out_dtype)


def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[1], dtype=out_dtype)
    for i in range(a.shape[0]):
        y[i] = linear(a[i], b[i], None, None, None, out_dtype)
    return y


def activation(x: Tensor, kind: str, up: Tensor | None = None) -> Tensor:
    v = x.float()
    if kind == "relu":
        y = torch.relu(v)
    elif kind == "tanh":
        y = torch.tanh(v)
    elif kind == "sigmoid":
        y = stable_sigmoid(v)
    elif kind == "silu":
        y = v * stable_sigmoid(v)
    elif kind == "quick_gelu":
        y = v * stable_sigmoid(v * 1.702)
    elif kind == "relu2":
        y = torch.relu(v) * torch.relu(v)
    elif kind == "leaky_relu":
        y = torch.where(v < 0, v * 0.01, v)
    elif kind == "mish":
        y = _mish(v)
    else:
        y = _gelu(v.double(), kind).float()
    return (y if up is None else y * up.float()).to(x.dtype)


def stable_sigmoid(x: Tensor) -> Tensor:
    """With e = exp(-|x|): 1 / (1 + e) for x >= 0, e / (1 + e) below. 1 - 1 / (1 + e) would lose the digits of small scores."""
    e = torch.exp(-x.abs())
    return torch.where(x < 0, e, torch.ones_like(e)) / (1.0 + e)


def _mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + exp x)), of terms that are all positive."""
    e = torch.exp(-x.abs())
    n = torch.where(x < 0, e * (e + 2.0), 1.0 + 2.0 * e)
    return x * (n / (n + torch.where(x < 0, torch.full_like(e, 2.0), 2.0 * e * e)))


def _gelu(x: Tensor, kind: str) -> Tensor:
    """In float64: for x = -5 a float32 argument of erfc or exp is already 20 ulp of the result away."""
    if kind == "gelu":
        phi: Tensor = 0.5 * torch.special.erfc(x * -math.sqrt(0.5))
        return x * phi
    # (1 + tanh u) / 2 = σ(2u), which keeps its digits where 1 + tanh u cancels
    return x * stable_sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x)))


def _pad_weight(weight: Tensor) -> Tensor:
    """float32 [N, K], N a multiple of TILE, aligned; the weight itself if it already is (models' usual sizes)."""
    n, k = weight.shape
    spare = -n % TILE
    ready = weight.dtype == torch.float32 and weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0
    if ready and not spare:
        return weight
    wide = weight.new_zeros(n + spare, k, dtype=torch.float32)
    wide[:n] = weight
    return wide
