"""Sequences that begin with the tokens of another one: what they share is computed once, and each reads its keys.

`before` says for each packed sequence which earlier one it continues. All of them go through a layer at once, and the keys of
that layer are put before a sequence's own for as long as its attention lasts. No keys of another layer are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rerank_kernels import check
from rerank_kernels.ops.sequences import Sequences


class Gathered:
    """Keys of packed sequences of which some continue others; it stands where caches.Keys does."""

    cache = None

    def __init__(self, index: Tensor, whole: Sequences) -> None:
        self.index = index  # of each whole sequence, where its tokens stand
        self.whole = whole

    def stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Sequences]:
        """k and v [total, H_kv, D] of a layer's tokens -> those of whole sequences, and whose they are."""
        return k.index_select(0, self.index), v.index_select(0, self.index), self.whole


class Shared(Gathered):
    """What is gathered, and the angles that follow, by who continues whom."""

    def __init__(self, op: str, sequences: Sequences, before: Sequence[int | None], turns: Sequence[int]) -> None:
        """before: of each sequence the place of the one that it continues, or None. turns: the longest whole sequences whose
        angles are those of a short one; what is shared by one that is longer and one that is not has no angles."""
        if len(before) != sequences.count or any(b is not None and not 0 <= b < i for i, b in enumerate(before)):
            wanted = f"{sequences.count} places of earlier sequences, or None"
            check.fail(op, "before", wanted, list(before)[:8])
        cu, device = np.cumsum([0, *sequences.lengths]), sequences.cu_seqlens.device
        rows: list[np.ndarray] = []  # of each whole sequence, where its tokens stand
        for i, b in enumerate(before):
            own = np.arange(cu[i], cu[i + 1])
            rows.append(own if b is None else np.concatenate([rows[b], own]))
        lengths = [len(r) for r in rows]
        index = torch.from_numpy(np.concatenate([*rows, np.zeros(0, np.int64)])).long().to(device)
        offsets = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
        super().__init__(index, Sequences.from_cu_seqlens(offsets, int(offsets[-1]), device, op=op))
        # The angles of what is shared are those of the sequences that continue it.
        reach = list(lengths)
        for i in reversed(range(len(before))):
            if (b := before[i]) is not None:
                reach[b] = max(reach[b], reach[i])
        for i, b in enumerate(before):
            for turn in turns:
                if b is not None and (reach[i] > turn) != (reach[b] > turn):
                    wanted = f"of sequences that all have at most {turn} tokens, or all more"
                    check.fail(op, "before", wanted, f"{reach[i]} and {reach[b]} tokens", "share nothing: their angles differ")
        starts = torch.tensor([0 if b is None else lengths[b] for b in before], dtype=torch.int64, device=device)
        counts = torch.from_numpy(np.diff(cu)).to(device)
        self.starts = torch.repeat_interleave(starts, counts, output_size=sequences.total)  # tokens before a token's sequence
        self.reach = torch.tensor(reach, dtype=torch.int64, device=device)  # the length that decides a sequence's angles
