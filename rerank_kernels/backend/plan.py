"""What mode "tensor" does on which GPU, for an op, its features, an architecture and a backend: the matrix instruction, how
many of them make one sum, and the tiles that the launcher chooses from. A pure function; it needs no GPU.

All tiles of a row of this table take the same instructions in the same order for an output. So the choice is in no bit. CUDA
C++ has tiles for every architecture, csrc/cuda/sm80/tiles.h, and on a Hopper others, for linear and for heads of 64 and 128,
csrc/cuda/sm90/tiles.h; the C++ library holds both without CUDA too. Triton's are its own tables, read where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rerank_kernels.backend import library
from rerank_kernels.errors import BackendError

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
MMA, WGMMA = "mma.sync m16n8k16", "wgmma m64nNk16"
K_STEP = 16  # of either instruction
WIDEST_HEAD = 256


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int  # outputs of linear, keys of attention
    threads: int
    shared: int | None  # bytes; None: the compiler decides


@dataclass(frozen=True)
class Row:
    op: str
    features: str  # "N 768, K 3072", "head 64": what the order of a sum depends on
    arch: int
    backend: str
    instruction: str
    count: int  # of instructions in a sum over K, or over the head's features
    tiles: tuple[Tile, ...]


def plan(arch: int, linears: Sequence[tuple[int, int]], heads: Sequence[int]) -> Iterator[Row]:
    """Rows for products with weights [N, K] and for heads of so many features; float16 and bfloat16 alike."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"plan: arch must be one of {', '.join(map(str, ARCHITECTURES))}, got {arch}")
    for n, k in linears:
        if n < 1 or k < 1:
            raise ValueError(f"plan: N and K must be >= 1, got {n} and {k}")
        features = f"N {n}, K {k}"
        if cuda_gap() is None:
            yield Row("linear, bmm", features, arch, "cuda", *cuda_linear(arch, k))
        if triton_gap(arch) is None:
            yield triton_linear(features, arch, k)
    for d in heads:
        if not 1 <= d <= WIDEST_HEAD:
            raise ValueError(f"plan: a head must have 1 to {WIDEST_HEAD} features, got {d}")
        features = f"head {d}"
        if cuda_gap() is None:
            yield Row("attention", features, arch, "cuda", *cuda_attention(arch, d))
        if triton_gap(arch) is None:
            yield triton_attention(features, arch, d)


def cuda_gap() -> str | None:
    """Why the tiles of the CUDA kernels are not known here, None if they are."""
    return library.missing()


def cuda_linear(arch: int, k: int) -> tuple[str, int, tuple[Tile, ...]]:
    """On a Hopper TMA wants rows of whole 16 bytes, and addresses, which are not known here, at multiples of them. Where they
    do not fit, the tiles for every architecture serve, with the same bits.
    """
    hopper = arch == 90 and k % 8 == 0
    tiles = library.launch_tables()["sm90" if hopper else "sm80"]["linear"]
    return WGMMA if hopper else MMA, ceil_div(k, K_STEP), tuple(Tile(*numbers) for numbers in tiles)


def cuda_attention(arch: int, d: int) -> tuple[str, int, tuple[Tile, ...]]:
    """On a Hopper, too, the tiles for every architecture serve where TMA cannot take keys or values, with the same bits."""
    tables = library.launch_tables()
    hopper = arch == 90 and str(d) in tables["sm90"]["attention"]
    widths = tables["sm90" if hopper else "sm80"]["attention"]
    tiles = widths[str(min(w for w in map(int, widths) if d <= w))]
    return WGMMA if hopper else MMA, ceil_div(d, K_STEP), tuple(Tile(*numbers) for numbers in tiles)


def triton_gap(arch: int) -> str | None:
    """Why Triton has no plan for this architecture, None if it has."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        triton_instruction(arch)
    except BackendError as error:
        return str(error)
    return None


def triton_instruction(arch: int) -> str:
    from rerank_kernels.backend.triton.launch import matrix_instruction

    return {"mma.sync": MMA, "wgmma": WGMMA}[matrix_instruction(arch)]


def triton_linear(features: str, arch: int, k: int) -> Row:
    from rerank_kernels.backend.triton import linear

    # a step of the loop is STEP k's, zeros beyond K
    count = ceil_div(k, linear.STEP) * linear.STEP // K_STEP
    tiles = tuple(Tile(t.rows, t.columns, t.warps * 32, None) for t in linear.tensor_tiles(arch))
    return Row("linear, bmm", features, arch, "triton", triton_instruction(arch), count, tiles)


def triton_attention(features: str, arch: int, d: int) -> Row:
    from rerank_kernels.backend.triton import attention

    low, high = attention.parts(d, arch)
    tiles = tuple(Tile(t.rows, attention.keys(d), t.warps * 32, None) for t in attention.tensor_tiles(d, arch))
    return Row("attention", features, arch, "triton", triton_instruction(arch), (low + high) // K_STEP, tiles)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
