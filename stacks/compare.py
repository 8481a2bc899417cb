"""Holds the systems' logits against one another and shows what a run found: python stacks/compare.py [NAME ...] [--place]

Every system has to give the bits that rk.Reranker gives, pair by pair, from the same tokens. --place writes the figures into
the pages, between `<!-- stacks:NAME -->` and `<!-- /stacks -->`; what stands there is never typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from tools import pages  # noqa: E402

KEPT = ROOT / ".stacks"
PAGES = ("docs/SYSTEMS.md",)
Found = Mapping[str, Any]


TESTS = {  # stack -> its file of tests
    "st6": "test_sentence_transformers.py",
    "st3": "test_sentence_transformers.py",
    "flag": "test_flagembedding.py",
    "haystack2": "test_haystack.py",
    "haystack3": "test_haystack.py",
    "infinity": "test_infinity.py",
}


class Row(NamedTuple):
    """A system that users hold, in one stack."""

    stack: str
    system: str  # as in the results
    section: str  # of docs/SYSTEMS.md
    pins: tuple[str, ...]  # what a reader needs to know; stacks/pins has them all


ST = "sentence-transformers"
ROWS = (
    Row("st6", "CrossEncoder", ST, (ST, "transformers")),
    Row("st3", "CrossEncoder", ST, (ST, "transformers")),
    Row("st6", "SentenceTransformer", ST, (ST, "transformers")),
    Row("st3", "SentenceTransformer", ST, (ST, "transformers")),
    Row("st6", "CrossEncoder of a decoder", ST, (ST, "transformers")),
    Row("st6", "SentenceTransformer of a decoder", ST, (ST, "transformers")),
    Row("flag", "FlagReranker", "flagembedding", ("FlagEmbedding", "transformers")),
    Row("flag", "FlagModel", "flagembedding", ("FlagEmbedding", "transformers")),
    Row("flag", "FlagLLMReranker", "flagembedding", ("FlagEmbedding", "transformers")),
    Row("haystack2", "TransformersSimilarityRanker", "haystack", ("haystack-ai", "transformers")),
    Row("haystack3", "SentenceTransformersSimilarityRanker", "haystack", ("haystack-ai", f"{ST}-haystack", "transformers")),
    Row("infinity", "AsyncEngineArray", "infinity", ("infinity_emb", ST, "transformers")),
    Row("infinity", "infinity-server", "infinity", ("infinity_emb", ST, "transformers")),
)
CASES = ("minilm float32", "minilm bfloat16", "minilm float16", "xlmr float32", "xlmr float16")
OTHER_CASES = {
    "SentenceTransformer": ("embeddings float32",),
    "FlagModel": ("embeddings float32",),
    "SentenceTransformer of a decoder": ("qwen3-embedding query float32", "qwen3-embedding document float32"),
    "CrossEncoder of a decoder": ("qwen3 float32", "qwen3 bfloat16"),
    "FlagLLMReranker": ("gemma float32", "gemma bfloat16"),
    "infinity-server": ("minilm float32",),
}


def kept(names: Sequence[str]) -> dict[str, Found]:
    return {name: json.loads((KEPT / "results" / f"{name}.json").read_text()) for name in names}


def differences(results: Mapping[str, Found], reference: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What is not as it must be, in words. Silence is worth something only if everything was there to be compared."""
    tokens: dict[str, dict[str, str]] = {}
    for row in ROWS:
        if row.stack not in results:
            continue
        ours = results[row.stack].get(f"ours {row.system}", {})
        if missing := set(OTHER_CASES.get(row.system, CASES)) - set(ours):
            yield f"{row.stack}: nothing of {row.system}, {', '.join(sorted(missing))}"
        for name, bits in ours.items():
            others = sum(a != b for a, b in zip(bits, reference[name], strict=True))
            if others:
                yield f"{row.stack}: {row.system}, {name}: {others} of {len(bits)} are not rk.Reranker's"
        for name, seen in results[row.stack].get(f"tokens {row.system}", {}).items():
            tokens.setdefault(name.split(" ")[0], {})[f"{row.stack} {row.system} {name}"] = seen
    for model, seen in tokens.items():
        if len(set(seen.values())) != 1:
            yield f"{model}: not all systems made the same tokens of the pairs: {seen}"


# ---- tables ----------------------------------------------------------------------------------------------------------------

WAYS = ("batch 7", "batch 32", "shuffled", "lists of 20", "lists of 5")


def pins_of(row: Row, results: Mapping[str, Found]) -> str:
    versions = results[row.stack]["versions"]
    return ", ".join(f"{name} {versions[name]}" for name in row.pins)


def stock_rows(results: Mapping[str, Found], section: str | None = None) -> Iterator[tuple[Row, str, Mapping[str, int]]]:
    for row in ROWS:
        if row.stack in results and section in (None, row.section):
            for name, ways in results[row.stack].get(f"stock {row.system}", {}).items():
                yield row, name, ways


def section(name: str, results: Mapping[str, Found]) -> str:
    """Of 200 pairs or texts, how many have other bits than alone: stock. Patched it is none, or there is no table."""
    rows = [
        (
            f"{row.system}, {pins_of(row, results)}",
            case.replace("embeddings", "minilm"),
            *(f"{ways.get(way, '-')}" for way in WAYS),
            "0",
        )
        for row, case, ways in stock_rows(results, name)
    ]
    return pages.markdown(("stock, of 200", "model", *WAYS, "patched, any way"), rows)


def order(results: Mapping[str, Found]) -> str:
    rows = []
    for row in ROWS:
        found = results.get(row.stack, {}).get("order", {}).get(row.system)
        if found:
            rows.append((f"{row.system}, {pins_of(row, results)}", f"{found['stock']}", f"{found['ours']}"))
    return pages.markdown(("places of 200 that are wrong", "stock", "patched"), rows)


def server(results: Mapping[str, Found]) -> str:
    found, ended = results["infinity"]["server"], results["infinity"]["sigterm"]
    names = ("requests", "pairs with several scores", "most scores of a pair")
    rows = [(name, *(f"{found[who][name]:,}" for who in ("stock", "ours"))) for name in names]
    rows += [
        (f"SIGTERM: {name}", *(f"{ended[who][name]}" for who in ("stock", "ours")))
        for name in ("requests", "open at the signal", "lost")
    ]
    return pages.markdown(("", "infinity_emb", "rerank-kernels infinity-server"), rows)


def overview(results: Mapping[str, Found]) -> str:
    """A row per system and stack, each linked to its section and its test."""
    rows = []
    for row in ROWS:
        if row.system == "infinity-server":
            stock = results["infinity"]["server"]["stock"]["pairs with several scores"]
        else:
            stock = max(
                n for r, case, ways in stock_rows(results) if r == row and case.endswith("float32") for n in ways.values()
            )
        link = f"[{row.system}](#{row.section})"
        rows.append(
            (link, pins_of(row, results), f"[`make stacks STACKS={row.stack}`](../stacks/{TESTS[row.stack]})", f"{stock}", "0")
        )
    return pages.markdown(("", "pins", "its test", "stock: pairs of 200 whose bits depend on the batch", "patched"), rows)


def tables(results: Mapping[str, Found]) -> dict[str, str]:
    sections = {name: section(name, results) for name in dict.fromkeys(row.section for row in ROWS)}
    return sections | {"order": order(results), "server": server(results), "overview": overview(results)}


def show(results: Mapping[str, Found], wrong: Sequence[str]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(title="pairs of 200 with other bits than alone: stock; patched it is 0 everywhere", title_justify="left")
    for head in ("stack", "system", "model", *WAYS):
        table.add_column(head, justify="right" if head in WAYS else "left")
    for row, case, ways in stock_rows(results):
        table.add_row(row.stack, row.system, case, *(f"{ways.get(way, '-')}" for way in WAYS))
    console.print(table)
    for name, what in (
        ("order", "places of 200 that are wrong, logits in 8..16"),
        ("server", "server"),
        ("sigterm", "SIGTERM under load"),
    ):
        for stack, found in results.items():
            for system, values in found.get(name, {}).items():
                console.print(f"{what}: {stack} {system}: {values}", markup=False, highlight=False)
    compared = [f"{r.stack} {r.system}" for r in ROWS if f"ours {r.system}" in results.get(r.stack, {})]
    for line in wrong:
        console.print(f"[red]{line}[/red]")
    if not wrong:
        console.print(
            f"the same bits as rk.Reranker, from the same tokens: {', '.join(compared)}", markup=False, highlight=False
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Holds the logits of the stacks that ran against one another.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="all that there are if none is given")
    parser.add_argument("--place", action="store_true", help="write the figures into the pages")
    args = parser.parse_args(argv)
    every = list(TESTS)
    try:
        results = kept(args.names or every)
    except OSError as error:
        print(f"compare: {error.filename} is missing: that stack's tests did not run to their end")
        return 1
    wrong = list(differences(results, json.loads((KEPT / "data" / "reference.json").read_text())))
    show(results, wrong)
    if args.place and not wrong:
        if set(results) != set(every):
            print(f"compare: the pages want all of {', '.join(every)}")
            return 1
        written = tables(results)
        for name in PAGES:
            pages.write(ROOT / name, "stacks", written)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
