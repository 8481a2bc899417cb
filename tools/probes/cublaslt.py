"""Which cuBLASLt kernel does torch take for nn.Linear's layout at each M, is there an unsplit choice, and do their bytes equal
ours in mode tensor?

Published work says that an unsplit kernel on Hopper (nvjet) adds ascending chains of 16 terms, as mode tensor does. If its
bytes are ours, the library may serve such a shape. `torch`: the kernels that F.linear starts. `unsplit`: cuBLASLt's first
answer with split-K 1 and no reduction. `as torch at 16384`: whether M itself moves the bytes of the first row.

One line of JSON: heads and rows, one row per dtype, N, K, bias and M.
"""

from __future__ import annotations

import ctypes as c
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

SECONDS = 35
ROWS = (16384, 4096, 1024, 200, 64, 17, 16, 8, 3, 2, 1)
SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))  # N, K of bge base and large
HEADS = (
    "dtype",
    "N",
    "K",
    "bias",
    "M",
    "torch",
    "torch = ours",
    "as torch at 16384",
    "unsplit",
    "its choice",
    "unsplit = ours",
)
WORKSPACE = 32 << 20

# of cublasLt.h, the same since CUDA 11
COMPUTE_32F, R_32F, OP_T, EPILOGUE_BIAS = 68, 0, 1, 4
DATA = {torch.float16: 2, torch.bfloat16: 14}
DESC_TRANSA, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 7, 8
PREFER_WORKSPACE, PREFER_REDUCTION = 1, 3
CONFIG = {"id": 0, "tile": 1, "splitk": 2, "reduction": 3, "stages": 6, "cluster": 8}


class Algo(c.Structure):
    _fields_ = (("data", c.c_uint64 * 8),)


class Heuristic(c.Structure):
    _fields_ = (
        ("algo", Algo),
        ("workspace", c.c_size_t),
        ("state", c.c_int),
        ("waves", c.c_float),
        ("reserved", c.c_int * 4),
    )


class Lt:
    """cuBLASLt as torch has loaded it: y = x w^T (+ bias) in rows is D = A^T B in columns, with A = w and B = x."""

    def __init__(self) -> None:
        paths = set(re.findall(r"\S*libcublasLt\.so\S*", Path("/proc/self/maps").read_text()))
        self.library = c.CDLL(paths.pop())
        self.handle = c.c_void_p()
        self("Create", c.byref(self.handle))
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")

    def __call__(self, name: str, *arguments: Any) -> None:
        if status := getattr(self.library, f"cublasLt{name}")(*arguments):
            raise RuntimeError(f"cublasLt{name} gives status {status}")

    def unsplit(self, x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, int]] | None:
        """The result, and the algorithm: the heuristic's first without a split of K."""
        (m, k), n = x.shape, w.shape[0]
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        desc, preference = c.c_void_p(), c.c_void_p()
        self("MatmulDescCreate", c.byref(desc), COMPUTE_32F, R_32F)
        self("MatmulPreferenceCreate", c.byref(preference))
        self._set("MatmulDescSetAttribute", desc, DESC_TRANSA, c.c_int32(OP_T))
        if bias is not None:
            self._set("MatmulDescSetAttribute", desc, DESC_EPILOGUE, c.c_uint32(EPILOGUE_BIAS))
            self._set("MatmulDescSetAttribute", desc, DESC_BIAS_POINTER, c.c_void_p(bias.data_ptr()))
        self._set("MatmulPreferenceSetAttribute", preference, PREFER_WORKSPACE, c.c_uint64(WORKSPACE))
        self._set("MatmulPreferenceSetAttribute", preference, PREFER_REDUCTION, c.c_uint32(0))
        layouts = [self._layout(x.dtype, *shape) for shape in ((k, n), (k, m), (n, m))]
        found, count = (Heuristic * 16)(), c.c_int()
        a, b, d = layouts
        try:
            self("MatmulAlgoGetHeuristic", self.handle, desc, a, b, d, d, preference, len(found), found, c.byref(count))
            for one in found[: count.value]:
                config = self._config(one.algo)
                if one.state or config["splitk"] > 1 or config["reduction"]:
                    continue
                one_, zero, stream = c.c_float(1.0), c.c_float(0.0), c.c_void_p(torch.cuda.current_stream().cuda_stream)
                pointers = [c.c_void_p(t.data_ptr()) for t in (w, x, y, y)]
                operands = (pointers[0], a, pointers[1], b, c.byref(zero), pointers[2], d, pointers[3], d)
                space = (c.c_void_p(self.workspace.data_ptr()), c.c_size_t(WORKSPACE))
                self("Matmul", self.handle, desc, c.byref(one_), *operands, c.byref(one.algo), *space, stream)
                return y, config
            return None
        finally:
            for layout in layouts:
                self("MatrixLayoutDestroy", layout)
            self("MatmulPreferenceDestroy", preference)
            self("MatmulDescDestroy", desc)

    def _layout(self, dtype: torch.dtype, rows: int, columns: int) -> c.c_void_p:
        layout = c.c_void_p()
        sizes = c.c_uint64(rows), c.c_uint64(columns), c.c_int64(rows)
        self("MatrixLayoutCreate", c.byref(layout), DATA[dtype], *sizes)
        return layout

    def _set(self, name: str, of: c.c_void_p, attribute: int, value: Any) -> None:
        self(name, of, attribute, c.byref(value), c.c_size_t(c.sizeof(value)))

    def _config(self, algo: Algo) -> dict[str, int]:
        found = {}
        for name, attribute in CONFIG.items():
            value, written = c.c_uint32(), c.c_size_t()
            get = self.library.cublasLtMatmulAlgoConfigGetAttribute
            status = get(c.byref(algo), attribute, c.byref(value), c.c_size_t(c.sizeof(value)), c.byref(written))
            found[name] = -1 if status else value.value & (0xFFFF if written.value == 2 else 0xFFFFFFFF)
        return found


def started(call: Any) -> tuple[Any, str]:
    """What a call gives, and the names of the kernels that it starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = call()
        torch.cuda.synchronize()
    names = [
        e.name for e in profile.events() if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memset", "Memcpy"))
    ]
    return out, " + ".join(names)


def same(a: Tensor, b: Tensor | None) -> bool | None:
    return None if b is None else bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))


def main() -> None:
    import rerank_kernels as rk

    generator = torch.Generator("cuda").manual_seed(0)
    F.linear(torch.ones(16, 16, device="cuda").half(), torch.ones(16, 16, device="cuda").half())  # loads the library
    lt, rows, why, until = Lt(), [], "", float(os.environ.get("GPU_REPORT_UNTIL", "inf")) - 3.0
    for dtype in DATA:
        for n, k in SHAPES:
            x = torch.randn(ROWS[0], k, generator=generator, device="cuda").to(dtype)
            w = torch.randn(n, k, generator=generator, device="cuda").mul_(k**-0.5).to(dtype)
            for bias in (None, torch.randn(n, generator=generator, device="cuda").to(dtype)):
                first = F.linear(x, w, bias)[:1]
                for m in ROWS if time.time() < until else ():  # what was found must still be printed
                    some = x[:m]
                    theirs, kernel = started(lambda some=some, w=w, bias=bias: F.linear(some, w, bias))
                    ours = rk.linear(some, w, bias, mode="tensor")
                    y, unsplit, config = None, "", None
                    try:
                        found, unsplit = started(lambda some=some, w=w, bias=bias: lt.unsplit(some, w, bias))
                        y, config = found or (None, None)
                    except RuntimeError as error:
                        why = str(error)
                    said = " ".join(f"{name} {value}" for name, value in config.items()) if config else why or "none"
                    equal = same(theirs, ours), same(theirs[:1], first), same(ours, y)
                    about = (str(dtype)[6:], n, k, bias is not None, m)
                    rows.append([*about, kernel, equal[0], equal[1], unsplit, said, equal[2]])
    ours_too = [sum(bool(row[i]) for row in rows) for i in (6, 10)]
    calls = len(DATA) * len(SHAPES) * 2 * len(ROWS)
    counts = {"calls": len(rows), "of": calls, "torch equals ours": ours_too[0], "unsplit equals ours": ours_too[1]}
    print(json.dumps({"counts": counts, "cublasLt": lt.library.cublasLtGetVersion(), "heads": HEADS, "rows": rows}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
