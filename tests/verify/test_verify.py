"""verify: it passes what is right, fails what is not, names the check that saw it, and knows when a check sees nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

import rerank_kernels as rk
import rerank_kernels.verify as package
from models import CORPUS, tiny, tokenizer
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import PORTABLE
from rerank_kernels.models.bound import Forward
from rerank_kernels.ops.pooling import POOL_MODES
from rerank_kernels.ops.sequences import Sequences
from rerank_kernels.verify import VerifyReport, controls, default_pairs, fresh, verify
from rerank_kernels.verify.checks import FINAL, HOME, MIXED, SETTINGS, Call, Check, Texts, all_checks, build, home
from rerank_kernels.verify.measure import Session, measure

QUESTIONS = (CORPUS[0], CORPUS[8])
PAIRS = [(q, d) for q in QUESTIONS for d in (*CORPUS[:6], " ".join(CORPUS[2:5]), "?")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cross_encoder(family: str = "xlm-roberta"):
    own = tokenizer(family)
    return tiny(family, vocab_size=len(own), pad_token_id=own.pad_token_id), own


def run(model, own, **options) -> VerifyReport:
    return verify(model, own, PAIRS, **{"limit": HOME, **options})


def broken(report: VerifyReport) -> set[str]:
    return {r.check for r in report.results if not r.holds}


def printed(report: VerifyReport) -> str:
    out = StringIO()
    report.print(Console(file=out, width=160))
    return out.getvalue()


def texts(n: int = 16) -> Texts:
    model, own = cross_encoder()
    return package._texts(model, own, PAIRS, cut=100, room=120, limit=n)


# ---- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_patched_cross_encoder_passes_and_is_left_as_it_was(family: str) -> None:
    model, own = cross_encoder(family)
    report = run(model, own, limit=16)
    assert report.ok, printed(report)
    assert {r.check for r in report.results} >= {*controls.SIGHTED, "packed"}
    assert all(r.total > 0 and r.max_difference == 0 and r.flips == 0 for r in report.results)
    assert all(c.caught for c in report.controls) and len(report.controls) >= len(report.results)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert "negative controls caught {0}/{0}".format(len(report.controls)) in printed(report)


def test_an_embedding_model_and_a_model_that_was_patched_before() -> None:
    own = tokenizer("bert")
    model = tiny("bert", head=False, vocab_size=len(own))
    rk.patch(model)
    for pooling in POOL_MODES:
        report = run(model, own, pooling=pooling)
        assert report.ok and report.kind == "embedding", printed(report)
    assert isinstance(model.__dict__["forward"], Forward)


def test_half_precision() -> None:
    model, own = cross_encoder()
    report = run(model.to(torch.bfloat16), own)
    assert report.ok, printed(report)


def test_stock_falls_where_it_must() -> None:
    model, own = cross_encoder()
    report = run(model, own, stock=True)
    assert not report.ok and not report.powerless
    # the head reads a pad token, and positions count pad tokens that are not the pad id: no rounding hides this
    assert {"padding side", "padding value"} <= broken(report)
    side = next(r for r in report.results if r.check == "padding side")
    assert side.equal == 0 and side.max_difference > 1e-3
    assert "packed" not in {r.check for r in report.results}
    assert "broken: " in printed(report)


def test_the_pytorch_backend_is_not_blamed_for_what_it_does_not_promise() -> None:
    model, own = cross_encoder()
    with rk.use("pytorch"):
        report = run(model, own)
    assert report.ok, printed(report)
    assert report.environment["backend"] == "pytorch" and "instructions" not in {r.check for r in report.results}
    assert next(r.check for r in report.results if not r.promised) == "threads"
    assert "not promised by this backend" in printed(report)


def test_a_fresh_process_gives_the_same_bits(tmp_path) -> None:
    model, own = cross_encoder()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    report = run(model, own, source=str(tmp_path))
    assert report.ok and {"process", "math library"} <= {r.check for r in report.results}, printed(report)
    assert "layer_norm 1 ulp off under MKL_CBWR=COMPATIBLE" in {c.name for c in report.controls}


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_setting_that_moves_a_last_bit_falls(head: bool, stock: bool, monkeypatch) -> None:
    """The processes' answers, made in this one: right, but one op is one ulp off in one; of embeddings the very last."""
    own = tokenizer("bert")
    model = tiny("bert", head=head, vocab_size=len(own), pad_token_id=own.pad_token_id)
    if not stock:
        rk.patch(model)
    some = package._texts(model, own, PAIRS, cut=100, room=120, limit=HOME)
    check = next(c for c in all_checks(some, routes=(FINAL,)) if c.name == "math library")

    def answers(request, setting, variable):
        given = {n: torch.tensor(v) for n, v in request["inputs"][0].items()}
        found = fresh._final(model, "mean", stock, given, request["tokens"])
        with controls.one_ulp_off("layer_norm" if head else "normalize"):
            off = fresh._final(model, "mean", stock, given, request["tokens"])
        off = np.nextafter(found, np.float32(2)) if stock else off
        return [off if variable == wrong else found, off]

    monkeypatch.setattr(fresh, "_ask", answers)
    for wrong in ("", *SETTINGS):
        setting = package.Setting.of(model, "portable", None)
        finals = fresh.Finals(fresh.request_for("here", model, "mean", stock, setting), setting, model, some, HOME)
        found = measure(check, Session(some, fresh.runner_of(model, "mean", stock), {FINAL: finals.answer}))
        assert (found.equal, found.total) == (HOME * (len(SETTINGS) - bool(wrong)), HOME * len(SETTINGS)), wrong
        assert found.holds == (not wrong) and found.promise == "machine-invariant" and found.flips == 0 < found.ordered
        assert stock or finals.control().caught


def test_a_fresh_process_that_fails_says_why(tmp_path) -> None:
    model, own = cross_encoder()
    with pytest.raises(RuntimeError, match=r"(?s)fresh process failed.*must be a local model folder"):
        run(model, own, source=str(tmp_path / "nowhere"))


def test_too_few_texts() -> None:
    model, own = cross_encoder()
    with pytest.raises(ValueError, match=r"at least 8 different texts.*got 3"):
        verify(model, own, [*PAIRS[:3], *PAIRS[:3]])
    assert not any("forward" in m.__dict__ for m in model.modules())


# ---- power -------------------------------------------------------------------------------------------------------------------


def leaking(true):
    """Attention that lets a row see its neighbours: what a kernel with wrong offsets does."""

    def select(op, device, mode=PORTABLE):
        serve = true(op, device, mode)
        if op != "attention":
            return serve

        def attention(q, k, v, cu, *rest):
            out = serve(q, k, v, cu, *rest).clone()
            out[int(cu[1]) :] += 1e-6 * k[: int(cu[1])].mean()
            return out

        return attention

    return select


def test_a_kernel_that_leaks_between_rows_is_caught(monkeypatch) -> None:
    model, own = cross_encoder()
    monkeypatch.setattr(registry, "select", leaking(registry.select))
    report = run(model, own)
    assert not report.ok
    assert {"batch", "position", "neighbours", "packed"} <= broken(report)
    assert "repeat" not in broken(report)


def test_a_runner_that_reads_padding_is_caught(monkeypatch) -> None:
    """The mask is only ever right up to the next multiple of 4."""
    true = Sequences.from_mask

    def blurred(mask, *shape, **named):
        wide = mask.clone()
        for row in wide:
            n = int(row.sum())
            if not row[-1]:
                row[: n + (-n) % 4] = True
        return true(wide, *shape, **named)

    model, own = cross_encoder()
    monkeypatch.setattr(Sequences, "from_mask", blurred)
    report = run(model, own)
    assert {"padding length", "padding value"} <= broken(report)
    assert "repeat" not in broken(report) and "position" not in broken(report)


@pytest.mark.parametrize("name", controls.SIGHTED)
def test_a_check_without_its_condition_is_reported_as_powerless(name: str, monkeypatch) -> None:
    def blind(*args, **kwargs):
        checks = all_checks(*args, **kwargs)
        return [dataclasses.replace(c, scorings=((Call((0,)), Call((1,))),)) if c.name == name else c for c in checks]

    own = texts()
    reference = np.arange(len(own.tokens), dtype=np.float32)[:, None]
    found = controls.sighted_controls(own, blind(own), reference)
    assert [c.expected for c in found if not c.caught] == [name]
    assert next(c for c in found if c.expected == name).seen_by == ()


def test_a_powerless_check_fails_the_run(monkeypatch) -> None:
    def blind(*args, **kwargs):
        checks = all_checks(*args, **kwargs)
        return [
            dataclasses.replace(c, scorings=tuple(tuple(dataclasses.replace(k, side="") for k in s) for s in c.scorings))
            if c.name == "padding side"
            else c
            for c in checks
        ]

    monkeypatch.setattr(package, "all_checks", blind)
    model, own = cross_encoder()
    report = run(model, own)
    assert not report.broken and not report.ok
    assert {c.expected for c in report.powerless} == {"padding side"}
    assert "not seen by padding side: that check has no power here" in printed(report)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_each_sighted_control_is_seen_by_its_own_check_only(n: int) -> None:
    own = many(n)
    reference = np.linspace(-3, 3, n, dtype=np.float32)[:, None]
    found = controls.sighted_controls(own, all_checks(own, routes=("packed", "process", "isa:scalar", FINAL)), reference)
    assert {c.expected: c.seen_by for c in found} == {c.expected: (c.expected,) for c in found}
    assert len(found) == len(controls.SIGHTED) + 4


def many(n: int) -> Texts:
    """n rows of many lengths, the longest as long as the model takes."""
    tokens = tuple({"input_ids": [5 + (i * 7 + j) % 90 for j in range(1 + (i * 13) % 40 if i else 40)]} for i in range(n))
    return Texts(
        tokens,
        tuple(("q", str(i)) for i in range(n)),
        ((None, tuple(range(n))),),
        pad=1,
        pad_type=0,
        special=(2, 0),
        vocabulary=100,
        cut=40,
        room=40,
    )


# ---- checks and measure ------------------------------------------------------------------------------------------------------


def test_every_batch_has_its_size_and_covers_every_row() -> None:
    own = many(40)
    batch = next(c for c in all_checks(own) if c.name == "batch")
    for scoring in batch.scorings:
        assert len({len(call.rows) for call in scoring}) == 1
        assert {r for call in scoring for r in call.rows} == set(range(40))


def test_every_row_comes_to_stand_in_every_place() -> None:
    position = next(c for c in all_checks(many(8)) if c.name == "position")
    places = {(row, place) for s in position.scorings for call in s for place, row in enumerate(call.rows)}
    assert {(row, place) for row in range(HOME) for place in range(HOME) if place != row} <= places


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [None, 2, MIXED])
@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "offset", "int32", "bool mask"])
def test_inputs_hold_the_rows_whatever_the_padding(side: str, fill: int | None, layout: str) -> None:
    own = many(8)
    rows = (3, 1, 2)
    inputs = build(own, Call(rows, length=45, side=side, fill=fill, layout=layout))
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    assert ids.shape == (3, 45)
    for i, row in enumerate(rows):
        assert ids[i][mask[i]].tolist() == own.tokens[row]["input_ids"]
        assert bool(mask[i, 0]) == (side == "right") and bool(mask[i, -1]) == (side == "left")
    outside = ids[~mask]
    assert bool((outside == own.pad).all()) if fill is None else bool((outside != own.pad).all())
    assert (ids.dtype == torch.int32) == (layout == "int32")
    assert ids.is_contiguous() == (layout not in ("transposed", "strided"))
    assert (ids.storage_offset() != 0) == (layout == "offset")


def test_differences_flips_and_nan_are_counted() -> None:
    own = many(8)
    right = np.arange(8, dtype=np.float32)[:, None]
    wrong = right.copy()
    wrong[[2, 3]] = wrong[[3, 2]]
    wrong[5] = np.nan
    check = Check("batch-invariant", "batch", "", "alone", ((Call(home(0)),),))

    def runner(inputs):
        return torch.from_numpy(right[:1] if len(inputs["input_ids"]) == 1 else wrong)

    session = Session(own, runner, answers={Call((r,)): right[r : r + 1] for r in range(8)})
    result = measure(check, session)
    assert (result.equal, result.total) == (5, 8)
    assert result.max_difference == float("inf") and not result.holds
    assert result.flips == 1 + 7 and result.ordered == 28  # 2 and 3 change places; NaN has no order with the other seven


def test_minus_zero_is_not_zero() -> None:
    own = many(8)
    check = Check("repeatable", "repeat", "", "turn", ((Call((0,), turn=1),),))
    zero = np.zeros((1, 1), np.float32)
    session = Session(own, lambda inputs: torch.zeros(1, 1), answers={Call((0,)): zero, Call((0,), turn=1): -zero})
    assert measure(check, session).equal == 0


def test_shared_calls_run_once() -> None:
    calls = []
    own = many(16)

    def runner(inputs):
        calls.append(1)
        return torch.zeros(len(inputs["input_ids"]), 1)

    session, checks = Session(own, runner), all_checks(own)
    for check in checks:
        measure(check, session)
    assert len(calls) == len(set().union(*(c.calls() for c in checks)))


# ---- report and texts --------------------------------------------------------------------------------------------------------


def test_the_report_as_json() -> None:
    model, own = cross_encoder()
    found = json.loads(json.dumps(run(model, own).as_dict(), allow_nan=False))
    assert found["ok"] is True and found["rows"] == HOME
    assert {c["check"] for c in found["checks"]} >= set(controls.SIGHTED)
    assert all(c["caught"] for c in found["controls"])
    assert {"numerics", "torch", "transformers", "backend", "isa", "threads"} <= found["environment"].keys()


def test_infinite_differences_are_json() -> None:
    row = package.Result("batch-invariant", "batch", "", 0, 1, float("inf"))
    report = VerifyReport([row], [], {}, scorer="x", kind="embedding", rows=8, lengths=(1, 2))
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["checks"][0]["max_difference"] is None


def test_default_texts_are_enough_and_always_the_same() -> None:
    pairs = default_pairs()
    assert len(set(pairs)) == 64 and pairs == default_pairs()
    lengths = sorted(len(d.split()) for _, d in pairs)
    assert lengths[0] <= 5 and lengths[-1] >= 150


def test_progress_ends_at_one() -> None:
    seen: list[float] = []
    model, own = cross_encoder()
    run(model, own, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
