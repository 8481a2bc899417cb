"""Other layouts of weights, made once per weight and kept as long as the weight lives.

Kernels read a weight as nn.Linear holds it, so there are few other layouts. sparse_ffn has the down-projection with a neuron's
values side by side. On the CPU it has two copies of the first matrix in 8 bits, which show which neurons are off. A weight that
is not contiguous has a contiguous copy.

A weight is recognised by its identity, memory, version, and a sample of its bits. An optimiser step, load_state_dict, .half()
or .to() lead to a new layout at the next call. PyTorch's version counter does not see writes through `weight.data` and fused
optimisers. The sample, up to 1024 values and on the CPU only, sees them unless they leave all of its values as they were. Then
call rk.forget(model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

SCREENS_ON: tuple[str, ...] = ("cpu",)  # the devices whose sparse_ffn screens, and turns weights by an op of the library


class FfnWeights(NamedTuple):
    """What sparse_ffn is given besides its rows: up and gate [F, K], down [D, F], biases [F], [F], [D]; no gate: ReLU."""

    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    @property
    def first(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of what decides which neurons are active."""
        return (self.up, self.up_bias) if self.gate is None else (self.gate, self.gate_bias)


@dataclass
class _Kept:
    # Holding the memory that was read keeps its address from being given to another tensor, so equal addresses mean
    # equal memory.
    source: Tensor
    version: int
    view: Tensor  # some values of the source, where they lie
    sample: Tensor  # what they were
    layout: Any


_kept: dict[str, WeakTensorKeyDictionary] = {}


def transposed(weight: Tensor) -> Tensor:
    """nn.Linear's [D, F] -> [F, D] contiguous; refuses weights that are not finite, since sparse_ffn skips terms."""
    if weight.device.type not in SCREENS_ON:
        return _cached("rows", weight, lambda w: finite(w).t().contiguous())
    return _cached("transposed", weight, lambda w: torch.ops.rerank_kernels.transpose_weight(finite(w)))


def check_finite(weight: Tensor) -> None:
    """`finite`, looked at once per weight: what is kept is empty."""
    _cached("finite", weight, lambda w: finite(w).new_empty(0))


def screen(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """[N, K] in 8 bits per weight, twice: coarse and rest, int8 [N, K]; bounds, float32 [N, 4]. Of float32 weights on the CPU.

    Row n is about bounds[n, 0] * coarse[n], off by |dot(x, w) - dot(x, that)| <= bounds[n, 1] |x|, both as computed; and about
    bounds[n, 0] * coarse[n] + bounds[n, 2] * rest[n], off by at most bounds[n, 3] |x|.

    By Cauchy and Schwarz: |w - copy| for what a copy leaves out. For the arithmetic: n u / (1 - n u) |x| |v| for a sum of
    products with v in which a term passes through n roundings. For w's own `dot` n is a chunk and the number of chunks; for
    the copies', whose order is free, it is K. Norms are taken in float64, where 1.0001 covers their own errors. What is added
    covers what a process that sets subnormals to zero may hide of each weight.
    """
    if weight.dtype != torch.float32 or weight.device.type not in SCREENS_ON or weight.is_inference():
        return None  # half precision is no larger than the copies; what cannot be kept is not worth making
    return _cached("screen", weight, _screened)


def _screened(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    coarse, rest = (weight.new_empty(n, k, dtype=torch.int8) for _ in range(2))
    bounds = weight.new_empty(n, 4)

    def rounding(steps: int, of: Tensor) -> Tensor:
        u = 2.0**-24
        return steps * u / max(1.0 - steps * u, 0.25) * of.norm(dim=1)

    for at in range(0, n, 512):  # in float64, so not all at once
        rows = slice(at, min(at + 512, n))
        left = weight[rows].double()
        arithmetic = rounding(min(k, 512) + -(-k // 512) + 8, left) + k**0.5 * 2.0**-126
        for i, copy in ((0, coarse), (2, rest)):
            scale = (left.abs().amax(dim=1) / 127.0).float()
            whole = (left / scale.double().clamp_min(1e-300)[:, None]).round().clamp(-127, 127).nan_to_num(0.0)
            copy[rows] = whole.to(torch.int8)
            share = whole * scale.double()[:, None]
            left = left - share
            arithmetic = arithmetic + rounding(k + 8, share)
            bounds[rows, i] = scale
            bounds[rows, i + 1] = (1.0001 * (left.norm(dim=1) + arithmetic)).float()
    return coarse, rest, bounds


def contiguous(weight: Tensor) -> Tensor:
    return weight if weight.is_contiguous() else _cached("contiguous", weight, lambda w: w.contiguous())


def finite(weight: Tensor) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(
            "sparse_ffn: weights must be finite: terms with a zero activation are skipped, and 0 * inf would be NaN"
        )
    return weight


def forget(model: Tensor | nn.Module) -> None:
    """Drop the layouts made of a weight, or of all weights of a model; the next call makes them anew.

    Needed only after a write that PyTorch does not count (through `weight.data`) and that touched few values.
    """
    weights = [model] if isinstance(model, Tensor) else model.parameters()
    for weight in weights:
        for table in _kept.values():
            table.pop(weight, None)


def _cached(kind: str, weight: Tensor, make: Callable[[Tensor], Any]) -> Any:
    if weight.is_inference():  # made under torch.inference_mode: it has no version, so any write to it goes unseen
        return make(weight)
    table = _kept.setdefault(kind, WeakTensorKeyDictionary())
    kept = table.get(weight)
    if (
        kept is not None
        and kept.version == weight._version
        and _same_memory(kept.source, weight)
        # on a GPU the look itself would wait for the device, and could not be captured in a graph
        and (weight.device.type != "cpu" or torch.equal(kept.view, kept.sample))
    ):
        return kept.layout
    source = weight.detach()
    view = sample(source)
    kept = _Kept(source, weight._version, view, view.clone(), make(source))
    if weight.device.type == "cuda":  # other streams will read it, so it must be there; inside a graph capture this raises,
        torch.cuda.current_stream(weight.device).synchronize()  # as it must: call once before capturing
    table[weight] = kept
    return kept.layout


def sample(weight: Tensor) -> Tensor:
    """Bits of up to 32 x 32 values from all over a weight [N, K], as a view of its memory."""
    bits = weight.view(torch.int32 if weight.element_size() == 4 else torch.int16)
    rows, columns = (max(1, -(-n // 32)) for n in bits.shape)
    return bits[::rows, ::columns]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
