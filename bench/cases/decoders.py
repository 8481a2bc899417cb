"""Stacks of decoder layers with random weights, ours beside stock's (SDPA, same dtype): prefill, and one token behind a cache.

The gate: a row alone, and its last token behind a cache, have the bits of the row in the batch, and are close to stock's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import invariants
import rerank_kernels as rk
from bench.cases import shapes
from bench.cases.ops import DTYPES, Build, Place, given
from bench.harness.turns import Contestant, Work

SHAPES = {
    "llama-3.2-1b": ("Llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "head_dim": 64}),
    "qwen3-0.6b": ("Qwen3", {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "head_dim": 128}),
}
KV_HEADS = 8
MIXED = (40, 90, 130, 60, 220, 300, 500, 110)
PREFILL_BAR, MIXED_BAR, TOKEN_BAR, HALF_BAR = 1.0, 1.5, 1.0, 1.6  # HALF_BAR: bfloat16 beside our own float32
CASES = {  # lengths, dtype, whether it is one token behind a cache -> the bar of stock's ratio
    ((512,), "fp32", False): PREFILL_BAR,
    ((128,) * 8, "fp32", False): PREFILL_BAR,
    (MIXED, "fp32", False): MIXED_BAR,
    ((512,), "fp32", True): TOKEN_BAR,
    ((512,), "bf16", True): None,
}
SLACK = {"fp32": 1.0e-5, "bf16": 3.0e-2}  # root mean square from stock's float32, of elements of order 1


@functools.lru_cache(1)
def stacks(name: str, layers: int) -> dict[tuple[str, str], Any]:
    """By dtype, and "stock" or "ours", which share every weight."""
    import transformers as tf

    kind, sizes = SHAPES[name]
    config = getattr(tf, f"{kind}Config")(
        vocab_size=1000, num_hidden_layers=layers, num_key_value_heads=KV_HEADS, attn_implementation="sdpa", **sizes
    )
    torch.manual_seed(0)
    stock = getattr(tf, f"{kind}Model")(config).eval()
    made = {("fp32", "stock"): stock, ("bf16", "stock"): copy.deepcopy(stock).bfloat16()}
    for dtype in SLACK:
        made[dtype, "ours"] = shapes.twin(made[dtype, "stock"])
        rk.patch(made[dtype, "ours"])
    return made


def last(model: Any, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
    state: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache).last_hidden_state[:, -1]
    return state


def behind(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """One token behind a cache of all before it; the cache is cut back after each call."""
    from transformers import DynamicCache

    cache = DynamicCache()
    last(model, ids[:, :-1], cache=cache)

    def call() -> Tensor:
        state = last(model, ids[:, -1:], cache=cache)
        cache.crop(-1)
        return state

    return call


def gate(models: Mapping[tuple[str, str], Any], first: int, ids: Tensor, mask: Tensor, dtype: str) -> None:
    """first: tokens of the first row."""
    ours, row = models[dtype, "ours"], ids[:1, ids.shape[1] - first :]
    got = last(ours, ids, mask)
    invariants.same(last(ours, row)[0], got[0], "a row alone against in the batch")
    invariants.same(behind(ours, row)()[0], got[0], "a token behind a cache against the whole")
    error = float((got.float() - last(models["fp32", "stock"], ids, mask)).square().mean().sqrt())
    assert error <= SLACK[dtype], f"{error:.2g} from stock's float32, allowed {SLACK[dtype]}"


def contest(
    place: Place,
    name: str,
    layers: int,
    lengths: tuple[int, ...],
    dtype: str,
    token: bool,
    bar: float | None = None,
    half: float | None = None,
) -> Work:
    width, sizes = max(lengths), SHAPES[name][1]
    ids = torch.randint(0, 1000, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()

    def way(label: str, of: str, who: str, **more: Any) -> Contestant:
        model = lambda: stacks(name, layers)[of, who]  # noqa: E731  # made when its turn comes
        cached = functools.cache(lambda: behind(model(), ids))
        return Contestant(label, (lambda i: cached()()) if token else lambda i: last(model(), ids, mask), graph=False, **more)

    check = lambda: gate(stacks(name, layers), lengths[0], ids, mask, dtype)  # noqa: E731
    contestants = [way("cpu portable", dtype, "ours", ours=True, gate=check), way("stock, SDPA", dtype, "stock", bar=bar)]
    contestants += [way("ours, float32", "fp32", "ours", bar=half)] if dtype == "bf16" else []
    wide = 2 * (sizes["num_attention_heads"] + KV_HEADS) * sizes["head_dim"] + 3 * sizes["intermediate_size"]
    per_token = layers * sizes["hidden_size"] * wide
    fmas = per_token * (len(lengths) if token else sum(lengths))
    return Work(contestants, fmas, per_token * DTYPES[dtype].itemsize, about={"group": "decoder"})


def on_a_cpu(quick: bool) -> Iterator[tuple[str, Build]]:
    layers = 1 if quick else 3
    for name in SHAPES:
        for (lengths, dtype, token), bar in CASES.items():
            of = f"1 token after {lengths[0]}" if token else shapes.said(lengths)
            bars = (None, None) if quick else (bar, HALF_BAR)
            yield (
                f"{name}, {layers} layer{'s'[: layers - 1]}, {of}, {dtype}",
                given(contest, name, layers, lengths, dtype, token, *bars),
            )
