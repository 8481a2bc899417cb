"""The contract of NUMERICS.md once more, in NumPy and for clarity only: what `portable` kernels must equal bit for bit.

Written from the words, not from the kernels, so that kernel and test cannot share a mistake.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]


def fma(a: Floats, b: Floats, c: Floats) -> Floats:
    """a * b + c rounded once to float32. The product is exact in float64; the sum is rounded to odd there, which keeps enough
    of what is lost that the second rounding is right (Boldo and Melquiond, 2008)."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = product + addend
    t = s - product
    lost = (product - (s - t)) + (addend - t)
    even = (s.view(np.int64) & 1) == 0
    s = np.where((lost != 0) & even & np.isfinite(s), np.nextafter(s, np.where(lost > 0, np.inf, -np.inf)), s)
    return s.astype(np.float32)


def exp(x: Floats) -> Floats:
    """The four steps of NUMERICS.md. Below -104 and above 89 the last rounding gives 0 and inf."""

    def f(digits: str) -> Floats:
        return np.full(x.shape, float.fromhex(digits), np.float32)

    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        y = np.clip(x, np.float32(-200), np.float32(200))
        n = fma(y, f("0x1.715476p+0"), f("0x1.8p+23")) - f("0x1.8p+23")
        r = fma(n, f("-0x1.7f7d1cp-20"), fma(n, f("-0x1.62e400p-1"), y))
        q = f("0x1.6d7a58p-10")
        for digits in ("0x1.123996p-7", "0x1.5554c0p-5", "0x1.555492p-3", "0x1p-1", "0x1", "0x1"):
            q = fma(q, r, f(digits))
        return np.ldexp(q.astype(np.float64), np.nan_to_num(n).astype(np.int32)).astype(np.float32)


def dot(x: Tensor, weight: Tensor, chunk: int = 512) -> Tensor:
    """x [M, K] · weight [N, K]ᵀ: an fma chain from +0 in every chunk of K, the chunks added in ascending order from +0."""
    a, w = x.float().numpy(), weight.float().numpy()
    total = np.zeros((a.shape[0], w.shape[0]), np.float32)
    for start in range(0, a.shape[1], chunk):
        part = np.zeros_like(total)
        for k in range(start, min(start + chunk, a.shape[1])):
            part = fma(a[:, k, None], w[None, :, k], part)
        total = total + part
    return torch.from_numpy(total)


def row_sum(x: Tensor, squares: bool = False) -> Tensor:
    """[M, D] -> [M]: lane l from +0 adds x[l], x[l + 32], ... (squares by fma); lanes fold by 16, 8, 4, 2, 1."""
    lanes = np.zeros((x.shape[0], 32), np.float32)
    for d, column in enumerate(x.float().numpy().T):
        lane = lanes[:, d % 32]
        lanes[:, d % 32] = fma(column, column, lane) if squares else lane + column
    for width in (16, 8, 4, 2, 1):
        lanes = lanes[:, :width] + lanes[:, width : 2 * width]
    return torch.from_numpy(lanes[:, 0].copy())


def layer_norm(s: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """float32 throughout: two row_sums, IEEE division and square root, weight and bias by one fma."""
    d = np.float32(s.shape[1])
    c = s.numpy() - (row_sum(s).numpy() / d)[:, None]
    variance = row_sum(torch.from_numpy(c), squares=True).numpy() / d
    rstd = np.float32(1.0) / np.sqrt(variance + np.float32(eps))
    return torch.from_numpy(fma(c * rstd[:, None], weight.numpy()[None], bias.numpy()[None]))


def rms_norm(s: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, offset: int, cast: str) -> Tensor:
    """s in float32; the result in `dtype`, which is x's."""
    squares = row_sum(s, squares=True).numpy() / np.float32(s.shape[1])
    rstd = np.float32(1.0) / np.sqrt(squares + np.float32(eps))
    normed = torch.from_numpy(s.numpy() * rstd[:, None])
    if cast == "before":
        normed = normed.to(dtype).float()
    w = weight.float().numpy() + np.float32(1.0) if offset else weight.float().numpy()
    return torch.from_numpy(normed.numpy() * w[None]).to(dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D]: pair by pair, with NumPy's float32."""
    y, v, c, s = x.clone(), x.float().numpy(), cos.float().numpy(), sin.float().numpy()
    pairs = c.shape[1]
    for p in range(pairs):
        a, b = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
        y[..., a] = torch.from_numpy(v[..., a] * c[:, None, p] - v[..., b] * s[:, None, p]).to(x.dtype)
        y[..., b] = torch.from_numpy(v[..., b] * c[:, None, p] + v[..., a] * s[:, None, p]).to(x.dtype)
    return y


def normalize(x: Tensor, eps: float) -> Tensor:
    """float32 throughout: squares rounded before they are added, IEEE square root and division."""
    v = x.numpy()
    with np.errstate(all="ignore"):
        length = np.sqrt(row_sum(torch.from_numpy(v * v)).numpy())
        return torch.from_numpy(v / np.where(length < np.float32(eps), np.float32(eps), length)[:, None])
