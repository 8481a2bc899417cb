"""`score`: the records of a file, each with its numbers, in memory that does not grow with the file.

A file is read twice. First all of it is checked, so that a fault in its last line is known before hours of scoring. Then its
records are scored in windows and written in their order. Stdin is read once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rerank_kernels.cli import encoding, formats, interrupt, models, reading, resume, terminal, writing
from rerank_kernels.cli.errors import InputError, say
from rerank_kernels.cli.formats import Format
from rerank_kernels.cli.options import graph_options, model_options, positive, template_options
from rerank_kernels.cli.reading import Source
from rerank_kernels.cli.records import Record
from rerank_kernels.version import __version__

# a window is scored, written and, with --resume, counted as done; no bit depends on it
WINDOW = 256  # records
CHARACTERS = 1 << 18  # of their texts, or one longer record


def options(sub: argparse.ArgumentParser) -> None:
    model_options(sub)
    graph_options(sub)
    template_options(sub)
    sub.add_argument(
        "pairs",
        metavar="PAIRS",
        help='JSON Lines, {"query": ..., "document": ...} each, or what its name says: .json (an array), .csv, .tsv, .parquet, '
        "and .gz of these; other fields are kept as they are, and refused if they have the name of one that is added (see "
        "--prefix); - for stdin",
    )
    sub.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="the records with logit, score and complement, in the format that its name says; - for stdout, in JSON Lines "
        "(default)",
    )
    sub.add_argument(
        "--format", choices=formats.NAMES, metavar="F", help=f"of PAIRS, whatever its name: {', '.join(formats.NAMES)}"
    )
    sub.add_argument("--output-format", choices=formats.NAMES, metavar="F", help="of FILE, whatever its name: as --format")
    sub.add_argument(
        "--resume",
        action="store_true",
        help="keep the work so far in FILE.resume/ and continue from there: after Ctrl-C, a kill or a loss of power the same "
        "command finishes the file, with the bytes of a run that was not interrupted",
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
    source = reading.source(args.pairs, args.format, ("query", "document"), names)
    to = formats.of(args.output, args.output_format, "--output-format")
    if args.output == "-" and (to.gz or to.kind == "parquet") and sys.stdout is not None and sys.stdout.isatty():
        raise InputError(f"{writing.STDOUT}: is a terminal, and {to} is no text; give -o FILE")
    encoder = encoding.encoder(to, names, source, args.output)
    if args.resume:
        _may_resume(args, source, to)
    elif args.output != "-":
        resume.left_over(args.output)
    if to.kind in formats.TABLES:  # their columns are known when all records are
        source.keep()
    count = _survey(source, encoder) if source.twice else None
    if args.resume:
        reranker = models.reranker(args)
        with resume.resumed(args.output, _identity(args, reranker, source.format, to)) as so_far, interrupt.patient():
            if so_far is not None:
                _score(args, reranker, source, encoder, to, so_far, count, so_far.records, so_far.begun)
        return 0
    with writing.writer(args.output) as out:  # before the model: an output that cannot be written is known at once
        _score(args, models.reranker(args), source, encoder, to, out, count)
    return 0


def _survey(source: Source, encoder: encoding.Lines) -> int:
    """How many records there are, all of which can be read and written."""
    count = 0
    for record in source:
        encoder.check(record)
        count += 1
    return count


def _score(
    args: argparse.Namespace,
    reranker: Any,
    source: Source,
    encoder: encoding.Lines,
    to: Format,
    out: writing.Out,
    count: int | None,
    done: int = 0,
    begun: bool = False,
) -> None:
    """All records but the first `done`, from `source` to `out`."""
    seen = strange = 0
    if not begun:
        out.write(encoding.compressed(encoder.begin(), to))
        out.commit(0)
    with terminal.progress("scoring", count) as advance:
        for part in _windows(source):
            interrupt.check()
            if seen < done:  # it was counted when its window was whole
                seen += len(part)
                continue
            if count is None:
                for record in part:
                    encoder.check(record)
            pairs = [(record.query, record.document) for record in part]
            with models.scoring(part):
                scores = reranker.score(pairs, progress=False, batch_tokens=args.batch_tokens)
            strange += sum(not math.isfinite(logit) for logit in scores[0])
            rows = [(record, numbers) for record, *numbers in zip(part, *scores, strict=True)]
            out.write(encoding.compressed(encoder.window(seen, rows), to))
            seen += len(part)
            out.commit(seen)
            advance(seen)
    interrupt.check()
    models.say_not_finite(strange, seen)
    out.write(encoding.compressed(encoder.end(seen), to))
    if not seen:
        say(f"warning: {source.name}: there are no records in it")


def _windows(records: Iterable[Record]) -> Iterator[list[Record]]:
    part: list[Record] = []
    size = 0
    for record in records:
        part.append(record)
        size += len(record.query) + len(record.document)
        if len(part) >= WINDOW or size >= CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _may_resume(args: argparse.Namespace, source: Source, to: Format) -> None:
    if args.output == "-" or not source.twice or source.spool is not None:
        raise InputError("--resume needs files that can be read and written again: give PAIRS and -o FILE, not stdin or stdout")
    if to.kind == "parquet":
        raise InputError(
            f"--resume: {args.output}: a Parquet file is written whole and cannot be resumed; write another format"
        )
    if writing.real(args.output) == writing.real(args.pairs):
        raise InputError(f"--resume: {args.output} is PAIRS itself, which must stay as it is; write another file")


def _identity(args: argparse.Namespace, reranker: Any, source: Format, to: Format) -> dict[str, str]:
    """Whatever the bytes of the output depend on. Where bits are machine-invariant, device and threads are not part of it."""
    import tokenizers
    import torch
    import transformers

    from rerank_kernels.backend import registry
    from rerank_kernels.backend.modes import MODES

    device = next(reranker.model.parameters()).device
    served = registry.active(device)
    promises = served.promises[args.mode]
    gpu = ", sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else ""
    here = f"{served.name}{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return {
        "input": resume.digest(args.pairs),
        "model": resume.digest(args.model),
        "max_length": str(reranker.max_length),
        "dtype": str(next(reranker.model.parameters()).dtype),
        "mode": args.mode,
        "prefix": args.prefix,
        "formats": f"{source} to {to}",
        "numerics version": str(MODES[args.mode].version),
        "arithmetic": "machine-invariant" if "machine-invariant" in promises else here,
        "rerank_kernels": __version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
