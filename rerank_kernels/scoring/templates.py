"""Templates of LLM rerankers: which token ids a query and a document make, and which words of the vocabulary answer.

A decoder that reranks reads one prompt per pair and says yes or no at its end. Its score depends on every token of the prompt,
so a template is a list of pieces that are tokenised one by one, as the model's authors do it. The document alone is cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rerank_kernels import check


@dataclass(frozen=True)
class Template:
    """A prompt in pieces, which may hold {instruction}, {query} and {document}; the last two once each.

    pieces: tokenised one by one without special tokens and put together. BOS alone stands for the tokenizer's bos token, if it
    has one that is not its pad token.
    yes, no: words that are one token each. logit = (the language head's row of yes - that of no) · the last hidden state: the
    log-odds of the answer. Without `no` it is the row of yes alone.
    instruction: what {instruction} is if the user says nothing.
    ahead, beyond: so many pieces at the beginning and at the end do not count for max_length.
    instructed: stands before the query in its piece where there is an instruction, for a model that may have none.
    """

    name: str
    pieces: tuple[str, ...]
    yes: str = "yes"
    no: str | None = "no"
    instruction: str = ""
    beyond: int = 0
    ahead: int = 0
    instructed: str = ""

    def __post_init__(self) -> None:
        for name in ("query", "document"):
            held = sum(piece.count("{" + name + "}") for piece in self.pieces)
            if held != 1:
                check.fail("Template", "pieces", f"with {{{name}}} once", f"{held} of them")
        if not self.pieces[self.cut].endswith("{document}"):
            check.fail("Template", "pieces", "with {document} at the end of its piece, where it is cut", self.pieces[self.cut])

    @property
    def asks(self) -> bool:
        """Whether it has a place for an instruction."""
        return any("{instruction}" in piece for piece in (*self.pieces, self.instructed))

    @property
    def cut(self) -> int:
        """The piece that holds the document."""
        return next(i for i, piece in enumerate(self.pieces) if "{document}" in piece)


BOS = "{bos}"
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_YES_NO = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a prediction "
    "of either 'Yes' or 'No'."
)
_MXBAI = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "query: {query}",
    "\n",
    "document: {document}",
    "\n",
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document pair, "
    "carefully analyze the semantic relationship between them, then provide your binary relevance judgment (0 for not "
    "relevant, 1 for relevant).\nRelevance:",
    "<|im_end|>\n<|im_start|>assistant\n",
)
TEMPLATES = {
    t.name: t
    for t in (
        Template("qwen3-reranker", _QWEN3, instruction=_SEARCH),  # as the model card has it
        Template(  # as its authors' evaluation and their example for vLLM have it: other tokens, other scores
            "qwen3-reranker-evaluation",
            (_QWEN3[0], "<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>: {document}", _QWEN3[2]),
            instruction=_SEARCH,
        ),
        Template(
            "bge-reranker-v2-gemma",
            (BOS, "A: {query}", "\n", "B: {document}", "\n", _YES_NO),
            yes="Yes",
            no=None,
            beyond=2,
        ),
        Template("mxbai-rerank-v2", _MXBAI, yes="1", no="0", ahead=1, beyond=3, instructed="instruction: {instruction}\n"),
    )
}
OF_MODEL_TYPE = {"qwen2": "mxbai-rerank-v2", "qwen3": "qwen3-reranker", "gemma": "bge-reranker-v2-gemma"}


def chosen(given: str | Template | None, model_type: str) -> Template:
    """The template that was given, or that of the model's type."""
    if isinstance(given, Template):
        return given
    name = given or OF_MODEL_TYPE.get(model_type)
    if name not in TEMPLATES:
        wanted = f"one of {', '.join(TEMPLATES)}, or a Template"
        check.fail(
            "Reranker", "template", wanted, repr(name), f"a {model_type} decoder has none of its own" if given is None else ""
        )
    return TEMPLATES[name]


@dataclass(frozen=True)
class Prompts:
    """A template for one tokenizer: ids of pairs, and the ids that answer. limit: the most tokens that the model takes."""

    template: Template
    tokenizer: Any
    max_length: int
    instruction: str
    limit: int = 1 << 31

    def ids(self, query: str, document: str) -> list[int]:
        """One prompt; the end of the document is cut where what counts is longer than max_length, or all of it than limit."""
        t = self.template
        parts = [self._piece(piece, query, document) for piece in t.pieces]
        sizes = [0 if i == t.cut else len(part) for i, part in enumerate(parts)]
        counted = sum(sizes[t.ahead : len(sizes) - t.beyond])
        most = min(self.max_length, self.limit - sum(sizes) + counted)
        room, before = most - counted, self._piece(t.pieces[t.cut], query, "")
        if room < len(before) + 1:
            raise ValueError(
                f"score: the query {query[:40]!r} and the template {t.name!r} take {counted + len(before)} tokens, and "
                f"max_length is {most}, so nothing of the document would be left; raise max_length or shorten the query"
            )
        parts[t.cut] = parts[t.cut][:room]
        return [token for part in parts for token in part]

    def answers(self) -> tuple[int, int | None]:
        """The ids of yes and no."""
        return self._word(self.template.yes), None if self.template.no is None else self._word(self.template.no)

    def _piece(self, piece: str, query: str, document: str) -> list[int]:
        if piece == BOS:
            bos = self.tokenizer.bos_token_id
            return [] if bos is None or bos == self.tokenizer.pad_token_id else [bos]
        if "{query}" in piece and self.instruction:
            piece = self.template.instructed + piece
        fields: Mapping[str, str] = {"query": query, "document": document, "instruction": self.instruction}
        text = re.sub(r"\{(query|document|instruction)\}", lambda m: fields[m[1]], piece)
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _word(self, word: str) -> int:
        found = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ValueError(
                f"Reranker: template {self.template.name!r} asks for {word!r}, which must be one token of this tokenizer, "
                f"and is {len(found)}; take a template for this model"
            )
        return int(found[0])
