"""Draws the runs that bench/out holds, for bench/pages/tables.py.

price-DEVICE.svg       the price of invariance: how long the best of theirs takes for one op, over ours
throughput-DEVICE.svg  pairs per second over batch and over length: ours, stock padded, sorted by length, one by one
bits-DEVICE.svg        pairs whose logit has other bits than alone, over the size of the batch: stock and ours
sparse-cpu.svg         time of a sparse FFN, one token, over the share of its neurons that are active, and dense beside it

The data are what `bench/run.py --json` and `--scaling --json` wrote; a figure whose data are not there is not drawn.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from bench.pages.results import lines
from bench.pages.tables import MODES, of_kind

# text stays text, ids and dates stay the same: a figure of the same data is the same file
matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "rerank_kernels",
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "legend.fontsize": 7,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.constrained_layout.use": True,
}
COLOURS = {
    "stock, padded": "#b0b0b0",
    "stock, sorted in 8s": "#c08080",
    "stock, one by one": "#606060",
    "stock": "#b03030",
    "stock, dense": "#b03030",
    "portable": "#1f77b4",
    "tensor": "#d98200",
}
SHOWN = {  # of an op's many cases
    "cpu": re.compile(r"(?!linear|sparse).*|linear (\+ gelu )?(1|128|2048)(?!\d).*|sparse.* 10% active"),
    "cuda": re.compile(r"(?!linear ).*fp16|linear (1|128|16384)x.*fp16"),
}
Content = Mapping[str, Any]


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.5, 1, 2, 5, 10 and not as powers of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def titled(words: str, content: Content) -> str:
    facts = content["machine"]
    chip = facts["gpu"] if content.get("device") == "cuda" else facts["cpu"]
    return f"{words}\n{chip}, torch {facts['torch']}, {facts['revision']}"


def curves(axes: Any, points: Iterable[Mapping[str, Any]], x: str, y: str) -> None:
    """One for each way, in the order in which they come."""
    ways: dict[str, list[tuple[float, float]]] = {}
    for p in points:
        ways.setdefault(p["way"], []).append((p[x], p[y]))
    for way, line in ways.items():
        colour = COLOURS.get(way) or COLOURS[way.rpartition(" ")[2]]
        label = way if way.startswith("stock") else f"ours, {way}"
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, color=colour, label=label)


def doubling(axes: Any, sizes: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, [f"{x}" for x in ticks])


def prices(content: Content) -> dict[str, dict[str, float]]:
    """Op -> mode -> theirs / the better of our backends. Theirs: on a CPU stock, on a GPU the best of all."""
    device = content.get("device", "cpu")
    found: dict[str, dict[str, float]] = {}
    for r in of_kind(content, "op"):
        for mode in MODES if SHOWN[device].fullmatch(r["case"]) else ():
            timed = [line for line in lines(r, mode) if line["ratio"] is not None]
            if timed:
                theirs = min(timed, key=lambda line: line["theirs_ms"]) if device == "cuda" else timed[0]
                found.setdefault(r["case"], {})[mode] = theirs["ratio"]
    return found


def price(content: Content) -> Any:
    rows = prices(content)
    modes = [m for m in MODES if any(m in p for p in rows.values())]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.2 * len(rows)))
    thick = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        bars = {row + (i - (len(modes) - 1) / 2) * thick: p[mode] for row, p in enumerate(rows.values()) if mode in p}
        axes.barh(list(bars), [v - 1.0 for v in bars.values()], thick, left=1.0, color=COLOURS[mode], label=f"ours, {mode}")
        for place, value in bars.items():
            beside, side = ((3, 0), "left") if value >= 1 else ((-3, 0), "right")
            how = {"textcoords": "offset points", "va": "center", "ha": side, "fontsize": 7}
            axes.annotate(f"{value:.2f}", (value, place), beside, **how)
    axes.set_xscale("log")
    low, high = (f(v for p in rows.values() for v in p.values()) for f in (min, max))
    axes.set_xlim(min(0.5, low / 1.6), max(2.0, high * 1.6))
    plain(axes.xaxis)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("best of theirs / ours: right of 1 ours is faster")
    axes.set_title(titled("The price of invariance", content))
    if len(modes) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def throughput(content: Content) -> Any:
    points = content["scaling"]["points"]
    variants = list(dict.fromkeys((p["dtype"], p["threads"]) for p in points))
    figure, grid = plt.subplots(len(variants), 2, figsize=(7, 2.6 * len(variants)), squeeze=False)
    for row, (dtype, threads) in zip(grid, variants, strict=True):
        for axes, axis in zip(row, ("batch", "length"), strict=True):
            here = [p for p in points if (p["dtype"], p["threads"], p["axis"]) == (dtype, threads, axis)]
            curves(axes, here, "x", "pairs_per_s")
            doubling(axes, (p["x"] for p in here))
            axes.set_yscale("log")
            plain(axes.yaxis)
            axes.set_xlabel("pairs in the batch, 16 to 512 tokens" if axis == "batch" else "tokens a pair, 16 pairs")
            axes.set_ylabel("pairs per second")
            words = "" if content.get("device") == "cuda" else f", {threads} thread{'s' * (threads > 1)}"
            axes.set_title(f"{dtype}{words}")
    grid[0][0].legend()
    figure.suptitle(titled(content["scaling"]["model"], content))
    return figure


def bits(content: Content) -> Any:
    points = content["scaling"]["bits"]
    dtypes = list(dict.fromkeys(p["dtype"] for p in points))
    figure, row = plt.subplots(1, len(dtypes), figsize=(1.0 + 3.2 * len(dtypes), 2.8), squeeze=False)
    for axes, dtype in zip(row[0], dtypes, strict=True):
        curves(axes, (p for p in points if p["dtype"] == dtype), "batch", "differ")
        doubling(axes, (p["batch"] for p in points))
        axes.set_xlabel("pairs in the batch")
        axes.set_ylabel(f"of {points[0]['pairs']} pairs, bits differ")
        axes.set_title(dtype)
    row[0][0].legend()
    figure.suptitle(titled(f"Logits that depend on the batch: {content['scaling']['model']}", content))
    return figure


def sparse(content: Content) -> Any:
    cases = [r for r in content["results"] if r.get("tokens") == 1 and " ReLU " in r["case"]]
    if content.get("device") == "cuda" or not cases:
        return None
    points = []
    for r in sorted(cases, key=lambda r: r["active"]):
        line = next(lines(r))
        points += [
            {"way": w, "active": 100 * r["active"], "ms": line[k]}
            for w, k in (("portable", "ours_ms"), ("stock, dense", "theirs_ms"))
        ]
    figure, axes = plt.subplots(figsize=(5, 3))
    curves(axes, points, "active", "ms")
    axes.set_xlabel("neurons that are active, %")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0.0)
    axes.set_title(titled(f"ReLU FFN, one token: {cases[0]['case'].split(' ')[2].rstrip(',')}, fp32", content))
    axes.legend()
    return figure


FIGURES = {"price": ("", price), "throughput": ("scaling-", throughput), "bits": ("scaling-", bits), "sparse": ("", sparse)}


def draw(data: Mapping[str, Content], out: pathlib.Path) -> None:
    for device in ("cpu", "cuda"):
        for name, (kind, make) in FIGURES.items():
            if (content := data.get(kind + device)) is not None and (figure := make(content)) is not None:
                path = out / f"{name}-{device}.svg"
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                print(f"{path}: {path.stat().st_size // 1024} KiB")
