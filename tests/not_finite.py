"""What a NaN and an infinity in one place of one operand make of an op: the pattern of the float64 truth. A result that must be
NaN is NaN, one that must be infinite has that sign, and all others are finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cases import Case

NAN, INF = float("nan"), float("inf")
# NUMERICS.md promises nothing of sparse_ffn with weights that are not finite; bits of rotary's tables are its caller's
LEFT_OUT = {"sparse_ffn": ("up_weight", "gate_weight", "down_weight")}


def kinds(t: Tensor) -> Tensor:
    """0 for a finite number, 1 and -1 for the infinities, 2 for a NaN."""
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign().nan_to_num(), 0)).int()


def spoilt(t: Tensor, value: float) -> Tensor:
    """One element of a row in the middle, and the last of the last row."""
    t = t.clone()
    flat = t.view(t.shape[0], -1)
    flat[t.shape[0] // 2, flat.shape[1] // 3] = value
    flat[-1, -1] = value
    return t


def not_finite(case: Case, dtype: torch.dtype) -> None:
    rows, shared = case.make_rows(dtype), case.make_shared(dtype)
    if case.op == "attention":  # scores near one another, so that no weight is so small that it is 0 in half precision
        rows["q"] = rows["q"] * 0.125
    for name in [n for n in (*rows, *shared) if n not in LEFT_OUT.get(case.op, ())]:
        for value in (NAN, INF, -INF):
            some = {n: spoilt(t, value) if n == name else t for n, t in rows.items()}
            weights = {n: spoilt(t, value) if n == name else t for n, t in shared.items()}
            out = case.call(some, weights)
            for number, (got, near) in enumerate(zip(out, case.near(some, weights, out), strict=True)):
                a, b = kinds(got), kinds(near.value.to(got.dtype))
                wrong = a != b
                if case.op == "attention" and name == "v" and "tensor" in case.label:
                    wrong &= a != 2  # a hidden value may reach a row, as 0 * NaN: NUMERICS.md, "Mode tensor"
                if wrong.any():
                    where = tuple(wrong.nonzero()[0].tolist())
                    first = f"got {float(got[where])!r}, truth {float(near.value[where])!r}"
                    raise AssertionError(
                        f"{case}, {dtype}, {value} in {name}, output {number}: {int(wrong.sum())} of {wrong.numel()} "
                        f"results of another kind; first at {where}: {first}"
                    )
