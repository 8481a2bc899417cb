"""Every contest of the CPU: ours and stock PyTorch, op by op and model by model; rivals/ add theirs."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import decoders, models, ops
from bench.harness.turns import Work


def on_a_cpu(quick: bool) -> dict[str, Callable[[], Work]]:
    """Name -> how to build it; built when its turn comes, so that no two sets of weights are held at a time."""
    place = ops.Place()
    return dict([*ops.on_a_cpu(place), *models.on_a_cpu(place, quick), *decoders.on_a_cpu(place, quick)])
