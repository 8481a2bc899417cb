"""cuBLASLt's products in place of ours in mode tensor, where a trial has shown that its bits are ours. Off by default.

RERANK_KERNELS_CUBLASLT=1 asks for it. The first call of a kind (`cublaslt.Kind`: dtype, N, K, form, and a class of M) on a
device, with a version of cuBLASLt, is the trial: rows that are hard to add, and every bit is compared. If one differs, if it
splits every sum, or if it fails, then ours serve that kind as long as the process lives; `rerank-kernels info` says so. So the
setting is in no bit. A CUDA graph that is being captured holds no trial: ours serve there until one was made outside.

Which calls: no activation, and no bias beside a residual, since only then there is one rounding in float32 to agree on. Others
would want a product in float32 with our epilogue behind it, which writes and reads every sum once more. From 33 rows to 32,768:
what is smaller is bound by reading the weight.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rerank_kernels.backend.native import cublaslt
from rerank_kernels.backend.native.cublaslt import BIAS, PRODUCT, RESIDUAL, CublasLtError, Kind, Product
from rerank_kernels.errors import BackendError

SETTING = "RERANK_KERNELS_CUBLASLT"
LEAST, MOST = 33, 1 << 15  # rows
DEVICES = ("cuda",)

Ours = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # x, weight, bias, residual -> y


def wanted() -> bool:
    said = os.environ.get(SETTING, "0")
    if said not in ("0", "1"):
        raise BackendError(f"{SETTING} must be 0 or 1, got {said!r}; 1 lets cuBLASLt serve where its bits are ours")
    return said == "1"


@dataclass(frozen=True)
class Verdict:
    product: Product | None  # None: ours serve
    why: str


@dataclass
class Here:
    """One device with one version of cuBLASLt."""

    device: torch.device
    lt: cublaslt.CublasLt
    handle: ctypes.c_void_p | None
    closed: str = ""  # why it could not be opened
    verdicts: dict[Kind, Verdict] = field(default_factory=dict)
    one_trial: threading.Lock = field(default_factory=threading.Lock)


_here: dict[tuple[str, str, int], Here] = {}
_opening = threading.Lock()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, ours: Ours) -> Tensor | None:
    """y by cuBLASLt; None where ours must serve. x [M, K], bias [N] and residual [M, N] are contiguous."""
    kind = kind_of(x, weight, bias, residual)
    if kind is None:
        return None
    with on(x.device):
        here = of(x.device)
        if here is None:
            return None
        verdict = here.verdicts.get(kind)
        if verdict is None:
            if capturing(x.device):
                return None
            verdict = judged(here, kind, ours)
        if verdict.product is None:
            return None
        y = torch.empty(len(x), kind.n, dtype=x.dtype, device=x.device)
        try:
            verdict.product(x, weight, bias if residual is None else residual, y, stream(x.device))
        except CublasLtError as error:
            here.verdicts[kind] = Verdict(None, f"failed after its trial: {error}")
            return None
        return y


def kind_of(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Kind | None:
    """None for what cuBLASLt is not asked for, or what is wrong, of which our own op says what."""
    (m, k), n = x.shape, weight.shape[0]
    if not LEAST <= m <= MOST or (bias is not None and residual is not None) or x.device.type not in DEVICES:
        return None
    form = BIAS if bias is not None else RESIDUAL if residual is not None else PRODUCT
    for t in (x, weight, bias, residual):
        if t is not None and not (t.device == x.device and t.dtype == x.dtype and t.data_ptr() % cublaslt.ALIGNMENT == 0):
            return None
    if n * x.itemsize % cublaslt.ALIGNMENT or k * x.itemsize % cublaslt.ALIGNMENT:
        return None
    return Kind(x.dtype, n, k, form, 1 << (m - 1).bit_length())


def of(device: torch.device) -> Here | None:
    """None where no cuBLASLt can be taken, or not now: a capture forbids what opening it does. The device must be current."""
    lt = cublaslt.loaded()
    if isinstance(lt, str):
        return None
    key = str(device), lt.path, lt.version
    if key not in _here and capturing(device):
        return None
    with _opening:
        if key not in _here:
            try:
                _here[key] = Here(device, lt, cublaslt.handle(lt))
            except CublasLtError as error:
                _here[key] = Here(device, lt, None, str(error))
        return _here[key]


# ---- the trial


def judged(here: Here, kind: Kind, ours: Ours) -> Verdict:
    with here.one_trial:
        if kind not in here.verdicts:
            here.verdicts[kind] = tried(here, kind, ours)
        return here.verdicts[kind]


def tried(here: Here, kind: Kind, ours: Ours) -> Verdict:
    if here.handle is None:
        return Verdict(None, here.closed)
    try:
        product = Product(here.lt, here.handle, kind)
        for rows, differ in compared(here.device, product, ours):
            if differ:
                return Verdict(None, f"{differ:,} of {rows * kind.n:,} results have other bits than ours, at M = {rows}")
    except CublasLtError as error:
        return Verdict(None, str(error))
    except torch.OutOfMemoryError:
        return Verdict(None, "there was no memory for the trial")
    return Verdict(product, "equal")


def compared(device: torch.device, product: Product, ours: Ours) -> Iterator[tuple[int, int]]:
    """(M, how many results differ) for each M of the trial."""
    kind = product.kind
    x, weight = operand(kind.rows, kind.k, kind.dtype, device, 1), operand(kind.n, kind.k, kind.dtype, device, -1)
    bias = addend(64, kind.n, kind.dtype, device)[24] if kind.form == BIAS else None
    added = addend(kind.rows, kind.n, kind.dtype, device) if kind.form == RESIDUAL else None
    for rows in ladder(kind.rows):
        # the last ones: so they begin at other addresses too
        some = x[kind.rows - rows :]
        residual = None if added is None else added[kind.rows - rows :]
        want = ours(some, weight, bias, residual)
        got = torch.full_like(want, float("nan"))
        product(some, weight, bias if residual is None else residual, got, stream(device))
        yield rows, int((got.view(torch.int16) != want.view(torch.int16)).sum())


def ladder(rows: int) -> tuple[int, ...]:
    """The numbers of rows of a trial: both ends of the class, and one between them that no tile divides."""
    return rows // 2 + 1, rows // 4 * 3 - 3, rows


HARD = ("normal", "far exponents", "cancelling", "zeros", "subnormal", "large", "infinite", "NaN")


def operand(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Numbers that are hard to add. Row i is HARD[i % 8], so that any 8 x 8 results have every kind of x with every kind of
    weight. A negative seed changes the sign of every second number of what cancels.
    """
    generator = torch.Generator(device).manual_seed(abs(seed) + (1 << 20 if seed < 0 else 0))
    half = dtype == torch.float16
    made = torch.empty(rows, columns, dtype=dtype, device=device)
    for i, kind in enumerate(HARD):
        mine = made[i :: len(HARD)]
        if not len(mine):
            continue
        x = torch.randn(mine.shape, generator=generator, device=device, dtype=torch.float32)
        chance = torch.rand(mine.shape, generator=generator, device=device, dtype=torch.float32)
        if kind == "far exponents":
            far = torch.floor(chance * (18 if half else 80)) - (13 if half else 40)
            x *= torch.exp2(far)
        elif kind == "cancelling" and columns > 1:
            x[:, 1::2] = x[:, : columns // 2 * 2 : 2] * (-1 if seed < 0 else 1)
        elif kind == "zeros":
            x = torch.where(chance < 0.8, torch.copysign(torch.zeros_like(x), x), x)
        elif kind == "subnormal":
            x *= torch.finfo(dtype).smallest_normal
        elif kind == "large":
            x *= 2.0**12 if half else 2.0**64
        elif kind in ("infinite", "NaN"):
            x[chance < 2.0 / columns] = float("inf") if kind == "infinite" else float("nan")
            if kind == "infinite":
                x = torch.where(x.isinf() & (torch.arange(len(x), device=device) % 2 == 1)[:, None], -x, x)
        mine.copy_(x)
    return made


def addend(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Such numbers in another order, HARD[(i // 8 + j // 8) % 8] at [i, j]: every kind is added to every kind of sum.

    rows: a multiple of 64, as every class of M has.
    """
    made = operand(rows, columns, dtype, device, 2).view(-1, 8, 8, columns).transpose(1, 2).reshape(rows, columns)
    for shift in range(1, 8):
        mine = torch.arange(columns, device=device) // 8 % 8 == shift
        made[:, mine] = made[:, mine].roll(-8 * shift, 0)
    return made


# ---- what is told


def said() -> str:
    """For `rerank-kernels info`: off, or on with what serves and what does not, and why; or what is wrong with the setting."""
    try:
        off = not wanted()
    except BackendError as error:
        return str(error)
    if off:
        return f"off; {SETTING}=1 lets cuBLASLt serve products of mode tensor where its bits are ours"
    if not _here:
        held = cublaslt.loaded()
        return f"on, and ours serve: {held}" if isinstance(held, str) else f"on, version {held.version}: nothing was tried yet"
    lines = []
    for here in _here.values():
        served = [kind for kind, verdict in here.verdicts.items() if verdict.product is not None]
        tally = f"{len(served)} kinds of products by cuBLASLt, {len(here.verdicts) - len(served)} by ours"
        lines.append(f"on, {here.device}, version {here.lt.version}: {tally}")
        lines += [f"  ours: {kind}: {verdict.why}" for kind, verdict in here.verdicts.items() if verdict.product is None]
    return "\n".join(lines)


# ---- the device; tests put their own here


def on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device)


def stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def capturing(device: torch.device) -> bool:
    return torch.cuda.is_current_stream_capturing()
