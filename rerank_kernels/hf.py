"""patch(model): makes a transformers encoder compute with rerank_kernels, in place; unpatch(model): exactly as it was.

One walk over named_modules, one table of forwards. A module whose exact class stands in FORWARDS gets a stateless forward of
its own; no class, no global, no parameter is touched. What stands in no table is unknown, and unknown is an error: a module
that silently keeps PyTorch's arithmetic would break the promise without a word.

An encoder runs packed: the valid tokens are gathered at the embedding, [total, D] with cu_seqlens goes through all layers, and
pooling reads each sequence's own first token. Padding is never computed, so its side, length, id and content cannot reach a
bit. This takes the whole encoder, so transformers' AttentionInterface is not needed; some models ignore it silently anyway.

A new model family is one row in FAMILIES if it is built like BERT, otherwise a forward and its rows in FORWARDS and PARTS.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_kernels.ops import check
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import activation, linear
from rerank_kernels.ops.norm import layer_norm
from rerank_kernels.ops.pooling import HeadOutput, pool, score_head
from rerank_kernels.ops.softmax import softmax
from rerank_kernels.ops.softmax import sum as row_sum

MODES = ("portable",)


class PatchError(RuntimeError):
    """The model cannot be served as asked; the message says which modules, and what would work. Nothing was changed."""


class Forward:
    """The `forward` of one module, found in FORWARDS by its class; counts its calls.

    Not a types.MethodType: that pickles as getattr(module, name), and comes back as the class's own forward, unpatched, without
    a word. This one copies and pickles with its module, and a copy's forward reads the copy's weights.
    """

    def __new__(cls, *args: Any) -> Forward:
        global _serve
        if _serve is _serve_eagerly:
            # torch.compile must call it, not look inside: fused arithmetic has other bits. Here and not at import, for the
            # compiler takes seconds to import; in __new__, for pickle and deepcopy pass here too.
            _serve = torch.compiler.disable(_serve_eagerly)
        return super().__new__(cls)

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _serve(self, args, kwargs)

    def enter(self) -> None:
        if self.module.training:
            raise RuntimeError(
                f"{_class(self.module)}.forward: the model is in training mode and rerank_kernels is forward only, without "
                "dropout; call model.eval(), or rk.unpatch(model) to train"
            )
        self.calls += 1

    @property
    def __signature__(self) -> inspect.Signature:
        """Callers that filter arguments by inspect.signature(model.forward) see the class's own signature."""
        return inspect.signature(type(self.module).forward.__get__(self.module))


def _serve_eagerly(self: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    self.enter()
    if torch.is_grad_enabled():
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{_class(self.module)}.forward: an input asks for gradients and rerank_kernels is forward only; "
                    "run under torch.inference_mode(), or call rk.unpatch(model) to train"
                )
    with torch.no_grad():
        return FORWARDS[_name(self.module)](self.module, *args, **kwargs)


_serve = _serve_eagerly


@dataclass
class Report:
    """What patch did: module path -> class name, in three kinds.

    replaced: computed by rerank_kernels, with a forward of its own or inside the forward of a module above it.
    exact: nothing to compute (Dropout in eval, containers) or a plain copy (Embedding): the same bits anyway.
    unknown: left as it was, with the reason; empty if strict.
    """

    mode: str
    replaced: dict[str, str]
    exact: dict[str, str]
    unknown: dict[str, str]
    forwards: dict[str, Forward] = field(repr=False)

    def calls(self) -> dict[str, int]:
        """Module path -> calls of its bound forward so far. Zeros after a run: something went around the patch."""
        return {path: forward.calls for path, forward in self.forwards.items()}

    def __str__(self) -> str:
        kinds = {"replaced": self.replaced, "exact": self.exact, "unknown": self.unknown}
        counts = {kind: Counter(what.split(" ")[0] for what in paths.values()) for kind, paths in kinds.items()}
        names = sorted({name for c in counts.values() for name in c}, key=lambda n: (*(-c[n] for c in counts.values()), n))
        wide = max([len(n) for n in names] + [5]) + 2
        lines = [f"mode {self.mode}", "class".ljust(wide) + "".join(kind.rjust(10) for kind in kinds)]
        lines += [name.ljust(wide) + "".join(str(c[name] or "-").rjust(10) for c in counts.values()) for name in names]
        lines += [f"unknown: {path or '(the model)'}: {what}" for path, what in self.unknown.items()]
        calls = [f"{path or '(the model)'} {n}" for path, n in self.calls().items()]
        lines.append("calls: " + ", ".join(calls[:8]) + (f" and {len(calls) - 8} more" if len(calls) > 8 else ""))
        return "\n".join(lines)


def patch(model: nn.Module, mode: str = "portable", strict: bool = True) -> Report:
    """Bind rerank_kernels forwards to `model`, in place. Patching twice does nothing more.

    Served: BERT, RoBERTa and XLM-RoBERTa (transformers >= 5), the encoders and their *ForSequenceClassification; and the
    leaves of LEAVES (nn.Linear, nn.LayerNorm, activations) in plain containers. What differs from stock: logits are float32
    whatever the body's dtype, hidden states at padding are 0, positions are counted over the tokens that attention_mask
    keeps (a left-padded pair gets the bits it gets alone), hooks and forwards of modules inside the encoder do not run, and a
    row without tokens gives the head's value for a zero vector.

    mode: "portable", the only one so far. strict: raise PatchError if any module is unknown, and change nothing; otherwise
    leave those modules, and the encoder that holds them, as they are, and list them in the report.
    Raises TypeError if model is not a torch.nn.Module, ValueError for another mode.
    """
    if not isinstance(model, nn.Module):
        hint = "; pass its .model, which is one" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    if mode not in MODES:
        raise ValueError(f"patch: mode must be 'portable', the only one that exists, got {mode!r}")
    for cls in type(model).__mro__:
        if cls.__name__ in WRAPPERS:
            raise PatchError(f"patch: model is a {cls.__name__}, a wrapper around the model to patch; {WRAPPERS[cls.__name__]}")
    report = _plan(model, mode)
    if strict and report.unknown:
        lines = "".join(f"\n  {path or '(the model itself)'}: {what}" for path, what in report.unknown.items())
        families = ", ".join(family.prefix for family in FAMILIES.values())
        leaves = ", ".join(name.rsplit(".", 1)[1] for name in LEAVES)
        raise PatchError(
            f"patch: {_class(model)} has {len(report.unknown)} modules without a rerank_kernels forward; nothing was patched:"
            f"{lines}\nServed are {families} encoders, with or without ForSequenceClassification, and {leaves}. "
            "With strict=False the modules above keep stock arithmetic."
        )
    for forward in report.forwards.values():
        forward.module.__dict__["forward"] = forward
    return report


def unpatch(model: nn.Module) -> None:
    """Undo patch: every module of `model` gets its class's own forward back, and nothing else was ever changed."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Forward):
            del module.__dict__["forward"]


def _plan(model: nn.Module, mode: str) -> Report:
    modules = dict(model.named_modules())
    problems = {path: why for path, m in modules.items() if (why := _problem(m)) is not None}
    roots = [path for path, m in modules.items() if _name(m) in ENCODERS]
    for root in roots:  # the encoder's forward does not call the modules inside it, so their hooks would be passed over
        problems |= {p: "has forward hooks" for p, m in modules.items() if p != root and _inside(p, root) and _hooked(m)}
    served = [root for root in roots if not any(_inside(path, root) for path in problems)]
    covered = {path for path in modules for root in served if _inside(path, root)}

    report = Report(mode, {}, {}, {}, {})
    for path, m in modules.items():
        name, cls = _name(m), _class(m)
        if path in problems:
            report.unknown[path] = f"{cls} ({problems[path]})" if problems[path] else cls
        elif name in EXACT:
            report.exact[path] = cls
        elif path in covered or name in LEAVES:
            report.replaced[path] = cls
            if path in served or path not in covered:
                report.forwards[path] = m.__dict__.get("forward") or Forward(m)
        elif name in ENCODERS:
            report.unknown[path] = f"{cls} (holds the unknown modules)"
        else:
            report.unknown[path] = f"{cls} (served only inside its whole model)"
    return report


def _problem(m: Any) -> str | None:
    """Why module m, by itself, cannot be served; "" if its class is in no table, None if it can."""
    name = _name(m)
    if not isinstance(m.__dict__.get("forward", None), Forward | None):
        return "has a forward of its own in its __dict__"
    if name in ENCODERS and (m.config.is_decoder or getattr(m.config, "add_cross_attention", False)):
        return "config.is_decoder or config.add_cross_attention is set"
    if name == "torch.nn.modules.activation.Softmax" and m.dim is None:
        return "dim is None"
    if hasattr(m, "intermediate_act_fn") and _name(m.intermediate_act_fn) not in ACTIVATIONS:
        return f"activation {getattr(m.intermediate_act_fn, '__name__', _class(m.intermediate_act_fn))} is unknown"
    return None if name in FORWARDS or name in EXACT or name in PARTS else ""


def _hooked(m: nn.Module) -> bool:
    hooks = [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]
    # transformers leaves its own in place after a stock output_hidden_states=True; our forward serves that option itself
    return any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)


def _inside(path: str, root: str) -> bool:
    return root in ("", path) or path.startswith(root + ".")


def _name(m: object) -> str:
    """The exact class as a string: absent classes need no import, subclasses do not match."""
    return f"{type(m).__module__}.{type(m).__qualname__}"


def _class(m: object) -> str:
    return type(m).__qualname__


# ---- leaves ----------------------------------------------------------------------------------------------------------------


def _linear(m: Any, x: Tensor) -> Tensor:
    return linear(x, m.weight, m.bias)


def _layer_norm(m: Any, x: Tensor) -> Tensor:
    d = len(m.normalized_shape)
    weight = torch.ones(m.normalized_shape, device=x.device) if m.weight is None else m.weight
    flat = x.flatten(-d)
    return layer_norm(flat, weight.flatten(), None if m.bias is None else m.bias.flatten(), m.eps).view(x.shape)


def _activation(m: Any, x: Tensor) -> Tensor:
    return activation(x, _kind(m))


def _softmax(m: Any, x: Tensor) -> Tensor:
    return softmax(x, m.dim)


def _kind(m: Any) -> str:
    """The `activation` of ops.linear that module m is."""
    kind = ACTIVATIONS[_name(m)]
    return "gelu_tanh" if getattr(m, "approximate", "none") == "tanh" else kind


# ---- encoders built like BERT ----------------------------------------------------------------------------------------------


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

    batch = _pack(m, m, args, kwargs)
    x, pooled = _encode(m, batch.words, batch.types, batch.positions, batch.cu, batch.states), None
    if m.pooler is not None:
        pooled = _dense(m.pooler.dense, pool(x, "cls", cu_seqlens=batch.cu), "tanh")
    return batch.output(BaseModelOutputWithPoolingAndCrossAttentions, last_hidden_state=batch.scatter(x), pooler_output=pooled)


def classifier_forward(m: Any, *args: Any, **kwargs: Any) -> Any:
    """BertForSequenceClassification and its like, stock arguments: SequenceClassifierOutput with float32 logits."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    encoder = _enter_encoder(m)
    batch = _pack(m, encoder, args, kwargs)
    x = _encode(encoder, batch.words, batch.types, batch.positions, batch.cu, batch.states)
    return batch.output(SequenceClassifierOutput, logits=_score(m, x, batch.cu).logit)


def packed_logits(model: nn.Module, ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None = None) -> HeadOutput:
    """Logits and scores, float32 [B, L], of a patched *ForSequenceClassification; ids and token_types [total], no padding."""
    _entered(model, classifier_forward)
    with torch.no_grad():
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
    _entered(model, encoder_forward)
    with torch.no_grad():
        x = _encode_packed(model, ids, cu_seqlens, token_types)
        y = pool(x, pooling, cu_seqlens=cu_seqlens, out_dtype=torch.float32)
        return y / row_sum(y * y, -1, keepdim=True).sqrt().clamp_min(1e-12) if normalise else y


def max_tokens(model: Any) -> int:
    """The longest sequence the position table of a served model holds."""
    encoder = model if FORWARDS[_name(model)] is encoder_forward else model.base_model
    return int(encoder.embeddings.position_embeddings.num_embeddings) - _family(encoder).first_position(encoder)


def _entered(model: nn.Module, kind: Callable[..., Any]) -> None:
    forward = model.__dict__.get("forward")
    if not isinstance(forward, Forward) or FORWARDS[_name(model)] is not kind:
        kinds = {classifier_forward: "*ForSequenceClassification", encoder_forward: "*Model"}
        raise PatchError(
            f"packed entry: model must be a patched {kinds[kind]}, got {_class(model)}; call rk.patch(model) first"
        )
    forward.enter()


def _enter_encoder(m: Any) -> Any:
    """The encoder of a classifier. It does not pass its own forward, but a count of zero must mean it never ran."""
    forward = m.base_model.__dict__.get("forward")
    if isinstance(forward, Forward):
        forward.enter()
    return m.base_model


def _encode_packed(encoder: Any, ids: Tensor, cu: Tensor, types: Tensor | None) -> Tensor:
    op = _class(encoder)
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
    op, e = _class(encoder), encoder.embeddings
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


def _layer(layer: Any, x: Tensor, cu: Tensor) -> Tensor:
    """Post-norm: the residual is added inside layer_norm, where the sum stays float32."""
    own, after, up, down = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
    heads = (x.shape[0], own.num_attention_heads, own.attention_head_size)
    q, k, v = (_dense(p, x).view(heads) for p in (own.query, own.key, own.value))
    a = attention(q, k, v, cu_seqlens=cu).flatten(1)
    x = _norm(after.LayerNorm, _dense(after.dense, a), x)
    h = _dense(up.dense, x, _kind(up.intermediate_act_fn))
    return _norm(down.LayerNorm, _dense(down.dense, h), x)


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
            f"a {_class(m)} stands where patch() saw nn.{cls.__name__}; call rk.unpatch(model), then patch it again"
        )


def _pack(m: Any, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Stock arguments to packed tokens; an argument that would have to be ignored is an error."""
    op, given = f"{_class(m)}.forward", inspect.signature(m.forward).bind(*args, **kwargs).arguments
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
    lengths = (cu[1:] - cu[:-1]).long()
    first = _family(encoder).first_position(encoder)
    longest, limit = int(lengths.max()) if lengths.numel() else 0, max_tokens(encoder)
    if longest > limit:
        wanted = f"at most {limit} tokens a sequence, for config.max_position_embeddings = {limit + first}"
        check.fail(_class(encoder), "input_ids", wanted, longest, f"tokenise with truncation=True, max_length={limit}")
    start = torch.repeat_interleave(cu[:-1].long(), lengths, output_size=total)
    return torch.arange(total, device=cu.device) - start + first


def _lookup(op: str, name: str, ids: Tensor, table: nn.Embedding) -> Tensor:
    n = table.num_embeddings
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= n):
        check.fail(op, name, f"in [0, {n - 1}]", f"values in [{int(ids.min())}, {int(ids.max())}]")
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


# ---- the tables ------------------------------------------------------------------------------------------------------------


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


_TORCH = {"GELU": "gelu", "Tanh": "tanh", "ReLU": "relu", "SiLU": "silu", "Sigmoid": "sigmoid"}
_HF = {"GELUActivation": "gelu", "SiLUActivation": "silu"} | dict.fromkeys(
    ("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "GELUTanh", "PytorchGELUTanh"), "gelu_tanh"
)
ACTIVATIONS = {f"torch.nn.modules.activation.{name}": kind for name, kind in _TORCH.items()} | {
    f"transformers.activations.{name}": kind for name, kind in _HF.items()
}
LEAVES: dict[str, Callable[..., Any]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    "torch.nn.modules.activation.Softmax": _softmax,
    **dict.fromkeys(ACTIVATIONS, _activation),
}
ENCODERS: dict[str, Callable[..., Any]] = {
    **{f"{module}.{f.prefix}Model": encoder_forward for module, f in FAMILIES.items()},
    **{f"{module}.{f.prefix}ForSequenceClassification": classifier_forward for module, f in FAMILIES.items()},
}
FORWARDS = LEAVES | ENCODERS
# Read by an encoder's forward, which takes their weights and never calls them; nothing by themselves.
_PARTS = "Embeddings Encoder Layer Attention SelfAttention SelfOutput Intermediate Output Pooler ClassificationHead"
PARTS = {f"{module}.{f.prefix}{part}" for module, f in FAMILIES.items() for part in _PARTS.split()}
EXACT = {
    "torch.nn.modules.sparse.Embedding",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.flatten.Flatten",
}
WRAPPERS = {
    "SentenceTransformer": "pass model[0].auto_model",
    "CrossEncoder": "pass model.model",
    "OptimizedModule": "pass model._orig_mod and run it uncompiled, for compilers reorder arithmetic",
    "DataParallel": "pass model.module",
    "DistributedDataParallel": "pass model.module",
}
_NO_CROSS, _WHOLE = "there is no cross-attention in a reranker's encoder", "an encoder sees the whole sequence at once"
REFUSED = {
    "labels": "no loss is computed; take the logits, or call rk.unpatch(model) to train",
    "output_attentions": "attention probabilities are never stored; call rk.unpatch(model) to see them",
    "encoder_hidden_states": _NO_CROSS,
    "encoder_attention_mask": _NO_CROSS,
    "past_key_values": _WHOLE,
    "use_cache": _WHOLE,
}
