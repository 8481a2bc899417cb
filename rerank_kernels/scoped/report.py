"""What a scope saw: which calls of PyTorch's ops our ops computed, which were exact by nature, which it let through."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class InvariantReport:
    """Calls by the name of PyTorch's op, as in "aten::linear", in three kinds.

    routed: op -> calls that rerank_kernels computed. exact: op -> calls that PyTorch computed, whose bits cannot depend on a
    batch. let_through: op -> why it is neither; empty if strict.
    """

    strict: bool
    routed: Counter[str] = field(default_factory=Counter)
    exact: Counter[str] = field(default_factory=Counter)
    let_through: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = {"routed": self.routed, "exact": self.exact}
        names = sorted({*self.routed, *self.exact}, key=lambda n: (-self.routed[n], -self.exact[n], n))
        wide = max([len(n) for n in names] + [2]) + 2
        lines = ["op".ljust(wide) + "".join(kind.rjust(8) for kind in kinds)]
        lines += [n.ljust(wide) + "".join(str(c[n] or "-").rjust(8) for c in kinds.values()) for n in names]
        lines += [f"let through: {op}: {why}" for op, why in self.let_through.items()]
        return "\n".join(lines)
