"""Language heads: the logits of the next token, whole, through a cache and in chunks, and what generate() writes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.scoring import templates
from rerank_kernels.scoring.templates import Prompts, Template
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


def writes(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForCausalLM")


def prompts_of(
    model: Any,
    tokenizer: Any,
    template: str | Template | None,
    instruction: str | None,
    asked: int | None,
    room: int,
    cut: int,
) -> Prompts | None:
    """What makes a pair's prompt; None where nobody named a template and the model type has none."""
    kind = str(model.config.model_type)
    if template is None and kind not in templates.OF_MODEL_TYPE:
        if instruction is not None:
            check.fail("verify", "instruction", "unset without a template", repr(instruction), "name a template too")
        return None
    found = templates.chosen(template, kind)
    said = found.instruction if instruction is None else instruction
    if asked is None:  # room for the text that an encoder would get
        cut += len(Prompts(found, tokenizer, 1 << 20, said).ids("", ""))
    return Prompts(found, tokenizer, min(cut, room), said)


def next_logits(model: Any, inputs: Inputs) -> Tensor:
    """float32 [B, V] of the token behind each sequence, without a cache."""
    with torch.inference_mode():
        mask = inputs.get("attention_mask")
        width = inputs["input_ids"].shape[1]
        if mask is None or bool((mask[:, -1] != 0).all()):
            logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=1).logits
            return logits[:, -1].float()
        last = width - 1 - (mask != 0).long().flip(1).argmax(1)
        kept, place = last.unique(return_inverse=True)
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return logits[torch.arange(len(last), device=last.device), place].float()


def routes(model: Any, texts: Texts, device: torch.device) -> dict[str, Route]:
    """The ways to the same numbers that a language head has beside model(**inputs)."""
    found: dict[str, Route] = {CACHED[0]: functools.partial(_stepped, model, texts, device, _dynamic)}
    if not any(getattr(layer, "is_sliding", False) for layer in _static(model, 8).layers):
        found[CACHED[1]] = functools.partial(_stepped, model, texts, device, _static)
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
    with torch.inference_mode(), _quiet():
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


def written(model: Any, inputs: Inputs, count: int, cached: bool = True) -> Tensor:
    """float32 [B, 2 count]: the tokens that greedy search writes, and the logit of each. No end stops it."""
    with torch.inference_mode(), _quiet():
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, use_cache=cached, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    ids = out.sequences[:, -count:]
    logits = torch.stack([step.float() for step in out.logits], 1).gather(2, ids[..., None])[..., 0]
    return torch.cat([ids.float(), logits], 1)


class _quiet(warnings.catch_warnings):
    """Without transformers' notes on arguments that greedy search does not read."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


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
