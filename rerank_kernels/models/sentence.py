"""What stands behind the model of sentence-transformers: Pooling, Normalize, Dense, LogitScore; dicts of tensors in and out.

Pooling and Normalize give float32 whatever the body's dtype. The bits are those of Reranker.encode: the same ops in the same
order. What is known of a module is read when it is called, for its attributes may be set after patch().
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rerank_kernels.models.bound import name_of
from rerank_kernels.models.heads import asked
from rerank_kernels.ops.norm import normalize
from rerank_kernels.ops.pooling import POOL_MODES, pool

REFUSED = ("cls_token_embeddings", "token_weights_sum", "cu_seq_lens_q")  # features of modules that are not served


def sentence_problem(m: Any) -> str | None:
    """Why module m, one of FORWARDS, cannot be served; None if it can."""
    name = name_of(m)
    if name in _POOLING:
        if (mode := _pooling_mode(m)) not in POOL_MODES:
            return f"pooling mode {mode} is not served; {', '.join(POOL_MODES)} are"
        if (
            mode == "weightedmean" and not m.include_prompt
        ):  # its weights count the prompt's tokens, and those of pool would not
            return "pooling mode weightedmean is not served without the prompt; set include_prompt = True"
    if name in _DENSE and not isinstance(m.activation_function, nn.Module):
        return "its activation_function is no torch.nn.Module"
    return None


def _pooling_mode(m: Any) -> str:
    mode = m.pooling_mode if hasattr(m, "pooling_mode") else m.get_pooling_mode_str()  # before 5.4 a flag for each
    return mode if isinstance(mode, str) else "+".join(mode)


def pooling_forward(m: Any, features: dict[str, Any], **_: Any) -> dict[str, Any]:
    if (problem := sentence_problem(m)) is not None:
        raise ValueError(f"Pooling: {problem}")
    for name in REFUSED:
        if name in features:
            raise ValueError(f"Pooling: {name} is not served by a patched model; call rk.unpatch(model)")
    x = features["token_embeddings"]
    mask = features.get("attention_mask")
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask != 0
    if not m.include_prompt and "prompt_length" in features:
        length = features["prompt_length"]
        length = length[0] if isinstance(length, Tensor) else int(length)  # a tensor stays one, for a trace of the forward
        mask = mask & (mask.cumsum(1) > length)
    features["sentence_embedding"] = pool(x, _pooling_mode(m), mask=mask, out_dtype=torch.float32)
    return features


def stock_pooling(x: Tensor, mask: Tensor, mode: str) -> Tensor:
    """[B, T, D] -> [B, D] as sentence-transformers has it, for who sets stock beside ours."""
    if mode == "cls":
        return x[:, 0]
    places = torch.arange(1, x.shape[1] + 1, device=x.device)
    if mode == "lasttoken":
        return x[torch.arange(x.shape[0], device=x.device), (places * mask).argmax(1)]
    weight = mask.unsqueeze(-1).to(x.dtype)
    if mode == "max":
        return x.masked_fill(weight == 0, -torch.inf).amax(1)
    if mode == "weightedmean":
        weight = weight * places.to(x.dtype)[:, None]
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def normalize_forward(m: Any, features: dict[str, Any]) -> dict[str, Any]:
    name = getattr(m, "module_input_name", "sentence_embedding")  # both since version 5
    x = features.get(name)
    if x is not None:
        features[getattr(m, "module_output_name", name)] = normalize(x.float())
    return features


def dense_forward(m: Any, features: dict[str, Any]) -> dict[str, Any]:
    """Its own, on patched modules; what comes is float32, and its weights may not be."""
    name = getattr(m, "module_input_name", "sentence_embedding")
    came = features[name]
    out: dict[str, Any] = type(m).forward(m, {**features, name: came.to(m.linear.weight.dtype)})
    if getattr(m, "module_output_name", name) != name:
        out[name] = came
    return out


def logit_score_forward(m: Any, features: dict[str, Any]) -> dict[str, Any]:
    """The log-odds of a decoder's answer, float32. Called by itself it has two logits to subtract, each rounded to float32."""
    logits = features[m.module_input_name][:, -1].float()
    question = asked()
    if question is None or not question.answered:
        no = m.false_token_id
        logits = (logits[:, m.true_token_id] - (0.0 if no is None else logits[:, no]))[:, None]
    features["scores"] = logits
    return features


_POOLING = (
    "sentence_transformers.models.Pooling.Pooling",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
)
NORMALIZES = ("sentence_transformers.models.Normalize.Normalize", "sentence_transformers.base.modules.normalize.Normalize")
_DENSE = ("sentence_transformers.models.Dense.Dense", "sentence_transformers.base.modules.dense.Dense")
LOGIT_SCORE = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"  # since 5.4
# Nothing to compute: it calls the model that it holds.
TRANSFORMERS = (
    "sentence_transformers.models.Transformer.Transformer",
    "sentence_transformers.base.modules.transformer.Transformer",
)
FORWARDS = {
    **dict.fromkeys(_POOLING, pooling_forward),
    **dict.fromkeys(NORMALIZES, normalize_forward),
    **dict.fromkeys(_DENSE, dense_forward),
    LOGIT_SCORE: logit_score_forward,
}
