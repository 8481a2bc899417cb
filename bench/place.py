"""Writes the tables of bench/out's runs into pages: python bench/place.py [--data FOLDER] [PAGE ...]

A page holds `<!-- bench:NAME -->` and `<!-- /bench -->`, each on a line of its own; what stands between them is replaced, and
nothing else. NAMEs: cpu-models, cpu-ops, cpu-machine, gpu-models, gpu-ops, gpu-machine, bits. A table whose run is not there
keeps what it had; a page without markers is left alone.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from results import ROOT, best_ratio, digits, kept, reach

PAGES = ("README.md", "docs/GPU.md", "docs/SPEED.md")
Content = Mapping[str, Any]
MARKED = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cpu(content: Content, models: bool) -> str:
    rows = [
        (r["case"], r["against"], f"{digits(r['ours_ms'])} ms", f"{digits(r['theirs_ms'])} ms", f"{r['ratio']:.2f}")
        for r in content["results"]
        if r["case"].startswith("bge-reranker") == models
    ]
    return markdown(("", "against", "rerank_kernels", "theirs", "theirs / ours"), rows)


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
        else ("cpu", "threads", "isa")
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
    "cpu-ops": (("cpu",), lambda c: cpu(c, False)),
    "cpu-machine": (("cpu",), facts),
    "gpu-models": (("cuda",), lambda c: gpu(c, True)),
    "gpu-ops": (("cuda",), lambda c: gpu(c, False)),
    "gpu-machine": (("cuda",), facts),
    "bits": (("scaling-cpu", "scaling-cuda"), bits),
}


def placed(page: str, data: Mapping[str, Content]) -> tuple[str, list[str]]:
    """The page with its tables, and what was done."""
    said: list[str] = []

    def table(match: re.Match[str]) -> str:
        begin, name, _, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        needs, make = TABLES[name]
        have = [data[need] for need in needs if need in data]
        if not have:
            said.append(f"{name}: no run, left as it was")
            return match.group(0)
        said.append(f"{name}: written")
        return begin + make(*have) + end

    return MARKED.sub(table, page), said


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the tables of bench/out's runs into pages, between their markers.")
    parser.add_argument("pages", nargs="*", type=pathlib.Path, metavar="PAGE", help=f"default: {', '.join(PAGES)}")
    parser.add_argument("--data", type=pathlib.Path, default=ROOT / "bench" / "out", help="where the JSON files are")
    args = parser.parse_args(argv)
    data = kept(args.data)
    for path in args.pages or [p for name in PAGES if (p := ROOT / name).is_file()]:
        page, said = placed(path.read_text(), data)
        path.write_text(page)
        print(f"{path}: {'; '.join(said) or 'no markers'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
