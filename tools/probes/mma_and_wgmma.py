"""Are the sums of mma.sync (backend cuda) those of Triton's instruction (wgmma on Hopper), also for subnormals, far exponents,
infinities and NaN?

Mode tensor's arithmetic could then be promised for an architecture, whatever instruction gives it. One matrix instruction per
sum (K = 16) and chains (K = 768), float32 results, compared bit for bit; every NaN counts as the same.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

SECONDS = 20
SIDE = 8192  # SIDE * SIDE sums per kind of operands, at K = 16
KINDS = ("normal", "far exponents", "subnormal", "zeros", "infinities", "NaN")


def operands(kind: str, side: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(side, k, generator=generator, device="cuda")
    chance = torch.rand(side, k, generator=generator, device="cuda")
    if kind == "far exponents":
        x *= torch.exp2(torch.randint(-12, 5, x.shape, generator=generator, device="cuda").float())
    elif kind == "subnormal":
        x *= torch.finfo(dtype).smallest_normal
    elif kind == "zeros":
        x = torch.where(chance < 0.7, torch.copysign(torch.zeros_like(x), x), x)
    elif kind in ("infinities", "NaN"):
        x[chance < 1e-3] = float("inf") if kind == "infinities" else float("nan")
    return x.to(dtype)


def main() -> None:
    import rerank_kernels as rk

    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        for kind in KINDS:
            for k, side in ((16, SIDE), (768, SIDE // 4)):
                x, w = operands(kind, side, k, dtype, 1), operands(kind, side, k, dtype, 2)
                got = []
                for backend in ("cuda", "triton"):
                    with rk.use(backend):
                        got.append(rk.linear(x, w, out_dtype=torch.float32, mode="tensor"))
                differ = (got[0].view(torch.int32) != got[1].view(torch.int32)) & ~(got[0].isnan() & got[1].isnan())
                signs = differ & (got[0] == 0) & (got[1] == 0)
                first = differ.nonzero()[:1].tolist()
                example = [float(g[first[0][0], first[0][1]]).hex() for g in got] if first else None
                rows.append([str(dtype)[6:], kind, k, side * side, int(differ.sum()), int(signs.sum()), example])
    heads = ["dtype", "operands", "K", "sums", "differ", "of these only in the sign of a zero", "first that differs"]
    print(json.dumps({"sums": sum(r[3] for r in rows), "differ": sum(r[4] for r in rows), "heads": heads, "rows": rows}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
