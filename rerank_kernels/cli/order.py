"""`order`: the order in which an op adds, stock's and ours, at several sizes of the batch."""

from __future__ import annotations

import argparse
import contextlib

from rerank_kernels.cli import interrupt, terminal, writing
from rerank_kernels.cli.errors import InputError, fail_with
from rerank_kernels.cli.options import positive

OPS = ("linear", "bmm", "sum", "mean", "softmax", "layer_norm", "attention")  # order/sums.py's, and --help waits for no torch
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COLUMNS = {"linear": 768}  # of the weight; a bmm of so many takes minutes


def options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("op", metavar="OP", choices=OPS, help=", ".join(OPS))
    sub.add_argument(
        "--rows",
        type=positive,
        nargs="+",
        default=[1, 8],
        metavar="M",
        help="sizes of the batch; of attention, numbers of queries (default: 1 8)",
    )
    sub.add_argument("--row", type=int, default=0, metavar="R", help="the row that is asked, from 0 (default: %(default)s)")
    sub.add_argument(
        "--terms", type=positive, default=768, metavar="K", help="terms of the sum; of attention, keys (default: %(default)s)"
    )
    sub.add_argument(
        "--columns", type=positive, metavar="N", help="of linear's weight (default: 768) and of bmm's b (default: 64)"
    )
    sub.add_argument(
        "--threads", type=positive, nargs="+", metavar="T", help="numbers of threads (default: as many as PyTorch takes)"
    )
    sub.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the operands (default: %(default)s)")
    sub.add_argument("--device", default="cpu", metavar="D", help="cuda for instance (default: %(default)s)")
    sub.add_argument("--full", action="store_true", help="every bracket of each tree, in the place of a few lines")
    sub.add_argument("--json", metavar="FILE", help="write every node to FILE as well")


def run(args: argparse.Namespace) -> int:
    if args.columns and args.op not in ("linear", "bmm"):
        raise InputError(f"--columns {args.columns}: belongs to linear and bmm; {args.op} has none, leave it out")
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(writing.writer(args.json)) if args.json else None
        with interrupt.loading(args.ours):
            import torch

            from rerank_kernels.order.report import order
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(f"order {args.op}: --device {args.device}: {reason}; leave it out for the CPU") from error
        try:
            with terminal.progress("asking", 1.0) as advance:
                report = order(
                    args.op,
                    terms=args.terms,
                    rows=list(dict.fromkeys(args.rows)),
                    row=args.row,
                    threads=list(dict.fromkeys(args.threads)) if args.threads else None,
                    columns=args.columns or COLUMNS.get(args.op, 64),
                    dtype=getattr(torch, DTYPES[args.dtype]),
                    device=args.device,
                    progress=advance,
                )
        except ValueError as error:
            fail_with(error)
        with writing.naming(writing.STDOUT):
            console = terminal.console()
            console.print(report.text(args.full), markup=False, highlight=False, soft_wrap=True)
        if out is not None:
            out.write(writing.document(report.as_dict()))
    return 0 if report.ok else 1
