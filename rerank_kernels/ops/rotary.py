"""rotary: pairs of a head's features are turned by the angle of their token (Su et al., 2021); rotary_table: cos and sin of it.

x [..., H, D], cos and sin [..., P] with 2 P <= D -> [..., H, D]. Pair p is (p, p + P), or (2 p, 2 p + 1) if interleaved:

    y_a = x_a · cos - x_b · sin,  y_b = x_b · cos + x_a · sin

Two products and a sum, each rounded, then one rounding at the store. In float32 these are the bits of transformers, if cos and
sin are the same. Features behind the pairs are copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.backend import registry
from rerank_kernels.ops.opaque import opaque


@opaque(lambda x, *_, **__: x.new_empty(x.shape))
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding of queries or keys: every token's feature pairs are turned by the token's angles.

    x: [..., H, D]; cos, sin: [..., P], a row per token, 2 P <= D; float32, float16 or bfloat16. `rotary_table` makes cos and
    sin, in float32. Returns [..., H, D] in x.dtype. The first 2 P features of a head are turned, the others are copied.
    interleaved: pair p is (2 p, 2 p + 1), as in GPT-J; else (p, p + P), as in Llama.
    """
    check.floating("rotary", x=x, cos=cos, sin=sin)
    if x.dim() < 2 or x.shape[-1] == 0:
        check.fail("rotary", "x", "[..., H, D] with D > 0", check.shape_of(x))
    pairs = cos.shape[-1] if cos.dim() else 0
    if cos.shape[:-1] != x.shape[:-2] or not 0 < 2 * pairs <= x.shape[-1]:
        wanted = ", ".join(str(n) for n in (*x.shape[:-2], f"P]: a row per token of x {check.shape_of(x)}, and 2 P <= D"))
        check.fail("rotary", "cos", "[" + wanted, check.shape_of(cos), "rotary_table gives the rows of given positions")
    check.shape("rotary", "sin", sin, *cos.shape)
    tokens = x.reshape(-1, *x.shape[-2:])
    if tokens.stride(-1) != 1:  # any stride between tokens and heads (slices of a fused QKV), but features side by side
        tokens = tokens.contiguous()
    serve = registry.select("rotary", x.device)
    y = serve(tokens, cos.reshape(-1, pairs).contiguous(), sin.reshape(-1, pairs).contiguous(), interleaved)
    return y if x.dim() == 3 else y.view(x.shape)


def rotary_truth(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    pairs = cos.shape[-1]
    c, s = cos.double()[..., None, :], sin.double()[..., None, :]
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (slice(pairs), slice(pairs, 2 * pairs))
    a, b, y = x.double()[..., first], x.double()[..., second], x.double().clone()
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


# ---- cos and sin -----------------------------------------------------------------------------------------------------------
#
# PyTorch's own differ between a vector's body, its tail and instruction sets. Here is a fixed sequence of IEEE operations in
# float64: the same bits on every machine, and nearly always the float32 next to the true value.

LARGEST_ANGLE = 2.0**20  # below it n · HALF_PI[0] and n · HALF_PI[1] are exact
ROUNDER = 1.5 * 2.0**52  # x + ROUNDER - ROUNDER: the integer next to x
TWO_OVER_PI = 0.6366197723675814
# pi / 2 as 33 bits, 33 bits and what is left
HALF_PI = (1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21)
# 1 / k! with its sign, from the smallest: what is left of both series for |r| < pi / 4 is below 2^-58
SIN = tuple((-1.0) ** (k // 2) / math.factorial(k) for k in range(17, 1, -2))
COS = tuple((-1.0) ** (k // 2) / math.factorial(k) for k in range(18, 0, -2))


def _tables(inv_freq: Tensor, positions: Tensor, *_: float, **__: float) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, inv_freq.shape[0])
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)


# Opaque, for a compiler would make fma of it.
@opaque(
    _tables,
    result=lambda cos, sin: (cos, sin),
    schema="(Tensor inv_freq, Tensor positions, float scaling=1.0) -> (Tensor, Tensor)",
)
def rotary_table(inv_freq: Tensor, positions: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position · inv_freq, times `scaling`, for `rotary`: float32, [..., P].

    inv_freq: float32 [P], radians per position; positions: integers of any shape [...], on the same device. The angle is their
    product in float32, as transformers forms it, and must be below 2^20. The bits depend on no machine, no device and no
    other position.
    """
    check.floating("rotary_table", inv_freq=inv_freq)
    if inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
        check.fail("rotary_table", "inv_freq", "float32 [P]", f"{inv_freq.dtype} {check.shape_of(inv_freq)}")
    if positions.dtype.is_floating_point or positions.dtype in (torch.bool, torch.complex64):
        check.fail("rotary_table", "positions", "a tensor of integers", positions.dtype)
    check.on_device("rotary_table", "positions", positions, "inv_freq", inv_freq.device)
    if not math.isfinite(scaling):
        check.fail("rotary_table", "scaling", "finite", scaling)
    angle = positions[..., None].to(torch.float32) * inv_freq.detach()
    if angle.numel() and not (largest := float(angle.abs().max())) < LARGEST_ANGLE:
        check.fail("rotary_table", "positions", f"such that position · inv_freq < {LARGEST_ANGLE:.0f}", largest)
    x = angle.double()
    n = x * TWO_OVER_PI + ROUNDER - ROUNDER
    r = x - n * HALF_PI[0] - n * HALF_PI[1] - n * HALF_PI[2]
    square = r * r
    sin, cos = _horner(SIN, square) * square * r + r, _horner(COS, square) * square + 1.0
    quarter = n.to(torch.int64) & 3
    odd, back, down = quarter % 2 == 1, (quarter == 1) | (quarter == 2), quarter >= 2
    cosine, sine = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    cosine, sine = torch.where(back, -cosine, cosine), torch.where(down, -sine, sine)
    return (cosine * float(scaling)).to(torch.float32), (sine * float(scaling)).to(torch.float32)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y
