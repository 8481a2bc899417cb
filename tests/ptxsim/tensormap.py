"""A tensor map of the simulator's own layout (machine/tensormap.h), as cuTensorMapEncodeTiled would make one for a GPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}


def tensor_map(
    array: np.ndarray, box: Sequence[int], swizzle: int = 0, shape: Sequence[int] = (), strides: Sequence[int] = ()
) -> bytes:
    """Of a C-contiguous array, or of a view of its memory with this `shape` and these `strides` in bytes, the last dimension
    first in both: the copy's coordinates, `box`, `shape` and `strides` (of the second dimension and up) are in a GPU's order.
    """
    size = array.itemsize
    shape = list(shape) or list(array.shape[::-1])
    strides = list(strides) or list(array.strides[::-1][1:])
    rank = len(shape)
    out = struct.pack("<IBBBBQ", 0x70616D74, size, rank, SWIZZLES[swizzle], 0, array.ctypes.data)
    out += struct.pack("<4Q", *strides, *[0] * (5 - rank)) + struct.pack("<5I", *(n - 1 for n in shape), *[0] * (5 - rank))
    return (out + struct.pack("<5H", *box, *[0] * (5 - rank))).ljust(128, b"\0")
