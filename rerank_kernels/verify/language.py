"""Language heads: the logits of the next token, whole, through a cache and in chunks, and what generate() writes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rerank_kernels.scoring.language import quiet, written
from rerank_kernels.verify.checks import (
    CACHED,
    CHUNKED,
    GREEDY,
    NEW,
    STEPS,
    UNCACHED,
    Call,
    Floats,
    Inputs,
    Route,
    Texts,
    build,
)


def routes(model: Any, texts: Texts, device: torch.device) -> dict[str, Route]:
    """The ways to the same numbers that a language head has beside model(**inputs)."""
    found: dict[str, Route] = {}
    for name, cache in zip(CACHED, (_dynamic, _static), strict=True):
        found[name] = functools.partial(_stepped, model, texts, device, cache)
    for name in CHUNKED:
        size = int(name.partition(":")[2])
        found[name] = functools.partial(_chunked, model, texts, device, size)
    for name in (GREEDY, UNCACHED):
        found[name] = functools.partial(_generated, model, texts, device, name == GREEDY)
    return found


def _dynamic(model: Any, width: int) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _static(model: Any, width: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=width)


def _stepped(model: Any, texts: Texts, device: torch.device, cache: Callable[[Any, int], Any], call: Call) -> Floats:
    inputs = build(texts, call, device)
    width = inputs["input_ids"].shape[1]
    ends = [*range(max(1, width - STEPS), width), width]
    return _through(model, inputs, cache(model, width), list(dict.fromkeys(ends)))


def _chunked(model: Any, texts: Texts, device: torch.device, size: int, call: Call) -> Floats:
    inputs = build(texts, call, device)
    width = inputs["input_ids"].shape[1]
    return _through(model, inputs, _dynamic(model, width), [*range(size, width, size), width])


def _through(model: Any, inputs: Inputs, cache: Any, ends: list[int]) -> Floats:
    """[B, V] behind the last place, with places up to each of `ends` in one call. Sequences end at the last place."""
    start = 0
    with torch.inference_mode(), quiet():
        for end in ends:
            out = model(
                input_ids=inputs["input_ids"][:, start:end],
                attention_mask=inputs["attention_mask"][:, :end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            start = end
    found: Floats = out.logits[:, -1].float().cpu().numpy()
    return found


def _generated(model: Any, texts: Texts, device: torch.device, cached: bool, call: Call) -> Floats:
    return written(model, build(texts, call, device), NEW, cached).cpu().numpy()


def gap(call: Call, want: Floats, got: Floats) -> float:
    """The largest difference of two rows; of two texts, up to the first token that differs."""
    if call.route in (GREEDY, UNCACHED):
        n = len(want) // 2
        other = np.flatnonzero(want[:n] != got[:n])
        n_same = int(other[0]) + 1 if len(other) else n
        want, got = want[n : n + n_same], got[n : n + n_same]
    found = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    return float("inf") if np.isnan(found) else float(found)


def says(call: Call, row: Floats) -> tuple[int, ...]:
    """The token that a row's logits say comes next, or the text."""
    if call.route in (GREEDY, UNCACHED):
        return tuple(int(token) for token in row[: len(row) // 2])
    return (int(row.argmax()),)
