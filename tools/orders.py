"""Why the contract sums in the order it does: the error of candidate orders against float64, on the same random inputs.

    python tools/orders.py

`dot` candidates differ in how K is cut; `attention` candidates in the tile of keys and in when the maximum is known: exact
first (the contract), or running over key tiles of 64 with a rescaling at each tile (the order of a streaming softmax).
NUMERICS.md quotes this table.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 fma, up to rare double roundings, which do not matter for an error statistic."""
    return (a.astype(np.float64) * b + c).astype(F32)


def dot(x: np.ndarray, w: np.ndarray, chunk: int) -> np.ndarray:
    """x [n, K], w [n, K] -> [n]: chains of `chunk` fma steps, their sums added in ascending order."""
    total = np.zeros(len(x), F32)
    for k0 in range(0, x.shape[1], chunk):
        part = np.zeros(len(x), F32)
        for k in range(k0, min(k0 + chunk, x.shape[1])):
            part = fma(x[:, k], w[:, k], part)
        total = total + part
    return total


def attention_exact_max(s: np.ndarray, v: np.ndarray, exp: np.ufunc, tile: int) -> np.ndarray:
    e = exp(s - s.max(1, keepdims=True)).astype(F32)
    total = np.stack([dot(e, np.broadcast_to(v[:, c], e.shape), tile) for c in range(v.shape[1])], 1)
    lanes = e.reshape(len(e), -1, 32)
    lane = lanes[:, 0]
    for i in range(1, lanes.shape[1]):
        lane = lane + lanes[:, i]
    for half in (16, 8, 4, 2, 1):
        lane = lane[:, :half] + lane[:, half : 2 * half]
    return total / lane


def attention_running_max(s: np.ndarray, v: np.ndarray, exp: np.ufunc, tile: int = 64) -> np.ndarray:
    top = np.full((len(s), 1), -np.inf, F32)
    total = np.zeros((len(s), v.shape[1]), F32)
    length = np.zeros((len(s), 1), F32)
    for j in range(0, s.shape[1], tile):
        block = s[:, j : j + tile]
        new = np.maximum(top, block.max(1, keepdims=True))
        scale = exp(top - new).astype(F32)
        e = exp(block - new).astype(F32)
        part = np.stack([dot(e, np.broadcast_to(v[j : j + tile, c], e.shape), tile) for c in range(v.shape[1])], 1)
        total = fma(total, np.broadcast_to(scale, total.shape), part)
        length = fma(length, scale, e.sum(1, dtype=F32, keepdims=True))
        top = new
    return total / length


def main() -> None:
    rng = np.random.default_rng(0)
    print("dot: error / (sum |x w|), in units of 2^-24: mean and largest of 4000")
    for k in (768, 3072, 11008):
        x, w = (rng.standard_normal((4000, k)).astype(F32) for _ in range(2))
        want = (x.astype(np.float64) * w).sum(1)
        scale = np.abs(x.astype(np.float64) * w).sum(1) * 2.0**-24
        row = []
        for chunk in (k, 2048, 512, 128):
            error = np.abs(dot(x, w, chunk) - want) / scale
            row.append(f"{'one chain' if chunk == k else f'chunks of {chunk}'}: {error.mean():.3f} {error.max():.2f}")
        print(f"  K = {k:5d}  " + "   ".join(row))
    print("attention, scores N(0, 3): |error| against float64, mean and largest of 64 rows x 16 features, in units of 2^-24")
    for t in (128, 512, 2048):
        s = (rng.standard_normal((64, t)) * 3).astype(F32)
        v = rng.standard_normal((t, 16)).astype(F32)
        e = np.exp(s.astype(np.float64) - s.max(1, keepdims=True))
        want = e @ v.astype(np.float64) / e.sum(1, keepdims=True)
        row = []
        for name, got in (
            ("exact maximum, tiles of 64", attention_exact_max(s, v, np.exp, 64)),
            ("of 512", attention_exact_max(s, v, np.exp, 512)),
            ("running maximum, tiles of 64", attention_running_max(s, v, np.exp)),
        ):
            error = np.abs(got - want) / 2.0**-24
            row.append(f"{name}: {error.mean():.3f} {error.max():.2f}")
        print(f"  T = {t:5d}  " + "   ".join(row))


if __name__ == "__main__":
    main()
