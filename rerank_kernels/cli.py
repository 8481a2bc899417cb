"""The command `rerank-kernels`: score, rank, verify, bench, info, infinity-server.

Exit codes: 0 done, 1 a promise fell (verify and bench) or cannot be given (infinity-server, which then does not start), 2 bad
input or an environment that cannot serve, 130 interrupted. A file is written beside its place and renamed into it when it is
whole: whatever happens, what stood there before is intact.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import stat
import sys
import tempfile
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from rerank_kernels import NUMERICS_VERSION, __version__

CHUNK = 1024  # pairs between two looks at the progress bar; no bit depends on it
SNIPPET = 100
NUMBERS = ("logit", "score", "complement")
JSON_LINES = (".jsonl", ".ndjson", ".json")
STDOUT = "<stdout>"
NEEDS = " It needs at least 8 different texts, to put in one batch."  # verify.HOME; --help does not wait for an import
EXIT_CODES = (
    "Exit codes: 0 done; 1 a promise fell (verify and bench) or cannot be given (infinity-server); 2 bad input, or a machine "
    "or environment that cannot serve; 130 interrupted."
)


class InputError(Exception):
    """What the user gave is at fault; the message is all they need to see."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        with _terminated_as_interrupted():
            code = int(args.run(args))
            if sys.stdout is not None:
                with _naming(STDOUT):  # what cannot be written is known now, not when Python has ended
                    sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        _drop_stdout()
        return 0
    except Exception as error:
        _say(_message(error))
        _flush_or_drop_stdout()
        return 2


def _message(error: Exception) -> str:
    """One line if the user can act on it. All else is our fault: its traceback goes first, and 1 stays a fallen promise."""
    from rerank_kernels.backend import BackendError

    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, InputError | BackendError | OSError):
        return str(error)
    with contextlib.suppress(OSError):
        traceback.print_exception(error)
    return f"unexpected {type(error).__name__}: {error}"


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # where stderr cannot be written the exit code has to do
        print("rerank-kernels:", " ".join(message.splitlines()), file=sys.stderr, flush=True)


def _flush_or_drop_stdout() -> None:
    """Python flushes stdout when it ends, and turns the exit code into 120 if that fails."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_stdout()


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rerank-kernels",
        description="Score and rank with a cross-encoder: the same bits whatever the batch, padding, threads or run.",
        epilog=EXIT_CODES,
    )
    version = f"%(prog)s {__version__}, numerics version {NUMERICS_VERSION}"
    parser.add_argument("--version", action="version", version=version, help="package and numerics version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about + more, epilog=EXIT_CODES)
        sub.set_defaults(run=run)
        return sub

    def model_options(sub: argparse.ArgumentParser, what: str = "a local model folder, as save_pretrained writes it") -> None:
        sub.add_argument("model", metavar="MODEL", help=what)
        sub.add_argument(
            "--max-length", type=_positive, metavar="N", help="tokens a text is cut to (default: what the model takes)"
        )
        sub.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="type of the weights (default: as stored)")
        sub.add_argument("--device", metavar="D", help="where the model goes, cuda for instance (default: cpu)")
        sub.add_argument(
            "--mode",
            choices=("portable", "tensor"),
            default="portable",
            help="portable: the same bits on every CPU and GPU (default); tensor: a GPU's tensor cores, the same bits on one "
            "GPU architecture, for fp16 and bf16",
        )

    score = command("score", _score, "Score the pairs of a JSON Lines file.")
    model_options(score)
    score.add_argument(
        "pairs",
        metavar="PAIRS",
        help='JSON Lines, {"query": ..., "document": ...} each; other fields are kept, and refused if they have the name of '
        "one that is added (see --prefix); - for stdin",
    )
    score.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="JSON Lines with logit, score and complement; - for stdout (default)",
    )
    score.add_argument(
        "--prefix",
        default="",
        metavar="P",
        help="put before the names of the added fields, Plogit, Pscore and Pcomplement (default: nothing)",
    )
    score.add_argument(
        "--batch-tokens",
        type=_positive,
        default=16384,
        metavar="N",
        help="tokens computed at a time: bounds memory (default: %(default)s)",
    )

    rank = command("rank", _rank, "Rank documents for one query, best first.")
    model_options(rank)
    rank.add_argument("--query", required=True, metavar="Q")
    rank.add_argument(
        "documents",
        metavar="DOCS",
        help='one document a line; JSON Lines with {"document": ...} if it is named .jsonl, .ndjson or .json; - for stdin',
    )
    rank.add_argument("--jsonl", action="store_true", help="DOCS is JSON Lines whatever its name")
    rank.add_argument("--top-k", type=_positive, metavar="K", help="only the first K")
    rank.add_argument("--json", action="store_true", help="JSON Lines instead of a table")

    verify = command("verify", _verify, "Check every promise on this machine; exit code 1 if one falls.", NEEDS)
    model_options(verify, "a local model folder, or shape:bge-reranker-base (random weights)")
    verify.add_argument("--stock", action="store_true", help="measure the model without rerank_kernels")
    verify.add_argument(
        "--pairs", metavar="FILE", help="JSON Lines of your own pairs, 8 or more (default: docstrings of Python's library)"
    )
    verify.add_argument(
        "--limit",
        type=_positive,
        default=64,
        metavar="N",
        help="use the first N different texts, at least 8 (default: %(default)s)",
    )
    verify.add_argument("--json", metavar="FILE", help="write everything measured to FILE as well")
    verify.add_argument(
        "--no-process", action="store_true", help="leave out the check in a fresh process, which loads the model again"
    )

    bench = command("bench", _bench, "Time the model, stock beside patched, and check that the bits hold.")
    model_options(bench, "a local model folder, or shape:bge-reranker-base (random weights)")
    bench.add_argument("--pairs", metavar="FILE", help="JSON Lines of your own pairs (default: docstrings of Python's library)")
    bench.add_argument("--limit", type=_positive, default=64, metavar="N", help="use the first N pairs (default: %(default)s)")
    bench.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="texts in a batch (default: %(default)s)")
    bench.add_argument(
        "--seconds",
        type=_positive,
        default=20,
        metavar="S",
        help="about how long it takes, three rounds at least (default: %(default)s)",
    )
    bench.add_argument("--json", metavar="FILE", help="write every time to FILE as well")

    server = command(
        "infinity-server",
        _infinity_server,
        "Run Infinity's server with every model patched before the first request.",
        " A model that cannot be served keeps it from starting, with exit code 1; else the exit code is Infinity's.",
    )
    server.add_argument("--mode", choices=("portable", "tensor"), default="portable", help="as in score (default: %(default)s)")
    server.add_argument(
        "--backend", metavar="B", help="the one that serves the models, triton for instance (default: the device's)"
    )
    server.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="-- ARGUMENTS",
        help="infinity_emb's own command line: -- v2 --model-id MODEL ...",
    )

    info = command("info", _info, "Say what is installed, what can run here, and why the rest cannot.")
    info.add_argument(
        "--plan", action="store_true", help="instead: what mode tensor does on a GPU: matrix instructions and tiles, as a table"
    )
    info.add_argument(
        "--arch",
        type=_positive,
        action="append",
        metavar="N",
        help="of --plan: architecture 80, 86, 89, 90, 100 or 120 (default: this machine's GPU, else 80 and 90)",
    )
    info.add_argument(
        "--model", action="append", metavar="SHAPE", help="of --plan: shape:NAME (default: bge-reranker-base and -large)"
    )
    info.add_argument(
        "--linear", type=_positive, nargs=2, action="append", metavar=("N", "K"), help="of --plan: a weight [N, K] of your own"
    )
    info.add_argument("--head", type=_positive, action="append", metavar="D", help="of --plan: a head of D features")
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return number


# ---- commands ---------------------------------------------------------------------------------------------------------------


def _score(args: argparse.Namespace) -> int:
    names = tuple(args.prefix + name for name in NUMBERS)
    records = list(_records(args.pairs, ("query", "document"), names))
    with _writer(args.output) as out:  # before the model: an output that cannot be written is known at once
        reranker = _reranker(args)
        with _progress("scoring", len(records)) as advance:
            for start in range(0, len(records), CHUNK):
                part = records[start : start + CHUNK]
                pairs = [(r["query"], r["document"]) for r in part]
                scores = reranker.score(pairs, progress=False, batch_tokens=args.batch_tokens)
                for record, *numbers in zip(part, *scores, strict=True):
                    out.write(_line({**record, **dict(zip(names, _shortest(*numbers), strict=True))}))
                advance(start + len(part))
    return 0


def _rank(args: argparse.Namespace) -> int:
    if _half_surrogate(args.query):
        raise InputError("--query: not valid UTF-8")
    if args.jsonl or args.documents.lower().endswith(JSON_LINES):
        documents = [r["document"] for r in _records(args.documents, ("document",))]
    else:
        lines = list(_lines(args.documents))
        documents = [line for _, line in lines]
        if lines and _looks_like_a_record(documents[0]):
            _say(f"warning: {lines[0][0]}: looks like JSON Lines, but is ranked as plain text; give --jsonl")
    ranked = _reranker(args).rank(args.query, documents, args.top_k)
    if args.json:
        with _writer("-") as out:
            for place, r in enumerate(ranked, 1):
                numbers = dict(zip(NUMBERS, _shortest(r.logit, r.score, r.complement), strict=True))
                out.write(_line({"rank": place, "index": r.index, "document": r.document, **numbers}))
        return 0
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("rank", "index", "logit", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document", no_wrap=True, overflow="ellipsis")
    for place, r in enumerate(ranked, 1):
        shown = (str(n) for n in _shortest(r.logit, r.score))
        # Text: brackets in a document are no markup
        table.add_row(str(place), str(r.index), *shown, Text(_snippet(r.document)))
    with _naming(STDOUT):
        _console().print(table)
    return 0


def _snippet(document: str) -> str:
    """The document's beginning on one line, without what would steer the terminal: escapes, bidi overrides, invisible marks."""
    text = " ".join(document.split())[:SNIPPET]
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)


def _verify(args: argparse.Namespace) -> int:
    pairs = None
    if args.pairs is not None:
        pairs = [(r["query"], r["document"]) for r in _records(args.pairs, ("query", "document"))]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_writer(args.json)) if args.json else None
        from rerank_kernels.binding import PatchError
        from rerank_kernels.verify import load, verify

        _quiet()
        try:
            loaded = load(args.model, _dtype(args.dtype))
            if (device := _device(args.device)) is not None:
                loaded.model.to(device)
            with _progress("verifying", 1.0) as advance:
                report = verify(
                    loaded.model,
                    loaded.tokenizer,
                    pairs,
                    stock=args.stock,
                    max_length=args.max_length,
                    limit=args.limit,
                    pooling=loaded.pooling,
                    source=None if args.no_process else args.model,
                    mode=args.mode,
                    progress=advance,
                )
        except (ValueError, PatchError) as error:
            _fail_with(error)
        try:
            with _naming(STDOUT):
                report.print(_console())
                sys.stdout.flush()
        except BrokenPipeError:  # whoever stops reading does not change the verdict
            _drop_stdout()
        if out is not None:
            out.write(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    return 0 if report.ok else 1


def _bench(args: argparse.Namespace) -> int:
    pairs = None
    if args.pairs is not None:
        pairs = [(r["query"], r["document"]) for r in _records(args.pairs, ("query", "document"))]
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(_writer(args.json)) if args.json else None
        from rerank_kernels.bench import bench
        from rerank_kernels.binding import PatchError
        from rerank_kernels.verify import load
        from rerank_kernels.verify.models import default_pairs

        _quiet()
        try:
            loaded = load(args.model, _dtype(args.dtype))
            if (device := _device(args.device)) is not None:
                loaded.model.to(device)
            with _progress("timing", 1.0) as advance:
                report = bench(
                    loaded.model,
                    loaded.tokenizer,
                    (default_pairs() if pairs is None else pairs)[: args.limit],
                    batch_size=args.batch_size,
                    max_length=args.max_length,
                    pooling=loaded.pooling,
                    mode=args.mode,
                    seconds=args.seconds,
                    progress=advance,
                )
        except (ValueError, PatchError) as error:
            _fail_with(error)
        with _naming(STDOUT):
            report.print(_console())
        if out is not None:
            out.write(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    return 0 if report.ok else 1


def _infinity_server(args: argparse.Namespace) -> int:
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if not arguments:
        raise InputError(
            "infinity-server: Infinity's own command line is missing; give it after --, as in -- v2 --model-id MODEL"
        )
    from rerank_kernels.binding import PatchError
    from rerank_kernels.integrations.infinity_server import serve

    try:
        return serve(arguments, args.mode, args.backend)
    except ImportError as error:  # Infinity, or an extra of it
        _fail_with(error)
    except PatchError as error:
        _say(str(error))
        return 1


def _plan(args: argparse.Namespace) -> int:
    import torch
    from rich.table import Table

    from rerank_kernels.plan import ARCHITECTURES, plan, triton_gap
    from rerank_kernels.verify.models import SHAPE, SHAPES

    architectures = args.arch
    if architectures is None:
        here = {10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}
        architectures = sorted(here & set(ARCHITECTURES)) or [80, 90]
    linears, heads = [tuple(nk) for nk in args.linear or ()], list(args.head or ())
    models = args.model or ([] if linears or heads else ["shape:bge-reranker-base", "shape:bge-reranker-large"])
    for name in models:
        shape = SHAPES.get(name.removeprefix(SHAPE))
        if shape is None:
            raise InputError(f"--model {name}: no such shape; there are {', '.join(SHAPE + n for n in SHAPES)}")
        hidden, inner = shape["hidden"], shape["inner"]
        linears += [(hidden, hidden), (inner, hidden), (hidden, inner)]
        heads.append(hidden // shape["heads"])
    table = Table(title="mode tensor, fp16 and bf16, float32 sums", title_justify="left")
    for name in ("op", "features", "GPU", "backend", "instruction", "in a sum", "tiles, rows x columns: threads, shared KB"):
        table.add_column(name, no_wrap=not name.startswith("tiles"))
    try:
        for arch in architectures:
            for row in plan(arch, list(dict.fromkeys(linears)), list(dict.fromkeys(heads))):
                shown = ((t, f", {t.shared / 1024:.1f}" if t.shared else "") for t in row.tiles)
                tiles = [f"{t.rows}x{t.columns}: {t.threads}{kilobytes}" for t, kilobytes in shown]
                table.add_row(
                    row.op, row.features, f"sm_{row.arch}", row.backend, row.instruction, str(row.count), "; ".join(tiles)
                )
    except ValueError as error:
        _fail_with(error)
    with _naming(STDOUT):
        console = _console()
        console.print(table)
        for gap in dict.fromkeys(filter(None, map(triton_gap, architectures))):
            console.print(f"triton: {gap}", markup=False, soft_wrap=True)
    return 0


def _info(args: argparse.Namespace) -> int:
    if args.plan:
        return _plan(args)
    if args.arch or args.model or args.linear or args.head:
        raise InputError("--arch, --model, --linear and --head belong to --plan")
    from rich.table import Table

    from rerank_kernels.backend import BACKENDS, backends
    from rerank_kernels.verify import environment

    about = Table(show_header=False)
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
    for name, value in environment().items():
        if isinstance(value, dict):
            value = "\n".join(f"{k}: {v}" for k, v in value.items())
        about.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    rows = backends()
    table = Table()
    for name in ("op", *BACKENDS):
        table.add_column(name)
    reasons: dict[str, str] = {}
    for op, row in rows.rows():
        for name, reason in row.items():
            if reason != "yes":
                reasons.setdefault(name, reason)
        table.add_row(op, *("yes" if reason == "yes" else "-" for reason in row.values()))
    with _naming(STDOUT):
        console = _console()
        console.print(about, markup=False)
        console.print(table)
        for name, reason in reasons.items():
            console.print(f"{name}: {reason}", markup=False, soft_wrap=True)
    return 0


# ---- models -----------------------------------------------------------------------------------------------------------------


def _reranker(args: argparse.Namespace) -> Any:
    from rerank_kernels.binding import PatchError
    from rerank_kernels.reranker import Reranker

    _quiet()
    try:
        device = _device(args.device)
        return Reranker(args.model, max_length=args.max_length, dtype=_dtype(args.dtype), device=device, mode=args.mode)
    except (ValueError, PatchError) as error:
        _fail_with(error)


def _dtype(name: str | None) -> Any:
    import torch

    return {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _device(name: str | None) -> Any:
    """A device that this machine has, None as it is."""
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own for a name, a missing driver, a CPU-only build
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def _fail_with(error: Exception) -> NoReturn:
    raise InputError(str(error)) from error


def _quiet() -> None:
    """transformers' own bars and load reports would stand between the lines of our output."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()


# ---- reading ----------------------------------------------------------------------------------------------------------------


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """("file:number", line) of every line that is not blank."""
    name = "<stdin>" if path == "-" else path
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    # a byte order mark is no part of the first line
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise InputError(f"{name}:{number}: not UTF-8: {error.reason} at byte {error.start}") from None
                if line:
                    yield f"{name}:{number}", line
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def _records(path: str, fields: tuple[str, ...], added: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The objects of JSON Lines; every one has `fields`, as text, and none of the names that will be `added`."""
    for where, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f'{where}: must be an object with "{fields[-1]}", got {_kind(record)}')
        for name in fields:
            if name not in record:
                raise InputError(f'{where}: "{name}" is missing')
            if not isinstance(record[name], str):
                raise InputError(f'{where}: "{name}" must be a string, got {_kind(record[name])}')
            if _half_surrogate(record[name]):
                raise InputError(f'{where}: "{name}" is not valid Unicode: it holds half of a surrogate pair')
        for name in added:
            if name in record:
                raise InputError(f"{where}: {json.dumps(name)} is there already and would be lost; give another --prefix")
        yield record


def _half_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _looks_like_a_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "document" in record


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "an array", "str": "a string", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


# ---- writing ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says what could not be written. Nobody reading our stdout is no failure, and stays BrokenPipeError."""
    try:
        yield
    except OSError as error:
        if name == STDOUT and isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"{name}: {error.strerror or error}") from None


class _Out:
    def __init__(self, file: IO[str], name: str) -> None:
        self.file, self.name = file, name

    def write(self, text: str) -> None:
        with _naming(self.name):
            self.file.write(text)


def _shortest(*values: Any) -> list[float]:
    """Python floats that print as the shortest decimals which read back as these float32."""
    import numpy as np

    return [float(str(np.float32(value))) for value in values]


def _line(record: dict[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a field we only carry holds half of a surrogate pair
        text = json.dumps(record)
    return text + "\n"


@contextlib.contextmanager
def _writer(path: str) -> Iterator[_Out]:
    """A text file that takes the place of `path` when the block ends well, and leaves no trace if it does not."""
    if path == "-":
        _set_stdout(encoding="utf-8", newline="\n")
        yield _Out(sys.stdout, STDOUT)
        with _naming(STDOUT):
            sys.stdout.flush()
        return
    place = Path(os.path.realpath(path))  # a link stays a link
    beside = None
    with _naming(path):
        if place.is_dir():
            raise InputError(f"{path}: Is a directory")
        if place.exists() and not place.is_file():  # /dev/null, a pipe: nothing to rename
            file = open(place, "w", encoding="utf-8", newline="\n")  # noqa: SIM115  closed below
        else:
            # a file keeps its mode, a new one gets what open() would give it
            mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o666 & ~_umask()
            handle, beside = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.", suffix=".part")
            file = open(handle, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
    try:
        yield _Out(file, path)
        with _naming(path):
            if beside is not None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if beside is not None:
                os.chmod(beside, mode)
                os.replace(beside, place)
    except BaseException:
        with contextlib.suppress(OSError):  # what could not be written once cannot be written now
            file.close()
        if beside is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
        raise


def _set_stdout(**how: str) -> None:
    if sys.stdout is None:  # closed by the shell's >&-
        raise InputError(f"{STDOUT}: is closed")
    sys.stdout.reconfigure(**how)  # type: ignore[union-attr]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """`kill PID` cleans up like Ctrl-C; only the main thread may say so, and only there does it matter."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _console() -> Any:
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end with exit code 1, which is a fallen promise's

    # a letter that stdout's encoding does not have is no reason to stop
    _set_stdout(errors="replace")
    # into a file or a pipe there is no width; rich's 80 columns would fold the tables
    columns = os.environ.get("COLUMNS", "")
    return Ours() if sys.stdout.isatty() else Ours(width=int(columns) if columns.isdecimal() else 140)


@contextlib.contextmanager
def _progress(what: str, total: float) -> Iterator[Any]:
    """Yields a function that takes how far it is; a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
