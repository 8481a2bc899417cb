"""Formats: what is read and written in each, that nothing kept changes, and what is said of files that are not as they seem."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import rerank_kernels as rk
from commands import bad, environment, run, stub, stubbed, write
from rerank_kernels.cli import models, reading, records

NUMBERS = ("logit", "score", "complement")
ROWS = [
    {"query": "q1", "document": 'Paris, "the" capital\nof France', "id": "7", "note": "l'été"},
    {"query": "", "document": "", "id": "08", "note": "東京\t1"},
    {"query": "q3", "document": "x", "id": "9e400", "note": ""},
]


class Fixed:
    """Scores that are the number of the pair."""

    def score(self, pairs, **options):
        logit = np.arange(len(pairs), dtype=np.float32) / 3
        return rk.Scores(logit, logit + 1, -logit)

    def rank(self, query, documents, top_k=None):
        return [rk.Ranked(i, d, -i / 3, 0.5, 0.25) for i, d in enumerate(documents)][:top_k]


@pytest.fixture(autouse=True)
def fixed(monkeypatch) -> None:
    monkeypatch.setattr(models, "reranker", lambda args: Fixed())


def table(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def parquet(rows=ROWS) -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


MADE: dict[str, Callable[[], bytes]] = {
    "p.jsonl": lambda: "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode(),
    "p.json": lambda: json.dumps(ROWS, indent=2).encode(),
    "lines.json": lambda: b"\n".join(json.dumps(r).encode() for r in ROWS),
    "p.csv": lambda: b"\xef\xbb\xbf" + table(","),
    "p.tsv": lambda: table("\t"),
    "p.parquet": parquet,
}
MADE |= {f"{name}.gz": lambda name=name: gzip.compress(MADE[name]()) for name in ("p.jsonl", "p.json", "p.csv", "p.tsv")}


def read_back(path: Path) -> list[dict]:
    data = path.read_bytes()
    name = path.name.removesuffix(".gz")
    data = gzip.decompress(data) if path.name.endswith(".gz") else data
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_table(io.BytesIO(data)).to_pylist()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in data.decode().splitlines()]
    if name.endswith(".json"):
        return json.loads(data)
    text = io.StringIO(data.decode(), newline="")
    return list(csv.DictReader(text, delimiter="\t" if name.endswith(".tsv") else ","))


@pytest.mark.parametrize("given", MADE)
def test_every_format_into_every_format(capsys, tmp_path, given) -> None:
    source = tmp_path / given
    source.write_bytes(MADE[given]())
    for to in ("o.jsonl", "o.json", "o.csv", "o.tsv", "o.parquet", "o.jsonl.gz", "o.json.gz", "o.csv.gz", "o.tsv.gz"):
        assert run(capsys, "score", "m", source, "-o", tmp_path / to) == (0, "", ""), to
        for i, (row, got) in enumerate(zip(ROWS, read_back(tmp_path / to), strict=True)):
            assert list(got) == [*row, *NUMBERS]
            numbers = [float(got.pop(name)) for name in NUMBERS]
            assert got == row
            assert numbers == [float(np.float32(i) / np.float32(3)), float(np.float32(i) / np.float32(3) + 1), -numbers[0]]
    code, out, _ = run(capsys, "rank", "m", "--query", "q", source, "--json")
    ranked = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [{k: r[k] for k in row} for r, row in zip(ranked, ROWS, strict=True)] == ROWS
    assert [r["rank"] for r in ranked] == [1, 2, 3] and [r["index"] for r in ranked] == [0, 1, 2]


@pytest.mark.parametrize("to", ["o.jsonl", "o.json", "o.csv", "o.tsv", "o.parquet", "o.csv.gz", "o.json.gz"])
def test_no_records_are_a_warning_and_a_valid_file(capsys, tmp_path, to) -> None:
    if to.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    for name, data in (
        ("p.jsonl", b"\n"),
        ("p.json", b"[ ]"),
        ("p.csv", b"query,document\n"),
        ("e.csv", b""),
        ("p.jsonl.gz", b""),
    ):
        source = tmp_path / name
        source.write_bytes(data)
        code, out, err = run(capsys, "score", "m", source, "-o", tmp_path / to)
        assert (code, out, err) == (0, "", f"rerank-kernels: warning: {source}: there are no records in it\n")
        assert read_back(tmp_path / to) == []
        if ".csv" in to:
            data = (tmp_path / to).read_bytes()
            data = gzip.decompress(data) if to.endswith(".gz") else data
            assert data == b"query,document,logit,score,complement\n"


KEPT = [
    '"x":1e400',
    '"x": 0.1000000000000000055,   "y" :-0.0',
    '"x": 123456789012345678901234567890',
    f'"x": {"9" * 5000}',
    '"x": 1, "x": 2',
    '"x": "\\u00e9\\ud800\\/", "y": [1E5, {"a": 1.0, "a": 2}]',
    '"x": null, "": true',
]


@pytest.mark.parametrize("kept", KEPT)
def test_nothing_kept_changes(capsys, tmp_path, kept) -> None:
    line = '{"document": "d", "query": "q", ' + kept + "}"
    numbers = ', "logit": 0.0, "score": 1.0, "complement": -0.0}'
    lines = write(tmp_path / "p.jsonl", "", "  " + line + " \r")
    assert run(capsys, "score", "m", lines)[1] == line[:-1] + numbers + "\n"
    array = write(tmp_path / "p.json", f"[ {line},{line}]")
    assert run(capsys, "score", "m", array)[1].splitlines()[0] == line[:-1] + numbers
    ranked = run(capsys, "rank", "m", "--query", "q", lines, "--json")[1]
    assert ranked == '{"rank": 1, "index": 1, ' + line[1:-1] + ', "logit": 0.0, "score": 0.5, "complement": 0.25}\n'
    json.loads(ranked, parse_int=str)


def test_digits_are_those_of_python(capsys, monkeypatch, tmp_path) -> None:
    value = np.float32(0.2577124)
    monkeypatch.setattr(Fixed, "score", lambda self, pairs, **o: rk.Scores(*(np.array([v]) for v in (value, value, value))))
    assert '"logit": 0.25771239399909973,' in run(capsys, "score", "m", write(tmp_path / "p.jsonl", json.dumps(ROWS[0])))[1]
    broken = np.float32("nan")
    monkeypatch.setattr(Fixed, "score", lambda self, pairs, **o: rk.Scores(*(np.array([v]) for v in (broken, value, value))))
    said = run(capsys, "score", "m", write(tmp_path / "p.jsonl", json.dumps(ROWS[0])))[1]
    assert json.loads(said, parse_constant=lambda c: pytest.fail(c))["logit"] is None


def test_lines_keep_their_numbers(capsys, tmp_path) -> None:
    path = write(tmp_path / "docs.txt", "", "a", "  ", "", "b")
    ranked = [json.loads(line) for line in run(capsys, "rank", "m", "--query", "q", path, "--json")[1].splitlines()]
    lines = path.read_text().split("\n")
    assert [lines[r["index"]] for r in ranked] == [r["document"] for r in ranked] == ["a", "b"]
    assert [r["index"] for r in ranked] == [1, 4]


def test_rank_never_overwrites_a_field(capsys, tmp_path) -> None:
    path = write(tmp_path / "docs.jsonl", '{"document": "d", "index": 5}')
    said = bad(capsys, "rank", "m", "--query", "q", path, "--json")
    assert said == f'{path}:1: "index" is there already and would be lost; give another --prefix'
    out = run(capsys, "rank", "m", "--query", "q", path, "--json", "--prefix", "p_")[1]
    assert json.loads(out) == {
        "p_rank": 1, "p_index": 0, "document": "d", "index": 5, "p_logit": 0.0, "p_score": 0.5, "p_complement": 0.25
    }  # fmt: skip
    assert run(capsys, "rank", "m", "--query", "q", path)[0] == 0  # a table adds nothing


BAD = [
    ("p.json", b'[{"query": "a", "document": "b"},', ":item 2: not JSON: the array ends early"),
    ("p.json", b'[{"query": "a", "document": "b"} {}]', ":item 2: not JSON: wanted , or ] after item 1, got '{'"),
    ("p.json", b'[{"query": "a", "document": "b"}] x', ": not JSON: there is more after the array's end"),
    (
        "p.json",
        b'[{"query": "a", "document": "b"}, 12]',
        ':item 2: must be an object with "query" and "document", got a number',
    ),
    ("p.json", b'[{"query": "a", "document": "b\xff"}]', ": after item 0: not UTF-8"),
    ("p.json", b'[{"query": "a" "document": "b"}]' + b" " * 99, ":item 1: not JSON: Expecting ',' delimiter"),
    ("p.json", b"[[", ":item 1: not JSON: "),
    ("p.json", b'"text"', ':1: must be an object with "query" and "document", got a string'),
    (
        "p.jsonl",
        b'[{"query": "a", "document": "b"}]\n',
        ":1: got a JSON array of objects, wanted one object per line; give the format",
    ),
    (
        "p.jsonl",
        b'{"query": "a", "document": "b"} 1',
        ":1: not JSON: there is more after the end of an object, at character 33",
    ),
    ("p.jsonl", b'{"query": "a", "document": "b", "query": "c"}', ':1: "query" is there twice'),
    ("p.csv", b"query,document\na,b\na\n", ":3: has 1 fields, the header has 2"),
    ("p.csv", b"query,document\na,b\na,b,c\n", ":3: has 3 fields, the header has 2"),
    ("p.csv", b'query,document\na,"b\n\nc\nd,e', ":2: not CSV: unexpected end of data"),
    ("p.csv", b"query,document\na,b\0\n", ":2: holds a NUL character, which no CSV has"),
    (
        "p.csv",
        b"query,text\na,b\n",
        ":1: the first line must name the columns; \"document\" is missing, there are 'query', 'text'",
    ),
    ("p.csv", b"query,document,x,x\na,b,1,2\n", ":1: the header names 'x' twice"),
    ("p.tsv", b"query\tdocument\na\t\xe9\n", ":2: not UTF-8"),
    ("p.csv", b"query,document,score\na,b,1\n", ':2: "score" is there already and would be lost; give another --prefix'),
    ("p.jsonl.gz", gzip.compress(b'{"query": "a", "document": "b"}\n' * 9999)[:-99], "the gzip data ends early or is damaged"),
    ("p.jsonl.gz", b'{"query": "a", "document": "b"}\n', ": not a whole gzip file: Not a gzipped file"),
    ("p.parquet", b"PAR1 no parquet", ": not Parquet that can be read: "),
    ("p.xlsx", b"", ": the format .xlsx is not known; there are jsonl, json, csv, tsv, parquet, "),
    ("p.jsonl.zst", b"", ": the format .zst is not known; there are jsonl, "),
    ("p.parquet.gz", b"", ": Parquet is compressed inside, and is not read or written as .gz"),
]


@pytest.mark.parametrize(("name", "data", "said"), BAD)
def test_what_is_wrong_with_a_file(capsys, tmp_path, name, data, said) -> None:
    if name == "p.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(data)
    out = write(tmp_path / "out.jsonl", "old")
    found = bad(capsys, "score", "m", tmp_path / name, "-o", out)
    assert found.startswith(f"{tmp_path / name}") and said in found
    assert out.read_bytes() == b"old\n" and len(list(tmp_path.iterdir())) == 2


def test_what_is_wrong_with_a_parquet_file(capsys, tmp_path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "p.parquet"
    for rows, said in (
        ([{"query": "a", "document": 1}], ': the column "document" must be text, got int64'),
        ([{"query": "a", "text": "b"}], ": the column \"document\" is missing; there are 'query', 'text'"),
        ([{"query": "a", "document": "b"}, {"query": None, "document": "b"}], ':row 2: "query" must be a string, got null'),
        ([{"query": "a", "document": "b", "x": b"\xff"}], ':row 1: "x" holds bytes, which JSON does not have; write Parquet'),
        (
            [{"query": "a", "document": "b", "x": [float("nan")]}],
            ':row 1: "x" holds nan, which JSON does not have; write Parquet',
        ),
        ([{"query": "a", "document": "b", "logit": 1}], ':row 1: "logit" is there already'),
    ):
        path.write_bytes(parquet(rows))
        assert said in bad(capsys, "score", "m", path)
    assert run(capsys, "score", "m", path, "--prefix", "p_", "-o", path)[0] == 0


def test_parquet_keeps_its_types(capsys, tmp_path) -> None:
    pa = pytest.importorskip("pyarrow")
    import datetime
    import decimal

    import pyarrow.parquet as pq

    kept = {
        "when": pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5, i) for i in range(3000)], pa.timestamp("us")),
        "price": pa.array([decimal.Decimal("1.10")] * 3000, pa.decimal128(9, 2)),
        "raw": pa.array([b"\xff\x00"] * 3000),
        "tags": pa.array([["a", None], []] * 1500),
        "kind": pa.array(["x", "y", None] * 1000).dictionary_encode(),
    }
    table = pa.table({"query": ["q"] * 3000, "document": [f"d{i}" for i in range(3000)], **kept})
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=700)
    assert run(capsys, "score", "m", tmp_path / "p.parquet", "-o", tmp_path / "o.parquet") == (0, "", "")
    got = pq.read_table(tmp_path / "o.parquet")
    assert got.select(table.column_names).equals(table) and got.column_names[-3:] == list(NUMBERS)
    assert got.schema.field("logit").type == pa.float32()
    lines = write(
        tmp_path / "p.jsonl",
        '{"query": "a", "document": "b", "n": 1, "f": 1, "t": true, "m": 1, "big": 1e400, "o": {"a": 1.0}}',
        '{"query": "a", "document": "b", "n": null, "f": 2.5, "m": "x", "big": 1}',
    )
    assert run(capsys, "score", "m", lines, "-o", tmp_path / "o.parquet") == (0, "", "")
    rows = [{k: v for k, v in row.items() if k not in NUMBERS} for row in pq.read_table(tmp_path / "o.parquet").to_pylist()]
    assert rows == [
        {"query": "a", "document": "b", "n": 1, "f": 1.0, "t": True, "m": "1", "big": "1e400", "o": '{"a": 1.0}'},
        {"query": "a", "document": "b", "n": None, "f": 2.5, "t": None, "m": '"x"', "big": "1", "o": None},
    ]


def test_without_pyarrow_the_command_names_it(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"")
    pairs = write(tmp_path / "p.jsonl", json.dumps(ROWS[0]))
    for argv in ((tmp_path / "p.parquet",), (pairs, "-o", tmp_path / "o.parquet")):
        said = bad(capsys, "score", "m", *argv)
        assert "Parquet needs pyarrow" in said and said.endswith("run: pip install 'rerank-kernels[tables]'")


def test_stdin_in_every_format(tmp_path) -> None:
    for name, make in MADE.items():
        ran = stubbed("score", "m", "-", "--format", name.partition(".")[2], "--output-format", "json", input=make())
        assert ran.returncode == 0, ran.stderr
        assert [r["id"] for r in json.loads(ran.stdout)] == [r["id"] for r in ROWS]
    ran = stubbed("score", "m", "-", "--output-format", "csv", input=MADE["p.jsonl"]())
    assert ran.stdout.decode().splitlines()[0] == "query,document,id,note,logit,score,complement"


def test_stdout_has_a_window_as_soon_as_it_is_done(tmp_path) -> None:
    command = stub("score", "m", "-", window=2)
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for i in range(0, 6, 2):
        process.stdin.write(b"".join(json.dumps({"query": str(i + k), "document": ""}).encode() + b"\n" for k in range(2)))
        process.stdin.flush()
        assert [json.loads(process.stdout.readline())["query"] for _ in range(2)] == [str(i), str(i + 1)]
    process.stdin.close()
    assert process.wait(20) == 0 and process.stdout.read() == b""


def test_arrays_are_read_in_pieces(monkeypatch, tmp_path) -> None:
    """Whatever the size of a piece: a letter of several bytes, a number, an escape may lie across its end."""
    array = [{"query": "é東", "document": '\\"\n\u2028' * i, "n": [i, 1.5e3, None, {"a": [True]}]} for i in range(9)]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(array, ensure_ascii=False, indent=1), "utf-8")
    for piece in (*range(1, 40), 1 << 20):
        monkeypatch.setattr(reading, "PIECE", piece)
        found = list(reading.source(str(path), None, ("query", "document")))
        assert [json.loads(r.fields.json()) for r in found] == array and [r.index for r in found] == list(range(9))
        assert all("\n" not in r.fields.json() for r in found)


def test_members_are_those_of_json() -> None:
    for text in ("{}", '{ "a" : 1 , "b":[1, {"c": "}"}], "a": "\\"" }', '{"x": -1.5E-3,"y":null}'):
        found = list(records.Json(text, ()).members())
        assert [(k, json.loads(v)) for k, v in found] == json.loads(text, object_pairs_hook=list) or "{" in text[1:]
        assert dict((k, json.loads(v)) for k, v in found) == json.loads(text)
