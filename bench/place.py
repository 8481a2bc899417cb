"""Writes the tables of bench/out's runs into pages: python bench/place.py [--data FOLDER] [PAGE ...]

A page holds `<!-- bench:NAME -->` and `<!-- /bench -->`, each on a line of its own; what stands between them is replaced, and
nothing else. NAMEs: those of TABLES below; figures-cpu and figures-cuda for all that bench/plot.py drew into docs,
figure-throughput-cpu for one of them. A table whose run is not there keeps what it had.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from results import ROOT, best_ratio, digits, kept, reach

sys.path.append(str(ROOT))
from tools import pages
from tools.pages import markdown

PAGES = ("README.md", "docs/SPEED.md")
Content = Mapping[str, Any]


def cpu(content: Content, models: bool) -> str:
    """A line for every rival, with its bar; who has no time says why."""
    rows = []
    for r in content["results"]:
        if (r["group"] == "model") == models:
            bar = "" if r["bar"] is None else f"{r['bar']:.2f}{', FALLS SHORT' if r['verdict'] == 'FALLS SHORT' else ''}"
            if r["ratio"] is None:
                cells = ("-", r["why"], "-")
            else:
                cells = (f"{digits(r['ours_ms'])} ms", f"{digits(r['theirs_ms'])} ms", f"{r['ratio']:.2f}")
            rows.append((r["case"], r["against"], *cells, bar))
    return markdown(("", "against", "rerank_kernels", "theirs", "theirs / ours", "bar"), rows)


def cpu_models_short(content: Content) -> str:
    """A line for every way of stock's; beside it the better ONNX Runtime, OpenVINO and MKL's strict mode, as ratios."""
    by_case: dict[str, dict[str, Content]] = {}
    for r in content["results"]:
        if r["group"] == "model":
            by_case.setdefault(r["case"], {})[r["against"]] = r
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
    return markdown(
        ("", "rerank_kernels", "stock", "stock / ours", "ONNX Runtime / ours", "OpenVINO / ours", "MKL strict / ours"), rows
    )


def _best_of(of: Mapping[str, Content], who: str) -> str:
    ratios = [r["ratio"] for name, r in of.items() if name.startswith(who) and r["ratio"] is not None]
    return f"{min(ratios):.2f}" if ratios else "-" if any(name.startswith(who) for name in of) else ""


SHORT_OPS = (
    *(f"linear {m}x768x3072" for m in (2048, 128, 1)),
    *("linear 1x768x768", "linear 2048x1024x4096", "linear 2048x768x3072 float16", "linear 2048x768x3072 bfloat16"),
    *("attention 16x128, 12 heads of 64", "attention 4x512, 12 heads of 64"),
    *("layer_norm + residual 2048x768", "softmax 12288x128", "activation gelu 2048x3072"),
    *("sparse_ffn ReLU 1x4096x11008, 10% active", "sparse_ffn ReLU 128x4096x11008, 10% active"),
)


def cpu_ops_short(content: Content) -> str:
    chosen = {r["case"]: r for r in reversed(content["results"]) if r["case"] in SHORT_OPS}  # a case's first rival stays
    return cpu({"results": [chosen[case] for case in SHORT_OPS if case in chosen]}, False)


def cpu_bits(content: Content) -> str:
    rows = []
    for r in content["bits"]:
        furthest = f"{r['furthest']:.1e}" if r["furthest"] else "0"
        rows.append((f"{r['dtype']}, {r['way']}", *(f"{n}" for n in r["differ"].values()), furthest))
    return markdown((f"of {content['bits'][0]['pairs']} pairs", *content["bits"][0]["differ"], "largest difference"), rows)


def cpu_memory(content: Content) -> str:
    rows = []
    for r in content["memory"]:
        sizes = (f"{r[n]:.0f} MiB" for n in ("ours_mib", "stock_mib"))
        rows.append((f"{r['model'].partition('/')[2]}, {r['step']}", *sizes, f"{r['ratio']:.2f}"))
    return markdown(("", "rerank_kernels", "stock", "ours / stock"), rows)


def cpu_limits(content: Content) -> str:
    top, *kernels = content["limits"]
    reading = f"{top['cache_gbs']:.0f} GB/s out of the last-level cache, {top['memory_gbs']:.0f} GB/s out of memory"
    said = f"{top['gflops']:.0f} GFLOP/s, {reading}"
    rows = []
    for r in kernels:
        limit = f"{digits(r['limit_ms'])} ms, {r['limited_by']}"
        rows.append(
            (
                r["case"],
                f"{r['fmas'] * 1e-6:.3g} M",
                f"{r['bytes'] * 1e-6:.3g} MB",
                limit,
                f"{digits(r['ms'])} ms",
                f"{r['reached']:.0%}",
            )
        )
    return f"{top['threads']} threads of this machine: {said}.\n\n" + markdown(
        ("", "fmas", "bytes", "limit", "taken", "reached"), rows
    )


def cpu_serving(content: Content) -> str:
    records = content["serving"]
    rows = [(r["way"], *(f"{rate:.1f}" for rate in r["rates"].values()), f"{r['ratio']:.2f}") for r in records]
    about = f"{facts(content)}\n"
    return about + markdown(("pairs a second", *records[0]["rates"], "ours / stock"), rows)


def gpu(content: Content, models: bool) -> str:
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
    return markdown(heads, rows)


def facts(content: Content) -> str:
    m = content["machine"]
    names = (
        ("gpu", "smi driver_version", "smi clocks.sm", "nvcc", "triton")
        if content.get("device") == "cuda"
        else ("cpu", "threads", "isa", "mkl", "MKL_CBWR", "onnxruntime", "openvino")
    )
    said = [f"{name.removeprefix('smi ')} {m[name]}" for name in (*names, "torch", "revision") if m.get(name)]
    return "(" + ", ".join(said) + ")\n"


def bits(*contents: Content) -> str:
    rows = []
    for content in contents:
        lines = content["scaling"]["bits"]
        for dtype, way in dict.fromkeys((p["dtype"], p["way"]) for p in lines):
            here = [p for p in lines if (p["dtype"], p["way"]) == (dtype, way) and p["batch"] > 1]
            furthest = max(p["furthest"] for p in here)
            counts = [f"{p['differ']}" for p in here]
            rows.append((f"{content.get('device', 'cpu')}, {dtype}, {way}", *counts, f"{furthest:.1e}" if furthest else "0"))
    sizes = [f"{p['batch']}" for p in contents[0]["scaling"]["bits"] if p["batch"] > 1]
    return markdown(("batches of", *dict.fromkeys(sizes), "largest difference"), rows)


# name -> the runs it needs, and how it is made of them
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "cpu-models": (("cpu",), lambda c: cpu(c, True)),
    "cpu-models-short": (("cpu",), cpu_models_short),
    "cpu-ops": (("cpu",), lambda c: cpu(c, False)),
    "cpu-ops-short": (("cpu",), cpu_ops_short),
    "cpu-bits": (("cpu",), cpu_bits),
    "cpu-memory": (("cpu",), cpu_memory),
    "cpu-limits": (("limits",), cpu_limits),
    "cpu-serving": (("serving",), cpu_serving),
    "cpu-machine": (("cpu",), facts),
    "gpu-models": (("cuda",), lambda c: gpu(c, True)),
    "gpu-ops": (("cuda",), lambda c: gpu(c, False)),
    "gpu-machine": (("cuda",), facts),
    "bits": (("scaling-cpu", "scaling-cuda"), bits),
}
HOLDS = {
    "cpu-bits": "bits",
    "cpu-memory": "memory",
    "cpu-limits": "limits",
    "cpu-serving": "serving",
}  # what of a run a table is made of, if a run may lack it

FIGURES = {
    "price": "how long the best of theirs takes, over ours",
    "throughput": "pairs per second over batch and length",
    "bits": "pairs whose bits hang on the batch",
    "sparse": "time of a sparse FFN over the share of active neurons",
}


def figures(device: str, page: pathlib.Path, folder: pathlib.Path, names: Iterable[str] = FIGURES) -> str:
    """A line for each figure that is there, as seen from the page."""
    there = {name: p for name in names if (p := folder / f"{name}-{device}.svg").is_file()}
    return "".join(f"![{FIGURES[n]}]({os.path.relpath(p, page.resolve().parent)})\n\n" for n, p in there.items())


def made(page: pathlib.Path, data: Mapping[str, Content], folder: pathlib.Path = ROOT / "docs") -> pages.Contents:
    """Name of a table or of figures -> its text on the page; None: there is no run that it could be made of."""

    def each() -> Iterator[tuple[str, str | None]]:
        for name, (needs, make) in TABLES.items():
            have = [data[need] for need in needs if need in data and HOLDS.get(name, "machine") in data[need]]
            yield name, make(*have) if have else None
        for device in ("cpu", "cuda"):
            yield f"figures-{device}", figures(device, page, folder) or None
            for name in FIGURES:
                yield f"figure-{name}-{device}", figures(device, page, folder, [name]) or None

    return dict(each())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of bench/out's runs into pages, between their markers.")
    parser.add_argument("pages", nargs="*", type=pathlib.Path, metavar="PAGE", help=f"default: {', '.join(PAGES)}")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "bench" / "out", help="where the JSON files are")
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
