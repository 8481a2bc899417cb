"""Sampling with a seed per sequence: which token a sequence draws depends on its own logits, its seed and its place alone.

PyTorch draws from one generator for a whole batch. Here each token of the vocabulary gets a number that is a function of (seed,
tokens before, token), and the largest of logit + -log(-log(number)) wins: Gumbel's way of drawing with the softmax's
probabilities. The numbers come from integers, and logarithms and exponentials from a fixed sequence of float64 operations. So
the same logits draw the same token on every machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.models.bound import class_of, name_of

Doubles = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

OP = "Sampling"
GOLDEN = 0x9E3779B97F4A7C15  # the step of SplitMix64, which mixes the integers here
LIMIT = 1 << 64


class Sampling:
    """What `model.generate(..., do_sample=True, custom_generate=rk.Sampling(seeds))` draws with.

    seeds: an integer in [0, 2^64) for each sequence. With num_return_sequences=n each prompt has n of them, one behind another.
    streamer: as generate's own, which transformers does not hand on to a custom_generate. Neither does it hand on the tokenizer
    that stop_strings asks for: pass stopping_criteria=[StopStringCriteria(tokenizer, strings)].

    A text is decided by the prompt's tokens, its seed, temperature, top_k, top_p and min_p, and by nothing else of the batch. A
    text that is continued from prompt and tokens goes on as it would have. Logits may hold -inf; NaN and +inf are a ValueError
    that names the sequence. Penalties read a sequence's own tokens: padding is none. Other processors of generate's run as they
    are. Beams, and warpers that are not named here, are refused.
    """

    def __init__(self, seeds: Iterable[int], *, streamer: Any = None) -> None:
        values = seeds.tolist() if isinstance(seeds, Tensor | np.ndarray) else seeds
        if isinstance(values, int) or not isinstance(values, Iterable):
            check.fail(OP, "seeds", "a list of integers, one for each sequence", repr(seeds), f"pass [{seeds}] for one")
        self.seeds = tuple(values)
        for i, seed in enumerate(self.seeds):
            if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < LIMIT:
                check.fail(OP, f"seeds[{i}]", "an integer in [0, 2^64)", repr(seed))
        self.streamer = streamer

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What transformers calls once all is prepared: its own loop, which takes the largest of what is handed to it."""
        if (mode := generation_config.get_generation_mode().value) != "sample":
            check.fail(
                OP, "generate's mode", "sample", mode, "pass do_sample=True, and neither beams nor a lookup of the prompt"
            )
        if len(self.seeds) != input_ids.shape[0]:
            count = f"{input_ids.shape[0]}, one for each sequence that is generated"
            check.fail(OP, "seeds", count, len(self.seeds), "num_return_sequences counts")
        config = copy.copy(generation_config)
        config.do_sample = False
        tokens = _tokens(input_ids, model_kwargs.get("attention_mask"), getattr(config, "_mask_length", None))
        draw = _Draw(self.seeds, tokens, input_ids.shape[1], config.return_dict_in_generate and config.output_scores)
        own = _Own(input_ids, model_kwargs.get("attention_mask"))
        readers = READERS if config.min_new_tokens is not None else READERS | {MIN_LENGTH}  # else it counts the padding in
        served = [own.reading(p) if name_of(p) in readers else _served(p) for p in logits_processor]
        steps = type(logits_processor)([draw.look, *served, draw])
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        out = model._sample(
            input_ids,
            logits_processor=steps,
            stopping_criteria=stopping_criteria,
            generation_config=config,
            streamer=self.streamer,
            **model_kwargs,
        )
        if draw.keeps:
            out.scores = tuple(draw.scores)
        return out


def _tokens(ids: Tensor, mask: Tensor | None, seen: int | None) -> list[int]:
    """The tokens that each sequence has. seen: places of a mask that transformers dropped because all of them are tokens."""
    if mask is not None:
        return [int(n) for n in (mask != 0).sum(1).tolist()]
    return [ids.shape[1] if seen is None else seen] * ids.shape[0]


class _Own:
    """The tokens of each sequence without the padding, for processors that read them; transformers hands on whole rows."""

    def __init__(self, ids: Tensor, mask: Tensor | None) -> None:
        width = ids.shape[1]
        self.before = None if mask is None else mask[:, mask.shape[1] - width :] != 0

    def reading(self, processor: Any) -> Any:
        before = self.before
        if before is None or bool(before.all()) or getattr(processor, "prompt_ignore_length", None) is not None:
            return processor
        if name_of(processor) in OF_THE_PROMPT:
            served = "one that reads no prompt, in a batch with padding"
            hint = "it takes padding for tokens; pass each prompt by itself, or leave that argument of generate out"
            check.fail(OP, "generate's processors", served, class_of(processor), hint)

        def read(ids: Tensor, scores: Tensor) -> Tensor:
            there = torch.cat([before, before.new_ones(len(ids), ids.shape[1] - before.shape[1])], 1)
            rows = zip(ids, there, scores, strict=True)
            return torch.cat([processor(row[keep][None], score[None]) for row, keep, score in rows])

        return read


class _Draw:
    """The last processor: all tokens but the one that is drawn get -inf."""

    def __init__(self, seeds: tuple[int, ...], tokens: list[int], width: int, keeps: bool) -> None:
        self.seeds, self.tokens, self.width, self.keeps = seeds, tokens, width, bool(keeps)
        self.scores: list[Tensor] = []

    def look(self, ids: Tensor, logits: Tensor) -> Tensor:
        """The model's own logits, before a processor can hide what is wrong with them."""
        self._check("logits", ids, _numbers(logits))
        return logits

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.keeps:
            self.scores.append(scores)
        rows, step = _numbers(scores), ids.shape[1] - self.width
        self._check("processed logits", ids, rows)
        drawn = [draw(row, seed, before + step) for row, seed, before in zip(rows, self.seeds, self.tokens, strict=True)]
        out = torch.full_like(scores, -torch.inf)
        out[torch.arange(len(drawn), device=out.device), torch.tensor(drawn, device=out.device)] = 0
        return out

    def _check(self, what: str, ids: Tensor, rows: Singles) -> None:
        most = rows.max(1)  # NaN if there is one
        for i in np.flatnonzero(~np.isfinite(most)):
            came = "NaN" if np.isnan(most[i]) else "+inf" if most[i] > 0 else "-inf for every token"
            check.fail(
                OP, f"the {what} of sequence {i} at new token {ids.shape[1] - self.width}", "finite, or -inf for some", came,
                "look for NaN or inf in the weights and the prompt; bfloat16 does not overflow where float16 does",
            )  # fmt: skip


def draw(scores: Singles, seed: int, before: int) -> int:
    """The token that [V] scores draw for a seed, behind so many tokens."""
    tokens = np.flatnonzero(scores > -np.inf)
    return int(tokens[np.argmax(scores[tokens].astype(np.float64) + noise(seed, before, tokens))])


def noise(seed: int, before: int, tokens: npt.NDArray[np.int64]) -> Doubles:
    """Gumbel's: -log(-log u), u a uniform number of (seed, before, token)."""
    state = _mix(_mix(np.array([(int(seed) + GOLDEN) % LIMIT], np.uint64)) + np.uint64((before + 1) * GOLDEN % LIMIT))
    bits = _mix(state + (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
    u = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact, and neither 0 nor 1
    return -log(-log(u))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function; integers wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- warpers: those of transformers, in an order of their own ---------------------------------------------------------------


def _temperature(w: Any, row: Singles) -> Singles:
    return (row.astype(np.float64) / float(w.temperature)).astype(np.float32)


def _top_k(w: Any, row: Singles) -> Singles:
    k = min(int(w.top_k), row.size)
    return _kept(row, row >= np.partition(row, row.size - k)[row.size - k])


def _top_p(w: Any, row: Singles) -> Singles:
    """The fewest of the likeliest tokens that hold top_p together; of two alike the lower id comes first."""
    order = np.argsort(-row, kind="stable")
    shares = exp(row[order].astype(np.float64) - float(row[order[0]]))
    so_far = np.cumsum(shares)  # one by one, in order
    keep = np.zeros(row.size, np.bool_)
    keep[order] = so_far - shares < float(w.top_p) * so_far[-1]
    keep[order[: w.min_tokens_to_keep]] = True
    return _kept(row, keep)


def _min_p(w: Any, row: Singles) -> Singles:
    keep = exp(row.astype(np.float64) - float(row.max())) >= float(w.min_p)
    keep[np.argsort(-row, kind="stable")[: w.min_tokens_to_keep]] = True
    return _kept(row, keep)


def _kept(row: Singles, keep: npt.NDArray[np.bool_]) -> Singles:
    return np.where(keep, row, np.float32(-np.inf))


PROCESSORS = "transformers.generation.logits_process."
OF_THE_PROMPT = {f"{PROCESSORS}Encoder{name}LogitsProcessor" for name in ("RepetitionPenalty", "NoRepeatNGram")}
READERS = OF_THE_PROMPT | {
    f"{PROCESSORS}{name}LogitsProcessor" for name in ("RepetitionPenalty", "NoRepeatNGram", "SequenceBias", "NoBadWords")
}
MIN_LENGTH = f"{PROCESSORS}MinLengthLogitsProcessor"
WARPERS: dict[str, Callable[[Any, Singles], Singles]] = {
    f"{PROCESSORS}TemperatureLogitsWarper": _temperature,
    f"{PROCESSORS}TopKLogitsWarper": _top_k,
    f"{PROCESSORS}TopPLogitsWarper": _top_p,
    f"{PROCESSORS}MinPLogitsWarper": _min_p,
}


def _served(processor: Any) -> Any:
    """Ours in a warper's place; another processor as it is."""
    name = name_of(processor)
    if name in WARPERS:

        def warp(ids: Tensor, scores: Tensor) -> Tensor:
            # what is not finite is for the last processor to refuse
            rows = [WARPERS[name](processor, row) if np.isfinite(row.max()) else row for row in _numbers(scores)]
            return torch.from_numpy(np.stack(rows)).to(scores.device)

        return warp
    if name.startswith(PROCESSORS) and name.endswith(("LogitsWarper", ".LogitNormalization")):
        served = "temperature, top_k, top_p and min_p"
        hint = "they add up probabilities in an order that is PyTorch's; leave that argument of generate out"
        check.fail(OP, "generate's warpers", served, class_of(processor), hint)
    return processor


def _numbers(scores: Tensor) -> Singles:
    return scores.detach().float().cpu().numpy()


# ---- element functions: +, -, ×, ÷ on float64, each rounded once, so the same on every machine -------------------------------

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10  # the first with zeros at its end
HALF_ROOT = 0.7071067811865476


def log(x: Doubles) -> Doubles:
    """Of finite x > 0: m · 2^e with m near 1, and log m = 2 artanh((m - 1) / (m + 1)) as a series."""
    m, e = np.frexp(x)
    low = m < HALF_ROOT
    m, k = np.where(low, m + m, m), e.astype(np.float64) - low
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    y = np.zeros_like(s)
    for n in range(23, 1, -2):
        y = (y + 1.0 / n) * square
    return k * LN2_HIGH + (k * LN2_LOW + (s + s) * y + (s + s))


def exp(x: Doubles) -> Doubles:
    """Of x <= 0: 2^k · e^r with |r| <= log(2) / 2, and e^r as a series."""
    x = np.maximum(x, -745.0)
    k = np.rint(x * 1.4426950408889634)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    y = np.ones_like(r)
    for n in range(16, 0, -1):
        y = y * r / n + 1.0
    found: Doubles = np.ldexp(y, k.astype(np.int64))
    return np.where(x <= -745.0, 0.0, found)
