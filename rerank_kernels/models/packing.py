"""Packing: the arguments of transformers' forwards to the valid tokens alone, [total] with cu_seqlens, and back to its outputs.

Every architecture's forward goes through here, so that padding, options and hooks mean the same for all of them. An argument
that would have to be ignored is an error.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.graphs.buckets import Inputs, Tokens
from rerank_kernels.models import lora
from rerank_kernels.models.bound import class_of, name_of, numbered, served_by
from rerank_kernels.models.fingerprint import Fingerprint
from rerank_kernels.models.replay import Replay
from rerank_kernels.models.roles import HOOKS, Problem, Roles, problems
from rerank_kernels.ops.linear import linear
from rerank_kernels.ops.norm import layer_norm
from rerank_kernels.ops.opaque import opaque, traced
from rerank_kernels.ops.sequences import Sequences

_NO_CROSS, _WHOLE = "there is no cross-attention in a reranker's encoder", "an encoder sees the whole sequence at once"
REFUSED = {
    "labels": "no loss is computed; take the logits, or call rk.unpatch(model) to train",
    "output_attentions": "attention probabilities are never stored; call rk.unpatch(model) to see them",
    "encoder_hidden_states": _NO_CROSS,
    "encoder_attention_mask": _NO_CROSS,
    "past_key_values": _WHOLE,
    "use_cache": _WHOLE,
}
TENSORS = ("input_ids", "attention_mask", "inputs_embeds", "token_type_ids", "position_ids")


class Kept(NamedTuple):
    """Offsets of the sequences, int32 [B + 1], and where their tokens stand among the places of the batch, int64 [total]."""

    cu_seqlens: Tensor
    places: Tensor


class Batch(NamedTuple):
    """The valid tokens of a batch, packed: [total] each; and what the caller asked for. Where `tokens` holds the numbers, the
    rest is there once the batch is `sent`."""

    words: Tensor  # [total, D], word embeddings
    types: Tensor | None
    positions: Tensor
    sequences: Sequences  # made once, for all layers and the head
    states: list[Tensor] | None  # packed hidden states, collected if output_hidden_states
    as_dict: bool
    tokens: Tokens | None = None  # the numbers on the host, for a graph; all were looked at

    def sent(self, table: Table) -> Batch:
        """On the device of the table, for who computes without a graph."""
        if self.tokens is None:
            return self
        there = self.tokens.to(table.words.weight.device)
        return self._replace(
            words=lookup("", "", there.ids, table.words, known=True),
            types=there.types,
            positions=there.positions,
            sequences=there.sequences,
        )

    def output(self, cls: Any, **fields: Any) -> Any:
        states = None if self.states is None else tuple(self.sequences.unpack(x) for x in self.states)
        out = cls(hidden_states=states, **fields)
        return out if self.as_dict else out.to_tuple()


def ready(m: Any, roles_of: Callable[[Any], Roles]) -> None:
    """Refuse what the forward of encoder or classifier m would silently get wrong: it reads the modules in m and calls none.

    All of it can come after patch(), which did not see it. So a fingerprint is compared at each call, in some microseconds;
    where it differs, all that patch() checked is checked again.
    """
    if m.training or m.base_model.training:
        raise RuntimeError(
            f"{class_of(m)}.forward: the model is set to train, and rerank_kernels is forward only, without dropout; "
            "call model.eval(), or rk.unpatch(model) to train"
        )
    if torch.compiler.is_dynamo_compiling():  # torch.export with strict=True takes this apart, and a look at modules is none
        if (forward := served_by(m)) is not None:
            _looked(forward.number, roles_of)
        return
    with _untraced():
        forward = served_by(m)
        seen = None if forward is None else forward.seen
        if seen is None or not seen.same():
            roles = roles_of(m)
            seen = Fingerprint(m, roles)  # first, so that what another thread changes meanwhile is found at the next call
            refuse(m, problems(m, roles))
            if forward is not None and not traced():  # a tracer's tensors would stay in it
                forward.seen = seen


def _looked(number: int, roles_of: Callable[[Any], Roles]) -> bool:
    """`ready` of a module that a tracer cannot hand over; called, and not taken apart."""
    forward = numbered(number)
    refuse(forward.module, problems(forward.module, roles_of(forward.module)))
    return True


_looked._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _untraced:
    """Inside the block torch.jit.trace writes nothing down, and shapes are numbers; a class, for it is entered at each call."""

    def __enter__(self) -> None:
        self.state = torch._C._get_tracing_state()
        if self.state is not None:
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        if self.state is not None:
            torch._C._set_tracing_state(self.state)  # type: ignore[attr-defined]


def refuse(m: nn.Module, found: Mapping[str, Problem], error: Exception | None = None) -> None:
    """Raise for the first problem inside m, by its place, with what would work."""
    for path, (module, why) in found.items():
        if why.endswith(HOOKS):
            cure = ", and hooks inside a patched encoder do not run; remove them (handle.remove()), or call rk.unpatch(model)"
        elif "; " in why:
            cure = ", or call rk.unpatch(model)"
        else:
            cure = ", and rk.patch() saw something else; undo the change, or call rk.unpatch(model)"
        place = f"{class_of(m)}: {path or 'the model'} ({class_of(module)})"
        raise PatchError(f"{place}{' ' if why.startswith(('is ', 'has ')) else ': '}{why}{cure}") from error


@contextmanager
def explained(m: nn.Module, roles_of: Callable[[Any], Roles]) -> Iterator[None]:
    """An error of an op inside the block names the parameter of m that it comes from, if one is not what it has to be."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, PatchError):
            refuse(m, problems(m, roles_of(m)), error)
        raise


def refuse_hooks(m: nn.Module) -> NoReturn:
    """Of a model whose packed entry does not pass m.__call__, which would run them."""
    raise PatchError(
        f"{class_of(m)}: the model ({class_of(m)}) has forward hooks, and hooks inside a patched encoder do "
        "not run; remove them (handle.remove()), or call rk.unpatch(model)"
    )


def dense(
    m: Any, x: Tensor, act: str | None = None, *, residual: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """linear of module m, with LoRA's adapters or without."""
    if type(m) is not nn.Linear:  # asked seven times a layer, also where a step has one row
        if lora.is_lora(m):
            return lora.product(m, x, act, out_dtype, residual)
        as_patched(m, nn.Linear)
    return linear(x, m.weight, m.bias, activation=act, residual=residual, out_dtype=out_dtype)


def norm(m: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    weight = m.weight
    if weight is None:  # elementwise_affine=False; a product with 1 is exact
        weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    return layer_norm(x, weight, m.bias, m.eps, residual=residual)


def as_patched(m: object, cls: type[nn.Module]) -> None:
    """For who reads the weights of m as a plain layer's: those of an adapter look the same from here."""
    if name_of(m) != f"{cls.__module__}.{cls.__qualname__}":
        came = name_of(m) if class_of(m) == cls.__name__ else class_of(m)  # a class of another package may have the same name
        raise PatchError(f"a {came} stands where nn.{cls.__name__} is read; call rk.unpatch(model)")


class Table(NamedTuple):
    """What a forward looks tokens up in: its encoder, the word embeddings, and the places that a sequence can have."""

    encoder: Any
    words: nn.Embedding
    first: int  # position id of a sequence's first token
    limit: int  # tokens of the longest sequence
    typed: bool = True  # tokens have types
    placed: bool = True  # places are looked up in a table; where not, angles are made of them


def pack(m: Any, table: Table, args: tuple[Any, ...], kwargs: dict[str, Any], replay: Replay | None = None) -> Batch:
    """Stock arguments to packed tokens; an argument that would have to be ignored is an error. replay: a graph may serve them,
    so their numbers are looked at on the host."""
    op, given = f"{class_of(m)}.forward", _signature(m.__class__).bind(None, *args, **kwargs).arguments
    given.pop("self")
    given |= given.pop("kwargs", {})
    ids, mask, embeds, types, positions = (given.pop(name, None) for name in TENSORS)
    states, as_dict = _options(m, op, given)
    are_tensors(op, **dict(zip(TENSORS, (ids, mask, embeds, types, positions), strict=True)))
    if types is not None:
        refuse_types(op, "token_type_ids", table)
    if (ids is None) == (embeds is None):
        raise ValueError(f"{op}: exactly one of input_ids [B, T] and inputs_embeds [B, T, D] must be given")
    if ids is None:
        check.shape(op, "inputs_embeds", embeds, "B", "T", table.words.weight.shape[1])
        b, t = embeds.shape[:2]
    else:
        check.shape(op, "input_ids", ids, "B", "T")
        b, t = ids.shape
    if replay is not None and (why := _not_captured(table, states, ids, mask, types, positions)) is not None:
        replay.leave(why)
        replay = None
    if replay is not None:
        ids, mask, types, positions = fetched(ids, mask, types, positions)
    asked = embeds if ids is None else ids, mask, None if ids is None else m.config.pad_token_id, op
    if traced():
        cu, index = kept(*asked)
        sequences = Sequences(cu, index.shape[0], (b, t), index, op)
    else:
        sequences = _tokens(*asked)

    def packed(name: str, x: Tensor | None) -> Tensor | None:
        if x is not None:
            if not traced():  # there expand() says it, when it runs
                check.shape(op, name, x, 1 if x.shape[0] == 1 else b, t)
            x = sequences.pack(x.expand(b, t))
        return x

    if replay is not None:
        numbers = sequences.pack(ids)
        in_table(op, "input_ids", numbers, table.words)
        own = packed("position_ids", positions)
        own = positions_of(table, sequences) if own is None else own
        tokens = looked_at(class_of(table.encoder), table, numbers, packed("token_type_ids", types), own, sequences)
        return Batch(numbers, None, own, sequences, None, as_dict, tokens)
    if ids is None:
        words = sequences.pack(embeds)
    else:
        words = lookup(op, "input_ids", sequences.pack(ids), table.words)
    own = packed("position_ids", positions)
    if own is None:
        own = positions_of(table, sequences)
    return Batch(words, packed("token_type_ids", types), own, sequences, states, as_dict)


def refuse_types(op: str, name: str, table: Table) -> None:
    """An encoder that has no token types cannot read them."""
    if not table.typed:
        cure = "leave them out: tokenizer.model_input_names = ['input_ids', 'attention_mask']"
        raise ValueError(f"{op}: {name} are not served, a {class_of(table.encoder)} has no token types; {cure}")


def _not_captured(
    table: Table, states: Any, ids: Tensor | None, mask: Tensor | None, types: Tensor | None, positions: Tensor | None
) -> str | None:
    """Why a call cannot be replayed, None if it can."""
    if states is not None:
        return "hidden states were asked for"
    if ids is None:
        return "inputs_embeds"
    if positions is not None and not table.placed:
        return "position_ids"
    others = mask, types, positions
    where = table.words.weight.device
    return None if all(t is None or t.device == where for t in (ids, *others)) else "arguments on another device"


def fetched(*tensors: Tensor | None) -> list[Tensor | None]:
    """On the host. Those of one dtype and shape, as a tokenizer gives them, come in one copy: each waits for the device."""
    there = [t for t in tensors if t is not None]
    alike = len({(t.dtype, t.shape, t.layout) for t in there}) == 1 and there[0].layout == torch.strided
    rows = iter(torch.stack(there).cpu() if alike else [t.cpu() for t in there])
    return [None if t is None else next(rows) for t in tensors]


def looked_at(op: str, table: Table, ids: Tensor, types: Tensor | None, positions: Tensor, sequences: Sequences) -> Tokens:
    """Of packed numbers on the host, all but the ids looked at here."""
    if types is not None:
        in_table(op, "token_type_ids", types, table.encoder.embeddings.token_type_embeddings)
    if table.placed:
        in_table(op, "position_ids", positions, table.encoder.embeddings.position_embeddings)
    return Tokens(ids, types, positions, sequences)


def unpacked(sequences: Sequences, given: Inputs, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a graph gave, as the caller's batch has it: states [B, T, D], and of what is one row per sequence the batch's."""
    x, *pooled = outputs
    n, (b, t) = sequences.total, sequences.padded  # type: ignore[misc]
    x = x[:n]
    x = x.clone() if sequences.index is None else x.new_zeros(b * t, x.shape[1]).index_copy_(0, given.places[:n], x)
    return [x.view(b, t, -1), *(p[:b].clone() for p in pooled)]


def are_tensors(op: str, **given: Any) -> None:
    """Lists have a length and no shape: an argument that is no tensor is named here."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}; pass torch.as_tensor({name})")


def _kept_result(like: Tensor, mask: Tensor | None, pad: int | None, op: str) -> tuple[Tensor, Tensor]:
    cu = like.new_empty(like.shape[0] + 1, dtype=torch.int32)
    return cu, like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@opaque(_kept_result, result=Kept)
def kept(like: Tensor, mask: Tensor | None, pad: int | None, op: str) -> Kept:
    """_tokens, where a tracer writes it down: how many there are is known when the graph runs."""
    sequences = _tokens(like, mask, pad, op)
    index = torch.arange(sequences.total, device=like.device) if sequences.index is None else sequences.index
    return Kept(sequences.cu_seqlens, index)


def _tokens(like: Tensor, mask: Tensor | None, pad: int | None, op: str) -> Sequences:
    """Those of a padded batch, like [B, T, ...]: where mask [B, T] is not 0; every place without a mask."""
    b, t = like.shape[:2]
    if mask is None:
        _warn_of_pads(op, like, pad)
        mask = torch.ones(b, t, dtype=torch.bool, device=like.device)
    if tuple(mask.shape) != (b, t):
        hint = "masks of one value per pair of tokens, such as causal ones, are not served" if mask.dim() > 2 else ""
        check.fail(op, "attention_mask", f"[B, T] = [{b}, {t}], nonzero where a token is", check.shape_of(mask), hint)
    # 0 for tokens and -10000 for padding: `!= 0` would turn it around
    if mask.dtype != torch.bool and mask.numel() and mask.min() < 0:
        check.fail(op, "attention_mask", "nonzero where a token is", "negative values", "additive masks are not served")
    return Sequences.from_mask(mask != 0, (b, t), op=op)


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


def positions_of(table: Table, sequences: Sequences) -> Tensor:
    """[total]: counted over a sequence's valid tokens, from the table's first position.

    Stock RoBERTa counts tokens that differ from the pad id instead. The two agree except for a pad id that the mask keeps:
    it is counted here like every other token.
    """
    op, first, limit = class_of(table.encoder), table.first, table.limit
    if traced():
        assert sequences.index is not None
        return places(sequences.cu_seqlens, sequences.index, first, limit, op)
    return _counted(sequences, first, limit, op)


@opaque(lambda cu_seqlens, index, *_: index.new_empty(index.shape))
def places(cu_seqlens: Tensor, index: Tensor, first: int, limit: int, op: str) -> Tensor:
    """positions_of, where a tracer writes it down: of what sequences hold it takes tensors alone."""
    return _counted(Sequences.from_cu_seqlens(cu_seqlens, index.shape[0], op=op), first, limit, op)


def _counted(sequences: Sequences, first: int, limit: int, op: str) -> Tensor:
    # One look, on a GPU too: there wrong offsets would end in an assertion that takes the process's context with it.
    longest, cu, total = sequences.longest, sequences.cu_seqlens, sequences.total
    if longest > limit:
        wanted = f"at most {limit} tokens a sequence, for config.max_position_embeddings = {limit + first}"
        check.fail(op, "input_ids", wanted, longest, f"tokenise with truncation=True, max_length={limit}")
    if sequences.count == 1:
        return torch.arange(first, first + total, device=cu.device)
    start = torch.repeat_interleave(cu[:-1].long(), (cu[1:] - cu[:-1]).long(), output_size=total)
    return torch.arange(first, first + total, device=cu.device) - start


def lookup(op: str, name: str, ids: Tensor, table: nn.Embedding, known: bool = False) -> Tensor:
    """known: the ids were looked at before, on the host."""
    return F.embedding(ids, table.weight) if known else looked_up(ids, table.weight, op, name)


def in_table(op: str, name: str, ids: Tensor, table: nn.Embedding) -> None:
    _look(op, name, ids, table.weight.shape[0])


@opaque(lambda ids, weight, *_: weight.new_empty(*ids.shape, weight.shape[1]))
def looked_up(ids: Tensor, weight: Tensor, op: str, name: str) -> Tensor:
    _look(op, name, ids, weight.shape[0])
    return F.embedding(ids, weight)


def _look(op: str, name: str, ids: Tensor, n: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32):  # a graph would take narrower ones, and an embedding does not
        raise TypeError(f"{op}: {name} must be int64 or int32, got {ids.dtype}")
    if ids.numel():  # on a GPU too: there a wrong one would end in an assertion that takes the process's context with it
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        if low < 0 or high >= n:
            check.fail(op, name, f"in [0, {n - 1}]", f"values in [{low}, {high}]")


def _options(m: Any, op: str, given: dict[str, Any]) -> tuple[list[Tensor] | None, bool]:
    """(where to collect hidden states, return_dict)."""
    asked = {name: value for name, value in given.items() if value is not None}
    hidden = asked.pop("output_hidden_states", getattr(m.config, "output_hidden_states", False))
    # transformers 4 gives tuples to torch.jit.trace where config.torchscript says so
    usual = getattr(m.config, "return_dict", True) and not getattr(m.config, "torchscript", False)
    as_dict = asked.pop("return_dict", usual)
    asked.setdefault("output_attentions", getattr(m.config, "output_attentions", False))
    for name, value in asked.items():
        if value is not False:
            raise ValueError(f"{op}: {name} is not served by a patched model; {REFUSED.get(name, 'leave it out')}")
    if not isinstance(hidden, bool):
        check.fail(op, "output_hidden_states", "True or False", hidden, "take the layers you want from the tuple")
    return ([] if hidden else None), bool(as_dict)
