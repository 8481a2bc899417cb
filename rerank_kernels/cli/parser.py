"""The command line as argparse reads it: a sub-command for each file beside this one that has options and run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from rerank_kernels.version import NUMERICS_VERSION, __version__

# What each is for. Its file is loaded when it is asked for, and the others' are not: --help is there at once.
COMMANDS = {
    "score": "Score the pairs of a file.",
    "rank": "Rank documents for one query, best first.",
    "verify": "Check every promise on this machine; exit code 1 if one does not hold.",
    "bench": "Time the model, stock beside patched, and check that the bits hold.",
    "order": "Show in which order an op adds, stock's and ours, at several sizes of the batch.",
    "infinity-server": "Run Infinity's server with every model patched before the first request.",
    "info": "Say what is installed, what can run here, and why the rest cannot.",
}
EXIT_CODES = (
    "Exit codes: 0 done, also where logits are not finite, which a warning counts; 1 a promise did not hold (verify, "
    "bench, order) or cannot be made (infinity-server); 2 bad input, or a machine or environment that cannot serve; 130 "
    "interrupted."
)


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """For this command line: other commands than its own have no options."""
    parser = argparse.ArgumentParser(
        prog="rerank-kernels",
        description="Score and rank with a cross-encoder: the same bits whatever the batch, padding, threads or run.",
        epilog=EXIT_CODES,
    )
    version = f"%(prog)s {__version__}, numerics version {NUMERICS_VERSION}"
    parser.add_argument("--version", action="version", version=version, help="package and numerics version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = importlib.import_module(f"rerank_kernels.cli.{name.replace('-', '_')}") if name in argv else None
        more = getattr(command, "MORE", "")
        sub = commands.add_parser(name, help=about, description=about + more, epilog=EXIT_CODES)
        if command is not None:
            sub.set_defaults(run=command.run)
            command.options(sub)
    return parser
