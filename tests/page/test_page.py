"""The pages of verify and bench: what they say, that all markup in them is ours, and that a browser shows them whole."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import browser
from conftest import ran
from models import save_cross_encoder
from rerank_kernels import Reranker, bench, cli, page, verify
from rerank_kernels.cli import terminal
from rerank_kernels.verify import Control, Result, VerifyReport

WHEN = datetime(2026, 2, 3, 4, 5, tzinfo=timezone.utc)
COMMAND = "rerank-kernels verify models/bge-reranker-base --html page.html"
HOSTILE = (
    '<script>document.title="owned"</script>',
    '"><img src=x onerror="document.title=1">',
    "</style><link rel=stylesheet href=//x.example>{{ 7 * 7 }}{% raw %}",
    "\u202egnp.elif\u2066 \x1b[2J\x00",
    "half of a pair: \ud800",
    "a" * 400,
)
CHECKS = (
    ("repeatable", "repeat", "the same call again", 112, 112, 0.0, 0, 90),
    ("repeatable", "process", "a fresh one", 24, 24, 0.0, 0, 60),
    ("batch-invariant", "batch", "size 2, 3, 7, 8, 16, 31, 64", 123, 485, 9.5e-07, 0, 1372),
    ("batch-invariant", "position", "every place, shuffled, backwards", 99, 160, 2.5e-07, 0, 300),
    ("padding-invariant", "padding length", "one more, to a multiple of 8, of 64, to 512", 61, 107, 9.5e-07, 0, 285),
    ("padding-invariant", "padding side", "left", 0, 32, 0.85, 20, 87),
    ("padding-invariant", "padding value", "special, other, mixed tokens; both sides", 12_345, 123_456, float("inf"), 3, 99),
    ("thread-invariant", "threads", "2, 3, 4", 69, 72, 7.3e-07, 0, 129),
)
ENVIRONMENT = {
    "rerank_kernels": "0.1.0", "numerics": 3, "torch": "2.13.0+cpu", "machine": "x86_64, 2 CPUs, AVX2", "threads": 2,
    "promises": ["repeatable", "machine-invariant"], "build": {"compiler": "g++ 12.2", "flags": "-O3 -ffp-contract=off"},
    "cpu features": {"avx2": True, "avx512f": False},
}  # fmt: skip


def report(scorer: str = page.OURS, **changed: object) -> VerifyReport:
    stock = scorer == page.STOCK
    results = [
        Result(p, c, v, equal if stock else total, total, gap if stock else 0.0, flips if stock else 0, ordered)
        for p, c, v, equal, total, gap, flips, ordered in CHECKS
    ]
    if not stock:
        results.append(Result("padding-invariant", "packed", "Reranker: no padding at all", 128, 128, 0.0, 0, 560))
        results.append(Result("machine-invariant", "instructions", "scalar, avx2", 16, 16, 0.0, 0, 28))
    controls = [Control(f"1 ulp off, by {r.check}", r.check, (r.check,)) for r in results]
    made = VerifyReport(results, controls, dict(ENVIRONMENT), scorer=scorer, kind="cross-encoder", rows=64, lengths=(4, 272))
    return dataclasses.replace(made, **changed)  # type: ignore[arg-type]


def verified(ours: VerifyReport | None = None, stock: VerifyReport | None = None, **named: str) -> str:
    names = {"model": "models/bge-reranker-base", "command": COMMAND, **named}
    return page.verify_page(ours or report(), stock, when=WHEN, **names)


def timed(other_bits: bool = False, **named: str) -> str:
    def one(seconds: float, differ: int) -> bench.Timed:
        rows = torch.zeros(64, 1)
        rows[:differ] = 1.0
        return bench.Timed([seconds] * 3, [seconds / 2] * 6, rows)

    ways = zip(bench.WAYS, (4.0, 2.0, 3.0), (5, 9, 0), strict=True)
    times = {
        way: {"stock": one(s, n), "patched": one(s / 1.5, int(other_bits and way != bench.WAYS[-1]))} for way, s, n in ways
    }
    facts = {"model": "BertModel", "dtype": "float32", "device": "cpu, 2 threads", "mode": "portable", "batches": "of 32"}
    names = {
        "model": "models/bge-reranker-base",
        "command": "rerank-kernels bench models/bge-reranker-base --html b.html",
        **named,
    }
    return page.bench_page(bench.BenchReport(64, 4321, facts, times), environment=ENVIRONMENT, when=WHEN, **names)


class Seen(HTMLParser):
    """Tags and attributes that the page has, and the text of its body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data: str) -> None:
        if "body" in self.tags:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


# ---- what it says ----------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_and_every_number_is_there() -> None:
    said = Seen(verified(stock=report(page.STOCK))).words
    order = [
        "rerank-kernels verify",
        "models/bge-reranker-base",
        "2026-02-03 04:05 UTC",
        "Every promise holds",
        "Rows whose bits differ",
    ]
    order += ["The promises", "The checks can fail", "Machine and environment", COMMAND]
    places = [said.index(part) for part in order]
    assert places == sorted(places)
    for name, check, varied, equal, total, *_ in CHECKS:
        assert name in said and check in said and varied in said
        assert f"{equal:,} of {total:,}" in said and f"{total - equal:,} of {total:,}" in said
    assert "0.85" in said and "20 of 87" in said and "not a number" in said
    assert "instructions" in said and "avx2" in said and "avx512f" not in said and "compiler: g++ 12.2" in said


def test_the_bars_are_as_long_as_the_share_that_differs() -> None:
    bars = re.findall(r'<rect class="(ours|stock)" width="([\d.]+)%"', verified(stock=report(page.STOCK)))
    stock = [float(w) for who, w in bars if who == "stock"]
    assert stock == pytest.approx([100 * (total - equal) / total for _, _, _, equal, total, *_ in CHECKS], abs=0.01)
    assert {w for who, w in bars if who == "ours"} == {"0.00"}


def test_what_fell_is_said_first() -> None:
    ours = report()
    ours.results[2].equal -= 1
    text = verified(ours, report(page.STOCK))
    said = Seen(text).words
    assert "Broken: batch-invariant" in said and "Every promise holds" not in said
    assert (
        text.count('<tr class="bad">') == text.count('<span class="bad">1 of 485</span>') == 1 and 'class="verdict bad"' in text
    )
    ours.results[2].promised = False
    said = Seen(verified(ours)).words
    assert "Every promise holds" in said and "differs, not promised" in said


def test_a_check_without_power_is_no_pass() -> None:
    ours = report()
    ours.controls[0] = Control("1 ulp off, by repeat", "repeat", ())
    ours.controls[1] = Control("1 ulp off, by process", "process", ("process", "batch"))
    said = Seen(verified(ours)).words
    assert "No verdict" in said and "not noticed by repeat" in said and "but by batch as well" in said
    assert f"{len(ours.controls) - 2} of {len(ours.controls)} wrong scorers noticed" in said


def test_stock_alone() -> None:
    stock = report(page.STOCK)
    text = verified(stock)
    assert "Broken: batch-invariant, padding-invariant, thread-invariant" in Seen(text).words
    assert 'class="ours"' not in text


def test_the_page_of_bench() -> None:
    said = Seen(timed()).words
    assert "The same bits in every way, at 1.50 times stock's speed" in said
    assert "in stock PyTorch up to 9 texts" in said.replace("In", "in") and "9 of 64" in said and "of 4,321 tokens" in said
    assert "32 per second" in said and "48 per second" in said
    fell = timed(other_bits=True)
    assert "Bits differ: a promise of the patched model is broken" in Seen(fell).words and 'class="verdict bad"' in fell


# ---- what it is made of ----------------------------------------------------------------------------------------------------


def both(**named: str) -> Iterator[str]:
    yield verified(stock=report(page.STOCK), **named)
    yield timed(**named)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    for text in both():
        seen = Seen(text)
        assert not seen.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {a for a in seen.attributes if a.startswith("on")} and not seen.attributes & {
            "src",
            "href",
            "srcset",
            "style",
        }
        assert "url(" not in text and "@import" not in text and "://" not in text
        assert "default-src 'none'" in text


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda text: text[:12].encode("unicode_escape").decode())
def test_what_comes_from_outside_is_text(hostile: str) -> None:
    plain, tags = list(both()), []
    ours = report(environment={"machine": hostile, "build": {hostile: hostile}, "promises": [hostile]})
    ours.results[0] = dataclasses.replace(ours.results[0], varied=hostile)
    ours.controls[0] = Control(hostile, "repeat", (hostile,))
    for text in (verified(ours, report(page.STOCK), model=hostile, command=hostile), timed(model=hostile, command=hostile)):
        seen = Seen(text)
        tags.append(seen.tags)
        text.encode()  # what cannot be written to a file was taken out
        shown = "".join("\ufffd" if c in "\u202e\u2066\x1b\x00\ud800" else c for c in hostile)
        assert seen.text.count(shown) >= 2, "it is shown as it is"
        assert not set("\u202e\u2066\x1b\x00") & set(text)
    assert tags == [Seen(text).tags for text in plain]


# ---- how it looks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    ran("chromium")
    with browser.Browser() as started:
        yield started


def pages() -> dict[str, str]:
    fell = report()
    fell.results[2].equal -= 1
    fell.controls[0] = Control("1 ulp off, by repeat", "repeat", ())
    long = {"model": HOSTILE[-1], "command": f"rerank-kernels verify {HOSTILE[-1]} --html 'a b'"}
    return {
        "verify": verified(stock=report(page.STOCK)),
        "broken": verified(fell, report(page.STOCK)),
        "alone": verified(report(page.STOCK)),
        "long": verified(stock=report(page.STOCK), **long),
        "bench": timed(),
    }


@pytest.mark.parametrize("name", pages())
def test_a_browser_shows_it_whole(chromium: browser.Browser, name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.html"
    path.write_text(pages()[name], encoding="utf-8")
    papers = set()
    for width, dark, media in ((400, False, ""), (1280, True, ""), (1280, False, ""), (760, False, "print")):
        chromium.open(path, width, dark, media)
        seen = chromium.measure()
        assert seen["width"] == width and seen["scroll"] <= width, "scrolls sideways"
        assert seen["texts"] > 60 and seen["crossing"] == [] and seen["out"] == []
        assert chromium.fetched == [] and chromium.said == []
        papers.add((seen["paper"], seen["ink"]))
        shot = tmp_path / f"{name}-{width}{'-dark' * dark}{media and '-' + media}.png"
        chromium.screenshot(shot)
        assert shot.read_bytes()[:4] == b"\x89PNG" and shot.stat().st_size > 20_000, "a page of one colour"
    assert len(papers) == 3, "light, dark and print have colours of their own"


@pytest.mark.parametrize(
    ("broken", "seen_as"),
    [
        ("main { width: 1400px; }", "scroll"),
        ("td::before { content: none; } td, th { position: absolute; }", "crossing"),
        (".bar span { position: relative; left: -150px; }", "crossing"),
        ("h1 { position: relative; left: -60px; }", "out"),
    ],
)
def test_a_broken_page_is_noticed(chromium: browser.Browser, broken: str, seen_as: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text(pages()["verify"].replace("</style>", f"{broken}</style>"), encoding="utf-8")
    chromium.open(path, 400)
    seen = chromium.measure()
    found = {"scroll": seen["scroll"] > 400, "crossing": bool(seen["crossing"]), "out": bool(seen["out"])}
    assert found[seen_as], found


def test_a_page_that_fetches_or_complains_is_noticed(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "fetches.html"
    path.write_text("<!doctype html><p>text<script>console.error('complains')</script><img src='nothing.png'>")
    chromium.open(path, 400)
    assert [url.rpartition("/")[2] for url in chromium.fetched] == ["nothing.png"]
    assert any("complains" in line for line in chromium.said)
    chromium.said.clear(), chromium.fetched.clear()


# ---- the commands ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("<b>model & more"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "eight.jsonl"
    path.write_text("".join(json.dumps({"query": "a", "document": f"{HOSTILE[0]} {'b ' * i}"}) + "\n" for i in range(8)))
    return path


def test_verify_writes_the_page_and_measures_stock_for_it(
    folder: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SECONDS", 0.01)
    out, found = tmp_path / "page.html", tmp_path / "found.json"
    argv = ["verify", str(folder), "--pairs", str(pairs), "--no-process", "--html", str(out), "--json", str(found)]
    assert cli.main(argv) == 0, "stock, which falls, is only shown"
    shares = [
        int(part) for part in re.findall(r"^rerank-kernels: verifying: (\d+)% after", capsys.readouterr().err, re.MULTILINE)
    ]
    assert shares == sorted(shares) and len(set(shares)) > 10 and shares[0] < 50 < shares[-1], "one over both"
    measured = json.loads(found.read_text("utf-8"))
    assert measured["ok"] and not measured["stock"]["ok"] and measured["stock"]["scorer"] == page.STOCK
    text = out.read_text("utf-8")
    said = Seen(text)
    assert "Every promise holds" in said.words and f"{folder.parent.name}/{folder.name}" in said.words
    assert shlex.join(["rerank-kernels", *argv]) in said.text
    assert "<b>model" not in text and "script" not in said.tags
    for check in measured["checks"] + measured["stock"]["checks"]:
        assert f"{check['equal']:,} of {check['total']:,}" in said.words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eight.jsonl", "found.json", "page.html"]


def test_verify_of_stock_alone_is_measured_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, asked = tmp_path / "page.html", []
    monkeypatch.setattr(verify, "verify", lambda *a, stock, **k: asked.append(stock) or report(page.STOCK))
    assert cli.main(["verify", str(folder), "--stock", "--html", str(out)]) == 1
    text = out.read_text("utf-8")
    assert asked == [True] and 'class="verdict bad"' in text and '<rect class="ours"' not in text


def test_bench_writes_the_page(folder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["bench", str(folder), "--pairs", str(pairs), "--seconds", "1", "--html", str(out)]) == 0
    said = Seen(out.read_text("utf-8")).words
    assert "The same bits in every way" in said and "numerics" in said and "of 8" in said


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_a_page_is_whole_or_as_it_was(
    command: str, folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out := tmp_path / "page.html").write_text("before")
    broken = tmp_path / "few.jsonl"
    broken.write_text("{}\n")
    assert cli.main([command, str(folder), "--pairs", str(broken), "--html", str(out)]) == 2
    assert out.read_text() == "before"
    assert cli.main([command, str(folder), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert cli.main([command, str(folder), "--html", str(out), "--json", str(out)]) == 2
    assert "give it a file of its own" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eight.jsonl", "few.jsonl", "page.html"]


# ---- progress, where no bar can be seen --------------------------------------------------------------------------------------


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_line_of_progress_says_what_how_far_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("scoring", 2000, seconds=0.05) as advance:
        time.sleep(0.2)  # before the first step, and within one that takes long
        for done in (500, 1000):
            advance(done)
            time.sleep(0.2)
    said = lines(capsys)
    assert said[0] == "rerank-kernels: scoring: 0 of 2,000, 0% after 0 s"
    assert re.fullmatch(r"rerank-kernels: scoring: 1,000 of 2,000, 50% after \d s, about \d s left", said[-1])
    assert len(said) >= 6
    with terminal.progress("scoring", None, seconds=0.05) as advance:
        advance(1234)
        time.sleep(0.2)
    assert lines(capsys)[-1] == "rerank-kernels: scoring: 1,234 after 0 s"
    with terminal.progress("verifying", 1.0) as advance:  # a minute, not what this test says
        advance(0.5)
        time.sleep(0.2)
    assert lines(capsys) == []


def test_time_left_is_reckoned_from_the_first_step() -> None:
    """A run that goes on where another stopped did not score in no time what that one had."""
    now = time.monotonic()
    assert terminal._left([(now - 100, 9000.0), (now - 1, 9500.0)], 10_000) == ", about 2 min left"
    assert terminal._left([(now, 9000.0)], 10_000) == ""
    assert [terminal._duration(s) for s in (59, 60, 3540, 3600, 7260)] == ["59 s", "1 min", "59 min", "1 h 0 min", "2 h 1 min"]


@pytest.mark.parametrize("command", ["score", "bench"])  # verify: test_verify_writes_the_page_and_measures_stock_for_it
def test_a_command_off_a_terminal_says_that_it_lives(
    command: str, folder: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SECONDS", 0.01)
    if command == "score":  # eight pairs may be scored before the first line is due
        told, say, score = threading.Event(), terminal.say, Reranker.score
        monkeypatch.setattr(terminal, "say", lambda line: (say(line), told.set()))
        monkeypatch.setattr(Reranker, "score", lambda *a, **k: score(*a, **k) if told.wait(60) else None)
    own = {"score": [str(pairs)], "bench": ["--pairs", str(pairs), "--seconds", "1"]}[command]
    assert cli.main([command, str(folder), *own]) == 0
    said = lines(capsys)
    what = {"score": "scoring", "bench": "timing"}[command]
    assert said and all(re.fullmatch(rf"rerank-kernels: {what}: .*\d% after \d+ s(, about \d+ \w+ left)?", s) for s in said), (
        said
    )
    assert command == "score" or any("left" in s for s in said)


def test_a_language_head_has_next_tokens() -> None:
    own, stock = (report(who, kind="language head") for who in (page.OURS, page.STOCK))
    made = verified(own, stock)
    assert "the next-token logits of 64 texts" in made and "next tokens changed" in made and "token changed" in made
    assert "pairs of documents changed places" not in made and "order changed</th>" not in made
