"""`score`: the pairs of a file, each with its numbers."""

from __future__ import annotations

import argparse

from rerank_kernels.cli import models, reading, terminal, writing
from rerank_kernels.cli.options import model_options, positive

CHUNK = 1024  # pairs between two looks at the progress bar; no bit depends on it
ABOUT = "Score the pairs of a JSON Lines file."


def options(sub: argparse.ArgumentParser) -> None:
    model_options(sub)
    sub.add_argument(
        "pairs",
        metavar="PAIRS",
        help='JSON Lines, {"query": ..., "document": ...} each; other fields are kept, and refused if they have the name of '
        "one that is added (see --prefix); - for stdin",
    )
    sub.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="JSON Lines with logit, score and complement; - for stdout (default)",
    )
    sub.add_argument(
        "--prefix",
        default="",
        metavar="P",
        help="put before the names of the added fields, Plogit, Pscore and Pcomplement (default: nothing)",
    )
    sub.add_argument(
        "--batch-tokens",
        type=positive,
        default=16384,
        metavar="N",
        help="tokens computed at a time: bounds memory (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    names = tuple(args.prefix + name for name in writing.NUMBERS)
    records = list(reading.records(args.pairs, ("query", "document"), names))
    with writing.writer(args.output) as out:  # before the model: an output that cannot be written is known at once
        reranker = models.reranker(args)
        with terminal.progress("scoring", len(records)) as advance:
            for start in range(0, len(records), CHUNK):
                part = records[start : start + CHUNK]
                pairs = [(r["query"], r["document"]) for r in part]
                scores = reranker.score(pairs, progress=False, batch_tokens=args.batch_tokens)
                for record, *numbers in zip(part, *scores, strict=True):
                    out.write(writing.line({**record, **dict(zip(names, writing.shortest(*numbers), strict=True))}))
                advance(start + len(part))
    return 0
