"""csrc/numerics.h in Triton, line by line: the element functions and the end of every row_sum (NUMERICS.md, "Primitives").

+ - * and tl.fma, tl.div_rn and tl.sqrt_rn only: each is one rounding, in the order written, under launch.OPTIONS. tl.exp, `/`
on floats and tl.math's functions become approximate instructions. Reductions of Triton add in an order of their own; here a
sum over lanes is folded by hand. Maxima are exact in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _hex(digits: str) -> tl.constexpr:
    return tl.constexpr(float.fromhex(digits))


LANES = tl.constexpr(32)  # row_sum: lane l adds x[l], x[l + 32], ...
CHUNK = tl.constexpr(512)  # dot: one fma chain inside a chunk of K, the chunks' sums added in ascending order
KEY_TILE = tl.constexpr(64)  # attention's sum over keys: the same, in chunks of 64 keys

MINUS_INFINITY = tl.constexpr(float("-inf"))
ROUND_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23
SHIFT_BACK = _hex("0x1p-64")

# exp
LOG2_E = _hex("0x1.715476p+0")
LOG_2_HIGH = _hex("-0x1.62e400p-1")
LOG_2_LOW = _hex("-0x1.7f7d1cp-20")
E6 = _hex("0x1.6d7a58p-10")
E5 = _hex("0x1.123996p-7")
E4 = _hex("0x1.5554c0p-5")
E3 = _hex("0x1.555492p-3")

# tanh
T4 = _hex("-0x1.76922ap-8")
T3 = _hex("0x1.52509ep-6")
T2 = _hex("-0x1.b84344p-5")
T1 = _hex("0x1.110760p-3")
T0 = _hex("-0x1.555534p-2")

# the normal distribution
P10 = _hex("-0x1.54bb04p-5")
P9 = _hex("0x1.b4dc28p-3")
P8 = _hex("-0x1.9891f2p-2")
P7 = _hex("0x1.6e0a1ep-2")
P6 = _hex("-0x1.b31ae6p-3")
P5 = _hex("0x1.7e0782p-4")
P4 = _hex("0x1.36bfeep-5")
P3 = _hex("0x1.6aef72p-5")
P2 = _hex("-0x1.88b432p-4")
P1 = _hex("-0x1.310816p-2")

# gelu_tanh
G1 = _hex("0x1.2444f2p-4")
G0 = _hex("0x1.988454p+0")

# the short forms of mode tensor: exp2, and gelu of a result in half precision
X4 = _hex("0x1.3a052cp-7")
X3 = _hex("0x1.c9fc6ap-5")
X2 = _hex("0x1.ec036ep-3")
X1 = _hex("0x1.62e12cp-1")
TAIL_END = _hex("0x1.a8998p+3")
MINUS_HALF_LOG2_E = _hex("-0x1.715474p-1")
SEED = tl.constexpr(0x7EF311C7)
Q5 = _hex("0x1.3cb030p-4")
Q4 = _hex("-0x1.aa4dc6p-3")
Q3 = _hex("0x1.477250p-4")
Q2 = _hex("0x1.3b4342p-3")
Q1 = _hex("0x1.941d4ap-3")
Q0 = _hex("0x1.98e390p-3")

QUICK = _hex("0x1.b3b646p+0")  # quick_gelu
SLOPE = _hex("0x1.47ae14p-7")  # leaky_relu


@triton.jit
def fmadd(a, b, c):
    return tl.fma(a, b, c)


@triton.jit
def scale_by_exp2(p, t, SHIFT: tl.constexpr, BACK: tl.constexpr):
    """p * 2^n, t = n + ROUND_MAGIC. 2^(n + SHIFT) is normal, so the first product is exact, and the one with BACK = 2^-SHIFT
    rounds once. The shift by 23 leaves nothing of ROUND_MAGIC. A NaN in p stays one."""
    return p * ((t.to(tl.int32, bitcast=True) << 23) + ((SHIFT + 127) << 23)).to(tl.float32, bitcast=True) * BACK


@triton.jit
def exp_within(x):
    t = fmadd(x, LOG2_E, ROUND_MAGIC)
    return scale_by_exp2(exp_fraction(x, t), t, 64, SHIFT_BACK)


@triton.jit
def exp_fraction(x, t):
    """exp(x) / 2^n for the n that t = 1.5 * 2^23 + n holds."""
    n = t - ROUND_MAGIC
    r = fmadd(n, LOG_2_HIGH, x)
    r = fmadd(n, LOG_2_LOW, r)
    q = fmadd(r, E6, E5)
    q = fmadd(q, r, E4)
    q = fmadd(q, r, E3)
    q = fmadd(q, r, 0.5)
    p = fmadd(q, r, 1.0)
    return fmadd(p, r, 1.0)


@triton.jit
def exp_of_negative(x):
    return exp_within(tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def exp_of_positive(x):
    x = tl.where(x > 89.0, 89.0, x)
    t = fmadd(x, LOG2_E, ROUND_MAGIC)
    return scale_by_exp2(exp_fraction(x, t), t, -1, 2.0)


@triton.jit
def sigmoid_of(x):
    e = exp_of_negative(0.0 - tl.abs(x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@triton.jit
def tanh_of(x):
    z = x * x
    q = fmadd(z, T4, T3)
    q = fmadd(q, z, T2)
    q = fmadd(q, z, T1)
    q = fmadd(q, z, T0)
    small = fmadd(q * z, x, x)
    a = tl.abs(x)
    above = exp_of_positive(a + a) + 1.0
    big = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), above)
    return tl.where(a < 0.625, small, tl.where(x < 0.0, 0.0 - big, big))


@triton.jit
def normcdf_of(x):
    y = tl.abs(x)
    y = tl.where(y > 16.0, 16.0, y)
    s = y * y
    lost = fmadd(y, y, 0.0 - s)
    u = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), fmadd(y, 0.5, 1.0))
    v = 1.0 - u
    g = fmadd(v, P10, P9)
    g = fmadd(g, v, P8)
    g = fmadd(g, v, P7)
    g = fmadd(g, v, P6)
    g = fmadd(g, v, P5)
    g = fmadd(g, v, P4)
    g = fmadd(g, v, P3)
    g = fmadd(g, v, P2)
    g = fmadd(g, v, P1)
    g = fmadd(g, v, 0.5)
    g = g * u
    g = fmadd(g * -0.5, lost, g)
    tail = exp_within(s * -0.5) * g
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_of(x):
    return x * normcdf_of(x)


@triton.jit
def _exp2_of_parts(z, f):
    p = fmadd(f, X4, X3)
    p = fmadd(p, f, X2)
    p = fmadd(p, f, X1)
    p = fmadd(p, f, 1.0)
    return (p.to(tl.int32, bitcast=True) + (z.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2_short(d, c, least):
    d = tl.maximum(d, least)  # a NaN loses
    c = tl.full(d.shape, 1.0, tl.float32) * c
    z = fmadd(d, c, ROUND_MAGIC)
    return _exp2_of_parts(z, fmadd(d, c, ROUND_MAGIC - z))


@triton.jit
def gelu_short(x):
    y = tl.minimum(tl.abs(x), TAIL_END)  # a NaN loses, and comes back with the last product
    t = y * (y * MINUS_HALF_LOG2_E)
    z = t + ROUND_MAGIC
    e = _exp2_of_parts(z, t - (z - ROUND_MAGIC))
    w = fmadd(y, 0.5, 1.0)
    below = 0.0 - w
    u = (SEED - w.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    u = fmadd(u, fmadd(below, u, 1.0), u)
    u = fmadd(u, fmadd(below, u, 1.0), u)
    u = fmadd(u, fmadd(below, u, 1.0), u)
    q = fmadd(u, Q5, Q4)
    q = fmadd(q, u, Q3)
    q = fmadd(q, u, Q2)
    q = fmadd(q, u, Q1)
    q = fmadd(q, u, Q0)
    tail = e * (q * u)
    return x * tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def gelu_tanh_of(x):
    return x * sigmoid_of(x * fmadd(x * x, G1, G0))


@triton.jit
def silu_of(x):
    return x * sigmoid_of(x)


@triton.jit
def relu_of(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def quick_gelu_of(x):
    return x * sigmoid_of(x * QUICK)


@triton.jit
def relu2_of(x):
    r = relu_of(x)
    return r * r


@triton.jit
def leaky_relu_of(x):
    return tl.where(x < 0.0, x * SLOPE, x)


@triton.jit
def mish_of(x):
    e = exp_of_negative(0.0 - tl.abs(x))
    n = tl.where(x < 0.0, e * (e + 2.0), 1.0 + (e + e))
    return x * tl.div_rn(n, n + tl.where(x < 0.0, 2.0, (e + e) * e))


@triton.jit
def activate(x, KIND: tl.constexpr):
    if KIND == "gelu":
        return gelu_of(x)
    elif KIND == "gelu_short":
        return gelu_short(x)
    elif KIND == "gelu_tanh":
        return gelu_tanh_of(x)
    elif KIND == "tanh":
        return tanh_of(x)
    elif KIND == "relu":
        return relu_of(x)
    elif KIND == "silu":
        return silu_of(x)
    elif KIND == "sigmoid":
        return sigmoid_of(x)
    elif KIND == "quick_gelu":
        return quick_gelu_of(x)
    elif KIND == "relu2":
        return relu2_of(x)
    elif KIND == "leaky_relu":
        return leaky_relu_of(x)
    elif KIND == "mish":
        return mish_of(x)
    else:
        return x


@triton.jit
def larger(a, b):
    """A NaN wins."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def half_fold(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """[ROWS, 2 HALF] -> [ROWS, HALF]: lane l takes lane l + HALF."""
    low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    return low + high


@triton.jit
def fold_lanes(x, ROWS: tl.constexpr):
    """[ROWS, 32] -> [ROWS, 1]: folds by 16, 8, 4, 2, 1."""
    x = half_fold(x, ROWS, 16)
    x = half_fold(x, ROWS, 8)
    x = half_fold(x, ROWS, 4)
    x = half_fold(x, ROWS, 2)
    return half_fold(x, ROWS, 1)
