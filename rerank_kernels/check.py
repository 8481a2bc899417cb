"""Argument checks with one message shape: `op: argument must be WANTED, got CAME; WHAT WOULD WORK`."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_NAMES = "float32, float16 or bfloat16"


def fail(op: str, argument: str, wanted: str, came: object, hint: str = "") -> NoReturn:
    raise ValueError(f"{op}: {argument} must be {wanted}, got {came}{'; ' + hint if hint else ''}")


def shape_of(t: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in t.shape) + "]"


def floating(op: str, **tensors: Tensor | None) -> None:
    """Each is a dense tensor of a supported dtype, all on one device, or None."""
    device = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}; use torch.as_tensor(...)")
        if t.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be {FLOAT_NAMES}, got {t.dtype}; convert it with .float()")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got layout {t.layout}; use .to_dense()")
        if device is None:
            device, first = t.device, name
        else:
            on_device(op, name, t, first, device)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values()):
        # A silent detach would train nothing and say nothing: only plain weights may ask for gradients.
        needs = [n for n, t in tensors.items() if t is not None and t.requires_grad and not isinstance(t, torch.nn.Parameter)]
        if needs:
            raise RuntimeError(
                f"{op}: {needs[0]} asks for gradients and rerank_kernels is forward only; "
                "run under torch.inference_mode() or torch.no_grad(), or call rk.unpatch(model) to train"
            )


def shape(op: str, name: str, t: Tensor, *want: int | str) -> None:
    """`want` holds sizes, or names for sizes that are free: shape("linear", "weight", w, "N", 768)."""
    sizes = t.shape
    fits = len(sizes) == len(want)
    if fits:
        for n, w in zip(sizes, want, strict=True):  # a plain loop: every op of a small model asks this several times
            if n != w and not isinstance(w, str):
                fits = False
    if not fits:
        fail(op, name, "[" + ", ".join(str(w) for w in want) + "]", shape_of(t))


def choice(op: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        fail(op, name, "one of " + ", ".join(repr(a) for a in allowed), repr(value))


def cu_seqlens(op: str, cu: Tensor, total: int, device: torch.device) -> Tensor:
    """[B + 1] offsets as int32 on `device`. On a GPU only shape and dtype are checked: reading values would synchronise."""
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
        came = f"{cu.dtype} {shape_of(cu)}" if isinstance(cu, Tensor) else type(cu).__name__
        fail(op, "cu_seqlens", "a 1-D int32 tensor [B + 1] of offsets", came)
    if cu.device.type == "cpu":
        offsets = cu.tolist()  # and not with tensors: every layer's attention looks, and each op on a tensor takes microseconds
        if offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
            fail(op, "cu_seqlens", f"ascending from 0 to {total}, the number of tokens", offsets[:8])
    return cu.to(device=device, dtype=torch.int32).contiguous()  # kernels read it as an array


def on_device(op: str, name: str, t: object, like: str, device: torch.device) -> None:
    if isinstance(t, Tensor) and t.device != device:
        fail(op, name, f"on {device} like {like}", f"a tensor on {t.device}", f"move it with .to({str(device)!r})")


def mask_to_cu_seqlens(op: str, mask: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A padding mask [B, T] (true or nonzero: a token) to (indices of the tokens in [B * T], cu_seqlens [B + 1])."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or tuple(mask.shape) != (batch, length) or mask.is_floating_point():
        came = f"{mask.dtype} {shape_of(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
        fail(op, "mask", f"bool or integer [B, T] = [{batch}, {length}], nonzero where a token is", came)
    valid = mask != 0
    cu = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
    cu[1:] = valid.sum(dim=1).cumsum(0)
    return valid.reshape(-1).nonzero().squeeze(1), cu
