"""The command `rerank-kernels`: score, rank, verify, bench, order, info, infinity-server.

Exit codes: 0 done; 1 a promise did not hold (verify, bench, order) or cannot be made (infinity-server, which then does not
start); 2 bad input or an environment that cannot serve; 130 interrupted. Logits that are not finite are null, which a warning
says, and the code is 0. A file is written beside its place and renamed into it when
it is whole: whatever happens, what stood there before is intact.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, sys.argv's if not given; its exit code."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("rerank-kernels: interrupted", file=sys.stderr, flush=True)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    from rerank_kernels.cli import interrupt  # what is imported here is light: an interrupt is caught above

    with interrupt.caught(argv is None):
        from rerank_kernels.cli.errors import message, say
        from rerank_kernels.cli.parser import parser
        from rerank_kernels.cli.terminal import printable_stderr
        from rerank_kernels.cli.writing import STDOUT, drop_stdout, flush_or_drop_stdout, naming
        from rerank_kernels.printable import printable

        with printable_stderr():
            args = parser(sys.argv[1:] if argv is None else argv).parse_args(argv)
            args.ours = argv is None
            given = shlex.join(("rerank-kernels", *(sys.argv[1:] if argv is None else argv)))
            args.command = printable(given)  # for a page to say
            try:
                code = int(args.run(args))
                if sys.stdout is not None:
                    with naming(STDOUT):  # what cannot be written is known now, not when Python has ended
                        sys.stdout.flush()
                return code
            except BrokenPipeError:  # the reader of our output has seen enough
                drop_stdout()
                return 0
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:  # a panic of Rust is no Exception
                interrupt.check()  # somebody made another error of it
                say(message(error))
                flush_or_drop_stdout()
                return 2
