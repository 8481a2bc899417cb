"""What verify and bench found, as one page for those who were not there: a manager reads the verdict, an auditor the rest.

The page is one file that needs nothing else. Styles and plots stand in it, it runs no script, and its own policy forbids the
browser to fetch anything. What comes from outside, a model's name or a path, is text in it and never markup.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rerank_kernels.bench import BenchReport
from rerank_kernels.verify.measure import Result
from rerank_kernels.verify.report import WHAT, VerifyReport

OURS, STOCK = "rerank_kernels", "stock PyTorch"
MEANING = {  # of a promise, in plain words
    "repeatable": "the same call again gives the same bits, in this process and in a fresh one",
    "batch-invariant": "the other texts of a batch, how many they are and where the text stands among them change nothing",
    "padding-invariant": "how much padding there is, on which side and with which tokens changes nothing",
    "thread-invariant": "the number of threads changes nothing",
    "machine-invariant": "the instructions that a machine has, and the settings of its math library, change nothing",
}
HOW_TO_READ = (
    "A row is one text, or one pair of query and document. Each check changes one thing about how the model is called, and "
    "compares the result of every row with the one it has without that change: equal means that all bits are. An order that "
    "changed is a pair of documents of one query that changed places, or came to or from a tie. A control is a scorer that is "
    "wrong on purpose. The check that it is for must notice it, and no other check may: else a pass would mean nothing."
)


@dataclass(frozen=True)
class Bar:
    """share: of the plot's width, 0 to 1. text: what stands beside the bar. bad: there should be none."""

    who: str
    share: float
    text: str
    bad: bool = False


@dataclass(frozen=True)
class Plot:
    title: str
    unit: str  # what the length of a bar means
    groups: Sequence[tuple[str, Sequence[Bar]]]


@dataclass(frozen=True)
class Table:
    """Rows in groups, each with a title and what it means, or neither; the first cell of a row names it."""

    heads: Sequence[str]
    groups: Sequence[tuple[str, str, Sequence[Row]]]


@dataclass(frozen=True)
class Row:
    cells: Sequence[str]
    detail: str = ""  # a second line of the first cell
    bad: bool = False
    dim: bool = False


def verify_page(report: VerifyReport, stock: VerifyReport | None, *, model: str, command: str, when: datetime) -> str:
    """The page of a run of verify. stock: the same model without rerank_kernels, measured beside it, if it was."""
    turned = "next tokens changed" if report.kind == "language head" else "pairs of documents changed places"
    texts = f"the {WHAT[report.kind]} of {report.rows} texts of {report.lengths[0]} to {report.lengths[1]} tokens"
    caught, controls = sum(c.caught for c in report.controls), len(report.controls)
    held = [r for r in report.results if r.promised]
    equal, total = sum(r.equal for r in held), sum(r.total for r in held)
    said = f"{report.scorer} gave {texts} the same bits in {equal:,} of {total:,} comparisons."
    tiles = [(f"{equal:,} of {total:,}", f"bits equal, {report.scorer}")]
    if stock is not None:
        bits = f"{sum(r.equal for r in stock.results):,} of {sum(r.total for r in stock.results):,}"
        swapped = f"{sum(r.flips for r in stock.results):,} of {sum(r.ordered for r in stock.results):,}"
        said += f" The same model in {STOCK}: in {bits}, and {swapped} {turned}."
        tiles.append((bits, f"bits equal, {STOCK}"))
        tiles.append((_gap(max(r.max_difference for r in stock.results)), f"largest difference, {STOCK}"))
    tiles.append((f"{caught} of {controls}", "wrong scorers noticed"))
    broken = list(dict.fromkeys(r.promise for r in report.broken))
    if broken:
        head = f"Broken: {', '.join(broken)}"
    elif report.ok:
        head = "Every promise holds"
    else:
        head = "No verdict: some checks cannot fail here"
        said += " But a check that does not notice a scorer that is wrong on purpose proves nothing."
    both = {r.check: [(OURS if report.scorer == OURS else STOCK, r)] for r in report.results}
    for r in stock.results if stock is not None else ():
        both.setdefault(r.check, []).append((STOCK, r))
    return _page(
        command_name="verify",
        model=_short(model),
        good=report.ok,
        head=head,
        said=said,
        tiles=tiles,
        table_title="The promises",
        table=_promises(report, stock),
        plots=[
            Plot(
                "Rows whose bits differ",
                "of all that were compared",
                [(name, [_bits(who, r) for who, r in of]) for name, of in both.items()],
            )
        ],
        controls=[(c.name, c.expected, c.seen_by, c.caught) for c in report.controls],
        facts=_facts({"model": model, **report.environment}),
        command=command,
        when=when,
        how_to_read=HOW_TO_READ,
    )


def _promises(report: VerifyReport, stock: VerifyReport | None) -> Table:
    """Every check of ours, under its promise; stock's numbers beside it if stock was measured too."""
    theirs = {r.check: r for r in stock.results} if stock is not None else {}
    changed = "token changed" if report.kind == "language head" else "order changed"
    heads = ["check", "verdict", "bits equal", "largest difference", changed]
    if stock is not None:
        heads += [f"{name}, stock" for name in heads[2:]]
    groups: dict[str, list[Row]] = {}
    for r in report.results:
        cells = [r.check, "holds" if r.holds else "broken" if r.promised else "differs, not promised", *_numbers(r)]
        if stock is not None:
            cells += _numbers(theirs[r.check]) if r.check in theirs else ["–", "–", "–"]
        groups.setdefault(r.promise, []).append(Row(cells, r.varied, not r.holds and r.promised, not r.promised))
    return Table(heads, [(promise, MEANING.get(promise, ""), rows) for promise, rows in groups.items()])


def _numbers(r: Result) -> list[str]:
    return [f"{r.equal:,} of {r.total:,}", _gap(r.max_difference), f"{r.flips:,} of {r.ordered:,}"]


def _bits(who: str, r: Result) -> Bar:
    differ = r.total - r.equal
    return Bar(
        who, differ / r.total if r.total else 0.0, f"{differ:,} of {r.total:,}", who == OURS and r.promised and differ > 0
    )


def _gap(value: float) -> str:
    return "0" if value == 0 else "not a number" if value == float("inf") else f"{value:.2g}"


def bench_page(report: BenchReport, *, environment: Mapping[str, Any], model: str, command: str, when: datetime) -> str:
    """The page of a run of bench. environment: verify.environment()'s."""
    found = report.as_dict()
    ways = found["ways"]
    speed, count = report.fastest(), {3: "three", 5: "five"}.get(len(ways), str(len(ways)))
    if report.ok:
        head = f"The same bits in every way, at {speed:.2f} times stock's speed"
    else:
        head = "Bits differ: a promise of the patched model is broken"
    others = {who: max(w[who]["rows_with_other_bits"] for w in ways.values()) for who in ("stock", "patched")}
    said = (
        f"{report.rows} texts of {report.tokens:,} tokens, run in {count} ways. In {STOCK} up to {others['stock']} texts "
        f"get other bits than alone, in {OURS} {others['patched'] or 'none'}. The speed is that of each one's fastest way."
    )
    rows, bits, speeds = [], [], []
    most = max(w[who]["per_second"] for w in ways.values() for who in ("stock", "patched"))
    for way in ways:
        stock, ours = ways[way]["stock"], ways[way]["patched"]
        cells = [way, f"{ways[way]['ratio']:.2f}"]
        cells += [f"{ours['per_second']:.4g}", _milliseconds(ours["p50_ms"]), f"{ours['rows_with_other_bits']:,}"]
        cells += [f"{stock['per_second']:.4g}", _milliseconds(stock["p50_ms"]), f"{stock['rows_with_other_bits']:,}"]
        rows.append(Row(cells, bad=ours["rows_with_other_bits"] > 0))
        named = ((OURS, ours), (STOCK, stock))
        differ = [(who, w["rows_with_other_bits"]) for who, w in named]
        bits.append((way, [Bar(who, n / report.rows, f"{n:,} of {report.rows:,}", who == OURS and n > 0) for who, n in differ]))
        speeds.append((way, [Bar(who, w["per_second"] / most, f"{w['per_second']:.4g} per second") for who, w in named]))
    heads = (
        "how",
        "stock's time / ours",
        *(f"{n}{of}" for of in ("", ", stock") for n in ("texts per second", "time per call", "other bits")),
    )
    return _page(
        command_name="bench",
        model=_short(model),
        good=report.ok,
        head=head,
        said=said,
        tiles=[
            (f"{speed:.2f} x", "stock's fastest time / ours"),
            (f"{others['patched']:,} of {report.rows:,}", f"texts with other bits, {OURS}"),
            (f"{others['stock']:,} of {report.rows:,}", f"texts with other bits, {STOCK}"),
        ],
        table_title=f"The {count} ways",
        table=Table(heads, [("", "", rows)]),
        plots=[
            Plot("Texts whose bits differ", "of all, from those of the text alone", bits),
            Plot("Texts per second", "longer is faster", speeds),
        ],
        controls=[],
        facts=_facts(
            {
                "model": model,
                "class": report.facts["model"],
                **{n: v for n, v in report.facts.items() if n != "model"},
                **environment,
            }
        ),
        command=command,
        when=when,
        how_to_read="Stock and patched take turns, round after round, so that a busy machine hits both alike; times are "
        "medians. stock's time / ours is above 1 where ours is faster. A call is that of a batch, or of one text alone.",
    )


def _short(model: str) -> str:
    """The end of a path: what is a heading need not say where it lies."""
    return "/".join(model.replace("\\", "/").rstrip("/").split("/")[-2:])


def _milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value, what is nested on one line."""
    facts = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            value = ", ".join(k if v is True else f"{k}: {v}" for k, v in value.items() if v is not False)
        facts.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return facts


def _visible(value: Any) -> Any:
    """Text without what would hide or turn around what stands beside it: controls, bidi overrides, half of a surrogate pair."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in value)


def _page(**content: Any) -> str:
    # finalize sees every value before it is escaped
    environment = Environment(
        loader=PackageLoader("rerank_kernels.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**content, colours={OURS: "ours", STOCK: "stock"})
