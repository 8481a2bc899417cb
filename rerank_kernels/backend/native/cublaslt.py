"""cuBLASLt, as torch has loaded it: y = x · weightᵀ, with a bias or a residual at most, by one algorithm that splits no sum.

x [M, K], weight [N, K], y [M, N] in rows are D = Aᵀ B in columns, with A = weight and B = x. No link and no import needs it: it
is looked up among what the process holds already. No algorithm here has a workspace, a split of K or a reduction.

Whether its bits are ours is not known here: `proven` finds out.
"""

from __future__ import annotations

import ctypes as c
import functools
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRODUCT, BIAS, RESIDUAL = "product", "product + bias", "product + residual"
ALIGNMENT = 16  # bytes, of every address and row

# of cublasLt.h, the same since CUDA 11
_COMPUTE_32F, _R_32F, _OP_T, _EPILOGUE_BIAS = 68, 0, 1, 4
_DATA = {torch.float16: 2, torch.bfloat16: 14}
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 7, 8
_LAYOUT_COLUMNS = 3
_PREFER_WORKSPACE, _PREFER_REDUCTION, _PREFER_ALIGNMENT = 1, 3, (5, 6, 7, 8)
_CONFIG = {"id": 0, "tile": 1, "splitk": 2, "reduction": 3, "stages": 6, "cluster": 8}
_NUMERICS = 15  # a capability: bits of _TENSOR_CORES and the like
_TENSOR_CORES, _SUMS, _SUMS_32F = 0x02, 0xFF00, 0x0200


class CublasLtError(RuntimeError):
    """cuBLASLt does not do what was asked; the message says which of its functions said so."""


class Algorithm(c.Structure):
    _fields_ = (("data", c.c_uint64 * 8),)


class Heuristic(c.Structure):
    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace", c.c_size_t),
        ("state", c.c_int),
        ("waves", c.c_float),
        ("reserved", c.c_int * 4),
    )


class Kind(NamedTuple):
    """What may choose an algorithm. `rows`: the most that it is asked for; one from `half of it + 1` on takes the same."""

    dtype: torch.dtype
    n: int
    k: int
    form: str
    rows: int

    def __str__(self) -> str:
        return f"{self.form}, {str(self.dtype)[6:]}, N {self.n}, K {self.k}, M {self.rows // 2 + 1} to {self.rows}"


def paths() -> list[str]:
    """Of the libraries of that name that this process has loaded."""
    try:
        held = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/\S*libcublasLt\.so\S*", held)))


@functools.cache
def loaded() -> CublasLt | str:
    """What torch has loaded, or why it cannot be taken: none, or no single one."""
    found = paths()
    if len(found) == 1:
        return CublasLt(found[0])
    return f"this process has loaded {len(found)} libraries libcublasLt.so, not one{': ' if found else ''}{', '.join(found)}"


class CublasLt:
    def __init__(self, path: str) -> None:
        self.path = path
        self.c = c.CDLL(path)
        self.c.cublasLtGetVersion.restype = c.c_size_t
        self.version = int(self.c.cublasLtGetVersion())

    def __call__(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.c, f"cublasLt{name}")(*arguments):
            raise CublasLtError(f"cublasLt{name} gives status {status}")


class Product:
    """One algorithm on the device that is current: the first in cuBLASLt's own order that splits nothing.

    Any thread may call it, for any number of rows that its kind allows.
    """

    def __init__(self, lt: CublasLt, handle: c.c_void_p, kind: Kind) -> None:
        self.lt, self.handle, self.kind = lt, handle, kind
        self._one_call = threading.Lock()  # rows and addresses are written into what follows
        self._desc = c.c_void_p()
        lt("MatmulDescCreate", c.byref(self._desc), _COMPUTE_32F, _R_32F)
        self._set("MatmulDescSetAttribute", self._desc, _DESC_TRANSA, c.c_int32(_OP_T))
        if kind.form == BIAS:
            self._set("MatmulDescSetAttribute", self._desc, _DESC_EPILOGUE, c.c_uint32(_EPILOGUE_BIAS))
        shapes = (kind.k, kind.n), (kind.k, kind.rows), (kind.n, kind.rows)
        self._weight, self._x, self._y = (self._layout(*shape) for shape in shapes)
        self._rows = kind.rows
        self._alpha, self._beta = c.c_float(1.0), c.c_float(float(kind.form == RESIDUAL))
        self.algorithm, self.config = self._unsplit()

    def __call__(self, x: Tensor, weight: Tensor, more: Tensor | None, y: Tensor, stream: int) -> None:
        """more: the bias or the residual of its form. All contiguous, aligned and on the device."""
        into = c.c_void_p(y.data_ptr())
        added = into if more is None or self.kind.form == BIAS else c.c_void_p(more.data_ptr())
        with self._one_call:
            if len(x) != self._rows:
                for layout in (self._x, self._y):
                    self._set("MatrixLayoutSetAttribute", layout, _LAYOUT_COLUMNS, c.c_uint64(len(x)))
                self._rows = len(x)
            if more is not None and self.kind.form == BIAS:
                self._set("MatmulDescSetAttribute", self._desc, _DESC_BIAS_POINTER, c.c_void_p(more.data_ptr()))
            operands = (c.c_void_p(weight.data_ptr()), self._weight, c.c_void_p(x.data_ptr()), self._x, c.byref(self._beta))
            results = (added, self._y, into, self._y, c.byref(self.algorithm), None, c.c_size_t(0), c.c_void_p(stream))
            self.lt("Matmul", self.handle, self._desc, c.byref(self._alpha), *operands, *results)

    def _unsplit(self) -> tuple[Algorithm, dict[str, int]]:
        found, count, preference = (Heuristic * 32)(), c.c_int(), c.c_void_p()
        self.lt("MatmulPreferenceCreate", c.byref(preference))
        wanted = [(_PREFER_WORKSPACE, c.c_uint64(0)), (_PREFER_REDUCTION, c.c_uint32(0))]
        wanted += [(attribute, c.c_uint32(ALIGNMENT)) for attribute in _PREFER_ALIGNMENT]
        try:
            for attribute, value in wanted:
                self._set("MatmulPreferenceSetAttribute", preference, attribute, value)
            given = (self.handle, self._desc, self._weight, self._x, self._y, self._y, preference)
            self.lt("MatmulAlgoGetHeuristic", *given, len(found), found, c.byref(count))
        finally:
            self.lt("MatmulPreferenceDestroy", preference)
        listed = [(one, dict(self._config(one.algorithm)), self._numerics(one.algorithm)) for one in found[: count.value]]
        for one, config, numerics in listed:
            whole = config["splitk"] in (0, 1) and config["reduction"] == 0 and one.workspace == 0
            float32 = numerics & _TENSOR_CORES and numerics & _SUMS == _SUMS_32F
            if one.state == 0 and whole and float32:
                return one.algorithm, config
        first = "".join(f"; the first: {config}, numerics {numerics:#x}" for _, config, numerics in listed[:1])
        raise CublasLtError(
            f"none of its {len(listed)} algorithms is without a split of K, a reduction and a workspace, on tensor cores "
            f"with float32 sums{first}"
        )

    def _layout(self, rows: int, columns: int) -> c.c_void_p:
        layout = c.c_void_p()
        sizes = c.c_uint64(rows), c.c_uint64(columns), c.c_int64(rows)
        self.lt("MatrixLayoutCreate", c.byref(layout), _DATA[self.kind.dtype], *sizes)
        return layout

    def _set(self, name: str, of: c.c_void_p, attribute: int, value: Any) -> None:
        self.lt(name, of, attribute, c.byref(value), c.c_size_t(c.sizeof(value)))

    def _config(self, algorithm: Algorithm) -> Iterator[tuple[str, int]]:
        """-1 for what it does not say."""
        for name, attribute in _CONFIG.items():
            value, written = c.c_uint32(), c.c_size_t()
            get = self.lt.c.cublasLtMatmulAlgoConfigGetAttribute
            status = get(c.byref(algorithm), attribute, c.byref(value), c.c_size_t(c.sizeof(value)), c.byref(written))
            if status and name in ("stages", "cluster"):  # some are 16 bits wide, and some libraries do not have them
                short = c.c_uint16()
                status = get(c.byref(algorithm), attribute, c.byref(short), c.c_size_t(c.sizeof(short)), c.byref(written))
                value = c.c_uint32(short.value)
            yield name, -1 if status else value.value

    def _numerics(self, algorithm: Algorithm) -> int:
        """What it says of its products and sums, 0 if it says nothing."""
        flags, written = c.c_uint64(), c.c_size_t()
        get = self.lt.c.cublasLtMatmulAlgoCapGetAttribute
        status = get(c.byref(algorithm), _NUMERICS, c.byref(flags), c.c_size_t(c.sizeof(flags)), c.byref(written))
        return 0 if status else flags.value


def handle(lt: CublasLt) -> c.c_void_p:
    """For the device that is current."""
    made = c.c_void_p()
    lt("Create", c.byref(made))
    return made
