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


# --- mode tensor, on a GPU of the arithmetic class "hopper" ----------------------------------------------------------------


def mma(a: Floats, b: Floats, c: Floats, least: int) -> Floats:
    """c + Σ a b over the last axis, 16 terms: aligned to the largest exponent, cut off 25 bits below it, added without loss,
    cut off to float32. `least`: the smallest exponent of the operands' dtype, which its subnormal numbers have too."""

    def exponent(x: npt.NDArray[np.float64], smallest: int) -> npt.NDArray[np.int64]:
        return np.maximum(np.frexp(x)[1].astype(np.int64) - 1, smallest)

    x, y, z = (t.astype(np.float64) for t in np.broadcast_arrays(a, b, c[..., None]))
    terms = np.concatenate([x * y, z[..., :1]], -1)
    with np.errstate(all="ignore"):
        exponents = np.concatenate([exponent(x, least) + exponent(y, least), exponent(z[..., :1], -126)], -1)
        top = np.where(terms != 0, exponents, -5000).max(-1)
        total = np.ldexp(np.trunc(np.ldexp(terms, 25 - top[..., None])).sum(-1), top - 25)
        rounded = total.astype(np.float32)
        cut = np.where(np.abs(rounded.astype(np.float64)) > np.abs(total), np.nextafter(rounded, np.float32(0)), rounded)
        finite = np.isfinite(terms).all(-1)
        return np.where(finite, np.where(top == -5000, np.float32(0), cut), terms.sum(-1)).astype(np.float32)


def dot_tensor(x: Floats, y: Floats, least: int, c: Floats) -> Floats:
    """c [M, N] + x [M, K] · y [N, K]ᵀ: 16 terms per step, ascending, zeros beyond K."""
    for k in range(0, x.shape[1], 16):
        a, b = (np.pad(t[:, k : k + 16], ((0, 0), (0, max(0, k + 16 - t.shape[1])))) for t in (x, y))
        c = mma(a[:, None], b[None], c, least)
    return c


def exp2_short(d: Floats, c: Floats, least: Floats) -> Floats:
    """2^(d c): an integer by the magic number, a polynomial of degree 4, and the integer added to the exponent's bits."""
    magic = np.float32(1.5 * 2**23)
    d = np.where(d > least, d, least)  # also for a NaN
    z = fma(d, np.broadcast_to(c, d.shape), magic)
    return _exp2_of_parts(z, fma(d, np.broadcast_to(c, d.shape), magic - z))


def _exp2_of_parts(z: Floats, f: Floats) -> Floats:
    p = np.full_like(f, float.fromhex("0x1.3a052cp-7"))
    for digits in ("0x1.c9fc6ap-5", "0x1.ec036ep-3", "0x1.62e12cp-1", "0x1p0"):
        p = fma(p, f, np.float32(float.fromhex(digits)))
    return (p.view(np.uint32) + (z.view(np.uint32) << np.uint32(23))).view(np.float32)


def gelu_short(x: Floats) -> Floats:
    magic, one, h = np.float32(1.5 * 2**23), np.float32(1), float.fromhex
    with np.errstate(all="ignore"):
        end = np.float32(h("0x1.a8998p3"))
        y = np.where(np.abs(x) < end, np.abs(x), end)
        t = y * (y * np.float32(h("-0x1.715474p-1")))
        z = t + magic
        e = _exp2_of_parts(z, t - (z - magic))
        w = fma(np.float32(0.5), y, one)
        u = (np.int32(0x7EF311C7) - w.view(np.int32)).view(np.float32)
        for _ in range(3):
            u = fma(u, fma(-w, u, one), u)
        q = np.full_like(u, h("0x1.3cb030p-4"))
        for digits in ("-0x1.aa4dc6p-3", "0x1.477250p-4", "0x1.3b4342p-3", "0x1.941d4ap-3", "0x1.98e390p-3"):
            q = fma(q, u, np.float32(h(digits)))
        tail = e * (q * u)
        return x * np.where(x < 0, tail, one - tail)


def attention_tensor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    weighing: tuple[float, float, bool],
    left: int = -1,
    right: int = -1,
    tile: int | None = None,
) -> Tensor:
    """One head of one sequence, [T_q, D] and [T_k, D] of one half dtype, without a softcap; `weighing`: c, least, scaled."""
    dtype, smallest, d = q.dtype, -14 if q.dtype == torch.float16 else -126, q.shape[1]
    a, b, w = (t.float().numpy() for t in (q, k, v))
    c, least, scaled = np.float32(weighing[0]), np.float32(weighing[1]), weighing[2]
    tile, keys, shape = tile or (128 if d <= 128 else 64), len(b), (len(a), len(b))
    place = np.arange(len(a))[:, None] + keys - len(a)
    away = np.arange(keys)[None] - place
    seen = np.broadcast_to(((left < 0) | (-away <= left)) & ((right < 0) | (away <= right)), shape)
    m = np.full((len(a), 1), -np.inf, np.float32)
    acc, total = np.zeros((len(a), d), np.float32), np.zeros((len(a), 1), np.float32)
    with np.errstate(all="ignore"):
        for j in range(0, keys, tile):
            s = dot_tensor(a, b[j : j + tile], smallest, np.zeros((len(a), len(b[j : j + tile])), np.float32))
            s = np.where(seen[:, j : j + tile], s * np.float32(scale) if scaled else s, np.float32(-np.inf))
            top = np.maximum(m, s.max(-1, keepdims=True))  # both keep a NaN
            base = np.where(top == -np.inf, np.float32(0), top)
            r = exp2_short(m - base, c, least)
            p = torch.from_numpy(np.where(seen[:, j : j + tile], exp2_short(s - base, c, least), np.float32(0))).to(dtype)
            weights = p.float().numpy()
            acc = dot_tensor(weights, w[j : j + tile].T, smallest, acc * r)
            total = dot_tensor(weights, np.ones((1, weights.shape[1]), np.float32), smallest, total * r)
            m = top
        y = (acc + np.float32(0)) / np.where(np.isfinite(m), total, np.float32(np.nan))
    return torch.from_numpy(np.where(seen.any(-1, keepdims=True), y, np.float32(0))).to(dtype)
