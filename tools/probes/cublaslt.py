"""Has cuBLASLt an algorithm that splits no sum and gives our bytes in mode tensor, for the products of bge base and large, and
which kernel does torch take for nn.Linear at each M?

Published work says that an unsplit kernel on Hopper (nvjet) adds ascending chains of 16 terms, as mode tensor does. A trial is
the one after which RERANK_KERNELS_CUBLASLT=1 lets it serve (rerank_kernels/backend/native/proven.py).

One line of JSON. trials: one row per dtype, N, K, form and class of M, with the algorithm and both times. torch: one row per M.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import _times
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

from rerank_kernels.backend.native.cublaslt import Product

SECONDS = 35
DEVICE = "cuda"  # tests have another
CLASSES = (16384, 4096, 1024, 256, 64)  # of M; the class below 64 is ours
ROWS = (16384, 4096, 1024, 200, 64, 17, 16, 8, 3, 2, 1)
SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))  # N, K of bge base and large
DTYPES = (torch.float16, torch.bfloat16)
TRIALS = ("dtype", "N", "K", "form", "M to", "its bits are ours", "why", "its choice", "its ms", "our ms")
TORCH = ("dtype", "N", "K", "bias", "M", "kernels", "= ours", "as at 16384")


def milliseconds(call: Callable[[], object]) -> float:
    return round(_times.milliseconds(call, calls=10, turns=5, before=1), 5)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    import rerank_kernels as rk

    return rk.linear(x, weight, bias, residual=residual, mode="tensor")


def trials(n: int, k: int, dtype: torch.dtype) -> Iterator[list[Any]]:
    from rerank_kernels.backend.native import cublaslt, proven

    here = proven.of(torch.empty(0, device=DEVICE).device)
    if here is None:
        yield [str(dtype)[6:], n, k, "", 0, False, str(cublaslt.loaded()), "", None, None]
        return
    for form in (cublaslt.PRODUCT, cublaslt.BIAS, cublaslt.RESIDUAL):
        for rows in CLASSES:
            kind = cublaslt.Kind(dtype, n, k, form, rows)
            verdict = proven.judged(here, kind, plain)
            about = [str(dtype)[6:], n, k, form, rows, verdict.product is not None, verdict.why]
            if verdict.product is None:
                yield [*about, "", None, None]
                continue
            config = " ".join(f"{name} {value}" for name, value in verdict.product.config.items())
            yield [*about, config, *times(verdict.product)]


def times(product: Product) -> tuple[float, float]:
    """Its milliseconds, and ours."""
    from rerank_kernels.backend.native import cublaslt, proven

    dtype, n, k, form, rows = product.kind
    x, w, y = (torch.randn(shape, device=DEVICE).to(dtype) for shape in ((rows, k), (n, k), (rows, n)))
    bias = torch.randn(n, device=DEVICE).to(dtype) if form == cublaslt.BIAS else None
    residual = torch.randn_like(y) if form == cublaslt.RESIDUAL else None
    more, stream = bias if residual is None else residual, proven.stream(x.device)
    theirs = milliseconds(lambda: product(x, w, more, y, stream))
    return theirs, milliseconds(lambda: plain(x, w, bias, residual))


def started(call: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """What a call gives, and the names of the kernels that it starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = call()
        torch.cuda.synchronize()
    names = [
        e.name for e in profile.events() if e.device_type == DeviceType.CUDA and not e.name.startswith(("Memset", "Memcpy"))
    ]
    return out, " + ".join(names)


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))


def of_torch(n: int, k: int, dtype: torch.dtype) -> Iterator[list[Any]]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(ROWS[0], k, generator=generator, device=DEVICE).to(dtype)
    w = torch.randn(n, k, generator=generator, device=DEVICE).mul_(k**-0.5).to(dtype)
    for bias in (None, torch.randn(n, generator=generator, device=DEVICE).to(dtype)):
        first = F.linear(x, w, bias)[:1]
        for m in ROWS:
            theirs, kernels = started(lambda m=m, bias=bias: F.linear(x[:m], w, bias))  # type: ignore[misc]
            ours = plain(x[:m], w, bias, None)
            yield [str(dtype)[6:], n, k, bias is not None, m, kernels, same(theirs, ours), same(theirs[:1], first)]


def main() -> None:
    import rerank_kernels as rk
    from rerank_kernels.backend.native import cublaslt

    until = float(os.environ.get("GPU_REPORT_UNTIL", "inf")) - 3.0
    found: dict[str, list[list[Any]]] = {"trials": [], "torch": []}
    with rk.use("cuda"):
        plain(*(torch.ones(16, 16, device=DEVICE).half() for _ in range(2)), None, None)
        F.linear(*(torch.ones(16, 16, device=DEVICE).half() for _ in range(2)))  # loads what torch takes
        for name, rows in (("trials", trials), ("torch", of_torch)):
            for dtype in DTYPES:
                for n, k in SHAPES:
                    for row in rows(n, k, dtype):
                        found[name].append(row)
                        if time.time() > until:  # what was found must still be printed
                            break
    lt = cublaslt.loaded()
    equal = sum(row[5] for row in found["trials"])
    counts = {"trials": len(found["trials"]), "of": len(DTYPES) * len(SHAPES) * 3 * len(CLASSES), "equal": equal}
    heads = {"trials": TRIALS, "torch": TORCH}
    print(json.dumps({"counts": counts, "cublasLt": lt if isinstance(lt, str) else lt.version, "heads": heads, **found}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
