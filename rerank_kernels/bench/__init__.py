"""`rerank-kernels bench`: a user's own model, stock beside patched, on their pairs and device, and whether the bits hold.

Three ways of running the same texts: in batches as they come, padded; sorted by length, in batches; one by one. A language head
reads texts so, for the next token, and writes some more tokens of each in two ways. Stock and patched take turns, round after
round, so that a busy machine hits both alike. Tokenising is outside the clock; where the device is a GPU, every call is waited
for.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from rerank_kernels.models.registry import max_tokens, typed
from rerank_kernels.models.sentence import stock_pooling
from rerank_kernels.ops.pooling import pool
from rerank_kernels.patching.walk import patch, unpatch
from rerank_kernels.scoring.language import next_logits, prompts_of, writes, written
from rerank_kernels.scoring.templates import Template
from rerank_kernels.scoring.tokenising import Ids, tokenise
from rerank_kernels.tables import Column, Table

WAYS = ("batches as they come", "batches sorted by length", "one by one")
NEW = 16  # tokens that a language head writes
WRITING = (f"{NEW} tokens more, in batches", f"{NEW} tokens more, one by one")
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
Inputs = dict[str, Tensor]
Batches = list[tuple[list[int], Inputs]]  # which rows, and the model's arguments


@dataclass
class Timed:
    """One way of one model: seconds of every round and of every call, and the rows' results as they came."""

    rounds: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    results: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class BenchReport:
    """times[way][who], who "stock" or "patched"; `differ` counts rows whose bits are not those of the row alone."""

    rows: int
    tokens: int
    facts: dict[str, str]
    times: dict[str, dict[str, Timed]]

    def differ(self, way: str, who: str) -> int:
        alone, here = (self.times[w][who].results for w in (WRITING[-1] if way in WRITING else WAYS[-1], way))
        same = (alone.view(torch.int32) == here.view(torch.int32)) | (alone.isnan() & here.isnan())
        return int((~same).any(1).sum())

    def ratio(self, way: str) -> float:
        """Median over the rounds of stock / patched."""
        stock, patched = (self.times[way][who].rounds for who in ("stock", "patched"))
        return statistics.median(s / p for s, p in zip(stock, patched, strict=True))

    def fastest_way(self, who: str) -> str:
        return min(WAYS, key=lambda way: statistics.median(self.times[way][who].rounds))

    def fastest(self) -> float:
        """Median time of stock's fastest way / that of patched's fastest."""
        stock, patched = (statistics.median(self.times[self.fastest_way(w)][w].rounds) for w in ("stock", "patched"))
        return stock / patched

    @property
    def ok(self) -> bool:
        return not any(self.differ(way, "patched") for way in self.times)

    def as_dict(self) -> dict[str, Any]:
        ways = {
            way: {"ratio": self.ratio(way)}
            | {
                who: {
                    "per_second": self.rows / statistics.median(timed.rounds),
                    "p50_ms": statistics.median(timed.calls) * 1e3,
                    "rows_with_other_bits": self.differ(way, who),
                    "rounds_s": timed.rounds,
                }
                for who, timed in of.items()
            }
            for way, of in self.times.items()
        }
        return {"texts": self.rows, "tokens": self.tokens, "ok": self.ok, **self.facts, "ways": ways}

    def print(self, console: Console) -> None:
        """One line per way; p50: of a call, that is of a batch, or of one text alone."""
        about = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        names = ("stock /s", "patched /s", "stock / patched", "p50 ms", "p50 ms, patched", "other bits", "patched")
        table = Table(
            [Column("how"), *(Column(name, number=True) for name in names)],
            title=f"{self.rows} texts, {self.tokens} tokens: {about}",
        )
        for way, of in self.as_dict()["ways"].items():
            stock, patched = of["stock"], of["patched"]
            speeds = [f"{w['per_second']:.4g}" for w in (stock, patched)]
            latencies = [f"{w['p50_ms']:.3g}" for w in (stock, patched)]
            bits = [f"{w['rows_with_other_bits']}" for w in (stock, patched)]
            table.add_row(way, *speeds, f"{of['ratio']:.2f}", *latencies, *bits)
        console.print(table)
        best, ours = (self.fastest_way(who) for who in ("stock", "patched"))
        console.print(f"stock's fastest ({best}) / patched's fastest ({ours}): {self.fastest():.2f}", highlight=False)
        said = "the same bits in every way" if self.ok else "BITS DIFFER: a promise of the patched model is broken"
        console.print(f"patched: {said}", highlight=False)


def bench(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    pooling: str = "mean",
    mode: str = "portable",
    template: str | Template | None = None,
    instruction: str | None = None,
    seconds: float = 20.0,
    progress: Callable[[float], None] = lambda share: None,
) -> BenchReport:
    """Time `model`, which is not patched and stays as it is, beside a patched twin that shares its weights.

    pairs: (query, document) each. An embedding model, which takes one text, gets the documents. A language head gets pairs in
    the template of a reranker, or the documents where its model type has none (template, instruction: as in Reranker).
    seconds: about how long the rounds last, three of them at least. PatchError if the model cannot be served, ValueError if
    there is nothing to time.
    """
    if not pairs:
        raise ValueError("bench: there are no pairs")
    device = next(model.parameters()).device
    scores = type(model).__name__.endswith("ForSequenceClassification")
    twins = {"stock": model, "patched": _patched_twin(model, mode)}
    cut = max_length or min(max_tokens(twins["patched"]), tokenizer.model_max_length) - NEW * writes(model)
    documents = [document for _, document in pairs]
    first, second = ([query for query, _ in pairs], documents) if scores else (documents, None)
    prompts = prompts_of("bench", model, tokenizer, template, instruction, (max_length, cut, cut))
    ids: list[Ids]
    types: list[Ids] | None
    if prompts is not None:
        ids, types = [np.asarray(prompts.ids(*pair), np.int32) for pair in pairs], None
    else:
        ids, types = tokenise(tokenizer, first, second, cut, typed(model))
    rows = [len(one) for one in ids]

    def batches(order: Sequence[int], size: int) -> Batches:
        made: Batches = []
        for start in range(0, len(order), size):
            some = list(order[start : start + size])
            if writes(model):
                made.append((some, {n: t.to(device) for n, t in _left([ids[i] for i in some], tokenizer).items()}))
                continue
            columns = {"input_ids": ids} | ({} if types is None else {"token_type_ids": types})
            found = tokenizer.pad({n: [of[i].tolist() for i in some] for n, of in columns.items()}, return_tensors="pt")
            made.append((some, {n: t.to(device) for n, t in found.items()}))
        return made

    as_they_come = range(len(rows))
    by_length = sorted(as_they_come, key=lambda i: -rows[i])
    each = (batches(as_they_come, batch_size), batches(by_length, batch_size), batches(as_they_come, 1))
    ways = dict(zip(WAYS, each, strict=True))
    if writes(model):
        ways |= zip(WRITING, (each[0], each[2]), strict=True)
    times = {way: {who: Timed() for who in twins} for way in ways}
    # A first round compiles and lays weights out. On a GPU another one captures graphs: the first call of a model does not.
    for _ in range(2 if device.type == "cuda" else 1):
        started = time.perf_counter()
        for way, of in ways.items():
            for who, twin in twins.items():
                times[way][who].results = _round(twin, of, pooling, Timed(), who == "patched", way in WRITING)
    count = max(LEAST_ROUNDS, min(MOST_ROUNDS, round(seconds / (time.perf_counter() - started))))
    for number in range(count):
        progress((number + 1) / (count + 1))
        for way, of in ways.items():
            for who, twin in twins.items():
                _round(twin, of, pooling, times[way][who], who == "patched", way in WRITING)
    facts = {
        "model": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype)[6:],
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads",
        "mode": mode,
        "batches": f"of {batch_size}",
    }
    return BenchReport(len(rows), sum(rows), facts, times)


def _patched_twin(model: nn.Module, mode: str) -> nn.Module:
    """Modules of its own, and the same weight tensors."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    unpatch(twin)
    patch(twin, mode=mode)
    return twin


def _left(rows: Sequence[Ids], tokenizer: Any) -> Inputs:
    """As prompts are padded."""
    width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = torch.from_numpy(row).long(), 1
    return {"input_ids": ids, "attention_mask": mask}


def _round(model: nn.Module, batches: Batches, pooling: str, timed: Timed, ours: bool, more: bool) -> Tensor:
    """Every batch once; the results, row by row in their first order."""
    outputs: dict[int, Tensor] = {}
    whole = 0.0
    with torch.inference_mode():
        for rows, inputs in batches:
            start = time.perf_counter()
            result = written(model, inputs, NEW) if more else _result(model, inputs, pooling, ours)
            if result.device.type == "cuda":
                torch.cuda.synchronize(result.device)
            timed.calls.append(time.perf_counter() - start)
            whole += timed.calls[-1]
            outputs |= dict(zip(rows, result.float().cpu(), strict=True))
    timed.rounds.append(whole)
    return torch.stack([outputs[row] for row in sorted(outputs)])


def _result(model: nn.Module, inputs: Inputs, pooling: str, ours: bool) -> Tensor:
    """The logits, or the vectors pooled as a user of that system pools them."""
    if writes(model):
        return next_logits(model, inputs)
    out = model(**inputs)
    if hasattr(out, "logits"):
        return out.logits
    hidden: Tensor = out.last_hidden_state
    if ours:
        return pool(hidden, pooling, mask=inputs["attention_mask"], out_dtype=torch.float32)
    return stock_pooling(hidden, inputs["attention_mask"], pooling)
