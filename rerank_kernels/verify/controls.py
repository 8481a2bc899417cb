"""The negative controls: wrong scorers that the checks must notice, or a pass means nothing.

A sighted scorer answers the bits of the reference, but one ulp off where it sees one condition in the tensors that it is given.
Exactly the check for that condition must notice. Mutants run the model itself with one thing wrong under that condition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rerank_kernels.backend import registry
from rerank_kernels.backend.modes import PORTABLE, Mode
from rerank_kernels.verify.checks import HOME, Call, Check, Floats, Inputs, Route, Runner, Texts, home
from rerank_kernels.verify.measure import Session, measure


@dataclass
class Control:
    name: str
    expected: str  # the check that must see it
    seen_by: tuple[str, ...]

    @property
    def caught(self) -> bool:
        return self.seen_by == (self.expected,)


@dataclass(frozen=True)
class Sight:
    """What a scorer can see of one row of a call, read off the tensors it was given."""

    batch: int
    place: int
    row: int
    others: tuple[int, ...]  # the rows of the batch, sorted
    padded: bool
    other_side: bool  # padded where such a model is not
    foreign: bool  # some padded place of the batch holds another token than the pad token
    laid_out: bool
    threads: int
    turn: int  # how often it had been given just this


SIGHTED: dict[str, Callable[[Sight], bool]] = {
    "repeat": lambda s: s.turn > 0,
    "layout": lambda s: s.laid_out,
    "batch": lambda s: s.batch not in (1, HOME),
    "position": lambda s: s.others == home(s.row) and s.place != s.row % HOME,
    "neighbours": lambda s: s.batch == HOME and s.others != home(s.row) and s.place == s.row % HOME,
    "padding length": lambda s: s.batch == 1 and s.padded,
    "padding side": lambda s: s.padded and s.other_side,
    "padding value": lambda s: s.foreign,
    "threads": lambda s: s.threads != 1,
}


class Sighted:
    """Answers the reference's bits, one ulp up where `condition` holds."""

    def __init__(self, texts: Texts, reference: Floats, condition: Callable[[Sight], bool]) -> None:
        self.texts, self.reference, self.condition = texts, reference, condition
        self.row_of = {tuple(t["input_ids"]) + tuple(t.get("token_type_ids", ())): row for row, t in enumerate(texts.tokens)}
        self.turns: dict[object, int] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        ids, types = inputs["input_ids"], inputs.get("token_type_ids")
        mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids)
        told = tuple((n, t.dtype, t.shape, t.stride(), t.storage_offset(), t.numpy().tobytes()) for n, t in inputs.items())
        threads = torch.get_num_threads()
        turn = self.turns[told, threads] = self.turns.get((told, threads), -1) + 1
        plain = {"input_ids", "attention_mask"} <= inputs.keys() and all(
            t.is_contiguous() and t.storage_offset() == 0 and t.dtype == torch.int64 for t in inputs.values()
        )
        valid = mask != 0
        rows = []
        for i in range(len(ids)):
            key = ids[i][valid[i]].tolist() + ([] if types is None else types[i][valid[i]].tolist())
            rows.append(self.row_of[tuple(key)])
        out = self.reference[rows].copy()
        foreign = bool((ids[~valid] != self.texts.pad).any())
        edge = 0 if self.texts.side == "right" else -1
        for place, row in enumerate(rows):
            sight = Sight(
                batch=len(rows), place=place, row=row, others=tuple(sorted(rows)), padded=not bool(valid[place].all()),
                other_side=not bool(valid[place, edge]), foreign=foreign, laid_out=not plain, threads=threads, turn=turn,
            )  # fmt: skip
            if self.condition(sight):
                out[place] = _one_ulp_up(out[place])
        return torch.from_numpy(out)


def _one_ulp_up(value: Floats) -> Floats:
    out = value.copy()
    out[0] = np.nextafter(out[0], np.float32(np.inf))
    return out


def sighted_controls(texts: Texts, checks: Sequence[Check], reference: Floats) -> list[Control]:
    """One per check; exactly that check must see it. The reference may be the first numbers of each row: bits are compared, and
    no order of documents."""
    texts = dataclasses.replace(texts, answers=None)
    controls = []
    routed = {call.route: c.name for c in checks for s in c.scorings for call in s if call.route != "model"}
    bases = set().union(*map(_bases, checks))
    for name in [c.name for c in checks]:

        def route(call: Call, name: str = name) -> Floats:
            right = reference[list(call.rows)]
            off = routed[call.route] == name and call not in bases  # what a call is compared with may take its route
            return np.stack([*map(_one_ulp_up, right)]) if off else right

        condition = SIGHTED.get(name, lambda s: False)
        session = Session(texts, Sighted(texts, reference, condition), {r: route for r in routed})
        seen = tuple(c.name for c in checks if not measure(c, session).holds)
        controls.append(Control(f"1 ulp off, by {name}", name, seen))
    return controls


def mutant_controls(
    texts: Texts,
    checks: Sequence[Check],
    runner: Runner,
    device: torch.device | None = None,
    routes: Mapping[str, Route] | None = None,
) -> list[Control]:
    """The model itself with one thing wrong in the way it goes wrong in real systems; the named check must see it."""

    def let_in(inputs: Inputs) -> Inputs:
        mask = inputs["attention_mask"].clone()
        for i in range(len(mask)):
            outside = (mask[i] == 0).nonzero()
            if len(outside):
                mask[i, outside[0]] = 1
        return {**inputs, "attention_mask": mask}

    def several(inputs: Inputs) -> bool:
        return len(inputs["input_ids"]) > 1

    def other_side(inputs: Inputs) -> bool:
        edge = 0 if texts.side == "right" else -1
        return "attention_mask" in inputs and bool((inputs["attention_mask"][:, edge] == 0).any())

    def mutant(op: str, when: Callable[[Inputs], bool]) -> Runner:
        def run(inputs: Inputs) -> Tensor:
            with one_ulp_off(op) if when(inputs) else contextlib.nullcontext():
                return runner(inputs)

        return run

    mutants: list[tuple[str, str, Runner]] = [
        ("linear layers 1 ulp off in a batch", "batch", mutant("linear", several)),
        (f"attention 1 ulp off if padded {texts.other_side}", "padding side", mutant("attention", other_side)),
        ("the mask lets one padded place in", "padding length", lambda inputs: runner(let_in(inputs))),
        ("linear layers 1 ulp off at 2 threads", "threads", mutant("linear", lambda inputs: torch.get_num_threads() > 1)),
    ]
    controls = []
    by_name = {c.name: c for c in checks}
    for name, expected, scorer in mutants:
        if expected not in by_name:
            continue
        check = by_name[expected]
        first = dataclasses.replace(check, scorings=(check.scorings[0][:4],))  # so few calls are enough, and cheap
        caught = not measure(first, Session(texts, scorer, device=device or torch.device("cpu"))).holds
        controls.append(Control(name, expected, (expected,) if caught else ()))
    for name, expected, op in (
        ("attention 1 ulp off through a cache", "cache", "attention"),
        ("rotary 1 ulp off in chunks", "chunks", "rotary"),
        ("linear layers 1 ulp off while a batch writes", "generate", "linear"),
    ):
        if expected not in by_name or routes is None:
            continue
        check = by_name[expected]
        first = dataclasses.replace(check, scorings=(check.scorings[0][:1],))

        def off(call: Call, route: Route, op: str = op, bases: set[Call] = _bases(first)) -> Floats:  # noqa: B008
            with contextlib.nullcontext() if call in bases else one_ulp_off(op):
                return route(call)

        wrong: dict[str, Route] = {r: functools.partial(off, route=route) for r, route in routes.items()}
        caught = not measure(first, Session(texts, runner, wrong, device=device or torch.device("cpu"))).holds
        controls.append(Control(name, expected, (expected,) if caught else ()))
    return controls


def _bases(check: Check) -> set[Call]:
    """The calls that others are compared with."""
    return {check.base(call, place)[0] for scoring in check.scorings for call in scoring for place in range(len(call.rows))}


@contextlib.contextmanager
def one_ulp_off(op: str) -> Iterator[None]:
    """Inside, every number that `op` returns is the next one away from zero in its own type."""
    true = registry.select

    def select(name: str, device: torch.device, mode: Mode = PORTABLE) -> Callable[..., Any]:
        serve = true(name, device, mode)

        def off(*args: Any) -> Tensor:
            out: Tensor = serve(*args)
            return (out.view(torch.int32 if out.dtype == torch.float32 else torch.int16) + 1).view(out.dtype)

        return off if name == op else serve

    setattr(registry, "select", select)  # noqa: B010 (mypy refuses the plain assignment)
    try:
        yield
    finally:
        setattr(registry, "select", true)  # noqa: B010
