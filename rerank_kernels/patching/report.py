"""What patch() did, as an object to read and a table to print."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rerank_kernels.models.bound import Forward, name_of
from rerank_kernels.models.registry import ENCODERS
from rerank_kernels.models.replay import said


@dataclass
class Report:
    """What patch did: the numeric mode, the backend if one was chosen, and the modules by path, in three kinds.

    replaced: path -> class. rerank_kernels computes it, by a forward of its own or inside the forward of a module above it.
    exact: path -> class. It computes nothing (Dropout in eval, containers) or copies (Embedding): the same bits anyway.
    unknown: path -> reason. It was left as it was; empty if strict.

    Of an object that holds a model also: its system; overrides, which of its methods are ours and why; notes, what stays its
    own, or what the user has to set.
    """

    mode: str
    replaced: dict[str, str]
    exact: dict[str, str]
    unknown: dict[str, str]
    forwards: dict[str, Forward] = field(repr=False)
    backend: str | None = None
    system: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def calls(self) -> dict[str, int]:
        """Module path -> calls of its bound forward so far. Zeros after a run mean that the run did not use the patch."""
        return {path: forward.calls for path, forward in self.forwards.items()}

    def active(self) -> dict[str, float]:
        """Path of a sparse feed-forward layer -> share of its neurons that were active so far, over all tokens. On a CPU alone:
        elsewhere the question would wait for the device."""
        return {
            f"{path}.{place}" if path else place: share
            for path, forward in self.forwards.items()
            for place, share in forward.activity.shares().items()
        }

    def graphs(self) -> dict[str, str]:
        """Path of a model -> what was captured of its forward as CUDA graphs so far, and why calls ran without."""
        return {path: said(forward) for path, forward in self.forwards.items() if name_of(forward.module) in ENCODERS}

    def __str__(self) -> str:
        kinds = {"replaced": self.replaced, "exact": self.exact, "unknown": self.unknown}
        counts = {kind: Counter(what.split(" ")[0] for what in paths.values()) for kind, paths in kinds.items()}
        names = sorted({name for c in counts.values() for name in c}, key=lambda n: (*(-c[n] for c in counts.values()), n))
        wide = max([len(n) for n in names] + [5]) + 2
        served_by = f", backend {self.backend}" if self.backend else ""
        of = f"{self.system}, " if self.system else ""
        lines = [f"{of}mode {self.mode}{served_by}", "class".ljust(wide) + "".join(kind.rjust(10) for kind in kinds)]
        lines += [name.ljust(wide) + "".join(str(c[name] or "-").rjust(10) for c in counts.values()) for name in names]
        lines += [f"unknown: {path or '(the model)'}: {what}" for path, what in self.unknown.items()]
        lines += [f"override: {path}: {why}" for path, why in self.overrides.items()]
        lines += [f"note: {note}" for note in self.notes]
        graphs = self.graphs()
        alike = len(set(graphs.values())) == 1
        named = {"" if alike else f"{path or '(the model)'}: ": what for path, what in graphs.items()}
        lines += [f"graphs: {name}{what}" for name, what in named.items()]
        calls = [f"{path or '(the model)'} {n}" for path, n in self.calls().items()]
        lines.append("calls: " + ", ".join(calls[:8]) + (f" and {len(calls) - 8} more" if len(calls) > 8 else ""))
        if active := self.active():
            lines.append("active neurons: " + ", ".join(f"{path} {share:.1%}" for path, share in active.items()))
        return "\n".join(lines)
