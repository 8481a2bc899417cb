"""How long a call takes on the GPU, for probes."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def milliseconds(call: Callable[[], object], calls: int, turns: int, before: int) -> float:
    """Of one call: the median over the turns, each of so many calls. `before`: calls ahead of the first turn, which do not
    count.
    """
    for _ in range(before):
        call()
    times = []
    for _ in range(turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)
