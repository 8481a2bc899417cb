"""Models that nobody here wrote, in a scope: of transformers, and one with attention written by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rerank_kernels as rk
from rerank_kernels.scoped import scope, table
from scoped_cases import NEEDS
from tools import any_model

pytestmark = NEEDS
MODELS = ("mpnet", "deberta-v2", "t5", "gpt2", "mixtral", "clip_vision_model")


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_of_transformers(model_type: str) -> None:
    try:
        model = any_model.built(model_type)
    except (ValueError, AttributeError) as error:
        pytest.skip(f"this transformers builds it otherwise: {error}")
    kind, why = any_model.judged(model)
    if kind == "not called":
        pytest.skip(why)
    assert kind == "pass", why


def test_a_route_that_is_dropped_shows_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(function: Any) -> table.Served:
        served = table.look_up(function)
        return dataclasses.replace(served, exact=served.exact or served.op == "aten::linear")

    monkeypatch.setattr(scope, "_looked_up", look_up)
    assert any_model.judged(any_model.built("mpnet"))[0] in ("fail", "same padding")


class ByHand(nn.Module):
    """Attention as remote code has it: einsum, a mask of numbers, softmax, rotary angles, a pooled mean."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Parameter(torch.randn(width, 3, heads, width // heads) * 0.1)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = torch.einsum("btd,dnhe->nbhte", x, self.qkv)
        angles = torch.arange(x.shape[1]).float()[:, None] * 10000.0 ** (-torch.arange(q.shape[-1] // 2) / 6)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        q, k = (t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k))
        s = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + (1.0 - mask[:, None, None].float()) * -1e9
        y = torch.einsum("bhst,bhte->bshe", s.softmax(-1), v).flatten(2)
        y = self.norm(x + F.gelu(self.out(y)))
        pooled = (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.score(F.normalize(pooled, dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ByHand().eval().to(dtype)
    lengths = (40, 7, 33, 1)
    x = torch.randn(4, 40, 48).to(dtype)
    mask = (torch.arange(40) < torch.tensor(lengths)[:, None]).to(dtype)
    with torch.no_grad():
        if dtype == torch.float32:
            stock = torch.cat([model(x[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)])
            assert not torch.equal(model(x, mask), stock), "the control"
        with rk.invariant() as report:
            y = model(x, mask)
            alone = torch.cat([model(x[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)])
    assert torch.equal(y, alone)
    assert report.routed["aten::bmm"] and report.routed["aten::cos"]
