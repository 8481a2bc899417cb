"""The command line as argparse reads it: a sub-command for each file beside this one that has options and run."""

from __future__ import annotations

import argparse
from types import ModuleType

from rerank_kernels import NUMERICS_VERSION, __version__
from rerank_kernels.cli import bench, infinity_server, info, rank, score, verify

COMMANDS: dict[str, ModuleType] = {
    "score": score,
    "rank": rank,
    "verify": verify,
    "bench": bench,
    "infinity-server": infinity_server,
    "info": info,
}
EXIT_CODES = (
    "Exit codes: 0 done; 1 a promise fell (verify and bench) or cannot be given (infinity-server); 2 bad input, or a machine "
    "or environment that cannot serve; 130 interrupted."
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerank-kernels",
        description="Score and rank with a cross-encoder: the same bits whatever the batch, padding, threads or run.",
        epilog=EXIT_CODES,
    )
    version = f"%(prog)s {__version__}, numerics version {NUMERICS_VERSION}"
    parser.add_argument("--version", action="version", version=version, help="package and numerics version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        more = getattr(command, "MORE", "")
        sub = commands.add_parser(name, help=command.ABOUT, description=command.ABOUT + more, epilog=EXIT_CODES)
        sub.set_defaults(run=command.run)
        command.options(sub)
    return parser
