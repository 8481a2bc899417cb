"""Sequences: which rows of a packed tensor belong to which sequence. Checked once, then carried through a whole forward.

Packed tensors are [total, ...], the tokens of B sequences one after the other. cu_seqlens holds the B + 1 offsets of the
sequences in it, as FlashAttention has them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rerank_kernels import check


@dataclass(frozen=True, eq=False)
class Sequences:
    """The lengths of B sequences, where `attention` and `pool` take cu_seqlens. An op checks a tensor at each call and trusts
    one of these, so a model makes it once per forward.

    Made by from_cu_seqlens, from_mask or of_equal_length; nothing in it changes.
    """

    cu_seqlens: Tensor  # int32 [B + 1], contiguous, on the device of the tokens
    total: int  # tokens
    padded: tuple[int, int] | None = None  # (B, T), if the tokens come from padded tensors
    index: Tensor | None = None  # [total], where the tokens stand in [B * T]; None: packed, or every place holds a token
    op: str = "Sequences"  # whom errors name

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        total: int,
        device: torch.device | None = None,
        *,
        op: str = "Sequences",
        name: str = "cu_seqlens",
    ) -> Sequences:
        """Of `total` packed tokens on `device` (that of cu_seqlens, if not given); cu_seqlens is int32 or int64 [B + 1].

        Values on a CPU are checked here. Values on a GPU are checked when `lengths` is first asked for: a look at them waits
        for the device. Kernels stay inside their arrays whatever the values are.
        """
        offsets = _checked(op, name, cu_seqlens, total)
        made = cls(_laid(cu_seqlens, device or cu_seqlens.device), total, op=op)
        if offsets is not None:
            made.__dict__["lengths"] = _differences(offsets)  # known: the property below need not look
        return made

    @classmethod
    def from_mask(
        cls, mask: Tensor, shape: tuple[int, int] | None = None, *, op: str = "Sequences", name: str = "mask"
    ) -> Sequences:
        """Of the tokens of padded tensors [B, T, ...]; mask is bool or integer [B, T], nonzero where a token is."""
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point()
        if not fits or (shape is not None and tuple(mask.shape) != shape):
            came = f"{mask.dtype} {check.shape_of(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
            sizes = "" if shape is None else f" = [{shape[0]}, {shape[1]}]"
            check.fail(op, name, f"bool or integer [B, T]{sizes}, nonzero where a token is", came)
        check.stored(op, name, mask)
        valid = mask != 0
        cu = torch.zeros(valid.shape[0] + 1, dtype=torch.int32, device=mask.device)
        cu[1:] = valid.sum(dim=1).cumsum(0)
        index = valid.reshape(-1).nonzero().squeeze(1)
        total = index.shape[0]  # where every place holds a token, packing moves nothing: a step of a decoder, mostly
        return cls(cu, total, (valid.shape[0], valid.shape[1]), None if total == valid.numel() else index, op)

    @classmethod
    def of_equal_length(cls, batch: int, length: int, device: torch.device | str | None = None) -> Sequences:
        """Of padded tensors [B, T, ...] in which every place holds a token."""
        cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(cu, batch * length, (batch, length))

    def to(self, device: torch.device) -> Sequences:
        """The same on `device`; lengths that are known stay known."""
        if self.cu_seqlens.device == device:
            return self
        index = None if self.index is None else self.index.to(device)
        made = Sequences(self.cu_seqlens.to(device), self.total, self.padded, index, self.op)
        if (lengths := self.__dict__.get("lengths")) is not None:
            made.__dict__["lengths"] = lengths
        return made

    @property
    def count(self) -> int:
        """B."""
        return self.cu_seqlens.shape[0] - 1

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Of each sequence, read once. On a GPU that waits for the device."""
        return _differences(_ascending(self.op, "cu_seqlens", self.cu_seqlens, self.total))

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [total, ...]."""
        rows = x.flatten(0, 1)
        return rows if self.index is None else rows.index_select(0, self.index)

    def unpack(self, x: Tensor) -> Tensor:
        """[total, ...] -> [B, T, ...], 0 at padding."""
        assert self.padded is not None, "the tokens do not come from padded tensors"
        b, t = self.padded
        if self.index is not None:
            x = x.new_zeros(b * t, *x.shape[1:]).index_copy_(0, self.index, x)
        return x.view(b, t, *x.shape[1:])


@dataclass(frozen=True, eq=False)
class Spans:
    """Where the keys of B sequences begin and end among the places of k and v [places, H_kv, D], for `attention` alone. What
    lies between them belongs to nobody and is not read. Models make them of a cache, whose keys need not be packed then.
    """

    bounds: Tensor  # int32 [2, B], contiguous, on the device of the keys: where each begins, where it ends
    places: int


def taken(op: str, name: str, given: Tensor | Sequences, total: int, device: torch.device) -> Tensor:
    """The offsets of `total` tokens on `device` that op's argument `name` holds: a tensor is checked, Sequences are trusted."""
    if not isinstance(given, Sequences):
        _checked(op, name, given, total)
        return _laid(given, device)
    if given.total != total:
        check.fail(op, name, f"of {total} tokens", f"Sequences of {given.total}")
    check.on_device(op, name, given.cu_seqlens, "the tokens", device)
    return given.cu_seqlens


def as_tensor(given: object) -> object:
    """What an operator of PyTorch can take of an argument: of Sequences their cu_seqlens, anything else as it is."""
    return given.cu_seqlens if isinstance(given, Sequences) else given


def _checked(op: str, name: str, cu: Tensor, total: int) -> list[int] | None:
    """Shape and dtype, and on a CPU the values, which are returned. On a GPU a look at them would wait for the device."""
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.numel() < 1 or cu.dtype not in (torch.int32, torch.int64):
        came = f"{cu.dtype} {check.shape_of(cu)}" if isinstance(cu, Tensor) else type(cu).__name__
        check.fail(op, name, "a 1-D int32 tensor [B + 1] of offsets, or Sequences", came)
    check.stored(op, name, cu)
    return _ascending(op, name, cu, total) if cu.device.type == "cpu" else None


def _ascending(op: str, name: str, cu: Tensor, total: int) -> list[int]:
    offsets: list[int] = cu.tolist()  # and not with tensors, where each op takes microseconds
    if offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
        check.fail(op, name, f"ascending from 0 to {total}, the number of tokens", offsets[:8])
    return offsets


def _laid(cu: Tensor, device: torch.device) -> Tensor:
    return cu.to(device=device, dtype=torch.int32).contiguous()  # kernels read it as an array


def _differences(offsets: list[int]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(offsets))
