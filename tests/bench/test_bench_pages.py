"""From a run's file to a figure and a table: the numbers on a page are the file's, and nothing else on the page changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench import run
from bench.cases import contests, scaling, shapes
from bench.pages import results, tables
from tools import pages

TINY = shapes.Shape("Bert", 2, 32, 64, 2, 3000, 514)
FACTS = {
    "cpu": "a CPU",
    "gpu": "a GPU",
    "torch": "2",
    "revision": "abc",
    "threads": 2,
    "isa": "avx2",
    "smi driver_version": "7",
}


def raced(case: str, ours: float, *rivals: tuple[Any, ...], group: str = "linear", **about: Any) -> dict[str, Any]:
    """A case; a rival is (name, ms or why there is none, bar or nothing). Who is away has the very same rounds with ours."""
    cells: dict[str, Any] = {"cpu portable": {"ours": True, "ms": ours, "all_ms": [ours]}}
    for name, theirs, *bar in rivals:
        timed = {"why": theirs} if isinstance(theirs, str) else {"ms": theirs, "all_ms": [theirs]}
        cells[name] = {"ours": False, **timed, **({"bar": bar[0]} if bar else {})}
    return {"case": case, "group": group, "flops": 1.0, "bytes": 1.0, **about, "contestants": cells}


STRICT = "stock, SDPA, MKL strict"
CPU = [
    raced("linear 1", 2.0, ("F.linear", 3.0, 1.2), ("F.linear, MKL strict", 1.0, 1.0)),
    raced("linear 1x768x3072", 2.0, ("F.linear", 5.0), ("F.linear, MKL strict", 7.0)),
    raced("linear 64x768x3072", 2.0, ("F.linear", 5.0)),
    *(
        raced(f"sparse_ffn ReLU 1x8x9, {a:.0%} active", a, ("dense F.linear", 1.5), group="sparse_ffn", tokens=1, active=a)
        for a in (0.5, 0.1)
    ),
    raced(
        "bge-reranker-base, 1x8",
        1000.0,
        ("stock, SDPA", 2340.0),
        *(("ONNX Runtime", 1500.0), ("ONNX Runtime, fused", 1200.0), ("OpenVINO", "not installed: it"), (STRICT, 3000.0)),
        group="model",
    ),
    raced(
        "bge-reranker-base, 3 of 1 to 2",
        1000.0,
        *(("stock, padded", 9000.0), ("stock, one by one", 4000.0), ("OpenVINO, one by one", 3000.0)),
        group="model",
    ),
]
MEMORY = [{"model": "a/b", "step": "8x128", "stock_mib": 200.0, "ours_mib": 220.0, "ratio": 1.1, "bar": 1.15, "verdict": "ok"}]
BITS = [
    {"model": "m", "way": w, "dtype": "fp32", "pairs": 8, "differ": {"padding": d}, "furthest": d * 1e-7}
    for w, d in (("stock", 5), ("ours", 0))
]
DECODERS = [raced("llama, 1x8, fp32", 1.0, ("stock, SDPA", 4.0, 1.0), group="decoder")]
SERVING = [{"way": "2 processes", "model": "m", "rates": {"stock": 5.0, "ours": 12.5}, "ratio": 2.5}]
LIMITS = [
    {"threads": 2, "gflops": 99.0, "cache_gbs": 9.0, "memory_gbs": 8.0},
    {"case": "gelu 1x2", "fmas": 3e6, "bytes": 4e6, "limit_ms": 1.0, "limited_by": "memory", "ms": 2.0, "reached": 0.5},
]


def timed(ours: bool, *ms: float) -> dict[str, Any]:
    return {"ours": ours, "ms": sorted(ms)[len(ms) // 2], "all_ms": list(ms)}


GPU = {
    "cuda portable": timed(True, 4.0, 4.0, 4.0),
    "triton portable": timed(True, 5.0, 5.0, 5.0),
    "cuda tensor": {"ours": True, "error": "no"},
    "triton tensor": timed(True, 1.0, 1.0, 2.0),
    "eager": timed(False, 3.0, 3.0, 3.0),
    "compile": {**timed(False, 2.0, 2.0, 2.0), "call_ms": 2.5},
    "varlen": {"ours": False, "why": "not installed: it"},
}
CASES = [
    {"case": "linear 1x8x8 fp16", "group": "linear", "flops": 3e9, "bytes": 1e7, "contestants": GPU},
    {"case": "base 1x8 fp16", "group": "model", "flops": 1e6, "bytes": 3e6, "contestants": GPU},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    way = {"dtype": "fp32", "threads": 1, "seconds": 1.0}
    points = [
        {"axis": a, "x": x, "way": w, "pairs_per_s": x * f, **way}
        for a in ("batch", "length")
        for x in (1, 4)
        for w, f in (("stock, padded", 2.0), ("cpu portable", 3.0))
    ]
    bits = [
        {"way": w, "dtype": "fp32", "batch": b, "pairs": 8, "differ": d * (b > 1), "furthest": d * 1e-7 * (b > 1)}
        for w, d in (("stock", 5), ("cpu portable", 0))
        for b in (1, 2, 4)
    ]
    files: dict[str, dict[str, Any]] = {
        "old": {"results": [raced("linear 1", 2.0, ("F.linear", 18.0))]},
        "new": {"results": CPU, "memory": MEMORY, "bits": BITS},
        "only": {"results": [], "only": ["linear"]},
        "limits": {"results": [], "only": ["limits"], "limits": LIMITS},
        "serving": {"results": [], "only": ["serving"], "serving": SERVING},
        "decoders": {"results": DECODERS, "only": ["llama"]},
        "quick decoders": {"results": [], "quick": True, "only": ["llama"]},
        "quick": {"results": [], "quick": True},
        "against": {"results": [], "against": "HEAD"},
        "gpu": {"results": CASES, "device": "cuda"},
        "scaling": {"scaling": {"model": "m", "points": points, "bits": bits}, "device": "cpu"},
    }
    for age, (name, content) in enumerate(files.items()):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"machine": FACTS, "quick": False, **content}))
        os.utime(path, (1000 + age, 1000 + age))
    return folder


def test_the_newest_whole_run_of_each_kind(data: Path) -> None:
    found = results.kept(data)
    assert set(found) == {"cpu", "cuda", "scaling-cpu", "limits", "serving", "decoders"}
    assert found["cpu"]["results"] == CPU


def test_tables_stand_between_their_markers(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["cpu-models", "cpu-models-short", "cpu-ops", "cpu-ops-short", "cpu-bits", "cpu-memory", "cpu-machine"]
    names += ["cpu-limits", "cpu-serving", "cpu-decoders"]
    names += ["gpu-models", "gpu-ops", "gpu-machine", "bits"]
    assert set(names) == set(tables.TABLES)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "".join(f"<!-- bench:{n} -->\nold {n}\n<!-- /bench -->\nkept {n}\n" for n in names))
    assert tables.main(["--data", str(data), str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and all(f"kept {n}\n" in text for n in names) and text.startswith("before\n")
    assert "| bge-reranker-base, 1x8 | stock, SDPA | 1000 ms | 2340 ms | 2.34 |  |" in text
    assert "| bge-reranker-base, 1x8 | OpenVINO | - | not installed: it | - |  |" in text
    assert "| linear 1 | F.linear | 2.00 ms | 3.00 ms | 1.50 | 1.20 |" in text
    assert "| linear 1 | F.linear, MKL strict | 2.00 ms | 1.00 ms | 0.50 | 1.00, FALLS SHORT |" in text
    # the short forms: the better ONNX Runtime, engines beside stock's last way, strict beside the way it is of
    assert "| bge-reranker-base, 1x8 | 1000 ms | 2340 ms | 2.34 | 1.20 | - | 3.00 |" in text
    assert "| bge-reranker-base, 3 of 1 to 2, padded | 1000 ms | 9000 ms | 9.00 |  |  |  |" in text
    assert "| bge-reranker-base, 3 of 1 to 2, one by one | 1000 ms | 4000 ms | 4.00 |  | 3.00 |  |" in text
    short = text.partition("<!-- bench:cpu-ops-short -->\n")[2].partition("<!-- /bench -->")[0]
    assert short.splitlines()[2:] == ["| linear 1x768x3072 | F.linear | 2.00 ms | 5.00 ms | 2.50 |  |"]
    assert (
        "2 threads of this machine: 99 GFLOP/s, 9 GB/s" in text
        and "| gelu 1x2 | 3 M | 4 MB | 1.00 ms, memory | 2.00 ms | 50% |" in text
    )
    assert "| 2 processes | 5.0 | 12.5 | 2.50 |" in text
    assert (
        text.count("| llama, 1x8, fp32 |") == 1
        and "| llama, 1x8, fp32 | stock, SDPA | 1.00 ms | 4.00 ms | 4.00 | 1.00 |" in text
    )
    assert "| b, 8x128 | 220 MiB | 200 MiB | 1.10 |" in text and "| fp32, stock | 5 | 5.0e-07 |" in text
    # 0.50: compile, the best of theirs, over cuda; 2.00: the median over the rounds, over triton; 3 TFLOP/s in 1 ms
    ours = "4.00 ms, cuda | 0.50 | 1.00 ms, triton | 2.00"
    assert f"| linear 1x8x8 fp16 | compile | 2.00 ms (call 2.50) | {ours} | 3.0T |" in text
    assert text.count("| linear 1x8x8 fp16 |") == 1, "of an op the best of theirs"
    assert f"| base 1x8 fp16 | compile | 2.00 ms (call 2.50) | {ours} | 3G |" in text
    assert "| base 1x8 fp16 | eager | 3.00 ms | 4.00 ms, cuda | 0.75 | 1.00 ms, triton | 3.00 | 3G |" in text
    assert "| base 1x8 fp16 | varlen | not installed: it | - | - | - | - | 3G |" in text
    assert "| cpu, fp32, stock | 5 | 5 | 5.0e-07 |" in text and "| cpu, fp32, cpu portable | 0 | 0 | 0 |" in text
    assert "(cpu a CPU, threads 2, isa avx2, torch 2, revision abc)" in text and "driver_version 7" in text
    assert tables.main(["--data", str(data), str(page)]) == 0 and page.read_text() == text

    (data / "new.json").write_text(json.dumps({"machine": FACTS, "results": CPU}))  # without the studies: their tables stay
    assert tables.main(["--data", str(data), str(page)]) == 0 and page.read_text() == text
    for path in data.glob("*.json"):
        path.unlink()
    assert tables.main(["--data", str(data), str(page)]) == 0 and page.read_text() == text
    assert "no run, left as it was" in capsys.readouterr().out
    page.write_text("<!-- bench:nothing -->\n<!-- /bench -->")
    with pytest.raises(pages.Wrong, match=r"page.md: line 1: there is no bench:nothing; there are cpu-models, "):
        tables.main(["--data", str(data), str(page)])


def test_the_short_form_names_cases_that_there_are() -> None:
    assert [name for name in tables.SHORT_OPS if name not in run.contested(False)] == []


def test_figures_that_are_drawn_stand_on_the_page(tmp_path: Path) -> None:
    docs, page = tmp_path / "docs", tmp_path / "page.md"
    docs.mkdir()
    assert tables.made(page, {}, docs)["figures-cuda"] is None
    (docs / "bits-cuda.svg").write_text("")
    assert (text := tables.made(page, {}, docs)["figures-cuda"]) and "](docs/bits-cuda.svg)" in text and "price" not in text
    assert tables.made(page, {}, docs)["figure-price-cuda"] is None
    (docs / "price-cuda.svg").write_text("")
    assert (
        (text := tables.made(page, {}, docs)["figure-price-cuda"]) and "](docs/price-cuda.svg)" in text and "bits" not in text
    )


def test_figures(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from bench.pages import plot

    out, page = tmp_path / "out", tmp_path / "page.md"
    out.mkdir()
    page.write_text("<!-- bench:figures-cpu -->\n<!-- /bench -->\n")
    assert tables.main(["--data", str(data), "--out", str(out), str(page)]) == 0
    assert "](out/bits-cpu.svg)" in page.read_text()
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(first) == {"price-cpu.svg", "price-cuda.svg", "throughput-cpu.svg", "bits-cpu.svg", "sparse-cpu.svg"}
    drawn = plot.prices({"results": CPU})
    assert list(drawn) == ["linear 1", "linear 1x768x3072", "sparse_ffn ReLU 1x8x9, 10% active"]
    assert drawn["linear 1x768x3072"] == {"portable": 2.5}
    assert all(len(b) < 80_000 for b in first.values())
    price = first["price-cuda.svg"].decode()
    assert "linear 1x8x8 fp16" in price and "2.00" in price and "0.50" in price and "a GPU" in price and "base 1x8" not in price
    assert tables.main(["--data", str(data), "--out", str(out), str(page)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first, "the same data, another file"
    capsys.readouterr()
    assert tables.main(["--data", str(out), "--out", str(out), str(page)]) == 0
    assert "KiB" not in capsys.readouterr().out, "drawn of nothing"


def test_scaling_counts_what_stock_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(shapes.RERANKERS, shapes.MINILM, TINY)
    for name, value in (("BATCHES", (1, 9)), ("LENGTHS", (9,)), ("BITS", (1, 3, 8))):
        monkeypatch.setattr(scaling, name, value)
    out = tmp_path / "s.json"
    threads = run.torch.get_num_threads()
    try:
        assert run.main(["--scaling", "--quick", "--json", str(out)]) == 0
    finally:
        run.torch.set_num_threads(threads)
        contests.forget()
    found = json.loads(out.read_text())["scaling"]
    assert {(p["axis"], p["x"], p["threads"]) for p in found["points"]} == {
        (a, x, t) for a, x in (("batch", 1), ("batch", 9), ("length", 9)) for t in (1, 2)
    }
    assert {p["way"] for p in found["points"]} == {"stock, padded", "stock, sorted in 8s", "stock, one by one", "cpu portable"}
    assert all(p["pairs_per_s"] > 0 for p in found["points"])
    differ = {(p["way"], p["batch"]): p["differ"] for p in found["bits"]}
    assert all(differ["cpu portable", n] == 0 for n in (1, 3, 8)) and differ["stock", 1] == 0
    assert differ["stock", 3] > 0 and differ["stock", 8] > 0


def test_mixed_lengths_repeat() -> None:
    assert shapes.lengths(4) == shapes.MIXED_LENGTHS[:4] and shapes.lengths(64) == shapes.MIXED_LENGTHS * 2
