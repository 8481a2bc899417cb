"""The registry of models: from the exact class of a module, as a string, to the forward that serves it.

A new model type is a file beside this one with its forward, and its rows in ENCODERS and PARTS below. Classes are strings: an
absent class needs no import, and a subclass matches only where its body overrides nothing (bound.py, served_class).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.errors import PatchError
from rerank_kernels.graphs.buckets import Inputs
from rerank_kernels.models import bert, decoder, leaf_roles, leaves, lora, modernbert, sentence, sparse
from rerank_kernels.models.bound import class_of, forward_of, hooked, name_of
from rerank_kernels.models.heads import AnswerHead, embedding
from rerank_kernels.models.packing import explained, fetched, ready, refuse_hooks
from rerank_kernels.models.replay import Replay, possible
from rerank_kernels.models.roles import PEFT, Problem, overridden, problems, wrong, wrong_weights
from rerank_kernels.models.served import Served
from rerank_kernels.ops.pooling import HeadOutput
from rerank_kernels.ops.sequences import Sequences

# Whole models: an encoder, or a classifier around one.
ENCODERS: dict[str, Served] = bert.served() | decoder.served() | modernbert.served()
# Modules inside an encoder, whose weights its forward reads.
PARTS: frozenset[str] = bert.parts() | decoder.parts() | modernbert.parts() | {lora.LINEAR, lora.SAVED}
# What is served wherever it stands.
LEAVES: dict[str, Callable[..., Any]] = leaves.FORWARDS | sentence.FORWARDS
FORWARDS: dict[str, Callable[..., Any]] = LEAVES | {name: served.forward for name, served in ENCODERS.items()}
# What is exact as long as a forward of ours sees that it is.
GUARDS = leaves.GUARDS
# torch.compile's: it runs the forward below it, and takes compiled code for it only while that forward is the one it compiled.
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
# Nothing to compute, or a plain copy: the same bits anyway.
EXACT = {
    "torch.nn.modules.sparse.Embedding",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ParameterDict",
    "torch.nn.modules.flatten.Flatten",
    *sentence.TRANSFORMERS,
    COMPILED,
}
PREFIXES = (*(a.prefix for types in (bert.MODEL_TYPES, decoder.MODEL_TYPES) for a in types.values()), "ModernBert")


def problem(m: Any) -> str | None:
    """Why module m, by itself, cannot be served; "" if its class is in no table, None if it can."""
    name = name_of(m)
    if name in ENCODERS or name in PARTS:
        return None if name in PEFT else overridden(m)
    if name in sentence.FORWARDS:
        return sentence.sentence_problem(m)
    if name not in LEAVES and name not in EXACT:
        return f"{name} is not served; {lora.MERGE}" if name.startswith("peft.") else ""
    role = leaf_roles.ROLES.get(name)  # none: its own forward runs, and has nothing of ours in its place
    return None if role is None else wrong(m, role, training=True) or wrong_weights(m, role, {})


def role_problems(m: Any) -> dict[str, Problem]:
    """Path inside encoder or classifier m -> why what stands there is not what the forward of m reads."""
    return problems(m, ENCODERS[name_of(m)].roles(m))


def sparse_layers(m: Any) -> list[str]:
    """The layers of m, if it is a decoder without a head, that run through sparse_ffn."""
    served = ENCODERS.get(name_of(m))
    return sparse.layers(m) if served is not None and served.forward is decoder.decoder_forward else []


Before = Sequence[int | None]


def packed_logits(
    model: nn.Module, ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None = None, before: Before | None = None
) -> HeadOutput:
    """Logits and scores, float32 [B, L], of a patched classifier; ids and token_types [total], no padding. before: of each
    sequence the place of an earlier one that it continues, or None; where turning_points() is not None."""
    served = _served(model, "logits")
    with _entered(model):
        assert served.head is not None
        return _through(served, model, (ids, cu_seqlens, token_types), before, "logits", served.head(model))


def packed_answers(
    model: nn.Module, ids: Tensor, cu_seqlens: Tensor, yes: int, no: int | None, before: Before | None = None
) -> HeadOutput:
    """Log-odds and scores, float32 [B, 1], of the word `yes` beside `no` behind each prompt, of a patched *ForCausalLM. Without
    `no` it is the logit of `yes`. before: as in packed_logits."""
    served = _served(model, "words")
    with _entered(model):
        assert served.words is not None
        head = AnswerHead(served.words(model), yes, no, served.cap(model))
        return _through(served, model, (ids, cu_seqlens, None), before, ("answers", yes, no), head)


def packed_embeddings(
    model: nn.Module,
    ids: Tensor,
    cu_seqlens: Tensor,
    token_types: Tensor | None = None,
    *,
    pooling: str = "mean",
    normalise: bool = True,
) -> Tensor:
    """Embeddings, float32 [B, D], of a patched encoder; heads.embedding says what they are."""
    served = _served(model, "states")
    with _entered(model):

        def pooled(x: Tensor, sequences: Sequences) -> Tensor:
            return embedding(x, sequences, pooling, normalise)

        if pooling not in POOLED_ON_THE_DEVICE:
            return pooled(*_through(served, model, (ids, cu_seqlens, token_types), None, "rows", None))
        what = ("embeddings", pooling, normalise)
        return _through(served, model, (ids, cu_seqlens, token_types), None, what, pooled)


POOLED_ON_THE_DEVICE = ("cls", "mean")  # the other poolings ask how long sequences are
Numbers = tuple[Tensor, Tensor, Tensor | None]  # ids, offsets, token types


def _through(served: Served, model: Any, numbers: Numbers, before: Before | None, what: Hashable, tail: Any) -> Any:
    """tail(states, sequences), by a graph where one can be, named `what`; without a tail both of them."""
    where = next(model.parameters()).device
    replay = possible(model, where, lambda: served.why(model))
    if replay is not None and (before is None or served.turning_points is not None):
        found = _replayed(replay, served, model, numbers, before, what, tail)
        if found is not None:
            return found
    ids, _, types = (t if t is None else t.to(where) for t in numbers)
    sequences = _sequences(model, *numbers[:2]).to(where)
    assert ids is not None
    x = _packed(served, model, ids, sequences, types, before)
    return (x, sequences) if tail is None else tail(x, sequences)


def _replayed(
    replay: Replay, served: Served, model: Any, numbers: Numbers, before: Before | None, what: Hashable, tail: Any
) -> Any:
    if served.tokens is None or served.states is None:
        return replay.leave("a model type without graphs")
    ids, cu, types = fetched(*numbers)
    assert ids is not None and cu is not None
    sequences, states = _sequences(model, ids, cu), served.states
    tokens = served.tokens(model, ids, sequences, types, *(() if before is None else (before,)))
    if isinstance(tokens, str):
        return replay.leave(tokens)

    def body(given: Inputs) -> tuple[Tensor, ...]:
        x = states(model, given)
        out = x if tail is None else tail(x, given.sequences)
        return (out,) if isinstance(out, Tensor) else out

    def keep(given: Inputs, out: tuple[Tensor, ...]) -> Any:
        if tail is None:
            return out[0][: sequences.total].clone(), sequences
        found = [t[: sequences.count].clone() for t in out]
        return HeadOutput(*found) if len(found) > 1 else found[0]

    found = replay.run(("packed", what), tokens, body, keep)
    if found is None:
        return None
    served.entered(model)
    return (found[0], sequences.to(found[0].device)) if tail is None else found


def kind(model: nn.Module) -> str | None:
    """What a served model is: a cross-encoder, if it has a head, or an embedding model; None if it is not served."""
    served = ENCODERS.get(name_of(model))
    return None if served is None else "embedding" if served.gives == "states" else "cross-encoder"


def turning_points(model: nn.Module) -> list[int] | None:
    """Lengths of a model: what two sequences begin with has the same bits in both if for each length both are longer or neither
    is. None: no sequence begins with the bits of another."""
    find = ENCODERS[name_of(model)].turning_points
    return None if find is None else find(model)


def max_tokens(model: nn.Module) -> int:
    """The longest sequence that a served model takes."""
    return ENCODERS[name_of(model)].max_tokens(model)


def typed(model: nn.Module) -> bool:
    """Whether a model's tokens have types, as far as is known."""
    served = ENCODERS.get(name_of(model))
    return served is None or served.typed


def model_types() -> list[str]:
    """The model types that are served, as config.json names them."""
    texts = {module.split(".")[2] for module, a in decoder.MODEL_TYPES.items() if a.text}  # without it: of text and images
    folders = {name.split(".")[2] for name in ENCODERS}
    return sorted(f"{name}_text" if name in texts else name.replace("_", "-") for name in folders)


def _sequences(model: Any, ids: Tensor, cu_seqlens: Tensor) -> Sequences:
    """Checked here, and by nobody further down."""
    op = class_of(model.base_model)
    check.shape(op, "ids", ids, "total")
    return Sequences.from_cu_seqlens(cu_seqlens, ids.shape[0], ids.device, op=op)


def _packed(
    served: Served, model: Any, ids: Tensor, sequences: Sequences, token_types: Tensor | None, before: Before | None
) -> Tensor:
    if before is None:
        return served.packed(model, ids, sequences, token_types)
    if served.turning_points is None:
        raise ValueError(f"{class_of(model)}: before is for decoders, whose tokens see nothing behind them; leave it out")
    return served.packed(model, ids, sequences, token_types, before)


CLASSES = {"logits": "*ForSequenceClassification", "words": "*ForCausalLM", "states": "*Model"}


def _served(model: nn.Module, gives: str) -> Served:
    served = ENCODERS.get(name_of(model))
    if forward_of(model) is None or served is None or served.gives != gives:
        kind, came = CLASSES[gives], class_of(model)
        raise PatchError(f"packed entry: model must be a patched {kind}, got {came}; call rk.patch(model) first")
    return served


@contextmanager
def _entered(model: nn.Module) -> Iterator[None]:
    roles = ENCODERS[name_of(model)].roles
    ready(model, roles)
    if hooked(model):  # the packed entry does not pass model.__call__, which would run them
        refuse_hooks(model)
    forward = forward_of(model)
    assert forward is not None
    with forward.serving(), explained(model, roles):
        yield
