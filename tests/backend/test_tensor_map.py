"""The stand-in for the driver's cuTensorMapEncodeTiled (simulated/cudart.cpp): what it takes, and what it refuses."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from conftest import ran
from ptxsim.tensormap import tensor_map

simulated = pytest.importorskip("simulated.cuda")
FLOAT16, BFLOAT16, INTERLEAVE_32B, SWIZZLE = 6, 9, 2, {0: 0, 32: 1, 64: 2, 128: 3}


@pytest.fixture(scope="module")
def driver() -> Any:
    ran("cuda")
    runtime = ctypes.CDLL(str(simulated.library()))
    found, answer = ctypes.c_void_p(), ctypes.c_int(-1)
    assert (
        runtime.cudaGetDriverEntryPoint(b"cuGraphExecUpdate", ctypes.byref(found), ctypes.c_uint64(), ctypes.byref(answer)) == 0
    )
    assert (found.value, answer.value) == (None, 1), "it has one function of the driver's"
    for name, version in (("cudaGetDriverEntryPoint", ()), ("cudaGetDriverEntryPointByVersion", (ctypes.c_uint(12000),))):
        ask = (b"cuTensorMapEncodeTiled", ctypes.byref(found), *version, ctypes.c_uint64(), ctypes.byref(answer))
        assert getattr(runtime, name)(*ask) == 0 and answer.value == 0
    return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 12)(found.value or 0)


def encode(
    driver: Any,
    x: np.ndarray,
    *,
    sizes: list[int],
    strides: list[int],
    box: list[int],
    swizzle: int = 128,
    dtype: int = FLOAT16,
    steps: list[int] | None = None,
    offset: int = 0,
    misplaced: int = 0,
    interleave: int = 0,
    fill: int = 0,
) -> tuple[int, bytes]:
    made = np.zeros(256, np.uint8)
    at = -made.ctypes.data % 64 + misplaced
    wide = [np.array(v, np.uint64) for v in (sizes, strides)]
    narrow = [np.array(v, np.uint32) for v in (box, steps or [1] * len(box))]
    pointers = [v.ctypes.data for v in (*wide, *narrow)]
    code = driver(
        made.ctypes.data + at, dtype, len(sizes), x.ctypes.data + offset, *pointers, interleave, SWIZZLE[swizzle], 0, fill
    )
    return code, made[at : at + 128].tobytes()


@pytest.fixture
def x() -> np.ndarray:
    memory = np.zeros(64 * 100 + 8, np.float16)
    at = -memory.ctypes.data % 16 // 2
    return memory[at : at + 6400].reshape(100, 64)


GOOD: dict[str, Any] = {"sizes": [64, 100], "strides": [128], "box": [64, 8]}


def test_it_makes_the_simulators_map(driver: Any, x: np.ndarray) -> None:
    for swizzle in SWIZZLE:
        box = [(swizzle or 128) // 2, 8]
        assert encode(driver, x, **{**GOOD, "box": box, "swizzle": swizzle}) == (0, tensor_map(x, box, swizzle))
    three = {"sizes": [64, 10, 10], "strides": [128, 1280], "box": [64, 1, 10], "dtype": BFLOAT16}
    assert encode(driver, x, **three) == (0, tensor_map(x.reshape(10, 10, 64), [64, 1, 10], 128))


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 2},
        {"misplaced": 16},
        {"strides": [120]},
        {"strides": [1 << 40]},
        {"sizes": [64, 0]},
        {"sizes": [64, (1 << 32) + 1]},
        {"box": [64, 257]},
        {"box": [64, 0]},
        {"box": [72, 8]},
        {"box": [12, 8], "swizzle": 0},
        {"box": [64, 8], "swizzle": 64},
        {"steps": [1, 2]},
        {"sizes": [64] * 6, "strides": [128] * 5, "box": [64] * 6},
        {"dtype": 99},
        {"interleave": INTERLEAVE_32B},
        {"fill": 1},
    ],
    ids=str,
)
def test_it_refuses_what_a_driver_refuses(driver: Any, x: np.ndarray, wrong: dict[str, Any]) -> None:
    """And element strides, interleaving and NaNs outside, which the simulator does not know."""
    assert encode(driver, x, **{**GOOD, **wrong})[0] == 1
