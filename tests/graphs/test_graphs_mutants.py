"""Mutants of graphs: each is one mistake, beside the test of test_graphs.py that has to fail for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import test_graphs as right
import torch
from test_graphs import device as device  # the fixture

from rerank_kernels.graphs import buckets, captured
from rerank_kernels.graphs.buckets import Bucket, Tokens
from rerank_kernels.models import bert, packing, replay

WRITE, NORM, SAME, RUN = buckets.write, bert.norm, replay._State.same, captured.Graphs.run
Patch = Callable[[pytest.MonkeyPatch], None]


def of_write(change: Callable[[Any, Bucket, Tokens], None]) -> Patch:
    return lambda patch: patch.setattr(captured, "write", change)


def stale_types(array: Any, size: Bucket, tokens: Tokens) -> None:
    """The static buffer of token types is not refreshed where a call gives none."""
    t, before = size.tokens, array[size.tokens : 2 * size.tokens].copy()
    WRITE(array, size, tokens)
    if tokens.types is None:
        array[t : 2 * t] = before


def offsets_not_padded(array: Any, size: Bucket, tokens: Tokens) -> None:
    """Offsets behind the last sequence are 0: it ends before it begins."""
    WRITE(array, size, tokens)
    array[4 * size.tokens + tokens.sequences.count + 1 : size.numbers] = 0


def index_not_refreshed(array: Any, size: Bucket, tokens: Tokens) -> None:
    """The keys are those of an earlier call's sequences."""
    begin, end = 4 * size.tokens + size.sequences + 1, size.numbers - size.sequences - 1
    before = array[begin:end].copy()
    WRITE(array, size, tokens)
    if tokens.reads is not None:
        array[begin:end] = before


def places_of_the_pads(array: Any, size: Bucket, tokens: Tokens) -> None:
    """Tokens come back to the first places of the batch."""
    WRITE(array, size, tokens)
    array[3 * size.tokens : 4 * size.tokens] = range(size.tokens)


def dead_rows_in_a_sum(patch: pytest.MonkeyPatch) -> None:
    """A norm over all rows of a tile: what no sequence holds reaches a live row."""
    patch.setattr(bert, "norm", lambda m, x, *more: NORM(m, x + x.float().mean(0).to(x.dtype) * 1e-6, *more))


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """Graphs are kept as long as the fingerprint is the same: where weights lie is not looked at."""
    patch.setattr(replay._State, "same", lambda self, seen, backend: (self.seen, self.backend) == (seen, backend))


def stale_modules(patch: pytest.MonkeyPatch) -> None:
    """Only weights are looked at."""
    patch.setattr(replay._State, "same", lambda self, seen, backend: SAME(self, self.seen, backend))


def kernels_unseen(patch: pytest.MonkeyPatch) -> None:
    """Who serves the ops is not looked at."""

    def same(self: Any, *args: Any) -> bool:
        self.select = replay.registry.select
        return SAME(self, *args)

    patch.setattr(replay._State, "same", same)


def strides_unseen(patch: pytest.MonkeyPatch) -> None:
    """Of a weight memory, dtype and shape are looked at, and not how it lies in it."""
    look = replay._State._looked
    patch.setattr(replay._State, "_looked", lambda self: (*look(self)[:2], [True]))


def not_copied(patch: pytest.MonkeyPatch) -> None:
    """What a call gets is the graph's own memory."""
    clone = torch.Tensor.clone
    patch.setattr(torch.Tensor, "clone", lambda self, **how: clone(self, **how) if how else self)


def no_lock(patch: pytest.MonkeyPatch) -> None:
    """Two threads in one graph."""
    make = captured.Graphs.__init__

    def made(self: Any) -> None:
        make(self)
        self._lock = contextlib.nullcontext()

    patch.setattr(captured.Graphs, "__init__", made)


def ids_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(packing, "in_table", lambda *_: None)


def smallest_first(patch: pytest.MonkeyPatch) -> None:
    """Each larger graph needs memory of its own."""
    patch.setattr(Bucket, "largest", property(lambda self: self._replace(keys=buckets.KEYS[-1])))


def again_and_again(patch: pytest.MonkeyPatch) -> None:
    """What was refused is tried at each call."""
    patch.setattr(captured.Graphs, "run", _forgetting)


def _forgetting(self: Any, *args: Any) -> Any:
    self._refused.clear()
    return RUN(self, *args)


MUTANTS: list[tuple[Patch, Callable[..., None], tuple[Any, ...]]] = [
    (of_write(stale_types), right.test_token_types_and_positions, ()),
    (of_write(offsets_not_padded), right.test_the_bits_of_a_call_without_a_graph, ("bert",)),
    (of_write(places_of_the_pads), right.test_hidden_states_come_back_to_their_places, ({"left": True}, torch.float32)),
    (of_write(index_not_refreshed), right.test_sequences_that_continue_others, ("qwen3",)),
    (dead_rows_in_a_sum, right.test_the_bits_of_a_call_without_a_graph, ("bert",)),
    (stale_weights, right.test_a_change_between_calls_counts_from_the_next, (right.elsewhere,)),
    (stale_weights, right.test_a_change_between_calls_counts_from_the_next, (lambda m: m.half(),)),
    (stale_modules, right.test_a_change_between_calls_counts_from_the_next, (right.another_eps,)),
    (stale_modules, right.test_a_change_between_calls_counts_from_the_next, (right.renew,)),
    (strides_unseen, right.test_a_change_between_calls_counts_from_the_next, (right.turned,)),
    (kernels_unseen, right.test_a_kernel_that_goes_wrong_shows, ()),
    (not_copied, right.test_results_outlive_the_next_call, ()),
    (no_lock, right.test_two_threads, ()),
    (ids_not_looked_at, right.test_errors_are_the_same, right.WRONG[0]),
    (smallest_first, right.test_the_bits_of_a_call_without_a_graph, ("bert",)),
]


@pytest.mark.parametrize(("mutant", "test", "arguments"), MUTANTS)
def test_each_is_caught(
    device: Any, monkeypatch: pytest.MonkeyPatch, mutant: Patch, test: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    with monkeypatch.context() as patch:
        mutant(patch)
        with pytest.raises((AssertionError, IndexError, RuntimeError, pytest.fail.Exception)):
            test(device, *arguments)


def test_a_refusal_that_is_not_remembered(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        again_and_again(patch)
        with pytest.raises(AssertionError):
            right.test_an_op_that_cannot_be_captured(device, patch)
