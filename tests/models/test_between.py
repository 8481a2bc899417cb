"""What PyTorch and NumPy compute between our ops: copies, gathers, integers, and single operations that are correctly rounded.

The first half lists it: every way of finals.py, and every op's own Python side, runs under a TorchDispatchMode that sees each
aten call (ours are torch.ops.rerank_kernels) and with arrays that tell what NumPy does to them. What is no copy, has a float
in it and is not among rounding.SWEPT is red, by name and place. The second half sweeps those few, in a process for each setting
of MKL and of PyTorch's kernels, and sees that the sweep can fail: torch.sqrt is wrong under MKL's compatible path.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cases
import conftest
import finals
import rerank_kernels as rk
import rounding
from cases import CASES
from rerank_kernels.backend import registry
from rerank_kernels.ops import norm
from rerank_kernels.patching.systems import sentence_transformers

TESTS = Path(__file__).parents[1]
OURS = str(Path(rk.__file__).parent)

# Bits that are only moved, or chosen, or made from nothing, and a sign that is turned; on any dtype.
COPIES = set(
    re.findall(
        r"\w+",
        """
        _unsafe_view alias amax arange as_strided cat clone constant_pad_nd detach embedding empty empty_like empty_strided
        expand fill_ full full_like gather index index_copy_ index_put_ index_select lift_fresh masked_fill new_empty new_full
        new_ones
        new_zeros ones ones_like permute repeat_interleave reshape scalar_tensor select slice split split_with_sizes squeeze
        neg sort stack t transpose unbind unfold unsqueeze view where zero_ zeros zeros_like _local_scalar_dense _reshape_alias
        """,
    )
)
EXACT = {
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "equal",
    "isfinite",
    "isnan",
    "argmax",
    "allclose",
}  # about floats, and no floats
# Layouts of weights, of which no bit is in a result: they say which neurons are off, with bounds that hold for any rounding.
LAYOUTS = re.compile(r"backend/weights\.py:\d+ in (_screened|finite|rounding)\b")
# cos and sin: float64 in steps that are held by hashes of whole tables (tests/ops/test_rotary.py)
TABLES = re.compile(r"ops/rotary\.py:\d+ in (rotary_table|_horner)|models/rope\.py:\d+ in frequencies")
ROUNDINGS = {(torch.float32, half) for half in rounding.HALVES.values()}
NUMPY = {"numpy." + name.rsplit(".", 1)[1] for name in rounding.SWEPT if name.startswith("numpy.")}


class Between(TorchDispatchMode):
    """Inside, `red` collects what must not stand between our ops, and `seen` the single float operations that may."""

    def __init__(self) -> None:
        super().__init__()
        self.red: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # calls that others are made of, as torch.inference_mode leaves them
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        if func.namespace != "rerank_kernels":
            self._look(func, args, kwargs or {}, out)
        return out

    def _look(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        plain = str(func).split(".")[1]
        floats = [t.dtype for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and _floating(t.dtype)]
        if not floats or plain in EXACT or LAYOUTS.search(where := _place()) or TABLES.search(where):
            return
        # in place is the same; what copies may convert
        name = rounding.CONVERSION if plain == "copy_" else re.sub(r"^(aten\.\w+)_\.", r"\1.", str(func))
        if name == rounding.CONVERSION:
            was, now = (args[1], args[0]) if plain == "copy_" else (args[0], out)
            exact, single = _widens(was.dtype, now.dtype), (was.dtype, now.dtype) in ROUNDINGS
        else:
            exact = plain in COPIES
            single = set(floats) == {torch.float32} and kwargs.get("alpha", 1) == 1 and _numbers(plain, args)
        if exact:
            return
        if name in rounding.SWEPT and single:
            self.seen.add(name)
        else:
            shown = ", ".join(dict.fromkeys(str(d)[6:] for d in floats))
            self.red.append(f"{name} of {shown} at {where}")

    def numpy(self, ufunc: Any, method: str, values: Any) -> None:
        name = f"numpy.{ufunc.__name__}"
        dtypes = {v.dtype for v in values if isinstance(v, np.generic | np.ndarray)}
        if not any(d.kind == "f" for d in dtypes):
            return
        if name in NUMPY and method == "__call__" and dtypes == {np.dtype(np.float32)}:
            self.seen.add(name)
        elif ufunc not in (np.greater, np.less, np.equal, np.not_equal, np.isnan):
            self.red.append(f"{name}.{method} of {', '.join(map(str, dtypes))} at {_place()}")


def _floating(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _widens(was: torch.dtype, now: torch.dtype) -> bool:
    """Whether a conversion is exact: to the same, or half to float32; integers to float32 need not be."""
    return was == now or not now.is_floating_point or (was in cases.DTYPES and now == torch.float32)


def _numbers(plain: str, args: Any) -> bool:
    """A quotient by one of Python's numbers is a product with its inverse on a GPU: two roundings."""
    return plain.rstrip("_") != "div" or all(isinstance(a, Tensor) for a in args[:2])


def _place() -> str:
    """The innermost line of the package, or of a stand-in, that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS) or path.endswith(("tests/systems.py", "tests/finals.py")):
            return f"{Path(path).parent.name}/{Path(path).name}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "an unknown place"


@contextmanager
def between() -> Iterator[Between]:
    """Arrays that come out of tensors tell what is computed with them; so do their slices, copies and stacks."""
    mode, true = Between(), Tensor.numpy

    class Told(np.ndarray):
        __array_priority__ = 1.0  # else np.stack forgets it

        def __array_ufunc__(self, ufunc: Any, method: str, *values: Any, out: Any = None, **kwargs: Any) -> Any:
            mode.numpy(ufunc, method, values)
            plain = [v.view(np.ndarray) if isinstance(v, Told) else v for v in values]
            if out is not None:
                kwargs["out"] = tuple(o.view(np.ndarray) if isinstance(o, Told) else o for o in out)
            made = getattr(ufunc, method)(*plain, **kwargs)
            return made.view(Told) if isinstance(made, np.ndarray) else made

    Tensor.numpy = lambda self, **how: true(self, **how).view(Told)  # type: ignore[method-assign]
    try:
        with mode:
            yield mode
    finally:
        Tensor.numpy = true  # type: ignore[method-assign]


def listed(run: Callable[[], Any]) -> Between:
    with between() as mode:
        run()
    return mode


# ---- what there is ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", finals.WAYS)
def test_between_our_ops_are_only_single_operations(way: str) -> None:
    conftest.ran("cpu")
    with registry.use("cpu"):
        found = listed(finals.WAYS[way]())
    assert not found.red, "\n".join(dict.fromkeys(found.red))
    added = "modernbert" not in way  # which adds inside products alone
    if added and ("classifier" in way or "encoder" in way or "cross-encoder" in way):
        assert "aten.add.Tensor" in found.seen, "the mode sees nothing: the embeddings are added by PyTorch"
    if "Reranker, embeddings" in way:
        assert {"aten.mul.Tensor", "numpy.subtract"} <= found.seen, "cosines, and 1 - cosine"


@pytest.mark.parametrize("op", registry.OPS)
def test_inside_an_op_are_only_single_operations(op: str) -> None:
    """The Python side of an op of the C++ library, packed and padded, few rows and many."""
    conftest.ran("cpu")
    red: list[str] = []
    with registry.use("cpu"):
        for case in (c for c in CASES if c.op == op):
            for dtype in cases.DTYPES[:2]:
                for few in (None,) if case.lengths else (None, 3):
                    rows, shared = case.make_rows(dtype, few), case.make_shared(dtype)
                    red += listed(functools.partial(case.call, rows, shared)).red
    assert not red, "\n".join(dict.fromkeys(red))


# ---- and that the list can be red -------------------------------------------------------------------------------------------


def by_torch(x: Tensor, eps: float = 1e-12) -> Tensor:
    """How a length was taken before there was an op for it."""
    return x / rk.sum(x * x, -1, keepdim=True).sqrt().clamp_min(eps)


def test_a_square_root_of_torch_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    from rerank_kernels.models import heads, sentence

    conftest.ran("cpu")
    for module in (heads, sentence, sentence_transformers):
        monkeypatch.setattr(module, "normalize", by_torch)
    for way in ("Reranker, embeddings, mean, float32", "sentence-transformers SentenceTransformer"):
        with registry.use("cpu"):
            red = listed(finals.WAYS[way]()).red
        assert any(re.match(r"aten\.sqrt\.default of float32 at ", line) for line in red), red
        assert any("aten.clamp_min" in line for line in red)


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("aten.exp", lambda x: x.exp()),
        ("aten.sigmoid", lambda x: torch.sigmoid(x)),
        ("aten.sum", lambda x: x.sum()),
        ("aten.mean", lambda x: x.mean(-1)),
        ("aten.mm", lambda x: x @ x),
        ("aten._softmax", lambda x: x.softmax(-1)),
        ("aten.cumsum", lambda x: x.cumsum(0)),
        ("aten.add.Tensor", lambda x: x.half() + x.half()),
        ("aten.add.Tensor", lambda x: torch.add(x, x, alpha=0.5)),
        ("aten.div.Tensor", lambda x: x / 3.0),
        ("aten.mul.Tensor", lambda x: x.double() * x.double()),
        ("aten._to_copy.default", lambda x: torch.arange(5).float()),
        ("aten._to_copy.default", lambda x: x.half().bfloat16()),
        ("aten._to_copy.default", lambda x: x.new_empty(4, 4, dtype=torch.float64).copy_(x)),
        ("numpy.exp", lambda x: np.exp(x.numpy())),
        ("numpy.add.reduce", lambda x: x.numpy()[0].sum()),
        ("numpy.multiply", lambda x: np.stack([row.copy() for row in x.numpy()]) * np.float32(3)),
        ("numpy.matmul", lambda x: x.numpy() @ x.numpy()),
    ],
)
def test_what_is_red(name: str, run: Callable[[Tensor], Any]) -> None:
    red = listed(lambda: run(torch.ones(4, 4))).red
    assert any(line.startswith(name) for line in red), (name, red)


def test_what_is_not() -> None:
    x, i = torch.ones(4, 4), torch.arange(4)
    found = listed(lambda: (x[i], x + x, x - x, (x * 2.0)[0], x / x, x.half().float(), i.cumsum(0), i + i, 1 - x.numpy()))
    assert not found.red and found.seen == set(rounding.SWEPT)


# ---- the few that may be there, under every setting of what computes them ----------------------------------------------------

SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    **{f"MKL_CBWR={name}": {"MKL_CBWR": name} for name in ("COMPATIBLE", "AVX2", "AVX512", "AVX512,STRICT")},
    **{f"ATEN_CPU_CAPABILITY={name}": {"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2")},
}


def _swept(setting: dict[str, str]) -> dict[str, int]:
    kept = {k: v for k, v in os.environ.items() if k not in ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")}
    environment = {**kept, **setting, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, str(TESTS / "rounding.py")], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, int] = json.loads(ran.stdout)
    return found


def test_single_operations_are_correctly_rounded_under_every_setting() -> None:
    """At one thread and at two, in vectors and tails, off boundaries; with every exponent. And what the pytorch backend
    computes with has one set of bits wherever an element stands."""
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(SETTINGS, pool.map(_swept, SETTINGS.values()), strict=True))
    wrong = {(s, name): n for s, counts in found.items() for name, n in counts.items() if n and name != "torch.sqrt"}
    assert not wrong, wrong
    assert all(set(counts) > set(rounding.SWEPT) for counts in found.values())
    if torch.backends.mkl.is_available():
        assert found["MKL_CBWR=COMPATIBLE"]["torch.sqrt"] > 10_000, "the sweep has no power, or MKL's root is right now"


def test_the_sweep_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ulp off in a tail, at an odd address, in a subnormal, at a tie: each is counted."""

    def off(when: Callable[[Tensor], bool | Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def add(a: Tensor, b: Tensor) -> Tensor:
            y = torch.add(a, b)
            bits = y.view(torch.int32) + torch.as_tensor(when(y)).int()
            return bits.view(torch.float32)

        return add

    for when in (
        lambda y: y.numel() % 8 == 7 and y.dim() == 1 and y.numel() < 20,
        lambda y: y.numel() > rounding.LARGE - 1,
        lambda y: (y.abs() < 2.0**-126) & (y != 0),
    ):
        with np.errstate(all="ignore"):
            assert rounding.of_binary(off(when), np.add) > 0
    assert norm.normalize is rk.normalize
