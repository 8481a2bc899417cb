"""`verify`: is every promise true for this model, here?"""

from __future__ import annotations

import argparse
import contextlib
import sys
from datetime import datetime

from rerank_kernels.cli import interrupt, models, reading, terminal, writing
from rerank_kernels.cli.errors import InputError, fail_with
from rerank_kernels.cli.options import MODELS, model_options, positive, template_options
from rerank_kernels.printable import printable

MORE = " It needs at least 8 different texts, to put in one batch."  # verify.HOME; --help does not wait for an import


def options(sub: argparse.ArgumentParser) -> None:
    model_options(sub, MODELS)
    template_options(sub)
    sub.add_argument("--stock", action="store_true", help="measure the model without rerank_kernels")
    sub.add_argument(
        "--pairs",
        metavar="FILE",
        help="a file of your own pairs, as score reads it, 8 or more (default: docstrings of Python's library)",
    )
    sub.add_argument(
        "--limit",
        type=positive,
        default=64,
        metavar="N",
        help="use the first N different texts, at least 8 (default: %(default)s)",
    )
    sub.add_argument("--json", metavar="FILE", help="write everything measured to FILE as well")
    sub.add_argument(
        "--html",
        metavar="FILE",
        help="write it to FILE as a page for others to read; measures the model without rerank_kernels too, to show it beside, "
        "which takes about as long again",
    )
    sub.add_argument(
        "--no-process", action="store_true", help="leave out the checks in fresh processes, which load the model again"
    )


def run(args: argparse.Namespace) -> int:
    pairs = None
    if args.pairs is not None:
        pairs = reading.pairs(args.pairs)
    if args.html and args.html == args.json:
        raise InputError(f"--html {args.html}: is where --json goes; give it a file of its own")
    with contextlib.ExitStack() as stack:
        out, page = (stack.enter_context(writing.writer(f)) if f else None for f in (args.json, args.html))
        with interrupt.loading(args.ours):
            from rerank_kernels.errors import PatchError
            from rerank_kernels.verify import verify
        try:
            loaded = models.loaded(args)
            which = [True] if args.stock else [False, True] if args.html else [False]
            with terminal.progress("verifying", 1.0) as advance:
                reports = [
                    verify(
                        loaded.model,
                        loaded.tokenizer,
                        pairs,
                        stock=stock,
                        max_length=args.max_length,
                        limit=args.limit,
                        pooling=loaded.pooling,
                        source=None if args.no_process else args.model,
                        trust_remote_code=args.trust_remote_code,
                        mode=args.mode,
                        template=args.template,
                        instruction=args.instruction,
                        progress=lambda share, before=before: advance((before + share) / len(which)),  # type: ignore[misc]
                    )
                    for before, stock in enumerate(which)
                ]
            for one in reports if loaded.note else ():
                one.environment["shape"] = loaded.note
            report, beside = reports[0], reports[1] if reports[1:] else None
        except (ValueError, PatchError) as error:
            fail_with(error)
        try:
            with writing.naming(writing.STDOUT):
                report.print(terminal.console())
                sys.stdout.flush()
        except BrokenPipeError:  # whoever stops reading does not change the verdict
            writing.drop_stdout()
        if out is not None:
            found = report.as_dict() | ({} if beside is None else {"stock": beside.as_dict()})
            out.write(writing.document(found))
        if page is not None:
            from rerank_kernels.page import verify_page

            when = datetime.now().astimezone()
            page.write(verify_page(report, beside, model=printable(args.model), command=args.command, when=when))
    return 0 if report.ok else 1
