"""The one table, its JSON, and the environment it was made in."""

from __future__ import annotations

import dataclasses
import os
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import MODES
from rerank_kernels.backend.native import proven
from rerank_kernels.errors import BackendError
from rerank_kernels.tables import Column, Table
from rerank_kernels.verify.controls import Control
from rerank_kernels.verify.measure import Result
from rerank_kernels.version import NUMERICS_VERSION, __version__

# What a row's result is called, by kind, and what it may turn over.
WHAT = {"cross-encoder": "logits", "embedding": "vectors", "language head": "next-token logits"}
FLIPS = {"cross-encoder": "rank flips", "embedding": "rank flips", "language head": "other tokens"}


@dataclass
class VerifyReport:
    results: list[Result]
    controls: list[Control]
    environment: dict[str, Any]
    scorer: str  # "rerank_kernels" or "stock PyTorch"
    kind: str
    rows: int
    lengths: tuple[int, int]  # shortest and longest row, in tokens

    @property
    def broken(self) -> list[Result]:
        return [r for r in self.results if r.promised and not r.holds]

    @property
    def powerless(self) -> list[Control]:
        return [c for c in self.controls if not c.caught]

    @property
    def ok(self) -> bool:
        return not self.broken and not self.powerless

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "scorer": self.scorer,
            "kind": self.kind,
            "rows": self.rows,
            "shortest": self.lengths[0],
            "longest": self.lengths[1],
            "checks": [
                # JSON has no infinity
                {**dataclasses.asdict(r), "max_difference": r.max_difference if np.isfinite(r.max_difference) else None,
                 "holds": r.holds}
                for r in self.results
            ],
            "controls": [{**dataclasses.asdict(c), "caught": c.caught} for c in self.controls],
            "environment": self.environment,
        }  # fmt: skip

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        what = WHAT[self.kind]
        table = Table(
            [
                *map(Column, ("promise", "check", "varied")),
                *(Column(name, number=True) for name in ("bits equal", "max difference", FLIPS[self.kind])),
            ],
            title=f"{self.scorer}: {what} of {self.rows} texts of {self.lengths[0]} to {self.lengths[1]} tokens",
        )
        promise = ""
        for r in self.results:
            style = "" if r.holds else "red" if r.promised else "dim"
            table.add_row(
                r.promise if r.promise != promise else "",
                r.check,
                r.varied if r.promised else f"{r.varied} (not promised by this backend)",
                f"{r.equal:,}/{r.total:,}",
                "0" if r.max_difference == 0 else f"{r.max_difference:.2g}",
                f"{r.flips:,}/{r.ordered:,}",
                style=style,
            )
            promise = r.promise
        console.print(table)
        caught = sum(c.caught for c in self.controls)
        console.print(f"negative controls caught {caught}/{len(self.controls)}", style="" if not self.powerless else "red")
        for c in self.powerless:
            others = ", ".join(s for s in c.seen_by if s != c.expected)
            if c.expected in c.seen_by:
                console.print(
                    f"  {c.name}: caught by {c.expected}, but by {others} as well: they do not measure one thing each"
                )
            else:
                console.print(f"  {c.name}: not seen by {c.expected}: that check has no power here")
        broken = list(dict.fromkeys(r.promise for r in self.broken))
        if broken:
            console.print("broken: " + ", ".join(broken), style="red")
        elif self.ok:
            held = dict.fromkeys(r.promise for r in self.results if r.promised)
            console.print("held: " + ", ".join(held), style="green")


@dataclass(frozen=True)
class Setting:
    """Where a model is verified: device, numeric mode, the backend that serves it there."""

    device: torch.device
    mode: str
    backend: registry.Backend

    @classmethod
    def of(cls, model: nn.Module, mode: str, served_by: str | None) -> Setting:
        device = next(model.parameters()).device
        chosen = registry.active(device) if served_by is None else registry.get(served_by, f"backend={served_by!r}")
        return cls(device, mode, chosen)

    @property
    def promises(self) -> tuple[str, ...]:
        return self.backend.promises[self.mode]


def environment(setting: Setting | None = None) -> dict[str, Any]:
    """Versions, machine, backend, instruction set, threads: what a report of bits needs beside it. Never raises.

    Of the CPU's backend in mode portable, unless it is told where a model was verified.
    """
    import transformers

    out: dict[str, Any] = {
        "rerank_kernels": __version__,
        "numerics": NUMERICS_VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
    try:
        setting = setting or Setting(torch.device("cpu"), "portable", registry.active("cpu"))
        out["backend"], out["promises"], out["mode"] = setting.backend.name, list(setting.promises), setting.mode
        out["numerics"] = MODES[setting.mode].version
        if setting.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(setting.device)
            out["gpu"] = f"{torch.cuda.get_device_name(setting.device)}, sm_{major}{minor}"
    except BackendError as error:
        out["backend"], out["promises"] = f"none: {error}", []
    out["isa"] = isa() or "-"
    if not (said := proven.said()).startswith("off"):
        out["cublaslt"] = said
    if registry.missing("cpu") is None:
        out["build"] = str(torch.ops.rerank_kernels.build_info())
    return out


def isa(wanted: str = "") -> str | None:
    """The instruction set in use, after a switch to `wanted` if given; None if the library or the CPU does not have it."""
    if registry.missing("cpu") is not None:
        return None
    try:
        return str(torch.ops.rerank_kernels.force_isa(wanted))
    except (AttributeError, RuntimeError):
        return None
