"""The part of docs/GPU.md about Triton's kernels."""

from __future__ import annotations

import triton

from tools.witness.triton_kernels import ARCHITECTURES, KB, Program


def page(found: list[Program]) -> str:
    rows: dict[tuple[str, ...], dict[int, Program]] = {}
    for p in found:
        rows.setdefault((p.name, p.what), {})[p.arch] = p
    lines = [
        "| kernel | call | "
        + " | ".join(f"sm_{a}: registers x threads, shared KB" for a in ARCHITECTURES)
        + " | tensor cores |",
        "|---|---|" + "---|" * len(ARCHITECTURES) + "---|",
    ]
    merged: dict[tuple[str, ...], list[str]] = {}
    for (name, what), each in sorted(rows.items()):
        cells = [f"{p.registers} x {p.threads}, {p.shared / KB:.1f}" if (p := each.get(a)) else "" for a in ARCHITECTURES]
        matrix = sorted({".".join(op.split(".")[:2]) for p in each.values() for op in p.matrix})
        dtype, _, rest = what.partition(", ")
        merged.setdefault((name, rest, *cells, ", ".join(matrix)), []).append(dtype)
    for (name, rest, *cells), dtypes in merged.items():
        lines.append(f"| `{name}` | {', '.join([*dtypes, rest]).removesuffix(', ')} | {' | '.join(cells)} |")
    return "\n".join(
        [
            "## Triton's kernels",
            "",
            f"Triton {triton.__version__} and the ptxas that it brings; {len(found)} programs for "
            f"{', '.join(f'sm_{a}' for a in ARCHITECTURES)}, each kernel in every tile. In all of them: no spills, no local "
            "memory, no atomics, no product that ptxas fused with a sum, and outside mode tensor no instruction outside the "
            "contract. In mode tensor every tile has HMMA, on sm_90 HGMMA, and no other. `make cuda-check` looks. Sizes are "
            "those of usual models: attention in mode tensor does spill, and is slow, where a head has more than 128 features "
            "and their number is no multiple of 16, and on sm_90 where it has a window besides more than 128 features.",
            "",
            "<details><summary>Registers and shared memory of every program</summary>",
            "",
            *lines,
            "",
            "</details>",
            "",
        ]
    )
