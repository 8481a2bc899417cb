"""What is called: the rows of tokens, the checks and their calls, and the tensors of a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Tokens = dict[str, list[int]]  # what the tokenizer gave for one text or pair: input_ids, perhaps token_type_ids
Inputs = dict[str, Tensor]
Runner = Callable[[Inputs], Tensor]  # float32 [B, L]

HOME = 8  # the batch size of every check that is not about batch sizes
BATCHES = (2, 3, 7, 8, 16, 31, 64)  # 1 is the reference
THREADS = (2, 3, 4)
# What else in a process decides which kernels PyTorch and its math library (MKL) take, where ours leave them something to do.
SETTINGS = ("MKL_CBWR=COMPATIBLE", "MKL_CBWR=AVX2", "ATEN_CPU_CAPABILITY=default", "OMP_NUM_THREADS=2")
FINAL = (
    "final"  # the route to all that a user reads of a row in the end: logit, score, complement; embedding, cosine, complement
)
COSINES = 2  # numbers behind the embedding in it
# Routes of a language head: through a cache at the end, in chunks of so many places, and what generate() writes.
CACHED = ("cache:dynamic", "cache:static")
CHUNKED = ("chunks:1", "chunks:7", "chunks:64")
GREEDY, UNCACHED = "generate", "generate:uncached"
STEPS = 4
NEW = 8
MIXED = -1  # a `fill`: padded places hold a different token each


@dataclass(frozen=True)
class Call:
    """One forward pass: which rows, in which order, padded and laid out how."""

    rows: tuple[int, ...]
    length: int | None = None  # padded length; None: the longest row
    side: str = ""  # "left", "right", or that on which such a model is padded
    fill: int | None = None  # token in the padded places; None: the tokenizer's pad token
    layout: str = "plain"
    threads: int = 1
    turn: int = 0  # the same call again is another call
    route: str = "model"  # or one that is not one model(**inputs): "packed", "process", "isa:...", FINAL, those of language.py
    setting: str = ""  # one of SETTINGS, in a process of its own


Scoring = tuple[Call, ...]
Route = Callable[[Call], Floats]


@dataclass(frozen=True)
class Check:
    """Calls, and what each row of theirs is compared with: the same without the one thing that the check varies.

    against: "alone" (the row by itself), "home" (its own batch of HOME, at its own place), or the field of Call that is put
    back to its default. Together they lead every row back to itself alone; apart they show stock what each thing does.
    """

    promise: str
    name: str
    varied: str  # in words
    against: str
    scorings: tuple[Scoring, ...]
    route: str = "model"  # of the row by itself

    def base(self, call: Call, place: int) -> tuple[Call, int]:
        """The call to compare with, and the place of the row in it."""
        row = call.rows[place]
        if self.against == "alone":
            return Call((row,), route=self.route), 0
        if self.against == "home":
            return Call(home(row)), row % HOME
        plain: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Call) if f.name == self.against}
        return dataclasses.replace(call, **plain), place

    def varies(self, call: Call) -> bool:
        return any(self.base(call, place)[0] != call for place in range(len(call.rows)))

    def calls(self) -> set[Call]:
        """All that must be computed."""
        own = {call for scoring in self.scorings for call in scoring}
        return own | {self.base(call, place)[0] for call in own for place in range(len(call.rows))}


def home(row: int) -> tuple[int, ...]:
    start = row // HOME * HOME
    return tuple(range(start, start + HOME))


@dataclass(frozen=True)
class Texts:
    """The rows to score, all different and a multiple of HOME, and whose documents are ordered against each other."""

    tokens: tuple[Tokens, ...]
    pairs: tuple[tuple[str, str], ...]  # the texts of the rows; an embedding model's row is (text, "")
    groups: tuple[tuple[int | None, tuple[int, ...]], ...]  # (row of the query if it has one, rows of its documents)
    pad: int
    pad_type: int
    special: tuple[int, ...]  # tokens that a padded place may hold by mistake: eos, cls, ...
    vocabulary: int
    cut: int  # rows were truncated to so many tokens
    room: int  # the model takes so many
    side: str = "right"  # where such a model is padded
    writes: bool = False  # a row's result is the next token's logits
    answers: tuple[int, int | None] | None = None  # the tokens whose log-odds are a pair's logit

    @property
    def other_side(self) -> str:
        return "left" if self.side == "right" else "right"

    def length(self, row: int) -> int:
        return len(self.tokens[row]["input_ids"])

    def longest(self, rows: Sequence[int]) -> int:
        return max(map(self.length, rows))

    def cost(self, call: Call) -> int:
        return len(call.rows) * (call.length or self.longest(call.rows))


def all_checks(texts: Texts, *, routes: Sequence[str] = (), few: int = 24) -> list[Check]:
    """Every check. `few` rows, a multiple of HOME, serve the checks that need no batch of 64."""
    every = tuple(range(len(texts.tokens)))
    few = max(HOME, min(few, len(every)) // HOME * HOME)
    homes = [every[i : i + HOME] for i in range(0, few, HOME)]
    alone: list[tuple[int, ...]] = [(row,) for row in every[:few]]

    def cycled(size: int) -> Scoring:
        # every batch has exactly `size` rows: the last one goes on with the first rows
        return tuple(Call(tuple(every[(s + i) % len(every)] for i in range(size))) for s in range(0, len(every), size))

    def scoring(batches: Sequence[tuple[int, ...]], **how: Any) -> Scoring:
        return tuple(Call(b, **how) for b in batches)

    def padded(batches: Sequence[tuple[int, ...]], multiple: int, **how: Any) -> Scoring:
        calls = []
        for b in batches:
            longest = texts.longest(b)
            n = min((longest // multiple + 1) * multiple, texts.room)
            if min(map(texts.length, b)) < n:
                calls.append(Call(b, n if n > longest else None, **how))
        return tuple(calls)

    random = np.random.default_rng(7)
    turned = [[h[n:] + h[:n] for h in homes[:2]] for n in range(1, HOME)]  # every row comes to stand in every place
    mixed = [tuple(int(r) for r in random.permutation(h)) for h in homes]
    backwards = [h[::-1] for h in homes]
    # a row keeps its place, its companions come from the other batches
    crossed = [
        [tuple(homes[(k + place * step) % len(homes)][place] for place in range(HOME)) for k in range(len(homes))]
        for step in (1, 2)
        if step % len(homes)
    ]
    by_length = sorted(every[:few], key=texts.length)
    among: list[tuple[int, ...]] = []
    for row, other in [(r, by_length[-1]) for r in by_length[:3]] + [(r, by_length[0]) for r in by_length[-3:]]:
        batch = [other] * HOME
        batch[row % HOME] = row
        among.append(tuple(batch))
    values = (*texts.special, texts.vocabulary // 2, MIXED)
    layouts = ("transposed", "strided", "offset", "int32", "bool mask")
    no_mask = scoring(alone[:HOME], layout="no mask")
    routed = {r: scoring(homes, route=r) for r in routes}

    checks = [
        Check(
            "repeatable",
            "repeat",
            "the same call again",
            "turn",
            tuple(scoring(homes + alone[:HOME], turn=n) for n in (1, 2)),
        ),
        Check(
            "repeatable",
            "layout",
            "transposed, strided, unaligned, int32, bool, no mask",
            "layout",
            (*(scoring(homes[:2], layout=name) for name in layouts), no_mask),
        ),
        Check("batch-invariant", "batch", "size " + ", ".join(map(str, BATCHES)), "alone", tuple(map(cycled, BATCHES))),
        Check(
            "batch-invariant",
            "position",
            "every place, shuffled, backwards",
            "home",
            tuple(map(scoring, (*turned, mixed, backwards))),
        ),
        Check(
            "batch-invariant",
            "neighbours",
            "others, much longer, much shorter",
            "home",
            tuple(map(scoring, (*crossed, among))),
        ),
        Check(
            "padding-invariant",
            "padding length",
            f"one more, to a multiple of 8, of 64, to {texts.room}",
            "length",
            (
                *(padded(alone, 8), padded(alone, 64), padded(homes, 1), padded(homes, 64)),
                padded([*alone[:3], homes[0]], texts.room),
            ),
        ),
        Check(
            "padding-invariant",
            "padding side",
            texts.other_side,
            "side",
            (padded(homes, 1, side=texts.other_side), padded(alone[:HOME], 8, side=texts.other_side)),
        ),
        Check(
            "padding-invariant",
            "padding value",
            "special, other, mixed tokens; both sides",
            "fill",
            tuple(padded(homes[:2], 1, fill=v, side=s) for v in values for s in ("", texts.other_side)),
        ),
    ]
    if "process" in routed:
        checks.insert(1, Check("repeatable", "process", "a fresh one", "route", (routed["process"],)))
    if "packed" in routed:
        packed = tuple((Call(every, turn=n, route="packed"),) for n in range(2))
        alone_there = "packed" if texts.answers else "model"  # log-odds have no rounded logits between
        checks.append(Check("padding-invariant", "packed", "Reranker: no padding at all", "alone", packed, alone_there))
    if CACHED[0] in routed:
        varied = f"dynamic and static; the last {STEPS} tokens one by one"
        through = [Check("batch-invariant", "cache", varied, "route", tuple(routed[r] for r in CACHED))]
        chunks = tuple(scoring([*homes[:2], *alone[:HOME]], route=r) for r in CHUNKED)
        sizes = ", ".join(r.partition(":")[2] for r in CHUNKED)
        through.append(Check("batch-invariant", "chunks", f"of {sizes} tokens through a cache", "route", chunks))
        texts_of = (scoring(homes, route=GREEDY), scoring(homes[:1], route=UNCACHED))
        varied = f"{NEW} tokens more: in a batch, without a cache"
        through.append(Check("batch-invariant", "generate", varied, "alone", texts_of, GREEDY))
        behind = [c.name for c in checks].index("neighbours") + 1
        checks[behind:behind] = through
    threads = tuple(scoring([*homes[:2], *alone[:HOME]], threads=n) for n in THREADS)
    checks.append(Check("thread-invariant", "threads", ", ".join(map(str, THREADS)), "threads", threads))
    if isas := [r for r in routed if r.startswith("isa:")]:
        names = ", ".join(r[4:] for r in isas)
        checks.append(Check("machine-invariant", "instructions", names, "route", tuple(routed[r][:1] for r in isas)))
    if FINAL in routed:
        settled = tuple((Call(every[:few], route=FINAL, setting=s),) for s in SETTINGS)
        checks.append(Check("machine-invariant", "math library", ", ".join(SETTINGS), "setting", settled))
    # where rows are as long as the model takes, a call may vary nothing
    return [dataclasses.replace(c, scorings=tuple(tuple(k for k in s if c.varies(k)) for s in c.scorings)) for c in checks]


def build(texts: Texts, call: Call, device: torch.device | str = "cpu") -> Inputs:
    """The tensors of one call, padded by hand: no tokenizer pads with other tokens or hands out strided views."""
    width = call.length or texts.longest(call.rows)
    fill = texts.pad if call.fill is None else call.fill
    batch = len(call.rows)
    if fill == MIXED:
        ids = (torch.arange(batch * width) * 31 + 11).remainder(texts.vocabulary).view(batch, width)
        ids[ids == texts.pad] = (texts.pad + 1) % texts.vocabulary
    else:
        ids = torch.full((batch, width), fill)
    out = {"input_ids": ids, "attention_mask": torch.zeros(batch, width, dtype=torch.int64)}
    if "token_type_ids" in texts.tokens[0]:
        out["token_type_ids"] = torch.full((batch, width), texts.pad_type)
    for i, row in enumerate(call.rows):
        n = texts.length(row)
        places = slice(width - n, width) if (call.side or texts.side) == "left" else slice(0, n)
        out["attention_mask"][i, places] = 1
        for name, values in texts.tokens[row].items():
            out[name][i, places] = torch.tensor(values)
    if call.layout == "bool mask":
        out["attention_mask"] = out["attention_mask"].bool()
    elif call.layout == "no mask":
        del out["attention_mask"]
    return {name: _laid_out(t.to(device), call.layout) for name, t in out.items()}


def _laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values at other addresses, or in another type."""
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "strided":
        wide = t.new_ones(t.shape[0], 2 * t.shape[1])
        wide[:, ::2] = t
        return wide[:, ::2]
    if layout == "offset":
        return torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape)
    return t.int() if layout == "int32" else t
