"""Angles of rotary position embeddings, from a model's config: inverse frequencies and the rows of cos and sin.

transformers takes powers in float32, whose last bits differ from machine to machine. Here they are decimal numbers of 40
digits, the same everywhere, and rounded once to float32. The formulas are those of transformers' modeling_rope_utils.

Where transformers chooses frequencies by the longest sequence of a batch (dynamic, longrope), a sequence's own length decides
here, so that no other sequence is in its bits.
"""

from __future__ import annotations

import ast
import functools
from decimal import Context, Decimal, localcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.ops.opaque import opaque
from rerank_kernels.ops.rotary import rotary_table
from rerank_kernels.ops.sequences import Sequences

TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
DIGITS = Context(prec=40)
PI = Decimal("3.141592653589793238462643383279502884197")

Parameters = tuple[tuple[str, Any], ...]  # sorted and hashable


class Frequencies(NamedTuple):
    inv_freq: Tensor  # float32 [P], on the CPU
    scaling: float  # of cos and sin


def parameters(config: Any, layers: str = "") -> Parameters:
    """What the config says of its angles, with the sizes that they depend on; layers: a type of layer that has its own."""
    said = getattr(config, "rope_parameters", None)  # transformers 5
    if said is None:
        said = {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    elif layers and isinstance(said.get(layers), dict):
        said = said[layers]
    said = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(said).items() if v is not None}
    said["rope_type"] = said.get("rope_type", said.pop("type", "default"))
    if (share := said.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))) is None:
        share = 1.0
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    said |= {"features": int(head * share), "longest": config.max_position_embeddings}
    if said["rope_type"] in ("yarn", "llama3", "longrope"):
        said.setdefault(
            "original_max_position_embeddings",
            getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings,
        )
    return tuple(sorted(said.items()))


def problem(config: Any, layers: str = "") -> str | None:
    """Why the angles of a config cannot be served, None if they can."""
    nested = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(v, dict) for v in nested.values()) and not isinstance(nested.get(layers), dict):
        return (
            f"config.rope_parameters has nothing for {layers}"
            if layers
            else "config.rope_parameters differ from layer to layer"
        )
    said = dict(parameters(config, layers))
    if said["rope_type"] not in TYPES:
        return f"config's rope type is {said['rope_type']!r}, and served are {', '.join(TYPES)}"
    if said["features"] < 2 or said["features"] % 2:
        return f"rotary position embeddings of {said['features']} features, and an even number is needed"
    return None


@functools.lru_cache(maxsize=64)
def frequencies(said: Parameters, length: int = 0) -> Frequencies:
    """Of a sequence of `length` tokens, which matters to longrope alone."""
    p = dict(said)
    with localcontext(DIGITS):
        exact, scaling = _FORMULAS[p["rope_type"]](p, _plain(p), length)
        return Frequencies(torch.tensor([float(f) for f in exact], dtype=torch.float64, device="cpu").float(), float(scaling))


def _plain(p: dict[str, Any]) -> list[Decimal]:
    theta, n = Decimal(float(p["rope_theta"])), Decimal(p["features"])
    return [1 / theta ** (Decimal(i) / n) for i in range(0, p["features"], 2)]


def _default(p: dict[str, Any], plain: list[Decimal], length: int) -> tuple[list[Decimal], Decimal]:
    return plain, Decimal(1)


def _linear(p: dict[str, Any], plain: list[Decimal], length: int) -> tuple[list[Decimal], Decimal]:
    return [f / Decimal(float(p["factor"])) for f in plain], Decimal(1)


def _llama3(p: dict[str, Any], plain: list[Decimal], length: int) -> tuple[list[Decimal], Decimal]:
    factor, low, high = (Decimal(float(p[k])) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    trained, found = Decimal(p["original_max_position_embeddings"]), []
    for f in plain:
        wave = 2 * PI / f
        smooth = (trained / wave - low) / (high - low)
        if wave < trained / high:
            found.append(f)
        elif wave > trained / low:
            found.append(f / factor)
        else:
            found.append((1 - smooth) * f / factor + smooth * f)
    return found, Decimal(1)


def _yarn(p: dict[str, Any], plain: list[Decimal], length: int) -> tuple[list[Decimal], Decimal]:
    n, trained = p["features"], Decimal(p["original_max_position_embeddings"])
    factor = Decimal(float(p["factor"])) if "factor" in p else Decimal(p["longest"]) / trained

    def grown(by: float = 1.0) -> Decimal:
        return Decimal(1) if factor <= 1 else Decimal("0.1") * Decimal(float(by)) * factor.ln() + 1

    if "attention_factor" in p:
        scaling = Decimal(float(p["attention_factor"]))
    elif p.get("mscale") and p.get("mscale_all_dim"):
        scaling = grown(p["mscale"]) / grown(p["mscale_all_dim"])
    else:
        scaling = grown()

    def place(turns: float) -> Decimal:  # of the pair that turns so often within the trained length
        base = Decimal(float(p["rope_theta"]))
        return n * (trained / (Decimal(float(turns)) * 2 * PI)).ln() / (2 * base.ln())

    low, high = place(p.get("beta_fast") or 32), place(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = low.to_integral_value("ROUND_FLOOR"), high.to_integral_value("ROUND_CEILING")
    low, high = max(low, Decimal(0)), min(high, Decimal(n - 1))
    high = high + Decimal("0.001") if low == high else high
    ramp = [min(max((i - low) / (high - low), Decimal(0)), Decimal(1)) for i in range(n // 2)]
    return [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)], scaling


def _longrope(p: dict[str, Any], plain: list[Decimal], length: int) -> tuple[list[Decimal], Decimal]:
    trained = Decimal(p["original_max_position_embeddings"])
    factor = Decimal(float(p["factor"])) if "factor" in p else Decimal(p["longest"]) / trained
    scaling = Decimal(1) if factor <= 1 else (1 + factor.ln() / trained.ln()).sqrt()
    if "attention_factor" in p:
        scaling = Decimal(float(p["attention_factor"]))
    stretched = p["long_factor"] if length > trained else p["short_factor"]
    return [f / Decimal(float(s)) for f, s in zip(plain, stretched, strict=True)], scaling


_FORMULAS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,  # as long as no sequence is longer than the trained length: rows() refuses others
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def written(said: Parameters) -> str:
    """Parameters as a text, for a graph that holds no others."""
    return repr(said)


def read(text: str) -> Parameters:
    """What `written` wrote."""
    said: Parameters = ast.literal_eval(text)
    return said


def turning_point(parameters: Parameters) -> int:
    """The longest sequence whose frequencies are those of a short one."""
    said = dict(parameters)
    by_length = {"dynamic": "longest", "longrope": "original_max_position_embeddings"}
    return int(said[by_length[said["rope_type"]]]) if said["rope_type"] in by_length else 2**62


def rows(said: Parameters, positions: Tensor, longest: int, lengths: Tensor | None, *, op: str) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [total, P], of packed tokens at `positions`.

    longest: of the batch's sequences, in tokens, those in a cache included; lengths: int64 [total], that of each token's own
    sequence, or None where `longest` says enough.
    """
    turn = turning_point(said)
    last = int(positions.max()) if positions.numel() else 0
    if positions.numel() and int(positions.min()) < 0:
        check.fail(op, "position_ids", "at least 0", int(positions.min()))
    if last >= turn >= longest:
        kind = dict(said)["rope_type"]
        check.fail(op, "position_ids", f"below {turn}, for rope type {kind!r} and a sequence of {longest} tokens", last)
    cos, sin = (t.index_select(0, positions) for t in _table(said, 0, _room(last), positions.device))
    if longest > turn:
        kind = dict(said)["rope_type"]
        if kind == "dynamic" or lengths is None:
            why = "beyond it the angles of cached keys would change; pass the whole sequence with use_cache=False"
            why = "beyond it all angles of a sequence change with each token; cut the text" if kind == "dynamic" else why
            check.fail(op, "input_ids", f"at most {turn} tokens a sequence, for rope type {kind!r}", longest, why)
        far = (lengths > turn)[:, None]
        long = (t.index_select(0, positions) for t in _table(said, turn + 1, _room(last), positions.device))
        cos, sin = (torch.where(far, b, a) for a, b in zip((cos, sin), long, strict=True))
    return cos, sin


def turned(
    said: Parameters, limit: int, op: str, positions: Tensor, keys: Sequences, lengths: Tensor | None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rows` of the new tokens of sequences; keys: whole ones. lengths: of those, None where cached keys would need other
    angles; counts: of the new tokens of each, if those are not all."""
    longest = keys.longest
    not_longer(op, longest, limit)
    own = None
    if lengths is not None and longest > turning_point(said):
        own = torch.repeat_interleave(lengths, lengths if counts is None else counts, output_size=positions.shape[0])
    return rows(said, positions, longest, own, op=op)


def not_longer(op: str, longest: int, limit: int) -> None:
    if longest > limit:
        wanted = f"at most {limit} tokens a sequence, for config.max_position_embeddings"
        check.fail(op, "input_ids", wanted, longest, f"tokenise with truncation=True, max_length={limit}")


def _angles_result(cu_seqlens: Tensor, positions: Tensor, pairs: int, *_: Any) -> tuple[Tensor, Tensor]:
    cos, sin = (positions.new_empty(positions.shape[0], pairs, dtype=torch.float32) for _ in range(2))
    return cos, sin


@opaque(
    _angles_result,
    result=lambda cos, sin: (cos, sin),
    schema="(Tensor cu_seqlens, Tensor positions, int pairs, str said, int limit, str op) -> (Tensor, Tensor)",
)
def angles(cu_seqlens: Tensor, positions: Tensor, pairs: int, said: str, limit: int, op: str) -> tuple[Tensor, Tensor]:
    """`turned` of whole sequences, where a tracer writes it down; said: the angles' parameters as a text."""
    keys = Sequences.from_cu_seqlens(cu_seqlens, positions.shape[0], op=op)
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return turned(read(said), limit, op, positions, keys, lengths)


def tables(said: Parameters, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [n, P] of all places of sequences that are no longer than the turning point nor than `tokens`."""
    return _table(said, 0, _room(tokens - 1), device)


def _room(last: int) -> int:
    """Of a table that holds place `last`: doubled, so that a growing sequence makes few of them."""
    return max(256, 1 << last.bit_length())


@functools.lru_cache(maxsize=16)
def _table(said: Parameters, length: int, room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    f = frequencies(said, length)
    with torch.inference_mode(False), torch.no_grad():
        return tuple(t.to(device) for t in rotary_table(f.inv_freq, torch.arange(room, device="cpu"), f.scaling))  # type: ignore[return-value]
