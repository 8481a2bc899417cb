"""A decoder's gated feed-forward layer whose activation is ReLU or one of its kin: it runs through sparse_ffn.

Which they are: nn.ReLU, transformers' ReLUSquaredActivation, and nn.Threshold(t, 0) with t >= 0, which is ProSparse's FATReLU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.backend.firing import counting
from rerank_kernels.backend.modes import PORTABLE
from rerank_kernels.errors import PatchError
from rerank_kernels.models import lora
from rerank_kernels.models.bound import Forward, class_of, name_of, served_by
from rerank_kernels.models.leaves import activation_of
from rerank_kernels.models.packing import as_patched
from rerank_kernels.ops.opaque import traced
from rerank_kernels.ops.sparse_ffn import SPARSE_ACTIVATIONS, sparse_ffn

THRESHOLD = "torch.nn.modules.activation.Threshold"


def act_problem(act: Any) -> str | None:
    """Why a module of class THRESHOLD cannot be served; None if it can, or is another."""
    if name_of(act) != THRESHOLD:
        return None
    if act.value != 0:
        return f"value is {act.value}, and only 0 is served"
    return None if act.threshold >= 0 else f"threshold is {act.threshold}, and only >= 0 is served"


def firing_of(m: Any) -> dict[str, Any] | None:
    """What sparse_ffn is told of the activation of m, a decoder's mlp; None where m does not run through it."""
    if "gate_up_proj" in m._modules:  # Phi-3's one matrix of both
        return None
    act = m.act_fn
    found: dict[str, Any] | None
    if name_of(act) == THRESHOLD:
        if (why := act_problem(act)) is not None:  # it may have been set after patch()
            raise PatchError(f"{class_of(act)}: {why}; call rk.unpatch(model)")
        found = {"threshold": float(act.threshold)}
    else:
        found = {"activation": kind} if (kind := activation_of(act)) in SPARSE_ACTIVATIONS else None
    if found is not None and any(map(lora.is_lora, (m.gate_proj, m.up_proj, m.down_proj))):
        if "threshold" in found:
            raise PatchError(f"{class_of(m)}: nn.Threshold beside adapters is not served; {lora.MERGE}")
        return None
    return found


class Seat(NamedTuple):
    """Which layer of which decoder a feed-forward layer is: where its neurons are counted, and proposed."""

    forward: Forward | None
    layer: int

    @property
    def place(self) -> str:
        return f"layers.{self.layer}.mlp"


NOWHERE = Seat(None, 0)


def seat(decoder: Any, layer: int) -> Seat:
    forward = served_by(decoder)
    if traced():
        if forward is not None and forward.predictor is not None:
            raise PatchError(f"{class_of(decoder)}.forward: a predictor cannot be traced or exported; patch without one")
        return Seat(None, layer)
    return Seat(forward, layer)


def feed_forward(m: Any, x: Tensor, residual: Tensor | None, firing: dict[str, Any], at: Seat) -> Tensor:
    """down(act(gate(x)) · up(x)) + residual, computed where neurons are active alone; float32 without a residual."""
    for part in (m.gate_proj, m.up_proj, m.down_proj):
        as_patched(part, nn.Linear)
    forward, neurons = at.forward, m.up_proj.weight.shape[0]
    if residual is None and forward is not None and forward.mode != PORTABLE:
        raise PatchError(
            f"{class_of(m)}: a sparse layer whose result is normed is served in mode 'portable' alone; call rk.unpatch(model), "
            "then rk.patch(model)"
        )
    wide = x.float() if residual is None else x  # exact, and says the dtype of the result

    def run() -> Tensor:
        return sparse_ffn(
            wide, m.up_proj.weight, m.down_proj.weight, gate_weight=m.gate_proj.weight, residual=residual,
            up_bias=m.up_proj.bias, gate_bias=m.gate_proj.bias, down_bias=m.down_proj.bias,
            candidates=None if forward is None else _candidates(m, x, forward, at), **firing,
        )  # fmt: skip

    if forward is None:
        return run()
    with counting(lambda active, rows: forward.activity.add(at.place, active, rows * neurons)):
        return run()


def _candidates(m: Any, x: Tensor, forward: Forward, at: Seat) -> Tensor | None:
    if forward.predictor is None:
        return None
    op, wanted = f"{class_of(m)}, {at.place}", (x.shape[0], m.up_proj.weight.shape[0])
    found = forward.predictor(at.layer, x)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or tuple(found.shape) != wanted:
        came = f"{found.dtype} {check.shape_of(found)}" if isinstance(found, Tensor) else type(found).__name__
        shape = f"a bool tensor [rows, neurons] = {list(wanted)}"
        check.fail(op, "what the predictor returns", shape, came, "it is called as predictor(layer, x [rows, D])")
    return found


def layers(decoder: Any) -> list[str]:
    """The layers of a decoder that run through sparse_ffn."""
    return [f"layers.{i}.mlp" for i, layer in enumerate(decoder.layers) if firing_of(layer.mlp) is not None]
