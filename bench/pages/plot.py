"""Draws the runs that bench/out holds: python -m bench.pages.plot [--data FOLDER] [--out docs]

price-DEVICE.svg       the price of invariance: how long the best of theirs takes for one op, over ours
throughput-DEVICE.svg  pairs per second over batch and over length: ours, stock padded, sorted by length, one by one
bits-DEVICE.svg        pairs whose logit has other bits than alone, over the size of the batch: stock and ours
sparse-cpu.svg         time of a sparse FFN, one token, over the share of its neurons that are active, and dense beside it

The data are what `bench/run.py --json` and `--scaling --json` wrote; a figure whose data are not there is not drawn.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib import ticker

from bench import OUT, ROOT
from bench.pages.results import best_ratio, kept, lines

# text stays text, ids and dates stay the same: a figure of the same data is the same file
matplotlib.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "rerank_kernels",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
COLOURS = {
    "stock, padded": "#b0b0b0",
    "stock, sorted in 8s": "#c08080",
    "stock, one by one": "#606060",
    "stock": "#b03030",
    "portable": "#1f77b4",
    "tensor": "#d98200",
}


Content = Mapping[str, Any]


def colour(way: str) -> str:
    return COLOURS.get(way) or COLOURS[way.rpartition(" ")[2]]


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.5, 1, 2, 5, 10 and not as powers of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def machine(content: Content) -> str:
    facts = content["machine"]
    return f"{facts['gpu'] if content.get('device') == 'cuda' else facts['cpu']}, torch {facts['torch']}, {facts['revision']}"


def cpu_prices(content: Content) -> dict[str, dict[str, float]]:
    """Op -> {"portable": stock / ours}; of linear's many sizes some, of a sparse FFN's shares one."""
    rows = ("linear 1", "linear 128", "linear 2048", "linear + gelu 2048")
    prices: dict[str, dict[str, float]] = {}
    for r in content["results"]:
        shown = r["group"] != "linear" or r["case"].split("x")[0] in rows
        stock = next(lines(r))
        if r["group"] not in ("model", "decoder") and shown and stock["ratio"] is not None and r.get("active", 0.1) == 0.1:
            prices[r["case"]] = {"portable": stock["ratio"]}
    return prices


def gpu_prices(content: Content) -> dict[str, dict[str, float]]:
    """Op -> mode -> best of theirs / the better of our two backends; float16, and of linear's many sizes some."""
    prices: dict[str, dict[str, float]] = {}
    for r in content["results"]:
        shown = not r["case"].startswith("linear ") or r["case"].split("x")[0] in ("linear 1", "linear 128", "linear 16384")
        if r["group"] != "model" and "fp16" in r["case"] and shown:
            for mode in ("portable", "tensor"):
                if found := best_ratio(r["contestants"], mode):
                    prices.setdefault(r["case"], {})[mode] = found[2]
    return prices


def price(content: Content) -> Any:
    prices = gpu_prices(content) if content.get("device") == "cuda" else cpu_prices(content)
    modes = [m for m in ("portable", "tensor") if any(m in p for p in prices.values())]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.2 * len(prices)), layout="constrained")
    thick = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        places = [row + (i - (len(modes) - 1) / 2) * thick for row, p in enumerate(prices.values()) if mode in p]
        values = [p[mode] for p in prices.values() if mode in p]
        axes.barh(places, [v - 1.0 for v in values], thick, left=1.0, color=COLOURS[mode], label=f"ours, {mode}")
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f}",
                (value, place),
                (3 if value >= 1 else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if value >= 1 else "right",
                fontsize=7,
            )
    axes.set_xscale("log")
    low, high = (f(v for p in prices.values() for v in p.values()) for f in (min, max))
    axes.set_xlim(min(0.5, low / 1.6), max(2.0, high * 1.6))
    plain(axes.xaxis)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(prices)), list(prices))
    axes.invert_yaxis()
    axes.set_xlabel("best of theirs / ours: right of 1 ours is faster")
    axes.set_title(f"The price of invariance\n{machine(content)}", fontsize=9)
    if len(modes) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def throughput(content: Content) -> Any:
    points = content["scaling"]["points"]
    variants = list(dict.fromkeys((p["dtype"], p["threads"]) for p in points))
    figure, grid = plt.subplots(len(variants), 2, figsize=(7, 2.6 * len(variants)), layout="constrained", squeeze=False)
    for row, (dtype, threads) in zip(grid, variants, strict=True):
        for axes, axis in zip(row, ("batch", "length"), strict=True):
            here = [p for p in points if (p["dtype"], p["threads"], p["axis"]) == (dtype, threads, axis)]
            for way in dict.fromkeys(p["way"] for p in here):
                line = [(p["x"], p["pairs_per_s"]) for p in here if p["way"] == way]
                label = way if way.startswith("stock") else f"ours, {way}"
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, color=colour(way), label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            plain(axes.yaxis)
            ticks = sorted({p["x"] for p in here})
            axes.set_xticks(ticks, [f"{x}" for x in ticks])
            axes.set_xlabel("pairs in the batch, 16 to 512 tokens" if axis == "batch" else "tokens a pair, 16 pairs")
            axes.set_ylabel("pairs per second")
            axes.set_title(
                dtype if content.get("device") == "cuda" else f"{dtype}, {threads} thread{'s' * (threads > 1)}", fontsize=9
            )
    grid[0][0].legend(fontsize=7)
    figure.suptitle(f"{content['scaling']['model']}\n{machine(content)}", fontsize=9)
    return figure


def bits(content: Content) -> Any:
    lines = content["scaling"]["bits"]
    dtypes = list(dict.fromkeys(p["dtype"] for p in lines))
    figure, row = plt.subplots(1, len(dtypes), figsize=(1.0 + 3.2 * len(dtypes), 2.8), layout="constrained", squeeze=False)
    for axes, dtype in zip(row[0], dtypes, strict=True):
        for way in dict.fromkeys(p["way"] for p in lines if p["dtype"] == dtype):
            of = [(p["batch"], p["differ"]) for p in lines if p["way"] == way and p["dtype"] == dtype]
            label = way if way == "stock" else f"ours, {way}"
            axes.plot(*zip(*of, strict=True), marker="o", markersize=3, color=colour(way), label=label)
        axes.set_xscale("log", base=2)
        ticks = sorted({p["batch"] for p in lines})
        axes.set_xticks(ticks, [f"{x}" for x in ticks])
        axes.set_xlabel("pairs in the batch")
        axes.set_ylabel(f"of {lines[0]['pairs']} pairs, bits differ")
        axes.set_title(dtype, fontsize=9)
    row[0][0].legend(fontsize=7)
    figure.suptitle(f"Logits that depend on the batch: {content['scaling']['model']}\n{machine(content)}", fontsize=9)
    return figure


def sparse(content: Content) -> Any:
    cases = [r for r in content["results"] if r.get("tokens") == 1 and " ReLU " in r["case"]]
    cases.sort(key=lambda r: r["active"])
    rows = [next(lines(r)) for r in cases]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    shares = [100 * r["active"] for r in cases]
    axes.plot(shares, [r["ours_ms"] for r in rows], marker="o", markersize=3, color=COLOURS["portable"], label="ours")
    axes.plot(shares, [r["theirs_ms"] for r in rows], color=COLOURS["stock"], label="stock, dense")
    axes.set_xlabel("neurons that are active, %")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0.0)
    axes.set_title(f"ReLU FFN, one token: {rows[0]['case'].split(' ')[2].rstrip(',')}, fp32\n{machine(content)}", fontsize=9)
    axes.legend(fontsize=7)
    return figure


FIGURES = {"price": ("", price), "throughput": ("scaling-", throughput), "bits": ("scaling-", bits), "sparse": ("", sparse)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws the runs that bench/out holds.")
    parser.add_argument("--data", type=pathlib.Path, default=OUT, help="where the JSON files are")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs", help="where the figures go")
    args = parser.parse_args(argv)
    data = kept(args.data)
    for device in ("cpu", "cuda"):
        for name, (kind, draw) in FIGURES.items():
            if (content := data.get(kind + device)) is None:
                print(f"{name}-{device}: no data in {args.data}")
                continue
            if (name == "sparse" and device != "cpu") or (figure := draw(content)) is None:
                continue
            path = args.out / f"{name}-{device}.svg"
            figure.savefig(path, metadata={"Date": None})
            plt.close(figure)
            print(f"{path}: {path.stat().st_size // 1024} KiB")
    return 0 if data else 2


if __name__ == "__main__":
    sys.exit(main())
