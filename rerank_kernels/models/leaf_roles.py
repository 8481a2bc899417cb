"""What a forward reads of PyTorch's modules and of transformers' activations, where they are called and in larger models."""

from __future__ import annotations

from typing import Any, SupportsFloat

import torch.nn.functional as F

from rerank_kernels.models import lora
from rerank_kernels.models.bound import class_of
from rerank_kernels.models.leaves import ACTIVATIONS, SLOPE
from rerank_kernels.models.roles import Assumed, Role, equal

_LINEAR = "torch.nn.modules.linear.Linear"
_LORA = frozenset({lora.LINEAR})
_NORM = "torch.nn.modules.normalization.LayerNorm"
_SOFTMAX = "torch.nn.modules.activation.Softmax"
_DROPOUT = "torch.nn.modules.dropout.Dropout"


def _plain_act(act: Any, m: Any) -> bool:
    """`act` of transformers' activations: PyTorch's function, or the same written out in the class itself."""
    if getattr(act, "__self__", None) is m:
        return act.__func__ in (vars(type(m)).get(f"_{name}_python") for name in ("gelu", "gelu_tanh", "mish"))
    if class_of(m) in ("GELUActivation", "MishActivation"):
        return act is (F.gelu if class_of(m) == "GELUActivation" else F.mish)
    return getattr(act, "func", None) is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}


def _of_its_weights(shape: Any, m: Any) -> bool:
    return all(p is None or tuple(p.shape) == tuple(shape) for p in (m.weight, m.bias))


NUMBER = Assumed("", "a number >= 0", lambda eps, _: isinstance(eps, SupportsFloat) and float(eps) >= 0, needed=True)
_EPS = NUMBER._replace(attribute="eps")
_SHAPE = Assumed("normalized_shape", "that of weight and bias", _of_its_weights, needed=True)
_LAST = Assumed("normalized_shape", "the last dimension alone", lambda shape, _: len(shape) == 1, needed=True)
_NO_MAXIMUM = equal("max_norm", None)  # with one, a lookup changes the table


def linear(n: str, k: str, *, adapters: frozenset[str] = _LORA) -> Role:
    """adapters: what of PEFT may stand there too: LoRA, and around a head also a wrapper."""
    return Role(frozenset({_LINEAR}), parameters={"weight": (n, k), "bias?": (n,)}, adapters=adapters)


def layer_norm(d: str) -> Role:
    """Over the last dimension; elementwise_affine or not."""
    return Role(frozenset({_NORM}), (_EPS, _LAST, _SHAPE), {"weight?": (d,), "bias?": (d,)})


def embedding(n: str, d: str) -> Role:
    return Role(frozenset({"torch.nn.modules.sparse.Embedding"}), (_NO_MAXIMUM,), {"weight": (n, d)})


ACTIVATION = Role(
    frozenset(ACTIVATIONS),
    (
        Assumed("approximate", "'none' or 'tanh'", lambda value, _: value in ("none", "tanh")),
        Assumed("negative_slope", repr(SLOPE), lambda slope, _: slope == SLOPE),
        Assumed("act", "the function that its class gives it", _plain_act),
    ),
)
DROPOUT = Role(frozenset({_DROPOUT, "torch.nn.modules.linear.Identity"}), drops="p")
LIST = Role(frozenset({"torch.nn.modules.container.ModuleList", "torch.nn.modules.container.Sequential"}))

# Class -> what is read of it where it is called itself.
ROLES: dict[str, Role] = {
    **{name: ACTIVATION for name in ACTIVATIONS},
    _LINEAR: linear("N", "K", adapters=frozenset()),
    _NORM: Role(frozenset({_NORM}), (_EPS, _SHAPE), {"weight?": ("...",), "bias?": ("...",)}),
    _SOFTMAX: Role(frozenset({_SOFTMAX}), (Assumed("dim", "a number", lambda dim, _: isinstance(dim, int), needed=True),)),
    _DROPOUT: Role(frozenset({_DROPOUT}), drops="p"),
    "torch.nn.modules.sparse.Embedding": embedding("N", "D"),
}
