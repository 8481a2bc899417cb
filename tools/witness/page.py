"""The part of docs/GPU.md about CUDA's kernels."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import toolkit
from tools.witness.kernels import ARCHITECTURES, Kernel, readable
from tools.witness.launches import Launch, launches, shapes
from tools.witness.occupancy import LIMITS, blocks_per_sm

PAGE = Path(__file__).parent.parent.parent / "docs" / "GPU.md"


@dataclass(frozen=True)
class Chip:
    """From the maker's data sheets: float32 outside tensor cores, float16 in them with float32 sums, memory bandwidth."""

    name: str
    arch: str
    multiprocessors: int
    flops: float
    tensor_flops: float
    bandwidth: float


CHIPS = (
    Chip("A100 80 GB SXM", "80", 108, 19.5e12, 312e12, 2039e9),
    Chip("L4", "89", 58, 30.3e12, 121e12, 300e9),
    Chip("H100 SXM", "90", 132, 67e12, 989e12, 3350e9),
    Chip("RTX 4090", "89", 128, 82.6e12, 165e12, 1008e9),
)


def _microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}" if us >= 1 else f"{us:.2f}"


def _big(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "


def estimates(kernels: dict[tuple[str, str], Kernel], real: list[list[Launch]]) -> list[str]:
    lines = [
        "| call | FLOP, bytes | " + " | ".join(c.name for c in CHIPS) + " | launches |",
        "|---|---|" + "---|" * len(CHIPS) + "---|",
    ]
    for shape, noted in zip(shapes(), real, strict=True):
        cells = []
        for chip in CHIPS:
            compute = shape.flop / (chip.tensor_flops if shape.tensor else chip.flops)
            memory = shape.bytes / chip.bandwidth
            unit = "mma" if shape.tensor else "fma"
            cell = f"{_microseconds(max(compute, memory))} {unit if compute > memory else 'memory'}"
            if compute > memory and not shape.tensor:
                fma, all_ops = max(kernels[n.mangled, chip.arch].code.hot() for n in noted)  # of the kernel that computes most
                slots = LIMITS[chip.arch].lanes / 128
                cell += f", {_microseconds(compute / min(1.0, fma / all_ops / slots))} issue"
            cells.append(cell)
        told = "; ".join(f"`{readable(n.mangled)}` {n.blocks:,} x {n.block}" for n in noted)
        lines.append(f"| {shape.label} | {_big(shape.flop)}FLOP, {_big(shape.bytes)}B | {' | '.join(cells)} | {told} |")
    return lines


def table(kernels: dict[tuple[str, str], Kernel], one: dict[str, Launch]) -> list[str]:
    """A row a kernel; instances of a template with equal figures share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    families = {m: k.family for (m, _), k in kernels.items()}
    for mangled in sorted(families, key=lambda m: (families[m], readable(m))):
        each = {a: kernels[mangled, a] for a in ARCHITECTURES if (mangled, a) in kernels}
        launch, first = one[mangled], next(iter(each.values()))
        shared = first.static_shared + launch.shared
        resident = {a: blocks_per_sm(a, k.registers, k.static_shared + launch.shared, launch.block) for a, k in each.items()}
        warps = {a: resident[a] * math.ceil(launch.block / 32) for a in each}
        others = [a for a in each if a not in ("80", "120")]

        def between(values: list[int]) -> str:
            return f"{min(values)}" if min(values) == max(values) else f"{min(values)}..{max(values)}"

        def full(k: Kernel) -> str:
            fma, all_ops = k.code.hot()
            return f"{fma} / {all_ops}" if fma else ""

        figures = (
            families[mangled],
            readable(mangled).split("<")[0],
            f"{launch.block}",
            f"{shared / 1024:.1f}",
            *(
                f"{each[a].registers} | {resident[a]} x {launch.block // 32} = {warps[a]}" if a in each else " | "
                for a in ("80", "120")
            ),
            f"{between([each[a].registers for a in others])} | {between([warps[a] for a in others])}",
            full(first),
        )
        rows.setdefault(figures, []).append(readable(mangled).partition("<")[2].removesuffix(">"))
    lines = [
        "| room/family | kernel | threads | shared KB | sm_80 registers | blocks x warps | sm_120 registers | blocks x warps "
        "| others' registers | warps | hot loop: fma or mma / all |",
        "|" + "---|" * 11,
    ]
    for (family, name, *figures), instances in rows.items():
        arguments = f"`<{'>` `<'.join(instances)}>`" if instances[0] else ""
        lines.append(f"| {family} | `{name}` {arguments} | {' | '.join(figures)} |")
    return lines


def page(found: list[Kernel]) -> str:
    kernels = {(k.mangled, k.arch): k for k in found}
    real, one = launches()
    count = len({k.mangled for k in found if k.arch == ARCHITECTURES[0]})
    hopper = len({k.mangled for k in found}) - count
    fma = sum(len(re.findall(r"\bfma\.rn\.f32\b", k.ptx)) for k in found)
    kit = toolkit.find()
    assert kit is not None
    limits = [
        "| | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|" + "---|" * len(ARCHITECTURES),
        *(
            f"| {what} | " + " | ".join(str(getattr(LIMITS[a], field)) for a in ARCHITECTURES) + " |"
            for what, field in (
                ("warps", "warps"),
                ("blocks", "blocks"),
                ("shared KB", "shared"),
                ("float32 fma per clock", "lanes"),
            )
        ),
    ]
    return "\n".join(
        [
            f"nvcc {kit.release}; {count} kernels for each of {', '.join('sm_' + a for a in ARCHITECTURES)}, and "
            f"{hopper} for sm_90a alone, which were never run on a GPU. In all of them: "
            "no instruction outside the contract, no spills and no local memory, no atomics, and tensor cores in those of mode "
            f"tensor only; {fma:,} fma in PTX, and no product that ptxas fused with a sum.",
            "",
            "## Times: estimated, not measured",
            "",
            *estimates(kernels, real),
            "",
            "Microseconds: the larger of FLOP / (the data sheet's float32 rate outside tensor cores; for mode tensor its "
            "float16 rate in them) and bytes / bandwidth, every operand moved once. `issue`: with the instructions beside fma "
            "in the hot loop, at 128 issued per clock. "
            "Left out: latency, the last wave, caches, clocks under load. Launches, blocks x threads, are the launchers' own.",
            "",
            "<details><summary>Registers, shared memory and occupancy of every kernel</summary>",
            "",
            *table(kernels, one),
            "",
            "Threads and shared memory as in the calls above; for a kernel that they do not reach, in a call with 256 x 768 "
            "features, a longer row, or a way forced on the launcher. Occupancy from these limits of a multiprocessor "
            "with 65,536 registers (CUDA C++ Programming Guide, "
            '"Technical Specifications per Compute Capability"; `cuda_occupancy.h`):',
            "",
            *limits,
            "",
            "</details>",
            "",
        ]
    )
