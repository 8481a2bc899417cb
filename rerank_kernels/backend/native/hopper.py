"""Hopper's kernels (csrc/cuda/sm90) serve a GPU after a trial there, which this file makes; before it, csrc/cuda/sm80's do.

They were written and simulated, and may meet their first real GPU at a user's. So the first call of an op of mode tensor on a
device of compute capability 9.0 is the trial: every way of the op's launcher, in both dtypes, on edges of tiles and on rows
that are hard to add (`proven`), against sm80's kernel on the same numbers. If one bit differs, or a kernel fails, sm80's serve
that op as long as the process lives, with the same bits as ever; one warning and `rerank-kernels info` say so. A CUDA graph
that is being captured holds no trial: sm80's kernels serve there until one was made outside.

RERANK_KERNELS_HOPPER, for who measures: 0 never takes Hopper's kernels, 1 takes them without a trial.

The trial runs on a thread and a stream of its own: what a caller has set for his thread (a forced way, inference mode, a
default device, what torch.compile traces with) does not reach it, nor does a way that it forces reach anybody else's calls.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rerank_kernels.backend import library
from rerank_kernels.backend.native.proven import HARD, addend, capturing, on, operand
from rerank_kernels.errors import BackendError, FallbackWarning

SETTING = "RERANK_KERNELS_HOPPER"
CAPABILITY = (9, 0)
MOST_DEVICES = 64  # of which the library knows whether they are open
DEVICES = ("cuda",)
HALVES = (torch.float16, torch.bfloat16)
EQUAL = "equal"
NONE, GELU = 0, 1  # codes of activations (native/linear.py)

LINEAR, ATTENTION = "linear_hopper_tensor", "attention_hopper_tensor"
EVERYWHERE = {LINEAR: "linear_tensor", ATTENTION: "attention_tensor"}  # the launcher whose bits are wanted
OPS = {LINEAR: "linear and bmm", ATTENTION: "attention"}
LENGTHS = (600, 63, 129, 65, 130, 40, 16, 20, 0, 1)  # tokens of the sequences of attention's trial
WIDTHS = (64, 128)  # of its heads

Calls = Iterator[tuple[str, Callable[..., Tensor], tuple[Any, ...]]]  # what it is, op, arguments


@dataclass
class Here:
    """One launcher on one device."""

    launcher: str
    device: torch.device
    verdict: str = ""  # EQUAL, or what differed; "" before the trial
    told: str | None = None  # the setting under which the library was told whether it may serve
    one_trial: threading.Lock = field(default_factory=threading.Lock)


_here: dict[tuple[str, str], Here] = {}


def setting() -> str:
    """What the environment says; "" for a trial."""
    said = os.environ.get(SETTING)
    if said not in (None, "0", "1"):
        raise BackendError(
            f"{SETTING} must be 0 or 1, or not be set, got {said!r}; 0 never takes the kernels for Hopper, 1 takes them "
            "without a trial, and without it a trial decides"
        )
    return said or ""


def wrong() -> str:
    """What is wrong with the setting, "" if nothing is."""
    try:
        setting()
    except BackendError as error:
        return str(error)
    return ""


def before_a_call(launcher: str, device: torch.device) -> None:
    """Sees to it that the library asks a launcher of this room where it may serve, and not where it may not."""
    if device.type not in DEVICES:
        return
    said = setting()
    here = of(launcher, device)
    if here.told != said:
        tell(here, said)


def of(launcher: str, device: torch.device) -> Here:
    key = launcher, str(device)
    found = _here.get(key)
    return _here.setdefault(key, Here(launcher, device)) if found is None else found


def tell(here: Here, said: str) -> None:
    index = here.device.index or 0
    if capability(here.device) != CAPABILITY or not ways(here.launcher) or index >= MOST_DEVICES:
        here.told = said
        return
    if said == "" and not here.verdict:
        if capturing(here.device):
            open_room(here.launcher, index, False)
            return
        judge(here)
    open_room(here.launcher, index, said == "1" or (said == "" and here.verdict == EQUAL))
    here.told = said


# ---- the trial


def judge(here: Here) -> None:
    with here.one_trial:
        if here.verdict:
            return
        found: list[str | BaseException] = []
        thread = threading.Thread(target=lambda: found.append(tried(here)), name="rerank_kernels trial")
        thread.start()
        thread.join()
        verdict = found[0] if found else "the trial ended without a verdict"
        if isinstance(verdict, BaseException):
            raise BackendError(
                f"{OPS[here.launcher]}: the trial of the kernels for Hopper has ended CUDA's work on {here.device}: "
                f"{first_line(verdict)}; start the process again with {SETTING}=0, which never takes them"
            ) from verdict
        here.verdict = verdict
    if here.verdict != EQUAL:
        warnings.warn(
            f"rerank_kernels: on {here.device} the kernels for Hopper do not serve {OPS[here.launcher]}: {here.verdict}. Those "
            f"for every GPU do, with the bits of the contract, and slower; please report it ({SETTING}=0 makes no trial)",
            FallbackWarning,
            stacklevel=2,
        )


def tried(here: Here) -> str | BaseException:
    """The verdict; an error after which nothing more can be done on the device."""
    try:
        with on(here.device), apart(here.device), torch.no_grad():
            for what, total, differ in compared(here):
                if differ:
                    return f"{differ:,} of {total:,} results have other bits, at {what}"
    except torch.OutOfMemoryError:
        return "there was no memory for the trial"
    except Exception as error:
        return f"the trial failed: {first_line(error)}" if alive(here.device) else error
    return EQUAL


def compared(here: Here) -> Iterator[tuple[str, int, int]]:
    """(call, how many results, how many of them differ) of every way of the launcher."""
    for dtype in HALVES:
        for way in ways(here.launcher):
            calls = linears(here, dtype, way) if here.launcher == LINEAR else attentions(here, dtype)
            for what, op, arguments in calls:
                force(EVERYWHERE[here.launcher], 0)
                want = op(*arguments)
                force(EVERYWHERE[here.launcher], -1)
                torch.full_like(want, float("nan"))  # its memory is the next result's: what a kernel leaves out shows
                force(here.launcher, way)
                got = op(*arguments)
                force(here.launcher, -1)
                differ = (bits(got) != bits(want)) & ~(got.isnan() & want.isnan())  # a NaN's payload is in no contract
                yield f"{what}, {str(dtype)[6:]}, way {way}", want.numel(), int(differ.sum())


def linears(here: Here, dtype: torch.dtype, way: int) -> Calls:
    """Calls of linear and bmm for one tile: several per block, so that it goes round its ring of stages; edges of all kinds."""
    rows, columns = library.launch_tables()["sm90"]["linear"][way][:2]
    linear, bmm = torch.ops.rerank_kernels.linear_tensor, torch.ops.rerank_kernels.bmm_tensor

    def hard(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
        x, weight = operand(m, k, dtype, here.device, 1), operand(n, k, dtype, here.device, -1)
        x[9], weight[8] = -0.0, weight[8].abs()  # products that are all -0, and a sum that is +0
        return x, weight

    m, n, k = 2 * rows - 5, columns * -(-5 * processors(here.device) // 4), 280 if columns >= 64 else 408
    x, weight = hard(m, n, k)
    yield f"{m} x {n} x {k}", linear, (x, weight, None, NONE, None, dtype)
    m, n, k = rows + 3, columns + 5, 200
    x, weight = hard(m, n, k)
    more = addend(-(-m // 64) * 64, n, dtype, here.device)
    yield f"{m} x {n} x {k} and gelu", linear, (x, weight, more[24], GELU, None, dtype)
    yield f"{m} x {n} x {k} and a residual", linear, (x, weight, None, NONE, more[:m], torch.float32)
    m, n, k = rows - 7, columns + 8, 72
    x, weight = hard(2 * m, 2 * n, k)
    yield f"2 products {m} x {n} x {k}", bmm, (x.view(2, m, k), weight.view(2, n, k), torch.float32)


def attentions(here: Here, dtype: torch.dtype) -> Calls:
    """Calls of attention, for both widths of heads; all numbers of a sequence are hard in one way, and values in another."""
    kinds = torch.tensor([i for i, length in enumerate(LENGTHS) for _ in range(length)], device=here.device)
    ends = torch.tensor([0, *LENGTHS], device=here.device).cumsum(0).to(torch.int32)
    total = len(kinds)

    def hard(heads: int, width: int, seed: int, shift: int) -> Tensor:
        made = operand(len(HARD) * total, heads * width, dtype, here.device, seed)
        rows = torch.arange(total, device=here.device) * len(HARD) + (kinds + shift) % len(HARD)
        return made[rows].view(total, heads, width)

    for width in WIDTHS:
        q, k, v = hard(2, width, 1, 0), hard(1, width, -1, 0), hard(1, width, 2, 3)
        finite = torch.where(v.isfinite(), v, 0.0)  # of others what a window hides may reach a row (NUMERICS.md, 4)
        for left, right, scale, cap in ((-1, -1, 0.125, 0.0), (70, 0, 0.125, 0.0), (20, 20, -0.5, 1.5)):
            what = f"heads of {width}, window {left}, {right}, softcap {cap}"
            values = v if left == right == -1 else finite
            yield what, torch.ops.rerank_kernels.attention_tensor, (q, k, values, ends, None, left, right, scale, cap)


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- what is told


def said() -> str:
    """For `rerank-kernels info`: what serves, and why; or what is wrong with the setting."""
    if what := wrong():
        return what
    if how := setting():
        never, always = "never taken", "taken without a trial"
        return f"{never if how == '0' else always} on compute capability 9.0: {SETTING}={how}"
    lines = [
        f"{here.device}, {OPS[here.launcher]}: "
        + ("taken, the trial found every bit equal" if here.verdict == EQUAL else f"not taken: {here.verdict}")
        for here in list(_here.values())
        if here.verdict
    ]
    return "\n".join(lines) or "nothing was tried yet: a GPU of compute capability 9.0 makes a trial at its first use"


# ---- the device and the library; tests put their own here


def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def apart(device: torch.device) -> torch.cuda.StreamContext:
    return torch.cuda.stream(torch.cuda.Stream(device))


def alive(device: torch.device) -> bool:
    """Whether the device still computes after an error."""
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def ways(launcher: str) -> Sequence[int]:
    """None if it was not compiled."""
    listed = (entry.split() for entry in torch.ops.rerank_kernels.launchers().split(", ") if entry)
    return range({name: int(count) for name, count in listed}.get(launcher, 0))


def force(launcher: str, way: int) -> None:
    torch.ops.rerank_kernels.force_launch(launcher, way)


def open_room(launcher: str, index: int, serves: bool) -> None:
    torch.ops.rerank_kernels.open_room(launcher, index, serves)
