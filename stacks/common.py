"""What the tests of all systems share: 200 pairs, the ways to ask for them, bits, and what a run leaves for stacks/compare.py.

A system is a function (query, documents, batch) -> logits in the order of the documents; some also take all 200 pairs at once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

QUERIES_BY_DOCUMENTS = (10, 20)
PAIRS = 200
DTYPES = ("float32", "bfloat16", "float16")
ALONE = "batch 1"
OF_DECODERS = (ALONE, "batch 32")
SEED = 6

Score = Callable[[str, Sequence[str], int], Sequence[float]]
ScorePairs = Callable[[Sequence[tuple[str, str]], int], Sequence[float]]


def data() -> Path:
    """The folder that stacks/prepare.py wrote; stacks/run.py says where it is."""
    folder = os.environ.get("STACKS_DATA")
    if folder is None:
        raise SystemExit("STACKS_DATA is not set: run a stack's tests with `make stacks STACKS=st6`")
    return Path(folder)


def lists() -> list[tuple[str, list[str]]]:
    return [(query, documents) for query, documents in json.loads((data() / "pairs.json").read_text())]


def pairs() -> list[tuple[str, str]]:
    return [(query, document) for query, documents in lists() for document in documents]


def documents() -> list[str]:
    return [document for _, document in pairs()]


def shuffled(n: int) -> list[int]:
    """A fixed order of n things that is not theirs."""
    return sorted(range(n), key=lambda i: hashlib.sha256(f"{SEED} {i}".encode()).digest())


# ---- bits ------------------------------------------------------------------------------------------------------------------


def bits_of(values: Iterable[float]) -> list[int]:
    """Of each value as float32, which it must be exactly: a system that rounds or widens a logit would hide its bits."""
    found = []
    for value in values:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        assert struct.unpack("<f", struct.pack("<I", bits))[0] == value, f"{value!r} is no float32"
        found.append(bits)
    return found


def differ(a: Sequence[Any], b: Sequence[Any]) -> int:
    assert len(a) == len(b), (len(a), len(b))
    return sum(x != y for x, y in zip(a, b, strict=True))


# ---- the ways --------------------------------------------------------------------------------------------------------------


def every_way(score: Score, score_pairs: ScorePairs | None = None, only: Sequence[str] = ()) -> dict[str, list[int]]:
    """Way -> the bits of the 200 logits, in the order of pairs(); of all ways, or of those named.

    A system that takes one query at a time cuts its list of 20 into batches.
    """
    given, asked = pairs(), lists()

    def in_lists(batch: int, size: int = 20, mixed: bool = False) -> list[int]:
        found = []
        for query, texts in asked:
            order = shuffled(len(texts)) if mixed else range(len(texts))
            of: dict[int, float] = {}
            for start in range(0, len(texts), size):
                part = order[start : start + size]
                of |= zip(part, score(query, [texts[i] for i in part], batch), strict=True)
            found += [of[i] for i in range(len(texts))]
        return bits_of(found)

    def at_once(batch: int, mixed: bool = False) -> list[int]:
        if score_pairs is None:
            return in_lists(batch, mixed=mixed)
        order = shuffled(len(given)) if mixed else range(len(given))
        of = dict(zip(order, score_pairs([given[i] for i in order], batch), strict=True))
        return bits_of(of[i] for i in range(len(given)))

    ways: dict[str, Callable[[], list[int]]] = {
        ALONE: lambda: at_once(1),
        "batch 7": lambda: at_once(7),
        "batch 32": lambda: at_once(32),
        "shuffled": lambda: at_once(32, mixed=True),
        "lists of 5": lambda: in_lists(32, 5),
    }
    if score_pairs is not None:
        ways["lists of 20"] = lambda: in_lists(32)
    return {name: way() for name, way in ways.items() if not only or name in only}


def apart(ways: dict[str, list[int]]) -> dict[str, int]:
    """Way -> how many of the 200 pairs have other bits than alone."""
    return {name: differ(bits, ways[ALONE]) for name, bits in ways.items() if name != ALONE}


class Tokens:
    """The tokens that a transformers model was given, by sequence: what the mask keeps, and the types if there are any.

    Stands before the model's forward, stock or patched; a hook would not do, for some systems call forward itself.
    """

    def __init__(self, model: Any) -> None:
        self.seen: set[tuple[Any, ...]] = set()
        self.model, self.before, self.own = model, model.forward, "forward" in model.__dict__

    def __call__(self, *args: Any, **given: Any) -> Any:
        assert not args, "the model was called by position"
        mask, types = given["attention_mask"].bool(), given.get("token_type_ids")
        for i, row in enumerate(mask):
            kept = () if types is None else tuple(types[i][row].tolist())
            self.seen.add((tuple(given["input_ids"][i][row].tolist()), kept))
        return self.before(**given)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.before)

    def __enter__(self) -> Tokens:
        self.model.__dict__["forward"] = self
        return self

    def __exit__(self, *_: Any) -> None:
        del self.model.__dict__["forward"]
        if self.own:
            self.model.__dict__["forward"] = self.before

    def hash(self) -> str:
        """Of the set: systems ask in orders of their own."""
        assert self.seen, "no tokens came by"
        return hashlib.sha256(json.dumps(sorted(self.seen)).encode()).hexdigest()[:16]


# ---- what a run leaves -----------------------------------------------------------------------------------------------------


class Results:
    """Notes by name, in a file for stacks/compare.py that is written at each note: a run cut short shows how far it came."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.notes: dict[str, Any] = dict(about)

    def note(self, kind: str, name: str, value: Any) -> None:
        self.notes.setdefault(kind, {})[name] = value
        self.path.write_text(json.dumps(self.notes, indent=1) + "\n")


# ---- what every system is held to ------------------------------------------------------------------------------------------


def hold(
    results: Results,
    system: str,
    case: tuple[str, Any],
    holder: Any,
    inner: Any,
    score: Score,
    score_pairs: ScorePairs | None = None,
    only: Sequence[str] = (),
) -> None:
    """Stock, then patched, and the small model stock again: patched, no way may move a bit; stock, some way must.

    system: what the user holds, as the tables name it. inner: the transformers model in it, to see its tokens.
    only: these ways, for a model whose prompts are long.
    """
    import rerank_kernels as rk

    model, dtype = Path(case[0]).name, str(case[1]).removeprefix("torch.")
    name = f"{model} {dtype}"
    # a CPU takes ten times as long for stock's float16, so there the small model has to show the power
    few = only or (() if dtype == "float32" else (ALONE, "batch 32", "lists of 5"))
    beside = (model, dtype) != ("minilm", "float16")
    stock = every_way(score, score_pairs, few) if beside else {}
    report = rk.patch(holder)
    with Tokens(inner) as tokens:
        ours = every_way(score, score_pairs, only)
    rk.unpatch(holder)

    if beside:
        moved = apart(stock)
        results.note(f"stock {system}", name, moved)
        assert any(moved.values()), f"{system}, {name}: stock did not move a bit either, so this shows nothing"
    if model != "minilm":
        again = every_way(score, score_pairs, ("batch 32",))
        assert again["batch 32"] == stock["batch 32"], f"{system}, {name}: unpatch did not bring stock's bits back"
    assert apart(ours) == dict.fromkeys(apart(ours), 0), f"{system}, {name}: patched, pairs with other bits than alone"
    assert any(report.calls().values()), f"{system}, {name}: no patched forward was called"
    results.note(f"ours {system}", name, ours[ALONE])
    results.note(f"tokens {system}", name, tokens.hash())


def hold_order(
    results: Results, system: str, holder: Any, ranking: Callable[[str, list[str]], list[int]], stock_ties: bool = True
) -> None:
    """Patched, a list of 200 documents whose logits lie in 8..16 is ranked by logit, equal ones as they came.

    ranking: the indices of the documents, best first, as the system's user gets them with its own defaults: by score.
    Where stock's scores tie it cannot know the order, so it must be wrong somewhere: or, stock_ties=False, nowhere.
    """
    import rerank_kernels as rk

    logits = json.loads((data() / "reference.json").read_text())["minilm-saturated float32"]
    query = lists()[0][0]
    order = shuffled(PAIRS)  # so that to leave tied documents as they came is no way to be right
    texts = [documents()[i] for i in order]
    # positive floats are ordered as their bits
    wanted = sorted(range(PAIRS), key=lambda i: (-logits[order[i]], i))
    stock = ranking(query, texts)
    rk.patch(holder)
    ours = ranking(query, texts)
    rk.unpatch(holder)
    results.note("order", system, {"stock": differ(stock, wanted), "ours": differ(ours, wanted)})
    assert (stock != wanted) == stock_ties, f"{system}: stock has {differ(stock, wanted)} of {PAIRS} places wrong"
    assert ours == wanted, f"{system}: {differ(ours, wanted)} of {PAIRS} places differ from the order of the logits"
