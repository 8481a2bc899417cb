"""surroundings: whatever was done to a model before patch, after it or between calls, a call gives stock's answer or says no.

The truth is stock's own forward in float64, of a twin that the same was done to. A refusal names the place. After a refusal
rk.unpatch gives stock's bits: the advice of each message, tried.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
import warnings
from collections.abc import Iterator

import pytest
import torch

import rerank_kernels as rk
from models import padded, rows, tiny
from surroundings import CLEANUPS, MUTATIONS, Inapplicable
from rerank_kernels.models import bert_roles, fingerprint, packing, roles

MODELS = (("bert", True), ("roberta", True), ("xlm-roberta", False), ("bert", False))
MOMENTS = ("before", "after", "between", "copied")
LENGTHS = (7, 1, 23)
PAD = {"bert": 0, "roberta": 1, "xlm-roberta": 1}
REFUSALS = (rk.PatchError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """What the mutations inside did outside the model is undone."""
    try:
        yield
    finally:
        while CLEANUPS:
            CLEANUPS.pop()()


def answer(model, batch):
    out = model(**batch)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state[batch["attention_mask"].bool()]


def stock(model, batch):
    """What stock gives in float64; None if it gives nothing, or something else at each call."""
    model = model.double() if not any(p.device.type == "meta" for p in model.parameters()) else model
    with torch.no_grad():
        try:
            first, second = answer(model, batch), answer(model, batch)
        except Exception:
            return None
    return first if first.device.type != "meta" and torch.equal(first, second) else None


@functools.cache
def _made(family, head):
    return tiny(family, head=head)


def fresh(family, head):
    return copy.deepcopy(_made(family, head))


class Draw:
    """A model, what is done to it, and when."""

    def __init__(self, which, names, moment):
        self.family, self.head = MODELS[which % len(MODELS)]
        self.names, self.moment = names, moment

    def mutate(self, model):
        return [MUTATIONS[name](model) for name in self.names]

    def run(self):
        """"served" or "refused"; fails if the answer is another number, or the refusal names no place."""
        model, twin, plain = (fresh(self.family, self.head) for _ in range(3))
        batch = padded(rows(LENGTHS), PAD[self.family])
        with undone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.mutate(twin)
            except Inapplicable:
                return "inapplicable"
            truth = stock(twin, batch)
            while CLEANUPS:
                CLEANUPS.pop()()
            try:
                if self.moment == "before":
                    places = self.mutate(model)
                    rk.patch(model)
                else:
                    rk.patch(model)
                    if self.moment in ("between", "copied"):
                        answer(model, batch)
                    if self.moment == "copied":
                        model = copy.deepcopy(model)
                    places = self.mutate(model)
                got = answer(model, batch)
            except REFUSALS as error:
                said = str(error)
                assert any(place in said for place in places), f"{said!r} names none of {places}"
                with undone():
                    self.mutate(plain)
                self.unpatched(model, plain, batch)
                return "refused"
        assert truth is not None, f"{got} came where stock gives nothing that holds"
        bound = 2e-2 if "half" in self.names or "bfloat16_norm" in self.names else 2e-5
        torch.testing.assert_close(got.double(), truth, rtol=bound, atol=bound)
        return "served"

    def unpatched(self, model, twin, batch):
        """unpatch, which each refusal advises, gives stock's answer, or stock's error."""
        rk.unpatch(model)
        if "forward_wrapped" in self.names or "dispatched" in self.names or twin is None or "training" in str(self.names):
            return  # what stands around a forward of ours is test_unpatch's; a draw of dropout's has no second one
        with torch.no_grad():
            try:
                want = answer(twin, batch)
            except Exception:
                return
            if want.device.type != "meta":
                torch.testing.assert_close(answer(model, batch), want, rtol=1e-6, atol=1e-6)


ALL = [(i, name, moment) for i, (name, moment) in enumerate(itertools.product(MUTATIONS, MOMENTS))]


@pytest.mark.parametrize(("which", "name", "moment"), [(i // len(MOMENTS) + i, n, m) for i, n, m in ALL])
def test_each_mutation_is_served_or_refused(which, name, moment):
    for step in range(len(MODELS)):  # the next model where it cannot be done to this one
        if (said := Draw(which + step, [name], moment).run()) != "inapplicable":
            break
    assert said != "inapplicable"
