"""How many neurons of each sparse feed-forward layer were active, counted without a lock."""

from __future__ import annotations

import threading


class Activity:
    """Sums by place, "layers.3.mlp". Each thread adds to cells of its own, so none has to wait and no count is lost."""

    def __init__(self) -> None:
        self._cells: dict[tuple[str, int], tuple[int, int]] = {}

    def add(self, place: str, active: int, neurons: int) -> None:
        """That `active` of `neurons` were."""
        key = place, threading.get_ident()
        before = self._cells.get(key, (0, 0))
        self._cells[key] = before[0] + active, before[1] + neurons

    def shares(self) -> dict[str, float]:
        """Place -> active neurons of all, so far."""
        sums: dict[str, tuple[int, int]] = {}
        for (place, _), (active, neurons) in list(self._cells.items()):
            before = sums.get(place, (0, 0))
            sums[place] = before[0] + active, before[1] + neurons
        return {place: active / neurons for place, (active, neurons) in sums.items() if neurons}
