"""What is done with a call of each of PyTorch's ops: a route, PyTorch itself where that is exact, its parts, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import DispatchKey

from rerank_kernels.scoped import attention, convolution, elementwise, norms, placing, products, sums
from rerank_kernels.scoped.exact import EXACT, EXACT_OF_INTEGERS, ONE_STEP, STATE, WHY

ROUTES: dict[str, Callable[..., Any]] = {}
for _room in (products, attention, sums, norms, elementwise, convolution, placing):
    ROUTES |= _room.ROUTES

OURS = ("rerank_kernels", "rerank_kernels_compiled")
NO_ROUTE = "it has no route, and it is not exact by nature"


@dataclass(frozen=True)
class Served:
    """How calls of one op are served: the first of these that is so."""

    op: str  # "aten::linear"
    exact: bool  # by nature
    exact_of_integers: bool
    one_step: bool  # exact for real numbers alone
    route: Callable[..., Any] | None
    pieces: Callable[..., Any] | None  # the op in all its overloads, for a call in pieces
    parts: bool  # PyTorch writes it in other ops, each of which is looked up in turn
    in_place: bool
    names: tuple[str, ...]  # of its arguments
    why: str


def look_up(function: Any) -> Served:
    namespace, _, name = function._schema.name.partition("::")
    in_place = name.endswith("_") and not name.endswith("__") and function._schema.is_mutable
    base = name.rstrip("_") if in_place else name
    overload = function._overloadname
    out = any(a.is_out for a in function._schema.arguments)
    aten = namespace == "aten"
    route = None
    if aten and not out:
        route = ROUTES.get(f"{base}.{overload}") or (ROUTES.get(base) if overload == "default" else None)
    exact = namespace in (*OURS, "prim") or (aten and (base in EXACT or name in STATE))
    return Served(
        op=function._schema.name,
        exact=exact,
        exact_of_integers=aten and base in EXACT_OF_INTEGERS,
        one_step=aten and base in ONE_STEP,
        route=None if exact else route,
        pieces=getattr(torch.ops.aten, base) if aten and not out and not exact and base in elementwise.IN_PIECES else None,
        parts=function.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd),
        in_place=in_place,
        names=tuple(a.name for a in function._schema.arguments),
        why=WHY.get(base, f"its form {overload!r} has no route" if aten and base in _BASES else NO_ROUTE),
    )


_BASES = {key.partition(".")[0] for key in ROUTES} | elementwise.IN_PIECES
