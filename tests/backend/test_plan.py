"""plan: the table of mode tensor says what the launchers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import cases
import tensor
from conftest import require
from rerank_kernels import cli
from rerank_kernels.backend import library
from rerank_kernels.backend.plan import ARCHITECTURES, K_STEP, Tile, cuda_attention, cuda_gap, cuda_linear, plan, triton_gap
from rerank_kernels.ops.attention import attention
from rerank_kernels.ops.linear import linear


def launches(kernel: str, call: Callable[[], object]) -> list[tuple[tuple[int, ...], int, int | None]]:
    """Grid, threads and shared memory of the launch that `call` makes, for each way that the launcher can be told to take."""
    from simulated import cuda as simulated

    made = []
    for way in range(simulated.launchers()[kernel]):
        simulated.launched.clear()
        with simulated.forced(kernel, way):
            call()
        ((_, grid, block, shared),) = simulated.launched
        made.append((grid, block[0], shared))
    return made


def test_cuda_linear_launches_these_tiles() -> None:
    require("cuda")
    x, w = torch.ones(200, 64, dtype=torch.float16), torch.ones(300, 64, dtype=torch.float16)
    with tensor.simulated("cuda"):
        made = launches("linear_tensor", lambda: linear(x, w, mode="tensor"))
    assert made == [((-(-200 // t.rows) * -(-300 // t.columns), 1, 1), t.threads, t.shared) for t in cuda_linear(80, 64)[2]]


def test_on_a_hopper_linear_has_tiles_of_its_own() -> None:
    """How they are launched is in test_hopper_linear.py."""
    require("cuda")
    assert cuda_linear(90, 72)[:2] == ("wgmma m64nNk16", 5) and cuda_linear(90, 72)[2] != cuda_linear(80, 72)[2]
    assert cuda_linear(90, 70) == cuda_linear(80, 70), "rows that are no multiple of 16 bytes"


@pytest.mark.parametrize("width", [32, 64, 96, 128, 192, 256])
def test_cuda_attention_launches_these_tiles(width: int) -> None:
    require("cuda")
    assert width in map(int, library.launch_tables()["sm80"]["attention"])
    q, cu = torch.ones(20, 1, width - 7, dtype=torch.float16), cases.offsets((20,))
    with tensor.simulated("cuda"):
        made = launches("attention_tensor", lambda: attention(q, q, q, cu_seqlens=cu, mode="tensor"))
    assert list(dict.fromkeys(m[1:] for m in made)) == [(t.threads, t.shared) for t in cuda_attention(80, width - 7)[2]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_a_plan(arch: int) -> None:
    assert (triton_gap(arch) is None) == any(r.backend == "triton" for r in plan(arch, [], [64]))
    rows = list(plan(arch, [(768, 3072), (1, 1)], [1, 40, 64, 96, 128, 256]))
    assert ("cuda" in {r.backend for r in rows}) == (cuda_gap() is None) and {r.op for r in rows} == {
        "linear, bmm",
        "attention",
    }
    for r in rows:
        assert r.tiles and r.count >= 1 and all(isinstance(t, Tile) for t in r.tiles)
        most = 227 if "wgmma" in r.instruction else 99
        assert all(t.shared is None or t.shared <= most * 1024 for t in r.tiles), "more than the GPUs have"
        if "wgmma" in r.instruction:
            assert arch == 90 and all(t.rows >= 64 for t in r.tiles), "a smaller tile would take another instruction"
    assert next(r for r in rows if r.features == "N 768, K 3072").count == 3072 // K_STEP


def test_without_the_library_the_table_says_what_is_left_out(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(library, "missing", lambda: "it was not built")
    assert cli.main(["info", "--plan", "--arch", "80", "--head", "64"]) == 0
    assert "cuda: it was not built" in capsys.readouterr().out


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="arch must be one of 80, 86, 89, 90, 100, 120, got 75"):
        list(plan(75, [], []))
    with pytest.raises(ValueError, match="N and K must be >= 1, got 0 and 3"):
        list(plan(80, [(0, 3)], []))
    with pytest.raises(ValueError, match="1 to 256 features, got 300"):
        list(plan(80, [], [300]))
