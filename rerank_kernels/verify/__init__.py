"""verify: are the promises true for this model, here?

A check is a list of calls model(**inputs), padded as a system would pad them (checks.py). It compares the bits of every row
with those it has without the one thing that the check varies. The last are of each text alone, unpadded, on one thread. A run
also proves that it can fail: a control (controls.py) that is not caught makes the run fail, for that check has no power.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from rerank_kernels.backend.modes import PROMISES
from rerank_kernels.models.bound import forward_of
from rerank_kernels.models.registry import max_tokens, typed
from rerank_kernels.patching import walk
from rerank_kernels.scoring.language import prompts_of, writes
from rerank_kernels.scoring.reranker import Reranker
from rerank_kernels.scoring.templates import Prompts, Template
from rerank_kernels.scoring.tokenising import tokenise
from rerank_kernels.verify import language
from rerank_kernels.verify.checks import FINAL, HOME, NEW, Call, Floats, Runner, Texts, Tokens, all_checks, build
from rerank_kernels.verify.controls import Control, mutant_controls, sighted_controls
from rerank_kernels.verify.fresh import Finals, FreshProcess, request_for, runner_of, scores
from rerank_kernels.verify.measure import Result, Session, measure
from rerank_kernels.verify.models import default_pairs, load
from rerank_kernels.verify.report import Setting, VerifyReport, environment, isa

__all__ = ["Control", "Result", "Setting", "VerifyReport", "default_pairs", "environment", "load", "verify"]

LIMIT = 64  # texts used unless asked otherwise: as many as the largest batch
LARGE = 50_000_000  # parameters outside the embeddings from which the built-in texts are cut shorter
ISAS = ("scalar", "avx2", "avx512")
BUDGETS = (16384, 700)  # tokens per batch of the packed route
FAR = 512  # a decoder's rows are padded up to so many places
SEEN = 64  # numbers of a row that the wrong scorers without a model answer


def verify(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    stock: bool = False,
    max_length: int | None = None,
    limit: int | None = LIMIT,
    pooling: str = "mean",
    source: str | None = None,
    trust_remote_code: bool = False,
    mode: str | None = None,
    template: str | Template | None = None,
    instruction: str | None = None,
    progress: Callable[[float], None] | None = None,
) -> VerifyReport:
    """Check every promise for `model` on `pairs` of (query, document), or on texts of Python's own library.

    A language head's rows are pairs in the template of a reranker, or texts where its model type has none. What is compared is
    every logit of the next token. Caches, chunks and generate() are checked too.

    The model is patched for the run and left as it was found, on the device where it is.

    stock: measure it unpatched.
    mode: the numeric mode whose promises are checked. Default: that of a model that is patched already, else "portable".
    max_length: each text is cut to so many tokens. limit: the first so many different texts are used.
    pooling: how an embedding model's vector is made, one of pool's modes.
    source: what models.load gets to have the same model in a fresh process; None leaves out the checks in one.
    trust_remote_code: there the folder's own code may run.
    template, instruction: of an LLM reranker, as in Reranker.
    progress: called with the share of the work that is done.

    Raises PatchError for a model that rerank_kernels does not serve, ValueError for fewer than 8 different texts.
    """
    was = forward_of(model)
    mode, served_by = mode or (was.mode.name if was else "portable"), was.backend if was else None
    training = model.training
    model.eval()
    try:
        if was is not None and was.mode.name != mode:
            walk.unpatch(model)
        # also for stock: what is not served is an error either way, and max_tokens asks a served model
        walk.patch(model, mode, backend=served_by, graphs=was is None or was.wants_graphs)
        if stock:
            walk.unpatch(model)
        large = sum(p.numel() for n, p in model.named_parameters() if "embeddings" not in n) >= LARGE
        room = min(max_tokens(model), tokenizer.model_max_length)
        cut = max_length or (room if pairs is not None else 128 if large else 320)
        if writes(model):
            room = min(room - NEW, max(cut, FAR))  # a decoder takes so much that padding up to it would tell nothing more
        asked = max_length or (None if pairs is None else room)
        prompts = prompts_of("verify", model, tokenizer, template, instruction, (asked, room, cut))
        cut = cut if prompts is None else prompts.max_length
        texts = _texts(model, tokenizer, default_pairs() if pairs is None else pairs, min(cut, room), room, limit, prompts)
        setting = Setting.of(model, mode, served_by)
        request = None
        if source is not None:
            request = request_for(source, model, pooling, stock, setting, trust_remote_code, texts.answers)
        few = 16 if large else 24
        return _verify(model, tokenizer, texts, stock, pooling, request, setting, few, progress, prompts)
    finally:
        if was is None or forward_of(model) is not was:
            walk.unpatch(model)
        if was is not None:
            walk.patch(model, was.mode, backend=was.backend, graphs=was.wants_graphs)
        model.train(training)


def _verify(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    stock: bool,
    pooling: str,
    request: dict[str, Any] | None,
    setting: Setting,
    few: int,
    progress: Callable[[float], None] | None,
    prompts: Prompts | None,
) -> VerifyReport:
    runner = runner_of(model, pooling, stock)
    routes: dict[str, Callable[[Call], Floats]] = {}
    finals: Finals | None = None
    if request is not None:
        routes["process"] = FreshProcess(request, setting, texts, few).answer
        finals = Finals(request, setting, model, texts, few)
        routes[FINAL] = finals.answer
    written = language.routes(model, texts, setting.device) if texts.writes else {}
    routes |= written
    if not stock:
        if prompts is not None or (not texts.writes and _one_number(model)):
            routes["packed"] = functools.partial(_packed, model, tokenizer, pooling, texts, prompts)
        before = isa() if setting.backend.name == "cpu" else None  # only backend cpu has a choice
        for name in ISAS:
            if before is not None and isa(name) is not None:
                routes["isa:" + name] = functools.partial(_with_isa, name, runner, texts)
        isa(before or "")

    checks = all_checks(texts, routes=tuple(routes), few=few)
    whole, spent = sum(map(texts.cost, set().union(*(c.calls() for c in checks)))), 0

    def done(call: Call) -> None:
        nonlocal spent
        spent += texts.cost(call)
        if progress is not None:
            progress(spent / whole)

    session = Session(texts, runner, routes, done, device=setting.device)
    results = [measure(check, session) for check in checks]
    alone = np.concatenate([session.answer(Call((row,))) for row in range(len(texts.tokens))])
    about = environment(setting)
    promised = PROMISES if stock else setting.promises
    for r in results:
        r.promised = r.promise in promised
    controls = sighted_controls(texts, checks, alone[:, :SEEN])
    if not stock:
        # what the backend does not promise is reported; a mutant of it would prove nothing
        controls += mutant_controls(texts, [c for c in checks if c.promise in promised], runner, setting.device, written)
        if finals is not None and "machine-invariant" in promised:
            controls.append(finals.control())
    lengths = [texts.length(r) for r in range(len(texts.tokens))]
    return VerifyReport(
        results,
        controls,
        about,
        scorer="stock PyTorch" if stock else "rerank_kernels",
        kind="cross-encoder" if scores(model) or prompts else "language head" if texts.writes else "embedding",
        rows=len(lengths),
        lengths=(min(lengths), max(lengths)),
    )


def _texts(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    cut: int,
    room: int,
    limit: int | None,
    prompts: Prompts | None = None,
) -> Texts:
    """The rows, without doubles, cut to a multiple of HOME. An embedding model's rows are single texts, and so are those of a
    language head without a template."""
    paired = scores(model) or prompts is not None
    rows: dict[tuple[int, ...], int] = {}
    tokens: list[Tokens] = []
    kept: list[tuple[str, str]] = []

    def row(query: str, document: str | None = None) -> int | None:
        if prompts is not None and document is not None:
            one = {"input_ids": prompts.ids(query, document)}
        else:
            ids, types = tokenise(tokenizer, [query], None if document is None else [document], cut, typed(model))
            one = {"input_ids": ids[0].tolist()} | ({} if types is None else {"token_type_ids": types[0].tolist()})
        key = (*one["input_ids"], *one.get("token_type_ids", ()))
        if key not in rows:
            if limit is not None and len(tokens) >= limit:
                return None
            rows[key] = len(tokens)
            tokens.append(one)
            kept.append((query, document or ""))
        return rows[key]

    groups: dict[str, tuple[int | None, dict[int, None]]] = {}
    for query, document in pairs:
        head = None if paired else row(query)
        place = row(query, document) if paired else row(document)
        if place is not None and (head is not None or paired):
            groups.setdefault(query, (head, {}))[1].setdefault(place)
    whole = len(tokens) // HOME * HOME
    if not whole:
        raise ValueError(f"verify: pairs must hold at least {HOME} different texts, to put in one batch, got {len(tokens)}")
    pad = tokenizer.pad_token_id or 0
    special = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id)
    return Texts(
        tokens=tuple(tokens[:whole]),
        pairs=tuple(kept[:whole]),
        groups=tuple((q, tuple(d for d in ds if d < whole)) for q, ds in groups.values() if q is None or q < whole),
        pad=pad,
        pad_type=tokenizer.pad_token_type_id or 0,
        special=tuple(dict.fromkeys(t for t in special if t is not None and t != pad)),
        vocabulary=model.config.vocab_size,
        cut=cut,
        room=room,
        side="left" if writes(model) else "right",
        writes=writes(model),
        answers=None if prompts is None else prompts.answers(),
    )


def _one_number(model: Any) -> bool:
    """Whether a pair gets one score, or a text a vector."""
    return not scores(model) or model.config.num_labels == 1


def _packed(model: nn.Module, tokenizer: Any, pooling: str, texts: Texts, prompts: Prompts | None, call: Call) -> Floats:
    named = {} if prompts is None else {"template": prompts.template, "instruction": prompts.instruction}
    reranker: Any = Reranker(model, tokenizer, max_length=texts.cut, **named)  # type: ignore[arg-type]
    budget = BUDGETS[call.turn]
    if reranker.kind == "cross-encoder":
        return reranker.score([texts.pairs[r] for r in call.rows], progress=False, batch_tokens=budget).logit[:, None]
    reranker.pooling, reranker.normalise = pooling, False  # bits of the vector itself
    return reranker.encode([texts.pairs[r][0] for r in call.rows], progress=False, batch_tokens=budget)


def _with_isa(name: str, runner: Runner, texts: Texts, call: Call) -> Floats:
    before = isa() or ""
    isa(name)
    try:
        return runner(build(texts, call)).numpy()  # on the CPU, whose instruction sets these are
    finally:
        isa(before)
