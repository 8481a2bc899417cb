"""`rank`: documents for one query, best first."""

from __future__ import annotations

import argparse
import math
import unicodedata

from rerank_kernels.cli import encoding, formats, models, reading, records, terminal, writing
from rerank_kernels.cli.errors import InputError, say
from rerank_kernels.cli.options import graph_options, model_options, positive, template_options
from rerank_kernels.printable import escaped

SNIPPET = 200
ADDED = ("rank", "index", *writing.NUMBERS)


def options(sub: argparse.ArgumentParser) -> None:
    model_options(sub)
    graph_options(sub)
    template_options(sub)
    sub.add_argument("--query", required=True, metavar="Q")
    sub.add_argument(
        "documents",
        metavar="DOCS",
        help='one document per line; {"document": ...} and other fields, which are kept, if its name says so: .jsonl, .ndjson, '
        ".json, .csv, .tsv, .parquet, and .gz of these; - for stdin. The index of a document is its line (or item, or row) "
        "in DOCS, from 0; blank lines count, and are not ranked",
    )
    names = ("text", *formats.NAMES, "text.gz")
    sub.add_argument("--format", choices=names, metavar="F", help=f"of DOCS, whatever its name: {', '.join(names)}")
    sub.add_argument("--jsonl", action="store_const", dest="format", const="jsonl", help="the same as --format jsonl")
    sub.add_argument("--top-k", type=positive, metavar="K", help="only the first K")
    sub.add_argument("--json", action="store_true", help="JSON Lines instead of a table, with all fields of the documents")
    sub.add_argument(
        "--prefix",
        default="",
        metavar="P",
        help="of --json: put before the names of the added fields, Prank, Pindex, Plogit, Pscore and Pcomplement",
    )


def run(args: argparse.Namespace) -> int:
    if records.half_surrogate(args.query):
        raise InputError("--query: not valid UTF-8")
    added = tuple(args.prefix + name for name in ADDED) if args.json else ()
    source = reading.source(args.documents, args.format, ("document",), added, "text")
    found = list(source)
    if args.json:
        encoder = encoding.Lines(added)
        for record in found:
            encoder.check(record)
    if not found:
        say(f"warning: {source.name}: there are no documents in it")
    elif source.format.kind == "text" and reading.looks_like_a_record(found[0].document):
        say(f"warning: {found[0].where}: looks like JSON Lines, but is ranked as plain text; give --format jsonl")
    reranker = models.reranker(args)
    with models.scoring(found):
        ranked = reranker.rank(args.query, [record.document for record in found], args.top_k)
    models.say_not_finite(sum(not math.isfinite(r.logit) for r in ranked), len(ranked))
    if args.json:
        with writing.writer("-") as out:
            for place, r in enumerate(ranked, 1):
                first = zip(added[:2], (str(place), str(found[r.index].index)), strict=True)
                last = zip(added[2:], map(records.number, (r.logit, r.score, r.complement)), strict=True)
                out.write(escaped(records.spliced(found[r.index].fields.json(), first, last)) + "\n")
        return 0
    from rerank_kernels.tables import Column, Table

    ids = any("id" in record.fields.names for record in found)
    table = Table(
        [
            *(Column(name, number=True) for name in ("rank", "index")),
            *([Column("id", named=True)] if ids else []),
            *(Column(name, number=True) for name in ("logit", "score")),
            Column("document", ellipsis=True),
        ]
    )
    for place, r in enumerate(ranked, 1):
        record = found[r.index]
        own = [_one_line(record.fields.cells().get("id", ""))] if ids else []
        table.add_row(str(place), str(record.index), *own, str(r.logit), str(r.score), _one_line(r.document))
    with writing.naming(writing.STDOUT):
        terminal.console().print(table)
    return 0


def _one_line(text: str) -> str:
    """A text's beginning on one line, without what would steer the terminal: escapes, bidi overrides, invisible marks."""
    text = " ".join(text[: 4 * SNIPPET].split())[:SNIPPET]
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)
