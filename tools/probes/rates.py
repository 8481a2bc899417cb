"""How fast are this chip's other products at a model's size: int8, tf32, float32, beside float16 and bfloat16?

16384 x 768 x 3072 through PyTorch's own libraries: what a mode on int8 slices, or on two halves per float32, could reach.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch

SECONDS = 15
M, K, N = 16384, 768, 3072


def seconds(call: Callable[[], object], calls: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / calls)
    return statistics.median(times)


def main() -> None:
    x, w = torch.randn(M, K, device="cuda"), torch.randn(N, K, device="cuda")
    found: dict[str, object] = {}

    def rate(name: str, call: Callable[[], object], tf32: bool = False) -> None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            found[name] = round(2.0 * M * K * N / seconds(call) * 1e-12, 1)
        except RuntimeError as error:
            found[name] = str(error)[:100]

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        a, b = x.to(dtype), w.to(dtype).t()
        rate(str(dtype)[6:], lambda a=a, b=b: a @ b)
    rate("tf32", lambda: x @ w.t(), tf32=True)
    a, b = (t.mul(40).clamp(-127, 127).to(torch.int8) for t in (x, w))
    rate("int8", lambda: torch._int_mm(a, b.t()))
    print(json.dumps({"TFLOP/s": found, "of": f"{M} x {K} x {N}"}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
