"""What comes back: bits against the reference, the largest difference, and documents that changed places."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from rerank_kernels.verify import language
from rerank_kernels.verify.checks import COSINES, FINAL, GREEDY, UNCACHED, Call, Check, Floats, Runner, Texts, build


@dataclass
class Result:
    """One row of the table."""

    promise: str
    check: str
    varied: str
    equal: int = 0
    total: int = 0
    max_difference: float = 0.0
    flips: int = 0
    ordered: int = 0  # pairs of documents whose order was compared, or next tokens where rows are no pairs
    promised: bool = True  # does the backend that answered promise this?

    @property
    def holds(self) -> bool:
        return self.equal == self.total > 0


@dataclass
class Session:
    """Answers calls, each once: what two checks share is computed for the first of them only."""

    texts: Texts
    runner: Runner
    routes: dict[str, Callable[[Call], Floats]] = field(default_factory=dict)
    done: Callable[[Call], None] = lambda call: None
    answers: dict[Call, Floats] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def answer(self, call: Call) -> Floats:
        if call not in self.answers:
            with threads(call.threads):
                if call.route == "model":
                    self.answers[call] = self.runner(build(self.texts, call, self.device)).cpu().numpy()
                else:
                    self.answers[call] = self.routes[call.route](call)
            self.done(call)
        return self.answers[call]


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(check: Check, session: Session) -> Result:
    result = Result(check.promise, check.name, check.varied)
    next_token = session.texts.writes and session.texts.answers is None
    for scoring in check.scorings:
        before: dict[int, Floats] = {}
        after: dict[int, Floats] = {}
        for call in scoring:
            for place, row in enumerate(call.rows):
                base, there = check.base(call, place)
                want, got = session.answer(base)[there], session.answer(call)[place]
                result.total += 1
                if got.tobytes() == want.tobytes():
                    result.equal += 1
                else:
                    result.max_difference = max(result.max_difference, language.gap(call, want, got))
                if next_token:
                    result.ordered += 1
                    result.flips += language.says(call, got) != language.says(call, want)
                before.setdefault(row, want)
                after.setdefault(row, got)
        route = scoring[0].route if scoring else ""
        if next_token or route in (GREEDY, UNCACHED):
            continue
        answers = None if route in (FINAL, "packed") else session.texts.answers
        flips, ordered = _flips(session.texts, before, after, COSINES if route == FINAL else 0, answers)
        result.flips += flips
        result.ordered += ordered
    return result


def _flips(
    texts: Texts,
    before: dict[int, Floats],
    after: dict[int, Floats],
    behind: int = 0,
    answers: tuple[int, int | None] | None = None,
) -> tuple[int, int]:
    """Pairs of documents whose order changed (to or from a tie counts), and how many there were. `behind`: numbers that follow
    a vector and are none of it. answers: tokens, where rows are their logits."""
    flips = ordered = 0
    for query, documents in texts.groups:
        rows = [d for d in documents if d in before]
        if len(rows) < 2 or (query is not None and query not in before):
            continue
        a, b = (_keys(values, query, rows, behind, answers) for values in (before, after))
        changed = np.sign(a[:, None] - a[None, :]) != np.sign(b[:, None] - b[None, :])
        flips += int(np.triu(changed, 1).sum())
        ordered += len(rows) * (len(rows) - 1) // 2
    return flips, ordered


def _keys(
    values: dict[int, Floats], query: int | None, rows: list[int], behind: int, answers: tuple[int, int | None] | None
) -> npt.NDArray[np.float64]:
    """What documents are ordered by: the (first) logit, the log-odds of an answer, or the cosine with the query."""
    if answers is not None:
        yes, no = answers
        return np.array([float(values[r][yes]) - (0.0 if no is None else float(values[r][no])) for r in rows])
    d = np.stack([values[r] for r in rows]).astype(np.float64)
    if query is None:
        return d[:, 0]
    q = values[query].astype(np.float64)
    d, q = d[:, : d.shape[1] - behind], q[: q.size - behind]
    cosines: npt.NDArray[np.float64] = (d @ q) / (np.linalg.norm(d, axis=1) * np.linalg.norm(q))
    return cosines
