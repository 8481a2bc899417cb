"""The order of a ranking: by logit, for near 1.0 float32 scores tie where logits do not."""

from __future__ import annotations

import math
from collections.abc import Sequence


def descending(logits: Sequence[float], places: Sequence[int] | None = None) -> list[int]:
    """The indices of `logits`, largest first; equal ones by ascending place (their index, if not given), NaN last."""
    places = range(len(logits)) if places is None else places
    keys = [(True, 0.0, place) if math.isnan(x) else (False, -x, place) for x, place in zip(logits, places, strict=True)]
    return sorted(range(len(keys)), key=keys.__getitem__)
