"""Sequences: checked when they are made, trusted afterwards; a model's forward makes one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cases
import models
import rerank_kernels as rk
from cases import numbers, offsets
from invariants import same
from rerank_kernels.backend import registry
from rerank_kernels.models.registry import packed_logits
from rerank_kernels.ops import sequences
from rerank_kernels.ops.sequences import Sequences


def test_what_it_holds() -> None:
    s = Sequences.from_cu_seqlens(offsets((4, 0, 3)).long(), 7)
    assert (s.total, s.count, s.lengths, s.longest) == (7, 3, (4, 0, 3), 4)
    assert s.cu_seqlens.dtype == torch.int32 and s.cu_seqlens.tolist() == [0, 4, 4, 7]
    none = Sequences.from_cu_seqlens(offsets(()), 0)
    assert (none.total, none.count, none.lengths, none.longest) == (0, 0, (), 0)
    with pytest.raises(AttributeError):
        s.total = 8  # type: ignore[misc]


def test_from_a_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [5, 1, 1, 1]])
    s = Sequences.from_mask(mask)
    assert (s.total, s.lengths, s.padded) == (6, (2, 0, 4), (3, 4))
    x = numbers("x", (3, 4, 5), torch.float32)
    packed = s.pack(x)
    same(packed, torch.cat([x[0, 1:3], x[2]]), "pack")
    same(s.unpack(packed), torch.where((mask != 0)[..., None], x, 0.0), "unpack")
    same(s.pack(x[..., 0]), packed[:, 0], "pack of one number per token")


def test_a_mask_without_padding_moves_nothing() -> None:
    """A step of a decoder has none, and its keys are read where the cache holds them."""
    x = torch.arange(12.0).view(2, 3, 2)
    full, holed = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1, 1, 1], [1, 0, 1]])
    whole, some = Sequences.from_mask(full), Sequences.from_mask(holed)
    assert whole.index is None and whole.lengths == (3, 3) and whole.padded == (2, 3)
    assert whole.pack(x).data_ptr() == x.data_ptr() and torch.equal(whole.unpack(whole.pack(x)), x)
    assert some.index is not None and some.lengths == (3, 2)
    assert torch.equal(some.unpack(some.pack(x)), x * holed[..., None])
    cache = torch.arange(24.0).view(1, 4, 3, 2)  # [B, H_kv, T, D]
    keys = Sequences.from_mask(full[:1]).pack(cache.transpose(1, 2))
    assert keys.data_ptr() == cache.data_ptr() and torch.equal(keys, cache[0].transpose(0, 1))


def test_of_equal_length() -> None:
    s, x = Sequences.of_equal_length(3, 4), numbers("x", (3, 4, 5), torch.float32)
    assert (s.total, s.lengths, s.cu_seqlens.dtype) == (12, (4, 4, 4), torch.int32)
    same(s.unpack(s.pack(x)), x, "there and back")


def test_errors() -> None:
    for bad in ((0, 3), (1, 7), (0, 5, 4, 7)):
        with pytest.raises(ValueError, match=r"Sequences: cu_seqlens must be ascending from 0 to 7, the number of tokens, got"):
            Sequences.from_cu_seqlens(torch.tensor(bad), 7)
    with pytest.raises(ValueError, match=r"Sequences: cu_seqlens must be a 1-D int32 tensor .* got torch.float32 \[2\]"):
        Sequences.from_cu_seqlens(torch.zeros(2), 7)
    with pytest.raises(ValueError, match=r"Sequences: mask must be bool or integer \[B, T\], nonzero .* got torch.int64 \[3\]"):
        Sequences.from_mask(torch.ones(3, dtype=torch.long))
    x = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="pool: cu_seqlens must be of 6 tokens, got Sequences of 7"):
        rk.pool(x, "cls", cu_seqlens=Sequences.from_cu_seqlens(offsets((7,)), 7))
    away = Sequences(offsets((6,)).to("meta"), 6)
    with pytest.raises(ValueError, match="pool: cu_seqlens must be on cpu like the tokens, got a tensor on meta"):
        rk.pool(x, "cls", cu_seqlens=away)


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.lengths], ids=str)
def test_an_op_gives_the_same_bits_for_them(case: cases.Case) -> None:
    with registry.use("pytorch"):
        rows, given = case.make_rows(torch.float32), case.sequences()
        made = {name: Sequences.from_cu_seqlens(cu, int(cu[-1])) for name, cu in given.items()}
        f = cases.FUNCTIONS[case.op]
        same(f(**rows, **case.options, **made), f(**rows, **case.options, **given), f"{case} with Sequences")


@pytest.mark.parametrize("packed", [False, True])
def test_a_forward_checks_offsets_once(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Whatever its number of layers; and none of its ops looks at a tensor of offsets."""
    model = models.tiny("bert", num_hidden_layers=3)
    rows = models.rows((5, 3, 9))
    batch = models.padded(rows, model.config.pad_token_id)
    rk.patch(model)
    looks, makes, honest = [], [], sequences._ascending

    def look(op: str, name: str, cu: Tensor, total: int) -> list[int]:
        looks.append(op)
        return honest(op, name, cu, total)

    made = Sequences.__dict__["__init__"]
    monkeypatch.setattr(sequences, "_ascending", look)
    monkeypatch.setattr(Sequences, "__init__", lambda self, *a, **k: (makes.append(self), made(self, *a, **k))[1])
    with torch.inference_mode():
        if packed:
            ids = batch["input_ids"][batch["attention_mask"] != 0]
            packed_logits(model, ids, offsets((5, 3, 9)))
        else:
            model(**batch)
    assert len(makes) == len(looks) == 1
