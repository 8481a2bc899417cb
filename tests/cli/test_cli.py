"""The command: what it writes, what it says of bad input and where, its exit codes, and that no file is ever half written."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import rerank_kernels as rk
from commands import bad, run, write
from models import save_cross_encoder, tiny, tokenizer
from rerank_kernels import cli, verify
from rerank_kernels.backend import registry
from rerank_kernels.backend.native import hopper, proven
from rerank_kernels.cli import models as chosen
from rerank_kernels.cli import score as score_command

PAIRS = [
    {"query": "capital of France", "document": "Paris is the capital of France.", "id": 7, "tags": ["a", None, 1.5]},
    {"query": "capital of France", "document": "Bread is made from flour."},
    {"query": "", "document": "", "note": "l'été, 東京"},
]
GOOD = json.dumps(PAIRS[0])
NUMBERS = ("logit", "score", "complement")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write(tmp_path / "pairs.jsonl", *(json.dumps(p, ensure_ascii=False) for p in PAIRS))


# ---- score -------------------------------------------------------------------------------------------------------------------


def test_score_adds_three_fields_and_keeps_the_rest(capsys, folder, pairs, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(capsys, "score", folder, pairs, "-o", out) == (0, "", "")
    written = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    want = rk.Reranker(folder).score([(p["query"], p["document"]) for p in PAIRS])
    for record, pair, *numbers in zip(written, PAIRS, *want, strict=True):
        got = [record.pop(name) for name in ("logit", "score", "complement")]
        assert record == pair
        assert np.array(got, np.float32).tobytes() == np.array(numbers, np.float32).tobytes()
        assert [repr(g) for g in got] == [repr(float(n)) for n in numbers]  # what Python prints of them
    assert "東京" in out.read_text("utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "pairs.jsonl"]


def test_batch_size_and_file_order_change_no_bit(capsys, folder, pairs, tmp_path) -> None:
    turned = write(tmp_path / "turned.jsonl", *reversed(pairs.read_bytes().splitlines()))
    _, whole, _ = run(capsys, "score", folder, pairs)
    _, single, _ = run(capsys, "score", folder, turned, "--batch-tokens", 1)
    assert whole.splitlines() == single.splitlines()[::-1] and len(whole.splitlines()) == len(PAIRS)


def test_score_reads_stdin_and_writes_stdout(folder, pairs) -> None:
    ran = process("score", folder, "-", input=pairs.read_bytes(), stdout=subprocess.PIPE)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads(line)["document"] for line in ran.stdout.decode().splitlines()] == [p["document"] for p in PAIRS]


def test_the_output_may_be_the_input(capsys, folder, pairs) -> None:
    assert run(capsys, "score", folder, pairs, "-o", pairs)[0] == 0
    assert run(capsys, "score", folder, pairs, "-o", pairs, "--prefix", "again_")[0] == 0
    written = [json.loads(line) for line in pairs.read_text("utf-8").splitlines()]
    assert [r["query"] for r in written] == [p["query"] for p in PAIRS]
    assert all(r[name] == r["again_" + name] for r in written for name in NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_field_of_the_input_is_never_overwritten(capsys, folder, tmp_path, monkeypatch, name) -> None:
    scored = []
    monkeypatch.setattr(chosen, "reranker", lambda args: scored.append(args))
    path = write(tmp_path / "pairs.jsonl", GOOD, json.dumps({**PAIRS[1], "a_" + name: 1, name: None}))
    for prefix in ("", "a_"):
        said = bad(capsys, "score", folder, path, "--prefix", prefix)
        assert said == f'{path}:2: "{prefix}{name}" is there already and would be lost; give another --prefix'
    assert scored == []


def test_blank_lines_a_byte_order_mark_and_crlf(capsys, folder, tmp_path) -> None:
    line = json.dumps(PAIRS[0])
    messy = write(tmp_path / "messy.jsonl", b"\xef\xbb\xbf" + line.encode() + b"\r", "", "   ", line)
    code, out, _ = run(capsys, "score", folder, messy)
    first, second = out.splitlines()
    assert code == 0 and first == second


def test_an_empty_file_gives_an_empty_file(capsys, folder, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    empty = write(tmp_path / "none.jsonl")
    said = f"rerank-kernels: warning: {empty}: there are no records in it\n"
    assert run(capsys, "score", folder, empty, "-o", out) == (0, "", said)
    assert out.read_bytes() == b""


def test_a_field_that_is_only_carried_may_hold_anything(capsys, folder, tmp_path) -> None:
    line = '{"query": "a", "document": "b", "x": NaN, "y": "\\ud800", "z": 123456789012345678901234567890}'
    code, out, _ = run(capsys, "score", folder, write(tmp_path / "odd.jsonl", line))
    record = json.loads(out)
    assert code == 0 and record["y"] == "\ud800" and record["z"] == 123456789012345678901234567890


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ("[" * 100_000, "not JSON: "),
        ("[1]", 'must be an object with "query" and "document", got an array'),
        ('"text"', 'must be an object with "query" and "document", got a string'),
        ('{"query": "a"}', '"document" is missing'),
        ('{"document": "a"}', '"query" is missing'),
        ('{"query": 1, "document": "a"}', '"query" must be a string, got a number'),
        ('{"query": "a", "document": null}', '"document" must be a string, got null'),
        ('{"query": "a", "document": true}', '"document" must be a string, got true or false'),
        ('{"query": "a", "document": "\\ud800"}', '"document" is not valid Unicode'),
        (b'{"query": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
    ],
)
def test_bad_lines_are_named_by_number(capsys, folder, tmp_path, line, message) -> None:
    path = write(tmp_path / "pairs.jsonl", GOOD, "", GOOD, line, GOOD)
    out = write(tmp_path / "out.jsonl", "old")
    said = bad(capsys, "score", folder, path, "-o", out)
    assert said.startswith(f"{path}:4: {message}"), said
    assert out.read_bytes() == b"old\n" and len(list(tmp_path.iterdir())) == 2


def test_bad_lines_of_stdin_have_a_name_too(capsys, folder, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\n{}\n")))
    assert bad(capsys, "score", folder, "-") == '<stdin>:3: "query" is missing'


def test_files_that_are_not_there(capsys, folder, pairs, tmp_path) -> None:
    assert bad(capsys, "score", folder, tmp_path / "no.jsonl") == f"{tmp_path}/no.jsonl: No such file or directory"
    assert bad(capsys, "score", folder, tmp_path) == f"{tmp_path}: Is a directory"
    assert bad(capsys, "score", folder, pairs, "-o", tmp_path) == f"{tmp_path}: Is a directory"
    assert bad(capsys, "score", folder, pairs, "-o", tmp_path / "no" / "out") == f"{tmp_path}/no/out: No such file or directory"


def test_models_that_are_not_there(capsys, pairs, tmp_path) -> None:
    assert "must be a local model folder" in bad(capsys, "score", tmp_path / "no", pairs)
    assert "must be a model folder with a readable config.json" in bad(capsys, "score", tmp_path, pairs)
    assert "must be a local model folder" in bad(capsys, "rank", "BAAI/none", "--query", "q", pairs)
    assert "must be a local model folder" in bad(capsys, "verify", tmp_path / "no")
    assert bad(capsys, "verify", "shape:none").startswith("no shape is named 'none'; there are bge-reranker-base")


def test_options_that_do_not_fit(capsys, folder, pairs) -> None:
    assert "max_length must be an integer in [" in bad(capsys, "score", folder, pairs, "--max-length", 100_000)
    for argv in (["score", folder, pairs, "--batch-tokens", "0"], ["score", folder, pairs, "--dtype", "fp8"], [], ["scores"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in argv])
        assert stop.value.code == 2


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_run_that_fails_half_way_leaves_the_old_file(capsys, folder, pairs, tmp_path, monkeypatch, error) -> None:
    calls = []

    def score(self, pairs, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return rk.Scores(*np.zeros((3, len(pairs)), np.float32))

    monkeypatch.setattr(score_command, "WINDOW", 1)
    monkeypatch.setattr(rk.Reranker, "score", score)
    out = write(tmp_path / "out.jsonl", "old")
    if isinstance(error, KeyboardInterrupt):
        assert run(capsys, "score", folder, pairs, "-o", out) == (130, "", "rerank-kernels: interrupted\n")
    else:
        code, printed, said = run(capsys, "score", folder, pairs, "-o", out)
        assert (code, printed) == (2, "")  # 1 is a broken promise; where the fault is ours the traceback is needed
        assert said.startswith("Traceback") and said.endswith("\nrerank-kernels: unexpected RuntimeError: out of memory\n")
    assert out.read_bytes() == b"old\n" and len(list(tmp_path.iterdir())) == 2


def test_kill_cleans_up_like_ctrl_c(capsys, folder, pairs, tmp_path, monkeypatch) -> None:
    def score(self, pairs, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(5)

    monkeypatch.setattr(rk.Reranker, "score", score)
    before = signal.getsignal(signal.SIGTERM)
    assert run(capsys, "score", folder, pairs, "-o", tmp_path / "out.jsonl")[0] == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_links_modes_and_devices(capsys, folder, pairs, tmp_path) -> None:
    real = write(tmp_path / "real.jsonl", "old")
    real.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    assert run(capsys, "score", folder, pairs, "-o", link)[0] == 0
    assert link.is_symlink() and len(real.read_text("utf-8").splitlines()) == 3 and real.stat().st_mode & 0o777 == 0o640
    assert run(capsys, "score", folder, pairs, "-o", os.devnull)[0] == 0
    new = tmp_path / "new.jsonl"
    before = os.umask(0o027)
    try:
        assert run(capsys, "score", folder, pairs, "-o", new)[0] == 0
    finally:
        os.umask(before)
    assert new.stat().st_mode & 0o777 == 0o640


def test_dtype_is_heard(capsys, folder, pairs) -> None:
    _, full, _ = run(capsys, "score", folder, pairs)
    _, half, _ = run(capsys, "score", folder, pairs, "--dtype", "bf16")
    want = rk.Reranker(folder, dtype=torch.bfloat16).score([(PAIRS[0]["query"], PAIRS[0]["document"])]).logit[0]
    assert (
        np.float32(json.loads(half.splitlines()[0])["logit"]) == want != np.float32(json.loads(full.splitlines()[0])["logit"])
    )


# ---- rank --------------------------------------------------------------------------------------------------------------------


def test_rank(capsys, folder, tmp_path) -> None:
    documents = ["Bread is made from flour.", "Paris [red]is[/red] the capital.", "Berlin"]
    text = write(tmp_path / "docs.txt", documents[0], "", *documents[1:])
    lines = write(tmp_path / "docs.jsonl", *(json.dumps({"document": d}) for d in documents))
    want = rk.Reranker(folder).rank("capital", documents)
    code, out, _ = run(capsys, "rank", folder, "--query", "capital", text)
    assert code == 0 and "[red]" in out  # brackets are text, not markup
    _, as_json, _ = run(capsys, "rank", folder, "--query", "capital", lines, "--json", "--top-k", 2)
    ranked = [json.loads(line) for line in as_json.splitlines()]
    assert [(r["rank"], r["index"], r["document"]) for r in ranked] == [
        (place, r.index, r.document) for place, r in enumerate(want[:2], 1)
    ]
    assert all(np.float32(got["logit"]) == np.float32(r.logit) for got, r in zip(ranked, want, strict=False))
    assert str(want[0].logit) in out


def test_rank_of_bad_files(capsys, folder, tmp_path) -> None:
    path = write(tmp_path / "docs.jsonl", '{"document": "a"}', '{"text": "b"}')
    assert bad(capsys, "rank", folder, "--query", "q", path) == f'{path}:2: "document" is missing'
    path = write(tmp_path / "docs.txt", "a", b"\xe9")
    assert bad(capsys, "rank", folder, "--query", "q", path).startswith(f"{path}:2: not UTF-8")


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.JSONL", "docs.ndjson", "docs.Json", "docs.txt --jsonl", "- --jsonl"])
def test_rank_reads_json_lines(capsys, folder, tmp_path, monkeypatch, name) -> None:
    name, *flags = name.split()
    lines = write(tmp_path / ("docs.txt" if name == "-" else name), '{"document": "Paris"}', '{"document": "Bread", "id": 1}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.read_bytes())))
    code, out, err = run(capsys, "rank", folder, "--query", "q", name if name == "-" else lines, *flags, "--json")
    assert (code, err) == (0, "") and {json.loads(line)["document"] for line in out.splitlines()} == {"Paris", "Bread"}


@pytest.mark.parametrize("first", ['{"document": "Paris"}', '{"text": "Paris"}', '["document"]', "Paris", "{", "[" * 100_000])
def test_rank_warns_of_json_lines_read_as_text(capsys, folder, tmp_path, first) -> None:
    text = write(tmp_path / "docs.txt", "", first, '{"document": "Bread"}')
    code, _, err = run(capsys, "rank", folder, "--query", "q", text, "--json")
    warning = f"rerank-kernels: warning: {text}:2: looks like JSON Lines, but is ranked as plain text; give --format jsonl\n"
    assert (code, err) == (0, warning if first == '{"document": "Paris"}' else "")


def test_a_document_does_not_steer_the_terminal(capsys, folder, tmp_path) -> None:
    document = "a\x1b]0;title\x07b\u202ec\u200bd\x9b31me\x7ff\x00g é東"
    lines = write(tmp_path / "docs.jsonl", json.dumps({"document": document}))
    code, out, _ = run(capsys, "rank", folder, "--query", "q", lines)
    assert code == 0 and "a�]0;title�b�c�d�31me�f�g é東" in out
    assert not {unicodedata.category(c) for c in out.replace("\n", "")} & {"Cc", "Cf"}
    _, as_json, _ = run(capsys, "rank", folder, "--query", "q", lines, "--json")
    assert json.loads(as_json)["document"] == document


@pytest.mark.parametrize(("flags", "shown"), [([], b"??"), (["--json"], "東京".encode())])
def test_a_letter_that_stdout_cannot_write(capsys, folder, tmp_path, monkeypatch, flags, shown) -> None:
    text = write(tmp_path / "docs.txt", "東京")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["rank", str(folder), "--query", "q", str(text), *flags]) == 0
    assert shown in written.getvalue() and capsys.readouterr().err == ""


def test_a_text_that_is_too_long_is_named(capsys, folder, tmp_path) -> None:
    """Whatever the model: the record's line, and how much of it was read."""
    path = write(tmp_path / "docs.txt", "Paris", "", "é" * 200_000)
    said = f"rerank-kernels: warning: {path}:3: a text of 200,000 characters was cut to 131,072 before tokenising\n"
    assert run(capsys, "rank", folder, "--query", "q", path)[::2] == (0, said)
    pairs = write(tmp_path / "pairs.jsonl", GOOD, json.dumps({"query": "q", "document": "é" * 200_000}))
    assert run(capsys, "score", folder, pairs)[::2] == (0, said.replace("docs.txt:3", "pairs.jsonl:2"))


# ---- errors are 2, and only a broken promise is 1 ----------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [("score",), ("rank", "--query", "q"), ("verify", "--pairs")])
def test_a_backend_that_cannot_serve(capsys, folder, few_pairs, monkeypatch, argv) -> None:
    monkeypatch.setenv("RERANK_KERNELS_BACKEND", "rocm")
    command, *options = argv
    said = bad(capsys, command, folder, *options, few_pairs)
    assert said.startswith("unknown backend 'rocm' (asked for by RERANK_KERNELS_BACKEND); there are ")


def test_a_query_that_is_not_utf8(capsys, folder, pairs) -> None:
    assert bad(capsys, "rank", folder, "--query", "caf\udce9", pairs) == "--query: not valid UTF-8"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(capsys, folder, pairs, few_pairs, monkeypatch) -> None:
    assert bad(capsys, "score", folder, pairs, "-o", "/dev/full") == "/dev/full: No space left on device"
    check = ("verify", folder, "--pairs", few_pairs, "--no-process")
    code, out, err = run(capsys, *check, "--json", "/dev/full")
    assert (code, err) == (2, "rerank-kernels: /dev/full: No space left on device\n") and "held: " in out
    full = "rerank-kernels: <stdout>: No space left on device\n"
    rank = ("rank", folder, "--query", "q", pairs)
    for argv in (("score", folder, pairs), rank, (*rank, "--json"), ("info",), check):
        with open("/dev/full", "w") as stdout, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            code, _, err = run(capsys, *argv)
        assert (code, err) == (2, full), argv
    with open("/dev/full", "wb") as stdout:  # Python has no more to say when it ends
        ran = process("info", stdout=stdout)
    assert (ran.returncode, ran.stderr.decode()) == (2, full)


def test_a_stdout_that_is_closed(capsys, folder, pairs, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    for argv in (("score", folder, pairs), ("rank", folder, "--query", "q", pairs), ("info",)):
        assert bad(capsys, *argv) == "<stdout>: is closed"


def test_a_file_that_may_not_grow(folder, tmp_path) -> None:
    resource = pytest.importorskip("resource")
    many = write(tmp_path / "many.jsonl", *[GOOD] * 100)
    out = write(tmp_path / "out.jsonl", "old")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # noqa: E731
    ran = process("score", folder, many, "-o", out, preexec_fn=limit)
    assert (ran.returncode, ran.stderr) == (2, f"rerank-kernels: {out}: File too large\n".encode())
    assert out.read_bytes() == b"old\n" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file", "model/vocab"), "model/vocab: No such file"),
        (OSError("several\nlines"), "several lines"),
        (MemoryError(), "out of memory"),
    ],
)
def test_errors_of_the_machine_are_one_line(capsys, folder, pairs, monkeypatch, error, said) -> None:
    def fail(args):
        raise error

    monkeypatch.setattr(chosen, "reranker", fail)
    assert bad(capsys, "score", folder, pairs) == said


def test_a_reader_who_stops(capsys, folder, pairs, few_pairs, tmp_path, monkeypatch) -> None:
    """Nobody needs the rest of a table; a verdict stays what it is."""
    rank = ("rank", folder, "--query", "q", pairs)
    found = tmp_path / "found.json"
    check = ("verify", folder, "--pairs", few_pairs, "--no-process", "--json", found)
    for want, *argv in ((0, "score", folder, pairs), (0, *rank), (0, *rank, "--json"), (0, *check), (1, *check, "--stock")):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stdout, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            assert run(capsys, *argv) == (want, "", ""), argv
        if "verify" in argv:
            assert json.loads(found.read_text("utf-8"))["ok"] is (want == 0)


# ---- help --------------------------------------------------------------------------------------------------------------------


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_version(capsys) -> None:
    assert help_of(capsys, "--version") == f"rerank-kernels {rk.__version__}, numerics version {rk.NUMERICS_VERSION}"


def test_help_says_what_is_not_seen(capsys) -> None:
    for command in ([], ["score"], ["rank"], ["verify"], ["info"]):
        said = help_of(capsys, *command, "--help")
        assert all(f" {code} " in said.partition("Exit codes:")[2] for code in (0, 1, 2, 130)), command
    assert f"at least {verify.HOME} different texts" in help_of(capsys, "verify", "--help")
    assert "refused if they have the name of one that is added (see --prefix)" in help_of(capsys, "score", "--help")
    assert "--jsonl" in help_of(capsys, "rank", "--help")


def test_help_waits_for_no_import() -> None:
    """Beyond what `import rerank_kernels` itself loads, for which an empty package stands here."""
    program = f"""
import sys, types
package = types.ModuleType("rerank_kernels")
package.__path__, package.__version__, package.NUMERICS_VERSION = {list(rk.__path__)!r}, "0", 0
sys.modules["rerank_kernels"] = package
from rerank_kernels.cli import main
try:
    main(["verify", "--help"])
finally:
    assert not {{"torch", "transformers", "numpy", "rich"}} & set(sys.modules), sorted(sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment())
    assert ran.returncode == 0 and b"at least" in ran.stdout, ran.stderr


# ---- verify and info ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_pairs(tmp_path) -> Path:
    return write(tmp_path / "eight.jsonl", *(json.dumps({"query": "a", "document": "b " * i}) for i in range(8)))


def test_verify_passes_and_writes_json(capsys, folder, few_pairs, tmp_path) -> None:
    code, out, _ = run(capsys, "verify", folder, "--pairs", few_pairs, "--no-process", "--json", tmp_path / "found.json")
    assert code == 0 and "negative controls caught" in out and "held: " in out
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert found["ok"] and found["rows"] == 8 and found["environment"]["torch"] == torch.__version__


def test_verify_of_stock_fails(capsys, folder, few_pairs, tmp_path) -> None:
    argv = ("verify", folder, "--stock", "--pairs", few_pairs, "--no-process", "--json", tmp_path / "found.json")
    code, out, _ = run(capsys, *argv)
    assert code == 1 and "broken: " in out and "padding-invariant" in out
    assert not json.loads((tmp_path / "found.json").read_text("utf-8"))["ok"]


def test_verify_of_too_few_pairs(capsys, folder, pairs) -> None:
    assert "at least 8 different texts" in bad(capsys, "verify", folder, "--pairs", pairs)


def test_a_report_of_a_broken_promise_is_exit_code_1(capsys, folder, monkeypatch) -> None:
    row = verify.Result("batch-invariant", "batch", "size 2", 1, 2, 1e-7, 0, 1)
    report = verify.VerifyReport([row], [], {}, scorer="x", kind="cross-encoder", rows=8, lengths=(1, 2))
    monkeypatch.setattr(verify, "verify", lambda *a, **k: report)
    code, out, _ = run(capsys, "verify", folder)
    assert code == 1 and "1/2" in out and "broken: batch-invariant" in out


def test_shapes_are_the_same_every_time() -> None:
    first, second = (verify.load("shape:tiny").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_info(capsys) -> None:
    code, out, _ = run(capsys, "info")
    assert code == 0
    for word in ("numerics", torch.__version__, "layer_norm", "pytorch", "threads", "isa"):
        assert word in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_mode_and_device(capsys, folder, pairs) -> None:
    said = bad(capsys, "score", folder, pairs, "--mode", "tensor")
    assert said.startswith("patch: mode 'tensor' needs weights in float16 or bfloat16") and "is torch.float32" in said
    said = bad(capsys, "rank", folder, "--query", "q", pairs, "--mode", "tensor", "--dtype", "fp16")
    assert "needs a GPU's tensor cores, and none can be used here; cuda: " in said and "; triton: " in said
    assert bad(capsys, "verify", folder, "--mode", "tensor", "--dtype", "bf16").startswith("patch: mode 'tensor' needs a GPU's")
    assert bad(capsys, "score", folder, pairs, "--device", "cuda").startswith("--device cuda: ")
    assert bad(capsys, "score", folder, pairs, "--device", "no such").startswith("--device no such: ")
    assert run(capsys, "score", folder, pairs, "--device", "cpu", "--mode", "portable")[0] == 0


def test_info_says_what_cublaslt_may_do(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv(proven.SETTING, raising=False)
    assert f"off; {proven.SETTING}=1 lets cuBLASLt" in run(capsys, "info")[1]
    monkeypatch.setenv(proven.SETTING, "maybe")
    assert f"{proven.SETTING} must be 0 or 1, got 'maybe'" in run(capsys, "info")[1]
    monkeypatch.setenv(proven.SETTING, "1")
    code, out, _ = run(capsys, "info")
    assert code == 0 and ("kinds of products" if torch.cuda.is_available() else "on, and ours serve: ") in out


def test_info_says_what_the_kernels_for_hopper_may_do(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv(hopper.SETTING, "maybe")
    assert f"{hopper.SETTING} must be 0 or 1, or not be set, got 'maybe'" in run(capsys, "info")[1]
    monkeypatch.setenv(hopper.SETTING, "0")
    assert f"never taken on compute capability 9.0: {hopper.SETTING}=0" in run(capsys, "info")[1]
    monkeypatch.delenv(hopper.SETTING)
    here = hopper.Here(hopper.LINEAR, torch.device("cuda", 0), "3 of 8 results have other bits, at 1 x 8 x 8, float16, way 2")
    monkeypatch.setattr(hopper, "_here", {(hopper.LINEAR, "cuda:0"): here})
    code, out, _ = run(capsys, "info")
    assert code == 0 and "cuda:0, linear and bmm: not taken: 3 of 8 results have other bits, at 1 x 8 x 8" in out


def test_info_plan(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(capsys, "info", "--plan", "--arch", 80, "--arch", 90, "--model", "shape:bge-reranker-base", "--head", 96)
    assert code == 0 and "sm_80" in out and "sm_90" in out and "mma.sync m16n8k16" in out
    assert "N 3072, K 768" in out and "head 64" in out and "head 96" in out and "1024" not in out
    code, out, _ = run(capsys, "info", "--plan", "--arch", 86, "--linear", 5, 40)
    assert code == 0 and "N 5, K 40" in out and "head" not in out
    if not torch.cuda.is_available():
        out = run(capsys, "info", "--plan")[1]
        assert "N 4096, K 1024" in out and "sm_80" in out and "sm_90" in out and "sm_86" not in out
    assert bad(capsys, "info", "--plan", "--arch", 75).startswith("plan: arch must be one of 80, 86, ")
    assert bad(capsys, "info", "--plan", "--model", "shape:huge").startswith("--model shape:huge: no such shape; ")


def test_info_without_the_library_says_why(capsys, monkeypatch) -> None:
    reason = "the C++ library was not built"
    monkeypatch.setattr(registry, "missing", lambda name: reason if name == "cpu" else None)
    code, out, _ = run(capsys, "info")
    assert code == 0 and f"cpu: {reason}" in out


def test_an_embedding_model_scores_by_cosine(capsys, pairs, tmp_path) -> None:
    own = tokenizer("bert")
    model = tmp_path / "embedding"
    tiny("bert", head=False, vocab_size=len(own)).save_pretrained(model)
    own.save_pretrained(model)
    code, out, _ = run(capsys, "score", model, pairs)
    assert code == 0 and all(-1.001 <= json.loads(line)["logit"] <= 1.001 for line in out.splitlines())


# ---- infinity-server ---------------------------------------------------------------------------------------------------------

INFINITY = {
    "engine.py": "from systems import AsyncEmbeddingEngine",
    "log_handler.py": "import logging\nlogging.basicConfig(level='INFO', format='%(message)s')\nlogger = logging.getLogger()",
    "cli.py": """
import asyncio, signal, sys, systems

def cli():
    model = systems.CrossEncoderPatched(systems.model())
    engine = systems.AsyncEmbeddingEngine(model, vector_disk_cache_path="--cache" in sys.argv)
    try:
        asyncio.run(engine.astart())
    except Exception:
        sys.exit(3)  # as uvicorn does, after its own lines
    print(*sys.argv, type(vars(engine).get("rerank")).__name__, model.model.forward.wants_graphs, flush=True)
    if "--wait" in sys.argv:
        signal.raise_signal(signal.SIGTERM)
    sys.exit(5)
""",
}


@pytest.fixture
def infinity(tmp_path) -> dict[str, str]:
    """An environment with something that starts like infinity_emb; the real one is tested in stacks/."""
    package = tmp_path / "with" / "infinity_emb"
    package.mkdir(parents=True)
    for name, content in {"__init__.py": "", **INFINITY}.items():
        (package / name).write_text(content)
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), environment()["PYTHONPATH"]])}


def test_infinity_server(infinity) -> None:
    for graphs, dashes in ((True, ["--"]), (True, []), (False, ["--no-graphs", "--"])):
        ran = process("infinity-server", *dashes, "v2", "--model-id", "m", stdout=subprocess.PIPE, **infinity)
        assert ran.returncode == 5, ran.stderr
        assert ran.stdout.decode().splitlines() == ["started", f"infinity_emb v2 --model-id m Method {graphs}"]
        line = "rerank_kernels: one, mode portable: _model_replicas[0].model (XLMRobertaForSequenceClassification)"
        assert any(logged.startswith(line) for logged in ran.stderr.decode().splitlines())


def test_infinity_server_ends_as_its_own_does(infinity) -> None:
    assert process("infinity-server", "--", "v2", "--wait", stdout=subprocess.PIPE, **infinity).returncode == -signal.SIGTERM


def test_infinity_server_does_not_start_with_a_model_that_is_refused(infinity) -> None:
    ran = process("infinity-server", "--", "v2", "--cache", stdout=subprocess.PIPE, **infinity)
    assert (ran.returncode, ran.stdout) == (1, b"") and b"its disk cache may answer" in ran.stderr.splitlines()[-1]
    ran = process("infinity-server", "--backend", "rocm", "--", "v2", stdout=subprocess.PIPE, **infinity)
    assert (ran.returncode, ran.stdout) == (2, b"") and b"unknown backend 'rocm'" in ran.stderr.splitlines()[-1]


def test_infinity_server_without_infinity(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "infinity_emb", None)
    said = bad(capsys, "infinity-server", "--", "v2")
    assert said.startswith('infinity-server: infinity_emb is not installed; run: pip install "infinity_emb[torch,server]"')
    assert "give it after --" in bad(capsys, "infinity-server")


def process(*argv: object, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own; names in capitals are for its environment."""
    own = {name: options.pop(name) for name in list(options) if name.isupper()}
    command = [sys.executable, "-m", "rerank_kernels", *map(str, argv)]
    return subprocess.run(command, stderr=subprocess.PIPE, env={**environment(), **own}, **options)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}
