"""`infinity-server`: Infinity's server with every model patched."""

from __future__ import annotations

import argparse

from rerank_kernels.cli import terminal
from rerank_kernels.cli.errors import InputError, fail_with, say
from rerank_kernels.cli.options import graph_options

MORE = " A model that cannot be served keeps it from starting, with exit code 1; else the exit code is Infinity's."


def options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--mode", choices=("portable", "tensor"), default="portable", help="as in score (default: %(default)s)")
    sub.add_argument(
        "--backend", metavar="B", help="the one that serves the models, triton for instance (default: the device's)"
    )
    graph_options(sub)
    sub.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="-- ARGUMENTS",
        help="infinity_emb's own command line: -- v2 --model-id MODEL ...",
    )


def run(args: argparse.Namespace) -> int:
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if not arguments:
        raise InputError(
            "infinity-server: Infinity's own command line is missing; give it after --, as in -- v2 --model-id MODEL"
        )
    from rerank_kernels.errors import PatchError
    from rerank_kernels.patching.systems.infinity_server import serve

    terminal.theirs()
    try:
        return serve(arguments, args.mode, args.backend, not args.no_graphs)
    except ImportError as error:  # Infinity, or an extra of it
        fail_with(error)
    except PatchError as error:
        say(str(error))
        return 1
