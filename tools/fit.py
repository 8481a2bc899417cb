"""Where the polynomial coefficients of numerics.h come from: weighted minimax fits, rounded to float32 one by one.

    python tools/fit.py        prints each polynomial, highest power last, as C hex floats, and its error before rounding

Lawson's algorithm (iteratively reweighted least squares in double-double-free 80-bit arithmetic) on Chebyshev nodes; after
each coefficient is rounded to float32, the rest are fitted again, so that roundings make up for one another.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import numpy as np

mp.mp.dps = 40
LD = np.longdouble


def nodes(a: float, b: float, n: int = 600) -> np.ndarray:
    i = np.arange(n, dtype=LD)
    return (LD(a) + LD(b)) / 2 + (LD(b) - LD(a)) / 2 * np.cos(LD(np.pi) * (2 * i + 1) / (2 * n))


def least_squares(basis: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """QR by modified Gram-Schmidt in long double: numpy's solver would drop to float64."""
    q = basis * weight[:, None]
    t = target * weight
    n = q.shape[1]
    r = np.zeros((n, n), dtype=LD)
    z = np.zeros(n, dtype=LD)
    for _ in range(2):  # orthogonalise twice: the columns are close to one another
        s = np.zeros((n, n), dtype=LD)
        for j in range(n):
            for i in range(j):
                s[i, j] = np.dot(q[:, i], q[:, j])
                q[:, j] -= s[i, j] * q[:, i]
            s[j, j] = np.sqrt(np.dot(q[:, j], q[:, j]))
            q[:, j] /= s[j, j]
        r = s if not r.any() else s @ r
    z = q.T @ t
    c = np.zeros(n, dtype=LD)
    for i in range(n - 1, -1, -1):
        c[i] = (z[i] - np.dot(r[i, i + 1 :], c[i + 1 :])) / r[i, i]
    return c


def minimax(x: np.ndarray, target: np.ndarray, scale: np.ndarray, powers: list[int]) -> tuple[np.ndarray, float]:
    """Coefficients c of sum c_i x**powers_i that make max |error| * scale small."""
    basis = np.stack([x**p for p in powers], axis=1)
    lawson = np.ones_like(x)
    best, best_error = None, np.inf
    for _ in range(60):
        c = least_squares(basis, target, scale * np.sqrt(lawson))
        error = np.abs(basis @ c - target) * scale
        if error.max() < best_error:
            best, best_error = c, error.max()
        lawson *= error / error.max() + LD(1e-6)
        lawson /= lawson.mean()
    assert best is not None
    return best, float(best_error)


def fit(
    name: str, f: Callable[[mp.mpf], mp.mpf], a: float, b: float, powers: list[int], scale: Callable[[np.ndarray], np.ndarray]
) -> None:
    x = nodes(a, b)
    target = np.array([LD(mp.nstr(f(mp.mpf(str(v))), 25)) for v in x], dtype=LD)
    weight = scale(x)
    rounded: list[float] = []
    error = 0.0
    rest = target
    for i, _ in enumerate(powers):  # lowest power first: its rounding weighs most
        c, error = minimax(x, rest, weight, powers[i:])
        rounded.append(float(np.float32(c[0])))
        rest = rest - LD(rounded[-1]) * x ** powers[i]
    print(
        f"{name} on [{a:g}, {b:g}]: error {float((np.abs(rest) * weight).max()):.2e} after rounding (last free fit {error:.1e})"
    )
    for p, c in zip(powers, rounded, strict=True):
        print(f"  x^{p}: {c.hex()}f  // {c:.9g}")


def main() -> None:
    # exp(r) = 1 + r + r^2 q(r): q on half a step of log 2
    half = float(mp.log(2) / 2) * 1.0002
    fit("exp q", lambda r: (mp.exp(r) - 1 - r) / r**2 if r else mp.mpf(1) / 2, -half, half, [0, 1, 2, 3, 4], lambda x: x * x)
    # tanh(x) = x + x z q(z), z = x^2, |x| < 0.625
    fit(
        "tanh q",
        lambda z: (mp.tanh(mp.sqrt(z)) / mp.sqrt(z) - 1) / z,
        1e-9,
        0.625**2,
        [0, 1, 2, 3, 4],
        lambda z: z,
    )

    # Phi(-y) = exp(-y^2 / 2) u Q(1 - u), u = 1 / (1 + y / 2): u Q = erfcx(y / sqrt 2) / 2, and Q stays between 0.2 and 0.5,
    # so that its Horner form does not cancel
    def mills(v: mp.mpf) -> mp.mpf:
        u = 1 - v
        y = 2 * (1 / u - 1)
        return mp.erfc(y / mp.sqrt(2)) * mp.exp(y * y / 2) / 2 / u

    q = np.vectorize(lambda v: LD(mp.nstr(mills(mp.mpf(str(v))), 25)))
    fit("normcdf Q", mills, 0.0, float(1 - 1 / mp.mpf(9)), list(range(11)), lambda v: 1 / q(v).astype(LD))

    # mode tensor: exp2(f) = 1 + f p(f) on half a step, and Phi as above with fewer digits, Q by u itself, up to where it ends
    fit(
        "exp2_short p",
        lambda f: (mp.mpf(2) ** f - 1) / f if f else mp.log(2),
        -0.5,
        0.5,
        [0, 1, 2, 3],
        lambda f: abs(f) / np.exp2(f),
    )
    short = np.vectorize(lambda u: LD(mp.nstr(mills(1 - mp.mpf(str(u))), 25)))
    end = float(1 / (1 + mp.mpf("13.3") / 2))
    fit("gelu_short Q", lambda u: mills(1 - u), end, 1.0, list(range(6)), lambda u: 1 / short(u).astype(LD))


if __name__ == "__main__":
    main()
