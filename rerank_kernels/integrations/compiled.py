"""torch.compile: the model behind the wrapper is patched, and the wrapper runs it as it is.

Compiled code is kept for a model as it was when it was traced, so a wrapper that ran before would go on with stock arithmetic.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SYSTEM = "torch.compile"


def inner(obj: Any) -> nn.Module | None:
    """The model behind the wrapper that torch.compile made, None if `obj` is no such wrapper."""
    cls = type(obj)
    if cls.__qualname__ == "OptimizedModule" and cls.__module__ == "torch._dynamo.eval_frame":
        found: nn.Module = obj._orig_mod
        return found
    return None
