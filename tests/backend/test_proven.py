"""cuBLASLt in place of ours: only where a trial showed equal bits, on this device, with this version, and never in a capture.

cuBLASLt is a stand-in (simulated/lt.cpp), ours are csrc/cuda's kernels in the simulator, with an H100's sums. The real one
was never asked: tools/probes/cublaslt.py does that on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
import subprocess
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rerank_kernels as rk
import tensor
from ptxsim.once import alone
from rerank_kernels.backend.native import cublaslt, linear, proven
from rerank_kernels.errors import BackendError
from simulated import served

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests" / "simulated" / "lt.cpp"
EQUAL, ZEROS, LAST_ROW, SPLITS, FIRST_SPLITS, WORKSPACE, SHORT_SUMS, FAILS, FAILS_LATER, CLOSED, KEEPS = range(11)
TRIAL = 3  # calls of cuBLASLt in a trial
N, K = 136, 40
KEY = "key = str(device), lt.path, lt.version"

pytestmark = pytest.mark.skipif(served.missing("cuda") is not None, reason=str(served.missing("cuda")))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lt") / "libcublasLt.so.13"
    with alone(made):
        subprocess.run(["c++", "-std=c++20", "-O2", "-fPIC", "-shared", "-o", made, SOURCE], check=True)
    return made


class StandIn:
    """Takes the place of what torch has loaded, and of the device."""

    def __init__(self, compiled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled, self.folder, self.monkeypatch = compiled, folder, monkeypatch
        self.count, self.capturing = itertools.count(), False
        monkeypatch.setenv(proven.SETTING, "1")
        self.judge(proven)

    def judge(self, module: Any) -> None:
        """`module` is proven, or a mutant of it."""
        patches = {
            "_here": {},
            "DEVICES": ("cpu",),
            "on": lambda device: contextlib.nullcontext(),
            "stream": lambda device: 0,
            "capturing": lambda device: self.capturing,
        }
        for name, value in patches.items():
            self.monkeypatch.setattr(module, name, value)
        self.monkeypatch.setattr(linear, "proven", module)

    def load(self, behaviour: int, version: int = 130100, same_path: bool = False) -> None:
        if not same_path:
            self.path = shutil.copy(self.compiled, self.folder / f"libcublasLt.so.{next(self.count)}")
        self.c = ctypes.CDLL(str(self.path))
        self.c.standin_behave(behaviour, ctypes.c_size_t(version))
        loaded = cublaslt.CublasLt(str(self.path))
        self.monkeypatch.setattr(cublaslt, "loaded", lambda: loaded)

    @property
    def calls(self) -> int:
        return int(self.c.standin_calls())


@pytest.fixture
def standin(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with tensor.simulated("cuda", tensor.H100):
        yield StandIn(compiled, tmp_path, monkeypatch)


def numbers(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(m: int = 64, dtype: torch.dtype = torch.float16, form: str = cublaslt.PRODUCT, **more: Any) -> Tensor:
    given = {"bias": numbers(N, dtype=dtype, seed=2)} if form == cublaslt.BIAS else {}
    given |= {"residual": numbers(m, N, dtype=dtype, seed=3)} if form == cublaslt.RESIDUAL else {}
    x, weight = numbers(m, K, dtype=dtype), numbers(N, K, dtype=dtype, seed=1)
    return rk.linear(x, weight, **{**given, "mode": "tensor", **more})


def ours(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **more: Any) -> Tensor:
    with monkeypatch.context() as inside:
        inside.setenv(proven.SETTING, "0")
        return call(*arguments, **more)


def bits(y: Tensor) -> Tensor:
    return y.view(torch.int16)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


# ---- what is equal serves


@pytest.mark.parametrize("form", [cublaslt.PRODUCT, cublaslt.BIAS, cublaslt.RESIDUAL])
@pytest.mark.parametrize("dtype", tensor.HALVES, ids=str)
def test_what_has_our_bits_serves(standin: StandIn, monkeypatch: Any, form: str, dtype: torch.dtype) -> None:
    standin.load(EQUAL)
    for i, m in enumerate((64, 33, 50, 64)):
        assert same(call(m, dtype, form), ours(monkeypatch, m, dtype, form))
        assert standin.calls == TRIAL + i + 1, "one trial, then one call each"
    assert "1 kinds of products by cuBLASLt, 0 by ours" in proven.said()


def test_a_class_of_m_has_its_own_trial(standin: StandIn) -> None:
    standin.load(EQUAL)
    for m in (64, 65, 128, 129):
        call(m)
    assert standin.calls == 3 * TRIAL + 4


@pytest.mark.parametrize(
    ("why", "m", "more"),
    [
        ("few rows", 32, {}),
        ("one row", 1, {}),
        ("an activation", 64, {"activation": "gelu"}),
        ("a float32 result", 64, {"out_dtype": torch.float32}),
        ("bias beside residual", 64, {"bias": numbers(N), "residual": numbers(64, N)}),
        ("a bias in another dtype", 64, {"bias": torch.randn(N)}),
        ("an address that no tensor core reads", 64, {"residual": numbers(64 * N + 1)[1:].view(64, N)}),
    ],
)
def test_what_is_not_asked_of_it(standin: StandIn, why: str, m: int, more: dict[str, Any]) -> None:
    standin.load(EQUAL)
    call(m, **more)
    assert standin.calls == 0, why


def test_sizes_that_it_is_not_asked_for(standin: StandIn) -> None:
    standin.load(EQUAL)
    for n, k in ((20, 40), (24, 44)):
        rk.linear(numbers(64, k), numbers(n, k), mode="tensor")
    assert standin.calls == 0
    assert proven.kind_of(torch.empty(proven.MOST + 1, K).half(), numbers(N, K), None, None) is None
    assert proven.kind_of(torch.empty(proven.MOST, K).half(), numbers(N, K), None, None) is not None


def test_an_argument_on_another_device_is_the_ops_own_to_refuse(standin: StandIn) -> None:
    standin.load(EQUAL)
    assert proven.kind_of(numbers(64, K), numbers(N, K), torch.empty(N, device="meta").half(), None) is None


def test_off_it_is_not_even_looked_for(standin: StandIn, monkeypatch: Any) -> None:
    monkeypatch.delenv(proven.SETTING)
    monkeypatch.setattr(cublaslt, "loaded", lambda: pytest.fail("it is off by default"))
    call()
    assert proven.said().startswith(f"off; {proven.SETTING}=1 ")


def test_a_word_that_is_no_setting(standin: StandIn, monkeypatch: Any) -> None:
    standin.load(EQUAL)
    monkeypatch.setenv(proven.SETTING, "yes")
    with pytest.raises(BackendError, match=f"{proven.SETTING} must be 0 or 1, got 'yes'; 1 lets"):
        call()
    monkeypatch.setenv(proven.SETTING, "1")
    call()
    assert standin.calls


# ---- what is not equal never does


@pytest.mark.parametrize("behaviour", [ZEROS, LAST_ROW])
@pytest.mark.parametrize("form", [cublaslt.PRODUCT, cublaslt.BIAS, cublaslt.RESIDUAL])
def test_one_bit_in_a_hard_row_and_it_never_serves(standin: StandIn, monkeypatch: Any, behaviour: int, form: str) -> None:
    """The sign of a zero sum shows in no result of `call`, and in few of the trial's."""
    standin.load(behaviour)
    assert same(call(form=form), ours(monkeypatch, form=form))
    before = standin.calls
    assert same(call(form=form), ours(monkeypatch, form=form))
    assert standin.calls == before, "never again"
    assert "0 kinds of products by cuBLASLt, 1 by ours" in proven.said()
    assert f"  ours: {form}, float16, N 136, K 40, M 33 to 64: " in proven.said()
    assert "results have other bits than ours, at M = " in proven.said()


def test_a_library_that_keeps_the_sign_of_what_underflows_serves_float16_alone(standin: StandIn, monkeypatch: Any) -> None:
    """Products of float16 do not underflow in float32; those of bfloat16 may, and ours are +0 then."""
    standin.load(KEEPS)
    for dtype, taken in ((torch.float16, True), (torch.bfloat16, False)):
        assert same(call(dtype=dtype), ours(monkeypatch, dtype=dtype))
        assert (f"  ours: {cublaslt.PRODUCT}, {str(dtype)[6:]}, " in proven.said()) is not taken


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (SPLITS, "none of its 2 algorithms is without a split of K"),
        (WORKSPACE, "none of its 2 algorithms"),
        (SHORT_SUMS, "none of its 2 algorithms"),
        (FAILS, "cublasLtMatmul gives status 13"),
        (CLOSED, "cublasLtCreate gives status 3"),
    ],
)
def test_what_splits_or_fails_never_serves(standin: StandIn, monkeypatch: Any, behaviour: int, said: str) -> None:
    standin.load(behaviour)
    assert same(call(), ours(monkeypatch)) and same(call(), ours(monkeypatch))
    assert standin.calls == (behaviour == FAILS)
    assert said in proven.said()


def test_an_algorithm_that_splits_is_passed_over(standin: StandIn) -> None:
    standin.load(FIRST_SPLITS)
    call()
    (here,) = proven._here.values()
    (verdict,) = here.verdicts.values()
    assert verdict.product is not None and verdict.product.config["id"] == 1


def test_a_failure_after_the_trial_is_ours_to_serve(standin: StandIn, monkeypatch: Any) -> None:
    standin.load(FAILS_LATER)
    for _ in range(6):
        assert same(call(), ours(monkeypatch))
    assert standin.calls == 7, "three of the trial, three that served, one that failed"
    assert "failed after its trial: cublasLtMatmul gives status 13" in proven.said()


def test_without_memory_for_a_trial_ours_serve(standin: StandIn, monkeypatch: Any) -> None:
    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none is left")

    standin.load(EQUAL)
    monkeypatch.setattr(proven, "operand", none_left)
    assert same(call(), ours(monkeypatch))
    assert "no memory for the trial" in proven.said()


def test_without_cublaslt_ours_serve(standin: StandIn, monkeypatch: Any) -> None:
    monkeypatch.setattr(cublaslt, "loaded", cublaslt.loaded)
    monkeypatch.setattr(cublaslt, "paths", lambda: ["/a/libcublasLt.so.12", "/b/libcublasLt.so.13"])
    cublaslt.loaded.cache_clear()
    try:
        assert same(call(), ours(monkeypatch))
        assert "has loaded 2 libraries libcublasLt.so, not one: /a/libcublasLt.so.12, /b" in proven.said()
    finally:
        cublaslt.loaded.cache_clear()


def test_what_is_loaded_is_found(standin: StandIn) -> None:
    standin.load(EQUAL)
    assert str(standin.path) in cublaslt.paths()


# ---- per device and version, once, and in no capture


def test_another_version_and_another_device_are_tried_anew(standin: StandIn, monkeypatch: Any) -> None:
    standin.load(EQUAL)
    call()
    standin.load(ZEROS, version=130200, same_path=True)
    assert same(call(), ours(monkeypatch))
    assert standin.calls and "version 130200: 0 kinds" in proven.said() and "version 130100: 1 kinds" in proven.said()
    assert proven.of(torch.device("cpu")) is not proven.of(torch.device("cpu", 1))


def test_in_a_capture_there_is_no_trial(standin: StandIn, monkeypatch: Any) -> None:
    standin.load(EQUAL)
    standin.capturing = True
    assert same(call(), ours(monkeypatch)) and standin.calls == 0
    assert standin.c.standin_opened() == 0, "nor is it opened, which may take memory"
    standin.capturing = False
    call()
    standin.capturing = True
    assert same(call(), ours(monkeypatch)) and standin.calls == TRIAL + 2, "what was shown before may be captured"


def test_threads_share_one_trial(standin: StandIn) -> None:
    standin.load(EQUAL)
    kind = cublaslt.Kind(torch.float16, N, K, cublaslt.PRODUCT, 64)
    here = proven.of(torch.device("cpu"))
    assert here is not None
    found: list[proven.Verdict] = []
    plain = lambda x, weight, bias, residual: x @ weight.t()  # noqa: E731  # the simulator serves one thread
    threads = [threading.Thread(target=lambda: found.append(proven.judged(here, kind, plain))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({id(v) for v in found}) == 1 and standin.calls == 1


# ---- the trial's numbers


@pytest.mark.parametrize("dtype", tensor.HALVES, ids=str)
def test_the_rows_of_a_trial_are_what_they_are_called(dtype: torch.dtype) -> None:
    x = proven.operand(64, K, dtype, torch.device("cpu"), 1)
    rows = {kind: x[i::8].float() for i, kind in enumerate(proven.HARD)}
    tiny = torch.finfo(dtype).smallest_normal
    assert all(rows[kind].isfinite().all() for kind in proven.HARD[:6])
    assert rows["infinite"].isinf().any() and rows["NaN"].isnan().any()
    assert (rows["infinite"] > 1e30).any() and (rows["infinite"] < -1e30).any()
    zeros = rows["zeros"][rows["zeros"] == 0]
    assert {bool(s) for s in zeros.signbit()} == {False, True} and zeros.numel() > K
    assert ((rows["subnormal"].abs() < tiny) & (rows["subnormal"] != 0)).any()
    assert rows["far exponents"].abs().log2().clamp(min=-60).std() > rows["normal"].abs().log2().clamp(min=-60).std() + 1
    other = proven.operand(64, K, dtype, torch.device("cpu"), -1)[2::8].float()
    assert torch.equal(rows["cancelling"][:, 1::2], rows["cancelling"][:, ::2]) and torch.equal(other[:, 1::2], -other[:, ::2])


def test_the_rows_are_the_same_whatever_the_default_dtype_is(monkeypatch: Any) -> None:
    want = proven.operand(16, K, torch.bfloat16, torch.device("cpu"), 1)
    torch.set_default_dtype(torch.float16)
    try:
        assert same(proven.operand(16, K, torch.bfloat16, torch.device("cpu"), 1), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_added_has_every_kind_beside_every_kind_of_sum() -> None:
    x = proven.addend(128, 128, torch.float16, torch.device("cpu"))
    i, j = torch.arange(128)[:, None], torch.arange(128)[None]
    kinds = (i // 8 + j // 8) % 8
    assert x[kinds == 7].isnan().any() and not x[kinds != 7].isnan().any()
    assert x[kinds == 6].isinf().any() and not x[(kinds != 6) & (kinds != 7)].isinf().any()
    assert (x[kinds == 3] == 0).float().mean() > 0.7


def test_a_ladder_has_both_ends_of_its_class() -> None:
    for rows in (64, 128, 32768):
        low, middle, high = proven.ladder(rows)
        assert low == rows // 2 + 1 and low < middle < high == rows and middle % 2 == 1
        kinds = {1 << (m - 1).bit_length() for m in (low, middle, high)}
        assert kinds == {rows}


def test_the_structures_have_the_sizes_of_the_header() -> None:
    assert ctypes.sizeof(cublaslt.Algorithm) == 64 and ctypes.sizeof(cublaslt.Heuristic) == 96


# ---- mutants


def keeps(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every test above says in full."""
    for behaviour in (ZEROS, LAST_ROW, SPLITS, WORKSPACE, SHORT_SUMS, FAILS_LATER):
        standin.load(behaviour)
        for _ in range(5):
            assert same(call(50), ours(monkeypatch, 50))
        served = sum(v.product is not None for here in linear.proven._here.values() for v in here.verdicts.values())
        assert not served
        linear.proven._here.clear()
    standin.load(EQUAL)
    call()
    standin.load(LAST_ROW, version=130200, same_path=True)
    assert same(call(), ours(monkeypatch))
    standin.load(LAST_ROW)
    assert same(call(), ours(monkeypatch))
    assert linear.proven.of(torch.device("cpu")) is not linear.proven.of(torch.device("cpu", 1))
    linear.proven._here.clear()
    standin.load(EQUAL)
    standin.capturing = True
    call()
    assert standin.c.standin_opened() == 0
    standin.capturing = False
    call(128)
    standin.capturing = True
    call()
    assert standin.calls == TRIAL + 1
    standin.capturing = False
    for _ in range(3):
        call()
    assert standin.calls == 2 * TRIAL + 4


def mutant(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1, f"{module.__name__} holds {source.count(old)} times: {old}"
    made = types.ModuleType(module.__name__)
    made.__file__ = module.__file__
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), made.__dict__)
    return made


PROVEN = {
    "the trial is skipped": ("            if differ:", "            if False:"),
    "the trial has easy rows only": ('HARD = ("normal", "far', 'HARD = ("normal",) * 8 or ("normal", "far'),
    "its last row is left out": ("want.view(torch.int16)).sum())", "want.view(torch.int16))[:-1].sum())"),
    "one M for a class": ("return rows // 2 + 1, rows // 4 * 3 - 3, rows", "return (rows // 2 + 1,)"),
    "a verdict for every version": (KEY, "key = str(device), lt.path, 0"),
    "a verdict for every file": (
        "key = str(device), lt.path, lt.version",
        'key = str(device), "", lt.version',
    ),
    "a verdict for every device": (KEY, 'key = "", lt.path, lt.version'),
    "a trial in a capture": ("            if capturing(x.device):", "            if False:"),
    "opened in a capture": ("    if key not in _here and capturing(device):", "    if False:"),
    "a trial per call": ("verdict = here.verdicts.get(kind)", "verdict = here.verdicts.pop(kind, None)"),
    "a failure is no verdict": ('here.verdicts[kind] = Verdict(None, f"failed', 'Verdict(None, f"failed'),
}
CUBLASLT = {
    "splits are taken": ('whole = config["splitk"] in (0, 1)', 'whole = config["splitk"] in (0, 1, 4)'),
    "workspaces are taken": (" and one.workspace == 0", ""),
    "float16 sums are taken": (" and numerics & _SUMS == _SUMS_32F", ""),
    "a status is not looked at": ('raise CublasLtError(f"cublasLt{name}', '(f"cublasLt{name}'),
}


def test_the_control_of_the_mutants(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps(standin, monkeypatch)


@pytest.mark.parametrize("name", PROVEN)
def test_mutant_of_the_trial_is_caught(standin: StandIn, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    standin.judge(mutant(proven, *PROVEN[name]))
    with pytest.raises(AssertionError):
        keeps(standin, monkeypatch)


@pytest.mark.parametrize("name", CUBLASLT)
def test_mutant_of_the_binding_is_caught(standin: StandIn, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = mutant(cublaslt, *CUBLASLT[name])
    monkeypatch.setattr(cublaslt, "Product", made.Product)
    monkeypatch.setattr(proven, "Product", made.Product)
    monkeypatch.setattr(cublaslt.CublasLt, "__call__", made.CublasLt.__call__)
    monkeypatch.setattr(proven, "CublasLtError", (cublaslt.CublasLtError, made.CublasLtError))
    with pytest.raises(AssertionError):
        keeps(standin, monkeypatch)
