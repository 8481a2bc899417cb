"""The tables of a run, on the console and in pages: python -m bench.pages.tables [--data FOLDER] [--out docs] [PAGE ...]

A page holds `<!-- bench:NAME -->` and `<!-- /bench -->` (tools/pages.py). NAMEs: those of TABLES below; figures-cpu and
figures-cuda for all that plot.py drew into docs, figure-throughput-cpu for one of them. A table whose run is not there keeps
what it had.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from bench import OUT, ROOT
from bench.pages.results import ALONE, digits, kept, lines, lost, reach, said
from tools import pages

PAGES = ("README.md", "docs/SPEED.md")
MODES = ("portable", "tensor")
Content = Mapping[str, Any]
SHORT_OPS = (
    *(f"linear {m}x768x3072" for m in (2048, 128, 1)),
    *("linear 1x768x768", "linear 2048x1024x4096", "linear 2048x768x3072 float16", "linear 2048x768x3072 bfloat16"),
    *("attention 16x128, 12 heads of 64", "attention 4x512, 12 heads of 64"),
    *("layer_norm + residual 2048x768", "softmax 12288x128", "activation gelu 2048x3072"),
    *("sparse_ffn ReLU 1x4096x11008, 10% active", "sparse_ffn ReLU 128x4096x11008, 10% active"),
)


class Table(NamedTuple):
    heads: Sequence[str]
    rows: Iterable[Sequence[str]]
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


def facts(content: Content) -> str:
    m, on_a_gpu = content["machine"], content.get("device") == "cuda"
    of_cpu = ("cpu", "threads", "isa", "mkl", "MKL_CBWR", "onnxruntime", "openvino")
    names = ("gpu", "smi driver_version", "smi clocks.sm", "nvcc", "triton") if on_a_gpu else of_cpu
    words = [f"{name.removeprefix('smi ')} {m[name]}" for name in (*names, "torch", "revision") if m.get(name)]
    return "(" + ", ".join(words) + ")\n"


# ---- contests --------------------------------------------------------------------------------------------------------------


def of_kind(content: Content, kind: str | None) -> list[Content]:
    """kind: of model, decoder and op; None: all."""
    results = content["results"]
    return [r for r in results if kind in (None, r["group"] if r["group"] in ("model", "decoder") else "op")]


def raced(content: Content, kind: str | None = None, only: Sequence[str] = ()) -> Table:
    """A run on a CPU: one line per rival, with its bar; who has no time says why. only: these cases, and of each the first."""
    rows = []
    for r in of_kind(content, kind):
        for line in list(lines(r))[: 1 if only else None]:
            cells = ("-", line.get("why", ""), "-")
            if line["ratio"] is not None:
                cells = (f"{digits(line['ours_ms'])} ms", f"{digits(line['theirs_ms'])} ms", f"{line['ratio']:.2f}")
            bar = "" if line["bar"] is None else f"{line['bar']:.2f}{', FALLS SHORT' * (line['verdict'] == 'FALLS SHORT')}"
            rows.append((r["case"], line["against"], *cells, bar))
    if only:
        rows = sorted((row for row in rows if row[0] in only), key=lambda row: only.index(row[0]))
    return Table(("", "against", "rerank_kernels", "theirs", "theirs / ours", "bar"), rows)


def cpu_models_short(content: Content) -> Table:
    """One line per way of stock's; beside it the better ONNX Runtime, OpenVINO and MKL's strict setting, as ratios."""
    rows = []
    for r in of_kind(content, "model"):
        of = {line["against"]: line for line in lines(r)}
        stock = [n for n in of if n.startswith("stock") and not n.endswith("MKL strict")]
        for name in stock:
            # engines ran one by one where lengths are mixed, so they stand beside stock's one by one
            engines = [_best_of(of, who) if name == stock[-1] else "" for who in ("ONNX Runtime", "OpenVINO")]
            times = f"{digits(of[name]['ours_ms'])} ms", f"{digits(of[name]['theirs_ms'])} ms", f"{of[name]['ratio']:.2f}"
            way = "" if len(stock) == 1 else f", {name.partition(', ')[2]}"
            rows.append((f"{r['case']}{way}", *times, *engines, _best_of(of, f"{name}, MKL strict")))
    heads = ("", "rerank_kernels", "stock", "stock / ours", "ONNX Runtime / ours", "OpenVINO / ours", "MKL strict / ours")
    return Table(heads, rows)


def _best_of(of: Mapping[str, Content], who: str) -> str:
    ratios = [line["ratio"] for name, line in of.items() if name.startswith(who)]
    timed = [ratio for ratio in ratios if ratio is not None]
    return f"{min(timed):.2f}" if timed else "-" if ratios else ""


def gpu(content: Content, kind: str | None = None, best: bool = False) -> Table:
    """One line per rival, or for the best of them; ours is the better of the two backends, named."""
    rows = []
    for r in of_kind(content, kind):
        cells = r["contestants"]
        rivals = [n for n, c in cells.items() if not c["ours"]]
        if best and (timed := [n for n in rivals if "ms" in cells[n]]):
            rivals = [min(timed, key=lambda n: cells[n]["ms"])]
        for rival in rivals:
            row = [r["case"], rival, lost(cells[rival]) or said(cells[rival])]
            for line in (line for mode in MODES for line in lines(r, mode) if line["against"] == rival):
                if line["ratio"] is None:
                    row += ["-", "-"]
                else:
                    row += [f"{said(cells[line['ours']])}, {line['ours'].partition(' ')[0]}", f"{line['ratio']:.2f}"]
            rows.append((*row, reach(r)))
    heads = ("", "the best of theirs" if best else "against", "theirs", *(w for m in MODES for w in (m, f"theirs / {m}")))
    return Table((*heads, "ours reaches"), rows)


def show(console: Console, content: Content) -> None:
    """What matters most comes last: a log may be cut at its beginning."""
    on_gpu = content.get("device") == "cuda"
    why: dict[tuple[str, str], list[str]] = {}
    for r in content["results"]:
        for name, cell in r["contestants"].items():
            if reason := lost(cell):
                why.setdefault((name, reason), []).append(r["case"])
    words = [f"{name}: {reason[:200]} ({where[0]} and {len(where) - 1} more)" for (name, reason), where in why.items()]
    for of in ("machine", "machine_after"):
        words += ["   ".join(f"{k}: {v}" for k, v in content[of].items())] if of in content else []
    if content.get("not_measured"):
        words.append(f"not measured, out of time: {', '.join(content['not_measured'])}"[:600])
    console.print("\n".join(words), markup=False, highlight=False, soft_wrap=True)
    for table in [gpu(content, "op"), gpu(content, "model")] if on_gpu else [raced(content)] if content["results"] else []:
        table._replace(about="theirs / ours: above 1 ours is faster; the gate passed for every line").show(console)
    for name, made in STUDIES.items():
        if name in content:
            made(content).show(console)


# ---- studies ---------------------------------------------------------------------------------------------------------------


def strictly(content: Content) -> Table:
    first = content["bits"][0]
    rows = [(f"{r['dtype']}, {r['way']}", *map(str, r["differ"].values()), _largest(r["furthest"])) for r in content["bits"]]
    return Table((f"of {first['pairs']} pairs", *first["differ"], "largest difference"), rows)


def _largest(difference: float) -> str:
    return f"{difference:.1e}" if difference else "0"


def memory(content: Content) -> Table:
    rows = []
    for r in content["memory"]:
        sizes = (f"{r[n]:.0f} MiB" for n in ("ours_mib", "stock_mib"))
        short = f"{r['ratio']:.2f}{', FALLS SHORT' * (r['verdict'] == 'FALLS SHORT')}"
        rows.append((f"{r['model'].partition('/')[2]}, {r['step']}", *sizes, short))
    return Table(("", "rerank_kernels", "stock", "ours / stock"), rows)


def limits(content: Content) -> Table:
    top, *kernels = content["limits"]
    reading = f"{top['cache_gbs']:.0f} GB/s out of the last-level cache, {top['memory_gbs']:.0f} GB/s out of memory"
    about = f"{top['threads']} threads of this machine: {top['gflops']:.0f} GFLOP/s, {reading}."
    rows = []
    for r in kernels:
        work = f"{r['fmas'] * 1e-6:.3g} M", f"{r['bytes'] * 1e-6:.3g} MB"
        times = f"{digits(r['limit_ms'])} ms, {r['limited_by']}", f"{digits(r['ms'])} ms"
        rows.append((r["case"], *work, *times, f"{r['reached']:.0%}"))
    return Table(("", "fmas", "bytes", "limit", "taken", "reached"), rows, about)


def serving(content: Content) -> Table:
    records = content["serving"]
    rows = [(r["way"], *(f"{rate:.1f}" for rate in r["rates"].values()), f"{r['ratio']:.2f}") for r in records]
    return Table(("pairs per second", *records[0]["rates"], "ours / stock"), rows, facts(content).rstrip())


def bits(*contents: Content) -> Table:
    rows = []
    for content in contents:
        points = [p for p in content["scaling"]["bits"] if p["batch"] > 1]
        for dtype, way in dict.fromkeys((p["dtype"], p["way"]) for p in points):
            here = [p for p in points if (p["dtype"], p["way"]) == (dtype, way)]
            name, furthest = f"{content.get('device', 'cpu')}, {dtype}, {way}", max(p["furthest"] for p in here)
            rows.append((name, *(str(p["differ"]) for p in here), _largest(furthest)))
    sizes = dict.fromkeys(str(p["batch"]) for p in contents[0]["scaling"]["bits"] if p["batch"] > 1)
    return Table(("batches of", *sizes, "largest difference"), rows)


# ---- pages -----------------------------------------------------------------------------------------------------------------

STUDIES = {"memory": memory, "bits": strictly, "limits": limits, "serving": serving}  # what a run may hold besides results
# name -> the runs it needs, what of a run it is made of, and how
TABLES: dict[str, tuple[tuple[str, ...], str, Callable[..., Table | str]]] = {
    "cpu-models": (("cpu",), "results", lambda c: raced(c, "model")),
    "cpu-models-short": (("cpu",), "results", cpu_models_short),
    "cpu-ops": (("cpu",), "results", lambda c: raced(c, "op")),
    "cpu-ops-short": (("cpu",), "results", lambda c: raced(c, "op", SHORT_OPS)),
    "cpu-decoders": (("decoders",), "results", lambda c: raced(c, "decoder")._replace(about=facts(c).rstrip())),
    "cpu-machine": (("cpu",), "machine", facts),
    "gpu-models": (("cuda",), "results", lambda c: gpu(c, "model")),
    "gpu-ops": (("cuda",), "results", lambda c: gpu(c, "op", best=True)),
    "gpu-machine": (("cuda",), "machine", facts),
    "bits": (("scaling-cpu", "scaling-cuda"), "scaling", bits),
    **{f"cpu-{name}": ((name if name in ALONE else "cpu",), name, made) for name, made in STUDIES.items()},
}
FIGURES = {
    "price": "how long the best of theirs takes, over ours",
    "throughput": "pairs per second over batch and length",
    "bits": "pairs whose bits depend on the batch",
    "sparse": "time of a sparse FFN over the share of active neurons",
}


def made(page: pathlib.Path, data: Mapping[str, Content], folder: pathlib.Path) -> pages.Contents:
    """Name of a table or of figures -> its text on the page; None: there is no run that it could be made of."""
    found: dict[str, str | None] = {}
    for name, (needs, part, make) in TABLES.items():
        have = [data[need] for need in needs if part in data.get(need, ())]
        table = make(*have) if have else None
        found[name] = table.page() if isinstance(table, Table) else table
    for device in ("cpu", "cuda"):
        drawn = {name: folder / f"{name}-{device}.svg" for name in FIGURES}
        there = page.resolve().parent
        shown = {n: f"![{FIGURES[n]}]({os.path.relpath(p, there)})\n\n" if p.is_file() else "" for n, p in drawn.items()}
        found[f"figures-{device}"] = "".join(shown.values()) or None
        found |= {f"figure-{name}-{device}": text or None for name, text in shown.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws bench/out's runs, and writes their tables into pages.")
    parser.add_argument("pages", nargs="*", type=pathlib.Path, metavar="PAGE", help=f"default: {', '.join(PAGES)}")
    parser.add_argument("--data", type=pathlib.Path, default=OUT, help="where the JSON files are")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs", help="where the figures go")
    args = parser.parse_args(argv)
    data = kept(args.data)
    try:
        from bench.pages import plot
    except ImportError as error:
        print(f"the figures stay as they are: {error}")
    else:
        plot.draw(data, args.out)
    for path in args.pages or [ROOT / name for name in PAGES]:
        contents = made(path, data, args.out)
        written = ", ".join(pages.write(path, "bench", contents)) or "nothing new"
        left = ", ".join(b.name for b in pages.blocks(path.read_text(), "bench") if contents[b.name] is None)
        print(f"{path}: {written}" + (f"; no run, left as it was: {left}" if left else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
