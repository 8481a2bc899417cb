"""The one place where a kernel is started, and the options that its bits depend on.

tests/simulated puts a simulator in the place of `run`; it compiles with the very same options.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from triton.backends.nvidia.compiler import CUDAOptions

from rerank_kernels.errors import BackendError

# Without enable_fp_fusion=False a product and a sum become an fma, where LLVM or ptxas likes. Functions of libdevice are not
# used; should one come in, it keeps subnormals.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
# LLVM orders instructions for few live registers, where Triton knows how: without it the element functions of a large tile, and
# some other kernels, spill. No bit depends on it.
if "sched4reg" in CUDAOptions.__dataclass_fields__:
    OPTIONS["sched4reg"] = True
# maxnreg of kernels for which ptxas would otherwise take 128 or 168 registers and spill, so that one more block fits
REGISTERS = 255


def start(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel<<<grid>>>(*arguments) on the device of its first tensor; nothing if the grid is empty.

    constants: the kernel's tl.constexpr arguments, and num_warps or num_stages, which are no part of any expression.
    """
    if 0 not in grid:
        run(kernel, grid, arguments, {**constants, **OPTIONS})


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    first = next(a for a in arguments if isinstance(a, torch.Tensor))
    with torch.cuda.device(first.device):
        kernel[grid](*arguments, **constants)


def architecture(tensor: torch.Tensor) -> int:
    """The compute capability of the tensor's GPU, 90 for an H100: all of the GPU that mode tensor picks its tiles by."""
    return _architecture(tensor.get_device())


def matrix_instruction(arch: int) -> str:
    """What Triton makes of tl.dot. Where it is wgmma, tiles of less than 64 rows would get mma.sync, whose sums are others.
    GPUs that add in a third way (tcgen05) are left out: which tile gets which instruction there was not looked at."""
    known = {8: "mma.sync", 9: "wgmma", 12: "mma.sync"}
    if arch // 10 not in known:
        raise BackendError(
            f"backend 'triton' has no mode 'tensor' for compute capability {arch // 10}.{arch % 10}, only for 8.x, 9.0 "
            "and 12.x; take backend 'cuda' or mode='portable'"
        )
    return known[arch // 10]


@functools.cache
def _architecture(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def blocks(n: int, size: int) -> int:
    return -(-n // size)
