"""Why a route cannot serve a call: raised by a route, and told with op and module by the scope."""

from __future__ import annotations

import torch
from torch import Tensor

from rerank_kernels import check


class Refusal(Exception):
    """The reason, as the end of a sentence that begins with the op."""


def floats(**tensors: Tensor | None) -> None:
    """Each is None or of a dtype that our ops take."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in check.FLOATS:
            raise Refusal(f"{name} is {t.dtype}, and our ops take {check.FLOAT_NAMES}; convert the model with .float()")


def whole(dtype: torch.dtype) -> bool:
    """Whether sums of it are exact in any order."""
    return not (dtype.is_floating_point or dtype.is_complex)
