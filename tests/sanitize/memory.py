"""Arrays whose last byte, or first, is beside a page that nobody may touch: a read or a write past the end ends the process.

A sanitizer sees what it has compiled; it looks at no masked load or store of AVX-512. The processor does.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
NOBODY, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_WRITE


class Guarded:
    """Gives tensors memory of their own between two such pages; `release` takes it all back."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, int]] = []
        self.at_end = True

    def place(self, t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        if size == 0:
            return t
        whole = (-(-size // PAGE) + 2) * PAGE
        start = _libc.mmap(None, whole, READ | WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert start not in (None, ctypes.c_void_p(-1).value), "no memory for a guarded array"
        self.mapped.append((start, whole))
        for page in (start, start + whole - PAGE):
            assert _libc.mprotect(page, PAGE, NOBODY) == 0
        at = start + whole - PAGE - size if self.at_end else start + PAGE
        self.at_end = not self.at_end or len(self.mapped) % 3 == 0  # the end is where most mistakes are
        placed = torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=t.dtype).view(t.shape)
        return placed.copy_(t)

    def release(self) -> None:
        for start, size in self.mapped:
            _libc.munmap(start, size)
        self.mapped.clear()
