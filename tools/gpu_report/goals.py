"""What this project wants of a GPU, beside what a run measured: reached, not reached, or never measured.

A goal that many cases speak of is measured by the worst of them. Ratios are a rival's time over ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Records = Iterable[Mapping[str, Any]]
HEADS = ("goal", "wanted", "measured", "at", "")
NEVER, REACHED, MISSED = "never measured", "reached", "NOT reached"
WAYS, MODELS = ("ways-cuda", "ways-triton"), ("models", "models-compiled")


class Measured(NamedTuple):
    value: float
    case: str


@dataclass(frozen=True)
class Goal:
    """rival: who must be there besides ours, None where the time itself is the goal, in milliseconds."""

    words: str
    bar: float
    steps: tuple[str, ...]
    case: str  # a pattern
    mode: str
    rival: str | None = None  # a pattern

    def measured(self, records: Records) -> Measured | None:
        """The worst case, over those that have both."""
        cases: dict[str, list[Mapping[str, Any]]] = {}
        for r in records:
            if r["step"] in self.steps and "ms" in r and re.search(self.case, r["case"]):
                cases.setdefault(self.of(r["case"]), []).append(r)
        found = list(self._each(cases))
        return (min(found) if self.rival else max(found)) if found else None

    @staticmethod
    def of(case: str) -> str:
        """One case may be in several steps, and once for each mode of torch.compile: ours is the same."""
        return re.sub(r", compiled: .*", "", case)

    def _each(self, cases: Mapping[str, list[Mapping[str, Any]]]) -> Iterator[Measured]:
        for case, here in cases.items():
            # what the launcher chooses itself, by the better backend; a way that was forced is nobody's time
            own = [r["ms"] for r in here if r["ours"] and r["mode"] == self.mode and r["way"] is None]
            theirs = [r["ms"] for r in here if not r["ours"] and self.rival and re.search(self.rival, r["who"])]
            if own and not self.rival:
                yield Measured(min(own), case)
            elif own and theirs:
                yield Measured(min(theirs) / min(own), case)

    def row(self, found: Measured | None) -> tuple[str, ...]:
        wanted = f"≥ {self.bar:.2f}" if self.rival else f"≤ {self.bar:.1f} ms"
        if found is None:
            return self.words, wanted, "–", "–", NEVER
        reached = found.value >= self.bar if self.rival else found.value <= self.bar
        shown = f"{found.value:.2f}" if self.rival else f"{found.value:.2f} ms"
        return self.words, wanted, shown, found.case, REACHED if reached else MISSED


_COMPILED = r"compile.*reduce-overhead"
_CUBLAS = r"^(eager|F\.linear)$"
_SDPA = r"^(eager|F\.sdpa|varlen|FlashAttention)"
_EQUAL = r"^(base|large) \d+x\d+ (fp16|bf16)"
GOALS = (
    Goal(
        "whole models in mode tensor, of stock under `torch.compile` with `reduce-overhead`",
        1.0,
        MODELS,
        _EQUAL,
        "tensor",
        _COMPILED,
    ),
    Goal("the same, mixed lengths", 1.5, MODELS, r"^(base|large) mixed (fp16|bf16)", "tensor", _COMPILED),
    Goal("bge-reranker-base, fp16, 1 x 128, mode tensor", 1.2, MODELS, r"^base 1x128 fp16", "tensor"),
    Goal("bge-reranker-base, fp16, 32 x 128, mode tensor", 3.0, MODELS, r"^base 32x128 fp16", "tensor"),
    Goal(
        "linear in mode tensor, of cuBLAS, 1,024 rows and more",
        0.92,
        WAYS,
        r"^linear \d{4,}x.* (fp16|bf16)$",
        "tensor",
        _CUBLAS,
    ),
    Goal(
        "attention in mode tensor at T = 512, of the best of SDPA, varlen and FlashAttention",
        0.8,
        WAYS,
        r"^attention 32x512 .* (fp16|bf16)$",
        "tensor",
        _SDPA,
    ),
    Goal(
        "linear in mode portable, float32, of cuBLAS, 1,024 rows and more",
        0.95,
        WAYS,
        r"^linear \d{4,}x.* fp32$",
        "portable",
        _CUBLAS,
    ),
)


def rows(records: Records) -> list[tuple[str, ...]]:
    records = list(records)
    return [goal.row(goal.measured(records)) for goal in GOALS]
