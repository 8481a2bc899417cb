"""Encoders built like BERT, packed: valid tokens only, [total, D] with cu_seqlens, from the embedding to the head.

A new family whose modules carry BERT's names is one row in FAMILIES. What differs from stock transformers: embeddings and
residuals are summed in float32, positions count valid tokens, hidden states at padding are 0, logits are float32.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_kernels.binding import Forward, PatchError, class_of, hooked, name_of
from rerank_kernels.ops import check
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.norm import layer_norm, normalize
from rerank_kernels.ops.pooling import HeadOutput, pool, score_head

_TORCH = {"GELU": "gelu", "Tanh": "tanh", "ReLU": "relu", "SiLU": "silu", "Sigmoid": "sigmoid"}
_HF = {"GELUActivation": "gelu", "SiLUActivation": "silu"} | dict.fromkeys(
    ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "GELUTanh", "PytorchGELUTanh"), "gelu_tanh"
)
ACTIVATIONS = {f"torch.nn.modules.activation.{name}": kind for name, kind in _TORCH.items()} | {
    f"transformers.activations.{name}": kind for name, kind in _HF.items()
}


def activation_of(m: Any) -> str:
    """The `activation` of ops.linear that module m is."""
    kind = ACTIVATIONS[name_of(m)]
    return "gelu_tanh" if getattr(m, "approximate", "none") == "tanh" else kind


@dataclass(frozen=True)
class Family:
    """A model family whose modules carry BERT's names, only behind another class prefix."""

    prefix: str
    first_position: Callable[[Any], int]  # the encoder -> position id of a sequence's first token
    head: Callable[[Any], tuple[Any, Any]]  # the classifier -> its (dense, out), with tanh in between, on the first token


def _roberta(prefix: str) -> Family:
    return Family(
        prefix, lambda encoder: int(encoder.embeddings.padding_idx) + 1, lambda m: (m.classifier.dense, m.classifier.out_proj)
    )


FAMILIES = {
    "transformers.models.bert.modeling_bert": Family("Bert", lambda _: 0, lambda m: (m.bert.pooler.dense, m.classifier)),
    "transformers.models.roberta.modeling_roberta": _roberta("Roberta"),
    "transformers.models.xlm_roberta.modeling_xlm_roberta": _roberta("XLMRoberta"),
}


def _family(m: object) -> Family:
    return FAMILIES[type(m).__module__]


_NO_CROSS, _WHOLE = "there is no cross-attention in a reranker's encoder", "an encoder sees the whole sequence at once"
REFUSED = {
    "labels": "no loss is computed; take the logits, or call rk.unpatch(model) to train",
    "output_attentions": "attention probabilities are never stored; call rk.unpatch(model) to see them",
    "encoder_hidden_states": _NO_CROSS,
    "encoder_attention_mask": _NO_CROSS,
    "past_key_values": _WHOLE,
    "use_cache": _WHOLE,
}


class Batch(NamedTuple):
    """The valid tokens of a batch, packed: [total] each, place being the one in [B * T]; and what the caller asked for."""

    words: Tensor  # [total, D], word embeddings
    types: Tensor | None
    positions: Tensor
    cu: Tensor  # [B + 1]
    place: Tensor
    shape: tuple[int, int]
    states: list[Tensor] | None  # packed hidden states, collected if output_hidden_states
    as_dict: bool

    def scatter(self, x: Tensor) -> Tensor:
        """[total, D] -> [B, T, D], 0 at padding."""
        b, t = self.shape
        return x.new_zeros(b * t, x.shape[1]).index_copy_(0, self.place, x).view(b, t, -1)

    def output(self, cls: Any, **fields: Any) -> Any:
        states = None if self.states is None else tuple(self.scatter(x) for x in self.states)
        out = cls(hidden_states=states, **fields)
        return out if self.as_dict else out.to_tuple()


def encoder_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertModel and its like, stock arguments: BaseModelOutputWithPoolingAndCrossAttentions."""
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    _ready(m)
    batch = _pack(m, m, args, kwargs)
    x, pooled = _encode(m, batch.words, batch.types, batch.positions, batch.cu, batch.states), None
    if m.pooler is not None:
        pooled = _dense(m.pooler.dense, pool(x, "cls", cu_seqlens=batch.cu), "tanh")
    return batch.output(BaseModelOutputWithPoolingAndCrossAttentions, last_hidden_state=batch.scatter(x), pooler_output=pooled)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertForSequenceClassification and its like, stock arguments: SequenceClassifierOutput with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    _ready(m)
    encoder = _enter_encoder(m)
    batch = _pack(m, encoder, args, kwargs)
    x = _encode(encoder, batch.words, batch.types, batch.positions, batch.cu, batch.states)
    return batch.output(SequenceClassifierOutput, logits=_score(m, x, batch.cu).logit)


def packed_logits(model: nn.Module, ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None = None) -> HeadOutput:
    """Logits and scores, float32 [B, L], of a patched *ForSequenceClassification; ids and token_types [total], no padding."""
    with _entered(model, classifier_forward):
        x = _encode_packed(_enter_encoder(model), ids, cu_seqlens, token_types)
        return _score(model, x, cu_seqlens)


def packed_embeddings(
    model: nn.Module,
    ids: Tensor,
    cu_seqlens: Tensor,
    token_types: Tensor | None = None,
    *,
    pooling: str = "mean",
    normalise: bool = True,
) -> Tensor:
    """Embeddings, float32 [B, D], of a patched encoder: the mean over tokens, or the first, then x / max(|x|, 1e-12)."""
    with _entered(model, encoder_forward):
        x = _encode_packed(model, ids, cu_seqlens, token_types)
        y = pool(x, pooling, cu_seqlens=cu_seqlens, out_dtype=torch.float32)
        return normalize(y) if normalise else y


def max_tokens(model: Any) -> int:
    """The longest sequence the position table of a served model holds."""
    encoder = model if ENCODERS.get(name_of(model)) is encoder_forward else model.base_model
    return int(encoder.embeddings.position_embeddings.num_embeddings) - _family(encoder).first_position(encoder)


def _entered(model: nn.Module, kind: Callable[..., Any]) -> AbstractContextManager[None]:
    forward = model.__dict__.get("forward")
    if not isinstance(forward, Forward) or ENCODERS.get(name_of(model)) is not kind:
        kinds = {classifier_forward: "*ForSequenceClassification", encoder_forward: "*Model"}
        raise PatchError(
            f"packed entry: model must be a patched {kinds[kind]}, got {class_of(model)}; call rk.patch(model) first"
        )
    _ready(model)
    if hooked(model):  # the packed entry does not pass model.__call__, which would run them
        _refuse_hooks(model, model)
    return forward.serving()


def _ready(m: Any) -> None:
    """Refuse what the forward of encoder or classifier m would silently pass over: dropout, and hooks of the modules in m.

    patch() saw neither, for both can come later; so this walks m at each call, a fraction of a millisecond.
    """
    if m.training or m.base_model.training:
        raise RuntimeError(
            f"{class_of(m)}.forward: the model is in training mode and rerank_kernels is forward only, without dropout; "
            "call model.eval(), or rk.unpatch(model) to train"
        )
    below, seen = list(m._modules.values()), {m, None}
    while below:  # and not m.modules(), which makes names too and takes three times as long
        inner = below.pop()
        if inner not in seen:
            if hooked(inner):
                _refuse_hooks(m, inner)
            seen.add(inner)
            below += inner._modules.values()


def _refuse_hooks(m: nn.Module, inner: nn.Module) -> NoReturn:
    path = next(path for path, module in m.named_modules() if module is inner)
    raise PatchError(
        f"{class_of(m)}: {path or 'the model'} ({class_of(inner)}) has forward hooks, and hooks inside a patched encoder do "
        "not run; remove them (handle.remove()), or call rk.unpatch(model)"
    )


def _enter_encoder(m: Any) -> Any:
    """The encoder of a classifier. It does not pass its own forward, but a count of zero must mean it never ran."""
    forward = m.base_model.__dict__.get("forward")
    if isinstance(forward, Forward):
        forward.calls += 1
    return m.base_model


def _encode_packed(encoder: Any, ids: Tensor, cu: Tensor, types: Tensor | None) -> Tensor:
    op = class_of(encoder)
    check.shape(op, "ids", ids, "total")
    cu = check.cu_seqlens(op, cu, ids.shape[0], ids.device)
    if types is not None:
        check.shape(op, "token_types", types, ids.shape[0])
    words = _lookup(op, "ids", ids, encoder.embeddings.word_embeddings)
    return _encode(encoder, words, types, _positions(encoder, cu, ids.shape[0]), cu, None)


def _encode(
    encoder: Any, words: Tensor, types: Tensor | None, positions: Tensor, cu: Tensor, states: list[Tensor] | None
) -> Tensor:
    """[total, D] through the embedding and all layers; appends the embedding's and each layer's output to `states`."""
    op, e = class_of(encoder), encoder.embeddings
    types = torch.zeros_like(positions) if types is None else types
    # In transformers' order; three terms and the norm stay in float32, so the body's dtype is rounded to once, here.
    total = words.float() + _lookup(op, "token_type_ids", types, e.token_type_embeddings).float()
    total = total + _lookup(op, "position_ids", positions, e.position_embeddings).float()
    x = _norm(e.LayerNorm, total).to(e.word_embeddings.weight.dtype)
    if states is not None:
        states.append(x)
    for layer in encoder.encoder.layer:
        x = _layer(layer, x, cu)
        if states is not None:
            states.append(x)
    return x


# A CPU takes so many tokens through the feed-forward layer at a time: what lies between its two products, four times as wide as
# the model, stays in the caches and does not grow with the batch. Each token is on its own there: no bit depends on this.
TOKENS_AT_ONCE = 1024


def _layer(layer: Any, x: Tensor, cu: Tensor) -> Tensor:
    """Post-norm: the residual is added inside layer_norm, where the sum stays float32."""
    own, after, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    heads = (x.shape[0], own.num_attention_heads, own.attention_head_size)
    q, k, v = (_dense(p, x).view(heads) for p in (own.query, own.key, own.value))
    a = attention(q, k, v, cu_seqlens=cu).flatten(1)
    x = _norm(after.LayerNorm, _dense(after.dense, a), x)
    parts = x.split(TOKENS_AT_ONCE) if x.device.type == "cpu" and x.shape[0] > TOKENS_AT_ONCE else (x,)
    act = activation_of(up.intermediate_act_fn)
    done = [_norm(down.LayerNorm, _dense(down.dense, _dense(up.dense, part, act)), part) for part in parts]
    return done[0] if len(done) == 1 else torch.cat(done)


def _dense(m: Any, x: Tensor, act: str | None = None) -> Tensor:
    _as_patched(m, nn.Linear)
    return linear(x, m.weight, m.bias, activation=act)


def _norm(m: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    _as_patched(m, nn.LayerNorm)
    return layer_norm(x, m.weight, m.bias, m.eps, residual=residual)


def _as_patched(m: object, cls: type[nn.Module]) -> None:
    """An adapter put in after patch() would be passed over without a word: its base weights look the same from here."""
    if type(m) is not cls:
        raise PatchError(
            f"a {class_of(m)} stands where patch() saw nn.{cls.__name__}; call rk.unpatch(model), then patch it again"
        )


def _pack(m: Any, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Stock arguments to packed tokens; an argument that would have to be ignored is an error."""
    op, given = f"{class_of(m)}.forward", _signature(m.__class__).bind(None, *args, **kwargs).arguments
    given.pop("self")
    given |= given.pop("kwargs", {})
    ids, mask, embeds = (given.pop(name, None) for name in ("input_ids", "attention_mask", "inputs_embeds"))
    types, positions = given.pop("token_type_ids", None), given.pop("position_ids", None)
    states, as_dict = _options(m, op, given)
    if (ids is None) == (embeds is None):
        raise ValueError(f"{op}: exactly one of input_ids [B, T] and inputs_embeds [B, T, D] must be given")
    if ids is None:
        check.shape(op, "inputs_embeds", embeds, "B", "T", encoder.config.hidden_size)
        b, t = embeds.shape[:2]
    else:
        check.shape(op, "input_ids", ids, "B", "T")
        b, t = ids.shape
    if mask is None:
        _warn_of_pads(op, ids, encoder.config.pad_token_id)
        mask = torch.ones(b, t, dtype=torch.bool, device=(embeds if ids is None else ids).device)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (b, t):
        came = check.shape_of(mask) if isinstance(mask, Tensor) else type(mask).__name__
        check.fail(op, "attention_mask", f"[B, T] = [{b}, {t}], nonzero where a token is", came, "causal masks are not served")
    # 0 for tokens and -10000 for padding: `!= 0` would turn it around
    if mask.dtype != torch.bool and mask.numel() and mask.min() < 0:
        check.fail(op, "attention_mask", "nonzero where a token is", "negative values", "additive masks are not served")
    place, cu = check.mask_to_cu_seqlens(op, mask != 0, b, t)

    def packed(name: str, x: Tensor | None) -> Tensor | None:
        if x is not None:
            check.shape(op, name, x, 1 if x.shape[0] == 1 else b, t)
            x = x.expand(b, t).reshape(-1).index_select(0, place)
        return x

    if ids is None:
        words = embeds.reshape(b * t, -1).index_select(0, place)
    else:
        words = _lookup(op, "input_ids", ids.reshape(-1).index_select(0, place), encoder.embeddings.word_embeddings)
    own = packed("position_ids", positions)
    if own is None:
        own = _positions(encoder, cu, place.numel())
    return Batch(words, packed("token_type_ids", types), own, cu, place, (b, t), states, as_dict)


@functools.cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _warn_of_pads(op: str, ids: Tensor | None, pad: int | None) -> None:
    if ids is not None and pad is not None and ids.numel() and bool((ids[:, [0, -1]] == pad).any()):
        # Stock transformers takes them as tokens too; guessing a mask would be worse than saying what happens.
        warnings.warn(
            f"{op}: input_ids begin or end with the pad token {pad} and attention_mask is missing: "
            "padding is read as tokens and changes the result; pass the tokenizer's attention_mask",
            stacklevel=9,
        )


def _positions(encoder: Any, cu: Tensor, total: int) -> Tensor:
    """[total]: counted over a sequence's valid tokens, from the family's first position.

    Stock RoBERTa counts tokens that differ from the pad id instead. The two agree except for a pad id that the mask keeps:
    it is counted here like every other token.
    """
    first, limit = _family(encoder).first_position(encoder), max_tokens(encoder)
    # One look, on a GPU too: there wrong offsets would end in an assertion that takes the process's context with it.
    offsets = cu.tolist()
    if offsets[0] != 0 or offsets[-1] != total or offsets != sorted(offsets):
        check.fail(class_of(encoder), "cu_seqlens", f"ascending from 0 to {total}, the number of tokens", offsets[:8])
    longest = max((end - begin for begin, end in itertools.pairwise(offsets)), default=0)
    if longest > limit:
        wanted = f"at most {limit} tokens a sequence, for config.max_position_embeddings = {limit + first}"
        check.fail(class_of(encoder), "input_ids", wanted, longest, f"tokenise with truncation=True, max_length={limit}")
    if len(offsets) == 2:
        return torch.arange(first, first + total, device=cu.device)
    start = torch.repeat_interleave(cu[:-1].long(), (cu[1:] - cu[:-1]).long(), output_size=total)
    return torch.arange(first, first + total, device=cu.device) - start


def _lookup(op: str, name: str, ids: Tensor, table: nn.Embedding) -> Tensor:
    n = table.num_embeddings
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
    if ids.numel():  # on a GPU too, for the same reason as above
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= n:
            check.fail(op, name, f"in [0, {n - 1}]", f"values in [{low}, {high}]")
    return F.embedding(ids, table.weight)


def _options(m: Any, op: str, given: dict[str, Any]) -> tuple[list[Tensor] | None, bool]:
    """(where to collect hidden states, return_dict)."""
    asked = {name: value for name, value in given.items() if value is not None}
    hidden = asked.pop("output_hidden_states", getattr(m.config, "output_hidden_states", False))
    as_dict = asked.pop("return_dict", getattr(m.config, "return_dict", True))
    asked.setdefault("output_attentions", getattr(m.config, "output_attentions", False))
    for name, value in asked.items():
        if value is not False:
            raise ValueError(f"{op}: {name} is not served by a patched model; {REFUSED.get(name, 'leave it out')}")
    if not isinstance(hidden, bool):
        check.fail(op, "output_hidden_states", "True or False", hidden, "take the layers you want from the tuple")
    return ([] if hidden else None), bool(as_dict)


def _score(m: Any, x: Tensor, cu: Tensor) -> HeadOutput:
    dense, out = _family(m).head(m)
    _as_patched(dense, nn.Linear)
    _as_patched(out, nn.Linear)
    first = pool(x, "cls", cu_seqlens=cu)
    return score_head(first, out.weight, out.bias, dense_weight=dense.weight, dense_bias=dense.bias, activation="tanh")


ENCODERS: dict[str, Callable[..., Any]] = {
    **{f"{module}.{f.prefix}Model": encoder_forward for module, f in FAMILIES.items()},
    **{f"{module}.{f.prefix}ForSequenceClassification": classifier_forward for module, f in FAMILIES.items()},
}
# Read by an encoder's forward, which takes their weights and never calls them; nothing by themselves.
_PARTS = "Embeddings Encoder Layer Attention SelfAttention SelfOutput Intermediate Output Pooler ClassificationHead"
_PARTS += " SdpaSelfAttention"  # transformers 4 has a class for each way of stock attention; the weights are the same
PARTS = {f"{module}.{f.prefix}{part}" for module, f in FAMILIES.items() for part in _PARTS.split()}
