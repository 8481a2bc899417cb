"""Language heads as their users call them: prompts of pairs, the logits of the next token, what greedy search writes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.scoring import templates
from rerank_kernels.scoring.templates import Prompts, Template

Inputs = dict[str, Tensor]


def writes(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForCausalLM")


def prompts_of(
    op: str,
    model: Any,
    tokenizer: Any,
    template: str | Template | None,
    instruction: str | None,
    lengths: tuple[int | None, int, int],
) -> Prompts | None:
    """What makes a pair's prompt; None for a model without a language head, or where nobody named a template and the model
    type has none. lengths: what was asked for, the most there is room for, and of a text if nothing was asked."""
    given, kind = [("template", template), ("instruction", instruction)], str(getattr(model.config, "model_type", ""))
    if not writes(model) or (template is None and kind not in templates.OF_MODEL_TYPE):
        for name, value in given:
            if value is not None:
                wanted = "unset without a template" if writes(model) else "unset for a model without a language head"
                check.fail(op, name, wanted, repr(value), "name a template too" if writes(model) else "")
        return None
    found = templates.chosen(template, kind)
    if instruction is not None and not found.asks:
        check.fail(op, "instruction", "unset without a template that holds {instruction}", repr(instruction))
    said = found.instruction if instruction is None else instruction
    asked, room, usual = lengths
    if asked is None:  # as much of a text as an encoder would get
        asked = usual + len(Prompts(found, tokenizer, 1 << 20, said).ids("", ""))
    return Prompts(found, tokenizer, min(asked, room), said)


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


def written(model: Any, inputs: Inputs, count: int, cached: bool = True) -> Tensor:
    """float32 [B, 2 count]: the tokens that greedy search writes, and the logit of each. No end stops it, and no penalty or
    beam that the model's generation_config asks for changes it."""
    with torch.inference_mode(), quiet():
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, use_cache=cached, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        )  # fmt: skip
    ids = out.sequences[:, -count:]
    logits = torch.stack([step.float() for step in out.logits], 1).gather(2, ids[..., None])[..., 0]
    return torch.cat([ids.float(), logits], 1)


class quiet(warnings.catch_warnings):
    """Without transformers' notes on arguments that greedy search does not read."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
