"""Reranker: a model folder and pairs of text in, scores and rankings out, the same bits whatever else is in the list.

Pairs are tokenised without padding, sorted by length, packed into batches of about batch_tokens tokens, scored, and returned
in the caller's order. None of that shows in the result: a pair has one score. Ranking goes by logit: near 1.0 float32 scores
tie, and logits do not.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rerank_kernels import check
from rerank_kernels.backend.modes import MODES
from rerank_kernels.models import lora
from rerank_kernels.models import registry as models
from rerank_kernels.models.bound import forward_of, serving
from rerank_kernels.ops.softmax import sum as row_sum
from rerank_kernels.patching import walk
from rerank_kernels.ranking import descending
from rerank_kernels.scoring import bounding, folders, settings, sharing, templates, tokenising
from rerank_kernels.scoring.files import Folder
from rerank_kernels.scoring.tokenising import Ids

Array = npt.NDArray[np.float32]
TEMPLATE_OF_ITS_OWN = (
    "sentence-transformers' CrossEncoder(path) with rk.patch uses it; or name the template that is the same, 'qwen3-reranker' "
    "for Qwen3-Reranker"
)
PROGRESS_FROM = 256  # pairs; a shorter list is done before a bar is read


class Scores(NamedTuple):
    """float32 [n] each, in the order of the pairs.

    Cross-encoder: logit, score = sigmoid(logit), complement = sigmoid(-logit), which stays distinct where score is 1.0.
    Embedding model: logit = score = cosine similarity in [-1, 1] (up to rounding), complement = 1 - cosine. A folder may ask
    for the dot product instead.
    """

    logit: Array
    score: Array
    complement: Array


@dataclass(frozen=True)
class Ranked:
    """One document of a ranking; index is its place in the list that was given."""

    index: int
    document: str
    logit: float
    score: float
    complement: float


class Reranker:
    """Scores and ranks with a cross-encoder, or with an embedding model by cosine similarity.

    model_or_path: a local folder as save_pretrained writes it, or a loaded model. A loaded model needs `tokenizer`; it is
    patched (rk.patch), cast to `dtype` and set to eval() in place.
    max_length: tokens of a pair or text; the longest part is truncated first. Default: what model and tokenizer allow.
    dtype: torch.float32, float16 or bfloat16 for the weights. Default: as stored. Scores are float32 always.
    device: where the model goes, "cuda" for instance. Default: where it is.
    mode: "portable" or, for a half-precision model on a GPU, "tensor" (rk.patch says what they promise). Default: that of a
    model that is patched already, else "portable".
    backend: the one that serves this model, as in rk.patch.
    graphs: CUDA graphs on a GPU, as in rk.patch. Default: that of a model that is patched already, else True.
    kind: "cross-encoder" or "embedding". Default: what the folder or the model's architecture says. An embedding model pools
    as its sentence-transformers files say (rk.pool names the modes), by the mean if there are none. Every other setting of
    these files is served too, or refused by name (docs/SYSTEMS.md).
    template: of an LLM reranker, a *ForCausalLM that answers yes or no: a name ("qwen3-reranker", "qwen3-reranker-evaluation",
    "bge-reranker-v2-gemma", "mxbai-rerank-v2") or a Template. Default: that of the model's type. Its logit is the log-odds of
    the answer. A decoder with a classification head takes one too, if it was trained with one.
    instruction: in the template's place for one. Default: the template's own.
    trust_remote_code: code that lies in the folder may run, for a model or tokenizer that needs it. Read it first.

    Raises ValueError or TypeError for arguments and folders that do not fit, PatchError for a model type that is not served.
    """

    def __init__(
        self,
        model_or_path: nn.Module | str | Path,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kind: str | None = None,
        mode: str | None = None,
        backend: str | None = None,
        graphs: bool | None = None,
        template: str | templates.Template | None = None,
        instruction: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check.choice("Reranker", "kind", kind, (None, *settings.KINDS))
        check.choice("Reranker", "dtype", dtype, (None, *check.FLOATS))
        check.choice("Reranker", "graphs", graphs, (None, True, False))
        check.choice("Reranker", "trust_remote_code", trust_remote_code, (False, True))
        found: settings.Settings | None = None
        self.model: Any
        if any(c.__name__ == "CrossEncoder" and c.__module__.startswith("sentence_tr") for c in type(model_or_path).__mro__):
            raise TypeError(
                "Reranker: model_or_path must be a folder or a transformers model, got a sentence-transformers CrossEncoder; "
                "use Reranker(ce.model, ce.tokenizer)"
            )
        if isinstance(model_or_path, nn.Module):
            if tokenizer is None:
                raise TypeError("Reranker: tokenizer must be given with a loaded model; or pass the path of its folder")
            has = models.kind(model_or_path)
            self.model, self.kind = model_or_path, kind or has or settings.kind_of([type(model_or_path).__name__])
            if has not in (None, self.kind):
                came = f"{kind!r}; its class is {type(model_or_path).__name__}"
                check.fail(
                    "Reranker", "kind", f"{has!r}, or left out, for this model", came, "load the class for the other kind"
                )
        elif isinstance(model_or_path, str | Path):
            found = settings.read(Folder(Path(model_or_path)), kind)
            self.kind = found.kind
            self.model = folders.load_model(found.transformer, self.kind, trust_remote_code)
            if tokenizer is None:
                tokenizer = folders.load_tokenizer(found.transformer, trust_remote_code, found.lower)
        else:
            came = type(model_or_path).__name__
            raise TypeError(f"Reranker: model_or_path must be a folder or a torch.nn.Module, got {came}")
        labels = getattr(getattr(self.model, "config", None), "num_labels", 1)
        writes = self.kind == "cross-encoder" and settings.writes([type(self.model).__name__])
        if self.kind == "cross-encoder" and labels != 1 and not writes:
            check.fail("Reranker", "config.num_labels", "1, one score per pair", labels, "use rk.patch(model) for other heads")
        if dtype is not None or device is not None:
            self.model.to(device=device, dtype=dtype)
        before = forward_of(self.model)
        if before is not None:
            mode, backend = mode or before.mode.name, backend or before.backend
            graphs = before.wants_graphs if graphs is None else graphs
        self.report = walk.patch(self.model.eval(), mode or "portable", backend=backend, graphs=graphs is None or bool(graphs))
        self.tokenizer = tokenizer
        self.settings = found or settings.Settings(self.kind, None)
        self.pooling, self.normalise = self.settings.pooling, self.settings.normalise
        self._rules: bounding.Rules | None = None
        self.max_length = self._length(max_length, self.settings)
        self.template: templates.Template | None = None
        if writes or template is not None:
            if self.kind == "embedding":
                check.fail(
                    "Reranker", "template", "unset with an embedding model", repr(template), "its prompts come from the folder"
                )
            if self.settings.answers is not None and template is None:
                wanted = "given for this folder, whose own chat template makes its prompts"
                check.fail("Reranker", "template", wanted, "None", TEMPLATE_OF_ITS_OWN)
            self.template = templates.chosen(template, str(self.model.config.model_type))
        if instruction and (self.template is None or not self.template.asks):
            check.fail("Reranker", "instruction", "unset without a template that holds {instruction}", repr(instruction))
        self.instruction = instruction if instruction is not None else self.template.instruction if self.template else ""
        if instruction is None and self.settings.answers is not None and self.settings.default:
            if self.template is None or not self.template.asks:
                wanted = "one that holds {instruction}, for this folder has a prompt of its own"
                check.fail("Reranker", "template", wanted, f"{template!r:.60}", 'pass instruction="" to leave it out')
            self.instruction = self.settings.default
        self._answers = self._prompts.answers() if writes else None
        if self._answers is not None:
            last = min(int(self.model.config.vocab_size), lora.held(self.model.lm_head).weight.shape[0]) - 1
            if any(token is not None and token > last for token in self._answers):
                wanted, came = (
                    f"one that asks for tokens 0 to {last}",
                    f"{self._prompts.template.name!r}, of tokens {self._answers}",
                )
                check.fail("Reranker", "template", wanted, came, "tokenizer and model are of two folders")
        if self.settings.answers not in (None, self._answers):
            came = f"{self.template.name!r}, of tokens {self._answers}" if self.template else "none"
            check.fail("Reranker", "template", f"one that asks for tokens {self.settings.answers}, as this folder does", came)

    def score(self, pairs: Iterable[tuple[str, str]], *, progress: bool | None = None, batch_tokens: int = 16384) -> Scores:
        """The score of each (query, document), in the order given.

        batch_tokens: tokens computed at a time; bounds memory, changes no bit. progress: show a bar on stderr; if not given,
        for more than 256 pairs on a terminal. No pairs give empty arrays.
        """
        queries, documents = _pairs(pairs)
        if not queries:
            return Scores(*np.zeros((3, 0), np.float32))
        if self.kind == "embedding":
            prompts = self.settings.prompts  # as encode_query() and encode_document() of sentence-transformers use them
            queries = [prompts["query"] + query for query in queries]
            documents = [prompts["document"] + document for document in documents]
            texts = list(dict.fromkeys((*queries, *documents)))
            row = {text: i for i, text in enumerate(texts)}
            unit = self.normalise or self.settings.similarity == "cosine"
            vectors = torch.from_numpy(self._encode(texts, unit, progress, batch_tokens)).to(self._device)
            pairs_of = [row[q] for q in queries], [row[d] for d in documents]
            with serving(MODES[self.report.mode], self.report.backend):
                logit = row_sum(vectors[pairs_of[0]] * vectors[pairs_of[1]], -1).cpu().numpy()
            return Scores(logit, logit.copy(), np.float32(1.0) - logit)

        def run(ids: Tensor, cu: Tensor, types: Tensor | None, before: models.Before | None) -> Tensor:
            if self._answers is not None:
                return torch.cat(models.packed_answers(self.model, ids, cu, *self._answers, before), dim=1)
            return torch.cat(models.packed_logits(self.model, ids, cu, types, before), dim=1)

        return Scores(*self._packed(queries, documents, progress, batch_tokens, run).T.copy())

    def rank(self, query: str, documents: Iterable[str], top_k: int | None = None) -> list[Ranked]:
        """The documents by descending logit, the first top_k if given; equal logits by ascending index, NaN last."""
        if top_k is not None:
            if (count := _integer(top_k)) is None or count < 0:
                check.fail("rank", "top_k", "None or an integer >= 0", repr(top_k))
            top_k = count
        documents = _list("rank", "documents", documents, "str", "pass [document]")
        scores = self.score([(query, document) for document in documents])
        logits = scores.logit.tolist()
        order = descending(logits)[:top_k]
        return [Ranked(i, documents[i], logits[i], float(scores.score[i]), float(scores.complement[i])) for i in order]

    def encode(
        self, texts: Iterable[str], *, prompt_name: str | None = None, progress: bool | None = None, batch_tokens: int = 16384
    ) -> Array:
        """Embeddings, float32 [n, D], of an embedding model, of length 1 unless its modules.json has no Normalize.

        prompt_name: of a prompt of the folder, which is put before each text. Default: the folder's default_prompt_name.
        """
        if self.kind != "embedding":
            raise TypeError("encode: the model is a cross-encoder, which has no embedding of a single text; use score or rank")
        prompts = self.settings.prompts
        if prompt_name is not None:
            check.choice("encode", "prompt_name", prompt_name, (None, *prompts))
        prompt = self.settings.default if prompt_name is None else prompts[prompt_name]
        texts = _list("encode", "texts", texts, "str", "pass [text]")
        if not texts:
            return np.zeros((0, self.model.config.hidden_size), np.float32)
        checked = [prompt + _text(text, f"encode: text {i}") for i, text in enumerate(texts)]
        return self._encode(checked, self.normalise, progress, batch_tokens)

    def _encode(self, texts: list[str], normalise: bool, progress: bool | None, batch_tokens: int) -> Array:
        def run(ids: Tensor, cu: Tensor, types: Tensor | None, before: models.Before | None) -> Tensor:
            return models.packed_embeddings(self.model, ids, cu, types, pooling=self.pooling, normalise=normalise)

        return self._packed(texts, None, progress, batch_tokens, run)

    def _packed(
        self,
        first: list[str],
        second: list[str] | None,
        progress: bool | None,
        batch_tokens: int,
        run: Callable[[Tensor, Tensor, Tensor | None, models.Before | None], Tensor],
    ) -> Array:
        """Rows of run(ids, cu_seqlens, token_types, before), one per text or pair, in the order given."""
        if (count := _integer(batch_tokens)) is None or count < 1:
            check.fail("score", "batch_tokens", "an integer >= 1", repr(batch_tokens))
        n = len(first)
        ids, types = self._tokenised(first, second)
        config = self.model.config
        tokenising.in_vocabulary(ids, int(config.vocab_size), "ids of the tokenizer", "vocab_size")
        if types is not None and hasattr(config, "type_vocab_size"):
            tokenising.in_vocabulary(types, int(config.type_vocab_size), "token types of the tokenizer", "type_vocab_size")
        rows: list[Array | None] = [None] * n
        show = n > PROGRESS_FROM and sys.stderr.isatty() if progress is None else progress
        with _bar(n, show) as advance:
            for batch in self._passes(ids, None if types is not None or second is None else first, count):
                # all on the host, where what is asked of them is known without waiting for a device
                cu = torch.tensor([0, *np.cumsum([len(own) for own in batch.sequences])], dtype=torch.int32, device="cpu")
                flat = torch.from_numpy(np.concatenate(batch.sequences)).long()
                kind = None
                if types is not None:
                    kind = torch.from_numpy(np.concatenate([types[i] for i in batch.items])).long()
                found = run(flat, cu, kind, batch.before).cpu().numpy()
                for i, end in zip(batch.items, batch.ends, strict=True):
                    rows[i] = found[end]
                advance(len(batch.items))
        return np.stack([row for row in rows if row is not None])

    def _passes(self, ids: list[Ids], queries: list[str] | None, batch_tokens: int) -> Iterator[sharing.Pass]:
        """Of pairs with these queries a decoder computes once what several of them begin with."""
        turns = None if queries is None else models.turning_points(self.model)
        if queries is None or turns is None:
            return sharing.passes(ids, batch_tokens)
        return sharing.shared_passes(ids, queries, batch_tokens, turns)

    def _tokenised(self, first: list[str], second: list[str] | None) -> tuple[list[Ids], list[Ids] | None]:
        if self.template is None or second is None:
            first, second = self._bounded(first, second)
            return tokenising.tokenise(self.tokenizer, first, second, self.max_length, models.typed(self.model))
        second, _ = self._bounded(second, None)
        with tokenising.LOCK:
            return [np.asarray(self._prompts.ids(*pair), np.int32) for pair in zip(first, second, strict=True)], None

    @property
    def _prompts(self) -> templates.Prompts:
        assert self.template is not None
        limit = models.max_tokens(self.model)
        return templates.Prompts(self.template, self.tokenizer, self.max_length, self.instruction, limit)

    def _bounded(self, first: list[str], second: list[str] | None) -> tuple[list[str], list[str] | None]:
        """The texts, and of very long ones what the tokenizer has to see; what that is depends on the pair alone."""
        long = [i for i, pair in enumerate(zip(first, second or first, strict=True)) if max(map(len, pair)) > bounding.LONG]
        if not long:
            return first, second
        if self._rules is None:
            with tokenising.LOCK:
                self._rules = bounding.Rules.of(self.tokenizer)
        columns = [list(first)] if second is None else [list(first), list(second)]
        for i in long:
            pair = [column[i] for column in columns]
            for column, text, other in zip(columns, pair, [*pair[1:], pair[0] if second else ""], strict=True):
                column[i], exact = bounding.bounded(self._rules, text, other, self.max_length)
                if not exact:
                    said = f"pair {i}" if second else f"text {i}"
                    warnings.warn(
                        bounding.BoundedWarning(
                            f"{said}: a text of {len(text):,} characters was cut to {len(column[i]):,} before tokenising", text
                        ),
                        stacklevel=4,
                    )
        return columns[0], columns[1] if second else None

    @property
    def _device(self) -> torch.device:
        """Where the model is now: it may be moved between two calls."""
        return next(self.model.parameters()).device

    def _length(self, asked: int | None, found: settings.Settings) -> int:
        """Tokens per pair: what was asked for, else what the folder says, else what the tokenizer says; never more than the
        position table holds."""
        table = models.max_tokens(self.model)
        special = self.tokenizer.num_special_tokens_to_add(pair=self.kind == "cross-encoder")
        stored, name = (
            (found.limit, found.limit_said) if found.limit is not None else (None, "the tokenizer's model_max_length")
        )
        longest = min(self.tokenizer.model_max_length, table) if stored is None else stored  # "no limit" is 10^30
        if asked is None:
            whole = isinstance(longest, int | float) and not isinstance(longest, bool) and longest % 1 == 0
            if not whole or longest <= special:
                check.fail(
                    "Reranker", name, f"an integer from {special + 1} on, more than the special tokens", f"{longest!r:.60}"
                )
            return int(min(table, longest))
        if (count := _integer(asked)) is None or not special < count <= table:
            wanted = f"an integer in [{special + 1}, {table}], from the special tokens to the model's positions"
            check.fail("Reranker", "max_length", wanted, repr(asked))
        return count


def _integer(value: Any) -> int | None:
    """NumPy's and torch's integers too; no truth value."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda done: bar.advance(task, done)


def _list(op: str, name: str, values: Any, of: str, hint: str) -> list[Any]:
    """Any iterable as a list, for it is read more than once; a str and a mapping are iterable too, but never what was meant."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{op}: {name} must be a list of {of}, got one {type(values).__name__}; {hint}")
    if isinstance(values, Mapping):
        raise TypeError(f"{op}: {name} must be a list of {of}, got {type(values).__name__}; pass its values or items as a list")
    try:
        return list(values)
    except TypeError:
        if isinstance(values, Iterable):
            raise
        raise TypeError(f"{op}: {name} must be a list of {of}, got {_shown(values)}") from None


def _pairs(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    pairs = _list("score", "pairs", pairs, "(query, document)", "pass [(query, document)]")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"score: pair {i} must be (query, document), got {_shown(pair)}")
    queries = [_text(pair[0], f"score: the query of pair {i}") for i, pair in enumerate(pairs)]
    return queries, [_text(pair[1], f"score: the document of pair {i}") for i, pair in enumerate(pairs)]


def _text(text: object, what: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, got {_shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be valid Unicode, got a lone surrogate {text[error.start]!r} at place {error.start}; "
            "clean it with text.encode('utf-8', 'replace').decode()"
        ) from None
    return text


def _shown(value: object) -> str:
    return f"{type(value).__name__} {value!r:.60}"
