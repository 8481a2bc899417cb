"""`bench`: a user's own model, stock beside patched."""

from __future__ import annotations

import argparse
import contextlib
from datetime import datetime

from rerank_kernels.cli import interrupt, models, reading, terminal, writing
from rerank_kernels.cli.errors import InputError, fail_with
from rerank_kernels.cli.options import MODELS, model_options, positive, template_options
from rerank_kernels.printable import printable


def options(sub: argparse.ArgumentParser) -> None:
    model_options(sub, MODELS)
    template_options(sub)
    sub.add_argument(
        "--pairs", metavar="FILE", help="a file of your own pairs, as score reads it (default: docstrings of Python's library)"
    )
    sub.add_argument("--limit", type=positive, default=64, metavar="N", help="use the first N pairs (default: %(default)s)")
    sub.add_argument("--batch-size", type=positive, default=32, metavar="N", help="texts in a batch (default: %(default)s)")
    sub.add_argument(
        "--seconds",
        type=positive,
        default=20,
        metavar="S",
        help="about how long it takes, three rounds at least (default: %(default)s)",
    )
    sub.add_argument("--json", metavar="FILE", help="write every time to FILE as well")
    sub.add_argument("--html", metavar="FILE", help="write it to FILE as a page for others to read")


def run(args: argparse.Namespace) -> int:
    pairs = None
    if args.pairs is not None:
        pairs = reading.pairs(args.pairs)
    if args.html and args.html == args.json:
        raise InputError(f"--html {args.html}: is where --json goes; give it a file of its own")
    with contextlib.ExitStack() as stack:
        out, page = (stack.enter_context(writing.writer(f)) if f else None for f in (args.json, args.html))
        with interrupt.loading(args.ours):
            from rerank_kernels.bench import bench
            from rerank_kernels.errors import PatchError
            from rerank_kernels.verify import Setting, environment
            from rerank_kernels.verify.models import default_pairs
        try:
            loaded = models.loaded(args)
            with terminal.progress("timing", 1.0) as advance:
                report = bench(
                    loaded.model,
                    loaded.tokenizer,
                    (default_pairs() if pairs is None else pairs)[: args.limit],
                    batch_size=args.batch_size,
                    max_length=args.max_length,
                    pooling=loaded.pooling,
                    mode=args.mode,
                    template=args.template,
                    instruction=args.instruction,
                    seconds=args.seconds,
                    progress=advance,
                )
        except (ValueError, PatchError) as error:
            fail_with(error)
        with writing.naming(writing.STDOUT):
            report.print(terminal.console())
        if out is not None:
            out.write(writing.document(report.as_dict()))
        if page is not None:
            from rerank_kernels.page import bench_page

            about, when = environment(Setting.of(loaded.model, args.mode, None)), datetime.now().astimezone()
            page.write(bench_page(report, environment=about, model=printable(args.model), command=args.command, when=when))
    return 0 if report.ok else 1
