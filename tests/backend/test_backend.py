"""The registry: who serves an op, how a user changes it, and what is said when nobody can."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from conftest import require
from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import PROMISES
from rerank_kernels.backend.registry import BACKENDS, ENVIRONMENT, OPS, Backend, BackendError
from rerank_kernels.ops.linear import linear


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    yield
    registry.missing.cache_clear()
    registry._load.cache_clear()


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    b = BACKENDS["cpu"]
    monkeypatch.setitem(BACKENDS, "cpu", Backend(b.name, b.package, b.devices, b.promises, lambda: "not built here"))
    registry.missing.cache_clear()


def test_default_is_the_first_that_is_there() -> None:
    assert registry.active().name == ("pytorch" if registry.missing("cpu") else "cpu")


def test_default_without_the_library(no_cpu: None) -> None:
    assert registry.active().name == "pytorch"
    assert registry.active().promises["portable"] == ("repeatable", "batch-invariant", "padding-invariant")


def test_use_nests_and_is_restored() -> None:
    before = registry.active().name
    with registry.use("pytorch"):
        assert registry.active().name == "pytorch"
        with registry.use("pytorch"):
            assert registry.active().name == "pytorch"
        with pytest.raises(KeyError), registry.use("pytorch"):
            raise KeyError
        assert registry.active().name == "pytorch"
    assert registry.active().name == before


def test_use_belongs_to_its_thread() -> None:
    seen: list[str] = []
    with registry.use("pytorch"):
        thread = threading.Thread(target=lambda: seen.append(registry.active().name))
        thread.start()
        thread.join()
    assert seen == [registry.active().name]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "pytorch")
    assert registry.active().name == "pytorch"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert registry.active().name == ("pytorch" if registry.missing("cpu") else "cpu")
    monkeypatch.setenv(ENVIRONMENT, "nonsense")
    with pytest.raises(BackendError, match=rf"unknown backend 'nonsense' \(asked for by {ENVIRONMENT}\); there are cpu, cuda,"):
        registry.active()
    with registry.use("pytorch"):
        assert registry.active().name == "pytorch", "the program's word comes before the environment's"


def test_asked_for_and_missing_is_an_error(no_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"backend 'cpu' \(asked for by {}\) is not available: not built here; .*pytorch: available"
    with pytest.raises(BackendError, match=said.format(r"use\('cpu'\)")), registry.use("cpu"):
        pass
    monkeypatch.setenv(ENVIRONMENT, "cpu")
    with pytest.raises(BackendError, match=said.format(ENVIRONMENT)):
        linear(torch.zeros(1, 1), torch.zeros(1, 1))


def test_unknown_name() -> None:
    with pytest.raises(BackendError, match="unknown backend 'rocm'"), registry.use("rocm"):
        pass


def test_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    b = BACKENDS["cuda"]
    monkeypatch.setitem(
        BACKENDS, "cuda", Backend(b.name, b.package, b.devices, b.promises, lambda: "torch is not a CUDA build")
    )
    registry.missing.cache_clear()
    said = r"backend 'cuda' \(asked for by use\('cuda'\)\) is not available: torch is not a CUDA build; cpu serves cpu only"
    with pytest.raises(BackendError, match=said), registry.use("cuda"):
        pass
    with pytest.raises(
        BackendError, match=r"no backend serves cuda tensors; .*cuda: torch is not a CUDA build; .*\.to\('cpu'\)"
    ):
        registry.active("cuda")


def test_other_device() -> None:
    with pytest.raises(
        BackendError,
        match="no backend serves meta tensors; cpu serves cpu only; cuda serves cuda only; "
        "triton serves cuda only; pytorch serves cpu only",
    ):
        linear(torch.zeros(1, 1, device="meta"), torch.zeros(1, 1, device="meta"))
    with (
        registry.use("pytorch"),
        pytest.raises(BackendError, match=r"backend 'pytorch' \(asked for by use.*\) does not serve meta tensors"),
    ):
        registry.active("meta")


def test_tensors_on_two_devices() -> None:
    with pytest.raises(ValueError, match=r"linear: weight must be on cpu like x, got a tensor on meta; move it"):
        linear(torch.zeros(1, 1), torch.zeros(1, 1, device="meta"))


def test_every_backend_has_every_op() -> None:
    require("cpu")  # its library has the ops that no Python stands before
    for name in BACKENDS:
        for op in OPS:
            assert callable(registry._load(name, op)), f"{name} has no {op}"


def test_missing_op_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "conv", "linear")
    with registry.use("pytorch"), pytest.raises(BackendError, match="conv: backend 'pytorch' has no such op"):
        registry.select("conv", torch.device("cpu"))
    assert registry.backends()["conv"]["pytorch"] == "conv: backend 'pytorch' has no such op"


def test_table(no_cpu: None) -> None:
    table = registry.backends()
    assert set(table) == set(OPS)
    assert table["linear"]["cpu"] == "not built here" and table["linear"]["pytorch"] == "yes"
    text = str(table)
    assert "cpu: not built here" in text
    assert "pytorch: serves cpu; promises repeatable, batch-invariant, padding-invariant" in text


def test_promises_have_names() -> None:
    assert PROMISES == ("repeatable", "batch-invariant", "padding-invariant", "thread-invariant", "machine-invariant")
    for b in BACKENDS.values():
        assert all(set(p) <= set(PROMISES) and "repeatable" in p for p in b.promises.values()) and "portable" in b.promises
