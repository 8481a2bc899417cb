"""The tables of a run, on the console and in pages: python -m bench.pages.tables [--data FOLDER] [PAGE ...]

A page holds `<!-- bench:NAME -->` and `<!-- /bench -->` (tools/pages.py). NAMEs: those of TABLES below; figures-cpu and
figures-cuda for all that plot.py drew into docs, figure-throughput-cpu for one of them. A table whose run is not there keeps
what it had.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from bench import OUT, ROOT
from bench.pages.results import best_ratio, digits, kept, lines, reach
from tools import pages

PAGES = ("README.md", "docs/SPEED.md")
Content = Mapping[str, Any]
Rows = Iterable[Sequence[str]]


class Table(NamedTuple):
    heads: Sequence[str]
    rows: Rows
    about: str = ""

    def page(self) -> str:
        return (f"{self.about}\n\n" if self.about else "") + pages.markdown(self.heads, self.rows)

    def show(self, console: Console) -> None:
        drawn = Drawn()
        for number, name in enumerate(self.heads):
            drawn.add_column(name, justify="right" if number > 1 else "left", no_wrap=number < 2)
        for row in self.rows:
            drawn.add_row(*(Text(cell[:48], "bold red" if "FALLS SHORT" in cell or cell == "SLOWER" else "") for cell in row))
        if self.about:
            console.print(self.about, markup=False, highlight=False)
        console.print(drawn)


def cpu(content: Content, kind: str | None = None, only: Sequence[str] | None = None) -> Table:
    """One line per rival, with its bar; who has no time says why. kind: of model, decoder and op."""
    rows = []
    for r in content["results"]:
        if kind in (None, r["group"] if r["group"] in ("model", "decoder") else "op"):
            for line in list(lines(r))[: 1 if only else None]:
                bar = "" if line["bar"] is None else f"{line['bar']:.2f}{', FALLS SHORT' * (line['verdict'] == 'FALLS SHORT')}"
                if line["ratio"] is None:
                    cells = ("-", line["why"], "-")
                else:
                    cells = (f"{digits(line['ours_ms'])} ms", f"{digits(line['theirs_ms'])} ms", f"{line['ratio']:.2f}")
                rows.append((r["case"], line["against"], *cells, bar))
    if only:
        rows = sorted((row for row in rows if row[0] in only), key=lambda row: only.index(row[0]))
    return Table(("", "against", "rerank_kernels", "theirs", "theirs / ours", "bar"), rows)


def cpu_models_short(content: Content) -> Table:
    """One line per way of stock's; beside it the better ONNX Runtime, OpenVINO and MKL's strict setting, as ratios."""
    by_case = {r["case"]: {line["against"]: line for line in lines(r)} for r in content["results"] if r["group"] == "model"}
    rows = []
    for case, of in by_case.items():
        stock = [n for n in of if n.startswith("stock") and not n.endswith("MKL strict")]
        for name in stock:
            # engines ran one by one where lengths are mixed, so they stand beside stock's one by one
            beside = name == stock[-1]
            engines = [_best_of(of, who) if beside else "" for who in ("ONNX Runtime", "OpenVINO")]
            times = f"{digits(of[name]['ours_ms'])} ms", f"{digits(of[name]['theirs_ms'])} ms", f"{of[name]['ratio']:.2f}"
            way = "" if len(stock) == 1 else f", {name.partition(', ')[2]}"
            rows.append((f"{case}{way}", *times, *engines, _best_of(of, f"{name}, MKL strict")))
    heads = ("", "rerank_kernels", "stock", "stock / ours", "ONNX Runtime / ours", "OpenVINO / ours", "MKL strict / ours")
    return Table(heads, rows)


def _best_of(of: Mapping[str, Content], who: str) -> str:
    ratios = [r["ratio"] for name, r in of.items() if name.startswith(who) and r["ratio"] is not None]
    return f"{min(ratios):.2f}" if ratios else "-" if any(name.startswith(who) for name in of) else ""


def cpu_bits(content: Content) -> Table:
    first = content["bits"][0]
    rows = [(f"{r['dtype']}, {r['way']}", *map(str, r["differ"].values()), _largest(r["furthest"])) for r in content["bits"]]
    return Table((f"of {first['pairs']} pairs", *first["differ"], "largest difference"), rows)


def _largest(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


def cpu_memory(content: Content) -> Table:
    rows = []
    for r in content["memory"]:
        sizes = (f"{r[n]:.0f} MiB" for n in ("ours_mib", "stock_mib"))
        short = f"{r['ratio']:.2f}{', FALLS SHORT' * (r['verdict'] == 'FALLS SHORT')}"
        rows.append((f"{r['model'].partition('/')[2]}, {r['step']}", *sizes, short))
    return Table(("", "rerank_kernels", "stock", "ours / stock"), rows)


def cpu_limits(content: Content) -> Table:
    top, *kernels = content["limits"]
    reading = f"{top['cache_gbs']:.0f} GB/s out of the last-level cache, {top['memory_gbs']:.0f} GB/s out of memory"
    about = f"{top['threads']} threads of this machine: {top['gflops']:.0f} GFLOP/s, {reading}."
    rows = []
    for r in kernels:
        work = f"{r['fmas'] * 1e-6:.3g} M", f"{r['bytes'] * 1e-6:.3g} MB"
        times = f"{digits(r['limit_ms'])} ms, {r['limited_by']}", f"{digits(r['ms'])} ms"
        rows.append((r["case"], *work, *times, f"{r['reached']:.0%}"))
    return Table(("", "fmas", "bytes", "limit", "taken", "reached"), rows, about)


def cpu_serving(content: Content) -> Table:
    records = content["serving"]
    rows = [(r["way"], *(f"{rate:.1f}" for rate in r["rates"].values()), f"{r['ratio']:.2f}") for r in records]
    return Table(("pairs per second", *records[0]["rates"], "ours / stock"), rows, facts(content).rstrip())


def gpu(content: Content, models: bool) -> Table:
    """Ours is the better of the two backends, named; theirs the best of all that ran."""
    rows = []
    for r in content["results"]:
        if (r["group"] == "model") != models:
            continue
        cells = [r["case"]]
        theirs = ""
        for mode in ("portable", "tensor"):
            found = best_ratio(r["contestants"], mode)
            if found is None:
                cells += ["-", "-"]
                continue
            ours, rival, ratio = found
            theirs = f"{digits(r['contestants'][rival]['ms'])} ms, {rival}"
            cells += [f"{digits(r['contestants'][ours]['ms'])} ms, {ours.partition(' ')[0]}", f"{ratio:.2f}"]
        rows.append((cells[0], theirs or "-", *cells[1:], reach(r)))
    heads = ("", "theirs, the best", "portable", "theirs / portable", "tensor", "theirs / tensor", "ours reaches")
    return Table(heads, rows)


def show_gpu(console: Console, content: Content) -> None:
    """What matters most comes last: a log may be cut at its beginning."""
    said: dict[tuple[str, str], list[str]] = {}
    for r in content["results"]:
        for name, c in r["contestants"].items():
            if "ms" not in c:
                said.setdefault((name, c.get("wrong") or c["error"]), []).append(r["case"])
    words = [f"{name}: {why[:200]} ({where[0]} and {len(where) - 1} more)" for (name, why), where in said.items()]
    words += [f"{of}: " + ", ".join(f"{k} {v}" for k, v in content.get(of, {}).items()) for of in ("machine", "machine_after")]
    if content["not_measured"]:
        words.append(f"not measured, out of time: {', '.join(content['not_measured'])}"[:600])
    console.print("\n".join(words), markup=False, highlight=False, soft_wrap=True)
    for models in (False, True):
        gpu(content, models).show(console)
    console.print(f"{content['seconds']:.0f} s in all", highlight=False)


def facts(content: Content) -> str:
    m = content["machine"]
    names = (
        ("gpu", "smi driver_version", "smi clocks.sm", "nvcc", "triton")
        if content.get("device") == "cuda"
        else ("cpu", "threads", "isa", "mkl", "MKL_CBWR", "onnxruntime", "openvino")
    )
    said = [f"{name.removeprefix('smi ')} {m[name]}" for name in (*names, "torch", "revision") if m.get(name)]
    return "(" + ", ".join(said) + ")\n"


def bits(*contents: Content) -> Table:
    rows = []
    for content in contents:
        points = content["scaling"]["bits"]
        for dtype, way in dict.fromkeys((p["dtype"], p["way"]) for p in points):
            here = [p for p in points if (p["dtype"], p["way"]) == (dtype, way) and p["batch"] > 1]
            counts = (str(p["differ"]) for p in here)
            rows.append(
                (f"{content.get('device', 'cpu')}, {dtype}, {way}", *counts, _largest(max(p["furthest"] for p in here)))
            )
    sizes = dict.fromkeys(str(p["batch"]) for p in contents[0]["scaling"]["bits"] if p["batch"] > 1)
    return Table(("batches of", *sizes, "largest difference"), rows)


SHORT_OPS = (
    *(f"linear {m}x768x3072" for m in (2048, 128, 1)),
    *("linear 1x768x768", "linear 2048x1024x4096", "linear 2048x768x3072 float16", "linear 2048x768x3072 bfloat16"),
    *("attention 16x128, 12 heads of 64", "attention 4x512, 12 heads of 64"),
    *("layer_norm + residual 2048x768", "softmax 12288x128", "activation gelu 2048x3072"),
    *("sparse_ffn ReLU 1x4096x11008, 10% active", "sparse_ffn ReLU 128x4096x11008, 10% active"),
)
STUDIES: dict[str, Callable[[Content], Table]] = {  # what a run may hold besides results
    "memory": cpu_memory,
    "bits": cpu_bits,
    "limits": cpu_limits,
    "serving": cpu_serving,
}
# name -> the runs it needs, what of a run it is made of, and how
TABLES: dict[str, tuple[tuple[str, ...], str, Callable[..., Table | str]]] = {
    "cpu-models": (("cpu",), "results", lambda c: cpu(c, "model")),
    "cpu-models-short": (("cpu",), "results", cpu_models_short),
    "cpu-ops": (("cpu",), "results", lambda c: cpu(c, "op")),
    "cpu-ops-short": (("cpu",), "results", lambda c: cpu(c, "op", SHORT_OPS)),
    "cpu-decoders": (("decoders",), "results", lambda c: cpu(c, "decoder")._replace(about=facts(c).rstrip())),
    "cpu-machine": (("cpu",), "machine", facts),
    "gpu-models": (("cuda",), "results", lambda c: gpu(c, True)),
    "gpu-ops": (("cuda",), "results", lambda c: gpu(c, False)),
    "gpu-machine": (("cuda",), "machine", facts),
    "bits": (("scaling-cpu", "scaling-cuda"), "scaling", bits),
    **{f"cpu-{name}": ((name if name in ("limits", "serving") else "cpu",), name, made) for name, made in STUDIES.items()},
}

FIGURES = {
    "price": "how long the best of theirs takes, over ours",
    "throughput": "pairs per second over batch and length",
    "bits": "pairs whose bits depend on the batch",
    "sparse": "time of a sparse FFN over the share of active neurons",
}


def figures(device: str, page: pathlib.Path, folder: pathlib.Path, names: Iterable[str] = FIGURES) -> str:
    """A line for each figure that is there, as seen from the page."""
    there = {name: p for name in names if (p := folder / f"{name}-{device}.svg").is_file()}
    return "".join(f"![{FIGURES[n]}]({os.path.relpath(p, page.resolve().parent)})\n\n" for n, p in there.items())


def made(page: pathlib.Path, data: Mapping[str, Content], folder: pathlib.Path = ROOT / "docs") -> pages.Contents:
    """Name of a table or of figures -> its text on the page; None: there is no run that it could be made of."""

    def each() -> Iterator[tuple[str, str | None]]:
        for name, (needs, part, make) in TABLES.items():
            have = [data[need] for need in needs if part in data.get(need, ())]
            table = make(*have) if have else None
            yield name, table.page() if isinstance(table, Table) else table
        for device in ("cpu", "cuda"):
            yield f"figures-{device}", figures(device, page, folder) or None
            for name in FIGURES:
                yield f"figure-{name}-{device}", figures(device, page, folder, [name]) or None

    return dict(each())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of bench/out's runs into pages, between their markers.")
    parser.add_argument("pages", nargs="*", type=pathlib.Path, metavar="PAGE", help=f"default: {', '.join(PAGES)}")
    parser.add_argument("--data", type=pathlib.Path, default=OUT, help="where the JSON files are")
    args = parser.parse_args(argv)
    data = kept(args.data)
    for path in args.pages or [ROOT / name for name in PAGES]:
        contents = made(path, data)
        written = ", ".join(pages.write(path, "bench", contents)) or "nothing new"
        left = ", ".join(b.name for b in pages.blocks(path.read_text(), "bench") if contents[b.name] is None)
        print(f"{path}: {written}" + (f"; no run, left as it was: {left}" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
