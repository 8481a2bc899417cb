"""The kernels for Hopper serve after a trial on the device, and not where one bit differs: native/hopper.py, in the simulator.

The trial itself runs here on few tiles of small GPUs, with right kernels and with such as have one mistake; what is made of its
verdict is asked with stand-ins.
"""

from __future__ import annotations

import ctypes
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tensor
from cases import numbers, offsets
from conftest import ran
from hopper import HALF, Edit, kernels, simulated
from invariants import same
from rerank_kernels.backend.native import attention as native_attention
from rerank_kernels.backend.native import hopper
from rerank_kernels.backend.native import linear as native_linear
from rerank_kernels.errors import BackendError, FallbackWarning
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import bmm, linear

SMALL = simulated.Gpu(90, 1)
CPU = torch.device("cpu")
FEW = {hopper.LINEAR: simulated.FEW_HOPPER_WAYS, hopper.ATTENTION: (0, 1)}
LENGTHS = (150, 17, 3, 33, 5, 20, 9, 4, 0, 1)

# A mistake of one tile of three, and of one way of two. The first is in the last digits, the second where a row has keys of two
# tiles.
LINEAR_SEED = Edit("sm90/linear.cu", "sum[i][j] = 0.0f;", "sum[i][j] = T::BN == 32 ? 0x1p-24f : 0.0f;").only(HALF)
ATTENTION_SEED = Edit(
    "sm90/attention.cu", "weigh(tile);\n            fade();\n            round();", "weigh(tile);\n            round();"
).only(HALF)


@pytest.fixture(autouse=True)
def _cuda() -> None:
    ran("cuda")


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hopper.SETTING, raising=False)


def on_hopper(**how: Any) -> Any:
    return tensor.simulated("cuda", tensor.H100, **{"gpu": SMALL, "trial": True, **how})


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial of few tiles and short sequences, inside on_hopper()."""
    monkeypatch.setattr(hopper, "HALVES", (HALF,))
    monkeypatch.setattr(hopper, "LENGTHS", LENGTHS)
    hopper.ways = FEW.__getitem__


def product() -> Tensor:
    return linear(numbers("x", (40, 72), HALF), numbers("w", (24, 72), HALF), mode="tensor")


def products() -> Tensor:
    return bmm(numbers("a", (2, 9, 72), HALF), numbers("b", (2, 72, 8), HALF), mode="tensor")


def heads() -> Tensor:
    q, k, v = (numbers(name, (30, 1, 64), HALF) for name in "qkv")
    return attention(q, k, v, cu_seqlens=offsets((11, 19)), mode="tensor")


CALLS: dict[str, Callable[[], Tensor]] = {hopper.LINEAR: product, hopper.ATTENTION: heads}


def room() -> str:
    """Of the one kernel that was launched since this was last asked."""
    (name,) = kernels()
    return "sm90" if "linear_hopper" in name or "attention_wgmma" in name else "sm80"


def served(call: Callable[[], Tensor]) -> str:
    """The room that serves a call."""
    kernels()
    call()
    return room()


def says(verdict: Any, calls: list[hopper.Here]) -> Callable[[hopper.Here], Any]:
    def tried(here: hopper.Here) -> Any:
        calls.append(here)
        return verdict

    return tried


# ---- the trial


@pytest.mark.parametrize("launcher", CALLS)
def test_kernels_with_equal_bits_are_taken(launcher: str, monkeypatch: Any) -> None:
    with on_hopper():
        few(monkeypatch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels()  # those of tests before this one
            CALLS[launcher]()
        tried = kernels()[:-1]  # the last one is of the call
        assert served(CALLS[launcher]) == "sm90"
        assert hopper.said() == f"cpu, {hopper.OPS[launcher]}: taken, the trial found every bit equal"
    ours = {name for name in tried if "hopper" in name or "wgmma" in name}
    assert len(ours) == (3 if launcher == hopper.LINEAR else 4), "every tile was tried"


@pytest.mark.parametrize(("launcher", "seed"), [(hopper.LINEAR, LINEAR_SEED), (hopper.ATTENTION, ATTENTION_SEED)])
def test_kernels_with_one_mistake_never_serve(launcher: str, seed: Any, monkeypatch: Any) -> None:
    call, op = CALLS[launcher], hopper.OPS[launcher]
    with tensor.simulated("cuda", tensor.H100):
        want = call()
    with on_hopper(edit=seed):
        few(monkeypatch)
        monkeypatch.setattr(hopper, "WIDTHS", (64,))  # those that the seed leaves
        with pytest.warns(FallbackWarning, match=f"the kernels for Hopper do not serve {op}: .* have other bits, at") as warned:
            same(call(), want, "refused")
        assert len([w for w in warned if w.category is FallbackWarning]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert served(call) == "sm80", "never again"
        assert f"cpu, {op}: not taken: " in hopper.said()
        assert ("float16, way 5" if launcher == hopper.LINEAR else "float16, way 1") in hopper.said()
        other = hopper.ATTENTION if launcher == hopper.LINEAR else hopper.LINEAR
        monkeypatch.setattr(hopper, "tried", says(hopper.EQUAL, []))
        assert served(CALLS[other]) == "sm90", "op by op"


def test_a_kernel_that_fails_never_serves(monkeypatch: Any) -> None:
    stands = Edit("sm90/linear.cu", "empty[ring.slot].wait(ring.parity ^ 1);", "empty[ring.slot].wait(ring.parity);").only(HALF)
    with on_hopper(edit=stands):
        few(monkeypatch)
        with pytest.warns(FallbackWarning, match="the trial failed: .*1 problem"):
            product()
        with simulated.forced(hopper.LINEAR, 0), pytest.raises(RuntimeError, match="deadlock in block"):
            product()
        assert served(product) == "sm80"


def test_after_a_failure_that_ends_cudas_work_the_error_says_what_to_do(monkeypatch: Any) -> None:
    def stands(here: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure\nand more")

    with on_hopper():
        hopper.alive = lambda device: False
        monkeypatch.setattr(hopper, "compared", stands)
        with pytest.raises(BackendError, match=f"unspecified launch failure; start the process again with {hopper.SETTING}=0"):
            product()
        monkeypatch.setenv(hopper.SETTING, "0")
        assert served(product) == "sm80", "the advice"


def test_without_memory_for_a_trial(monkeypatch: Any) -> None:
    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none is left")

    with on_hopper(), monkeypatch.context() as inside:
        inside.setattr(hopper, "operand", none_left)
        with pytest.warns(FallbackWarning, match="there was no memory for the trial"):
            product()
        assert served(product) == "sm80"


# ---- when, and for whom


def keeps(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of a verdict; `module` is hopper, or a mutant of it, inside on_hopper()."""
    calls: list[Any] = []
    monkeypatch.setattr(module, "tried", says("other bits", calls))
    module.capturing = lambda device: True
    assert served(product) == "sm80" and not calls, "in a capture there is no trial"
    module.capturing = lambda device: False
    with pytest.warns(FallbackWarning):
        assert served(product) == "sm80" and served(products) == "sm80" and len(calls) == 1, "one trial for linear and bmm"
    monkeypatch.setattr(module, "tried", says(module.EQUAL, calls))
    assert served(heads) == "sm90" and len(calls) == 2, "another for attention"
    module.capturing = lambda device: True
    assert served(heads) == "sm90" and served(product) == "sm80" and len(calls) == 2, "what is known may be captured"
    module.capturing = lambda device: False
    opened: list[tuple[str, int, bool]] = []
    before, module.open_room = module.open_room, lambda *told: opened.append(told)
    module.before_a_call(module.LINEAR, torch.device("cpu", 1))
    assert len(calls) == 3 and opened == [(module.LINEAR, 1, True)], "another device, another trial"
    module.open_room = before
    for said, room in (("1", "sm90"), ("0", "sm80"), (None, "sm80")):
        monkeypatch.delenv(module.SETTING, raising=False) if said is None else monkeypatch.setenv(module.SETTING, said)
        assert served(product) == room, f"{module.SETTING}={said}"
    assert len(calls) == 3


def test_what_is_made_of_a_verdict(monkeypatch: Any) -> None:
    with on_hopper():
        keeps(hopper, monkeypatch)


def test_the_library_knows_devices_apart() -> None:
    loaded = ctypes.CDLL(str(simulated.library()))
    device = ctypes.c_int.in_dll(loaded, "ptxsim_device")
    with on_hopper():
        hopper.open_room(hopper.LINEAR, 1, True)
        call = lambda: torch.ops.rerank_kernels.linear_tensor(  # noqa: E731
            numbers("x", (40, 72), HALF), numbers("w", (24, 72), HALF), None, 0, None, HALF
        )
        assert served(call) == "sm80", "at first it is open for none, whoever calls the library"
        device.value = 1
        try:
            assert served(call) == "sm90"
        finally:
            device.value = 0
            hopper.open_room(hopper.LINEAR, 1, False)
        for index in (-1, 64):
            with pytest.raises(RuntimeError, match=f"device must be from 0 to 63, got {index}"):
                hopper.open_room(hopper.LINEAR, index, True)
        with pytest.raises(RuntimeError, match=r"kernel must be one of .*linear_hopper_tensor 8.*, got no_such"):
            hopper.open_room("no_such", 0, True)


@pytest.mark.parametrize("gpu", [simulated.AMPERE, simulated.Gpu(100, 148)])
def test_other_gpus_have_no_trial(gpu: Any, monkeypatch: Any) -> None:
    calls: list[Any] = []
    with on_hopper(gpu=gpu):
        monkeypatch.setattr(hopper, "tried", says(hopper.EQUAL, calls))
        assert served(product) == "sm80" and not calls
        assert hopper.said().startswith("nothing was tried yet")


def test_a_build_without_the_kernels_has_no_trial(monkeypatch: Any) -> None:
    calls: list[Any] = []
    with on_hopper():
        hopper.ways = lambda launcher: ()
        monkeypatch.setattr(hopper, "tried", says(hopper.EQUAL, calls))
        assert served(product) == "sm80" and not calls


def test_threads_share_one_trial(monkeypatch: Any) -> None:
    calls: list[Any] = []
    with on_hopper():
        meet = threading.Barrier(4)

        def slow(here: hopper.Here) -> str:
            calls.append(here)
            meet.reset()
            return hopper.EQUAL

        def ask() -> None:
            hopper.before_a_call(hopper.LINEAR, CPU)

        monkeypatch.setattr(hopper, "tried", slow)
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(calls) == 1 and hopper.of(hopper.LINEAR, CPU).verdict == hopper.EQUAL


def test_a_way_is_forced_for_one_thread() -> None:
    """A trial that is under way on one thread opens nothing for another."""
    with on_hopper():
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(hopper, "tried", says("other bits", []))
        with pytest.warns(FallbackWarning):
            product()
        monkeypatch.undo()
        thread = threading.Thread(target=lambda: hopper.force(hopper.LINEAR, 0))
        thread.start()
        thread.join()
        assert served(product) == "sm80"
        with simulated.forced(hopper.LINEAR, 0):
            assert served(product) == "sm90", "a way that is forced here serves here"


def test_a_word_that_is_no_setting(monkeypatch: Any) -> None:
    with on_hopper():
        for word in ("yes", "", "2"):
            monkeypatch.setenv(hopper.SETTING, word)
            with pytest.raises(BackendError, match=f"{hopper.SETTING} must be 0 or 1, or not be set, got {word!r}; 0 never"):
                product()
            assert f"got {word!r}" in hopper.said()
        for word, room in (("0", "sm80"), ("1", "sm90")):
            monkeypatch.setenv(hopper.SETTING, word)
            assert served(product) == room and f"{hopper.SETTING}={word}" in hopper.said()


# ---- mutants


def mutant(old: str, new: str) -> types.ModuleType:
    source = Path(str(hopper.__file__)).read_text()
    assert source.count(old) == 1, f"hopper.py holds {source.count(old)} times: {old}"
    made = types.ModuleType(hopper.__name__)
    made.__file__ = hopper.__file__
    exec(compile(source.replace(old, new), str(hopper.__file__), "exec"), made.__dict__)
    return made


MUTANTS = {
    "the trial is skipped": ("        judge(here)\n", "        here.verdict = EQUAL\n"),
    "a verdict for every device": ("key = launcher, str(device)", 'key = launcher, ""'),
    "a verdict for every op": ("key = launcher, str(device)", "key = LINEAR, str(device)"),
    "a trial in a capture": ("        if capturing(here.device):", "        if False:"),
    "a trial per call": ("if here.verdict:\n            return", "if False:\n            return"),
    "the verdict is not looked at": ('(said == "" and here.verdict == EQUAL)', 'said == ""'),
    "0 is not looked at": ('(said == "" and here.verdict == EQUAL)', 'said == "0"'),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: Any) -> None:
    with on_hopper():
        made = mutant(*MUTANTS[name])
        for hook in ("DEVICES", "capability", "on", "apart", "alive", "ways", "force", "open_room"):
            setattr(made, hook, getattr(hopper, hook))
        monkeypatch.setattr(native_linear, "hopper", made)
        monkeypatch.setattr(native_attention, "hopper", made)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            keeps(made, monkeypatch)
            if name == "a trial per call":
                again(made, monkeypatch)


def again(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that come to a judgement one after the other."""
    calls: list[Any] = []
    monkeypatch.setattr(module, "tried", says(module.EQUAL, calls))
    here = module.Here(module.LINEAR, CPU)
    module.judge(here), module.judge(here)
    assert len(calls) == 1


def test_mutant_that_tries_one_tile_is_caught(monkeypatch: Any) -> None:
    made = mutant("for way in ways(here.launcher):", "for way in ways(here.launcher)[:1]:")
    with on_hopper(edit=LINEAR_SEED):
        few(monkeypatch)
        for hook in ("HALVES", "processors", "on", "apart", "alive", "ways", "force"):
            setattr(made, hook, getattr(hopper, hook))
        assert made.tried(made.Here(made.LINEAR, CPU)) == made.EQUAL, "it takes the kernels with the mistake"
