"""`rank`: documents for one query, best first."""

from __future__ import annotations

import argparse
import unicodedata

from rerank_kernels.cli import models, reading, terminal, writing
from rerank_kernels.cli.errors import InputError, say
from rerank_kernels.cli.options import model_options, positive

SNIPPET = 100
ABOUT = "Rank documents for one query, best first."


def options(sub: argparse.ArgumentParser) -> None:
    model_options(sub)
    sub.add_argument("--query", required=True, metavar="Q")
    sub.add_argument(
        "documents",
        metavar="DOCS",
        help='one document a line; JSON Lines with {"document": ...} if it is named .jsonl, .ndjson or .json; - for stdin',
    )
    sub.add_argument("--jsonl", action="store_true", help="DOCS is JSON Lines whatever its name")
    sub.add_argument("--top-k", type=positive, metavar="K", help="only the first K")
    sub.add_argument("--json", action="store_true", help="JSON Lines instead of a table")


def run(args: argparse.Namespace) -> int:
    if reading.half_surrogate(args.query):
        raise InputError("--query: not valid UTF-8")
    if args.jsonl or args.documents.lower().endswith(reading.JSON_LINES):
        documents = [r["document"] for r in reading.records(args.documents, ("document",))]
    else:
        lines = list(reading.lines(args.documents))
        documents = [line for _, line in lines]
        if lines and reading.looks_like_a_record(documents[0]):
            say(f"warning: {lines[0][0]}: looks like JSON Lines, but is ranked as plain text; give --jsonl")
    ranked = models.reranker(args).rank(args.query, documents, args.top_k)
    if args.json:
        with writing.writer("-") as out:
            for place, r in enumerate(ranked, 1):
                numbers = dict(zip(writing.NUMBERS, writing.shortest(r.logit, r.score, r.complement), strict=True))
                out.write(writing.line({"rank": place, "index": r.index, "document": r.document, **numbers}))
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("rank", "index", "logit", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document", no_wrap=True, overflow="ellipsis")
    for place, r in enumerate(ranked, 1):
        shown = (str(n) for n in writing.shortest(r.logit, r.score))
        # Text: brackets in a document are no markup
        table.add_row(str(place), str(r.index), *shown, Text(_snippet(r.document)))
    with writing.naming(writing.STDOUT):
        terminal.console().print(table)
    return 0


def _snippet(document: str) -> str:
    """The document's beginning on one line, without what would steer the terminal: escapes, bidi overrides, invisible marks."""
    text = " ".join(document.split())[:SNIPPET]
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)
