"""What the registry holds of a model's exact class: how it is called, what it needs, and its entry without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rerank_kernels.graphs.buckets import Inputs, Tokens
from rerank_kernels.models.roles import Roles
from rerank_kernels.ops.pooling import HeadOutput
from rerank_kernels.ops.sequences import Sequences

Head = Callable[[Tensor, Sequences], HeadOutput]  # [total, D] -> logits and scores, float32 [B, L]


@dataclass(frozen=True)
class Served:
    forward: Callable[..., Any]  # the module and the arguments of its stock forward -> its stock output
    roles: Callable[[Any], Roles]  # the module -> what the forward reads of what is below it
    packed: Callable[..., Tensor]  # (module, ids, sequences, token types) -> [total, D]; a decoder takes `before` too
    max_tokens: Callable[[Any], int]  # the module -> the longest sequence it takes
    words: Callable[[Any], nn.Linear] | None = None  # the module -> its language head; None: it writes no text
    head: Callable[[Any], Head] | None = None  # the module -> its classification head; None: it has none
    typed: bool = True  # its tokens have types
    cap: Callable[[Any], float | None] = lambda m: None  # the module -> how far the logits of its language head go
    # The module -> lengths; of two sequences that are both longer than each or not, one may begin with the bits of the other.
    # None: no sequence begins with the bits of another.
    turning_points: Callable[[Any], list[int]] | None = None

    # For a graph: (module, ids, sequences, token types), all on the host -> them looked at, or why no graph serves them;
    tokens: Callable[..., Tokens | str] | None = None
    states: Callable[[Any, Inputs], Tensor] | None = None  # (module, numbers on the device) -> [T, D]
    entered: Callable[[Any], Any] = lambda m: m  # counts a call of what is inside the module
    why: Callable[[Any], str | None] = lambda m: None  # what of the module no graph can hold

    @property
    def gives(self) -> str:
        """What a sequence gets: "logits", "words" or "states"."""
        return "logits" if self.head else "words" if self.words else "states"
