"""python/sparse.py with a model of some hundred neurons: its parts, its verdict, and that the verdict can be the other one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import rerank_kernels as rk
from conftest import ran

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def program(monkeypatch):
    ran("cpu")
    monkeypatch.syspath_prepend(str(ROOT / "python"))
    spec = importlib.util.spec_from_file_location("sparse_program", ROOT / "python" / "sparse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"WIDTH": 32, "NEURONS": 96, "LAYERS": 2, "HEADS": 2, "ROWS": 2, "WORDS": 4}.items():
        monkeypatch.setattr(module, name, value)
    yield module
    sys.modules.pop("rerank", None)


def test_it_ends_well(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparse.py", "--steps", "4", "--runs", "2"])
    assert program.main() == 0
    said = capsys.readouterr().out
    assert "model.layers.1.mlp" in said and "answered 8 times" in said and "sparse" in said
    honest = program.answers
    monkeypatch.setattr(program, "answers", lambda model, runs: [*honest(model, runs), (("other words",), "other bits")])
    assert program.main() == 1


def test_the_order_of_arrival_shows_and_ours_does_not(program):
    model, _ = program.trained("a text of some words " * 20, 2)
    with program.as_usual(model):
        usual = program.answers(model, 1)
    assert len({bits for _, bits in usual}) == len(usual) == 4
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)
    rk.patch(model)
    assert len(set(program.answers(model, 1))) == 1


def test_training_makes_neurons_idle(program, monkeypatch):
    shares = []
    text = "a text of some words "
    for price in (0.0, 0.01):
        monkeypatch.setattr(program, "L1", price)
        model, loss = program.trained(text * 40, 60)
        report = rk.patch(model)
        with torch.no_grad():
            model(torch.tensor([list(text.encode())]))
        shares.append(sum(report.active().values()) / 2)
        assert 0.0 < loss < 6.0
    assert shares[1] < 0.4 * shares[0]
