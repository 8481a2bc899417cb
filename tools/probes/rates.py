"""How fast are this chip's other products, int8, tf32 and float32 beside float16: in libraries, as wgmma alone (Hopper), and
ours in mode portable by each of its ways?

What a mode on int8 slices or on two halves per float32 could reach, and how far our float32 is from cuBLAS's. TFLOP/s.
16384 x 768 x 3072 through PyTorch's own libraries; wgmma with nothing around it, from operands that stay where they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import _cubin
import _times
import torch
from _wgmma import RATED

SECONDS = 25
DEVICE = "cuda"  # tests have another
M, K, N = 16384, 768, 3072
FLOATING = 2.0 * M * K * N


def seconds(call: Callable[[], object], calls: int) -> float:
    return _times.milliseconds(call, calls, turns=7, before=3) * 1e-3


def rate(call: Callable[[], object], work: float = FLOATING, calls: int = 20) -> float | str:
    try:
        return round(work / seconds(call, calls) * 1e-12, 1)
    except RuntimeError as error:
        return str(error)[:100]


def libraries(x: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = x.to(dtype), w.to(dtype).t()
        found[str(dtype)[6:]] = rate(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = rate(lambda: x @ w.t())
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = (t.mul(40).clamp(-127, 127).to(torch.int8) for t in (x, w))
    found["int8"] = rate(lambda: torch._int_mm(a, b.t()))
    return found


def wgmma() -> dict[str, Any]:
    """m64n256, two warpgroups per multiprocessor; "float32 as two halves" is three products of float16."""
    try:
        kernels = _cubin.load("rates")
    except _cubin.Unfit as error:
        return {"note": str(error)}
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    out, count = torch.empty(1024, dtype=torch.int32, device=DEVICE), 2000
    found: dict[str, Any] = {}
    for kind, k in RATED.items():
        work = 2.0 * 64 * 256 * k * 4 * count * 2 * blocks
        found[kind] = rate(lambda kind=kind: kernels[f"rate_{kind}"]((blocks, 1), 256, out, count), work, 5)  # type: ignore[misc]
    if isinstance(found["f16"], float):
        found["float32 as two halves"] = round(found["f16"] / 3, 1)
    return found


def ours(x: torch.Tensor, w: torch.Tensor) -> dict[str, Any]:
    import rerank_kernels as rk
    from tools.gpu_report.work import launchers

    with rk.use("cuda"):
        found = {"its choice": rate(lambda: rk.linear(x, w), calls=5)}
        for way in range(launchers.listed()["linear"]):
            with launchers.forced("linear", way):
                found[f"way {way}"] = rate(lambda: rk.linear(x, w), calls=3)
    return found


def main() -> None:
    x, w = torch.randn(M, K, device=DEVICE), torch.randn(N, K, device=DEVICE)
    found = {"libraries": libraries(x, w), "wgmma alone": wgmma(), "ours, portable float32": ours(x, w)}
    print(json.dumps({"TFLOP/s": found, "of": f"{M} x {K} x {N}"}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
